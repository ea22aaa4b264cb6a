"""Lowering of half instructions."""
