"""Times that MLA decode is bound to take on SM100, from published unit rates and counted instructions.

Nothing here was measured on a GPU. Each unit of an SM that a tile keeps busy gives a bound; what the device
shares gives two more. The largest of them is the time of the decode launch; splits add the merge, which
begins after it. What neither counts (launches, the first accesses to memory, filling and draining the
pipeline) is taken from what FlashInfer published for one request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from _mla_cases import HEAD_DIM, LATENT, Cell
from kernel_dispatch import Arch
from mla_sm100.kernels import PAIR, SINGLE, TILES, Division, num_units
from ptx_emulator.counts import COUNT_NAMES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "emulated_mla_cost" / "results.json"
DOCUMENT = ROOT / "docs" / "mla-sm100-cost.md"
SCHEDULERS = 4  # of an SM; each issues one instruction of a warp per cycle
FLOAT32_BYTES = 4
BATCHES, HEADS, Q_LENS, DTYPES = (1, 16, 64, 256), (16, 64, 128), (1, 4), ("bf16", "fp8")
SEQ_LEN = 8192


@dataclass(frozen=True)
class Device:
    """Published rates; those per cycle are of one SM.

    smem_bytes: read by MMAs and written by TMA through the same port. l2_bytes: from L2 to an SM.
    half_tile_rate: of the tensor core's rate, with 64 rows on one CTA.
    """

    name: str
    sms: int
    clock_ghz: float
    dram_gb_s: float
    exponentials: int = 16
    bf16_flops: int = 8192
    smem_bytes: int = 128
    l2_bytes: int = 64
    half_tile_rate: float = 0.5

    def flops(self, dtype: str) -> int:
        """Per cycle."""
        return self.bf16_flops * (2 if dtype == "fp8" else 1)


# 148 * 8192 FLOP * 1.856 GHz are the 2.25 PFLOP/s of dense bf16 that are published for B200 and B300.
B200 = Device("B200", 148, 1.856, 8000)
B300 = replace(B200, name="B300", exponentials=32)
THOR = Device("Thor", 20, 1.575, 273)

# FlashInfer's CuTe DSL kernel on a B200: fixed lengths, 128 heads, 8,192 keys, page 32, cold L2.
PUBLISHED_US = {
    ("fp8", 1): 16.6,
    ("fp8", 64): 70.4,
    ("fp8", 256): 268.0,
    ("bf16", 1): 18.5,
    ("bf16", 64): 128.0,
    ("bf16", 256): 497.0,
}
PEER, PEER_MAX_SPLITS = "FlashInfer", 48


@dataclass(frozen=True)
class Tile:
    """What one tile asks of one of the SMs that share it: bytes through shared memory, FLOP, exponentials."""

    dtype: str
    pair: bool

    @property
    def element_bytes(self) -> int:
        return 1 if self.dtype == "fp8" else 2

    @property
    def rows(self) -> int:
        """Of an SM."""
        return 64

    @property
    def keys(self) -> int:
        return 128 if self.pair else 64

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.keys * (HEAD_DIM + LATENT)

    @property
    def loaded_bytes(self) -> int:
        """By TMA: 64 keys, and for a pair half of the values of 128 keys."""
        values = self.keys * LATENT // 2 if self.pair else 0
        return (64 * HEAD_DIM + values) * self.element_bytes

    @property
    def smem_bytes(self) -> int:
        """Written by TMA, read by MMAs with both operands in shared memory, and P written.

        An operand is read once per MMA of up to 256 columns of the output: P twice.
        """
        queries, keys = self.rows * HEAD_DIM, 64 * HEAD_DIM
        values = self.keys * LATENT // (2 if self.pair else 1)
        probabilities = self.rows * self.keys
        return self.loaded_bytes + (queries + keys + values + 3 * probabilities) * self.element_bytes

    def cycles(self, device: Device, instructions: float) -> dict[str, float]:
        """Per tile, by what is busy. `instructions`: of warps, on one SM."""
        rate = device.flops(self.dtype) * (1.0 if self.pair else device.half_tile_rate)
        return {
            "MMA": self.flops / rate,
            "shared memory": self.smem_bytes / device.smem_bytes,
            "L2": self.loaded_bytes / device.l2_bytes,
            "exponentials": self.rows * self.keys / device.exponentials,
            "issue": instructions / SCHEDULERS,
        }


@dataclass(frozen=True)
class Estimate:
    """bounds: microseconds of the decode launch, by what is busy all the time. merge_us: after it."""

    tactic: str
    num_splits: int
    bounds: dict[str, float]
    merge_us: float

    @property
    def bound(self) -> str:
        """What the decode launch is bound by."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def us(self) -> float:
        """Decode and merge."""
        return self.bounds[self.bound] + self.merge_us


