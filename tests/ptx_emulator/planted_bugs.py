"""Kernels with planted bugs: dropping lines, and what the checker must say under every schedule.

Each kernel is written right, with `// [name]` behind instructions that a test drops; `// <name>` marks where
a finding is expected.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from harness import kernel_text, run_kernel

TWO_WARPS = {"block": (64, 1, 1), "shared_bytes": 1024}
SCHEDULES = ("fair", "greedy", "late", "greedy-late", "random")
MBAR = ".shared .align 8 .b64 full;\n.shared .align 8 .b64 empty;\n"


def without(body: str, *names: str) -> str:
    """The kernel without the lines that carry `// [name]`; the line numbers stay."""
    for name in names:
        assert f"[{name}]" in body
        body = re.sub(rf"^.*// \[{name}\]$", "//", body, flags=re.M)
    return body


def lines_of(body: str, num_arrays: int, target: str, module_scope: str) -> dict[str, int]:
    """PTX line of each `// <name>`."""
    text = kernel_text(body, num_arrays, target, module_scope)
    return {m[1]: n for n, line in enumerate(text.splitlines(), 1) if (m := re.search(r"// .*<(\w+)>", line))}


def find(body: str, *arrays: np.ndarray, kind: str, at: str, other: str = "", **launch: Any) -> None:
    """Runs under every schedule; each must report `kind` at the marks and nothing of another kind.

    `at` is the instruction, `other` the one it conflicts with; the schedule says which of them comes first.
    """
    marks = lines_of(body, len(arrays), launch.get("target", "sm_90a"), launch.get("globals", ""))
    wanted = {marks[at], marks[other]} if other else {marks[at], 0}
    for schedule in SCHEDULES:
        result = run_kernel(
            body, *(a.copy() for a in arrays), expect_reports=True, schedule=schedule, **launch
        )
        assert {r.kind for r in result.reports} == {kind}, (schedule, [str(r) for r in result.reports])
        found = [{r.line, r.other.line if r.other else 0} for r in result.reports]
        assert wanted in found, (schedule, wanted, [str(r) for r in result.reports])


def silent(body: str, *arrays: np.ndarray, **launch: Any) -> None:
    """Runs under every schedule and a few seeds without a finding."""
    for schedule in SCHEDULES:
        for seed in range(4 if schedule == "random" else 1):
            run_kernel(body, *(a.copy() for a in arrays), schedule=schedule, seed=seed, **launch)


def zeros(size: int = 64) -> np.ndarray:
    return np.zeros(size, dtype=np.uint32)
