"""Providers of kernels: how they register, how one is chosen for a problem, and why.

A package registers a `Provider` under the entry-point group of an operation. Reading the entry points imports
the module that holds the Provider and nothing more; kernel code, a kernel language or a toolchain load in
`Provider.load()`, which `resolve` and `candidates` call, only for a provider that supports the problem.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol

import torch

from .arch import Arch, as_arch
from .errors import ArgumentError, ArgumentTypeError, NoKernelError

ANY_ARCH = "any"
_TABLE_COLUMNS = 110  # width of a printed explanation
_MIN_REASON_COLUMNS = 40


class Problem(Protocol):
    """What an operation is asked to do: a hashable frozen dataclass of shapes, dtypes and flags."""

    entry_point_group: ClassVar[str]

    def bucketed(self) -> Problem:
        """The same problem, its batch rounded down to a power of two, at most 2048: the unit of tuning."""
        ...

    def describe(self) -> str:
        """One line for people: "B3 q2 H128 bf16 page 64"."""
        ...


class Kernel(Protocol):
    """What `Provider.load()` returns. `problem` is the operation's own problem type."""

    def workspace_nbytes(self, problem: Any, arch: Arch) -> int:
        """Bytes of workspace that one launch needs."""
        ...

    def tactics(self, problem: Any, arch: Arch) -> Sequence[str]:
        """The ways to run the problem, at least one, the heuristic's choice first."""
        ...

    def prepare(self, problem: Any, arch: Arch, device: torch.device, tactic: str) -> Callable[..., None]:
        """Compiles or loads, and returns a launcher that does nothing but launch."""
        ...


@dataclass(frozen=True)
class Provider:
    """A set of kernels for one operation.

    name: what `backend=` says, and the name of the entry point.
    archs: architecture names without suffix ("sm_90", "cpu"), or ("any",).
    supports(problem, arch): None, or the reason to decline.
    load(): the Kernel; called once.
    priority: the highest that supports a problem is chosen; the PyTorch provider has 0.
    """

    name: str
    archs: tuple[str, ...]
    supports: Callable[[Any, Arch], str | None]
    load: Callable[[], Kernel]
    priority: int


@dataclass(frozen=True)
class Registered:
    """One registration: a provider, or the error ("ImportError: ...") that kept it from being one."""

    name: str
    distribution: str
    version: str
    provider: Provider | None
    error: str | None


_lock = threading.Lock()
_discovered: dict[str, tuple[Registered, ...]] = {}
_added: dict[str, tuple[Registered, ...]] = {}


def providers(group: str) -> tuple[Registered, ...]:
    """Every registration under the entry-point group `group`, broken ones included, highest priority first.

    Entry points are read once per group and process; `reload_providers()` forgets them.
    """
    if group not in _discovered:
        discovered = _discover(group)  # outside the lock: what it imports may ask for providers
        with _lock:
            _discovered.setdefault(group, discovered)
    with _lock:
        entries = _discovered.get(group, ()) + _added.get(group, ())
    return tuple(sorted(entries, key=_rank))


def reload_providers() -> None:
    """Forgets what was discovered and loaded, and every plan; the next call reads the entry points again."""
    with _lock:
        _discovered.clear()
    load_kernel.cache_clear()
    _drop_plans()


@contextmanager
def registered(group: str, provider: Provider) -> Iterator[Provider]:
    """Adds `provider` to `group` inside the block, for a test or for an application's own kernel.

    Process-wide, not per thread. Raises ArgumentError naming `provider` if its name is taken.
    """
    if not isinstance(provider, Provider):
        raise ArgumentTypeError("provider", f"{type(provider).__name__}, expected a Provider")
    taken = {entry.name: entry for entry in providers(group)}
    if provider.name in taken:
        source = taken[provider.name].distribution
        raise ArgumentError("provider", f"name {provider.name!r} is taken in {group} by {source}")
    entry = Registered(provider.name, "registered()", "", provider, None)
    with _lock:
        _added[group] = (*_added.get(group, ()), entry)
    _drop_plans()
    try:
        yield provider
    finally:
        with _lock:
            _added[group] = tuple(other for other in _added[group] if other is not entry)
        _drop_plans()


@cache
def load_kernel(provider: Provider) -> Kernel:
    """The provider's kernel; `provider.load()` runs once per process, or once more after it raised."""
    return provider.load()


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
    """What `resolve` would choose and why, and why not the others. Loads no kernel."""
    arch = as_arch(arch)
    return _explain(problem, arch, backend, _tuned_choice(problem, arch))


def resolve(
    problem: Problem, arch: Arch | str | torch.device | None = None, backend: str = "auto"
) -> Selection:
    """Chooses and loads the kernel for `problem` on `arch` (None: the current GPU, or else the CPU).

    backend "auto" takes the tuned choice for the problem's bucket, else the provider of the highest priority
    that supports the problem; a name takes that provider or none. Raises NoKernelError with every provider's
    reason where that leaves none, where `supports` raises, and where the chosen provider does not load.
    """
    arch = as_arch(arch)
    tuned = _tuned_choice(problem, arch)
    explanation = _explain(problem, arch, backend, tuned)
    for row in explanation.rows:
        if row.failure is not None and backend in ("auto", row.name):
            raise NoKernelError(f"provider {row.name!r} failed in supports()\n{explanation}") from row.failure
    if explanation.chosen is None:
        raise NoKernelError(f"{explanation.reason}\n{explanation}")
    provider = _working(problem.entry_point_group)[explanation.chosen]
    kernel, tactics = _load(provider, problem, arch)
    is_tuned = tuned is not None and tuned[0] == provider.name and tuned[1] in tactics
    return Selection(provider, kernel, tuned[1] if tuned and is_tuned else tactics[0], explanation.reason)


