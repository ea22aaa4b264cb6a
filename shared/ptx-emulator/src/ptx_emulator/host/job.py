"""Something that can be run again and again under different schedules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from ptx_emulator.host.arrays import Memory
from ptx_emulator.machine import Machine, Result
from ptx_emulator.options import Options

_BAR_DELAY_S = 3.0
_BAR_INTERVAL_S = 0.1


class Job(Protocol):
    """Launches with their arguments; `Launch`, `Launches` and `Call` are jobs."""

    def memories(self) -> list[Memory]:
        """The memory that the launches may touch."""

    def run(self, options: Options | None = None) -> Result:
        """Runs the launches once, in place."""


def give(machine: Machine, memories: Iterable[Memory]) -> None:
    """Makes memory accessible to the kernels of a machine."""
    for memory in memories:
        machine.add_range(
            memory.name,
            memory.address,
            memory.num_bytes,
            initialised=memory.initialised,
            read_only=memory.read_only,
        )


def finish(machine: Machine, options: Options) -> Result:
    """Runs what is enqueued on a machine.

    Raises:
        EmulationError: findings, if the options are strict.
    """
    wanted = sys.stderr.isatty() if options.progress is None else options.progress
    result = machine.synchronize(_progress_bar(machine) if wanted else None)
    if options.strict:
        result.raise_reports()
    return result


@contextmanager
def _progress_bar(machine: Machine) -> Iterator[None]:
    """A bar of the clusters that have finished, for runs of more than `_BAR_DELAY_S`."""
    stop = threading.Event()
    total = machine.progress()[1]

    def watch() -> None:
        with tqdm(total=total, desc="clusters", delay=_BAR_DELAY_S) as bar:
            while not stop.wait(_BAR_INTERVAL_S):
                bar.update(machine.progress()[0] - bar.n)
            bar.update(total - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
