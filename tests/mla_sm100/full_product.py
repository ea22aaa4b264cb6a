"""Every combination of the parameters of `combinations`, under one schedule: hours, `nox -s nightly`."""

from __future__ import annotations

from itertools import product

import pytest
from combinations import PARAMETERS, run

BY_TEST = ("dtype", "page_size", "num_heads", "q_len", "length")


@pytest.mark.parametrize(BY_TEST, list(product(*(PARAMETERS[name] for name in BY_TEST))))
def test_full_product(dtype: str, page_size: int, num_heads: int, q_len: int, length: int) -> None:
    given = dict(zip(BY_TEST, (dtype, page_size, num_heads, q_len, length), strict=True))
    rest = [name for name in PARAMETERS if name not in given]
    for values in product(*(PARAMETERS[name] for name in rest)):
        run({**given, **dict(zip(rest, values, strict=True))}, schedules=1)