def candidates(problem: Problem, arch: Arch | str | torch.device | None = None) -> tuple[Selection, ...]:
    """Every (provider, tactic) that supports `problem`, loaded, highest priority first."""
    arch = as_arch(arch)
    selections: list[Selection] = []
    for provider in _working(problem.entry_point_group).values():
        if _objection(provider, problem, arch) is None:
            kernel, tactics = _load(provider, problem, arch)
            selections += [Selection(provider, kernel, tactic, "candidate") for tactic in tactics]
    return tuple(selections)


def _explain(problem: Problem, arch: Arch, backend: str, tuned: tuple[str, str] | None) -> Explanation:
    group = problem.entry_point_group
    rows = [_judge(entry, problem, arch) for entry in providers(group)]
    able = [row.name for row in rows if row.status == "supported"]
    chosen, reason = _choose(group, backend, able, rows, tuned)
    rows = [replace(row, status="chosen", reason=reason) if row.name == chosen else row for row in rows]
    return Explanation(group, problem.describe(), arch, chosen, reason, tuple(rows))


def _choose(
    group: str, backend: str, able: list[str], rows: list[ExplanationRow], tuned: tuple[str, str] | None
) -> tuple[str | None, str]:
    """(name or None, reason); `able` are the supporting providers, highest priority first."""
    if backend in able:
        return backend, f"asked for by backend={backend!r}"
    if backend != "auto":
        against = [row.reason for row in rows if row.name == backend]
        return None, f"backend={backend!r}: {'; '.join(against) or f'no provider of that name in {group}'}"
    if not able:
        return None, f"none of {len(rows)} providers in {group} can run this problem"
    if tuned is not None and tuned[0] in able:
        return tuned[0], f"fastest when tuned, with tactic {tuned[1]!r}"
    reason = "the only one that supports it" if len(able) == 1 else f"highest priority of {len(able)} able"
    return able[0], reason


def _judge(entry: Registered, problem: Problem, arch: Arch) -> ExplanationRow:
    provider = entry.provider
    priority = None if provider is None else provider.priority
    status, reason, failure = "supported", "supports it as well", None
    if provider is None:
        status, reason = "broken", entry.error or "no provider"
    else:
        try:
            objection = _objection(provider, problem, arch)
        except Exception as error:  # shown as broken here; `resolve` raises it
            status, reason, failure = "broken", f"supports() raised {type(error).__name__}: {error}", error
        else:
            if objection is not None:
                status, reason = "declined", objection
    return ExplanationRow(entry.name, entry.distribution, entry.version, priority, status, reason, failure)


def _objection(provider: Provider, problem: Problem, arch: Arch) -> str | None:
    """Why `provider` does not run `problem` on `arch`, or None."""
    if ANY_ARCH not in provider.archs and arch.base not in provider.archs:
        return f"is for {', '.join(provider.archs)}; this is {arch.name}"
    return provider.supports(problem, arch)


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


def _working(group: str) -> dict[str, Provider]:
    """Providers of `group` by name, highest priority first, without the broken ones."""
    return {entry.name: entry.provider for entry in providers(group) if entry.provider is not None}


def _tuned_choice(problem: Problem, arch: Arch) -> tuple[str, str] | None:
    """The tuner's (provider, tactic) for the bucket of `problem`, if it holds one."""
    from .tuning import tuned_choice  # at call time: the tuner reads this module

    return tuned_choice(problem, arch)


def _discover(group: str) -> tuple[Registered, ...]:
    entries: list[Registered] = []
    owners: dict[str, str] = {}  # name -> the distribution that has it
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        entry = _register(point)
        owner = owners.setdefault(entry.name, entry.distribution)
        if owner != entry.distribution:
            entry = _broken(entry, f"the name {entry.name!r} is taken by {owner}")
        entries.append(entry)
    return tuple(entries)


def _register(point: EntryPoint) -> Registered:
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
    entry = Registered(point.name, distribution, version, None, None)
    try:
        provider = point.load()
    except Exception as error:  # listed, whatever it is, and the others go on
        return _broken(entry, f"{type(error).__name__}: {error}")
    if not isinstance(provider, Provider):
        return _broken(entry, f"{point.value} is a {type(provider).__name__}, expected a Provider")
    if provider.name != point.name:
        return _broken(entry, f"{point.value} calls itself {provider.name!r}, expected {point.name!r}")
    return Registered(point.name, distribution, version, provider, None)


def _broken(entry: Registered, error: str) -> Registered:
    return Registered(entry.name, entry.distribution, entry.version, None, error)


def _rank(entry: Registered) -> tuple[bool, int, str]:
    """Sort key: working before broken, then by falling priority, then by name."""
    if entry.provider is None:
        return (True, 0, entry.name)
    return (False, -entry.provider.priority, entry.name)


def _drop_plans() -> None:
    from .plan_cache import clear_plans  # at call time: plan_cache reads the tuner

    clear_plans()
