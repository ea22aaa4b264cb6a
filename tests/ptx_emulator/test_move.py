"""mov, packing, predicates."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import elementwise, pairs_of
from harness import run_kernel
from odd_values import odd_integers
from ptx_emulator.errors import UnsupportedInstruction

DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_values(bits: int) -> None:
    a = np.array(odd_integers(bits) * 3, DTYPES[bits])
    np.testing.assert_array_equal(elementwise(f"mov.b{bits} {{d}}, {{a}};", [a], DTYPES[bits]), a)
    wide = f"mov.u{bits} {{d}}, 0x7f;"
    assert (elementwise(wide, [a], DTYPES[bits]) == 0x7F).all()


def test_float_literals() -> None:
    a = np.zeros(3, np.uint32)
    assert elementwise("mov.f32 {d}, 0f3F800001;", [a]).tolist() == [0x3F800001] * 3
    assert elementwise("mov.f32 {d}, 1.5;", [a]).tolist() == [0x3FC00000] * 3
    assert elementwise("mov.b32 {d}, 0fFF800000;", [a]).tolist() == [0xFF800000] * 3
    got = elementwise("mov.f64 {d}, 0d3FF0000000000001;", [a], np.uint64)
    assert got.tolist() == [0x3FF0000000000001] * 3


@pytest.mark.parametrize(("whole", "part"), [(32, 16), (64, 32), (64, 16)])
def test_packing(whole: int, part: int) -> None:
    """The first element is the lowest; an unwanted part goes to `_`."""
    a, b = pairs_of(odd_integers(part), DTYPES[part])
    a, b = a[:200], b[:200]
    count = whole // part
    parts = [a, b] * (count // 2)
    packed = sum(array.astype(DTYPES[whole]) << DTYPES[whole](part * n) for n, array in enumerate(parts))
    names = ", ".join(["{a}", "{b}"] * (count // 2))
    got = elementwise(f"mov.b{whole} {{d}}, {{{{{names}}}}};", [a, b], DTYPES[whole])
    np.testing.assert_array_equal(got, packed)
    sinks = ["_"] * (count - 2)
    text = f"mov.b{whole} {{{{{', '.join(['{d0}', *sinks, '{d1}'])}}}}}, {{a}};"
    low, high = elementwise(text, [packed], DTYPES[part], num_results=2)
    np.testing.assert_array_equal(low, a)
    np.testing.assert_array_equal(high, b)


def test_bytes() -> None:
    a = np.arange(1 << 10, dtype=np.uint32) * np.uint32(4194301)
    text = ".reg .b8 %c<4>; mov.b32 {{%c0, %c1, %c2, %c3}}, {a}; mov.b32 {d}, {{%c3, %c2, %c1, %c0}};"
    np.testing.assert_array_equal(elementwise(text, [a]), a.byteswap())


def test_128_bits() -> None:
    a, b = pairs_of(odd_integers(64), np.uint64)
    text = """
        mov.b128 %rq0, {{{a}, {b}}};
        mov.b128 %rq1, %rq0;
        mov.b128 {{{d1}, {d0}}}, %rq1;
    """
    high, low = elementwise(text, [a, b], np.uint64, num_results=2)
    np.testing.assert_array_equal(low, a)
    np.testing.assert_array_equal(high, b)


@pytest.mark.parametrize("negated", [False, True], ids=["plain", "negated"])
def test_predicates(negated: bool) -> None:
    a, b = pairs_of(range(4), np.uint32)
    p, q = a >= 2, b >= 2
    second = "!%p11" if negated else "%p11"
    q_read = ~q if negated else q
    expected = {"and": p & q_read, "or": p | q_read, "xor": p ^ q_read}
    for name, wanted in expected.items():
        text = f"""
            setp.ge.u32 %p10, {{a}}, 2;
            setp.ge.u32 %p11, {{b}}, 2;
            {name}.pred %p12, %p10, {second};
            selp.u32 {{d}}, 1, 0, %p12;
        """
        np.testing.assert_array_equal(elementwise(text, [a, b]), wanted, err_msg=name)
    text = """
        setp.ge.u32 %p10, {a}, 2;
        mov.pred %p11, %p10;
        not.pred %p12, %p11;
        selp.u32 {d}, 1, 2, %p12;
    """
    np.testing.assert_array_equal(elementwise(text, [a]), np.where(p, 2, 1))


def test_literal_predicates() -> None:
    a = np.arange(40, dtype=np.uint32)
    text = """
        mov.pred %p10, 1;
        mov.pred %p11, 0;
        mov.pred %p12, -1;
        setp.lt.and.u32 %p13, {a}, 20, 1;
        selp.u32 {d}, 1, 0, %p10;
        @%p11 add.u32 {d}, {d}, 2;
        @%p12 add.u32 {d}, {d}, 4;
        @%p13 add.u32 {d}, {d}, 8;
    """
    np.testing.assert_array_equal(elementwise(text, [a]), np.where(a < 20, 13, 5))


def test_guard_keeps_the_other_lanes() -> None:
    a = np.arange(64, dtype=np.uint32)
    text = """
        mov.u32 {d}, 7;
        and.b32 %r100, {a}, 1;
        setp.eq.u32 %p10, %r100, 1;
        @%p10 add.u32 {d}, {a}, 100;
        @!%p10 mul.lo.u32 {d}, {d}, 3;
    """
    np.testing.assert_array_equal(elementwise(text, [a]), np.where(a % 2 == 1, a + 100, 21))


def test_special_registers_and_addresses() -> None:
    out = np.zeros((4, 64), np.uint32)
    body = """
        mov.u32 %r2, %ctaid.x;
        mov.u32 %r3, %ntid.x;
        mov.u64 %rd5, %clock64;
        mov.u32 %r4, smem;
        mov.u64 %rd6, smem;
        add.u64 %rd6, %rd6, 16;
        cvt.u32.u64 %r5, %rd6;
        sub.u32 %r5, %r5, %r4;
        mov.u32 %r6, %clock;
        cvt.u32.u64 %r6, %clock64;
        mov.u64 %rd7, %clock64;
        setp.lt.u64 %p1, %rd5, %rd7;
        selp.u32 %r7, 1, 0, %p1;
        add.u64 %rd4, %rd1, %rd0;
        st.global.u32 [%rd4], %r1;
        st.global.u32 [%rd4+256], %r3;
        st.global.u32 [%rd4+512], %r5;
        st.global.u32 [%rd4+768], %r7;
    """
    run_kernel(body, out, block=(64, 1, 1), shared_bytes=64)
    np.testing.assert_array_equal(out[0], np.arange(64))
    assert (out[1] == 64).all()
    assert (out[2] == 16).all()
    assert (out[3] == 1).all()


@pytest.mark.parametrize("text", ["mov.b32 {d}, %rd1;", "mov.b32 {d}, {{{a}, {a}}};", "mov.u32 %rd9, {a};"])
def test_wrong_widths(text: str) -> None:
    with pytest.raises(UnsupportedInstruction):
        elementwise(text, [np.zeros(4, np.uint32)])
