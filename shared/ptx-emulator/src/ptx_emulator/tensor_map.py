"""The 128-byte tensor map: what `cuTensorMapEncodeTiled` makes, and back.

The layout is that of `cuTensorMapEncodeTiled` of driver 580.159.04 on an H200; the host code of compiled CuTe
DSL functions writes the same, and for sm_100 sets bit 1 of the word at 8, which means nothing here.

| where | what |
|---|---|
| bytes 0 to 7 | address |
| word at 8 | 4-6 rank - 1; 7-10 type; 11-12 interleave; 13-14 swizzle; 15 NaN fill; 16 tf32; 17-18 L2 |
| words at 12, 16, 20, 24 | strides 1 to 4 in units of 16 bytes, low 32 bits |
| word at 28 | their upper 4 bits, a nibble each |
| words at 32 to 48 | dimensions - 1 |
| word at 52 | element strides - 1, three bits each |
| bytes 55 to 59 | box - 1 |

Bits 19 to 20 of the word at 8 are the atomicity of the swizzle, where only 19 (32 bytes) was seen. Bytes 64
to 127 mean nothing. The element stride of dimension 0 is ignored without interleave.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod

BYTES = 128
MAX_RANK = 5
STRIDE_UNIT = 16  # bytes
MAX_BOX = 256
MAX_ELEMENT_STRIDE = 8
MAX_BOX_BYTES = 228 << 10  # all shared memory of an SM; one CTA has less

_FLAGS, _STRIDES, _STRIDES_HIGH, _DIMS, _ELEMENT_STRIDES, _BOX = 8, 12, 28, 32, 52, 55


class DataType(IntEnum):
    """CUtensorMapDataType."""

    UINT8 = 0
    UINT16 = 1
    UINT32 = 2
    INT32 = 3
    UINT64 = 4
    INT64 = 5
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9
    FLOAT32_FTZ = 10
    TFLOAT32 = 11
    TFLOAT32_FTZ = 12
    U4_ALIGN8B = 13
    U4_ALIGN16B = 14
    U6_ALIGN16B = 15


class Interleave(IntEnum):
    """CUtensorMapInterleave."""

    NONE = 0
    B16 = 1
    B32 = 2


class Swizzle(IntEnum):
    """CUtensorMapSwizzle."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3
    B128_ATOM_32B = 4
    B128_ATOM_32B_FLIP_8B = 5
    B128_ATOM_64B = 6


class L2Promotion(IntEnum):
    """CUtensorMapL2promotion."""

    NONE = 0
    B64 = 1
    B128 = 2
    B256 = 3


class OobFill(IntEnum):
    """CUtensorMapFloatOOBfill."""

    ZERO = 0
    NAN = 1


_BITS = (8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6)  # of an element, by DataType
# Numbers of the types in the tensor map, as tensormap.replace has them; tf32 is f32 with a bit of its own.
_CODES = {
    **{t: int(t) for t in DataType if t <= DataType.FLOAT32 or t >= DataType.U4_ALIGN8B},
    DataType.FLOAT32_FTZ: 8,
    DataType.FLOAT64: 9,
    DataType.BFLOAT16: 10,
    DataType.TFLOAT32: 7,
    DataType.TFLOAT32_FTZ: 8,
}
_TF32 = {DataType.FLOAT32: DataType.TFLOAT32, DataType.FLOAT32_FTZ: DataType.TFLOAT32_FTZ}
_FLOATS = (
    DataType.FLOAT16,
    DataType.FLOAT32,
    DataType.FLOAT64,
    DataType.BFLOAT16,
    DataType.FLOAT32_FTZ,
    DataType.TFLOAT32,
    DataType.TFLOAT32_FTZ,
)
_PADDED = (DataType.U4_ALIGN16B, DataType.U6_ALIGN16B)
_SPANS = {Swizzle.B32: 32, Swizzle.B64: 64}  # bytes; all others have 128
_ATOMS = (Swizzle.B128, Swizzle.B128_ATOM_32B, Swizzle.B128_ATOM_32B_FLIP_8B, Swizzle.B128_ATOM_64B)


