"""CuTe DSL functions, compiled once into a cache and loaded without the DSL, which is not imported here."""

from .__about__ import __version__
from .compile import Compiled, CuteFunction

__all__ = ["Compiled", "CuteFunction", "__version__"]