@cache
def results() -> dict[str, Any]:
    """The counts that the benchmark left."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def instructions_per_tile(cell: Cell, variant: str) -> float:
    """Of warps on one SM, without `mov`, as counted for as many heads or for 128."""
    heads = 16 if cell.problem.rows <= 16 else 128
    name = str(replace(cell, batch=1, num_heads=heads, q_len=1, page_size=64))
    (row,) = (
        c for c in results()["cells"] if (c["cell"], c["variant"], c["regime"]) == (name, variant, "whole")
    )
    row_tiles = 2 if variant == SINGLE and heads == 128 else 1
    tiles_of_sms = row["tiles"] * 2 * row_tiles  # a pair's tile is on two SMs, 128 keys are two single tiles
    return float(row["instructions_without_moves"]["decode"] / tiles_of_sms)


def estimate(cell: Cell, device: Device) -> Estimate:
    """Ours, divided as the heuristic's tactic divides it."""
    tactic = next(name for limit, name in TILES if cell.problem.rows <= limit)
    arch = replace(Arch.from_name("sm_100a"), sm_count=device.sms)
    division = Division.of(cell.problem, arch, tactic)
    splits = division.splits
    units = num_units(cell.problem, division.config, splits.num_splits)
    return _estimate(cell, device, tactic, splits.num_splits, splits.key_tiles, units, tactic == PAIR)


