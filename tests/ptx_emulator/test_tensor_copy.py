"""Tensor copies against boxes and swizzles that are computed element by element."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copies import REDUCTIONS, aligned, box_positions, boxed, map_of, swizzled, tensor_map_array
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_emulator import EmulationError
from ptx_emulator.tensor_map import DataType, OobFill, Swizzle, TensorMap

SCHEDULES = [{"schedule": "fair"}, {"schedule": "late"}, {"schedule": "random", "seed": 7}]
DTYPES = {
    DataType.UINT8: np.uint8,
    DataType.UINT16: np.uint16,
    DataType.FLOAT32: np.float32,
    DataType.INT64: np.int64,
    DataType.BFLOAT16: ml_dtypes.bfloat16,
}
INIT = """
    mov.u32 %r20, smem; add.u32 %r21, %r20, {base}; setp.eq.u32 %p20, %r1, 0;
    @%p20 mbarrier.init.shared.b64 [%r20], {count};
    fence.mbarrier_init.release.cluster;
    {sync}
"""
ALONE, CLUSTER = "bar.sync 0;", "barrier.cluster.arrive; barrier.cluster.wait;"
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 %p21, [%r20], 0; @!%p21 bra WAIT;"
# Shared memory from %r21 on to %rd{out}, 4 bytes a thread and turn.
DUMP = """
    mov.u32 %r22, %r1; mov.u32 %r23, %ntid.x;
    DUMP: setp.ge.u32 %p22, %r22, {words}; @%p22 bra DUMPED;
    shl.b32 %r24, %r22, 2; add.u32 %r25, %r21, %r24; ld.shared.u32 %r26, [%r25];
    cvt.u64.u32 %rd20, %r24; add.u64 %rd21, %rd{out}, %rd20; st.global.u32 [%rd21], %r26;
    add.u32 %r22, %r22, %r23; bra DUMP;
    DUMPED:
