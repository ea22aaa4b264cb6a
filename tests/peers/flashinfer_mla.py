"""FlashInfer's CuTe DSL MLA decode on the emulator: its host code and kernels, from the installed package.

Only the modules of the kernel are imported: `flashinfer/__init__.py` and `flashinfer/utils.py` need a GPU's
libraries, so that packages stand empty in their place, and the GPU's properties are those of a B200.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from ptx_emulator import compile_cute, emulate
from ptx_emulator.host.cute import Call

PACKAGES = (
    "flashinfer",
    "flashinfer.cute_dsl",
    "flashinfer.cute_dsl.attention",
    "flashinfer.cute_dsl.attention.monolithic",
)
DECODE = "flashinfer.cute_dsl.attention.monolithic.mla_decode"
ARCH = "sm_100a"
NUM_SMS = 148
KV_LORA_RANK, QK_ROPE_HEAD_DIM = 512, 64
WORKSPACE_BYTES = 32 << 20
CALLS: list[Call] = []


def installed() -> bool:
    """Whether the package is there."""
    try:
        importlib.metadata.distribution("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def decode_module() -> ModuleType:
    """FlashInfer's module with the host function, which compiles for the emulator."""
    root = importlib.metadata.distribution("flashinfer-python").locate_file("")
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    utils: Any = ModuleType("flashinfer.utils")
    utils.device_support_pdl = lambda device: True
    utils.get_compute_capability = lambda device: (10, 0)
    sys.modules[utils.__name__] = utils
    module: Any = importlib.import_module(DECODE)
    module.get_num_sm = lambda device: NUM_SMS
    module.get_max_active_clusters = lambda cluster_size: NUM_SMS // cluster_size
    module.cute = _Cute(module.cute)
    compile_kernel = module._get_compiled_mla_kernel
    module._get_compiled_mla_kernel = cache(lambda **config: _Kernel(compile_kernel(**config)))
    return module


class _Cute:
    """`cutlass.cute` with a `compile` that keeps the PTX."""

    def __init__(self, cute: ModuleType) -> None:
        self._cute = cute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cute, name)

    def compile(self, kernel: Any, *args: Any, options: str) -> Any:
        assert f"--gpu-arch {ARCH}" in options
        return compile_cute(kernel, *args, arch=ARCH, options="--opt-level 2")


class _Kernel:
    """A compiled kernel; instead of running, a call of it is kept in `CALLS`."""

    def __init__(self, compiled: Any) -> None:
        self._emulated = emulate(compiled, ARCH, uninitialised=("o", "lse", "workspace"))

    def __call__(self, *args: Any) -> None:
        CALLS.append(self._emulated.call(*args))


def decode_call(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    max_seq_len: int,
    *,
    pdl: bool = False,
) -> SimpleNamespace:
    """A decode ready to run: `job`, and `out` [B, q_len, H, 512] and `lse` [B, q_len, H] that it fills.

    Args:
        query: [B, q_len, H, 576].
        kv_cache: [num_pages, page_size, 576].
        block_tables: [B, max_pages].
        seq_lens: [B].
    """
    B, q_len, H, _ = query.shape
    dtype = torch.bfloat16 if query.dtype.itemsize == 1 else query.dtype
    out = torch.full((B, q_len, H, KV_LORA_RANK), float("nan"), dtype=dtype)
    lse = torch.full((B, q_len, H), float("nan"))
    CALLS.clear()
    decode_module().cute_dsl_mla_decode(
        query,
        kv_cache,
        torch.empty(WORKSPACE_BYTES, dtype=torch.int8),
        KV_LORA_RANK,
        QK_ROPE_HEAD_DIM,
        block_tables,
        seq_lens,
        max_seq_len,
        softmax_scale,
        out=out,
        lse=lse,
        return_lse=True,
        enable_pdl=pdl,
    )
    (job,) = CALLS
    return SimpleNamespace(job=job, out=out, lse=lse)
