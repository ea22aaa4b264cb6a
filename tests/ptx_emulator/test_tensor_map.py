"""Encoding and decoding of tensor maps."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_emulator.tensor_map import (
    MAX_BOX_BYTES,
    DataType,
    Interleave,
    L2Promotion,
    OobFill,
    Swizzle,
    TensorMap,
    decode,
    encode_tiled,
)

PLAIN = [t for t in DataType if t < DataType.U4_ALIGN8B]


@st.composite
def tensor_maps(draw: st.DrawFn) -> TensorMap:
    rank = draw(st.integers(1, 5))
    data_type = draw(st.sampled_from(PLAIN))
    swizzle = draw(st.sampled_from(Swizzle))
    bits = TensorMap(data_type, 0, (1,), (), (1,)).element_bits
    span = {Swizzle.NONE: 256, Swizzle.B32: 32, Swizzle.B64: 64}.get(swizzle, 128)
    unit = 128 // bits  # elements of 16 bytes
    inner = draw(st.integers(1, min(span * 8 // bits, 256) // unit)) * unit
    floats = "FLOAT" in data_type.name
    most = min(256, int((MAX_BOX_BYTES // (inner * bits // 8)) ** (1 / max(1, rank - 1))))
    return TensorMap(
        data_type,
        draw(st.integers(1, 2**44)) * 16,
        tuple(draw(st.lists(st.integers(1, 2**32), min_size=rank, max_size=rank))),
        tuple(draw(st.lists(st.integers(0, 2**36 - 1), min_size=rank - 1, max_size=rank - 1).map(_times_16))),
        (inner, *draw(st.lists(st.integers(1, most), min_size=rank - 1, max_size=rank - 1))),
        (1, *draw(st.lists(st.integers(1, 8), min_size=rank - 1, max_size=rank - 1))),
        Interleave.NONE,
        swizzle,
        draw(st.sampled_from(L2Promotion)),
        draw(st.sampled_from(OobFill)) if floats else OobFill.ZERO,
    )


def _times_16(values: list[int]) -> list[int]:
    return [value * 16 for value in values]


@given(tensor_maps())
def test_decoding_gives_back_what_was_encoded(tensor_map: TensorMap):
    assert decode(tensor_map.encode()) == tensor_map


def test_the_layout_is_the_one_that_the_driver_writes():
    data = encode_tiled(9, 0x7F0012345680, (576, 1000), (1152,), (64, 128), (1, 1), 0, 3, 2, 0)
    assert len(data) == 128
    assert struct.unpack_from("<Q", data, 0) == (0x7F0012345680,)
    flags = 1 << 4 | 10 << 7 | 3 << 13 | 1 << 18
    assert struct.unpack_from("<I", data, 8) == (flags,)
    assert struct.unpack_from("<5I", data, 12) == (72, 0, 0, 0, 0)
    assert struct.unpack_from("<5I", data, 32) == (575, 999, 0, 0, 0)
    assert data[52:60] == bytes((0, 0, 0, 63, 127, 0, 0, 0))


def test_long_strides_and_tf32():
    data = TensorMap(DataType.TFLOAT32, 0, (4, 1, 1), (16, 2**39 + 32), (4, 1, 1)).encode()
    assert struct.unpack_from("<I", data, 16) == (2,)
    assert struct.unpack_from("<I", data, 28) == (8 << 4,)
    assert struct.unpack_from("<I", data, 8)[0] >> 7 & 0x20F == 7 | 1 << 9


VALID = {
    "data_type": DataType.FLOAT16,
    "address": 1 << 20,
    "dims": (100, 50),
    "strides": (208,),
    "box": (64, 8),
}


# In three dimensions.
LARGE = {"dims": (16, 4096, 4096), "strides": (48, 4096 * 48), "box": (8, 256, 57)}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"box": (16, 256, 57), "element_strides": (2, 1, 1)},
        {
            "box": (8, 255, 231),
            "element_strides": (1, 4, 1),
        },  # 63 * 231 rows count, though 64 * 231 are copied
        {"box": (8, 256, 256), "element_strides": (8, 8, 8)},
        {"interleave": Interleave.B16, "swizzle": Swizzle.B32, "box": (256, 4, 4)},
        {"interleave": Interleave.B32, "strides": (64, 4096), "swizzle": Swizzle.B128, "box": (256, 4, 4)},
        {"interleave": Interleave.B32, "strides": (64, 4096), "box": (16, 4, 4)},
        {"strides": (0, 16)},
    ],
)
def test_what_the_driver_takes_is_taken(change: dict[str, object]):
    assert len(TensorMap(**{**VALID, **LARGE, **change}).encode()) == 128  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "address"),
        ({"dims": (0, 50)}, "dimension 0"),
        ({"dims": (2**32 + 1, 50)}, "dimension 0"),
        ({"strides": (200,)}, "stride 1"),
        ({"strides": (2**40,)}, "stride 1"),
        ({"strides": ()}, "rank 2 needs 1 strides"),
        ({"box": (257, 8)}, "box length 0"),
        ({"box": (64, 0)}, "box length 1"),
        ({"box": (4, 8)}, "16 bytes"),
        ({"element_strides": (1, 9)}, "element stride 1"),
        ({"swizzle": Swizzle.B64}, "128 bytes, the swizzle allows 64"),
        ({"interleave": Interleave.B16}, "rank of 3"),
        ({**LARGE, "box": (8, 256, 58)}, "237568 bytes"),
        ({**LARGE, "box": (16, 256, 58), "element_strides": (2, 1, 1)}, "237568 bytes"),
        ({**LARGE, "box": (8, 255, 232), "element_strides": (1, 4, 1)}, "233856 bytes"),
        ({**LARGE, "interleave": Interleave.B16, "box": (1, 4, 4)}, "16 bytes"),
        ({**LARGE, "interleave": Interleave.B32}, "stride 1"),
        ({"data_type": DataType.UINT16, "oob_fill": OobFill.NAN}, "UINT16"),
        ({"dims": (1,) * 6, "strides": (16,) * 5, "box": (8,) * 6}, "rank must be 1 to 5"),
    ],
)
def test_what_the_driver_refuses_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TensorMap(**{**VALID, **change}).encode()  # type: ignore[arg-type]


def test_other_bytes_are_no_tensor_map():
    with pytest.raises(ValueError, match="not a tensor map"):
        decode(bytes(128))
