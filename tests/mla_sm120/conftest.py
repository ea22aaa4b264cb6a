"""Says at the end of a session which kernels a GPU ran, and how near results came to their bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_testing.mla import Inputs
from mla_sm120 import load

# Of this process and, where there are any, of the workers of xdist.
origins: dict[str, str] = {}
largest_errors: dict[str, float] = {}  # by dtype, in units of the bound


@pytest.fixture(autouse=True)
def _errors_on_the_gpu_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Inputs.check

    def check_and_keep(inputs: Inputs, out: torch.Tensor, *rest: Any, **options: Any) -> float:
        error = check(inputs, out, *rest, **options)
        if out.is_cuda:
            keep({}, {inputs.case.dtype: error})
        return error

    monkeypatch.setattr(Inputs, "check", check_and_keep)


def keep(new_origins: dict[str, str], errors: dict[str, float]) -> None:
    """Add to what this process knows."""
    origins.update(new_origins)
    for dtype, error in errors.items():
        largest_errors[dtype] = max(error, largest_errors.get(dtype, 0.0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    keep({f"{unit} for {arch}": origin for (unit, arch), origin in load.origins.items()}, {})
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["mla_sm120"] = (origins, largest_errors)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    keep(*getattr(node, "workeroutput", {}).get("mla_sm120", ({}, {})))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not origins and not largest_errors:
        return
    terminalreporter.section("mla-sm120 on a GPU")
    for kernels, origin in sorted(origins.items()):
        terminalreporter.line(f"{kernels}: {origin}")
    for dtype, error in sorted(largest_errors.items()):
        terminalreporter.line(f"largest error of {dtype}: {error:.3f} of its bound")
