"""The fixture `emulator`, through the entry point group pytest11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ptx_emulator.host.cute import Emulated
    from ptx_emulator.host.exploring import Exploration
    from ptx_emulator.host.job import Job
    from ptx_emulator.machine import Result
    from ptx_emulator.options import Options


@dataclass(frozen=True)
class Emulator:
    """What the fixture `emulator` gives: the emulator with the options of the command line.

    Findings fail the test, with their source lines. `with_options` gives another one.
    """

    device: str
    options: Options
    schedules: int

    def with_options(
        self, *, device: str | None = None, schedules: int | None = None, options: Options | None = None
    ) -> Emulator:
        """The same with another device, other options or another number of schedules."""
        return replace(
            self,
            device=device or self.device,
            options=options or self.options,
            schedules=schedules or self.schedules,
        )

    def compile(self, function: Callable[..., Any], *args: Any, options: str = "") -> Any:
        """`cute.compile` for the emulator's device."""
        from ptx_emulator.host.cute import compile_cute

        return compile_cute(function, *args, arch=self.device, options=options)

    def emulate(
        self, compiled: Any, *, uninitialised: Sequence[str] = (), read_only: Sequence[str] = ()
    ) -> Emulated:
        """A compiled CuTe DSL function as a callable that takes CPU tensors."""
        from ptx_emulator.host.cute import emulate

        return emulate(
            compiled, self.device, options=self.options, uninitialised=uninitialised, read_only=read_only
        )

    def run(self, job: Job) -> Result:
        """Runs a job once: a `Launch`, `Launches`, or `Emulated.call(...)`."""
        return job.run(self.options)

    def explore(self, job: Job) -> Exploration:
        """Runs a job under all schedules; a schedule that disagrees or has findings fails the test."""
        from ptx_emulator.host.exploring import explore

        exploration = explore(job, self.schedules, options=self.options, progress=False)
        exploration.raise_if_wrong()
        return exploration


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the fixture."""
    group = parser.getgroup("ptx-emulator")
    group.addoption("--emulator-device", default="sm_100a", help="architecture that kernels are run for")
    group.addoption("--emulator-schedule", default="fair", help="schedule of single runs")
    group.addoption("--emulator-schedules", type=int, default=8, help="schedules that explore() runs")
    group.addoption("--emulator-seed", type=int, default=0, help="seed of random schedules")
    group.addoption("--emulator-no-checks", action="store_true", help="without the race checker: faster")


@pytest.fixture
def emulator(request: pytest.FixtureRequest) -> Emulator:
    """The emulator with the options of the command line."""
    from ptx_emulator.options import Options

    option = request.config.getoption
    return Emulator(
        device=option("--emulator-device"),
        options=Options(
            checks=not option("--emulator-no-checks"),
            schedule=option("--emulator-schedule"),
            seed=option("--emulator-seed"),
        ),
        schedules=option("--emulator-schedules"),
    )
