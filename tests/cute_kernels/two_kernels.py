"""A function of two kernels: rows times a scale, by clusters, then their sum, as a programmatic dependent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cute_kernels import CuteFunction


@dataclass(frozen=True)
class Config:
    """columns: of the tensors. cluster: blocks of a cluster."""

    columns: int = 32
    cluster: int = 2


def trace(config: Config, options: str) -> Any:
    import cutlass.cute as cute
    from cutlass import Float32
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
    from two_kernels_traced import SumOfScaledRows

    def rows() -> Any:
        return make_fake_tensor(Float32, (cute.sym_int32(), config.columns), (cute.sym_int64(), 1))

    out = make_fake_tensor(Float32, (config.columns,), (1,))
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    function = SumOfScaledRows(config.columns, config.cluster)
    return cute.compile(function, rows(), rows(), out, Float32(1.0), stream, options=options)


TRACED = Path(__file__).with_name("two_kernels_traced.py")
FUNCTION = CuteFunction("sum_of_scaled_rows", trace, sources=(TRACED,))
