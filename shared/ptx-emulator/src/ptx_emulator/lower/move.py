"""Lowering of move instructions."""
