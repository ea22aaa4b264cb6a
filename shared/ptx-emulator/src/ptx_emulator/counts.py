"""What a launch executed: instructions by class, traffic, matrix work, waits, by warp role."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_emulator.reports import ranges_text

# As the enum Count of runtime/core.h.
COUNT_NAMES = (
    "global_load_bytes",
    "global_store_bytes",
    "global_load_sectors",
    "global_store_sectors",
    "shared_load_bytes",
    "shared_store_bytes",
    "shared_wavefronts",
    "shared_bank_conflicts",
    "tma_load_bytes",
    "tma_store_bytes",
    "tmem_load_bytes",
    "tmem_store_bytes",
    "mma_flops",
    "exponentials",
    "barrier_waits",
    "barrier_wait_cycles",
)
Roles = Mapping[str, Iterable[int]]  # name -> warps of the CTA
_ALIKE = 0.8  # share of instructions that warps of one role have in common


@dataclass
class LaunchCounts:
    """Counts of one launch, summed over its CTAs.

    Args:
        kernel: its name.
        executed: [warps of a CTA, instructions], how often each was executed by a warp.
        counts: [warps of a CTA, len(COUNT_NAMES)].
        op_class: [instructions], index into `class_names`.
        class_names: names of instruction classes.
        lines: [instructions], PTX lines.
    """

    kernel: str
    executed: np.ndarray
    counts: np.ndarray
    op_class: np.ndarray
    class_names: Sequence[str]
    lines: np.ndarray

    @property
    def num_warps(self) -> int:
        return int(self.executed.shape[0])

    @property
    def instructions(self) -> int:
        """Executed by warps, all together."""
        return int(self.executed.sum())

    def __getitem__(self, name: str) -> int:
        """A count by its name, or executed instructions of a class, over all warps."""
        if name in COUNT_NAMES:
            return int(self.counts[:, COUNT_NAMES.index(name)].sum())
        if name in self.class_names:
            return int(self.executed[:, self.op_class == list(self.class_names).index(name)].sum())
        raise KeyError(f"{name!r} is no count and no instruction class")

    def find_roles(self) -> dict[str, list[int]]:
        """Warps that execute the same instructions, apart from a few, grouped; named by their numbers."""
        groups: list[list[int]] = []
        masks = self.executed > 0
        for warp in range(self.num_warps):
            for group in groups:
                first = masks[group[0]]
                union = int((first | masks[warp]).sum())
                if int((first & masks[warp]).sum()) >= _ALIKE * union:
                    group.append(warp)
                    break
            else:
                groups.append([warp])
        return {f"warp{'s' if len(group) > 1 else ''} {ranges_text(group)}": group for group in groups}

    def by_role(self, roles: Roles | None = None) -> dict[str, dict[str, int]]:
        """Role -> instructions by every class that the kernel has, then every count.

        Args:
            roles: name -> warps; default: `find_roles()`.

        Raises:
            ValueError: a warp that the CTA does not have, or that is in two roles.
        """
        chosen = {name: sorted(warps) for name, warps in (roles or self.find_roles()).items()}
        self._check_roles(chosen)
        rest = sorted(set(range(self.num_warps)) - {w for warps in chosen.values() for w in warps})
        if rest:
            chosen["other"] = rest
        by_class = np.zeros((self.num_warps, len(self.class_names)), dtype=np.uint64)
        for index in range(len(self.class_names)):
            by_class[:, index] = self.executed[:, self.op_class == index].sum(axis=1)
        table = {}
        for role, warps in chosen.items():
            row = {name: int(by_class[warps, k].sum()) for k, name in enumerate(self.class_names)}
            row |= {name: int(self.counts[warps, k].sum()) for k, name in enumerate(COUNT_NAMES)}
            table[role] = row
        return table

    def hottest_lines(self, num_lines: int = 10) -> list[tuple[int, int]]:
        """(PTX line, warp instructions executed for it), most first."""
        by_line: dict[int, int] = {}
        for line, times in zip(self.lines, self.executed.sum(axis=0), strict=True):
            by_line[int(line)] = by_line.get(int(line), 0) + int(times)
        return sorted(by_line.items(), key=lambda item: -item[1])[:num_lines]

    def table(self, roles: Roles | None = None) -> str:
        """A text table: a row for each instruction class of the kernel and each count, a column per role.

        Counts that are zero throughout are named in the last line.
        """
        columns = self.by_role(roles)
        names = list(next(iter(columns.values()), {}))
        rows = [["", *columns, "all"]]
        zero = [name for name in names if not any(column[name] for column in columns.values())]
        for name in names:
            if name in zero:
                continue
            values = [column[name] for column in columns.values()]
            rows.append([name.replace("_", " "), *(f"{v:,}" for v in (*values, sum(values)))])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [self.kernel]
        for row in rows:
            cells = [
                f"{row[0]:<{widths[0]}}",
                *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        if zero:
            lines.append(f"none: {', '.join(name.replace('_', ' ') for name in zero)}")
        return "\n".join(lines)

    def to_dict(self, roles: Roles | None = None) -> dict[str, Any]:
        """As JSON objects: kernel, totals, and the table by role."""
        by_role = self.by_role(roles)
        totals: dict[str, int] = {}
        for row in by_role.values():
            for name, value in row.items():
                totals[name] = totals.get(name, 0) + value
        return {"kernel": self.kernel, "instructions": self.instructions, "total": totals, "roles": by_role}

    def to_json(self, roles: Roles | None = None) -> str:
        return json.dumps(self.to_dict(roles), indent=1)

    def __str__(self) -> str:
        return self.table()

    def _check_roles(self, roles: Mapping[str, Sequence[int]]) -> None:
        seen: dict[int, str] = {}
        for role, warps in roles.items():
            for warp in warps:
                if not 0 <= warp < self.num_warps:
                    raise ValueError(f"roles: {role!r} has warp {warp}, the CTA has {self.num_warps} warps")
                if warp in seen:
                    raise ValueError(f"roles: warp {warp} is in {seen[warp]!r} and in {role!r}")
                seen[warp] = role
