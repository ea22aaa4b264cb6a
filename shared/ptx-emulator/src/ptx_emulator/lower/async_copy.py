"""Asynchronous copies of single threads."""
