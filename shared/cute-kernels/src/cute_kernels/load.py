"""Loads the library of a compiled function with TVM-FFI and the DSL's runtime library, without the DSL."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

EXCHANGE_API = "__dlpack_c_exchange_api__"  # of torch.Tensor: torch's own, or set by TVM-FFI
SKIP_EXCHANGE_API = "TVM_FFI_SKIP_DLPACK_C_EXCHANGE_API"  # "1" tells TVM-FFI not to use it


def load_library(library: Path, function: str) -> Callable[..., None]:
    """The function of that name in a library that `cute_kernels.compile` linked.

    It is called by `call.c`; by TVM-FFI where torch has no DLPack exchange API that describes a tensor in
    place, or where TVM-FFI has been told not to use that API.
    """
    _load_runtime()
    import torch
    import tvm_ffi

    module = tvm_ffi.load_module(str(library))
    types = (type(None), float, int, torch.Tensor, torch.nn.Parameter)
    kept = (module[function], module["cute_kernels_raise"], None, *types)  # in the order of `enum kept`
    bind = ctypes.PyDLL(str(library)).cute_kernels_bind
    bind.argtypes, bind.restype = (ctypes.py_object, ctypes.py_object), ctypes.py_object
    skipped = os.environ.get(SKIP_EXCHANGE_API) == "1"
    launcher: Callable[..., None] = bind(kept, None if skipped else getattr(torch.Tensor, EXCHANGE_API, None))
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
