"""tcgen05.mma: descriptors of operands in shared memory, the instruction, and commits.

Fields of the descriptors: PTX ISA, "Shared memory descriptor" and "Instruction descriptor" of tcgen05.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Boolean, Int32, Int64
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import dsl_user_op

ADDRESS_UNIT_BYTES = 16
SWIZZLE_ROWS = 8  # rows after which a swizzled pattern repeats
_SWIZZLE_FIELD = {128: 2, 64: 4, 32: 6}
_DESCRIPTOR_VERSION = 1 << 46
_TMEM_SPACE = 6
_FORMAT = {"fp16": 0, "bf16": 1, "e4m3": 0}
_FLOAT32_ACCUMULATOR = 1 << 4
_NEGATE_A_BIT = 13
_B_MN_MAJOR = 1 << 16
STEP_BYTES = 32  # of K that one instruction consumes, in either operand


def instruction_descriptor(dtype: str, m: int, n: int, b_mn_major: bool = False) -> int:
    """Shape and formats of an MMA with A K-major and a float32 accumulator."""
    formats = _FORMAT[dtype] << 7 | _FORMAT[dtype] << 10
    return _FLOAT32_ACCUMULATOR | formats | (_B_MN_MAJOR if b_mn_major else 0) | n // 8 << 17 | m // 16 << 24


def k_major(row_bytes: int) -> int:
    """A descriptor without address: rows of `row_bytes`, swizzled over as many bytes, eight rows apart."""
    return _descriptor(
        leading_bytes=ADDRESS_UNIT_BYTES, stride_bytes=SWIZZLE_ROWS * row_bytes, swizzle=row_bytes
    )


def mn_major(group_bytes: int) -> int:
    """A descriptor without address: K rows of 128 bytes; `group_bytes` from 128 bytes of MN to the next."""
    return _descriptor(leading_bytes=group_bytes, stride_bytes=SWIZZLE_ROWS * 128, swizzle=128)


def _descriptor(leading_bytes: int, stride_bytes: int, swizzle: int) -> int:
    leading, stride = leading_bytes // ADDRESS_UNIT_BYTES, stride_bytes // ADDRESS_UNIT_BYTES
    fields = leading << 16 | stride << 32 | _DESCRIPTOR_VERSION | _SWIZZLE_FIELD[swizzle] << 61
    return fields - (1 << 64) if fields >> 63 else fields


def operand(descriptor: int, address: Int32) -> Int64:
    """`descriptor` for the operand at a shared memory address, a multiple of 16."""
    return Int64(descriptor) | Int64(address >> 4)


def advance(operand_descriptor: Int64, num_bytes: int) -> Int64:
    """The operand that lies `num_bytes`, a multiple of 16, further on."""
    return operand_descriptor + num_bytes // ADDRESS_UNIT_BYTES


@dataclass(frozen=True)
class Mma:
    """One kind of MMA: D [m, n] in tensor memory (+)= A [m, k] B [n, k], A and B in shared memory."""

    dtype: str
    m: int
    n: int
    two_cta: bool
    b_mn_major: bool = False

    def issue(self, d: Int32, a: Int64, b: Int64, accumulate: Boolean, negate: Boolean) -> None:
        """Issue one instruction, with -A where `negate` holds; by one thread."""
        instruction = instruction_descriptor(self.dtype, self.m, self.n, self.b_mn_major)
        _mma(
            d,
            a,
            b,
            Int32(instruction) | (Int32(negate) << _NEGATE_A_BIT),
            Boolean(accumulate),
            kind=nvvm.Tcgen05MMAKind.F8F6F4 if self.dtype == "e4m3" else nvvm.Tcgen05MMAKind.F16,
            group=nvvm.CTAGroupKind.CTA_2 if self.two_cta else nvvm.CTAGroupKind.CTA_1,
        )


def commit(mbar, two_cta: bool) -> None:
    """Arrive at `mbar`, in both CTAs of a pair, when the MMAs issued so far are complete; by one thread."""
    if two_cta:
        tcgen05.commit(mbar, 0b11, tcgen05.CtaGroup.TWO)
    else:
        tcgen05.commit(mbar)


@dsl_user_op
def _mma(d, a, b, instruction, accumulate, *, kind, group, loc=None, ip=None) -> None:
    pointer = llvm.inttoptr(llvm.PointerType.get(_TMEM_SPACE), d.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
    nvvm.tcgen05_mma(
        kind,
        group,
        pointer,
        a.ir_value(loc=loc, ip=ip),
        b.ir_value(loc=loc, ip=ip),
        instruction.ir_value(loc=loc, ip=ip),
        accumulate.ir_value(loc=loc, ip=ip),
        loc=loc,
        ip=ip,
    )
