"""Debug mode: checks that cost a device synchronisation or extra memory, off by default.

`KERNEL_DISPATCH_DEBUG=1` in the environment, read once, at import, turns it on for the process ("0", "false",
"no" and "off" do not), `debug()` for a block of code. It adds range checks on index tensors and scale values
that live on a GPU, and canaries around the workspaces of launches (`launch_workspace`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PROCESS_WIDE = os.environ.get("KERNEL_DISPATCH_DEBUG", "").lower() not in ("", "0", "false", "no", "off")
_active: ContextVar[bool] = ContextVar("kernel_dispatch_debug", default=False)


def debug_mode() -> bool:
    """Whether debug checks are on, for the process or in the current context (thread or async task)."""
    return _PROCESS_WIDE or _active.get()


@contextmanager
def debug() -> Iterator[None]:
    """Turns the debug checks on inside the block, for the current thread or async task."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)
