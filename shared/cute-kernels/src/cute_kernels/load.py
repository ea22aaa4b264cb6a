"""Loads the library of a compiled function with TVM-FFI and the DSL's runtime library, without the DSL."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path


def load_library(library: Path, function: str) -> Callable[..., None]:
    """The function of that name in a library that `cute_kernels.compile` linked."""
    _load_runtime()
    import tvm_ffi

    launcher: Callable[..., None] = tvm_ffi.load_module(str(library))[function]
    return launcher


@cache
def _load_runtime() -> None:
    """Load the DSL's runtime library, which compiled functions link to."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        for library in sorted(Path(root).glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            return
    raise RuntimeError("libcute_dsl_runtime.so is not in the installed nvidia-cutlass-dsl")
