"""The kernel of `test_call`; imports the DSL."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32


class EveryKindOfArgument:
    """x [rows, 32] = x * scale + count, plus bias [32] where there is one."""

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        bias: cute.Tensor | None,
        scale: cute.Tensor | Float32,
        count: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(x, bias, scale, count).launch(grid=(x.shape[0], 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, bias: cute.Tensor | None, scale: cute.Tensor | Float32, count: Int32):
        row, _, _ = cute.arch.block_idx()
        column, _, _ = cute.arch.thread_idx()
        factor = scale[0] if cutlass.const_expr(isinstance(scale, cute.Tensor)) else scale
        value = x[row, column] * factor + Float32(count)
        if cutlass.const_expr(bias is not None):
            value = value + bias[column]
        x[row, column] = value
