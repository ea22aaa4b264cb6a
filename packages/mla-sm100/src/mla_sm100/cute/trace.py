"""Traces and compiles a kernel for fake tensors: every size but the page and every stride is dynamic."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from mla_sm100.config import KV_LORA_RANK, QK_ROPE_HEAD_DIM, STRIDE_ALIGN_BYTES, DecodeConfig

from .kernel import MlaDecode
from .outputs import NUMERIC


def trace(config: DecodeConfig, options: str) -> Any:
    """The function compiled by CuTe DSL; it takes the arguments of a launcher."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(MlaDecode(config), *fake_arguments(config), stream, options=options)


def fake_arguments(config: DecodeConfig) -> tuple[Any, ...]:
    """Stand-ins for a launcher's arguments, None where the configuration has no such tensor."""
    dtype, out_dtype = NUMERIC[config.dtype], NUMERIC[config.out_dtype]
    batch, num_heads = cute.sym_int32(), cute.sym_int32()
    tokens = (cute.sym_int32(),) if config.ragged else (batch, cute.sym_int32())
    head_dim = KV_LORA_RANK + QK_ROPE_HEAD_DIM
    return (
        vectors(dtype, (*tokens, num_heads, head_dim)),
        vectors(dtype, (cute.sym_int32(), config.page_size, head_dim)),
        rows(Int32, (batch, cute.sym_int32())),
        rows(Int32, (batch,)),
        rows(Int32, (cute.sym_int32(),)) if config.ragged else None,
        rows(Float32, (1,)) if config.softmax_scale_is_tensor else Float32(1.0),
        rows(Float32, (1,)) if config.output_scale_is_tensor else Float32(1.0),
        vectors(out_dtype, (*tokens, num_heads, KV_LORA_RANK)),
        strided(Float32, (*tokens, num_heads)) if config.return_lse else None,
        make_fake_tensor(Uint8, (cute.sym_int64(),), (1,), assumed_align=STRIDE_ALIGN_BYTES)
        if config.split
        else None,
        Int32(1),
        Int32(1),
        Int32(1),
        Int32(1),
    )


def vectors(dtype: Any, shape: tuple[Any, ...]) -> Any:
    """A tensor of rows whose addresses are multiples of 16 bytes."""
    return rows(dtype, shape, STRIDE_ALIGN_BYTES * 8 // dtype.width)


def rows(dtype: Any, shape: tuple[Any, ...], divisibility: int = 1) -> Any:
    """A tensor with stride 1 in its last dimension; the others are multiples of `divisibility` elements."""
    strides = tuple(cute.sym_int64(divisibility=divisibility) for _ in shape[:-1])
    return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=divisibility * dtype.width // 8)


def strided(dtype: Any, shape: tuple[Any, ...]) -> Any:
    """A tensor with any strides."""
    return make_fake_tensor(
        dtype, shape, tuple(cute.sym_int64() for _ in shape), assumed_align=dtype.width // 8
    )
