"""A timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open: a row per warp, one per engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptx_emulator.counts import Roles
from ptx_emulator.ptx.module import Location

# Classes of instructions that say what a warp does, the most telling first; all others are in between.
NOTABLE = (
    "mma",
    "tensor copy",
    "bulk copy",
    "async copy",
    "tmem",
    "matrix load",
    "matrix store",
    "special",
    "shuffle",
    "atomic",
    "load",
    "store",
)
_FIRST_ENGINE_ROW = 1000  # rows of warps come first
_ROLE_CLASSES = 3  # classes that a row without a role is described by
_ALIKE = 0.8  # share of classes that warps of one role have in common
_MOST_PLACES = 4  # source lines of a span


@dataclass(frozen=True)
class Span:
    """What a warp or an engine does for a while, in virtual cycles.

    Args:
        kind: `run`, `wait` (for the barrier `name`), or `engine`.
        classes: executed instructions by class.
        lines: PTX lines: of a run the first one of each class, else that of the wait or of what issued it.
        waited: cycles of waits, or of idleness of an engine, that were merged into it.
    """

    kind: str
    name: str
    begin: int
    end: int
    classes: Mapping[str, int] = field(default_factory=dict)
    lines: Sequence[int] = ()
    waited: int = 0


@dataclass(frozen=True)
class Row:
    """The spans of a warp, or of an engine of a CTA (`warp` -1)."""

    kernel: str
    launch: int
    cluster: int
    cta: tuple[int, int, int]
    warp: int
    engine: str
    spans: Sequence[Span]
    locations: Mapping[int, Location] = field(default_factory=dict, repr=False)

    def describe(self) -> str:
        """The classes of instructions that say most about a warp: `mma, barrier`."""
        executed = {name for span in self.spans for name in span.classes}
        return _description(executed)


def notable_mask(op_classes: Sequence[str]) -> int:
    """A bit for each class, by its index, that is in `NOTABLE`."""
    return sum(1 << index for index, name in enumerate(op_classes) if name in NOTABLE)


def rows_from_json(
    tracks: Sequence[Mapping[str, Any]],
    kernels: Sequence[tuple[str, Sequence[str], Mapping[int, Location]]],
    grids: Sequence[tuple[int, int, int]],
) -> list[Row]:
    """Rows from the runtime's tracks.

    Args:
        kernels: name, instruction classes and locations of the kernel of each launch.
        grids: CTAs of each launch.
    """
    rows = []
    for track in tracks:
        launch = track["launch"]
        kernel, op_classes, locations = kernels[launch]
        rows.append(
            Row(
                kernel=kernel,
                launch=launch,
                cluster=track["cluster"],
                cta=cta_index(track["cta"], grids[launch]),
                warp=track["warp"],
                engine=track["engine"],
                spans=[_span(span, track["names"], op_classes) for span in track["spans"]],
                locations=locations,
            )
        )
    return sorted(rows, key=lambda r: (r.launch, r.cluster, r.cta[::-1], r.warp < 0, r.warp, r.engine))


def cta_index(linear: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """`%ctaid` of a CTA from its number in the grid."""
    return linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1])


def chrome_trace(rows: Sequence[Row], roles: Roles | None = None) -> dict[str, Any]:
    """Rows as a Chrome trace: a process for each CTA, a thread for each warp and engine.

    A virtual cycle is shown as a microsecond.

    Args:
        roles: name -> warps, to name the rows of warps; others are named by what they execute, those of a
            launch that execute nearly the same by one name.
    """
    role_of = _roles_found(rows)
    for role, warps in (roles or {}).items():
        role_of |= {(row.launch, warp): role for row in rows for warp in warps}
    processes: dict[tuple[int, tuple[int, int, int]], int] = {}
    engines: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for row in rows:
        key = (row.launch, row.cta)
        if key not in processes:
            processes[key] = len(processes) + 1
            events.extend(_process(processes[key], row))
        pid = processes[key]
        tid = row.warp
        if row.warp < 0:
            tid = engines.setdefault(row.engine, _FIRST_ENGINE_ROW + len(engines))
        events.extend(_thread(pid, tid, _row_name(row, role_of)))
        events.extend(_event(pid, tid, row, span) for span in row.spans)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_timeline(path: str | Path, rows: Sequence[Row], roles: Roles | None = None) -> None:
    """Writes `chrome_trace` to a file."""
    trace = chrome_trace(rows, roles)
    Path(path).write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")


# ---------------------------------------------------------------------- inside


def _span(span: Sequence[Any], names: Sequence[str], op_classes: Sequence[str]) -> Span:
    kind, name, line, begin, end, waited, executed = span
    classes = {op_classes[k]: n for k, n in zip(executed[::3], executed[1::3], strict=True)}
    kind_name = ("run", "wait", "engine")[kind]
    lines = executed[2::3] if kind_name == "run" else [line]
    text = _run_name(classes) if kind_name == "run" else names[name]
    return Span(
        kind=kind_name,
        name=text or f"PTX line {line}",
        begin=begin,
        end=end,
        classes=classes,
        lines=[number for number in lines if number],
        waited=waited,
    )


def _run_name(classes: Mapping[str, int]) -> str:
    """The most telling class, or what was executed most."""
    telling = next((name for name in NOTABLE if name in classes), None)
    return telling or max(classes, key=lambda name: classes[name], default="")


def _roles_found(rows: Sequence[Row]) -> dict[tuple[int, int], str]:
    """(launch, warp) -> the classes that say most about this warp of all CTAs and those that are like it."""
    executed: dict[tuple[int, int], set[str]] = {}
    for row in rows:
        if row.warp >= 0:
            found = executed.setdefault((row.launch, row.warp), set())
            found.update(name for span in row.spans for name in span.classes)
    groups: list[list[tuple[int, int]]] = []
    for key, classes in executed.items():
        for group in groups:
            first = executed[group[0]]
            if group[0][0] == key[0] and len(first & classes) >= _ALIKE * len(first | classes):
                group.append(key)
                break
        else:
            groups.append([key])
    names = [_description(set().union(*(executed[key] for key in group))) for group in groups]
    return {key: name for group, name in zip(groups, names, strict=True) for key in group}


def _description(executed: set[str]) -> str:
    """The classes of instructions that say most: `mma, shuffle`."""
    return ", ".join([name for name in NOTABLE if name in executed][:_ROLE_CLASSES])


def _row_name(row: Row, role_of: Mapping[tuple[int, int], str]) -> str:
    if row.warp < 0:
        return f"engine {row.engine}"
    description = role_of.get((row.launch, row.warp), "")
    return f"warp {row.warp}" + (f" {description}" if description else "")


def _event(pid: int, tid: int, row: Row, span: Span) -> dict[str, Any]:
    args: dict[str, Any] = dict(span.classes)
    places = list(dict.fromkeys(str(row.locations[n]) for n in sorted(span.lines) if n in row.locations))
    if places:
        args["source"] = ", ".join(places[:_MOST_PLACES]) + (", …" if len(places) > _MOST_PLACES else "")
    if span.lines:
        args["PTX line"] = min(span.lines)
    if span.waited and span.kind != "wait":
        args["waited" if span.kind == "run" else "idle"] = span.waited
    return {
        "ph": "X",
        "name": f"wait {span.name}" if span.kind == "wait" else span.name,
        "cat": span.kind,
        "pid": pid,
        "tid": tid,
        "ts": span.begin,
        "dur": span.end - span.begin,
        "args": args,
    }


def _process(pid: int, row: Row) -> Iterator[dict[str, Any]]:
    x, y, z = row.cta
    name = f"{row.kernel} (launch {row.launch}), cluster {row.cluster}, CTA ({x}, {y}, {z})"
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}


def _thread(pid: int, tid: int, name: str) -> Iterable[dict[str, Any]]:
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
