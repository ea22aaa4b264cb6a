"""The problems that calls really pose, and which provider each of them gets, here and on other devices.

Every provider of an operation is asked whether it supports a problem before the problem runs. One that
declines them all and takes notes knows them, without describing any call a second time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import get_args

import torch
from common import Decoder
from gdn_mtp import GatedDeltaRuleProblem, SpeculativeProblem
from kernel_dispatch import Arch, Explanation, Kernel, Provider, explain, registered
from mla_core import DecodeProblem

Problem = DecodeProblem | GatedDeltaRuleProblem | SpeculativeProblem


@dataclasses.dataclass(frozen=True)
class Call:
    """A kind of call that was made: its problem, what `explain` says of it here, and elsewhere by arch."""

    label: str
    problem: Problem
    here: Explanation
    elsewhere: Mapping[str, Explanation]


@contextmanager
def recorded_problems() -> Iterator[list[Problem]]:
    """The different problems of all operations that are called inside the block, in order.

    Plans made before the block are dropped, so that it sees their problems too. Blocks cannot be nested.
    """
    problems: list[Problem] = []

    def note(problem: Problem, arch: Arch) -> str:
        if problem not in problems:
            problems.append(problem)
        return "only takes notes"

    def load() -> Kernel:
        raise AssertionError("a provider that declines everything is not loaded")

    with ExitStack() as stack:
        for problem_type in get_args(Problem):
            recorder = Provider("recorder", ("any",), note, load, priority=-1)
            stack.enter_context(registered(problem_type.entry_point_group, recorder))
        yield problems


class RecordingDecoder:
    """Passes everything on to a `common.Decoder` or `common.Engine` and notes the problems of each phase."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.problems: dict[str, list[Problem]] = defaultdict(list)

    def __getattr__(self, phase: str) -> Callable[..., object]:
        return partial(self._recorded, phase)

    def _recorded(self, phase: str, *arguments: object) -> object:
        with recorded_problems() as problems:
            result = getattr(self.decoder, phase)(*arguments)
        self.problems[phase] += [problem for problem in problems if problem not in self.problems[phase]]
        return result


def explained(problems: Mapping[Problem, str], device: torch.device, archs: Sequence[str]) -> list[Call]:
    """One call per labelled problem; to be asked for outside `recorded_problems`."""
    return [
        Call(label, problem, explain(problem, device), {arch: explain(problem, arch) for arch in archs})
        for problem, label in problems.items()
    ]
