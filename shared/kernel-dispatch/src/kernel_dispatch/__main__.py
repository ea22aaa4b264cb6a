"""The command line: `python -m kernel_dispatch explain|warmup TARGET [--arch ARCH] [--backend NAME]`.

`warmup` also takes `--tactic NAME`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .arch import as_arch
from .errors import ArgumentError
from .resolution import explain
from .warmup import ALL_TACTICS, WarmupError, load_problems, warmup

_ARCH_VARIABLE = "CUTE_DSL_ARCH"  # by which nvidia-cutlass-dsl too is told of a GPU that is not there


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, or 1 if a problem has no kernel or failed to prepare. Wrong usage exits with 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        arch = as_arch(options.arch)
        problems = load_problems(options.target)
    except ArgumentError as error:
        parser.error(str(error))
    if options.command == "explain":
        explanations = [explain(problem, arch, options.backend) for problem in problems]
        _write("\n\n".join(map(str, explanations)))
        return 0 if all(explanation.chosen is not None for explanation in explanations) else 1
    try:
        _write(str(warmup(problems, arch, options.backend, tactic=options.tactic)))
    except WarmupError as error:
        _write(str(error))
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernel_dispatch", description="Kernel choice and compilation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (
        ("explain", "show which provider each problem gets, and why"),
        ("warmup", "compile or load the kernel of each problem ahead of time"),
    ):
        subparser = commands.add_parser(command, help=purpose, description=purpose)
        subparser.add_argument(
            "target",
            help="module:attribute naming a problem or several, or a JSON file (a path that ends in .json) "
            'with a list of {"problem": "module:Class", "arguments": {...}}',
        )
        subparser.add_argument(
            "--arch",
            default=os.environ.get(_ARCH_VARIABLE) or None,
            help=f"such as sm_90a or cpu; default: ${_ARCH_VARIABLE}, else the current GPU, else the CPU",
        )
        subparser.add_argument("--backend", default="auto", help="a provider's name, strict; default: auto")
        if command == "warmup":
            subparser.add_argument(
                "--tactic", help=f"a tactic's name, or {ALL_TACTICS}; default: the one that would be chosen"
            )
    return parser


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
