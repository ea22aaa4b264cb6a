"""What a call takes of the host's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

HOST_CALLS = 500  # launched without waiting: the launch queue of a stream holds about 1,000
HOST_BATCHES = 21


class HostTime(NamedTuple):
    """Microseconds of the host per call: of batches, the median, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def time_host(runs: Mapping[str, Callable[[], object]]) -> dict[str, HostTime]:
    """Times batches of each of `runs` in turn; calls of a batch are not waited for."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(HOST_BATCHES + 1):  # the first warms up
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            samples[name].append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize()
    return {name: HostTime(statistics.median(x[1:]), min(x[1:]), max(x[1:])) for name, x in samples.items()}
