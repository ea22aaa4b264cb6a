"""Tensor maps for kernels whose host code would ask the driver for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from ptx_emulator.host.arrays import memory_of
from ptx_emulator.tensor_map import (
    BYTES,
    DataType,
    Interleave,
    L2Promotion,
    OobFill,
    Swizzle,
    TensorMap,
    encode_tiled,
)

CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE = 0, 1
_TYPES = {
    "uint8": DataType.UINT8,
    "int8": DataType.UINT8,
    "bool": DataType.UINT8,
    "float8_e4m3fn": DataType.UINT8,
    "float8_e5m2": DataType.UINT8,
    "uint16": DataType.UINT16,
    "int16": DataType.UINT16,
    "uint32": DataType.UINT32,
    "int32": DataType.INT32,
    "uint64": DataType.UINT64,
    "int64": DataType.INT64,
    "float16": DataType.FLOAT16,
    "float32": DataType.FLOAT32,
    "float64": DataType.FLOAT64,
    "bfloat16": DataType.BFLOAT16,
}


def tensor_map(
    array: Any,
    box: Sequence[int],
    *,
    swizzle: Swizzle = Swizzle.NONE,
    data_type: DataType | None = None,
    element_strides: Sequence[int] = (),
    interleave: Interleave = Interleave.NONE,
    l2_promotion: L2Promotion = L2Promotion.NONE,
    oob_fill: OobFill = OobFill.ZERO,
) -> TensorMap:
    """The tensor map of an array; pass it among the `args` of a launch, and the array in its `memory`.

    Args:
        box: elements of one copy in the order of the array's dimensions, the contiguous one last.
        data_type: how the elements are seen; from the array's dtype without.

    Raises:
        ValueError: the last dimension is not contiguous, or a dtype that no tensor map has.
    """
    memory = memory_of("array", array)
    dtype = str(array.dtype).removeprefix("torch.")
    if data_type is None and dtype not in _TYPES:
        raise ValueError(f"array: has dtype {dtype}, which no tensor map has; give data_type")
    shape = tuple(array.shape)
    strides = array.stride() if hasattr(array, "stride") else [s // array.itemsize for s in array.strides]
    if strides[-1] != 1:
        raise ValueError(f"array: the last dimension has stride {strides[-1]}, must be contiguous")
    if len(box) != len(shape):
        raise ValueError(f"box: {tuple(box)} for an array of shape {shape}")
    return TensorMap(
        data_type=_TYPES[dtype] if data_type is None else data_type,
        address=memory.address,
        dims=shape[::-1],
        strides=tuple(stride * memory.item_bytes for stride in strides[-2::-1]),
        box=tuple(box)[::-1],
        element_strides=tuple(element_strides)[::-1],
        interleave=interleave,
        swizzle=swizzle,
        l2_promotion=l2_promotion,
        oob_fill=oob_fill,
    )


@cache
def encoder() -> Any:
    """A C function with the signature of `cuTensorMapEncodeTiled`, for host code that takes a pointer to it.

    `ctypes.cast(encoder(), ctypes.c_void_p).value` is its address.
    """
    pointer, number = ctypes.c_void_p, ctypes.c_int
    sizes, counts = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    prototype = ctypes.CFUNCTYPE(
        number,  # CUresult
        pointer,  # CUtensorMap*
        number,  # CUtensorMapDataType
        ctypes.c_uint32,  # rank
        pointer,  # globalAddress
        sizes,  # globalDim
        sizes,  # globalStrides
        counts,  # boxDim
        counts,  # elementStrides
        number,
        number,
        number,
        number,
    )
    return prototype(_encode)


def _encode(
    out: int,
    data_type: int,
    rank: int,
    address: int | None,
    dims: Any,
    strides: Any,
    box: Any,
    element_strides: Any,
    interleave: int,
    swizzle: int,
    l2_promotion: int,
    oob_fill: int,
) -> int:
    try:
        encoded = encode_tiled(
            data_type,
            address or 0,
            dims[:rank],
            strides[: rank - 1],
            box[:rank],
            element_strides[:rank],
            interleave,
            swizzle,
            l2_promotion,
            oob_fill,
        )
    except ValueError:
        return CUDA_ERROR_INVALID_VALUE
    ctypes.memmove(out, encoded, BYTES)
    return CUDA_SUCCESS
