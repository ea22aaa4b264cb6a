"""Warnings that point at the application's line, past our frames and those of the operation's package."""

from __future__ import annotations

import inspect
import warnings
from types import FrameType

_SKIPPED = {"kernel_dispatch", "contextlib", "torch"}  # a call may come through a context manager or an op


def warn_caller(message: str, problem: object = None) -> None:
    """Gives a RuntimeWarning at the innermost frame outside the package that defines the class of `problem`.

    Frames of this package, of torch and of contextlib are passed over as well. If there is no other frame, as
    in a thread of such a package's own, the warning points at the outermost one.
    """
    skipped = _SKIPPED | ({_top_package(type(problem).__module__)} - {"__main__", "builtins"})
    frame = inspect.currentframe()
    assert frame is not None, "CPython has frames"
    while frame.f_back is not None and _top_package(_module(frame)) in skipped:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=_module(frame),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "unknown"))


def _top_package(module: str) -> str:
    return module.partition(".")[0]
