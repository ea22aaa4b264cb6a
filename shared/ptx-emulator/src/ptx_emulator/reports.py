"""What the emulator finds in a run, and the error that carries it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptx_emulator.errors import EmulatorError
from ptx_emulator.ptx.module import Location

# The most telling first: what is wrong in the program before what comes of it.
KINDS = {
    "unsupported": "Not supported",
    "race": "Races",
    "proxy-race": "Races between the generic and the async proxy",
    "grid-dependency": "Accesses that need griddepcontrol.wait",
    "barrier": "Misuse of barriers",
    "tmem": "Misuse of tensor memory",
    "out-of-bounds": "Accesses out of bounds",
    "misaligned": "Misaligned accesses",
    "registers": "Misuse of setmaxnreg",
    "divergence": "Divergence at .aligned instructions",
    "uninitialised": "Reads of what nobody wrote",
    "deadlock": "Deadlock",
    "trap": "Traps",
    "tcgen05-order": "Tensor memory accesses without tcgen05 waits or fences",
    "wgmma-order": "Registers of wgmma accessed before wgmma.wait_group",
    "tmem-lanes": "Tensor memory addresses with lanes of another warp",
}
_RANK = {kind: rank for rank, kind in enumerate(KINDS)}
_MOST_PER_KIND = 20  # in the text of the error; `reports` has all


@dataclass(frozen=True)
class Site:
    """Where something was executed: a PTX line, with its source where the PTX says it.

    `cta` is %ctaid, `lane` -1 stands for the warp, `line` 0 for no single instruction.
    """

    line: int
    cta: tuple[int, int, int]
    warp: int
    lane: int = -1
    location: Location | None = None

    @property
    def place(self) -> str:
        """`kernel.py:12 (PTX line 340)`, or the PTX line alone; inlined code with the places of its calls."""
        if not self.line:
            return "no single instruction"
        ptx = f"PTX line {self.line}"
        return f"{self.location} ({ptx})" if self.location else ptx

    @property
    def thread(self) -> str:
        lane = f", lane {self.lane}" if self.lane >= 0 else ""
        return f"CTA {self.cta}, warp {self.warp}{lane}"  # CTA (1, 0, 0)

    def __str__(self) -> str:
        return f"{self.place}, {self.thread}" if self.line else self.place


@dataclass(frozen=True)
class Report:
    """One finding.

    `kind` is a key of `KINDS`, `other` the earlier side of a race, `launch` counts from 0; `times` says how
    often it was found at the same instructions.
    """

    kind: str
    message: str
    kernel: str
    launch: int
    site: Site
    other: Site | None = None
    times: int = 1

    @property
    def line(self) -> int:
        return self.site.line

    @property
    def location(self) -> Location | None:
        return self.site.location

    @property
    def cta(self) -> tuple[int, int, int]:
        return self.site.cta

    @property
    def warp(self) -> int:
        return self.site.warp

    @property
    def lane(self) -> int:
        return self.site.lane

    def __str__(self) -> str:
        text = f"{self.kind} in {self.kernel} at {self.site}: {self.message}"
        if self.times > 1:
            text += f" (and {self.times - 1} times more)"
        return f"{text}\n    the other one: {self.other}" if self.other else text

    def to_dict(self) -> dict[str, Any]:
        """As JSON objects."""
        return asdict(self)


class EmulationError(EmulatorError):
    """A run had findings: `reports` has them all, the text the first of each kind."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = list(reports)
        super().__init__(reports_text(self.reports))


def reports_from_json(
    findings: Sequence[Mapping[str, Any]], locations: Mapping[str, Mapping[int, Location]]
) -> list[Report]:
    """Reports from the runtime's findings.

    Args:
        findings: objects with `kind`, `kernel`, `grid`, `message`, `site` and perhaps `other`; a site has
            `cta`, `warp`, `lane` and `line`.
        locations: kernel -> PTX line -> source.
    """
    return [_report(finding, locations.get(finding["kernel"], {})) for finding in findings]


def most_telling_first(reports: Sequence[Report]) -> list[Report]:
    """Ordered by kind as `KINDS` are, otherwise as they were found."""
    return sorted(reports, key=lambda report: _RANK[report.kind])


def reports_text(reports: Sequence[Report]) -> str:
    """Readable text: grouped by kernel and kind, the most telling kinds first, a table for a deadlock."""
    if not reports:
        return "no findings"
    reports = most_telling_first(reports)
    parts = [_headline(reports)]
    for (kernel, launch), of_launch in _groups(reports, lambda r: (r.kernel, r.launch)):
        parts.append(f"{kernel} (launch {launch}):")
        for kind, same in _groups(of_launch, lambda r: r.kind):
            parts.append(f"  {KINDS.get(kind, kind)}:")
            parts.extend(_deadlock_table(same) if kind == "deadlock" else _list(same))
    return "\n".join(parts)


def reports_json(reports: Sequence[Report]) -> str:
    """The reports as a JSON array."""
    return json.dumps([report.to_dict() for report in reports], indent=1)


def _report(finding: Mapping[str, Any], locations: Mapping[int, Location]) -> Report:
    other = finding.get("other")
    return Report(
        kind=finding["kind"],
        message=finding["message"],
        kernel=finding["kernel"],
        launch=finding["grid"],
        site=_site(finding["site"], locations),
        other=_site(other, locations) if other else None,
        times=finding.get("times", 1),
    )


def _site(site: Mapping[str, Any], locations: Mapping[int, Location]) -> Site:
    x, y, z = site["cta"]
    return Site(site["line"], (x, y, z), site["warp"], site["lane"], locations.get(site["line"]))


def _groups(reports: Sequence[Report], key: Any) -> Iterator[tuple[Any, list[Report]]]:
    groups: dict[Any, list[Report]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    yield from groups.items()


def _headline(reports: Sequence[Report]) -> str:
    counts = ", ".join(f"{len(same)} {kind}" for kind, same in _groups(reports, lambda r: r.kind))
    return f"{len(reports)} finding{'s' if len(reports) > 1 else ''}: {counts}"


def _list(reports: Sequence[Report]) -> Iterator[str]:
    for report in reports[:_MOST_PER_KIND]:
        yield f"    {report.site}"
        yield f"      {report.message}"
        if report.other is not None:
            yield f"      the other one: {report.other}"
    if len(reports) > _MOST_PER_KIND:
        yield f"    and {len(reports) - _MOST_PER_KIND} more"


def _deadlock_table(reports: Sequence[Report]) -> Iterator[str]:
    """Who waits for what; warps that wait alike share a row."""
    alike: dict[tuple[tuple[int, int, int], str, str], list[int]] = {}
    for report in reports:
        alike.setdefault((report.cta, report.site.place, report.message), []).append(report.warp)
    rows = [("CTA", "warps", "at", "")]
    for (cta, place, message), warps in alike.items():
        known = place != Site(0, cta, 0).place
        rows.append((str(cta) if known else "-", ranges_text(warps) if known else "-", place, message))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    for number, numbers, place, message in rows:
        yield f"    {number:>{widths[0]}}  {numbers:<{widths[1]}}  {place:<{widths[2]}}  {message}".rstrip()


def ranges_text(numbers: Sequence[int]) -> str:
    """`0-3, 5` for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
