"""The version of mla-sm120."""

__version__ = "0.1.0"
