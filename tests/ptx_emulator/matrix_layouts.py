"""Operands of matrix instructions placed in shared memory, written from the layout functions of CuTe's
canonical layouts (shape and stride tuples and a bit swizzle), not from the emulator's formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import ml_dtypes
import numpy as np

OPERANDS = 1024  # offset of an image in shared memory


def copy_image(source: str, num_bytes: int) -> str:
    """PTX for 128 threads that copies an image at `source` to `OPERANDS`, for the async proxy to read.

    %mbar is the start of shared memory; %n, %step, %more and %r2 to %r6 are used.
    """
    return f"""
    shl.b32 %n, %r1, 4;
    copy:
    cvt.u64.u32 %step, %n;
    add.u64 %step, %step, {source};
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%step];
    add.u32 %r6, %n, %mbar;
    st.shared.v4.b32 [%r6+{OPERANDS}], {{%r2, %r3, %r4, %r5}};
    add.u32 %n, %n, 2048;
    setp.lt.u32 %more, %n, {num_bytes};
    @%more bra copy;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    """


ELEMENT_BYTES = {
    "f16": 2,
    "bf16": 2,
    "tf32": 4,
    "e4m3": 1,
    "e5m2": 1,
    "e2m3": 1,
    "e3m2": 1,
    "e2m1": 1,
    "u8": 1,
    "s8": 1,
}
NUMPY_TYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "u8": np.uint8,
    "s8": np.int8,
}
PACKED_BITS = {"e2m3": 6, "e3m2": 6, "e2m1": 4}

# Swizzle<bits, base, shift> of byte addresses, the width of a row of the atom and its rows, and the codes of
# the modes in the descriptors of tcgen05 and wgmma.
SWIZZLES = {
    "none": ((0, 4, 3), 16, 8, 0, 0),
    "32B": ((1, 4, 3), 32, 8, 6, 3),
    "64B": ((2, 4, 3), 64, 8, 4, 2),
    "128B": ((3, 4, 3), 128, 8, 2, 1),
    "128B_32B": ((2, 5, 2), 128, 4, 1, None),
}


@dataclass(frozen=True)
class Placement:
    """Bytes of shared memory from a start address, and the two strides of the descriptor in bytes."""

    data: np.ndarray
    leading: int
    stride: int
    swizzle: str

    def tcgen05_descriptor(self, start: int) -> int:
        code = SWIZZLES[self.swizzle][3]
        return start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | 1 << 46 | code << 61

    def wgmma_descriptor(self, start: int) -> int:
        code = SWIZZLES[self.swizzle][4]
        assert code is not None
        return start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | code << 62


def layout(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """All values of a CuTe layout, the first mode fastest."""
    offsets = []
    for index in product(*(range(n) for n in reversed(shape))):
        offsets.append(sum(i * s for i, s in zip(reversed(index), strides, strict=True)))
    return offsets


def swizzle(address: int, parameters: tuple[int, int, int]) -> int:
    bits, base, shift = parameters
    mask = ((1 << bits) - 1) << (base + shift)
    return address ^ ((address & mask) >> shift)


def encode(values: np.ndarray, element: str) -> np.ndarray:
    """Values as the bytes of containers: [..., bytes of an element]."""
    typed = np.ascontiguousarray(values.astype(NUMPY_TYPES[element]))
    return typed.view(np.uint8).reshape(*values.shape, ELEMENT_BYTES[element])


def pack_chunk(chunk: np.ndarray, element: str) -> np.ndarray:
    """Six- and four-bit elements of a 16-byte chunk: packed from its start, the rest is padding."""
    bits = PACKED_BITS.get(element)
    if bits is None:
        return chunk
    number = sum(int(code) << (bits * position) for position, code in enumerate(chunk))
    return np.frombuffer(number.to_bytes(16, "little"), dtype=np.uint8)


def place(
    values: np.ndarray, element: str, mode: str, mn_major: bool, start: int = 0, gap: int = 0
) -> Placement:
    """Puts `values` [rows, k] into a canonical layout.

    `gap` bytes are left between the atoms, so that no stride is what a compact tile has; it must keep the
    atoms aligned as the swizzle needs it.
    """
    rows, depth = values.shape
    parameters, width, atom_depth, _, _ = SWIZZLES[mode]
    per_chunk = 16 // ELEMENT_BYTES[element]
    codes = encode(values, element)
    chunks_of_width = width // 16
    if not mn_major:
        atom = 8 * width + gap
        groups, chunks = rows // 8, depth // per_chunk
        if mode == "none":  # ((8,m),(T,2)):((1T,SBO),(1,LBO))
            stride, leading = atom, groups * atom
        else:  # ((8,m),(T,2)):((wT,SBO),(1,T))
            stride, leading = atom, 16
        offsets = layout((8, groups, chunks), (width, stride, leading))
        lines = codes.reshape(rows, chunks, 16).transpose(1, 0, 2).reshape(-1, 16)
        leading = leading if mode == "none" else 0
    else:
        chunk_rows = rows // per_chunk
        depth_groups = depth // atom_depth
        atom = atom_depth * width + gap
        if mode == "none":  # ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
            stride, leading = atom, chunk_rows * atom
            offsets = layout((chunk_rows, 8, depth_groups), (stride, 16, leading))
        else:  # ((T,w,m),(8,k)):((1,T,LBO),(wT,SBO))
            wide = -(-chunk_rows // chunks_of_width)
            stride, leading = atom, depth_groups * atom
            offsets = layout(
                (min(chunks_of_width, chunk_rows), wide, atom_depth, depth_groups),
                (16, leading, width, stride),
            )
        lines = codes.transpose(1, 0, 2).reshape(-1, 16)
    addresses = [swizzle(start + offset, parameters) - start for offset in offsets]
    data = np.full(max(addresses) + 16, 0x7F, dtype=np.uint8)
    for address, line in zip(addresses, lines, strict=True):
        data[address : address + 16] = pack_chunk(line, element)
    return Placement(data, leading, stride, mode)
