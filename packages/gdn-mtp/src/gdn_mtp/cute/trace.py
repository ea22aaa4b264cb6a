"""Traces and compiles a kernel for fake tensors.

Sizes but T, K, V and a cache's capacity are dynamic, and so are strides, but for those of a cache that
follow from known sizes.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .config import VECTOR_BYTES, Config, KernelConfig
from .config_kmajor import KMajorConfig
from .config_speculative import SpeculativeConfig
from .fragments import NUMERIC
from .kernel import GatedDeltaRule
from .kernel_kmajor import GatedDeltaRuleKMajor
from .speculative import Verify
from .speculative_fold import Fold

ASSERTIONS = "--enable-assertions"  # without it the DSL leaves them out
SAVING = "--ptxas-options '--register-usage-level=2'"  # of 0 to 10; 5 unless said


def trace(config: Config | SpeculativeConfig, options: str) -> Any:
    """The function compiled by CuTe DSL; it takes the arguments of a launcher."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, SpeculativeConfig) and config.debug:
        options = f"{options} {ASSERTIONS}"
    if isinstance(config, KernelConfig) and config.saves_registers:
        options = f"{options} {SAVING}"
    return cute.compile(kernel(config), *arguments(config), stream, options=options)


def kernel(config: Config | SpeculativeConfig) -> Any:
    """The kernel of a configuration."""
    if isinstance(config, SpeculativeConfig):
        return (Verify if config.mode == "verify" else Fold)(config)
    if isinstance(config, KernelConfig):
        return GatedDeltaRule(config)
    assert isinstance(config, KMajorConfig)
    return GatedDeltaRuleKMajor(config)


def arguments(config: Config | SpeculativeConfig) -> tuple[Any, ...]:
    """Stand-ins for a launcher's arguments."""
    if isinstance(config, SpeculativeConfig):
        return fake_speculative_arguments(config)
    return fake_arguments(config)


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """Stand-ins for a launcher's arguments, None where the configuration has no such tensor."""
    B, H, HV, pool = (cute.sym_int32() for _ in range(4))
    T, K, V = config.T, config.K, config.V
    io, gate, state = (NUMERIC[x] for x in (config.io_dtype, config.gate_dtype, config.state_dtype))
    matrix = (V, K) if config.state_layout == "vk" else (K, V)

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
        states(config, state, (pool, HV, *matrix)),
        indices(B) if config.index_dtype is not None else None,
        indices(B) if config.separate_write_indices else None,
        states(config, state, (cute.sym_int32(), cute.sym_int32(), HV, *matrix))
        if config.intermediate == "buffer"
        else None,
        indices(B, T) if config.intermediate == "scatter" else None,
        rows(NUMERIC[config.out_dtype], (B, T, HV, V)),
    )


def fake_speculative_arguments(config: SpeculativeConfig) -> tuple[Any, ...]:
    """Stand-ins for a speculative launcher's arguments, None where the configuration has no such tensor."""
    B, H, HV, pool = (cute.sym_int32() for _ in range(4))
    T, K, V, R = config.T, config.K, config.V, config.capacity
    io, gate, state = (NUMERIC[x] for x in (config.io_dtype, config.gate_dtype, config.state_dtype))
    tensors = (
        states(config, state, (pool, HV, V, K)),
        make_fake_tensor(NUMERIC[config.index_dtype], (B,), (cute.sym_int64(),)),
        slots(io, (pool, R, H, K), 8 * VECTOR_BYTES // io.width),
        slots(Float32, (pool, R, HV, V), VECTOR_BYTES // 4),
        slots(Float32, (pool, R, HV)),
        slots(Float32, (pool, R, H)),
        slots(Int32, (pool, 4), 4),
        slots(Int32, (pool,)),
        rows(Int32, (B,)) if config.accept == "counts" else None,
        rows(Int32, (B, cute.sym_int32())) if config.accept == "nodes" else None,
    )
    if config.mode != "verify":
        return (*tensors, states(config, state, (B, HV, V, K)) if config.mode == "materialize" else None)
    return (
        tokens(io, (B, T, H, K)),
        tokens(io, (B, T, H, K)),
        tokens(io, (B, T, HV, V)),
        tokens(gate, (B, T, HV)),
        tokens(gate, (B, T, HV)),
        rows(Float32, (HV,)),
        rows(NUMERIC[config.dt_bias_dtype], (HV,)),
        rows(Float32, (1,)) if config.tensor_scale else Float32(1.0),
        *tensors,
        rows(Int32, (B,)) if config.variable_tokens else None,
        rows(Int32, (B, T)) if config.tree else None,
        Int32(0),
        tokens(NUMERIC[config.out_dtype], (B, T, HV, V)),
    )


def rows(dtype: Any, shape: tuple[Any, ...]) -> Any:
    """A tensor with stride 1 in its last dimension."""
    strides = tuple(cute.sym_int64() for _ in shape[:-1])
    return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=dtype.width // 8)


def states(config: Config | SpeculativeConfig, dtype: Any, shape: tuple[Any, ...]) -> Any:
    """States [..., V, K] or [..., K, V]: `rows`, 16-byte aligned and contiguous unless they may lie apart."""
    vector = VECTOR_BYTES * 8 // dtype.width
    strides = [cute.sym_int64(divisibility=vector) for _ in shape[:-1]]
    if not config.rows_may_lie_apart:
        strides[-1] = shape[-1]
    return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=VECTOR_BYTES)


def tokens(dtype: Any, shape: tuple[Any, ...]) -> Any:
    """A tensor of tokens [B, T, ...]: as `rows`, but inside a request with strides below 2^31.

    Such strides take fewer registers. Offsets are 64-bit all the same, as their products are.
    """
    strides = (cute.sym_int64(), *(cute.sym_int32() for _ in shape[1:-1]), 1)
    return make_fake_tensor(dtype, shape, strides, assumed_align=dtype.width // 8)


def slots(dtype: Any, shape: tuple[Any, ...], aligned_elements: int = 1) -> Any:
    """A tensor of a cache: contiguous, with fewer than 2^31 elements a slot.

    Offsets into a slot are 32-bit and known sizes are in the code, which takes fewer instructions.
    """
    strides: list[Any] = [1]
    factor = 1  # the product of the known sizes so far
    for dim in reversed(range(1, len(shape))):
        size = shape[dim]
        known = isinstance(size, int) and isinstance(strides[0], int)
        factor *= size if isinstance(size, int) else 1
        strides.insert(0, factor if known else cute.sym_int32(divisibility=factor))
    align = aligned_elements * dtype.width // 8
    return make_fake_tensor(dtype, shape, tuple(strides), assumed_align=align)
