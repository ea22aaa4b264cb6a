"""Table, targets and plot of bench_gdn_mtp.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _gdn_cases import STATE_DTYPES, Cell, parse_heads

PEER_TITLES = {"flashinfer": "FlashInfer", "fla": "FLA"}


@dataclass
class Row:
    """What was measured for one cell.

    us: by variant ("ours", peers, tactics), median microseconds of a call. failed: variants whose results
    were wrong, with the first wrong element; of these only peers have a time. notes: why a variant has none.
    slowdown: how many times as long as at the start of the run a copy took beside it. attempts: how often the
    row was timed, until that was little.
    """

    cell: Cell
    copy_gb_s: float
    tactic: str = ""
    us: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    repeats: int = 0
    slowdown: float = 1.0
    attempts: int = 0

    @property
    def gb_s(self) -> float | None:
        """Necessary bytes of our call over its time."""
        return self.cell.necessary_nbytes / self.us["ours"] / 1e3 if "ours" in self.us else None

    @property
    def fraction(self) -> float | None:
        """Of the copy bandwidth."""
        return self.fraction_of("ours")

    def fraction_of(self, variant: str) -> float | None:
        if variant not in self.us:
            return None
        return self.cell.necessary_nbytes / self.us[variant] / 1e3 / self.copy_gb_s

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: above 1, ours is faster. None unless both are timed."""
        return self.us[peer] / self.us["ours"] if {peer, "ours"} <= self.us.keys() else None

    def record(self, peers: Sequence[str]) -> dict[str, Any]:
        """The row for results.json."""
        cell = self.cell
        return {
            "heads": cell.heads,
            "B": cell.B,
            "T": cell.T,
            "mode": cell.mode,
            "state_dtype": cell.state_name,
            "state_layout": cell.state_layout,
            "necessary_bytes": cell.necessary_nbytes,
            "us": self.us,
            "gb_s": self.gb_s,
            "fraction_of_copy": self.fraction,
            "tactic": self.tactic,
            "ratio": {peer: self.ratio(peer) for peer in peers},
            "failed": self.failed,
            "notes": self.notes,
            "calls_per_graph": self.calls,
            "repeats": self.repeats,
            "slowdown": self.slowdown,
            "attempts": self.attempts,
        }

    @classmethod
    def of_record(cls, record: dict[str, Any], copy_gb_s: float) -> Row:
        """The row of which `record` made the entry of results.json."""
        H, HV = parse_heads(record["heads"])
        update, cache = "update" in record["mode"], "cache" in record["mode"]
        state_dtype = STATE_DTYPES[record["state_dtype"]]
        cell = Cell(H, HV, record["B"], record["T"], update, cache, state_dtype, record["state_layout"])
        return cls(cell, copy_gb_s, record["tactic"], record["us"], record["failed"], record["notes"])


def header(peers: Sequence[str]) -> str:
    titles = [
        f"{'heads':>9} {'B':>4} {'T':>2} {'mode':<12} {'state':<7} {'us':>8} {'GB/s':>6} {'of copy':>7}"
    ]
    titles.append(f"{'tactic':<6}")
    titles += [f"{PEER_TITLES[peer]:>10} {'ratio':>6}" for peer in peers]
    return "  ".join(titles)


def line(row: Row, peers: Sequence[str]) -> str:
    """One row under `header`; "!" marks times of wrong results, "-" stands where there is nothing to show."""
    cell = row.cell
    gb_s = "-" if row.gb_s is None else f"{row.gb_s:.0f}"
    fraction = "-" if row.fraction is None else f"{row.fraction:.3f}"
    parts = [
        f"{cell.heads:>9} {cell.B:>4} {cell.T:>2} {cell.mode:<12} {cell.states:<7} "
        f"{_time(row, 'ours'):>8} {gb_s:>6} {fraction:>7}",
        f"{row.tactic or '-':<6}",
    ]
    for peer in peers:
        ratio = row.ratio(peer)
        parts.append(f"{_time(row, peer):>10} {'-' if ratio is None else f'{ratio:.2f}x':>6}")
    return "  ".join(parts)


def tactics_line(row: Row) -> str:
    """Every tactic of a row, the fastest first; an asterisk marks the table's choice."""
    times = {name: us for name, us in row.us.items() if name != "ours"}
    if "ours" in row.us:
        times[f"{row.tactic}*"] = row.us["ours"]
    ranked = sorted(times.items(), key=lambda item: item[1])
    text = "  ".join(f"{name} {us:.2f}" for name, us in ranked)
    if "ours" in row.us:
        text += f"   (the table's choice takes {row.us['ours'] / ranked[0][1]:.3f} of the fastest)"
    return f"          tactics: {text}"


