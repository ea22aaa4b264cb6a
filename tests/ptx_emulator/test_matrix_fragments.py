"""ldmatrix, stmatrix and movmatrix against the layouts of the PTX ISA, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from aligned import aligned, poisoned
from harness import run_kernel
from ptx_emulator.errors import EmulatorError

LANES = 32
rng = np.random.default_rng(22)

# Rows are staged in shared memory 16 bytes apart, row n of lane n; `%r6` is the own row's address.
STAGE = """
mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, 16, %r5; mul.wide.u32 %rd5, %r1, 16; add.u64 %rd6, %rd1, %rd5;
ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd6]; st.shared.v4.b32 [%r6], {%r20, %r21, %r22, %r23};
bar.warp.sync 0xffffffff;
"""


def vector(names: list[str]) -> str:
    return "{" + ", ".join(names) + "}"


def load(form: str, rows: np.ndarray, count: int, target: str = "sm_100a") -> np.ndarray:
    """[LANES, count] registers after ldmatrix.sync.aligned.`form` of rows [32, 16 bytes]."""
    result = poisoned((LANES, count), np.uint32)
    names = [f"%r{30 + n}" for n in range(count)]
    body = STAGE + f"ldmatrix.sync.aligned.{form} {vector(names)}, [%r6];"
    body += f"mad.lo.u32 %r7, %r1, {4 * count}, 0; cvt.u64.u32 %rd7, %r7; add.u64 %rd8, %rd2, %rd7;"
    body += "".join(f"st.global.b32 [%rd8+{4 * n}], {name};" for n, name in enumerate(names))
    run_kernel(body, aligned(rows), result, shared_bytes=512, target=target)
    return result


def random_rows() -> np.ndarray:
    return rng.integers(0, 256, (LANES, 16), dtype=np.uint8)


@pytest.mark.parametrize("space", ["", ".shared", ".shared::cta"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_b16(count: int, transposed: bool, space: str) -> None:
    rows = random_rows()
    form = f"m8n8.x{count}{'.trans' if transposed else ''}{space}.b16"
    registers = load(form, rows, count, "sm_80") if space else load_generic(form, rows, count)
    matrices = rows.view(np.uint16).reshape(4, 8, 8)[:count]
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    # Register m of a lane: elements (lane / 4, 2 (lane % 4)) and the next one of matrix m.
    expected = matrices.reshape(count, LANES, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(registers.view(np.uint16).reshape(LANES, count, 2), expected)


def load_generic(form: str, rows: np.ndarray, count: int) -> np.ndarray:
    result = poisoned((LANES, count), np.uint32)
    names = [f"%r{30 + n}" for n in range(count)]
    body = STAGE + "cvt.u64.u32 %rd9, %r6; cvta.shared.u64 %rd10, %rd9;"
    body += f"ldmatrix.sync.aligned.{form} {vector(names)}, [%rd10];"
    body += f"mul.wide.u32 %rd7, %r1, {4 * count}; add.u64 %rd8, %rd2, %rd7;"
    body += "".join(f"st.global.b32 [%rd8+{4 * n}], {name};" for n, name in enumerate(names))
    run_kernel(body, aligned(rows), result, shared_bytes=512)
    return result


def unpacked(rows: np.ndarray, bits: int) -> np.ndarray:
    """The 16 elements of `bits` bits at the start of each row, a byte each."""
    stream = np.unpackbits(rows, axis=1, bitorder="little")[:, : 16 * bits].reshape(len(rows), 16, bits)
    return np.packbits(stream, axis=2, bitorder="little")[:, :, 0]


@pytest.mark.parametrize(("packing", "bits"), [("b8", 8), ("b8x16.b6x16_p32", 6), ("b8x16.b4x16_p64", 4)])
@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_m16n16(count: int, packing: str, bits: int) -> None:
    rows = random_rows()
    registers = load(f"m16n16.x{count}.trans.shared.{packing}", rows, 2 * count).view(np.uint8)
    elements = unpacked(rows, bits).reshape(2, 16, 16)
    for lane in range(LANES):
        for register in range(2 * count):
            column = lane // 4 + 8 * (register % 2)
            row = 4 * (lane % 4)
            expected = elements[register // 2, row : row + 4, column]
            np.testing.assert_array_equal(registers[lane, 4 * register : 4 * register + 4], expected)


@pytest.mark.parametrize(("packing", "bits"), [("b6x16_p32", 6), ("b4x16_p64", 4)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_m8n16(count: int, packing: str, bits: int) -> None:
    rows = random_rows()
    registers = load(f"m8n16.x{count}.shared.b8x16.{packing}", rows, count).view(np.uint8)
    elements = unpacked(rows, bits).reshape(4, LANES, 4)[:count]  # [matrix, lane, byte]
    np.testing.assert_array_equal(registers.reshape(LANES, count, 4), elements.transpose(1, 0, 2))


def store(form: str, registers: np.ndarray, target: str = "sm_100a") -> np.ndarray:
    """[32, 16 bytes] rows after stmatrix of registers [LANES, count]; rows not stored to hold 0xEE."""
    count = registers.shape[1]
    rows = poisoned((LANES, 16), np.uint8)
    names = [f"%r{30 + n}" for n in range(count)]
    body = "mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, 16, %r5; mov.b32 %r7, 0xEEEEEEEE;"
    body += "st.shared.v4.b32 [%r6], {%r7, %r7, %r7, %r7}; bar.warp.sync 0xffffffff;"
    body += f"mul.wide.u32 %rd5, %r1, {4 * count}; add.u64 %rd6, %rd1, %rd5;"
    body += "".join(f"ld.global.b32 {name}, [%rd6+{4 * n}];" for n, name in enumerate(names))
    body += f"stmatrix.sync.aligned.{form} [%r6], {vector(names)}; bar.warp.sync 0xffffffff;"
    body += "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r6]; mul.wide.u32 %rd7, %r1, 16;"
    body += "add.u64 %rd8, %rd2, %rd7; st.global.v4.b32 [%rd8], {%r20, %r21, %r22, %r23};"
    run_kernel(body, aligned(registers), rows, shared_bytes=512, target=target)
    return rows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_returns_what_ldmatrix_loaded(count: int, transposed: bool) -> None:
    rows = random_rows()
    form = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    stored = store(form, load(form, rows, count), "sm_90")
    np.testing.assert_array_equal(stored[: 8 * count], rows[: 8 * count])
    np.testing.assert_array_equal(stored[8 * count :], 0xEE)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_b8(count: int) -> None:
    """Rows of memory are columns of a 16x8 matrix that lanes hold like the accumulator of an m16n8 MMA."""
    matrices = rng.integers(0, 256, (count, 16, 8), dtype=np.uint8)
    registers = np.zeros((LANES, count, 4), np.uint8)
    for lane in range(LANES):
        group, member = divmod(lane, 4)
        for half in range(2):
            pair = matrices[:, group + 8 * half, 2 * member : 2 * member + 2]
            registers[lane, :, 2 * half : 2 * half + 2] = pair
    stored = store(f"m16n8.x{count}.trans.shared.b8", registers.view(np.uint32)[:, :, 0])
    np.testing.assert_array_equal(stored[: 8 * count].reshape(count, 8, 16), matrices.transpose(0, 2, 1))


def test_movmatrix() -> None:
    matrix = rng.integers(0, 2**16, (8, 8), dtype=np.uint16)
    source, result = aligned(matrix.view(np.uint32)), poisoned((8, 4), np.uint32)
    body = "add.u64 %rd5, %rd1, %rd0; add.u64 %rd6, %rd2, %rd0; ld.global.b32 %r5, [%rd5];"
    body += "movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r5; st.global.b32 [%rd6], %r6;"
    run_kernel(body, source, result)
    np.testing.assert_array_equal(result.view(np.uint16), matrix.T)


@pytest.mark.parametrize(
    "instruction",
    [
        "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%r2, %r3, %r4, %r5}, [%r6]",
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r2, %r3}, [%r6]",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2}, [%r6]",
        "ldmatrix.sync.m8n8.x1.shared.b16 {%r2}, [%r6]",
        "ldmatrix.sync.aligned.m8n8.x1.global.b16 {%r2}, [%r6]",
        "stmatrix.sync.aligned.m16n8.x1.shared.b8 [%r6], {%r2}",
    ],
)
def test_forms_that_do_not_exist(instruction: str) -> None:
    with pytest.raises(EmulatorError, match="not supported"):
        run_kernel(instruction + ";", target="sm_100a")


def test_bank_conflicts_and_alignment() -> None:
    from test_memory import total

    for stride, conflicts in ((16, 0), (128, 28), (144, 0)):
        body = f"mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, {stride}, %r5;"
        body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r6];"
        (counts,) = run_kernel(body, shared_bytes=8192, checks=False).counts
        assert total(counts, "shared_bank_conflicts") == conflicts
    body = "mov.u32 %r5, smem; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5+8];"
    found = run_kernel(body, shared_bytes=512, checks=False, expect_reports=True).reports
    assert [str(report.kind) for report in found] == ["misaligned"]
