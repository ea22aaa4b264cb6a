"""Helpers for tests and benchmarks: strict comparison, poisoned memory, timing."""

from .__about__ import __version__
from .compare import assert_close_elementwise
from .poison import UNUSED_INDEX, Guarded, poison_, poisoned, snapshot_untouched
from .timing import calls_for_cold_l2, copy_bandwidth_gb_s, environment, time_cpu_us, time_cuda_us

__all__ = [
    "UNUSED_INDEX",
    "Guarded",
    "__version__",
    "assert_close_elementwise",
    "calls_for_cold_l2",
    "copy_bandwidth_gb_s",
    "environment",
    "poison_",
    "poisoned",
    "snapshot_untouched",
    "time_cpu_us",
    "time_cuda_us",
]
