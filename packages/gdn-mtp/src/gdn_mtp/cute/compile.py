"""The one place where the kernels are compiled: once per configuration, by cute-kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cute_kernels import CuteFunction

from .config import Config
from .config_speculative import SpeculativeConfig


def _trace(config: Config | SpeculativeConfig, options: str) -> Any:
    from .trace import trace

    return trace(config, options)


_PACKAGE = Path(__file__).parents[1]
SOURCES = ("cute", "problem.py", "speculative/problem.py")
FUNCTION = CuteFunction("gated_delta_rule", _trace, tuple(_PACKAGE / name for name in SOURCES))
