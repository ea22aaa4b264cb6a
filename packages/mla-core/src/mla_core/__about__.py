"""Version of mla-core."""

__version__ = "0.1.0"
