"""The command line `python -m ptx_emulator run|check|trace|ops`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptx_emulator.build import compiler_version
from ptx_emulator.command_line_arguments import parse_argument
from ptx_emulator.errors import EmulatorError
from ptx_emulator.host.cuda_source import compile_cuda
from ptx_emulator.host.exploring import explore
from ptx_emulator.host.job import Job
from ptx_emulator.host.launching import Launch
from ptx_emulator.machine import Result
from ptx_emulator.options import SCHEDULES, Options
from ptx_emulator.reports import reports_json, reports_text
from ptx_emulator.support import opcode_table, unsupported
from ptx_emulator.timeline import write_timeline

SUBJECT = """what to run: FILE.ptx or FILE.cu, with the options below; or FILE.py:FUNCTION, a function
without arguments that returns a ptx_emulator.Launch, Launches, or emulate(...).call(...)"""
ARGUMENT = """an argument of the kernel, once for each parameter in order: a number (7, 2.5), or an array
TYPE:SHAPE=FILL, such as f32:128x64=randn, i32:16=arange, u8:1024=zeros, f32:64=nan, f32:10=FILE.npy"""


NAME = "what findings call an argument, once for each --arg in order (default: arg0, arg1, ...)"
UNINITIALISED = "an array whose content counts as never written: an output or a workspace"
READ_ONLY = "an array that the kernel may not write"
ROLE = (
    "the name of some warps, once for each role: load=0, softmax=4-7,12 (default: found by what they execute)"
)


DEFAULT_CUDA_DEVICE = "sm_90a"
_LAUNCH_OPTIONS = (
    "kernel",
    "grid",
    "block",
    "cluster",
    "shared_bytes",
    "arg",
    "name",
    "uninitialised",
    "read_only",
    "device",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if all is well, 1 with findings, 2 for what cannot be run."""
    chosen = _parser().parse_args(arguments)
    try:
        status = int(chosen.command(chosen))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (EmulatorError, ValueError, OSError) as error:
        print(f"ptx_emulator: {error}", file=sys.stderr)
        return 2


def run(chosen: argparse.Namespace) -> int:
    """Runs once and prints findings and counts."""
    result = _job(chosen).run(_options(chosen, checks=not chosen.no_checks))
    _print_result(result, chosen)
    return 1 if result.reports else 0


def check(chosen: argparse.Namespace) -> int:
    """Runs under several schedules with all checks."""
    found = explore(
        _job(chosen), chosen.schedules, options=_options(chosen, checks=True), stop=not chosen.all
    )
    if chosen.json:
        runs = [
            {
                "schedule": run.options.schedule,
                "seed": run.options.seed,
                "disagreement": None if run.disagreement is None else str(run.disagreement),
                "reports": [report.to_dict() for report in run.result.reports],
            }
            for run in found.runs
        ]
        print(json.dumps(runs, indent=1))
    else:
        print(found)
        if found.first_wrong is not None and found.first_wrong.result.reports:
            print(reports_text(found.first_wrong.result.reports))
    return 1 if found.first_wrong is not None else 0


def trace(chosen: argparse.Namespace) -> int:
    """Runs once and writes a timeline; without --checks, races and uninitialised reads are not looked for."""
    result = _job(chosen).run(_options(chosen, checks=chosen.checks, traced=True))
    write_timeline(chosen.output, result.timeline, _roles(chosen.role))
    num_spans = sum(len(row.spans) for row in result.timeline)
    print(f"{chosen.output}: {num_spans} spans; open it at https://ui.perfetto.dev")
    print(reports_text(result.reports) + ("" if chosen.checks else "; races not looked for (--checks)"))
    return 1 if result.reports else 0


def ops(chosen: argparse.Namespace) -> int:
    """Lists the opcodes that are supported, or what a PTX file has that is not."""
    if chosen.ptx is None:
        print(opcode_table())
        print(f"\nThe runtime is compiled by {compiler_version()}.")
        return 0
    missing = unsupported(chosen.ptx.read_text(encoding="utf-8"), chosen.device)
    for error in missing:
        print(error)
    if not missing:
        print(f"{chosen.ptx}: all instructions are supported")
    return 1 if missing else 0


# ---------------------------------------------------------------------- inside


def _job(chosen: argparse.Namespace) -> Job:
    path, _, function = chosen.subject.rpartition(":")
    if path.endswith(".py"):
        given = [option for option in _LAUNCH_OPTIONS if getattr(chosen, option) is not None]
        if given:
            option = given[0].replace("_", "-")
            says = f"{chosen.subject} says itself what it launches"
            raise ValueError(f"--{option}: is for a PTX file or a CUDA source; {says}")
        return _job_of(Path(path), function)
    return Launch(
        ptx=_ptx_of(Path(chosen.subject), chosen.device),
        kernel=chosen.kernel,
        grid=_size("grid", chosen.grid, 1),
        block=_size("block", chosen.block, 32),
        cluster=_size("cluster", chosen.cluster, 1),
        shared_bytes=chosen.shared_bytes or 0,
        args=[parse_argument(text, chosen.seed) for text in chosen.arg or ()],
        names=chosen.name or (),
        uninitialised=chosen.uninitialised or (),
        read_only=chosen.read_only or (),
        device=chosen.device,
    )


