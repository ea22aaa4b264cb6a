"""Where benchmarks keep their results."""

from __future__ import annotations

from pathlib import Path

from kernel_testing import device_model


def results_folder(benchmark: str, device: str) -> Path:
    """`benchmarks/results/<benchmark>-<model>`, for the name of a device."""
    return Path(__file__).resolve().parent / "results" / f"{benchmark}-{device_model(device)}"
