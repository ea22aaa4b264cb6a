"""Drops or moves one wait, fence or barrier at a time, and says what noticed.

A kernel is only as well checked as its mutants are caught. A mutant that nothing catches is either redundant
synchronisation or a gap of the checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from ptx_emulator.errors import EmulatorError
from ptx_emulator.machine import LoadedModule, Result
from ptx_emulator.ptx.module import Function, Immediate, Instruction, Label

RACES = ("race", "proxy-race", "tcgen05-order", "grid-dependency", "uninitialised")
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
class Mutant:
    """One change of a kernel: `action` is `drop`, `later` or `earlier`; `kind` wait, fence or barrier."""

    line: int
    instruction: str
    kind: str
    action: str
    function: Function

    def __str__(self) -> str:
        return f"{self.action} {self.instruction} (PTX line {self.line})"


@dataclass(frozen=True)
class Outcome:
    """What noticed a mutant: `race`, `deadlock`, `check` (other findings), `result`, or nothing (`survived`).

    The finding counts before the result: `detail` is its first line.
    """

    mutant: Mutant
    caught_by: str
    results_differ: bool
    detail: str = ""


def mutants(function: Function) -> Iterator[Mutant]:
    """Every wait, fence and barrier of a kernel, dropped; and moved behind or before the nearest memory
    instruction of its basic block, where there is one."""
    for index, item in enumerate(function.body):
        if not isinstance(item, Instruction):
            continue
        kind = _kind(item)
        if kind is None:
            continue
        yield _mutant(function, item, kind, "drop", _dropped(function.body, index))
        if _is_one_of(item, _POLLS):
            continue  # a polling loop is no single instruction
        action = "earlier" if _is_one_of(item, _MOVES_EARLIER) else "later"
        moved = _moved(function.body, index, -1 if action == "earlier" else 1)
        if moved is not None:
            yield _mutant(function, item, kind, action, moved)


def survey(
    module: LoadedModule,
    kernel: str | None,
    run: Callable[[LoadedModule], tuple[Result, bool]],
    *,
    progress: bool = True,
) -> list[Outcome]:
    """Runs every mutant of a kernel.

    Args:
        run: runs the module it is given, under the schedules it likes, and returns all findings and whether
            the results were right. It is called first with the unchanged module, which must be right and
            silent.

    Raises:
        EmulatorError: the unchanged kernel is wrong or has findings.
    """
    result, right = run(module)
    if result.reports or not right:
        raise EmulatorError("run: the unchanged kernel is " + ("not silent" if result.reports else "wrong"))
    name = module.kernel_name(kernel)
    outcomes = []
    everything = list(mutants(module.module.functions[name]))
    for mutant in tqdm(everything, desc="mutants", disable=not progress):
        changed = LoadedModule(module.text, module.arch)
        changed.module.functions[name] = mutant.function
        result, right = run(changed)
        outcomes.append(_classify(mutant, result, right))
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """A table: for each kind and action, how many mutants there were and what caught them."""
    columns = ("race", "deadlock", "check", "result", "survived")
    lines = [f"{'mutants':<18}{'all':>5}" + "".join(f"{c:>10}" for c in columns)]
    groups = sorted({(o.mutant.kind, o.mutant.action) for o in outcomes})
    for kind, action in [*groups, ("all", "")]:
        chosen = [o for o in outcomes if kind == "all" or (o.mutant.kind, o.mutant.action) == (kind, action)]
        caught = Counter(o.caught_by for o in chosen)
        lines.append(
            f"{kind + ' ' + action:<18}{len(chosen):>5}" + "".join(f"{caught[c]:>10}" for c in columns)
        )
    return "\n".join(lines)


def _classify(mutant: Mutant, result: Result, right: bool) -> Outcome:
    kinds = [report.kind for report in result.reports]
    detail = str(result.reports[0]).splitlines()[0] if result.reports else ""
    if any(kind in RACES for kind in kinds):
        caught_by = "race"
    elif "deadlock" in kinds:
        caught_by = "deadlock"
    elif kinds:
        caught_by = "check"
    else:
        caught_by = "survived" if right else "result"
    return Outcome(mutant, caught_by, not right, detail)


def _is_one_of(item: Instruction, names: tuple[str, ...]) -> bool:
    return any(item.name == name or item.name.startswith((name + ".", name + "::")) for name in names)


def _kind(item: Instruction) -> str | None:
    return next((kind for kind, names in _SYNCHRONISATION.items() if _is_one_of(item, names)), None)


def _mutant(
    function: Function, item: Instruction, kind: str, action: str, body: list[Instruction | Label]
) -> Mutant:
    return Mutant(item.line, item.name, kind, action, replace(function, body=body))


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
