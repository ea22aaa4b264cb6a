"""The tables of times in gdn-mtp's README.md and docs/speed.md, and plots, made from the recorded results.

    python benchmarks/gdn_tables.py --check
    python benchmarks/gdn_tables.py --write

Each stands between `<!-- table NAME -->` and `<!-- end of table -->`, in either file; `--write` draws the
plot beside each record that has one, too. The exit status is 1 if one stands in neither and, with `--check`,
if one is not what the results say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _gdn_report import Row, plot, summary

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "packages" / "gdn-mtp"
DOCUMENTS = (PACKAGE / "README.md", PACKAGE / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

CALL_RECORDS = ("gdn_mtp-h100", "gdn_mtp-h100-tokens", "gdn_mtp-h100-kmajor", "gdn_mtp-h200")
CALLS = {  # (tokens, mode): what heads its column
    (1, "update"): "T = 1",
    (4, "update"): "T = 4, state updated",
    (8, "update"): "T = 8, state updated",
    (4, "cache+update"): "T = 4, every state kept",
    (8, "cache+update"): "T = 8, every state kept",
}
# Calls with fp32 states, updated: (tokens, batches from, to below, fraction of the copy bandwidth aimed at)
GOALS = (
    (1, 16, 64, 0.93),
    (1, 64, math.inf, 0.97),
    (4, 16, math.inf, 0.90),
    (8, 32, math.inf, 0.88),
)
STAGES = {  # of a call, what is left out last: what heads its column
    "nothing": "whole",
    "arithmetic": "no arithmetic",
    "tokens": "no tokens",
    "registers": "no registers",
    "disorder": "slots in order",
    "index": "no index",
    "copy": "plain copy",
}
TACTICS_SHOWN = ((1, 4, 8), (4, 16, 64))  # T, B
FASTEST_SHOWN = 3  # of each
HEAD_DIM, IO_BYTES = 128, 2  # of q, k, v and the output
STEPS = [(T, dtype) for T in (4, 8) for dtype in ("fp32", "bf16")]
OTHER_WINDOWS = {
    (T, mode): f"T = {T}, {state}"
    for T in (3, 5, 6, 7)
    for mode, state in (("update", "updated"), ("cache+update", "all kept"))
}


def record(name: str) -> dict[str, Any]:
    """A file of recorded results."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def draw(picture: Path) -> None:
    """The plot of the record beside it."""
    run = json.loads(picture.with_name("results.json").read_text(encoding="utf-8"))
    rows = [Row.of_record(row, run["copy_gb_s"]["start"]) for row in run["rows"]]
    no_plot = plot(rows, run["environment"], run["date"], picture)
    if no_plot:
        raise SystemExit(f"{picture}: {no_plot}")


def rows_of(*names: str) -> list[dict[str, Any]]:
    """The rows of recorded results, with 16 query and key heads and 32 value heads."""
    return [row for name in names for row in record(name)["rows"] if row["heads"] == "16/16/32"]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def cell(row: dict[str, Any]) -> str:
    """Microseconds of ours, the fraction of the copy bandwidth, FlashInfer's time over ours."""
    ratio = row["ratio"].get("flashinfer")
    times = "-" if ratio is None else f"{ratio:.2f}x"
    return f"{row['us']['ours']:.1f} ({row['fraction_of_copy']:.2f}, {times})"


def calls(name: str, columns: dict[tuple[int, str], str]) -> str:
    """Calls of a record by batch, of fp32 states; columns: by (tokens, mode), what heads it."""
    rows = {(row["B"], (row["T"], row["mode"])): row for row in rows_of(name) if row["state_dtype"] == "fp32"}
    batches = sorted({B for B, _ in rows})
    lines = [[str(B), *(cell(rows[B, column]) for column in columns)] for B in batches]
    return table(["B", *columns.values()], lines)


def k_major() -> str:
    """Single tokens with K-major states by batch."""
    rows = {(row["B"], row["state_dtype"]): row for row in rows_of("gdn_mtp-h100-kmajor/results.json")}
    lines = []
    for B in sorted({B for B, _ in rows}):
        fla = rows[B, "fp32"]["ratio"]["fla"]
        lines.append([str(B), cell(rows[B, "fp32"]), f"{fla:.2f}x", cell(rows[B, "bf16"])])
    return table(["B", "fp32 states", "FLA", "bf16 states"], lines)


def short_of_goal() -> list[tuple[dict[str, Any], float]]:
    """The rows below their goal of `GOALS`, each with the goal."""
    rows = [row for row in rows_of("gdn_mtp-h100/results.json") if _updates_fp32(row)]
    return [
        (row, goal)
        for T, first, end, goal in GOALS
        for row in rows
        if row["T"] == T and first <= row["B"] < end and row["fraction_of_copy"] < goal
    ]


def stages(cell: str) -> dict[str, float]:
    """Of a cell, fractions of the copy bandwidth by what is left out of the kernel."""
    rows = record("gdn_mtp-stages-h100/results.json")["rows"]
    (fractions,) = (row["fraction"] for row in rows if row["cell"] == cell)
    return dict(fractions)


def _stages_of(row: dict[str, Any]) -> dict[str, float]:
    return stages(f"{row['heads']} B{row['B']}-T{row['T']} {row['mode']} {row['state_dtype']}")


