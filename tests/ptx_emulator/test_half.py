"""f16 and bf16 arithmetic against exact fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import exact
import numpy as np
import pytest
from elementwise import elementwise, pairs_of
from exact import BF16, F16, Format, extreme, signed_extreme
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import ODD_BF16, ODD_F16, random_bits
from ptx_emulator.errors import UnsupportedInstruction

FORMATS = pytest.mark.parametrize("fmt", [F16, BF16], ids=["f16", "bf16"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
COUNT = 401
FUNCTIONS: dict[str, tuple[Callable[..., float], int]] = {
    "add": (exact.add, 2),
    "sub": (lambda a, b, fmt: exact.add(a, -b, fmt), 2),
    "mul": (exact.mul, 2),
    "fma": (exact.fma, 3),
}


def inputs_of(fmt: Format, count: int) -> list[np.ndarray]:
    """Odd values against each other, then any bits; of even length."""
    rng = np.random.default_rng(count)
    odd = ODD_F16 if fmt is F16 else ODD_BF16
    pairs = pairs_of(odd, np.uint16)
    columns = []
    for n in range(count):
        head = pairs[n] if n < 2 else rng.choice(np.array(odd, np.uint16), len(pairs[0]))
        column = np.concatenate([head, random_bits(rng, COUNT, odd, np.uint16)])
        columns.append(column[: len(column) // 2 * 2])
    return columns


def run(name: str, fmt: Format, packed: bool, inputs: list[np.ndarray]) -> np.ndarray:
    sources = ", ".join(["{a}", "{b}", "{c}"][: len(inputs)])
    text = f"{name}.{fmt.name}{'x2' if packed else ''} {{d}}, {sources};"
    word = np.uint32 if packed else np.uint16
    got = elementwise(text, [column.view(word) for column in inputs], word, numbers=fmt.dtype)
    return got.view(np.uint16)


def check(
    name: str,
    fmt: Format,
    packed: bool,
    inputs: list[np.ndarray],
    function: Callable[..., float],
    ftz: bool = False,
) -> None:
    got = run(name, fmt, packed, inputs)
    columns = [fmt.values(column) for column in inputs]
    for n, values in enumerate(zip(*columns, strict=True)):
        if ftz:
            values = tuple(exact.flush(value, fmt) for value in values)
        expected = function(*values)
        if ftz:
            expected = exact.flush(expected, fmt)
        assert int(got[n]) == fmt.encode(expected), (name, values, hex(int(got[n])), expected)


@PACKED
@FORMATS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums(name: str, fmt: Format, packed: bool) -> None:
    function, count = FUNCTIONS[name]
    check(f"{name}.rn", fmt, packed, inputs_of(fmt, count), lambda *values: function(*values, fmt))


@PACKED
@pytest.mark.parametrize("name", FUNCTIONS)
def test_flush_and_saturate(name: str, packed: bool) -> None:
    function, count = FUNCTIONS[name]
    inputs = inputs_of(F16, count)
    wide = exact.any_exponent(F16)
    if name in ("mul", "fma"):  # and products just below the smallest normal number
        with np.errstate(all="ignore"):
            a = np.arange(0x1000, 0x4000, 7, dtype=np.uint16)
            b = (2.0**-14 * (1 - 2.0**-12) / a.view(np.float16).astype(np.float64)).astype(np.float16)
        edges = [a, b.view(np.uint16), np.zeros_like(a)][:count]
        inputs = [
            np.concatenate(pair)[: (len(inputs[0]) + len(a)) // 2 * 2]
            for pair in zip(inputs, edges, strict=True)
        ]
    check(f"{name}.rn.ftz", F16, packed, inputs, lambda *values: function(*values, wide), ftz=True)

    def saturated(*values: float) -> float:
        result = function(*values, F16)
        return 0.0 if math.isnan(result) or result <= 0 else min(result, 1.0)

    check(f"{name}.rn.sat", F16, packed, inputs, saturated)


@PACKED
@FORMATS
def test_fma_relu(fmt: Format, packed: bool) -> None:
    def relu(*values: float) -> float:
        result = exact.fma(*values, fmt)
        return 0.0 if result <= 0 else result

    check("fma.rn.relu", fmt, packed, inputs_of(fmt, 3), relu)


@PACKED
@FORMATS
@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", [False, True], ids=["number", "NaN"])
def test_extremes(name: str, nan: bool, fmt: Format, packed: bool) -> None:
    larger = name == "max"
    suffix = ".NaN" if nan else ""
    inputs = inputs_of(fmt, 2)
    check(f"{name}{suffix}", fmt, packed, inputs, lambda a, b: extreme(a, b, larger, nan))
    if fmt is F16:
        text = f"{name}.ftz{suffix}"
        check(text, fmt, packed, inputs, lambda a, b: extreme(a, b, larger, nan), ftz=True)

    nans = np.isnan(fmt.values(inputs[0])) | np.isnan(fmt.values(inputs[1]))
    numbers = [column[~nans][: (~nans).sum() // 2 * 2] for column in inputs]
    check(f"{name}{suffix}.xorsign.abs", fmt, packed, numbers, lambda a, b: signed_extreme(a, b, larger, nan))


@PACKED
@FORMATS
def test_signs(fmt: Format, packed: bool) -> None:
    (a,) = inputs_of(fmt, 1)
    nan = np.isnan(fmt.values(a))
    np.testing.assert_array_equal(run("neg", fmt, packed, [a]), np.where(nan, 0x7FFF, a ^ 0x8000))
    np.testing.assert_array_equal(run("abs", fmt, packed, [a]), np.where(nan, 0x7FFF, a & 0x7FFF))


@PACKED
@FORMATS
def test_functions(fmt: Format, packed: bool) -> None:
    """All 65536 values, each within one unit of the last place; bf16 exponentials flush."""
    a = np.arange(1 << 16, dtype=np.uint16)
    values = np.array(fmt.values(a))
    with np.errstate(all="ignore"):
        for name, function in (
            ("ex2.approx.ftz" if fmt is BF16 else "ex2.approx", np.exp2),
            ("tanh.approx", np.tanh),
        ):
            got = run(name, fmt, packed, [a])
            expected = function(values).astype(fmt.dtype).view(np.uint16)
            nan = np.isnan(values)
            assert (got[nan] == 0x7FFF).all()
            if "ftz" in name:
                expected[(expected & 0x7F80) == 0] = 0
            distance = np.abs(got[~nan].astype(np.int32) - expected[~nan].astype(np.int32))
            assert distance.max() <= 1
            assert (distance == 0).mean() > 0.999


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.integers(0, 0xFFFF)] * 3), min_size=1, max_size=40),
    fmt=st.sampled_from([F16, BF16]),
)
def test_any_numbers(values: list[tuple[int, int, int]], fmt: Format) -> None:
    inputs = [np.array(column, np.uint16) for column in zip(*values, strict=True)]
    check("fma.rn", fmt, False, inputs, lambda a, b, c: exact.fma(a, b, c, fmt))


@pytest.mark.parametrize(
    "name", ["add.rz.f16", "add.ftz.bf16", "fma.rn.oob.f16", "ex2.approx.ftz.f16", "add.relu.f16"]
)
def test_what_is_refused(name: str) -> None:
    halves = np.zeros(4, np.uint16)
    sources = {"fma": "{a}, {a}, {a}", "ex2": "{a}", "add": "{a}, {a}"}[name[:3]]
    with pytest.raises(UnsupportedInstruction):
        elementwise(f"{name} {{d}}, {sources};", [halves], np.uint16)
