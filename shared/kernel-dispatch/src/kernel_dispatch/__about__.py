"""The version of kernel-dispatch."""

__version__ = "0.1.0"
