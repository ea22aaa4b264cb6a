"""A timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open: a row per warp, one per engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptx_emulator.counts import Roles

_FIRST_ENGINE_ROW = 1000  # rows of warps come first


def chrome_trace(
    spans: Sequence[Mapping[str, Any]], kernels: Sequence[str] = (), roles: Roles | None = None
) -> dict[str, Any]:
    """Spans as a Chrome trace. A virtual cycle is shown as a microsecond.

    Args:
        spans: objects with `grid`, `cta`, `warp` (-1: an engine), `engine`, `name`, `begin` and `end`.
        kernels: names of the launches, by `grid`.
        roles: name -> warps, to name the rows of warps.
    """
    role_of = {warp: role for role, warps in (roles or {}).items() for warp in warps}
    processes: dict[tuple[int, int], int] = {}
    engines: dict[str, int] = {}
    rows: set[tuple[int, int]] = set()
    events: list[dict[str, Any]] = []
    # The longer of two spans that begin together encloses the other.
    for span in sorted(spans, key=lambda s: (s["grid"], s["cta"], s["begin"], -s["end"])):
        key = (span["grid"], span["cta"])
        if key not in processes:
            processes[key] = len(processes) + 1
            events.extend(_process(processes[key], key, kernels))
        pid = processes[key]
        warp, engine = span["warp"], span["engine"]
        row = warp if warp >= 0 else engines.setdefault(engine, _FIRST_ENGINE_ROW + len(engines))
        if (pid, row) not in rows:
            rows.add((pid, row))
            role = f" {role_of[warp]}" if warp in role_of else ""
            events.extend(_row(pid, row, f"warp {warp}{role}" if warp >= 0 else engine))
        events.append(
            {
                "ph": "X",
                "name": span["name"],
                "cat": "warp" if warp >= 0 else engine,
                "pid": pid,
                "tid": row,
                "ts": span["begin"],
                "dur": span["end"] - span["begin"],
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_timeline(
    path: str | Path,
    spans: Sequence[Mapping[str, Any]],
    kernels: Sequence[str] = (),
    roles: Roles | None = None,
) -> None:
    """Writes `chrome_trace` to a file."""
    Path(path).write_text(json.dumps(chrome_trace(spans, kernels, roles)), encoding="utf-8")


def _process(pid: int, key: tuple[int, int], kernels: Sequence[str]) -> list[dict[str, Any]]:
    grid, cta = key
    kernel = kernels[grid] if grid < len(kernels) else f"launch {grid}"
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"{kernel}, CTA {cta}"}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}},
    ]


def _row(pid: int, row: int, name: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": row, "args": {"name": name}},
        {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": row, "args": {"sort_index": row}},
    ]
