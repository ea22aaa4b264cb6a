"""Kernel arguments as written on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ptx_emulator.host.arrays import aligned

_DTYPES = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    **{
        f"{sign}{bits}": f"{word}{bits}"
        for sign, word in (("i", "int"), ("u", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


def parse_argument(text: str, seed: int) -> Any:
    """A number, or an array from `TYPE:SHAPE=FILL`.

    Raises:
        ValueError: neither of the two.
    """
    match = re.fullmatch(r"(\w+):([\dx]+)=(.+)", text)
    if match is None:
        try:
            return float(text) if re.search(r"[.en]", text) and not text.startswith("0x") else int(text, 0)
        except ValueError:
            raise ValueError(f"--arg {text}: neither a number nor TYPE:SHAPE=FILL, as f32:40=randn") from None
    if match[1] not in _DTYPES:
        raise ValueError(f"--arg {text}: type {match[1]!r} is none of {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[match[1]])
    shape = tuple(int(part) for part in match[2].split("x"))
    return aligned(_filled(text, shape, match[3], seed, dtype))


def _filled(text: str, shape: tuple[int, ...], fill: str, seed: int, dtype: np.dtype[Any]) -> Any:
    if fill == "zeros":
        return np.zeros(shape, dtype)
    if fill == "nan":
        return np.full(shape, np.nan, dtype)
    if fill == "arange":
        return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    if fill == "randn":
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    if Path(fill).is_file():
        loaded = np.load(fill)
        if loaded.shape != shape or loaded.dtype != dtype:
            raise ValueError(f"--arg {text}: the file has {loaded.dtype}{list(loaded.shape)}")
        return loaded
    raise ValueError(f"--arg {text}: {fill!r} is no file and none of zeros, nan, arange, randn")