@dataclass(frozen=True)
class TensorMap:
    """The arguments of `cuTensorMapEncodeTiled`. Dimension 0 is the contiguous one.

    Attributes:
        strides: of dimensions 1 and up, in bytes.
        box: elements that are traversed in each dimension.
        element_strides: every n-th of them is copied.
    """

    data_type: DataType
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...] = ()  # empty: all 1
    interleave: Interleave = Interleave.NONE
    swizzle: Swizzle = Swizzle.NONE
    l2_promotion: L2Promotion = L2Promotion.B128
    oob_fill: OobFill = OobFill.ZERO

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def steps(self) -> tuple[int, ...]:
        """Element strides, spelt out."""
        return self.element_strides or (1,) * self.rank

    @property
    def element_bits(self) -> int:
        return _BITS[self.data_type]

    @property
    def box_bytes(self) -> int:
        """Bytes of one copy, which its mbarrier counts."""
        elements = self.box[0]
        for length, step in zip(self.box[1:], self.steps[1:], strict=True):
            elements *= -(-length // step)
        return elements * self.element_bits // 8

    def problem(self) -> str | None:
        """Why the driver would refuse these arguments, None if it takes them."""
        return _shape_problem(self) or _alignment_problem(self) or _swizzle_problem(self)

    def encode(self) -> bytes:
        """The tensor map.

        Raises:
            ValueError: the arguments are not valid; the message says which and why.
        """
        why = self.problem()
        if why is not None:
            raise ValueError(why)
        out = bytearray(BYTES)
        struct.pack_into("<Q", out, 0, self.address)
        struct.pack_into("<I", out, _FLAGS, _flags(self))
        high = 0
        for index, stride in enumerate(self.strides):
            units = stride // STRIDE_UNIT
            struct.pack_into("<I", out, _STRIDES + 4 * index, units & 0xFFFFFFFF)
            high |= units >> 32 << 4 * index
        struct.pack_into("<I", out, _STRIDES_HIGH, high)
        steps = 0
        for index in range(self.rank):
            struct.pack_into("<I", out, _DIMS + 4 * index, self.dims[index] - 1)
            steps |= (self.steps[index] - 1) << 3 * index
        struct.pack_into("<I", out, _ELEMENT_STRIDES, steps)
        out[_BOX : _BOX + self.rank] = bytes(length - 1 for length in self.box)
        return bytes(out)


def encode_tiled(
    data_type: int,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int],
    interleave: int,
    swizzle: int,
    l2_promotion: int,
    oob_fill: int,
) -> bytes:
    """`cuTensorMapEncodeTiled` with the numbers of the driver's enumerations.

    Raises:
        ValueError: the driver would return CUDA_ERROR_INVALID_VALUE.
    """
    return TensorMap(
        DataType(data_type),
        address,
        tuple(dims),
        tuple(strides),
        tuple(box),
        tuple(element_strides),
        Interleave(interleave),
        Swizzle(swizzle),
        L2Promotion(l2_promotion),
        OobFill(oob_fill),
    ).encode()


def decode(data: bytes) -> TensorMap:
    """The arguments that a tensor map was made of.

    Raises:
        ValueError: these are not the bytes of a tensor map.
    """
    if len(data) != BYTES:
        raise ValueError(f"a tensor map has {BYTES} bytes, not {len(data)}")
    (flags,) = struct.unpack_from("<I", data, _FLAGS)
    rank = (flags >> 4 & 7) + 1
    if not any(data[:8]) or rank > MAX_RANK:
        raise ValueError("these bytes are not a tensor map")
    code = flags >> 7 & 15
    data_type = next(t for t, c in _CODES.items() if c == code)
    mode = Swizzle(flags >> 13 & 3)
    (high,) = struct.unpack_from("<I", data, _STRIDES_HIGH)
    low = struct.unpack_from("<4I", data, _STRIDES)
    (steps,) = struct.unpack_from("<I", data, _ELEMENT_STRIDES)
    return TensorMap(
        data_type=_TF32[data_type] if flags >> 16 & 1 else data_type,
        address=struct.unpack_from("<Q", data, 0)[0],
        dims=tuple(length + 1 for length in struct.unpack_from(f"<{rank}I", data, _DIMS)),
        strides=tuple((low[k] | (high >> 4 * k & 15) << 32) * STRIDE_UNIT for k in range(rank - 1)),
        box=tuple(length + 1 for length in data[_BOX : _BOX + rank]),
        element_strides=tuple((steps >> 3 * k & 7) + 1 for k in range(rank)),
        interleave=Interleave(flags >> 11 & 3),
        swizzle=_ATOMS[flags >> 19 & 3] if mode == Swizzle.B128 else mode,
        l2_promotion=L2Promotion(flags >> 17 & 3),
        oob_fill=OobFill(flags >> 15 & 1),
    )


