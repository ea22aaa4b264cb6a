"""Helpers for tests and benchmarks: strict comparison, poisoned memory, timing."""
