"""Times a provider of MLA decode beside the torch provider and the device's ceilings, all in one run.

    python benchmarks/bench_mla_decode.py --provider sm120
    python benchmarks/bench_mla_decode.py --provider sm120 --cells B64-H128-s8192-bf16 --tactics
    python benchmarks/bench_mla_decode.py --provider sm100

`--provider sm120` means the provider of mla-sm120 for the device at hand: sm120, sm121, or on a Hopper GPU
the sm_90a build of the same sources, `sm90`. Before it is timed, every variant is compared with float64 at
the very shape, for the first and the last request, every element; one that is wrong is not timed. A time is
the median of replays of a CUDA graph, variants in turn, with the L2 cache cold; the torch provider has its
turn after the others. Ceilings are measured in the same run: copy bandwidth, and the rate of mma.sync from
registers, or of cuBLAS where there is tcgen05. So is the host time of a call, beside other ways to launch the
kernels of mla-sm120 (`_mla_launches`). Writes results.json and report.txt; of some cells alone only where
--out says so. The exit status is 1 if ours is wrong or there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _host_time import HostTime, time_host
from _mla_cases import DTYPES, Call, Cell
from _mla_ceilings import matrix_tflops, matrix_unit
from _mla_launches import Launches
from _results import results_folder
from kernel_dispatch import as_arch, providers, resolve
from kernel_testing import (
    calls_for_cold_l2,
    copy_bandwidth_gb_s,
    environment,
    time_cuda_us,
)
from mla_core import DecodeProblem, plan

CELLS = [
    *(
        Cell(dtype, batch, 128, seq)
        for dtype in ("bf16", "fp8")
        for batch, seq in ((32, 4096), (64, 8192), (128, 4096))
    ),
    *(Cell(dtype, batch, 16, 8192) for dtype in ("bf16", "fp8") for batch in (32, 64, 128)),
    *(Cell(dtype, 1, heads, 65536) for dtype in ("bf16", "fp8") for heads in (8, 16, 32, 64, 128)),
    Cell("bf16", 32, 32, 8192),
    Cell("bf16", 32, 64, 8192),
    Cell("bf16", 64, 16, 8192, q_len=4),
    Cell("fp16", 64, 128, 8192),
    Cell("bf16", 64, 128, 8192, page_size=16),
    Cell("bf16", 1, 16, 8192),
    Cell("bf16", 4, 128, 8192),
]
TORCH_CELLS = 2  # the torch provider is slow: it is timed on the first cells of each dtype only
GROUP = DecodeProblem.entry_point_group
PROVIDERS_OF = {"sm120": {"sm_90": "sm90", "sm_120": "sm120", "sm_121": "sm121"}}
DISTRIBUTIONS = ("mla-core", "kernel-dispatch", "cuda-bindings", "cuda-core", "apache-tvm-ffi")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--provider", default="sm120", help="sm120, or the name of any other provider")
    parser.add_argument("--cells", nargs="+", help="shapes such as B64-q1-H128-p64-s8192-bf16")
    parser.add_argument("--tactics", action="store_true", help="time every tactic")
    parser.add_argument("--no-torch", action="store_true", help="leave the torch provider out")
    parser.add_argument("--repeats", type=int, default=9, help="replays per variant (default %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json and report.txt; of all cells benchmarks/results/mla_<provider>-<model>",
    )
    return parser.parse_args(arguments)


def parse_cell(text: str) -> Cell:
    """A cell from its name; what the name leaves out has its default."""
    fields = dict(re.findall(r"\b(B|q|H|p|s)(\d+)", text))
    dtype = text.rsplit("-", 1)[-1]
    if dtype not in DTYPES or not {"B", "H", "s"} <= fields.keys():
        raise SystemExit(f"--cells: {text!r}, expected for instance B64-q1-H128-p64-s8192-bf16")
    sizes = {name: int(value) for name, value in fields.items()}
    return Cell(dtype, sizes["B"], sizes["H"], sizes["s"], sizes.get("q", 1), sizes.get("p", 64))


def tactic_plans(cell: Cell, backend: str, device: torch.device, every: bool) -> dict[str, Any]:
    """Plans by the name of their tactic, the heuristic's choice first."""
    selection = resolve(cell.problem, device, backend)
    names = selection.kernel.tactics(cell.problem, as_arch(device)) if every else [selection.tactic]
    return {name: plan(cell.problem, device, backend, name) for name in names}


def measure(
    cell: Cell, options: argparse.Namespace, backend: str, device: torch.device, with_torch: bool
) -> dict[str, Any]:
    """Times in microseconds by variant, in turn, each checked first; the torch provider's after them."""
    plans = {
        f"{backend} {name}": made
        for name, made in tactic_plans(cell, backend, device, options.tactics).items()
    }
    if with_torch:
        plans["torch"] = plan(cell.problem, device, "torch")
    workspace_nbytes = max(made.workspace_nbytes for made in plans.values())
    calls = [
        Call(cell, device, workspace_nbytes) for _ in range(calls_for_cold_l2(cell.necessary_bytes, device))
    ]
    variants = {}
    for name, made in plans.items():
        first = calls[0]
        first.out.fill_(float("nan"))
        first.lse.fill_(float("nan"))
        positional, named = first.arguments
        made.run(*positional, **named)
        torch.cuda.synchronize()
        first.check(cell, name)
        used = calls[:1] if name == "torch" else calls
        variants[name] = [partial(made.run, *call.arguments[0], **call.arguments[1]) for call in used]
    # Apart and last: after the milliseconds that it takes, others take up to 3 % longer.
    torch_alone = {"torch": variants.pop("torch")} if with_torch else {}
    us = time_cuda_us(variants, options.repeats)
    if torch_alone:
        us |= time_cuda_us(torch_alone, options.repeats)
    return {"workspace_nbytes": workspace_nbytes, "us": us}