def _time(row: Row, variant: str) -> str:
    if variant not in row.us:
        return "WRONG" if variant in row.failed else "-"
    return f"{row.us[variant]:.2f}{'!' * (variant in row.failed)}"


@dataclass(frozen=True)
class Target:
    """A number to reach: over the rows that `applies` takes, the worst (or median) of `value`."""

    case: str
    goal: float
    applies: Callable[[Cell], bool]
    value: Callable[[Row, dict[Cell, Row]], float | None]
    median: bool = False

    def verdict(self, rows: Sequence[Row]) -> tuple[bool | None, str]:
        """(reached, or None where nothing was measured; the number and where it is from)."""
        by_cell = {row.cell: row for row in rows}
        found = [(self.value(row, by_cell), row) for row in rows if self.applies(row.cell)]
        wrong = [row for row in rows if self.applies(row.cell) and "ours" in row.failed]
        values = sorted(((v, str(row.cell)) for v, row in found if v is not None), key=lambda pair: pair[0])
        if wrong:
            return False, f"wrong results at {wrong[0].cell}"
        if not values:
            return None, "nothing measured"
        if self.median:
            number = statistics.median(v for v, _ in values)
            return number >= self.goal, f"median {number:.3f} of {len(values)} shapes"
        number, where = values[0]
        below = sum(v < self.goal for v, _ in values)
        short = f"; {below} of {len(values)} short of it" if below else f", of {len(values)} shapes"
        return number >= self.goal, f"lowest {number:.3f} at {where}{short}"


def _fraction(row: Row, rows: dict[Cell, Row]) -> float | None:
    return row.fraction


def _over_flashinfer(row: Row, rows: dict[Cell, Row]) -> float | None:
    """Where its results are right: a kernel that leaves work out may be as fast as it likes."""
    return None if "flashinfer" in row.failed else row.ratio("flashinfer")


def _bf16_gain(row: Row, rows: dict[Cell, Row]) -> float | None:
    """Our fp32 time over our bf16 time."""
    for cell, other in rows.items():
        if _fp32(cell) and _shape(cell) == _shape(row.cell) and "ours" in other.us:
            return other.us["ours"] / row.us["ours"] if "ours" in row.us else None
    return None


def _shape(cell: Cell) -> tuple[object, ...]:
    return (cell.heads, cell.B, cell.T, cell.mode, cell.state_layout)


def _fp32(cell: Cell) -> bool:
    return cell.state_name == "fp32"


TARGETS = (
    Target(
        "caching, T >= 2, B >= 32: of copy",
        0.93,
        lambda c: _fp32(c) and c.cache and c.T > 1 and c.B >= 32,
        _fraction,
    ),
    Target(
        "caching, T >= 2, B = 8, 16: of copy",
        0.88,
        lambda c: _fp32(c) and c.cache and c.T > 1 and c.B in (8, 16),
        _fraction,
    ),
    Target("caching: x FlashInfer's speed", 1.0, lambda c: c.cache, _over_flashinfer),
    Target("not caching: x FlashInfer's speed", 1.0, lambda c: not c.cache, _over_flashinfer),
    Target(
        "update, T = 8, B >= 32: of copy",
        0.88,
        lambda c: _fp32(c) and c.mode == "update" and c.T == 8 and c.B >= 32,
        _fraction,
    ),
    Target(
        "update, T = 4, B >= 16: of copy",
        0.90,
        lambda c: _fp32(c) and c.mode == "update" and c.T == 4 and c.B >= 16,
        _fraction,
    ),
    Target(
        "T = 1, B = 16 to 63: of copy",
        0.93,
        lambda c: _fp32(c) and c.mode == "update" and c.T == 1 and 16 <= c.B < 64,
        _fraction,
    ),
    Target(
        "T = 1, B >= 64: of copy",
        0.97,
        lambda c: _fp32(c) and c.mode == "update" and c.T == 1 and c.B >= 64,
        _fraction,
    ),
    Target(
        "B = 1 and 4, fp32: x FlashInfer's speed",
        1.15,
        lambda c: _fp32(c) and c.B in (1, 4),
        _over_flashinfer,
        median=True,
    ),
    Target(
        "bf16 state, B >= 32: x our fp32 speed",
        1.7,
        lambda c: c.state_name == "bf16" and c.B >= 32,
        _bf16_gain,
    ),
)

