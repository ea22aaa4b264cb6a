"""Lowering of convert instructions."""