def measure_host(backend: str, device: torch.device) -> tuple[dict[str, HostTime], dict[str, str]]:
    """Host time of launches by name, in turn on one stream, and why others are missing."""
    with torch.cuda.stream(torch.cuda.Stream(device)):
        launches = Launches(backend, device)
        return time_host(launches.runs), launches.missing


def resources(backend: str) -> dict[str, dict[str, int]]:
    """Registers, local and shared memory and blocks per SM of every kernel of mla-sm120 on this device."""
    from cuda.bindings import driver
    from mla_sm120.config import DTYPE_UNITS, SMEM_BYTES, TILE_ROWS, block_threads
    from mla_sm120.load import load_kernel

    attributes = driver.CUfunction_attribute
    arch, index = as_arch(None).name, torch.cuda.current_device()
    found = {}
    for unit, tile, kind in itertools.product(DTYPE_UNITS.values(), TILE_ROWS, ("decode", "merge")):
        function = load_kernel(unit, f"mla_{kind}_m{tile}", arch, index)
        kernel = driver.CUkernel(int(function))
        _, loaded = driver.cuKernelGetFunction(kernel)
        _, registers = driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_NUM_REGS, loaded)
        _, local = driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, loaded)
        _, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            loaded, block_threads(tile), SMEM_BYTES
        )
        figures = {
            "registers": registers,
            "local_bytes": local,
            "smem_bytes": SMEM_BYTES,
            "blocks_per_sm": blocks,
        }
        found[f"{unit} {kind} m{tile}"] = figures
    return found


def loaded_kernels() -> dict[str, str]:
    """Where the kernels of mla-sm120 that this process has loaded are from, and what compiled them."""
    from mla_sm120.load import origins

    return {f"{unit} for {arch}": origin for (unit, arch), origin in origins.items()}


def main() -> int:
    """Measure, print, and write the record; the exit status."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        print("bench_mla_decode.py needs a CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    arch = as_arch(device)
    backend = PROVIDERS_OF.get(options.provider, {}).get(arch.base, options.provider)
    if backend not in {entry.name for entry in providers(GROUP)}:
        print(f"--provider {options.provider}: no provider {backend!r} is installed", file=sys.stderr)
        return 1
    cells = [parse_cell(text) for text in options.cells] if options.cells else CELLS
    copy_gb_s = copy_bandwidth_gb_s(device)
    # On SM90 mma.sync of e4m3 is made of conversions and mma.sync of fp16: there is no rate to compare with.
    timed = {cell.dtype for cell in cells} - ({"fp8"} if arch.base == "sm_90" else set())
    rates = {dtype: matrix_tflops(dtype, arch) for dtype in sorted(timed)}
    lines = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    package = next(entry.distribution for entry in providers(GROUP) if entry.name == backend)
    record: dict[str, Any] = {"environment": environment(*DISTRIBUTIONS, package), "provider": backend}
    record |= {"copy_gb_s": copy_gb_s, "matrix_tflops": rates, "matrix_unit": matrix_unit(arch)}
    record |= {"command": " ".join(sys.argv), "cells": {}}
    say(json.dumps(record["environment"]))
    say(
        f"copy {copy_gb_s:.0f} GB/s; {matrix_unit(arch)} "
        + ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in rates.items())
    )
    if options.provider == "sm120":
        record["resources"] = resources(backend)
        for name, figures in record["resources"].items():
            say(f"{name}: " + ", ".join(f"{value} {what}" for what, value in figures.items()))
    host, record["host_us_missing"] = measure_host(backend, device)
    record["host_us"] = {name: us.median for name, us in host.items()}
    record["host_us_range"] = {name: [us.lowest, us.highest] for name, us in host.items()}
    say("host us per call, median of batches (lowest to highest):")
    for name, us in host.items():
        say(f"  {name}: {us}")
    for name, reason in record["host_us_missing"].items():
        say(f"  {name} is missing: {reason}")
    say(
        f"{'cell':32s} {'variant':16s} {'us':>9s} {'GB/s':>6s} {'of copy':>8s} {'TFLOP/s':>8s} {'of max':>7s}"
    )
    failed = False
    timed_torch: dict[str, int] = {}
    for cell in cells:
        with_torch = not options.no_torch and timed_torch.get(cell.dtype, 0) < TORCH_CELLS
        timed_torch[cell.dtype] = timed_torch.get(cell.dtype, 0) + 1
        try:
            result = measure(cell, options, backend, device, with_torch)
        except AssertionError as error:
            say(f"{cell!s:32s} WRONG: {error}")
            failed = True
            continue
        record["cells"][str(cell)] = result
        for name, us in result["us"].items():
            rate = rates.get(cell.dtype)
            gb_s, tflops = cell.necessary_bytes / us / 1e3, cell.flops / us / 1e6
            of_rate = "-" if rate is None else f"{tflops / rate:.2f}"
            say(
                f"{cell!s:32s} {name:16s} {us:9.1f} {gb_s:6.0f} {gb_s / copy_gb_s:8.2f} {tflops:8.1f} "
                f"{of_rate:>7s}"
            )
        torch.cuda.empty_cache()
    if options.provider == "sm120":
        record["kernels"] = loaded_kernels()
        for name, origin in record["kernels"].items():
            say(f"{name}: {origin}")
    if options.out is None and options.cells:
        print("nothing is written: --cells without --out")
        return int(failed)
    out = options.out or results_folder(f"mla_{options.provider}", torch.cuda.get_device_name())
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
