"""The tuned choices in effect in the process: `resolve` asks for them, `autotune` and `load_tuning` add them.

A choice holds for one bucket in one environment. Its key is the digest of

    the operation's entry-point group
    the arch's name and SM count
    the versions of the distributions whose providers support the problem
    the versions of torch and of the CUDA driver
    the problem rounded to its bucket

After an upgrade of any of them the old choices stop matching; the heuristic or the next tuning takes over.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from .arch import Arch
from .canonical import canonical, digest, dump
from .errors import ArgumentError
from .providers import Problem, providers
from .tuning_store import Choice, TuningStore, check_file

MAX_BATCH_BUCKET = 2048

_lock = threading.Lock()
_choices: dict[str, Choice] = {}
_generation = 0


def bucket_batch(batch: int) -> int:
    """`batch` rounded down to a power of two, at most 2048; 0 stays 0. For `Problem.bucketed()`.

    Raises ArgumentError naming `batch` for a negative number.
    """
    if batch < 0:
        raise ArgumentError("batch", f"{batch}, expected at least 0")
    return min(MAX_BATCH_BUCKET, 1 << (batch.bit_length() - 1)) if batch else 0


def tuned_choice(problem: Problem, arch: Arch) -> tuple[str, str] | None:
    """The (provider, tactic) in effect for the problem's bucket in this environment, or None."""
    choice = lookup(bucket_key(problem, arch)) if _choices else None
    return None if choice is None else (choice.provider, choice.tactic)


def generation() -> int:
    """A number that grows whenever a plan made earlier may be out of date.

    That is when the choices in effect change, and on entry to `autotune`, whose block must see every call.
    """
    return _generation


def load_tuning(path: str | Path) -> int:
    """Puts the choices of a tuning file into effect, over those already in effect; how many hold in total.

    For serving: nothing is profiled and a good file is only read. Choices of other environments load too, and
    never match. A corrupt or foreign file gives a RuntimeWarning; no file, FileNotFoundError; what is no path
    or is a directory, ArgumentTypeError or ArgumentError naming `path`.
    """
    check_file("path", path)
    store = TuningStore(path)
    if not store.path.exists():
        raise FileNotFoundError(f"tuning file {store.path} does not exist")
    return put_in_effect(store.read())


def clear_tuning() -> None:
    """Forgets every choice in effect, so that the heuristic decides again; files are not touched."""
    global _generation
    with _lock:
        if _choices:
            _choices.clear()
            _generation += 1


def put_in_effect(choices: Mapping[str, Choice]) -> int:
    """Adds `choices` by key digest, replacing those of the same key; how many are now in effect."""
    global _generation
    with _lock:
        if any(_choices.get(name) != choice for name, choice in choices.items()):
            _choices.update(choices)
            _generation += 1
        return len(_choices)


def invalidate_plans() -> None:
    """Advances `generation()` without a change of choices."""
    global _generation
    with _lock:
        _generation += 1


def lookup(key: Mapping[str, object]) -> Choice | None:
    """The choice in effect under a key from `bucket_key`, or None."""
    return _choices.get(key_digest(key))


def key_digest(key: Mapping[str, object]) -> str:
    """The name of a key's entry in a tuning file."""
    return digest(dump(key))


def bucket_key(problem: Problem, arch: Arch) -> dict[str, object]:
    """What a choice for `problem` on `arch` depends on, as plain JSON values; see the module's docstring.

    Raises TypeError or ValueError, naming the field, for a problem that has no canonical form.
    """
    bucket = problem.bucketed()
    return {
        "operation": problem.entry_point_group,
        "arch": {"name": arch.name, "sm_count": arch.sm_count},
        "distributions": _distribution_versions(bucket, arch),
        "torch": str(torch.__version__),  # it is a subclass of str
        "cuda_driver": cuda_driver_version() if arch.is_gpu else None,
        "problem": canonical(bucket, "problem"),
    }


def _distribution_versions(bucket: Problem, arch: Arch) -> dict[str, str]:
    """Version by name of each distribution that has a provider for the bucket."""
    versions: dict[str, str] = {}
    for entry in providers(bucket.entry_point_group):
        if entry.provider is None:
            continue
        try:
            objection = entry.provider.objection(bucket, arch)
        except Exception as error:  # no candidate; `resolve` raises it and `explain` shows it
            objection = str(error)
        if objection is None:
            versions[entry.distribution] = entry.version
    return versions


@cache
def cuda_driver_version() -> int | None:
    """The driver's CUDA version, 1000 * major + 10 * minor, from cuDriverGetVersion; None without a driver.

    Needs no CUDA context and no device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    status = driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value if status == 0 else None
