"""Whether memory is as fast as at the start of a run; what was timed while it was not is timed again."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from kernel_testing import time_cuda_us

COPY_NBYTES = 1 << 27  # more than the L2 cache
COPY_REPEATS = 7
START_COPIES = 5
STEADY = 1.02  # as long as at the start a copy may take, at most
ATTEMPTS = 3


class Steady(NamedTuple):
    """Microseconds by variant; how many times as long as at the start a copy beside them took; attempts."""

    us: dict[str, float]
    slowdown: float
    attempts: int


class Pace:
    """The time of a copy, of the start of a run and of now.

    copy_us: takes the time of the copy, in microseconds.
    """

    def __init__(self, copy_us: Callable[[], float]) -> None:
        self.copy_us = copy_us
        self.start_us = statistics.median(copy_us() for _ in range(START_COPIES))

    @classmethod
    def on(cls, device: torch.device) -> Pace:
        """That of an element-wise copy on a CUDA device."""
        source = torch.zeros(COPY_NBYTES // 4, device=device)
        target = torch.empty_like(source)

        def copy() -> None:
            torch.neg(source, out=target)

        return cls(lambda: time_cuda_us({"copy": [copy]}, repeats=COPY_REPEATS)["copy"])

    def steady(self, measure: Callable[[], dict[str, float]]) -> Steady:
        """What `measure` finds, of the attempt in which a copy before and after it was least slow."""
        found: list[tuple[float, dict[str, float]]] = []
        for _ in range(ATTEMPTS):
            before = self.copy_us()
            us = measure()
            found.append((max(before, self.copy_us()) / self.start_us, us))
            if found[-1][0] <= STEADY:
                break
        slowdown, us = min(found, key=lambda attempt: attempt[0])
        return Steady(us, slowdown, len(found))