def _ptx_of(path: Path, device: str | None) -> str:
    if path.suffix == ".cu":
        return compile_cuda(path, device or DEFAULT_CUDA_DEVICE)
    return path.read_text(encoding="utf-8")


def _job_of(path: Path, function: str) -> Job:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise EmulatorError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise EmulatorError(f"{path}: has no function {function!r}")
    job: Job = getattr(module, function)()
    if not (hasattr(job, "run") and hasattr(job, "memories")):
        raise EmulatorError(f"{path}:{function} returned a {type(job).__name__}, expected a Launch or a call")
    return job


def _roles(texts: Sequence[str]) -> dict[str, list[int]] | None:
    """Warps by role, from `load=0` and `softmax=4-7,12`."""
    roles: dict[str, list[int]] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)", text)
        if match is None:
            raise ValueError(f"--role {text}: expected NAME=WARPS, such as softmax=4-7 or load=0,2")
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            roles.setdefault(match[1], []).extend(range(int(first), int(last or first) + 1))
    return roles or None


def _size(name: str, text: str | None, default: int) -> tuple[int, ...]:
    if text is None:
        return (default,)
    if re.fullmatch(r"\d+([,x]\d+){0,2}", text) is None:
        raise ValueError(f"--{name} {text}: expected one to three numbers, such as 4 or 4,2,1")
    return tuple(int(part) for part in re.split("[,x]", text))


def _options(chosen: argparse.Namespace, *, checks: bool, traced: bool = False) -> Options:
    return Options(
        checks=checks,
        schedule=getattr(chosen, "schedule", "fair"),
        seed=chosen.seed,
        workers=chosen.workers,
        trace=traced,
        strict=False,
        progress=False if getattr(chosen, "json", False) else None,
    )


def _print_result(result: Result, chosen: argparse.Namespace) -> None:
    if chosen.json:
        counts = [of_launch.to_dict(_roles(chosen.role)) for of_launch in result.counts]
        print(json.dumps({"reports": json.loads(reports_json(result.reports)), "counts": counts}, indent=1))
        return
    for of_launch in result.counts:
        print(of_launch.table(_roles(chosen.role)), end="\n\n")
    print(reports_text(result.reports))
    print(f"{sum(c.instructions for c in result.counts):,} warp instructions in {result.seconds:.2f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptx_emulator", description="Runs, checks and counts GPU kernels on a CPU."
    )
    commands = parser.add_subparsers(required=True, metavar="run|check|trace|ops")
    single = _subject_parser(commands, "run", run)
    single.add_argument(
        "--no-checks", action="store_true", help="do not look for races and uninitialised reads: faster"
    )
    single.add_argument("--schedule", choices=sorted(SCHEDULES), default="fair")
    single.add_argument("--json", action="store_true", help="findings and counts as JSON")
    single.add_argument("--role", action="append", default=[], help=ROLE)
    several = _subject_parser(commands, "check", check)
    several.add_argument("--schedules", type=int, default=8, help="how many (default: 8)")
    several.add_argument("--all", action="store_true", help="go on behind the first schedule that is wrong")
    several.add_argument("--json", action="store_true", help="findings of every schedule as JSON")
    traced = _subject_parser(commands, "trace", trace)
    traced.add_argument("--checks", action="store_true", help="look for races and uninitialised reads, too")
    traced.add_argument("--schedule", choices=sorted(SCHEDULES), default="fair")
    traced.add_argument("--role", action="append", default=[], help=ROLE)
    traced.add_argument("-o", "--output", type=Path, default=Path("trace.json"), help="default: trace.json")
    table = commands.add_parser("ops", help=ops.__doc__, description=ops.__doc__)
    table.add_argument(
        "ptx", type=Path, nargs="?", help="a PTX file, to list what it has that is not supported"
    )
    table.add_argument("--device", help="architecture; by default the file's .target")
    table.set_defaults(command=ops)
    return parser


def _subject_parser(commands: Any, name: str, command: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=command.__doc__, description=command.__doc__
    )
    parser.add_argument("subject", help=SUBJECT)
    of_launch = parser.add_argument_group("launch of a PTX file or a CUDA source")
    of_launch.add_argument("--kernel", help="needed if the PTX has several; C++ names may be unmangled")
    of_launch.add_argument("--grid", help="such as 4 or 4,2,1 (default: 1)")
    of_launch.add_argument("--block", help="threads of a CTA (default: 32)")
    of_launch.add_argument("--cluster", help="CTAs of a cluster (default: 1)")
    of_launch.add_argument("--shared-bytes", type=int, help="dynamic shared memory (default: 0)")
    of_launch.add_argument("--arg", action="append", help=ARGUMENT)
    of_launch.add_argument("--name", action="append", help=NAME)
    of_launch.add_argument("--uninitialised", action="append", metavar="NAME", help=UNINITIALISED)
    of_launch.add_argument("--read-only", action="append", metavar="NAME", help=READ_ONLY)
    of_launch.add_argument(
        "--device", help=f"architecture; by default the PTX's .target, {DEFAULT_CUDA_DEVICE} for CUDA sources"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random schedules and random arrays")
    parser.add_argument("--workers", type=int, help="OS threads (default: one per core)")
    parser.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
