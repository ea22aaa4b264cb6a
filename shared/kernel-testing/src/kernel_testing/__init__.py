"""Helpers for tests and benchmarks: strict comparison, poisoned memory, timing, compiled resources."""

from .__about__ import __version__
from .compare import assert_close_elementwise
from .cubin import KernelResources, cubin_resources
from .poison import UNUSED_INDEX, Guarded, poison_, poisoned, snapshot_untouched
from .timing import (
    calls_for_cold_l2,
    copy_bandwidth_gb_s,
    device_model,
    environment,
    time_cpu_us,
    time_cuda_us,
)

__all__ = [
    "UNUSED_INDEX",
    "Guarded",
    "KernelResources",
    "__version__",
    "assert_close_elementwise",
    "calls_for_cold_l2",
    "copy_bandwidth_gb_s",
    "cubin_resources",
    "device_model",
    "environment",
    "poison_",
    "poisoned",
    "snapshot_untouched",
    "time_cpu_us",
    "time_cuda_us",
]