"""
FILL = DUMP.replace("ld.shared.u32 %r26, [%r25];", "").replace(
    "st.global.u32 [%rd21], %r26;", "ld.global.u32 %r26, [%rd21]; st.shared.u32 [%r25], %r26;"
)


def numbered(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    tensor = aligned(shape, dtype)
    tensor[...] = (np.arange(tensor.size) * 7 % 251 + 1).reshape(shape).astype(dtype)
    return tensor


def coordinates(start: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, start)) + "}"


def load(
    tensor: np.ndarray,
    tensor_map: TensorMap,
    start: tuple[int, ...],
    base: int = 1024,
    words: int = 0,
    **options: Any,
) -> np.ndarray:
    """Shared memory after a load of a box: as long as the box, or `words`, which are zeros at first."""
    num_words = words or tensor_map.box_bytes // 4
    out = np.zeros(-(-num_words // 32) * 32, np.uint32)
    clear = FILL.format(words=num_words, out=3).replace("DUMP", "CLEAR") + "fence.proxy.async; bar.sync 0;"
    body = (
        INIT.format(base=base, count=1, sync=ALONE)
        + (clear if words else "")
        + f"""
        @!%p20 bra ISSUED;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r20], {tensor_map.box_bytes};
        cp.async.bulk.tensor.{len(start)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [%r21], [%rd2, {coordinates(start)}], [%r20];
        ISSUED:
        """
        + WAIT
        + DUMP.format(words=num_words, out=3)
    )
    arrays = (tensor, tensor_map_array(tensor_map), out)
    run_kernel(body, *arrays, shared_bytes=base + out.nbytes, **options)
    return out.view(np.uint8)


# The first coordinates are multiples of 16 bytes of every type; the last ones may begin before the tensor.
CASES = [
    (1, (37,), (32,), (16,)),
    (1, (37,), (32,), (-16,)),
    (2, (9, 48), (32, 4), (16, 3)),
    (2, (9, 48), (32, 4), (-16, 7)),
    (2, (9, 48), (32, 4), (48, 0)),
    (3, (5, 4, 32), (16, 3, 2), (16, 2, -1)),
    (4, (3, 4, 5, 16), (16, 2, 3, 2), (0, 4, 2, 2)),
    (5, (2, 3, 2, 3, 16), (16, 2, 2, 2, 2), (0, 2, 1, -1, 1)),
    (5, (2, 3, 2, 3, 32), (16, 2, 2, 2, 2), (16, 2, 1, 1, 1)),
]
INSIDE = [case for case in CASES if min(case[3]) >= 0]


@pytest.mark.parametrize(("rank", "shape", "box", "start"), CASES, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("data_type", DTYPES)
def test_load_of_every_rank(
    rank: int, shape: tuple[int, ...], box: tuple[int, ...], start: tuple[int, ...], data_type: DataType
):
    dtype = np.dtype(DTYPES[data_type])
    widths = (*shape[:-1], -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize)
    tensor = numbered(widths, dtype)
    tensor_map = map_of(tensor, data_type, box, dims=shape[::-1])
    assert tensor_map.rank == rank
    expected = boxed(tensor, tensor_map, start, bytes(dtype.itemsize))
    assert load(tensor, tensor_map, start)[: len(expected)].tobytes() == expected


SWIZZLE_ROWS = {
    Swizzle.NONE: 64,
    Swizzle.B32: 16,
    Swizzle.B64: 32,
    Swizzle.B128: 64,
    Swizzle.B128_ATOM_32B: 64,
    Swizzle.B128_ATOM_32B_FLIP_8B: 64,
    Swizzle.B128_ATOM_64B: 64,
}


def target_of(swizzle: Swizzle) -> str:
    """Atoms of more than 16 bytes came with sm_100."""
    return "sm_100a" if swizzle > Swizzle.B128 else "sm_90a"


@pytest.mark.parametrize("base", [1024, 1024 + 128 * 3])
@pytest.mark.parametrize("start", [(0, 0), (8, 50), (-24, -3)])
@pytest.mark.parametrize("swizzle", SWIZZLE_ROWS)
def test_load_with_swizzle(swizzle: Swizzle, start: tuple[int, int], base: int):
    tensor = numbered((64, 96), np.uint16)
    tensor_map = map_of(tensor, DataType.UINT16, (SWIZZLE_ROWS[swizzle], 24), swizzle=swizzle)
    expected = swizzled(boxed(tensor, tensor_map, start, bytes(2)), swizzle, base)
    loaded = load(tensor, tensor_map, start, base, target=target_of(swizzle))
    np.testing.assert_array_equal(loaded, expected)


@st.composite
def random_loads(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Any, Swizzle]:
    """Shape (16-byte rows), box, start, type, swizzle."""
    rank = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(list(DTYPES)))
    swizzle = draw(st.sampled_from(Swizzle))
    unit = 16 // np.dtype(DTYPES[dtype]).itemsize
    span = {Swizzle.NONE: 128, Swizzle.B32: 32, Swizzle.B64: 64}.get(swizzle, 128) // 16
    inner = unit * (span if swizzle else draw(st.integers(1, span)))
    outer = {"min_size": rank - 1, "max_size": rank - 1}
    shape = (*draw(st.lists(st.integers(1, 5), **outer)), unit * draw(st.integers(1, 12)))
    box = (inner, *draw(st.lists(st.integers(1, 3), **outer)))
    start = (draw(st.integers(-4, 8)) * unit, *(draw(st.integers(-4, 8)) for _ in range(rank - 1)))
    return shape, box, start, dtype, swizzle


@given(random_loads())
@settings(max_examples=60, deadline=None)
def test_load_of_random_boxes(case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Any, Swizzle]):
    shape, box, start, data_type, swizzle = case
    dtype = np.dtype(DTYPES[data_type])
    tensor = numbered(shape, dtype)
    tensor_map = map_of(tensor, data_type, box, swizzle=swizzle)
    expected = swizzled(boxed(tensor, tensor_map, start, bytes(dtype.itemsize)), swizzle, 1024)
    size = tensor_map.box_bytes
    loaded = load(tensor, tensor_map, start, target=target_of(swizzle))
    np.testing.assert_array_equal(loaded[:size], expected[:size])


def test_load_with_element_strides():
    tensor = numbered((12, 9, 16), np.float32)
    tensor_map = map_of(tensor, DataType.FLOAT32, (16, 5, 6), element_strides=(1, 2, 3))
    assert tensor_map.box_bytes == 16 * 3 * 2 * 4
    expected = boxed(tensor, tensor_map, (0, 3, 8), bytes(4))
    assert load(tensor, tensor_map, (0, 3, 8))[: len(expected)].tobytes() == expected


@pytest.mark.parametrize(
    ("data_type", "dtype"),
    [
        (DataType.FLOAT16, np.float16),
        (DataType.BFLOAT16, ml_dtypes.bfloat16),
        (DataType.FLOAT32, np.float32),
        (DataType.FLOAT32_FTZ, np.float32),
        (DataType.TFLOAT32, np.float32),
        (DataType.TFLOAT32_FTZ, np.float32),
        (DataType.FLOAT64, np.float64),
    ],
)
def test_load_with_nan_outside(data_type: DataType, dtype: Any):
    """The NaN is the same in every 16 bits."""
    tensor = numbered((4, 16), dtype)
    tensor_map = map_of(tensor, data_type, (16, 4), oob_fill=OobFill.NAN)
    loaded = load(tensor, tensor_map, (8, 2)).view(dtype)[:64].reshape(4, 16)
    np.testing.assert_array_equal(loaded[:2, :8].astype(np.float64), tensor[2:, 8:].astype(np.float64))
    for outside in (loaded[2:], loaded[:2, 8:]):
        assert np.isnan(outside.astype(np.float64)).all()
        assert set(np.ascontiguousarray(outside).view(np.uint16).ravel().tolist()) == {0x7FF7}


ODD_WORDS = [0x00000001, 0x807FFFFF, 0x7F800001, 0xFFC12345, 0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000]
ODD_WORDS += [0x7F7FFFFF, 0x80000000, 0x7F800000, 0xFF800000, 0x00412345, 0x33333333, 0x00FFFFFF, 0x12345678]


def tf32_of(word: int) -> int:
    """To nearest even; a NaN becomes a certain one."""
    value = float(np.array([word], np.uint32).view(np.float32)[0])
    if not np.isfinite(value):
        return 0x7FFFE000 if np.isnan(value) else word
    below = word & 0xFFFFE000
    rest = word & 0x1FFF
    return below + (0x2000 if rest > 0x1000 or (rest == 0x1000 and below & 0x2000) else 0)


@pytest.mark.parametrize(
    "data_type", [DataType.FLOAT32, DataType.FLOAT32_FTZ, DataType.TFLOAT32, DataType.TFLOAT32_FTZ]
)
def test_load_rounds_to_tf32_and_changes_nothing_else(data_type: DataType):
    tensor = aligned((4, 16), np.uint32)
    tensor[...] = ODD_WORDS
    loaded = load(tensor, map_of(tensor, data_type, (16, 4)), (0, 0)).view(np.uint32).reshape(4, 16)
    tf32 = data_type in (DataType.TFLOAT32, DataType.TFLOAT32_FTZ)
    expected = [tf32_of(word) if tf32 else word for word in ODD_WORDS]
    np.testing.assert_array_equal(loaded, [expected] * 4)


def test_load_of_packed_nibbles():
    tensor = numbered((4, 64), np.uint8)  # 128 elements a row
    tensor_map = TensorMap(DataType.U4_ALIGN8B, tensor.ctypes.data, (128, 4), (64,), (64, 2))
    loaded = load(tensor, tensor_map, (96, 1), target="sm_100a")[:64].reshape(2, 32)
    np.testing.assert_array_equal(loaded[:, :16], tensor[1:3, 48:])
    assert not loaded[:, 16:].any()


def store(
    tensor: np.ndarray,
    tensor_map: TensorMap,
    start: tuple[int, ...],
    content: bytes,
    what: str = "cp.async.bulk.tensor",
    operation: str = "",
    mode: str = "tile",
    **options: Any,
) -> Any:
    memory = np.frombuffer(content.ljust(-(-len(content) // 4) * 4, b"\0"), np.uint32).copy()
    rank = tensor_map.rank
    body = (
        INIT.format(base=1024, count=1, sync=ALONE)
        + FILL.format(words=memory.size, out=3)
        + f"""
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @!%p20 bra STORED;
        {what}.{rank}d.global.shared::cta{operation}.{mode}.bulk_group [%rd2, {coordinates(start)}], [%r21];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        STORED:
        """
    )
    arrays = (tensor, tensor_map_array(tensor_map), memory)
    return run_kernel(body, *arrays, shared_bytes=1024 + len(content) + 128, **options)


@pytest.mark.parametrize("start", [(0, 0), (40, 20), (88, 3)])
@pytest.mark.parametrize("swizzle", SWIZZLE_ROWS)
@pytest.mark.parametrize("options", SCHEDULES)
def test_store_with_swizzle(swizzle: Swizzle, start: tuple[int, int], options: dict[str, Any]):
    tensor = numbered((32, 96), np.uint16)
    tensor_map = map_of(tensor, DataType.UINT16, (SWIZZLE_ROWS[swizzle], 16), swizzle=swizzle)
    values = np.arange(SWIZZLE_ROWS[swizzle] * 16, dtype=np.uint16) + 1000
    expected = tensor.copy()
    for value, at in zip(values, box_positions(tensor_map, start), strict=True):
        if at is not None:
            expected[at] = value
    content = swizzled(values.tobytes(), swizzle, 1024).tobytes()
    (counts,) = store(tensor, tensor_map, start, content, target=target_of(swizzle), **options).counts
    np.testing.assert_array_equal(tensor, expected)
    inside = [at for at in box_positions(tensor_map, start) if at is not None]
    assert counts["tma_store_bytes"] == 2 * len(inside)


def whole_units(tensor_map: TensorMap) -> TensorMap:
    """The tensor as a store sees it: its rows end with a whole unit of 16 bytes."""
    unit = 128 // tensor_map.element_bits
    width = -(-tensor_map.dims[0] // unit) * unit
    return replace(tensor_map, dims=(width, *tensor_map.dims[1:]))


@pytest.mark.parametrize("op", ["", "add"])
@pytest.mark.parametrize("width", [9, 10, 11, 12])
@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.B32])
def test_store_to_rows_that_are_no_multiple_of_16_bytes(swizzle: Swizzle, width: int, op: str):
    """The GPU writes whole units of 16 bytes, past the end of the row."""
    tensor = numbered((6, 16), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (8, 3), dims=(width, 5), swizzle=swizzle)
    values = np.arange(24, dtype=np.uint32) + 1000
    expected = tensor.copy()
    for value, at in zip(values, box_positions(whole_units(tensor_map), (4, 3)), strict=True):
        if at is not None:
            expected[at] = expected[at] + value if op else value
    content = swizzled(values.tobytes(), swizzle, 1024).tobytes()
    what = "cp.reduce.async.bulk.tensor" if op else "cp.async.bulk.tensor"
    store(tensor, tensor_map, (4, 3), content, what, f".{op}" if op else "")
    np.testing.assert_array_equal(tensor, expected)


def test_a_store_past_the_array_in_its_last_unit_is_reported():
    memory = aligned((12,), np.uint32)
    tensor_map = TensorMap(DataType.UINT32, memory.ctypes.data, (9,), (), (8,))
    with pytest.raises(EmulationError, match="past the end of"):
        store(memory[:9], tensor_map, (4,), bytes(32))


@pytest.mark.parametrize("swizzle", [Swizzle.B32, Swizzle.B64, Swizzle.B128])
def test_rows_narrower_than_the_swizzle_lie_in_lines_of_its_width(swizzle: Swizzle):
    span = {Swizzle.B32: 32, Swizzle.B64: 64}.get(swizzle, 128)
    tensor = numbered((12, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (4, 10), swizzle=swizzle)
    lines = np.zeros((10, span), np.uint8)
    lines[:, :16] = np.ascontiguousarray(tensor[1:11, 8:12]).view(np.uint8)
    expected = swizzled(lines.tobytes(), swizzle, 1024)[: 10 * span]
    loaded = load(tensor, tensor_map, (8, 1), words=10 * span // 4)
    np.testing.assert_array_equal(loaded[: 10 * span], expected)
    copied = aligned(tensor.shape, np.uint32)
    store(copied, replace(tensor_map, address=copied.ctypes.data), (8, 1), expected.tobytes())
    np.testing.assert_array_equal(copied[1:11, 8:12], tensor[1:11, 8:12])


@pytest.mark.parametrize(("rank", "shape", "box", "start"), INSIDE, ids=lambda v: str(v).replace(" ", ""))
def test_store_of_every_rank(rank: int, shape: tuple[int, ...], box: tuple[int, ...], start: tuple[int, ...]):
    widths = (*shape[:-1], -(-shape[-1] // 4) * 4)
    tensor = numbered(widths, np.float32)
    tensor_map = map_of(tensor, DataType.FLOAT32, box, dims=shape[::-1])
    values = np.arange(np.prod(box), dtype=np.float32) + 0.5
    expected = tensor.copy()
    for value, at in zip(values, box_positions(whole_units(tensor_map), start), strict=True):
        if at is not None:
            expected[at] = value
    store(tensor, tensor_map, start, values.tobytes())
    np.testing.assert_array_equal(tensor, expected)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction(op: str):
    tensor = numbered((8, 32), np.uint32)
    tensor[0, :4] = 0
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    values = (np.arange(64, dtype=np.uint32) * 37 % 251).reshape(4, 16)
    expected = tensor.copy()
    expected[2:6, 8:24] = REDUCTIONS[op](tensor[2:6, 8:24], values)
    store(tensor, tensor_map, (8, 2), values.tobytes(), "cp.reduce.async.bulk.tensor", f".{op}")
    np.testing.assert_array_equal(tensor, expected)


def test_reduction_of_bfloat16_adds_with_one_rounding():
    tensor = numbered((4, 32), ml_dtypes.bfloat16)
    values = np.linspace(0.001, 300, 128).astype(ml_dtypes.bfloat16).reshape(4, 32)
    expected = (tensor.astype(np.float64) + values.astype(np.float64)).astype(ml_dtypes.bfloat16)
    tensor_map = map_of(tensor, DataType.BFLOAT16, (32, 4))
    store(tensor, tensor_map, (0, 0), values.tobytes(), "cp.reduce.async.bulk.tensor", ".add")
    np.testing.assert_array_equal(tensor.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("options", SCHEDULES)
def test_multicast_reaches_the_ctas_of_the_mask_and_their_barriers(options: dict[str, Any]):
    tensor = numbered((16, 16), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    out = np.zeros((4, 64), np.uint32)
    body = (
        INIT.format(base=1024, count=1, sync=CLUSTER)
        + """
        mov.u32 %r30, %cluster_ctarank; shl.b32 %r31, %r30, 8;
        cvt.u64.u32 %rd10, %r31; add.u64 %rd11, %rd3, %rd10;
        shr.u32 %r32, 13, %r30; and.b32 %r32, %r32, 1; setp.eq.u32 %p23, %r32, 0; @%p23 bra END;
        @%p20 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 256;
        setp.eq.u32 %p24, %r30, 2; and.pred %p24, %p24, %p20; @!%p24 bra ISSUED;
        mov.u16 %rs1, 13;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint
            [%r21], [%rd2, {0, 8}], [%r20], %rs1, %rd0;
        ISSUED:
        """
        + WAIT
        + DUMP.format(words=64, out=11)
        + "END:"
        + CLUSTER
    )
    run_kernel(
        body,
        tensor,
        tensor_map_array(tensor_map),
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        shared_bytes=1280,
        **options,
    )
    for rank in range(4):
        expected = tensor[8:12].reshape(-1) if 13 >> rank & 1 else np.zeros(64, np.uint32)
        np.testing.assert_array_equal(out[rank], expected)


@pytest.mark.parametrize("multicast", [False, True])
def test_both_ctas_of_a_pair_signal_the_leader(multicast: bool):
    # Each CTA of a pair loads; both copies count on the mbarrier of the even CTA (.cta_group::2).
    tensor = numbered((16, 16), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    out = np.zeros((2, 64), np.uint32)
    form, mask = (".multicast::cluster", ", %rs1") if multicast else ("", "")
    body = (
        INIT.format(base=1024, count=1, sync=CLUSTER)
        + f"""
        mov.u32 %r30, %cluster_ctarank; shl.b32 %r31, %r30, 8;
        cvt.u64.u32 %rd10, %r31; add.u64 %rd11, %rd3, %rd10;
        shl.b32 %r33, %r30, 2; mov.u32 %r34, 1; shl.b32 %r34, %r34, %r30; cvt.u16.u32 %rs1, %r34;
        setp.eq.u32 %p24, %r30, 0; and.pred %p25, %p24, %p20;
        @%p25 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 512;
        and.b32 %r35, %r20, 0xfeffffff;
        @!%p20 bra ISSUED;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{form}.cta_group::2
            [%r21], [%rd2, {{0, %r33}}], [%r35]{mask};
        ISSUED:
        @!%p24 bra WAITED;
        """
        + WAIT
        + "WAITED:"
        + CLUSTER
        + DUMP.format(words=64, out=11)
        + CLUSTER
    )
    arrays = (tensor, tensor_map_array(tensor_map), out)
    shape = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
    run_kernel(body, *arrays, target="sm_100a", shared_bytes=1280, **shape)
    np.testing.assert_array_equal(out.reshape(8, 16), tensor[:8])


def test_gather_and_scatter_of_four_rows():
    tensor = numbered((16, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (32, 1), swizzle=Swizzle.B128)
    expected = tensor.copy()
    content = swizzled(np.arange(128, dtype=np.uint32).tobytes(), Swizzle.B128, 1024).tobytes()
    rows = (3, 9, 20, 0)
    store(tensor, tensor_map, (0, *rows), content, mode="tile::scatter4", target="sm_100a")
    for turn, row in enumerate(rows):
        if row < 16:
            expected[row] = np.arange(32) + 32 * turn
    np.testing.assert_array_equal(tensor, expected)
    out = np.zeros(128, np.uint32)
    body = (
        INIT.format(base=1024, count=1, sync=ALONE)
        + """
        @!%p20 bra ISSUED;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 512;
        cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes
            [%r21], [%rd2, {0, 9, -1, 3, 0}], [%r20];
        ISSUED:
        """
        + WAIT
        + DUMP.format(words=128, out=3)
    )
    run_kernel(body, tensor, tensor_map_array(tensor_map), out, shared_bytes=1536, target="sm_100a")
    gathered = np.stack([tensor[9], np.zeros(32, np.uint32), tensor[3], tensor[0]])
    np.testing.assert_array_equal(out.view(np.uint8), swizzled(gathered.tobytes(), Swizzle.B128, 1024))


def test_replaced_fields_of_a_tensor_map():
    tensor = numbered((8, 32), np.uint32)
    moved = numbered((4, 16), np.uint32)
    moved += 1000
    out = np.zeros(32, np.uint32)
    body = (
        INIT.format(base=1024, count=1, sync=ALONE)
        + FILL.format(words=32, out=2)
        + """
        bar.sync 0;
        @!%p20 bra REPLACED;
        tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r21], %rd3;
        tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r21], 0, 16;
        tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r21], 1, 4;
        tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r21], 0, 64;
        tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r21], 1, 2;
        tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r21], 0;
        REPLACED:
        bar.warp.sync 0xffffffff;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
            [%rd5], [%r21], 128;
        fence.proxy.tensormap::generic.acquire.gpu [%rd5], 128;
        fence.proxy.async;
        @!%p20 bra ISSUED;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 128;
        cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
            [%r21], [%rd5, {0, 1}], [%r20];
        ISSUED:
        """
        + WAIT
        + DUMP.format(words=32, out=4).replace("DUMP", "LAST")
    )
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4), swizzle=Swizzle.B64)
    padded = aligned((256,), np.uint8)
    place = -padded.ctypes.data % 128
    space = padded[place : place + 128]
    run_kernel(body, tensor, tensor_map_array(tensor_map), moved, out, space, shared_bytes=1280)
    np.testing.assert_array_equal(out.reshape(2, 16), moved[1:3])


def test_a_prefetch_does_nothing_but_is_known():
    tensor = numbered((8, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    body = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd2, {0, 0}];"
    run_kernel(body, tensor, tensor_map_array(tensor_map))
