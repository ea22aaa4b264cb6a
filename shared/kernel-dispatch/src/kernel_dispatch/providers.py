"""Providers of kernels and how they register.

A package registers a `Provider` under the entry-point group of an operation. Reading the entry points imports
the module that holds the Provider and nothing more; kernel code, a kernel language or a toolchain load in
`Provider.load()`, which `resolve` and `candidates` call for providers that support the problem.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol

import torch

from .arch import Arch
from .errors import ArgumentError, ArgumentTypeError, NoKernelError, ProviderError

AUTO = "auto"  # what `backend=` says for any provider
ANY_ARCH = "any"
_BASE_NAME = re.compile(r"cpu|sm_[1-9][0-9]{1,2}")
_KERNEL_METHODS = ("workspace_nbytes", "tactics", "prepare")
_PROBLEM_MEMBERS = ("entry_point_group", "bucketed", "describe")


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

    def workspace_nbytes(self, problem: Any, arch: Arch, tactic: str | None = None) -> int:
        """Bytes of workspace that one launch of a tactic needs; None: of the one that needs the most."""
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

    name: what `backend=` says, and the name of the entry point; not "auto".
    archs: architecture names without suffix ("sm_90", "cpu"), or ("any",).
    supports(problem, arch): None, or the reason to decline.
    load(): the Kernel; called once.
    priority: the highest that supports a problem is chosen; the PyTorch provider has 0.
    needs: GPUs and toolkit in words, for the reason to decline on other architectures; may be empty.

    Raises ArgumentError or ArgumentTypeError naming the field that has another type or value.
    """

    name: str
    archs: tuple[str, ...]
    supports: Callable[[Any, Arch], str | None]
    load: Callable[[], Kernel]
    priority: int
    needs: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentTypeError("name", f"{type(self.name).__name__}, expected a str")
        if self.name in ("", AUTO):
            raise ArgumentError("name", f"{self.name!r}, expected a name of the provider's own")
        _check_archs(self.archs)
        for field in ("supports", "load"):
            value = getattr(self, field)
            if not callable(value):
                raise ArgumentTypeError(field, f"{type(value).__name__}, expected a function")
        if not isinstance(self.needs, str):
            raise ArgumentTypeError("needs", f"{type(self.needs).__name__}, expected a str")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise ArgumentTypeError("priority", f"{type(self.priority).__name__}, expected an int")

    def objection(self, problem: Problem, arch: Arch) -> str | None:
        """Why this provider does not run `problem` on `arch`, or None.

        Raises what `supports` raises, and ProviderError where it returns neither None nor a reason.
        """
        if ANY_ARCH not in self.archs and arch.base not in self.archs:
            needs = f" ({self.needs})" if self.needs else ""
            return f"is for {', '.join(self.archs)}{needs}; this is {arch.name}"
        answer = self.supports(problem, arch)
        if answer is None or (isinstance(answer, str) and answer):
            return answer
        raise ProviderError(f"supports() returned {answer!r}, expected None or the reason to decline")


def _check_archs(archs: object) -> None:
    expected = f'names without suffix such as ("sm_90", "cpu"), or ("{ANY_ARCH}",)'
    if not isinstance(archs, tuple):
        raise ArgumentTypeError("archs", f"{type(archs).__name__}, expected a tuple of {expected}")
    for name in archs:
        if not isinstance(name, str):
            raise ArgumentTypeError("archs", f"{type(name).__name__} in {archs!r}, expected {expected}")
        if _BASE_NAME.fullmatch(name) is None and archs != (ANY_ARCH,):
            raise ArgumentError("archs", f"{name!r} in {archs!r}, expected {expected}")
    if not archs:
        raise ArgumentError("archs", f"(), expected {expected}")


def is_problem(value: object) -> bool:
    """Whether `value` has what a `Problem` has; a class that could make one does not count."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in _PROBLEM_MEMBERS)


def check_problem(value: object) -> None:
    """Raises ArgumentTypeError naming `problem` for what is no `Problem`."""
    if not is_problem(value):
        came = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        expected = f"an object with {', '.join(_PROBLEM_MEMBERS)}"
        raise ArgumentTypeError("problem", f"{came}, expected a problem: {expected}")


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
_load_lock = threading.RLock()  # a load may ask for the kernel of another operation
_kernels: dict[Provider, Kernel] = {}


def providers(group: str) -> tuple[Registered, ...]:
    """Every registration under the entry-point group `group`, broken ones included, highest priority first.

    Entry points are read once per group and process; `reload_providers()` forgets them.
    """
    discovered = _discovered.get(group)
    if discovered is None:
        discovered = _discover(group)  # outside the lock: what it imports may ask for providers
    with _lock:
        entries = _discovered.setdefault(group, discovered) + _added.get(group, ())
    return tuple(sorted(entries, key=_rank))


def check_backend(backend: str) -> None:
    """Raises ArgumentTypeError unless `backend` is a str; `resolve` says whether it runs a problem."""
    if not isinstance(backend, str):
        raise ArgumentTypeError("backend", f"{backend!r}, expected the name of a provider or {AUTO!r}")


def check_registered(group: str, backend: str) -> None:
    """Raises NoKernelError unless `backend` is "auto" or names a provider of the group.

    For calls that pose no problem, which `resolve` would take: those without requests.
    """
    if backend != AUTO and all(entry.name != backend for entry in providers(group)):
        raise NoKernelError(f"backend={backend!r}: {unknown_in(group)}")


def unknown_in(group: str) -> str:
    """Why a name that no provider of the group has cannot be chosen."""
    return f"no provider of that name in {group}"


def reload_providers() -> None:
    """Forgets what was discovered and loaded, and every plan; the next call reads the entry points again."""
    with _lock:
        _discovered.clear()
    with _load_lock:
        _kernels.clear()
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


def load_kernel(provider: Provider) -> Kernel:
    """The provider's kernel; `provider.load()` runs once per process, or once more after it raised.

    Raises ProviderError where it returns something that lacks a method of `Kernel`.
    """
    with _load_lock:
        if provider not in _kernels:
            kernel = provider.load()
            missing = [name for name in _KERNEL_METHODS if not callable(getattr(kernel, name, None))]
            if missing:
                came = f"{type(kernel).__name__} without {', '.join(missing)}"
                raise ProviderError(f"load() returned {came}, expected a Kernel")
            _kernels[provider] = kernel
        return _kernels[provider]


def working_providers(group: str) -> dict[str, Provider]:
    """The providers of `group` by name, highest priority first, without the broken ones."""
    return {entry.name: entry.provider for entry in providers(group) if entry.provider is not None}


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
