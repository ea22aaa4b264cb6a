"""How a provider is chosen for a problem, and why: `resolve` acts on the decision, `explain` shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ._callers import warn_caller
from .arch import Arch, as_arch
from .errors import ArgumentError, NoKernelError, ProviderError
from .providers import (
    AUTO,
    Kernel,
    Problem,
    Provider,
    Registered,
    check_problem,
    load_kernel,
    providers,
    unknown_in,
    working_providers,
)
from .tuning import tuned_choice

_TABLE_COLUMNS = 110  # width of a printed explanation
_MIN_REASON_COLUMNS = 40


@dataclass(frozen=True)
class Selection:
    """The outcome of `resolve`: a provider, its loaded kernel, one of its tactics, and why."""

    provider: Provider
    kernel: Kernel
    tactic: str
    reason: str


@dataclass(frozen=True)
class ExplanationRow:
    """One provider in an `Explanation`; status is "chosen", "supported", "declined" or "broken".

    failure: what `Provider.supports` raised, where that is what broke it.
    """

    name: str
    distribution: str
    version: str
    priority: int | None
    status: str
    reason: str
    failure: Exception | None = None


@dataclass(frozen=True)
class Explanation:
    """Which provider a problem gets on an architecture, why, and why not the others. `str()` is a table."""

    group: str
    problem: str
    arch: Arch
    chosen: str | None
    reason: str
    rows: tuple[ExplanationRow, ...]

    def __str__(self) -> str:
        head = (
            f"{self.group} on {self.arch}",
            f"  problem  {self.problem}",
            f"  chosen   {self.chosen or 'none'}: {self.reason}",
            "",
        )
        table = [("provider", "status", "priority", "package", "reason")]
        for row in self.rows:
            priority = "-" if row.priority is None else str(row.priority)
            package = f"{row.distribution} {row.version}".rstrip()
            table.append((row.name, row.status, priority, package, " ".join(row.reason.split())))
        widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[:-1]]
        indent = sum(widths) + 2 * len(widths) + 2
        lines: list[str] = []
        for *cells, reason in table:
            prefix = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
            wrapped = textwrap.wrap(reason, max(_TABLE_COLUMNS - indent, _MIN_REASON_COLUMNS)) or [""]
            lines += [prefix + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
        return "\n".join((*head, *lines))


def explain(
    problem: Problem, arch: Arch | str | torch.device | None = None, backend: str = "auto"
) -> Explanation:
    """What `resolve` would choose and why, and why not the others. Loads no kernel.

    Raises ArgumentTypeError naming `problem` or `arch` where it is of another type.
    """
    check_problem(problem)
    arch = as_arch(arch)
    return _explain(problem, arch, backend, tuned_choice(problem, arch))


def resolve(
    problem: Problem,
    arch: Arch | str | torch.device | None = None,
    backend: str = "auto",
    tactic: str | None = None,
) -> Selection:
    """Chooses and loads the kernel for `problem` on `arch` (None: the current GPU, or else the CPU).

    backend "auto" takes the tuned choice for the problem's bucket, else the provider of the highest priority
    that supports the problem; a name takes that provider or none. `tactic` names one of that provider's for
    the problem; None takes the tuned or else the provider's first. Raises NoKernelError with every provider's
    reason where that leaves none, where `supports` raises, and where the chosen provider does not load;
    ArgumentTypeError naming `problem` or `arch` where it is of another type; ArgumentError naming `tactic`
    where the provider has no such one.
    """
    check_problem(problem)
    arch = as_arch(arch)
    tuned = tuned_choice(problem, arch)
    explanation = _explain(problem, arch, backend, tuned)
    for row in explanation.rows:
        if row.failure is not None and backend in (AUTO, row.name):
            raise NoKernelError(f"provider {row.name!r} failed in supports()\n{explanation}") from row.failure
    if explanation.chosen is None:
        raise NoKernelError(f"{explanation.reason}\n{explanation}")
    provider = working_providers(problem.entry_point_group)[explanation.chosen]
    kernel, tactics = _load(provider, problem, arch)
    if tactic is not None:
        if tactic not in tactics:
            offered = f"expected one of {', '.join(tactics)}, which provider {provider.name!r} has here"
            raise ArgumentError("tactic", f"{tactic!r}, {offered}")
        return Selection(provider, kernel, tactic, f"{explanation.reason}; tactic named")
    if tuned is None or tuned[0] != provider.name:
        return Selection(provider, kernel, tactics[0], explanation.reason)
    if tuned[1] not in tactics:
        reason = f"{explanation.reason}; tactic {tuned[1]!r}, fastest when tuned, is not offered any more"
        return Selection(provider, kernel, tactics[0], reason)
    return Selection(provider, kernel, tuned[1], explanation.reason)


def candidates(problem: Problem, arch: Arch | str | torch.device | None = None) -> tuple[Selection, ...]:
    """Every (provider, tactic) that supports `problem`, loaded, highest priority first.

    A provider that does not load is left out with a RuntimeWarning, and the others remain. Raises
    NoKernelError where `supports` raises, ArgumentTypeError naming `problem` or `arch` of another type.
    """
    check_problem(problem)
    arch = as_arch(arch)
    selections: list[Selection] = []
    for entry in providers(problem.entry_point_group):
        row = _judge(entry, problem, arch)
        if row.failure is not None:
            raise NoKernelError(f"provider {row.name!r}: {row.reason}") from row.failure
        if entry.provider is None or row.status != "supported":
            continue
        try:
            kernel, tactics = _load(entry.provider, problem, arch)
        except NoKernelError as error:
            warn_caller(f"left out of the candidates: {error}", problem)
            continue
        selections += [Selection(entry.provider, kernel, tactic, "candidate") for tactic in tactics]
    return tuple(selections)


def _explain(problem: Problem, arch: Arch, backend: str, tuned: tuple[str, str] | None) -> Explanation:
    group = problem.entry_point_group
    rows = [_judge(entry, problem, arch) for entry in providers(group)]
    able = [row.name for row in rows if row.status == "supported"]
    chosen, reason = _choose(group, backend, able, rows, tuned)
    if chosen is not None:
        rows = [_beside(row, chosen, reason) for row in rows]
    return Explanation(group, problem.describe(), arch, chosen, reason, tuple(rows))


def _beside(row: ExplanationRow, chosen: str, reason: str) -> ExplanationRow:
    """A row where a provider was chosen, this one or another."""
    if row.status != "supported":
        return row
    if row.name == chosen:
        return replace(row, status="chosen", reason=reason)
    return replace(row, reason=f"{row.reason} as well")


def _choose(
    group: str, backend: str, able: list[str], rows: list[ExplanationRow], tuned: tuple[str, str] | None
) -> tuple[str | None, str]:
    """(name or None, reason); `able` are the supporting providers, highest priority first."""
    if backend in able:
        return backend, f"asked for by backend={backend!r}"
    if backend != AUTO:
        against = [row.reason for row in rows if row.name == backend]
        return None, f"backend={backend!r}: {'; '.join(against) or unknown_in(group)}"
    if not able:
        return None, f"none of {len(rows)} providers in {group} can run this problem"
    if tuned is not None and tuned[0] in able:
        return tuned[0], f"fastest when tuned, with tactic {tuned[1]!r}"
    reason = "the only one that supports it" if len(able) == 1 else f"highest priority of {len(able)} able"
    return able[0], reason


def _judge(entry: Registered, problem: Problem, arch: Arch) -> ExplanationRow:
    provider = entry.provider
    priority = None if provider is None else provider.priority
    status, reason, failure = "supported", "supports it", None
    if provider is None:
        status, reason = "broken", entry.error or "no provider"
    else:
        try:
            objection = provider.objection(problem, arch)
        except Exception as error:  # shown as broken here; `resolve` raises it
            status, failure = "broken", error
            returned = isinstance(error, ProviderError)
            reason = str(error) if returned else f"supports() raised {type(error).__name__}: {error}"
        else:
            if objection is not None:
                status, reason = "declined", objection
    return ExplanationRow(entry.name, entry.distribution, entry.version, priority, status, reason, failure)


def _load(provider: Provider, problem: Problem, arch: Arch) -> tuple[Kernel, Sequence[str]]:
    """The kernel and its tactics for `problem`. Raises NoKernelError, with the cause, on failure."""
    try:
        kernel = load_kernel(provider)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise NoKernelError(f"provider {provider.name!r} failed to load: {why}") from error
    tactics = kernel.tactics(problem, arch)
    if not tactics:
        raise NoKernelError(f"provider {provider.name!r} has no tactic for {problem.describe()}")
    return kernel, tactics
