"""out = x * scale + y: one thread per element of contiguous vectors, any length."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from ptx_emulator import compile_cute

BLOCK_THREADS = 128


@cute.kernel
def axpy_kernel(mX: cute.Tensor, mY: cute.Tensor, mOut: cute.Tensor, scale: Float32, num_elements: Int32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    index = block * BLOCK_THREADS + thread
    if index < num_elements:
        mOut[index] = (mX[index].to(cutlass.Float32) * scale + mY[index].to(cutlass.Float32)).to(
            mOut.element_type
        )


@cute.jit
def axpy(mX: cute.Tensor, mY: cute.Tensor, mOut: cute.Tensor, scale: Float32, stream: Any):
    num_elements = cute.size(mX)
    axpy_kernel(mX, mY, mOut, scale, num_elements).launch(
        grid=[cute.ceil_div(num_elements, BLOCK_THREADS), 1, 1], block=[BLOCK_THREADS, 1, 1], stream=stream
    )


def compile_axpy(arch: str, dtype: Any = cutlass.Float32) -> Any:
    """The compiled function `(x, y, out, scale)` for vectors of `dtype`."""
    length = cute.sym_int32()
    vectors = [cute.runtime.make_fake_compact_tensor(dtype, (length,), assumed_align=16) for _ in range(3)]
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return compile_cute(axpy, *vectors, Float32(1.0), stream, arch=arch)
