"""Times mla-sm120 by the number of splits of a request, beside the number that the heuristic chooses.

    python benchmarks/bench_mla_splits.py [--out FOLDER]

Batches that fill the SMs once, and batches that leave some idle or overflow them a little. Tiles have the
rows that the heuristic prefers. Two splits are timed with and without a cluster that merges them, others
without; "tail" is a call cut in two, requests that fill the SMs in whole waves and those that are left. The
heuristic chooses that or a number for all. Each choice is compared with float64 first, for the first and the
last request, every element; one that is wrong is not timed. A time is the median of replays of a CUDA graph
with the L2 cache cold, choices in turn. Writes results.json, with the time that the heuristic expects of each
beside it, and report.txt; the exit status is 1 if a result is wrong or there is no such GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _mla_cases import Call, Cell
from _results import results_folder
from kernel_dispatch import as_arch
from kernel_testing import calls_for_cold_l2, copy_bandwidth_gb_s, environment, time_cuda_us
from mla_sm120.config import TAIL, Division, Part, cost_us, parts, row_tiles_of, tactics
from mla_sm120.kernels import launchers
from tqdm import tqdm

CELLS = [
    *(
        Cell("bf16", batch, 128, 4096)
        for batch in (16, 24, 32, 40, 48, 56, 64, 67, 72, 80, 96, 100, 128, 160, 200, 256)
    ),
    *(
        Cell("bf16", batch, heads, 8192)
        for heads in (64, 32, 16)
        for batch in (16, 33, 40, 66, 68, 80, 99, 100, 132, 136, 160, 200, 256, 300)
    ),
    *(Cell("fp8", batch, heads, 8192) for heads in (128, 16) for batch in (40, 68, 100, 136, 200)),
    *(Cell("bf16", batch, heads, 1024) for heads in (128, 16) for batch in (40, 67, 100, 136, 200)),
    *(Cell("bf16", batch, 16, 32768) for batch in (20, 40, 100, 136)),
    *(Cell("bf16", batch, 32, 8192, q_len=4) for batch in (24, 40, 68, 100)),
]
SPLITS = (1, 2, 3, 4, 5, 6, 8)
MOST_WAVES = 9
REPEATS = 5


def variants_of(cell: Cell, device: torch.device) -> dict[str, list[Part]]:
    """Launches with the heuristic's tile: "splits/blocks of a cluster" or "tail"; its choice first."""
    arch, problem = as_arch(device), cell.problem
    preferred = tactics(problem)[0]
    one = Division.of(problem, arch, preferred)
    divisions = [one]
    for splits in SPLITS:
        if cell.batch * row_tiles_of(problem, one.tile_rows) * splits <= MOST_WAVES * arch.sm_count:
            plan = replace(one.splits, num_splits=splits)
            sizes = (1, 2) if splits == 2 else (1,)
            divisions += [Division(one.tile_rows, plan, cluster_size) for cluster_size in sizes]
    choices = [parts(problem, arch, preferred), parts(problem, arch, preferred + TAIL)]
    choices += [[Part(0, problem, division)] for division in divisions]
    return {_name(choice): choice for choice in choices}


def _name(choice: list[Part]) -> str:
    division = choice[0].division
    return "tail" if len(choice) > 1 else f"{division.num_splits}/{division.cluster_size}"


def measure(found: dict[str, list[Part]], cell: Cell, device: torch.device) -> dict[str, float]:
    """Microseconds by the names of `variants_of`, which found them."""
    workspace_nbytes = max(
        part.division.partials.workspace_bytes for parts_of_one in found.values() for part in parts_of_one
    )
    num_calls = calls_for_cold_l2(cell.necessary_bytes, device)
    calls = [Call(cell, device, workspace_nbytes) for _ in range(num_calls)]
    variants = {}
    for name, parts_of_one in found.items():
        launch = launchers(parts_of_one, as_arch(device), device)
        calls[0].out.fill_(float("nan"))
        calls[0].lse.fill_(float("nan"))
        launch(*calls[0].launch_arguments)
        torch.cuda.synchronize()
        calls[0].check(cell, name)
        variants[name] = [partial(launch, *call.launch_arguments) for call in calls]
    return time_cuda_us(variants, repeats=REPEATS)


def main() -> int:
    """Measure, print, and write the record; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to; benchmarks/results/mla_sm120-splits-<model> by default"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() or as_arch(None).base not in ("sm_90", "sm_120", "sm_121"):
        print("bench_mla_splits.py needs a CUDA device of compute capability 9.0 or 12.x", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record: dict[str, Any] = {
        "environment": environment("mla-core", "kernel-dispatch", "cuda-bindings", "mla-sm120"),
        "command": " ".join(sys.argv),
        "copy_gb_s": copy_bandwidth_gb_s(device),
        "us": {},
        "expected_us": {},
    }
    lines = [json.dumps(record["environment"]), f"copy {record['copy_gb_s']:.0f} GB/s"]
    lines.append("us by splits/blocks of a cluster, the heuristic's choice first; its time over the least")
    wrong = False
    for cell in tqdm(CELLS, unit="shape"):
        found = variants_of(cell, device)
        try:
            times = measure(found, cell, device)
        except AssertionError as error:
            wrong = True
            lines.append(f"{cell!s:30} WRONG: {error}")
            continue
        except torch.OutOfMemoryError:
            lines.append(f"{cell!s:30} does not fit the GPU's memory")
            continue
        record["us"][str(cell)] = times
        record["expected_us"][str(cell)] = {name: cost_us(found[name], as_arch(device)) for name in times}
        over_least = next(iter(times.values())) / min(times.values())
        listed = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
        lines.append(f"{cell!s:30} {listed}; {over_least:.2f}")
        torch.cuda.empty_cache()
    off = [
        math.log(us / record["us"][cell][name])
        for cell, expected in record["expected_us"].items()
        for name, us in expected.items()
    ]
    off_rms = math.sqrt(sum(x * x for x in off) / max(len(off), 1))
    lines.append(f"{len(off)} times, expected ones {off_rms:.1%} off in the root mean square")
    out = options.out or results_folder("mla_sm120-splits", torch.cuda.get_device_name())
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
