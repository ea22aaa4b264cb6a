"""Runs one instruction on arrays, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import run_kernel

_REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}
_LETTERS = "abce"
_BLOCK = 32


def elementwise(
    instruction: str,
    inputs: Sequence[np.ndarray],
    result: Any = np.uint32,
    *,
    num_results: int = 1,
    numbers: Any = None,
    target: str = "sm_90a",
    **options: Any,
) -> Any:
    """The results of an instruction (or several) on arrays of equal length.

    `{a}`, `{b}`, `{c}`, `{e}` stand for the registers of the inputs, `{d}` or `{d0}`, `{d1}`, … for those of
    the results; %p10 and up, %r100 and up, %rd40 and up are free. Results start as all ones. A warp executes
    32 elements; the last one is not full if the length is no multiple of that. `numbers` is the type of the
    numbers in results, if it is not `result`.
    """
    length = len(inputs[0])
    assert all(len(array) == length for array in inputs)
    arrays = [np.ascontiguousarray(array) for array in inputs]
    outputs = [
        np.full(length * np.dtype(result).itemsize, 0xFF, np.uint8).view(result) for _ in range(num_results)
    ]
    names: dict[str, str] = {}
    body = [
        "mov.u32 %r2, %ctaid.x;",
        f"mad.lo.u32 %r3, %r2, {_BLOCK}, %r1;",
        f"setp.ge.u32 %p1, %r3, {length};",
        "@%p1 bra outside;",
    ]
    for n, array in enumerate(arrays):
        size = array.itemsize
        name = names[_LETTERS[n]] = f"{_REGISTERS[size]}{10 + n}"
        body.append(f"mad.wide.u32 %rd{20 + n}, %r3, {size}, %rd{1 + n};")
        body.append(f"ld.global.b{8 * size} {name}, [%rd{20 + n}];")
    for n, output in enumerate(outputs):
        names[f"d{n}"] = f"{_REGISTERS[output.itemsize]}{20 + n + (10 if output.itemsize == 8 else 0)}"
    names["d"] = names["d0"]
    body.append(instruction.format(**names))
    for n, output in enumerate(outputs):
        size = output.itemsize
        body.append(f"mad.wide.u32 %rd{35 + n}, %r3, {size}, %rd{1 + len(arrays) + n};")
        body.append(f"st.global.b{8 * size} [%rd{35 + n}], {names[f'd{n}']};")
    body.append("outside:")
    grid = (-(-length // _BLOCK), 1, 1)
    kept = [output.view(numbers or result) for output in outputs]
    run_kernel("\n".join(body), *arrays, *kept, grid=grid, target=target, **options)
    return outputs[0] if num_results == 1 else outputs


def pairs_of(values: Sequence[int], dtype: Any) -> list[np.ndarray]:
    """All pairs of values, as two arrays."""
    grid = np.array(values, dtype=dtype)
    return [np.repeat(grid, len(grid)), np.tile(grid, len(grid))]


def triples_of(values: Sequence[int], dtype: Any) -> list[np.ndarray]:
    """All triples of values, as three arrays."""
    grid = np.array(values, dtype=dtype)
    n = len(grid)
    return [np.repeat(grid, n * n), np.tile(np.repeat(grid, n), n), np.tile(grid, n * n)]