def shortfalls() -> str:
    """What is short of its goal: goal, reached, and what bounds it.

    Bounds: what moving the states alone reaches; what it would if at that rate it moved tokens and outputs,
    whose bytes the fractions leave out, too; a plain copy.
    """
    lines = []
    for row, goal in short_of_goal():
        left = _stages_of(row)
        states = left["registers"]
        key_heads, _, value_heads = map(int, row["heads"].split("/"))
        token_nbytes = row["B"] * row["T"] * 2 * (key_heads + value_heads) * HEAD_DIM * IO_BYTES
        bound = states / (1 + token_nbytes / row["necessary_bytes"])
        numbers = (f"{x:.3f}" for x in (row["fraction_of_copy"], bound, states, left["copy"]))
        lines.append([_call(row), f"{goal:.2f}", *numbers])
    return table(["call", "goal", "reached", "states and tokens", "states alone", "plain copy"], lines)


def goals() -> str:
    """Every goal of the benchmark that a record has calls for, with what it has."""
    lines = []
    for name in CALL_RECORDS:
        content = record(f"{name}/results.json")
        rows = [Row.of_record(row, content["copy_gb_s"]["start"]) for row in content["rows"]]
        for x in summary(rows, content["host_us"]):
            if x["reached"] is not None:
                reached = "yes" if x["reached"] else "no"
                lines.append([f"`{name}`", x["case"], x["goal"], reached, x["found"]])
    return table(["record", "calls", "goal", "reached", "found"], lines)


def call_stages() -> str:
    """What is short of its goal, with more and more left out."""
    lines = []
    for row, goal in short_of_goal():
        left = _stages_of(row)
        lines.append([_call(row), f"{goal:.2f}", *(f"{left[name]:.3f}" for name in STAGES)])
    return table(["call", "goal", *STAGES.values()], lines)


def bf16_stages() -> str:
    """Calls that update bf16 states, with more and more left out."""
    lines = []
    for T in (1, 4, 8):
        for B in (16, 32, 64):
            left = stages(f"16/16/32 B{B}-T{T} update bf16")
            lines.append([f"T = {T}, B = {B}", *(f"{left[name]:.3f}" for name in STAGES)])
    return table(["call", *STAGES.values()], lines)


def step_stages() -> str:
    """Speculative steps of bf16 states, with all but the moves left out, and all but reading states."""
    lines = []
    for T, capacity in ((4, 16), (8, 24)):
        for B in (16, 32, 64):
            left = stages(f"16/16/32 B{B}-T{T}-R{capacity} auto bf16")
            lines.append([f"T = {T}, B = {B}", *(f"{fraction:.3f}" for fraction in left.values())])
    return table(["step", "whole", "no arithmetic", "states read alone"], lines)


def tactics() -> str:
    """The fastest tactics of calls that update the state, beside one in which every block prefetches."""
    lines = []
    for name in ("fp32", "bf16"):
        rows = {(row["T"], row["B"]): row for row in rows_of(f"gdn_mtp-h100-tactics/final-{name}.json")}
        for place in itertools.product(*TACTICS_SHOWN):
            row = rows[place]
            timed = dict(row["us"])
            timed[row["tactic"]] = timed.pop("ours")
            fastest = sorted(timed.items(), key=lambda item: item[1])
            shown = ", ".join(f"{tactic} {us:.2f}" for tactic, us in fastest[:FASTEST_SHOWN])
            rest = f"{len(fastest) - FASTEST_SHOWN} more to {fastest[-1][1]:.2f}"
            lines.append([f"{_call(row)}, {name}", f"{shown}, {rest}", f"{timed['w4t1s']:.2f}"])
    return table(["call", "tactics, µs", "w4t1s, µs"], lines)


def _call(row: dict[str, Any]) -> str:
    return f"T = {row['T']}, B = {row['B']}"


def _updates_fp32(row: dict[str, Any]) -> bool:
    return bool(row["state_dtype"] == "fp32" and row["mode"] == "update")


def steps(*names: str) -> str:
    """Speculative steps by batch."""
    rows = {(row["T"], row["state_dtype"], row["B"]): row for row in rows_of(*names)}
    batches = sorted({B for _, _, B in rows})
    lines = [[str(B), *(cell(rows[T, dtype, B]) for T, dtype in STEPS)] for B in batches]
    return table(["B", *(f"T = {T}, {dtype} states" for T, dtype in STEPS)], lines)


TABLES: dict[str, Callable[[], str]] = {
    "calls": lambda: calls("gdn_mtp-h100/results.json", CALLS),
    "other_windows": lambda: calls("gdn_mtp-h100-tokens/results.json", OTHER_WINDOWS),
    "k_major": k_major,
    "shortfalls": shortfalls,
    "goals": goals,
    "call_stages": call_stages,
    "bf16_stages": bf16_stages,
    "step_stages": step_stages,
    "tactics": tactics,
    "steps_h100": lambda: steps("gdn_spec-h100/results.json"),
    "steps_h200": lambda: steps("gdn_spec-h200/results.json"),
}


def filled(text: str) -> str:
    """A document's text with every table made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def unplaced(texts: Iterable[str]) -> list[str]:
    """The names of `TABLES` that none of the texts has a place for."""
    placed = {found[2] for text in texts for found in MARKED.finditer(text)}
    return [name for name in TABLES if name not in placed]


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true", help="compare only")
    group.add_argument("--write", action="store_true", help="change the documents")
    options = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    wrong = [f"no document has a place for the table {name}" for name in unplaced(texts.values())]
    for path, before in texts.items():
        after = filled(before)
        if options.write:
            path.write_text(after, encoding="utf-8")
        elif after != before:
            wrong.append(f"{path}: its tables are not what the results say")
    if options.write:
        for picture in sorted(RESULTS.glob("gdn_mtp-*/plot.png")):
            draw(picture)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
