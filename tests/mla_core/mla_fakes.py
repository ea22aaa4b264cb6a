"""A second provider for the tests: the PyTorch kernel with a workspace it writes to, and choices to tune."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_dispatch import Arch, Provider
from mla_core import DecodeProblem
from mla_core.torch_kernel import TorchKernel


@dataclass
class FakeKernel:
    """Needs `nbytes` of workspace and fills it; its tactic "slow" sleeps first and "failing" raises.

    Its tactic "none" needs no workspace and leaves it alone.

    runs: the tactics launched, in order. overrun: bytes written beyond the workspace.
    """

    nbytes: int = 0
    overrun: int = 0
    tactic_names: tuple[str, ...] = ("slow", "fast")
    runs: list[str] = field(default_factory=list)

    def workspace_nbytes(self, problem: DecodeProblem, arch: Arch, tactic: str | None = None) -> int:
        return 0 if tactic == "none" else self.nbytes

    def tactics(self, problem: DecodeProblem, arch: Arch) -> Sequence[str]:
        return self.tactic_names

    def prepare(
        self, problem: DecodeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        launch = TorchKernel().prepare(problem, arch, device, "chunked")

        def run(*arguments: Any) -> None:
            self.runs.append(tactic)
            if tactic == "failing":
                raise RuntimeError("no such tile")
            if tactic == "slow":
                time.sleep(0.01)
            *_, workspace = arguments
            if workspace is not None and tactic != "none":
                size = self.nbytes + self.overrun
                workspace.as_strided((size,), (1,)).fill_(0xAB)
            launch(*arguments)

        return run

    def provider(self, name: str = "fake") -> Provider:
        return Provider(name, ("any",), lambda problem, arch: None, lambda: self, priority=10)
