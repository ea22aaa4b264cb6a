"""How long the emulator takes: its build, and a two-CTA MLA decode kernel, with checks and without.

    python benchmarks/emulator_speed.py --out benchmarks/results/emulator_speed.json

The kernel is that of mla-sm100 for pairs of CTAs, bf16, 128 heads, one cluster for each request, and
FlashInfer's as installed, which is left out where it is not. Every element of every result is held against
float64; findings with the checks on are counted by kind. Times are of the emulation alone, the least of
`RUNS`; the build is that of the runtime with an empty cache. A machine that does other work beside takes
longer: `load` is the load average before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kernel_testing import environment
from kernel_testing.mla import Case, Inputs
from ptx_emulator import Options
from ptx_emulator.build import compiler_version
from ptx_emulator.machine import LoadedModule, Result, operations

ROOT = Path(__file__).resolve().parents[1]
CASES = {"B=1, 256 keys": (256,), "B=4, 4,096 keys": (4096,) * 4}
LIMITS_S = {"build": 15.0, "B=1, 256 keys": 0.2, "B=4, 4,096 keys": 3.0}  # on two cores, without checks
RUNS = 3
BUILD = "import time; t = time.time(); from ptx_emulator.build import build; build(); print(time.time() - t)"
DISTRIBUTIONS = ("ptx-emulator", "mla-sm100", "flashinfer-python", "nvidia-cutlass-dsl")


def build_seconds() -> tuple[float, float]:
    """A build of the runtime in a process of its own with an empty cache: seconds, and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "PTX_EMULATOR_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", BUILD], env=variables, check=True, stdout=subprocess.PIPE, text=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout), cpu


def lowering_seconds() -> float:
    """From the PTX of the pair kernel to what the runtime takes."""
    from emulation import config_of, emulated

    ptx = emulated(config_of(Inputs(Case((256,), "bf16", num_heads=128)), pair=True)).ptx
    operations()  # of the runtime, which is built first
    begin = time.perf_counter()
    LoadedModule(ptx, "sm_100a").kernel()
    return time.perf_counter() - begin


def ours(lengths: tuple[int, ...]) -> Callable[[Options], Result]:
    """Runs the pair kernel of mla-sm100 and checks what it gives."""
    from emulation import config_of, run_on_emulator

    inputs = Inputs(Case(lengths, "bf16", num_heads=128))

    def run(options: Options) -> Result:
        done = run_on_emulator(config_of(inputs, pair=True), inputs, options=options)
        assert done.function.result is not None
        return done.function.result

    return run


def flashinfer(lengths: tuple[int, ...]) -> Callable[[Options], Result]:
    """Runs FlashInfer's bf16 kernel and checks what it gives."""
    from flashinfer_mla import decode_call
    from test_flashinfer_mla import LSE_BOUND, O_BOUNDS, problem, reference

    scale = 192**-0.5 / 2
    inputs = problem(len(lengths), max(lengths), 128, torch.bfloat16)
    decode = decode_call(*inputs, softmax_scale=scale, max_seq_len=max(lengths))
    out, lse = reference(*inputs, scale)

    def run(options: Options) -> Result:
        result: Result = decode.job.run(replace(options, strict=False))
        assert (decode.out.double() - out).abs().max() < O_BOUNDS[torch.bfloat16]
        assert (decode.lse.double() - lse).abs().max() < LSE_BOUND * lse.abs().max()
        return result

    return run


def measure() -> Iterator[dict[str, Any]]:
    """Every kernel and problem, with and without checks."""
    from flashinfer_mla import installed

    kernels = {"mla-sm100": ours} | ({"FlashInfer": flashinfer} if installed() else {})
    for kernel, prepare in kernels.items():
        for name, lengths in CASES.items():
            run = prepare(lengths)
            for checks in (False, True):
                results = [run(Options(checks=checks)) for _ in range(RUNS)]
                yield {
                    "kernel": kernel,
                    "problem": name,
                    "checks": checks,
                    "seconds": round(min(result.seconds for result in results), 3),
                    "findings": dict(Counter(report.kind for report in results[0].reports)),
                    "instructions": sum(counts.instructions for counts in results[0].counts),
                }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("mla_sm100", "peers")]
    load = [os.getloadavg()[0]]
    torch.set_num_threads(1)
    seconds, cpu_seconds = build_seconds()
    print(
        f"build with an empty cache: {seconds:.1f} s, CPU {cpu_seconds:.1f} s, {compiler_version()}",
        flush=True,
    )
    lowering = lowering_seconds()
    print(f"lowering of the pair kernel's PTX: {lowering:.2f} s", flush=True)
    runs = []
    for run in measure():
        runs.append(run)
        with_checks = "with checks" if run["checks"] else "without checks"
        print(f"{run['kernel']}, {run['problem']}, {with_checks}: {run['seconds']:.3f} s", flush=True)
    load.append(os.getloadavg()[0])
    if options.out:
        record = {
            "environment": environment(*DISTRIBUTIONS),
            "cores": len(os.sched_getaffinity(0)),
            "compiler": compiler_version(),
            "load": [round(value, 1) for value in load],
            "wanted_s": LIMITS_S,
            "build_s": round(seconds, 1),
            "build_cpu_s": round(cpu_seconds, 1),
            "lowering_s": round(lowering, 2),
            "runs": runs,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
