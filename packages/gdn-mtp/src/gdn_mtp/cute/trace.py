"""Traces and compiles a kernel for fake tensors: every stride and every size but T, K and V is dynamic."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .config import VECTOR_BYTES, Config, KernelConfig
from .config_kmajor import KMajorConfig
from .fragments import NUMERIC
from .kernel import GatedDeltaRule
from .kernel_kmajor import GatedDeltaRuleKMajor


def trace(config: Config, options: str) -> Any:
    """The function compiled by CuTe DSL; it takes the arguments of a launcher."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, KernelConfig):
        return cute.compile(GatedDeltaRule(config), *fake_arguments(config), stream, options=options)
    assert isinstance(config, KMajorConfig)
    return cute.compile(GatedDeltaRuleKMajor(config), *fake_arguments(config), stream, options=options)


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """Stand-ins for a launcher's arguments, None where the configuration has no such tensor."""
    B, H, HV, pool = (cute.sym_int32() for _ in range(4))
    T, K, V = config.T, config.K, config.V
    io, gate, state = (NUMERIC[x] for x in (config.io_dtype, config.gate_dtype, config.state_dtype))
    matrix = (V, K) if config.state_layout == "vk" else (K, V)
    vector = VECTOR_BYTES // config.state_bytes

    def indices(*shape: Any) -> Any:
        assert config.index_dtype is not None
        return make_fake_tensor(NUMERIC[config.index_dtype], shape, tuple(cute.sym_int64() for _ in shape))

    return (
        rows(io, (B, T, H, K)),
        rows(io, (B, T, H, K)),
        rows(io, (B, T, HV, V)),
        rows(gate, (B, T, HV)),
        rows(gate, (B, T, HV)),
        rows(Float32, (HV,)),
        rows(NUMERIC[config.dt_bias_dtype], (HV,)),
        rows(Float32, (1,)) if config.tensor_scale else Float32(1.0),
        rows(state, (pool, HV, *matrix), vector),
        indices(B) if config.index_dtype is not None else None,
        indices(B) if config.separate_write_indices else None,
        rows(state, (cute.sym_int32(), cute.sym_int32(), HV, *matrix), vector)
        if config.intermediate == "buffer"
        else None,
        indices(B, T) if config.intermediate == "scatter" else None,
        rows(NUMERIC[config.out_dtype], (B, T, HV, V)),
    )


def rows(dtype: Any, shape: tuple[Any, ...], divisibility: int = 1) -> Any:
    """A tensor with stride 1 in its last dimension; the others are multiples of `divisibility` elements."""
    strides = tuple(cute.sym_int64(divisibility=divisibility) for _ in shape[:-1])
    align = divisibility * dtype.width // 8
    return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=align)
