"""Timing for benchmarks: medians of CUDA graphs with a cold L2, copy bandwidth, and what it all ran on."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

# Keeps the device busy while the host hands it a graph, so that the launch does not count: about 0.1 ms.
SPIN_CYCLES = 200_000
COLD_L2_FACTOR = 2  # memory touched between two uses of the same data, in sizes of the L2 cache


def calls_for_cold_l2(bytes_per_call: int, device: torch.device) -> int:
    """How many calls in turn, each on `bytes_per_call` of its own, keep the L2 cache of `device` cold."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + math.ceil(COLD_L2_FACTOR * l2_bytes / bytes_per_call)


def time_cuda_us(
    variants: Mapping[str, Sequence[Callable[[], object]]], repeats: int = 20, warmup: int = 2
) -> dict[str, float]:
    """Median microseconds of one call of each variant on the current CUDA device, variants interleaved.

    variants: by name, calls that do the same work, each on memory of its own (`calls_for_cold_l2` says how
    many) so that none finds its data in the L2 cache. A call launches work on the current stream and does not
    synchronise. The calls of a variant are captured in one CUDA graph, so that the host cost stays out.
    """
    graphs = {name: _captured(calls, warmup) for name, calls in variants.items()}
    times_us: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = _event(), _event()
            torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_us[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: statistics.median(samples) for name, samples in times_us.items()}


def time_cpu_us(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median microseconds of one call of `run` by the wall clock, caches as the previous call left them."""
    for _ in range(warmup):
        run()
    times_us: list[float] = []
    for _ in range(repeats):
        start_ns = time.perf_counter_ns()
        run()
        times_us.append((time.perf_counter_ns() - start_ns) / 1e3)
    return statistics.median(times_us)


def copy_bandwidth_gb_s(device: torch.device, nbytes: int = 1 << 30) -> float:
    """The ceiling of memory-bound work: GB/s, read plus written, of the median copy of `nbytes`.

    On a GPU an element-wise kernel copies (and negates), for the driver's memcpy can be slower: 2421 GB/s
    against 3006 for 1 GiB on an H100 80GB HBM3 with torch 2.11, November 2026.
    """
    source = torch.zeros(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        with torch.cuda.device(device):
            median_us = time_cuda_us({"copy": [lambda: torch.neg(source, out=target)]})["copy"]
    else:
        median_us = time_cpu_us(lambda: target.copy_(source))
    return 2 * source.nbytes / median_us / 1e3


def device_model(name: str) -> str:
    """The model in the name of a device, for names of files: `h100` of "NVIDIA H100 80GB HBM3"."""
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "geforce")]
    last = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "-".join(words[: last + 1])


def environment(*distributions: str) -> dict[str, str]:
    """What a measurement ran on: device, driver, versions of torch, CUDA, Python and `distributions`, commit.

    A version or commit that cannot be told is "unknown"; a commit with local changes ends in "+changes".
    """
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }
    return {name: _version(name) for name in distributions} | record


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _captured(calls: Sequence[Callable[[], object]], warmup: int) -> torch.cuda.CUDAGraph:
    """A graph of all `calls`, each run `warmup` times beforehand."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls] * warmup:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} x{len(models)}" if models else platform.machine()


def _driver_version() -> str:
    if not torch.cuda.is_available():
        return "none"
    return (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        or "unknown"
    )


def _git_commit() -> str:
    """The tree's commit, "+changes" where it has been changed since; without git, the commit checked out."""
    here = Path(__file__).parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    if commit:
        return commit + ("+changes" if _output("git", "-C", str(here), "status", "--porcelain") else "")
    for folder in here.parents:
        head = folder / ".git" / "HEAD"
        if head.is_file():
            name = head.read_text().strip()
            branch = folder / ".git" / name.removeprefix("ref: ")
            if branch.is_file():
                return branch.read_text().strip()
            return "unknown" if name.startswith("ref: ") else name
    return "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _output(*command: str) -> str:
    """The standard output of `command`, stripped; empty where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
