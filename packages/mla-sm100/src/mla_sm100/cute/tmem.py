"""Tensor memory as softmax threads see it: 32 lanes of a warp by columns, one row of scores per thread.

An address holds the lane in its upper 16 bits and the column in the lower.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op

LANE = 1 << 16  # added to an address: one lane on
_TMEM_SPACE = 6


def load(address: Int32, columns: int) -> cute.TensorSSA:
    """`columns` float32 of the thread's lane, once `wait_loads` has returned; by all lanes of a warp."""
    shape = nvvm.Tcgen05LdStShape.SHAPE_32X32B
    return cute.TensorSSA(_load(address, columns, shape=shape), (columns,), Float32)


def load_halves(address: Int32, columns: int) -> cute.TensorSSA:
    """Like `load` from 16 lanes: lanes 16 to 31 of the warp get the next `columns` of the same 16 lanes."""
    shape = nvvm.Tcgen05LdStShape.SHAPE_16X32BX2
    return cute.TensorSSA(_load(address, columns, shape=shape, split=columns), (columns,), Float32)


def store(address: Int32, values: cute.TensorSSA) -> None:
    """Write consecutive columns of the thread's lane; by all lanes of a warp."""
    _store(address, values)


def wait_loads() -> None:
    """Wait for this thread's loads."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)


def wait_stores() -> None:
    """Wait for this thread's stores."""
    nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.STORE)


def before_thread_sync() -> None:
    """Order this thread's tensor memory accesses before its next arrival at a barrier."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def after_thread_sync() -> None:
    """Order this thread's tensor memory accesses after the barrier it has waited for."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


@dsl_user_op
def _load(address, columns, *, shape, split=None, loc=None, ip=None):
    words = ir.VectorType.get([columns], T.i32())
    pointer = llvm.inttoptr(
        llvm.PointerType.get(_TMEM_SPACE), address.ir_value(loc=loc, ip=ip), loc=loc, ip=ip
    )
    offset = None if split is None else arith.constant(T.i64(), split, loc=loc, ip=ip)
    loaded = nvvm.tcgen05_ld(words, shape, pointer, offset=offset, loc=loc, ip=ip)
    return llvm.bitcast(ir.VectorType.get([columns], T.f32()), loaded, loc=loc, ip=ip)


@dsl_user_op
def _store(address, values, *, loc=None, ip=None):
    words = llvm.bitcast(
        ir.VectorType.get([cute.size(values.shape)], T.i32()), values.ir_value(loc=loc, ip=ip), loc=loc, ip=ip
    )
    pointer = llvm.inttoptr(
        llvm.PointerType.get(_TMEM_SPACE), address.ir_value(loc=loc, ip=ip), loc=loc, ip=ip
    )
    nvvm.tcgen05_st(nvvm.Tcgen05LdStShape.SHAPE_32X32B, pointer, words, loc=loc, ip=ip)
