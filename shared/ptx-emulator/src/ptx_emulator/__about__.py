"""The version of ptx-emulator."""

__version__ = "0.1.0"
