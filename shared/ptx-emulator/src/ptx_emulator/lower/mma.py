"""Lowering of mma instructions."""
