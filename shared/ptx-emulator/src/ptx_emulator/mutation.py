"""Drops or moves one wait, fence or barrier at a time, and says all that noticed.

A kernel is only as well checked as its mutants are caught. A mutant that nothing catches is either redundant
synchronisation or a gap of the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptx_emulator.errors import EmulatorError
from ptx_emulator.machine import LoadedModule, Result
from ptx_emulator.ptx.module import Function, Immediate, Instruction, Label, Location
from ptx_emulator.reports import Report

# What notices a mutant, with the kinds of findings; findings of no other column are `other checks`.
RESULTS, OTHER_CHECKS = "results", "other checks"
FINDINGS = {
    "races": ("race", "proxy-race", "grid-dependency"),
    "uninitialised": ("uninitialised",),
    "tcgen05-order": ("tcgen05-order",),
    "deadlock": ("deadlock",),
}
CATCHERS = (RESULTS, *FINDINGS, OTHER_CHECKS)
_POLLS = ("mbarrier.try_wait", "mbarrier.test_wait")
_SYNCHRONISATION = {
    "wait": (
        *_POLLS,
        "cp.async.wait_group",
        "cp.async.wait_all",
        "cp.async.bulk.wait_group",
        "wgmma.wait_group",
        "tcgen05.wait",
        "griddepcontrol.wait",
    ),
    "fence": ("fence", "membar", "wgmma.fence", "tcgen05.fence"),
    "barrier": ("bar", "barrier"),
}
_MEMORY = ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "tcgen05", "wgmma", "mbarrier", "mma")
_MOVES_EARLIER = ("fence", "tcgen05.fence")  # what comes before them is what they order


@dataclass(frozen=True)
class Place:
    """Where a mutant was made, and how, in words that stay the same when lines move.

    Args:
        source: the text of the source line, or the PTX instruction where the PTX names no source.
        instruction: with its modifiers.
        action: `drop`, `later` or `earlier`.
        occurrence: counts from 0 the mutants that are otherwise alike, in the order of the PTX.
    """

    source: str
    instruction: str
    action: str
    occurrence: int = 0

    def __str__(self) -> str:
        number = f", number {self.occurrence}" if self.occurrence else ""
        return f"{self.action} {self.instruction} of `{self.source}`{number}"


@dataclass(frozen=True)
class Mutant:
    """One change of a kernel, at a PTX line; `kind` is wait, fence or barrier."""

    line: int
    kind: str
    place: Place
    function: Function = field(repr=False)
    location: Location | None = None

    def __str__(self) -> str:
        return f"{self.place} (PTX line {self.line})"


@dataclass(frozen=True)
class Outcome:
    """All that noticed a mutant, over all schedules that it ran under.

    Args:
        findings: the first finding of each kind, in short.
        results_differ: whether a schedule ran to its end with wrong results.
    """

    mutant: Mutant
    findings: Mapping[str, str]
    results_differ: bool

    @property
    def caught_by(self) -> tuple[str, ...]:
        """Those of `CATCHERS` that noticed it; none if it survived."""
        found = {catcher_of(kind) for kind in self.findings} | ({RESULTS} if self.results_differ else set())
        return tuple(name for name in CATCHERS if name in found)

    @property
    def survived(self) -> bool:
        return not self.caught_by

    def record(self) -> dict[str, Any]:
        """As JSON objects."""
        place, location = self.mutant.place, self.mutant.location
        return {
            "ptx_line": self.mutant.line,
            "source": f"{Path(location.file).name}:{location.line}" if location else "",
            "source_text": place.source,
            "kind": self.mutant.kind,
            "action": place.action,
            "instruction": place.instruction,
            "occurrence": place.occurrence,
            "caught_by": list(self.caught_by),
            "findings": dict(self.findings),
        }


def catcher_of(kind: str) -> str:
    """The column of `CATCHERS` that a kind of finding counts in."""
    return next((name for name, kinds in FINDINGS.items() if kind in kinds), OTHER_CHECKS)


def mutants(function: Function) -> Iterator[Mutant]:
    """Every wait, fence and barrier of a kernel, dropped; and moved behind or before the nearest memory
    instruction of its basic block, where there is one."""
    seen: dict[Place, int] = {}
    for index, item in enumerate(function.body):
        kind = _kind(item) if isinstance(item, Instruction) else None
        if not isinstance(item, Instruction) or kind is None:
            continue
        for action, body in _changes(function.body, index, item):
            place = Place(_source_text(item), item.name, action)
            number = seen[place] = seen.get(place, -1) + 1
            changed = replace(function, body=body)
            yield Mutant(item.line, kind, replace(place, occurrence=number), changed, item.location)


def survey(
    module: LoadedModule,
    kernel: str | None,
    run: Callable[[LoadedModule], Iterable[tuple[Result, bool]]],
    *,
    progress: bool = True,
) -> list[Outcome]:
    """Runs every mutant of a kernel, under every schedule to its end.

    Args:
        run: runs the module it is given under the schedules it likes, and gives for each of them the result,
            with all findings, and whether what the kernel computed was right. It is called first with the
            unchanged module, which must be right and silent.

    Raises:
        EmulatorError: the unchanged kernel is wrong or has findings.
    """
    for result, right in run(module):
        if result.reports or not right:
            raise EmulatorError(f"run: the unchanged kernel is {'not silent' if result.reports else 'wrong'}")
    name = module.kernel_name(kernel)
    outcomes = []
    for mutant in tqdm(list(mutants(module.module.functions[name])), desc="mutants", disable=not progress):
        changed = LoadedModule(module.text, module.arch)
        changed.module.functions[name] = mutant.function
        outcomes.append(_outcome(mutant, run(changed)))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table: for each kind and action, how many mutants there were and how many of them each catcher
    noticed; a mutant may be noticed by several."""
    columns = (*CATCHERS, "survived")
    lines = [f"{'mutants':<18}{'all':>5}" + "".join(f"{c:>15}" for c in columns)]
    groups = sorted({(o.mutant.kind, o.mutant.place.action) for o in outcomes})
    for kind, action in [*groups, ("all", "")]:
        chosen = [
            o for o in outcomes if kind == "all" or (o.mutant.kind, o.mutant.place.action) == (kind, action)
        ]
        caught = [name for o in chosen for name in o.caught_by or ("survived",)]
        cells = "".join(f"{caught.count(c):>15}" for c in columns)
        lines.append(f"{kind + ' ' + action:<18}{len(chosen):>5}{cells}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- inside


def _outcome(mutant: Mutant, runs: Iterable[tuple[Result, bool]]) -> Outcome:
    findings: dict[str, str] = {}
    results_differ = False
    for result, right in runs:
        for report in result.reports:
            findings.setdefault(report.kind, _in_short(report))
        results_differ = results_differ or (not right and _ended(result.reports))
    return Outcome(mutant, findings, results_differ)


def _in_short(report: Report) -> str:
    """Without the kernel, and folders of the source."""
    location = f"{Path(report.location.file).name}:{report.location.line}, " if report.location else ""
    return f"{location}PTX line {report.line}, {report.site.thread}: {report.message}"


def _ended(reports: Sequence[Report]) -> bool:
    return not any(report.kind == "deadlock" for report in reports)


def _source_text(item: Instruction) -> str:
    if item.location is not None and Path(item.location.file).is_file():
        lines = Path(item.location.file).read_text(encoding="utf-8").splitlines()
        if item.location.line <= len(lines):
            return lines[item.location.line - 1].strip()
    return str(item)


def _is_one_of(item: Instruction, names: tuple[str, ...]) -> bool:
    return any(item.name == name or item.name.startswith((name + ".", name + "::")) for name in names)


def _kind(item: Instruction) -> str | None:
    return next((kind for kind, names in _SYNCHRONISATION.items() if _is_one_of(item, names)), None)


def _changes(
    body: list[Instruction | Label], index: int, item: Instruction
) -> Iterator[tuple[str, list[Instruction | Label]]]:
    """Each action that changes something, with the changed body."""
    yield "drop", _dropped(body, index)
    if _is_one_of(item, _POLLS):
        return  # a polling loop is no single instruction
    action = "earlier" if _is_one_of(item, _MOVES_EARLIER) else "later"
    moved = _moved(body, index, -1 if action == "earlier" else 1)
    if moved is not None:
        yield action, moved


def _dropped(body: list[Instruction | Label], index: int) -> list[Instruction | Label]:
    """Without the instruction; a poll succeeds at once instead."""
    item = body[index]
    assert isinstance(item, Instruction)
    instead: list[Instruction | Label] = []
    if _is_one_of(item, _POLLS):
        operands = (item.operands[0], Immediate(0), Immediate(0))
        instead = [replace(item, opcode="setp", modifiers=("eq", "u32"), operands=operands)]
    return [*body[:index], *instead, *body[index + 1 :]]


def _moved(body: list[Instruction | Label], index: int, step: int) -> list[Instruction | Label] | None:
    """With the instruction past the nearest memory instruction in its basic block; None if there is none."""
    at = index + step
    while 0 <= at < len(body):
        other = body[at]
        if not isinstance(other, Instruction) or other.opcode in ("bra", "brx", "ret", "exit"):
            return None
        if other.opcode in _MEMORY:
            rest = [*body[:index], *body[index + 1 :]]
            return [*rest[:at], body[index], *rest[at:]]
        at += step
    return None
