"""One job under many schedules: do its results depend on the order of warps and asynchronous operations?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ptx_emulator.errors import EmulatorError
from ptx_emulator.host.arrays import Memory
from ptx_emulator.host.job import Job
from ptx_emulator.machine import Result
from ptx_emulator.options import SCHEDULES, Options
from ptx_emulator.reports import most_telling_first, reports_text

FIXED_SCHEDULES = tuple(name for name in SCHEDULES if name != "random")


@dataclass(frozen=True)
class Disagreement:
    """Where the results of a schedule first differ from those of the first one, in elements of an array."""

    array: str
    element: int
    expected: str
    found: str
    num_elements: int

    def __str__(self) -> str:
        first = f"{self.array}, element {self.element}: {self.found}, with the first schedule {self.expected}"
        return f"{first}; {self.num_elements} elements differ"


@dataclass(frozen=True)
class Run:
    """What one schedule gave. `options` repeat it."""

    options: Options
    result: Result
    disagreement: Disagreement | None = None

    @property
    def wrong(self) -> bool:
        return bool(self.result.reports) or self.disagreement is not None

    def __str__(self) -> str:
        name = (
            self.options.schedule
            if isinstance(self.options.schedule, str)
            else "/".join(self.options.schedule)
        )
        seed = f", seed {self.options.seed}" if "random" in name else ""
        wrong = [] if self.disagreement is None else [str(self.disagreement)]
        if self.result.reports:
            first, *more = most_telling_first(self.result.reports)
            wrong.append(f"{first}" + (f" (and {len(more)} more findings)" if more else ""))
        return f"schedule {name}{seed}: {'; '.join(wrong) or 'as the first, no findings'}"


class ScheduleError(EmulatorError):
    """A schedule gave other results or findings, all of which the text has; `run.options` repeat it."""

    def __init__(self, run: Run) -> None:
        reports = run.result.reports
        super().__init__(f"{run}\n{reports_text(reports)}" if len(reports) > 1 else str(run))
        self.run = run


@dataclass(frozen=True)
class Exploration:
    """The runs of `explore`, in order, up to the first that is wrong."""

    runs: Sequence[Run]

    @property
    def first_wrong(self) -> Run | None:
        return next((run for run in self.runs if run.wrong), None)

    def raise_if_wrong(self) -> None:
        """Raises ScheduleError for the first schedule that disagrees or has findings."""
        if self.first_wrong is not None:
            raise ScheduleError(self.first_wrong)

    def __str__(self) -> str:
        return "\n".join(map(str, self.runs))


def explore(
    job: Job, n: int = 16, *, options: Options | None = None, stop: bool = True, progress: bool = True
) -> Exploration:
    """Runs a job under `n` schedules and compares the arrays bit for bit.

    The first schedules are the fixed ones (fair, greedy, asynchronous operations late), the others random
    with seeds from `options.seed` on. The arrays start each run as they were and keep the last run's results.

    Args:
        options: what the schedules have in common; their own `schedule` is not used.
        stop: whether to stop at the first schedule that disagrees or has findings.
        progress: whether to show a bar.

    Raises:
        ValueError: `n` is less than 1.
        TypeError: `job` is none, such as a function that launches.
    """
    if not (hasattr(job, "memories") and hasattr(job, "run")):
        raise TypeError(f"job: a {type(job).__name__}, expected a Launch, Launches or Call")
    if n < 1:
        raise ValueError(f"n: {n} schedules, at least one is needed")
    common = replace(options or Options(), strict=False, progress=False)
    memories = job.memories()
    before = [memory.view().copy() for memory in memories]
    first: list[NDArray[np.uint8]] | None = None
    runs: list[Run] = []
    for chosen in tqdm(schedules(common, n), desc="schedules", total=n, disable=not progress):
        for memory, content in zip(memories, before, strict=True):
            memory.view()[:] = content
        result = job.run(chosen)
        now = [memory.view().copy() for memory in memories]
        first = first if first is not None else now
        runs.append(Run(chosen, result, _compare(memories, first, now)))
        if runs[-1].wrong and stop:
            break
    return Exploration(runs)


def schedules(common: Options, n: int) -> Iterator[Options]:
    """The first `n` schedules: the fixed ones, then random ones."""
    for index in range(n):
        if index < len(FIXED_SCHEDULES):
            yield replace(common, schedule=FIXED_SCHEDULES[index])
        else:
            seed = common.seed + index - len(FIXED_SCHEDULES)
            yield replace(common, schedule="random", seed=seed)


def _compare(
    memories: Sequence[Memory], expected: Sequence[NDArray[np.uint8]], found: Sequence[NDArray[np.uint8]]
) -> Disagreement | None:
    for memory, want, have in zip(memories, expected, found, strict=True):
        differing = np.flatnonzero(want != have)
        if len(differing):
            elements = np.unique(differing // memory.item_bytes)
            start = int(elements[0]) * memory.item_bytes
            part = slice(start, start + memory.item_bytes)
            return Disagreement(
                array=memory.name,
                element=int(elements[0]),
                expected=_hex(want[part]),
                found=_hex(have[part]),
                num_elements=len(elements),
            )
    return None


def _hex(content: NDArray[np.uint8]) -> str:
    return "0x" + content[::-1].tobytes().hex()
