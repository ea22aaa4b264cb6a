"""Lowering of arithmetic instructions."""