def _flags(tensor_map: TensorMap) -> int:
    atomicity = _ATOMS.index(tensor_map.swizzle) if tensor_map.swizzle in _ATOMS else 0
    mode = min(tensor_map.swizzle, Swizzle.B128)
    tf32 = tensor_map.data_type in _TF32.values()
    return (
        (tensor_map.rank - 1) << 4
        | _CODES[tensor_map.data_type] << 7
        | tensor_map.interleave << 11
        | mode << 13
        | tensor_map.oob_fill << 15
        | tf32 << 16
        | tensor_map.l2_promotion << 17
        | atomicity << 19
    )


def _shape_problem(m: TensorMap) -> str | None:
    if not 1 <= m.rank <= MAX_RANK:
        return f"the rank must be 1 to {MAX_RANK}, not {m.rank}"
    if m.interleave and m.rank < 3:
        return f"an interleaved layout needs a rank of 3 or more, not {m.rank}"
    if len(m.strides) != m.rank - 1 or len(m.box) != m.rank or len(m.steps) != m.rank:
        return f"rank {m.rank} needs {m.rank - 1} strides, {m.rank} box lengths and {m.rank} element strides"
    for index, length in enumerate(m.dims):
        if not 1 <= length <= 2**32:
            return f"dimension {index} must be 1 to 2**32, not {length}"
    for index, length in enumerate(m.box):
        if not 1 <= length <= MAX_BOX:
            return f"box length {index} must be 1 to {MAX_BOX}, not {length}"
    for index, step in enumerate(m.steps):
        if not 1 <= step <= MAX_ELEMENT_STRIDE:
            return f"element stride {index} must be 1 to {MAX_ELEMENT_STRIDE}, not {step}"
    # The driver rounds the elements of a dimension down, though one more may be copied.
    num_elements = prod(length // step for length, step in zip(m.box, m.steps, strict=True))
    num_bytes = num_elements * m.element_bits // 8
    if num_bytes > MAX_BOX_BYTES:
        return f"the box has {num_bytes} bytes, at most {MAX_BOX_BYTES} are possible"
    if m.data_type == DataType.U4_ALIGN8B and m.dims[0] % 2:
        return f"dimension 0 of packed 4-bit elements must be even, not {m.dims[0]}"
    if m.data_type in _PADDED and (m.dims[0] % 128 or m.box[0] != 128):
        wanted = "dimension 0 in multiples of 128 and a box of 128"
        return f"padded elements need {wanted}, not {m.dims[0]} and {m.box[0]}"
    if m.oob_fill and m.data_type not in _FLOATS:
        return f"NaN cannot fill elements of type {m.data_type.name}"
    return None


def _alignment_problem(m: TensorMap) -> str | None:
    unit = 32 if m.interleave == Interleave.B32 or m.data_type in _PADDED else STRIDE_UNIT
    if m.address % unit:
        return f"the address 0x{m.address:x} is not a multiple of {unit}"
    for index, stride in enumerate(m.strides, 1):
        if stride % unit or not 0 <= stride < 2**40:
            return f"stride {index} must be a multiple of {unit} below 2**40, not {stride}"
    if m.box[0] * m.element_bits % 128:
        return f"a row of the box must be a multiple of 16 bytes, not {m.box[0] * m.element_bits / 8:g}"
    return None


def _swizzle_problem(m: TensorMap) -> str | None:
    span = _SPANS.get(m.swizzle, 128)
    row_bytes = m.box[0] * m.element_bits // 8
    if not m.interleave and m.swizzle and row_bytes > span:
        return f"a row of the box has {row_bytes} bytes, the swizzle allows {span}"
    if m.data_type in _PADDED and m.swizzle not in (Swizzle.NONE, Swizzle.B128, *_ATOMS[1:2], _ATOMS[3]):
        return f"padded elements do not allow swizzle {m.swizzle.name}"
    return None
