"""A made-up operation for the tests of tuning and warm-up: its problem, its kernels and how it is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from kernel_dispatch import Arch, Provider, Selection, as_arch, bucket_batch, choose, registered

CPU = as_arch("cpu")
SLOW_S = 0.003


@dataclass(frozen=True)
class Scaling:
    """Multiply `batch` numbers in place."""

    entry_point_group: ClassVar[str] = "tests.scaling.v1"

    batch: int
    dtype: torch.dtype = torch.float32

    def bucketed(self) -> Scaling:
        return replace(self, batch=bucket_batch(self.batch))

    def describe(self) -> str:
        return f"scaling B{self.batch} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class ScalingKernel:
    """Doubles its tensor; `cost_s` is the time that each tactic takes, an exception is what it raises."""

    cost_s: dict[str, float | Exception]
    runs: list[str] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    on_prepare: Callable[[Scaling], object] = lambda problem: None

    def workspace_nbytes(self, problem: Scaling, arch: Arch, tactic: str | None = None) -> int:
        return 0

    def tactics(self, problem: Scaling, arch: Arch) -> Sequence[str]:
        return tuple(self.cost_s)

    def prepare(
        self, problem: Scaling, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[[torch.Tensor], None]:
        self.prepared.append(tactic)
        self.on_prepare(problem)

        def launch(values: torch.Tensor) -> None:
            self.runs.append(tactic)
            values.mul_(2)
            cost = self.cost_s[tactic]
            if isinstance(cost, Exception):
                raise cost
            time.sleep(cost)

        return launch


@contextmanager
def scaling_providers(
    *kernels: ScalingKernel, supports: Callable[..., str | None] | None = None
) -> Iterator[None]:
    """Registers the kernels as providers p0, p1, ... with falling priority."""
    with ExitStack() as stack:
        for i, kernel in enumerate(kernels):
            provider = Provider(
                f"p{i}",
                ("cpu",),
                supports or (lambda problem, arch: None),
                partial(_identity, kernel),
                90 - i,
            )
            stack.enter_context(registered(Scaling.entry_point_group, provider))
        yield


def _identity(kernel: ScalingKernel) -> ScalingKernel:
    return kernel


def scale(values: torch.Tensor, device: str = "cpu") -> Selection:
    """The operation: doubles `values` in place with the chosen kernel."""
    selection = select(values, device)
    _make_run(values, selection)()
    return selection


def select(values: torch.Tensor, device: str = "cpu") -> Selection:
    """The operation without its own launch: tunes if asked to, and chooses."""

    def snapshot() -> Callable[[], None]:
        saved = values.clone()

        def restore() -> None:
            values.copy_(saved)

        return restore

    problem = Scaling(values.numel(), values.dtype)
    return choose(problem, CPU, torch.device(device), partial(_make_run, values), snapshot)


def _make_run(values: torch.Tensor, selection: Selection) -> Callable[[], None]:
    problem = Scaling(values.numel(), values.dtype)
    return partial(selection.kernel.prepare(problem, CPU, torch.device("cpu"), selection.tactic), values)


def tune_in_process(cache: str, batches: Sequence[int], barrier: object) -> None:
    """Tunes one bucket per batch size into `cache`, starting together with the others at the barrier."""
    from kernel_dispatch import autotune

    with scaling_providers(ScalingKernel({"a": 0.0, "b": 0.0}), ScalingKernel({"c": 0.0})):
        barrier.wait()  # type: ignore[attr-defined]
        with autotune(Path(cache), progress=False):
            for batch in batches:
                scale(torch.ones(batch))