# Microseconds on the host, at most.
HOST_TARGETS = {"Plan.run": 5.0, "functional": 15.0}


def summary(rows: Sequence[Row], host: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Each target with its number; "reached" is None where nothing was measured."""
    verdicts: list[dict[str, Any]] = []
    for target in TARGETS:
        reached, found = target.verdict(rows)
        verdicts.append(
            {"case": target.case, "goal": f">= {target.goal}", "reached": reached, "found": found}
        )
    for name, limit_us in HOST_TARGETS.items():
        times = {case: us[name] for case, us in host.items() if name in us}
        worst = max(times, key=lambda case: times[case], default=None)
        verdicts.append(
            {
                "case": f"host time of {name} in us",
                "goal": f"<= {limit_us}",
                "reached": None if worst is None else times[worst] <= limit_us,
                "found": "nothing measured" if worst is None else f"{times[worst]:.2f} ({worst})",
            }
        )
    return verdicts


def summary_lines(verdicts: Iterable[dict[str, Any]]) -> list[str]:
    words = {True: "reached", False: "NOT reached", None: "not measured"}
    return [f"{v['case']:<40} {v['goal']:>8}  {words[v['reached']]:<12} {v['found']}" for v in verdicts]


MODES = ("update", "cache+update", "cache", "frozen")
COLOURS = ("#3b82f6", "#f97316", "#10a37f", "#a855f7", "#8b95a5", "#e11d48", "#0f766e", "#854d0e")


def _draw(axes: Any, rows: Sequence[Row], variant: str, style: str, colour: str) -> None:
    """A variant's points of one T; times of wrong results are crosses without a line, half transparent."""
    timed = [row for row in rows if variant in row.us]
    right = [(row.cell.B, row.fraction_of(variant)) for row in timed if variant not in row.failed]
    wrong = [(row.cell.B, row.fraction_of(variant)) for row in timed if variant in row.failed]
    label = f"T = {timed[0].cell.T}, {PEER_TITLES.get(variant, variant)}" if timed else ""
    look: dict[str, Any] = {"color": colour, "markersize": 4}
    if right:
        axes.plot(*zip(*right, strict=True), style, label=label, **look)
    if wrong:
        axes.plot(*zip(*wrong, strict=True), "x", alpha=0.5, label=f"{label} (wrong states)", **look)


def plot(rows: Sequence[Row], environment: Mapping[str, str], date: str, path: Path) -> str | None:
    """Fraction of the copy bandwidth over B; returns why there is no plot, or None.

    environment, date: of the run, for the title.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return str(error)
    groups = list(dict.fromkeys((row.cell.heads, row.cell.states) for row in rows))
    modes = [mode for mode in MODES if any(row.cell.mode == mode for row in rows)]
    if not groups:
        return "no rows"
    figure = Figure(figsize=(1 + 4.2 * len(modes), 1 + 3.0 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), len(modes), squeeze=False, sharex=True, sharey=True)
    tokens = sorted({row.cell.T for row in rows})
    batches = sorted({row.cell.B for row in rows})
    for axes_row, group in zip(grid, groups, strict=True):
        for axes, mode in zip(axes_row, modes, strict=True):
            for colour, T in zip(COLOURS, tokens, strict=False):
                at = [
                    r
                    for r in rows
                    if (r.cell.heads, r.cell.states) == group and r.cell.mode == mode and r.cell.T == T
                ]
                for variant, style in (("ours", "o-"), ("flashinfer", "x--")):
                    _draw(axes, at, variant, style, colour)
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(B) for B in batches])
            axes.set_ylim(0, 1.3)  # calls that leave states unwritten exceed 1
            axes.grid(alpha=0.3)
            axes.set_title(f"{group[0]} heads, {group[1]} state, {mode}", fontsize=9)
            if axes.has_data():
                axes.legend(fontsize=6, loc="lower right")
        axes_row[0].set_ylabel("fraction of copy bandwidth")
    for axes in grid[-1]:
        axes.set_xlabel("B")
    commit = environment["git_commit"][:12]
    figure.suptitle(f"gdn-mtp on {environment['device']}, {date}, commit {commit}", fontsize=10)
    figure.savefig(path, dpi=130)
    return None
