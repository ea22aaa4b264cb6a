"""Exact arithmetic on binary floating-point formats, rounded once: what results are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with infinities."""

    name: str
    dtype: Any
    bits: Any
    mantissa_bits: int
    min_exponent: int
    max_finite: float

    def values(self, bits: np.ndarray) -> list[float]:
        """What the bits mean."""
        with np.errstate(invalid="ignore"):
            return [float(v) for v in bits.astype(self.bits).view(self.dtype).astype(np.float64)]

    def encode(self, value: float) -> int:
        """The bits of a value of the format; NaN is the canonical one."""
        if math.isnan(value):
            return CANONICAL_NAN[self.name]
        return int(np.array([value]).astype(self.dtype).view(self.bits)[0])


F16 = Format("f16", np.float16, np.uint16, 10, -14, 65504.0)
BF16 = Format("bf16", ml_dtypes.bfloat16, np.uint16, 7, -126, float(Fraction(255, 128) * 2**127))
F32 = Format("f32", np.float32, np.uint32, 23, -126, float(np.finfo(np.float32).max))
F64 = Format("f64", np.float64, np.uint64, 52, -1022, float(np.finfo(np.float64).max))


def round_exact(value: Fraction, fmt: Format, mode: str = "rn") -> float:
    """A non-zero number rounded to a format; mode is rn, rz, rm, rp, or rna (ties away from zero)."""
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, fmt.min_exponent) - fmt.mantissa_bits)
    whole, rest = divmod(magnitude / quantum, 1)
    half = Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and whole % 2 == 1),
        "rna": rest >= half,
        "rz": False,
        "rm": rest > 0 and value < 0,
        "rp": rest > 0 and value > 0,
    }[mode]
    rounded = (whole + up) * quantum
    if rounded > Fraction(fmt.max_finite):
        to_infinity = mode in ("rn", "rna") or (mode == "rp" and value > 0) or (mode == "rm" and value < 0)
        result = math.inf if to_infinity else fmt.max_finite
    else:
        result = float(rounded)
    return math.copysign(result, -1.0 if value < 0 else 1.0)


def _special(function: Callable[..., Any], *values: float) -> float:
    with np.errstate(all="ignore"):
        return float(function(*(np.float64(v) for v in values)))


def _zero(negative: bool) -> float:
    return -0.0 if negative else 0.0


def _is_negative(value: float) -> bool:
    return math.copysign(1.0, value) < 0


def add(a: float, b: float, fmt: Format, mode: str = "rn") -> float:
    """a + b, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return _special(lambda x, y: x + y, a, b)
    exact = Fraction(a) + Fraction(b)
    if exact:
        return round_exact(exact, fmt, mode)
    if a == 0 and _is_negative(a) == _is_negative(b):
        return a
    return _zero(mode == "rm")


def mul(a: float, b: float, fmt: Format, mode: str = "rn") -> float:
    """a * b, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return _special(lambda x, y: x * y, a, b)
    exact = Fraction(a) * Fraction(b)
    return round_exact(exact, fmt, mode) if exact else _zero(_is_negative(a) != _is_negative(b))


def fma(a: float, b: float, c: float, fmt: Format, mode: str = "rn") -> float:
    """a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        if math.isfinite(a) and math.isfinite(b):
            return c
        return _special(lambda x, y, z: x * y + z, a, b, c)
    product = Fraction(a) * Fraction(b)
    exact = product + Fraction(c)
    if exact:
        return round_exact(exact, fmt, mode)
    negative = _is_negative(a) != _is_negative(b)
    if c == 0 and product == 0 and negative == _is_negative(c):
        return c
    return _zero(mode == "rm")


def div(a: float, b: float, fmt: Format, mode: str = "rn") -> float:
    """a / b, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)) or b == 0:
        return _special(lambda x, y: x / y, a, b)
    exact = Fraction(a) / Fraction(b)
    return round_exact(exact, fmt, mode) if exact else _zero(_is_negative(a) != _is_negative(b))


def sqrt(a: float, fmt: Format, mode: str = "rn") -> float:
    """The square root, rounded once."""
    if not math.isfinite(a) or a <= 0:
        return _special(np.sqrt, a)
    # The root cut to more bits than the format has, and one bit for the rest: rounds as the exact root.
    places = 2 * (fmt.mantissa_bits - fmt.min_exponent)
    scaled = Fraction(a) * 4**places
    root = math.isqrt(int(scaled))
    exact = Fraction(2 * root + (root * root != scaled), 2) / 2**places
    return round_exact(exact, fmt, mode)


def any_exponent(fmt: Format) -> Format:
    """The format with numbers of full precision far below its own: what .ftz rounds to before it flushes."""
    return replace(fmt, min_exponent=-600)


def flush(value: float, fmt: Format) -> float:
    """Subnormal numbers become zero of the same sign."""
    if value != 0 and abs(value) < float(Fraction(2) ** fmt.min_exponent):
        return math.copysign(0.0, value)
    return value


def extreme(a: float, b: float, larger: bool, nan: bool) -> float:
    """min or max, -0 below 0; of one NaN the other operand, or NaN if `nan`."""
    if math.isnan(a) or math.isnan(b):
        both = math.isnan(a) and math.isnan(b)
        return math.nan if nan or both else b if math.isnan(a) else a
    first = (a, math.copysign(1, a)) < (b, math.copysign(1, b))
    return a if first != larger else b


def signed_extreme(a: float, b: float, larger: bool, nan: bool) -> float:
    """`extreme` of the absolute values, with the exclusive or of the signs."""
    result = extreme(abs(a), abs(b), larger, nan)
    return result if math.copysign(1, a) == math.copysign(1, b) else -result