def estimate_flashinfer(cell: Cell, device: Device) -> Estimate:
    """FlashInfer's CuTe DSL kernel, divided as its `_get_split_kv_and_workspace_size` does."""
    row_tiles = cell.batch * -(-cell.problem.rows // 128)
    key_tiles = -(-cell.seq_len // 128)
    wanted = min(max(1, device.sms // (row_tiles * 2)), PEER_MAX_SPLITS)
    num_splits = -(-key_tiles // -(-key_tiles // wanted))
    return _estimate(cell, device, PEER, num_splits, key_tiles, row_tiles * num_splits, True)


def _estimate(
    cell: Cell, device: Device, variant: str, num_splits: int, key_tiles: int, units: int, pair: bool
) -> Estimate:
    tile = Tile(cell.dtype, pair)
    waves = math.ceil(units / (device.sms // (2 if pair else 1)))
    tiles = waves * -(-key_tiles // num_splits)  # on the SM that has the most
    cycles = tile.cycles(device, instructions_per_tile(cell, variant))
    bounds = {name: tiles * value / device.clock_ghz / 1e3 for name, value in cycles.items()}
    bounds["DRAM"] = cell.necessary_bytes / device.dram_gb_s / 1e3
    merge_us = 0.0
    if num_splits > 1:
        partials = num_splits * cell.batch * cell.problem.rows * LATENT * FLOAT32_BYTES
        merge_us = partials / (device.sms * device.l2_bytes * device.clock_ghz) / 1e3
    return Estimate(variant, num_splits, bounds, merge_us)


def published_cell(dtype: str, batch: int) -> Cell:
    """The problem of a published time."""
    return Cell(dtype, batch, 128, SEQ_LEN, page_size=32)


def fixed_us() -> float:
    """What FlashInfer's published times for one request have beyond their bounds, on average."""
    rest = [
        PUBLISHED_US[dtype, 1] - estimate_flashinfer(published_cell(dtype, 1), B200).us for dtype in DTYPES
    ]
    return sum(rest) / len(rest)


def check_table() -> str:
    """The model of FlashInfer's kernel beside what was published."""
    rows = [["dtype", "batch", "splits", "bound by", "bound, µs", "with fixed, µs", "published, µs", "ratio"]]
    for (dtype, batch), us in PUBLISHED_US.items():
        made = estimate_flashinfer(published_cell(dtype, batch), B200)
        expected = made.us + fixed_us()
        ratio = "fitted" if batch == 1 else f"{expected / us:.2f}"
        texts = (dtype, batch, made.num_splits, made.bound, f"{made.us:.1f}", f"{expected:.1f}", us, ratio)
        rows.append([str(x) for x in texts])
    return markdown(rows)


def cells() -> Iterable[Cell]:
    """All that the document has, of bf16."""
    return (Cell("bf16", b, h, SEQ_LEN, q) for h in HEADS for q in Q_LENS for b in BATCHES)


def device_table(device: Device) -> str:
    """Expected times of ours."""
    head = ["heads", "q_len", "batch", "tactic, splits"]
    for dtype in DTYPES:
        head += [f"{dtype}: bound by", "bound, µs", *(["with fixed, µs"] if device is B200 else [])]
    rows = [head]
    for cell in cells():
        both = [estimate(replace(cell, dtype=dtype), device) for dtype in DTYPES]
        row = [str(cell.num_heads), str(cell.q_len), str(cell.batch)]
        row.append(f"{both[0].tactic}, {both[0].num_splits}")
        for made in both:
            if device is B200:
                bound = made.bound if made.us > fixed_us() else "latency"
                row += [bound, f"{made.us:.1f}", f"{made.us + fixed_us():.0f}"]
            else:
                row += [made.bound, f"{made.us:.1f}"]
        rows.append(row)
    return markdown(rows)


def tile_table() -> str:
    """Cycles of a B200's SM per tile, by what is busy."""
    rows: list[list[str]] = []
    for variant, dtype in ((v, d) for v in (PAIR, SINGLE, PEER) for d in DTYPES):
        tile = Tile(dtype, variant != SINGLE)
        per_tile = instructions_per_tile(Cell(dtype, 1, 128, SEQ_LEN), variant)
        cycles = tile.cycles(B200, per_tile)
        rows = rows or [["kernel", "dtype", "rows x keys of an SM", *cycles]]
        rows.append([variant, dtype, f"{tile.rows} x {tile.keys}", *(f"{x:,.0f}" for x in cycles.values())])
    return markdown(rows)


def count_table() -> str:
    """What was counted, in short."""
    rows = [["problem", "launch", "kernel", "splits", "instructions per tile", "softmax and correction"]]
    rows[0] += ["barrier waits per tile", "decode + merge, thousands", "of FlashInfer's"]
    found = results()["cells"]
    peers = {(c["cell"], c["regime"]): c for c in found if c["variant"] == PEER}
    for c in found:
        peer = peers.get((c["cell"], c["regime"]))
        own = sum(instructions(c["decode"].get(role, {})) for role in ("softmax", "correction"))
        waits = sum(row["barrier_waits"] for row in c["decode"].values())
        total = sum(c["instructions"].values())
        ratio = f"{total / sum(peer['instructions'].values()):.2f}" if peer and peer is not c else ""
        name = c["cell"].removeprefix("B1-").replace("-p64-s8192", "")
        figures = (c["instructions"]["decode"], own)
        row = [name, c["regime"], c["variant"], str(c["num_splits"])]
        row += [f"{x / c['tiles']:,.0f}" for x in figures]
        rows.append([*row, f"{waits / c['tiles']:.0f}", f"{total / 1e3:,.0f}", ratio])
    return markdown(rows)


def missed_list() -> str:
    """The goals that the counts do not reach."""
    missed = [text for text, reached in results()["goals"].items() if not reached]
    return "\n".join(f"- {text}" for text in missed) or "- none"


def instructions(row: Mapping[str, int], moves: bool = True) -> int:
    """The instructions of a role, which stand beside counts of other things."""
    return sum(n for name, n in row.items() if name not in COUNT_NAMES and (moves or name != "move"))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


TABLES: dict[str, Callable[[], str]] = {
    "counts": count_table,
    "missed": missed_list,
    "tile": tile_table,
    "check": check_table,
    "b200": lambda: device_table(B200),
    "thor": lambda: device_table(THOR),
    "fixed": lambda: f"{fixed_us():.1f} µs",
}


def filled_in(text: str) -> str:
    """A document's text with each of its tables made anew; they stand between comments."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        gap = "" if name == "fixed" else "\n"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{DOCUMENT.name} has no place for {name!r}")
        made = f"{begin}{gap}{make()}{gap}{end}"
        text = pattern.sub(made.replace("\\", r"\\"), text)
    return text


def update_document() -> None:
    """Write the tables into the document."""
    DOCUMENT.write_text(filled_in(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
