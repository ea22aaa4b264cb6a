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
def cuda_of_dsl() -> int:
    """The major version of the CUDA that the DSL compiles with here: it chooses by the driver."""
    return newest_supported(sorted(_runtime_libraries()), _cuda_of_driver())


def newest_supported(installed: list[int], of_driver: int | None) -> int:
    """The newest of the CUDAs `installed` that the driver supports, as the DSL chooses; None: no driver.

    Raises RuntimeError where there is none.
    """
    supported = [cuda for cuda in installed if of_driver is None or cuda <= of_driver]
    if not supported:
        found = ", ".join(map(str, installed)) or "none"
        raise RuntimeError(
            f"nvidia-cutlass-dsl is installed for CUDA {found}, the driver supports up to {of_driver}"
        )
    return max(supported)


@cache
def _load_runtime() -> None:
    """Load the DSL's runtime library, which compiled functions link to."""
    ctypes.CDLL(str(_runtime_libraries()[cuda_of_dsl()]), ctypes.RTLD_GLOBAL)


def _runtime_libraries() -> dict[int, Path]:
    """The runtime libraries of the installed DSL, by the major version of their CUDA."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [library for root in roots for library in Path(root).glob("cu*/lib/libcute_dsl_runtime.so")]
    return {int(library.parent.parent.name.removeprefix("cu")): library for library in found}


def _cuda_of_driver() -> int | None:
    """The newest major version of CUDA that the driver supports, None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000
