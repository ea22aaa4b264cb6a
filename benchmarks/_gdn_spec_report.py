"""A step of speculative decoding as `bench_gdn_spec.py` reports it: shapes, what was measured, goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from _gdn_cases import HEAD_DIM
from gdn_mtp.problem import short_dtype
from gdn_mtp.speculative.folding import fold_limit, token_nbytes
from gdn_mtp.speculative.problem import SpeculativeProblem


@dataclass(frozen=True)
class Cell:
    """One shape: what a row of the table is about."""

    H: int
    HV: int
    B: int
    T: int
    state_dtype: torch.dtype
    capacity: int
    fold: str | int

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one request's state."""
        return self.HV * HEAD_DIM * HEAD_DIM * torch.finfo(self.state_dtype).bits // 8

    @property
    def io_nbytes(self) -> int:
        """Bytes of a request's q, k, v and output."""
        return 2 * self.T * HEAD_DIM * (2 * self.H + 2 * self.HV)

    @property
    def fold_above(self) -> int:
        """Pending tokens beyond which a verify folds."""
        return fold_limit(self.problem(), self.T, self.fold)

    def problem(self) -> SpeculativeProblem:
        return SpeculativeProblem(
            B=self.B, T=self.T, H=self.H, HV=self.HV, K=HEAD_DIM, V=HEAD_DIM, capacity=self.capacity,
            state_dtype=self.state_dtype,
        )  # fmt: skip

    @property
    def intermediate_nbytes(self) -> int:
        """Bytes of the states after each of a request's tokens."""
        return self.T * self.slot_nbytes

    def __str__(self) -> str:
        name = short_dtype(self.state_dtype)
        return f"{self.H}/{self.H}/{self.HV} B{self.B}-T{self.T}-R{self.capacity} {self.fold} {name}"


@dataclass
class Row:
    """What was measured for one cell.

    us: by variant. wrong: what is with ours. failed: peers whose results were wrong, with the first wrong
    element. notes: why a peer has no time.
    """

    cell: Cell
    copy_gb_s: float
    tactic: str = ""
    us: dict[str, float] = field(default_factory=dict)
    cache_nbytes: int = 0  # of a slot
    folds_per_step: float = 0.0  # of a request
    pending_per_step: float = 0.0
    wrong: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def necessary_nbytes(self) -> float:
        """Of a step, on average."""
        cell = self.cell
        states = cell.slot_nbytes * (1 + self.folds_per_step)
        ring = token_nbytes(cell.problem()) * (self.pending_per_step + cell.T)
        return cell.B * (states + ring + cell.io_nbytes)

    def fraction(self, variant: str = "ours") -> float | None:
        """Necessary bytes over time, of the copy bandwidth."""
        us = self.us.get(variant)
        return None if us is None else self.necessary_nbytes / us / 1e3 / self.copy_gb_s

    @property
    def ratio(self) -> float | None:
        """FlashInfer's time over ours, where its results are right."""
        if "flashinfer" in self.failed or not {"ours", "flashinfer"} <= self.us.keys():
            return None
        return self.us["flashinfer"] / self.us["ours"]

    @property
    def memory_ratio(self) -> float:
        """Bytes of a request's intermediate states over those of a slot of the cache."""
        return self.cell.intermediate_nbytes / self.cache_nbytes

    def record(self) -> dict[str, Any]:
        cell = self.cell
        return {
            "heads": f"{cell.H}/{cell.H}/{cell.HV}", "B": cell.B, "T": cell.T,
            "state_dtype": short_dtype(cell.state_dtype), "capacity": cell.capacity, "fold": cell.fold,
            "fold_above": cell.fold_above, "necessary_bytes": self.necessary_nbytes, "us": self.us,
            "fraction_of_copy": self.fraction(), "tactic": self.tactic, "ratio": {"flashinfer": self.ratio},
            "folds_per_step": self.folds_per_step, "pending_per_step": self.pending_per_step,
            "cache_bytes": self.cache_nbytes, "intermediate_bytes": cell.intermediate_nbytes,
            "wrong": self.wrong, "failed": self.failed, "notes": self.notes,
        }  # fmt: skip

    def line(self) -> str:
        cell, ours = self.cell, self.us.get("ours", math.nan)
        parts = [
            f"{cell!s:<36} {self.tactic:<6} {ours:8.2f} us",
            f"{self.fraction() or math.nan:5.2f} of copy",
        ]
        parts.append(f"folds {self.folds_per_step:.2f} pending {self.pending_per_step:.1f}")
        if "flashinfer" in self.us:
            ratio = "WRONG" if self.ratio is None else f"ratio {self.ratio:.2f}"
            parts.append(f"FlashInfer {self.us['flashinfer']:8.2f} us, {ratio}")
        others = [f"{name} {us:.2f}" for name, us in self.us.items() if name not in ("ours", "flashinfer")]
        return "  ".join(parts + others + ([f"WRONG: {self.wrong}"] if self.wrong else []))


@dataclass(frozen=True)
class Goal:
    """`value` is to be at least `least` in every row of `tokens` tokens and these batch sizes."""

    title: str
    least: float
    value: Callable[[Row], float | None]  # None where it was not measured
    tokens: int | None = None  # T; None for any
    least_batch: int = 1
    most_batch: float = math.inf

    def applies(self, cell: Cell) -> bool:
        return self.tokens in (None, cell.T) and self.least_batch <= cell.B <= self.most_batch

    def verdict(self, rows: Sequence[Row]) -> str:
        """In how many cells it is met, and the lowest value; a row of wrong results does not meet it."""
        right = [row for row in rows if not row.wrong]
        values = [(value, row) for row in right if (value := self.value(row)) is not None]
        cells, wrong = len(rows) - len(right) + len(values), len(rows) - len(right)
        if not cells:
            return "not measured"
        met = sum(value >= self.least for value, _ in values)
        parts = [f"{'met' if met == cells else 'MISSED: met'} in {met} of {cells} cells"]
        if values:
            lowest, row = min(values, key=lambda pair: pair[0])
            parts.append(f"lowest {lowest:.3f} at {row.cell}")
        if wrong:
            parts.append(f"{wrong} with wrong results")
        if cells < len(rows):
            parts.append(f"{len(rows) - cells} more not measured")
        return ", ".join(parts)


_OVER_FLASHINFER = attrgetter("ratio")
GOALS = (
    Goal("T = 4, B >= 16: x FlashInfer's speed", 3.0, _OVER_FLASHINFER, tokens=4, least_batch=16),
    Goal("T = 8, B >= 16: x FlashInfer's speed", 5.0, _OVER_FLASHINFER, tokens=8, least_batch=16),
    Goal("T = 4, B <= 4: x FlashInfer's speed", 1.3, _OVER_FLASHINFER, tokens=4, most_batch=4),
    Goal("T = 8, B <= 4: x FlashInfer's speed", 1.3, _OVER_FLASHINFER, tokens=8, most_batch=4),
    Goal("B >= 32: of the copy bandwidth", 0.85, Row.fraction, least_batch=32),
    Goal("T = 8: bytes of intermediate states over the cache's", 16.0, attrgetter("memory_ratio"), tokens=8),
)


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """What became of each goal that is about any of the rows."""
    found = {}
    for goal in GOALS:
        about = [row for row in rows if goal.applies(row.cell)]
        if about:
            found[f"{goal.title}, at least {goal.least:g}"] = goal.verdict(about)
    return found
