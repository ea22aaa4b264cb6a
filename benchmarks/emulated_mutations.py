"""Drops or moves every wait, fence and barrier of a reference kernel, one at a time: what notices?

    python benchmarks/emulated_mutations.py --out benchmarks/results/emulated_mutations.json
    python benchmarks/emulated_mutations.py --document    # the README's table from the results

Every mutant runs on the emulator under several schedules, each to its end. The record has, for each mutant,
everything that noticed it (wrong results, races, other checks, deadlock), and for each survivor its place and
whether it is redundant synchronisation, with why, or a gap of the checker. The exit status is 1 if a survivor
has no classification. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "emulated_mutations.json"
README = ROOT / "shared" / "ptx-emulator" / "README.md"
BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->\n"
DISTRIBUTIONS = ("ptx-emulator", "nvidia-cutlass-dsl")


def filled_in(text: str, results: Mapping[str, Any]) -> str:
    """The README with the table of these results between its two comments."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README}: has no {BEGIN.strip()} ... {END.strip()}")
    return before + BEGIN + table(results["gemm_softmax"]) + END + after


def table(found: Mapping[str, Any]) -> str:
    """Mutants by kind and action, and what noticed them, in Markdown."""
    columns = list(found["caught_by"])
    rows = [["", "mutants", *columns, "survived"], ["---", *["--:"] * (len(columns) + 2)]]
    groups = sorted({(mutant["kind"], mutant["action"]) for mutant in found["each"]})
    for group in [*groups, None]:
        chosen = [m for m in found["each"] if group is None or (m["kind"], m["action"]) == group]
        caught = [sum(name in m["caught_by"] for m in chosen) for name in columns]
        survived = sum(not m["caught_by"] for m in chosen)
        cells = [str(number) for number in (len(chosen), *caught, survived)]
        rows.append([" ".join(group) if group else "all", *cells])
    share = [f"{found['caught_by'][name] / found['mutants']:.0%}" for name in columns]
    survived_share = f"{1 - found['caught'] / found['mutants']:.0%}"
    rows.append(["share", "", *share, survived_share])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Survey, print, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--document", action="store_true", help="write the README's table, run nothing")
    options = parser.parse_args(arguments)
    if options.document:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        README.write_text(filled_in(README.read_text(encoding="utf-8"), results), encoding="utf-8")
        return 0
    sys.path.insert(0, str(ROOT / "tests" / "ptx_emulator"))
    from kernel_testing import environment
    from mutations import UNCLASSIFIED, record, survey_gemm_softmax, verdict_of
    from ptx_emulator.mutation import summary

    begin = time.monotonic()
    outcomes = survey_gemm_softmax(progress=True)
    seconds = round(time.monotonic() - begin, 1)
    print(summary(outcomes))
    for outcome in outcomes:
        verdict = verdict_of(outcome)
        if verdict is not None:
            print(f"survived: {outcome.mutant}\n    {verdict.verdict}: {verdict.why}")
    found = record(outcomes)
    if options.out:
        results = {
            "environment": environment(*DISTRIBUTIONS),
            "kernel": "tests/ptx_emulator/kernels/gemm_softmax.py: two CTAs, TMA, tcgen05, tensor memory",
            "seconds": seconds,
            "gemm_softmax": found,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(found["survived"][UNCLASSIFIED] > 0)


if __name__ == "__main__":
    sys.exit(main())
