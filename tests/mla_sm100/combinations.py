"""What decode calls are made of, choices that cover every pair of values, and how one is run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from emulation import config_of, run_on_emulator
from kernel_testing.mla import Case, Inputs
from mla_core.planning import num_key_tiles
from mla_sm100.config import CHUNK_ROWS

MAX_SPLITS = 0  # as many as there are tiles of keys
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "dtype": ("bf16", "fp16", "e4m3"),
    "page_size": (16, 32, 64, 128),
    "num_heads": (1, 16, 64, 96, 128),
    "q_len": (1, 2, 4),
    "batch": (1, 3),
    "length": (0, 1, 127, 128, 129, 700),
    "num_splits": (1, 2, MAX_SPLITS),
    "persistent": (False, True),
    "pdl": (False, True),
    "per_request": (False, True),
    "pair": (False, True),
}

CANDIDATES = 60  # drawn for each case, of which the one with the most new pairs is taken


def pairwise(parameters: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases such that each pair of values of two parameters occurs in one of them; the same for a seed."""
    draw = random.Random(seed)
    missing = {
        (first, x, second, y)
        for first, second in combinations(parameters, 2)
        for x in range(len(parameters[first]))
        for y in range(len(parameters[second]))
    }
    cases = []
    while missing:
        first, x, second, y = min(missing)
        best: dict[str, int] = {}
        covered: set[tuple[str, int, str, int]] = set()
        for _ in range(CANDIDATES):
            candidate = {name: draw.randrange(len(values)) for name, values in parameters.items()}
            candidate |= {first: x, second: y}
            pairs = {(a, candidate[a], b, candidate[b]) for a, b in combinations(parameters, 2)} & missing
            if len(pairs) > len(covered):
                best, covered = candidate, pairs
        missing -= covered
        cases.append({name: parameters[name][at] for name, at in best.items()})
    return cases


def name_of(values: dict[str, Any]) -> str:
    """An id for pytest."""
    words = [f"{name}{value}" for name, value in values.items() if not isinstance(value, bool)]
    return "-".join(words + [name for name, value in values.items() if value is True])


def run(values: dict[str, Any], schedules: int) -> None:
    """Decode with a value of each parameter, and check."""
    lengths = (values["length"], 190, 1)[: values["batch"]]
    shared = {name: values[name] for name in ("dtype", "page_size", "num_heads", "q_len")}
    inputs = Inputs(Case(lengths, **shared))
    tile_n = CHUNK_ROWS * (2 if values["pair"] else 1)
    key_tiles = num_key_tiles(max(*lengths, 1), tile_n)
    num_splits = values["num_splits"] or key_tiles
    split = num_splits > 1
    run_on_emulator(
        config_of(inputs, pair=values["pair"], split=split, pdl=values["pdl"] and split),
        inputs,
        num_splits=num_splits,
        tiles_per_split=-(-key_tiles // num_splits) if values["per_request"] else 1,
        num_clusters=2 if values["persistent"] else None,
        schedules=schedules,
    )
