"""Lowering of wgmma instructions."""
