"""Something that can be run again and again under different schedules."""

from __future__ import annotations

from typing import Protocol

from ptx_emulator.host.arrays import Memory
from ptx_emulator.host.options import Options
from ptx_emulator.machine import Result


class Job(Protocol):
    """Launches with their arguments; `Launch`, `Launches` and `Call` are jobs."""

    def memories(self) -> list[Memory]:
        """The memory that the launches may touch."""

    def run(self, options: Options | None = None) -> Result:
        """Runs the launches once, in place."""


def finish(result: Result, options: Options) -> Result:
    """What a job returns.

    Raises:
        EmulationError: findings, if the options are strict.
    """
    if options.strict:
        result.raise_reports()
    return result
