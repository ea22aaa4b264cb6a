"""Preparing declared problems ahead of time: their kernels compile or load before the first request comes.

A declaration is a Python object or a JSON file:

    [{"problem": "mla_core:DecodeProblem", "arguments": {"batch": 8, "q_dtype": "torch.bfloat16"}}]

`problem` names the class as module:attribute and `arguments` its constructor's keywords; a string
"torch.<dtype>" is the dtype.
"""

from __future__ import annotations

import importlib
import json
import operator
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from .arch import Arch, as_arch
from .compile_cache import record_lookups
from .errors import ArgumentError, ArgumentTypeError
from .providers import Problem, is_problem
from .resolution import resolve

ALL_TACTICS = "all"
_GROUP = "entry_point_group"  # the attribute that a class of problems has


@dataclass(frozen=True)
class WarmupRow:
    """One prepared tactic of a problem.

    provider, tactic: "-" where none was chosen; a tactic that was asked for is named in any case.
    seconds: wall time of choosing and preparing.
    status: "built" if something was compiled, "cached" if everything compiled was found on disk, "ready" if
        nothing was looked up there (loaded before, or not a compiled kernel), "failed" if `error` says why.
    """

    problem: str
    provider: str
    tactic: str
    seconds: float
    status: str
    error: str | None = None


@dataclass(frozen=True)
class WarmupReport:
    """What `warmup` did for each problem, in order. `str()` is a table."""

    arch: Arch
    rows: tuple[WarmupRow, ...]

    @property
    def failures(self) -> tuple[WarmupRow, ...]:
        return tuple(row for row in self.rows if row.status == "failed")

    def __str__(self) -> str:
        table = [("problem", "provider", "tactic", "seconds", "status")]
        table += [(r.problem, r.provider, r.tactic, f"{r.seconds:.3f}", r.status) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"warm-up for {self.arch}"]
        for cells in table:
            lines.append("  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip())
        lines += [f"  {row.problem}: {row.error}" for row in self.failures]
        return "\n".join(lines)


class WarmupError(RuntimeError):
    """Some problems could not be prepared; the others were.

    `report` has a row for each problem; the message is its table.
    """

    def __init__(self, report: WarmupReport) -> None:
        super().__init__(report)
        self.report = report


def warmup(
    problems: Iterable[Problem],
    arch: Arch | str | torch.device | None = None,
    backend: str = "auto",
    progress: bool = True,
    tactic: str | None = None,
) -> WarmupReport:
    """Resolves and prepares each problem on `arch` (None: the current GPU, or else the CPU).

    Kernels are prepared for the current device of the arch's kind. For another arch than that of the machine
    the provider must be able to compile without loading. progress: a bar on stderr. tactic: the name of one,
    as `resolve` takes it, "all" for every one that the chosen provider has for a problem, a row each, or None
    for the tuned or else the preferred one.

    Raises WarmupError, after all problems have been tried, if any failed; ArgumentTypeError naming
    `problems`, before anything is prepared, where there is something else among them.
    """
    arch = as_arch(arch)
    if not isinstance(problems, Iterable):
        raise ArgumentTypeError("problems", f"{type(problems).__name__}, expected several problems")
    problems = list(problems)
    for i, problem in enumerate(problems):
        if not is_problem(problem):
            raise ArgumentTypeError("problems", f"item {i}: {type(problem).__name__}, expected a problem")
    rows = [
        _prepare(problem, arch, backend, name)
        for problem in tqdm(problems, "warm-up", unit="problem", file=sys.stderr, disable=not progress)
        for name in (_every_tactic(problem, arch, backend) if tactic == ALL_TACTICS else [tactic])
    ]
    report = WarmupReport(arch, tuple(rows))
    if report.failures:
        raise WarmupError(report)
    return report


def _every_tactic(problem: Problem, arch: Arch, backend: str) -> Sequence[str | None]:
    """Those of the provider that is chosen; None, which fails in the same way, where there is none."""
    try:
        return resolve(problem, arch, backend).kernel.tactics(problem, arch)
    except Exception:  # preparing says why
        return [None]


def _prepare(problem: Problem, arch: Arch, backend: str, named: str | None) -> WarmupRow:
    device = torch.device("cuda" if arch.is_gpu else "cpu")
    provider, tactic = "-", named or "-"
    error: str | None = None
    start = time.perf_counter()
    with record_lookups() as lookups:
        try:
            selection = resolve(problem, arch, backend, named)
            provider, tactic = selection.provider.name, selection.tactic
            selection.kernel.prepare(problem, arch, device, tactic)
        except Exception as failure:  # a row of the report, which `warmup` raises when the others are done
            error = f"{type(failure).__name__}: {failure}"
    if error is not None:
        status = "failed"
    elif any(lookup.built for lookup in lookups):
        status = "built"
    else:
        status = "cached" if lookups else "ready"
    return WarmupRow(problem.describe(), provider, tactic, time.perf_counter() - start, status, error)


def load_problems(target: str) -> list[Problem]:
    """The problems that `target` declares.

    target: a path that ends in .json, or module:attribute naming a problem or several.
    Raises ArgumentError naming `target` for what cannot be found, read or understood.
    """
    found = _from_json(Path(target)) if target.endswith(".json") else _import(target)
    problems = [found] if is_problem(found) else found
    if not isinstance(problems, Iterable):
        raise ArgumentError("target", f"{target} is a {type(found).__name__}, expected a problem or several")
    problems = list(problems)
    if not problems:
        raise ArgumentError("target", f"{target} holds no problems, expected at least one")
    for i, problem in enumerate(problems):
        if not is_problem(problem):
            raise ArgumentError(
                "target", f"item {i} of {target} is a {type(problem).__name__}, expected a problem"
            )
    return cast(list[Problem], problems)


def _import(target: str) -> Any:
    module, separator, attribute = target.partition(":")
    if not (module and separator and attribute) or module.startswith("."):
        raise ArgumentError("target", f"{target!r}, expected module:attribute or a path that ends in .json")
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ArgumentError("target", f"{target!r} cannot be imported: {error}") from error


def _from_json(path: Path) -> list[Any]:
    try:
        declared = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError("target", f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(declared, list):
        raise ArgumentError(
            "target", f"{path} holds a {type(declared).__name__}, expected a list of problems"
        )
    return [_declared(item, f"item {i} of {path}") for i, item in enumerate(declared)]


def _declared(item: Any, where: str) -> Any:
    if not isinstance(item, dict) or set(item) != {"problem", "arguments"}:
        raise ArgumentError("target", f'{where} is {item!r}, expected {{"problem": ..., "arguments": ...}}')
    name, given = item["problem"], item["arguments"]
    if not isinstance(name, str):
        raise ArgumentError("target", f"{where}: problem is {name!r}, expected a string module:Class")
    if not isinstance(given, dict):
        raise ArgumentError("target", f"{where}: arguments is {given!r}, expected an object of keywords")
    problem_class = _import(name)
    # A file is data: it may name a class of problems, but not a function to call.
    if not (isinstance(problem_class, type) and isinstance(getattr(problem_class, _GROUP, None), str)):
        raise ArgumentError("target", f"{where}: {name!r} is no class of problems (with {_GROUP})")
    arguments = {keyword: _argument(value, where) for keyword, value in given.items()}
    try:
        return problem_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ArgumentError("target", f"{where}: {error}") from error


def _argument(value: Any, where: str) -> Any:
    if not isinstance(value, str) or not value.startswith("torch."):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError("target", f"{where}: {value!r} is no dtype")
    return dtype
