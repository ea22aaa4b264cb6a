"""The version of kernel-testing."""

__version__ = "0.1.0"
