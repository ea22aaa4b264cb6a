"""What of the time of gdn-mtp's calls is whose? Times kernels with stages left out, beside the whole kernels.

    python benchmarks/bench_gdn_stages.py [--batch 16 32 64] [--out FOLDER]

Calls: without arithmetic (states are stored as they were, v as output); also without tokens (q, k, v, gates
and output); also without registers (what comes to shared memory is stored from there); the same with slots
in order instead of at random; then also without the index that names them. Beside them an element-wise copy
of as many bytes by PyTorch. Speculative steps: without arithmetic; without all but reading the states. What
is left out makes results wrong; the whole kernels are compared with float64 first. Kernels have the tactic
that the whole one has by default. A time is the median of replays of a CUDA graph, variants in turn, with
the L2 cache cold. Fractions are of the copy bandwidth measured in the same run, for the bytes of states that
a call moves; of a step, for all that is necessary, or for the states that are read.

Last, the host's microseconds for a call, and for a call of a kernel that takes one tensor and does nothing.
Writes results.json; the exit status is 1 if a whole kernel is wrong or there is no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_copy_floor
import bench_gdn_mtp
import bench_gdn_spec
import torch
from _gdn_cases import POOL_SLOTS, Call, Cell, make_calls, make_pool
from _gdn_stages import EMPTY, STAGES, STEP_STAGES, StagesConfig
from _gdn_variants import Ours, progress, timed_calls
from bench_gdn_mtp import DISTRIBUTIONS, checked, host_us
from gdn_mtp.cute.kernels import KERNELS
from gdn_mtp.cute.kernels_speculative import KERNELS as STEP_KERNELS
from kernel_dispatch import as_arch
from kernel_testing import copy_bandwidth_gb_s, environment, time_cuda_us
from torch import Tensor

CALLS = [(1, False), (4, False), (8, False), (4, True)]  # T, whether every state is kept
STEPS = [(4, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32), (8, torch.float32)]
H, HV = 16, 32
REPEATS = 15


@dataclass
class Row:
    """The times of one cell; `us` and `fraction` by what is left out, "nothing" of the whole kernel."""

    cell: str
    tactic: str
    us: dict[str, float] = field(default_factory=dict)
    fraction: dict[str, float] = field(default_factory=dict)
    wrong: str = ""

    def line(self) -> str:
        times = [f"{name} {us:.2f} ({self.fraction[name]:.3f})" for name, us in self.us.items()]
        return f"{self.cell:<34} {self.tactic:<6} without " + ", ".join(times) + self.wrong


def stage_call(launch: Callable[..., None], call: Call, without: str) -> Callable[[], None]:
    """A call of a kernel with stages left out."""
    x = call.inputs
    state, indices = call.pool, call.indices
    in_order = slice(call.first_slot, call.first_slot + len(indices))
    if without == "disorder":
        indices = torch.arange(len(state), dtype=indices.dtype, device=state.device)[in_order]
    if without == "index":
        state = state[in_order]
    return functools.partial(
        launch, x["q"], x["k"], x["v"], x["a"], x["b"], x["A_log"], x["dt_bias"], 1.0, state, indices, None,
        call.intermediate, None, call.output,
    )  # fmt: skip


def time_calls(cell: Cell, pool: Tensor, copy_gb_s: float) -> Row:
    """Check the whole kernel on one cell, and time all variants."""
    arch = as_arch(pool.device)
    whole = Ours(cell, pool.device)
    calls = make_calls(cell, pool)
    row = Row(str(cell), whole.plan.tactic)
    row.wrong = checked(whole, cell, calls[0]) or ""
    config = KERNELS.config(cell.problem(), arch, row.tactic)
    timed = {"nothing": timed_calls(whole, calls)}
    for name in ("arithmetic", "tokens", "registers", "disorder", "index"):
        kernel = "registers" if name == "disorder" else name
        launch = STAGES.load(StagesConfig(config, kernel), arch.name)
        timed[name] = [stage_call(launch, call, name) for call in calls]
    row.us = time_cuda_us(timed, repeats=REPEATS, warmup=1)
    row.us["copy"] = bench_copy_floor.measure(cell.necessary_nbytes // 2, pool.device)
    row.fraction = {name: cell.necessary_nbytes / us / 1e3 / copy_gb_s for name, us in row.us.items()}
    return row


def time_steps(cell: bench_gdn_spec.Cell, copy_gb_s: float, device: torch.device) -> Row:
    """Check the whole kernel on one cell of speculative steps, and time all variants."""
    arch = as_arch(device)
    slots = max(POOL_SLOTS, cell.B * cell.groups(device))
    pool = make_pool(Cell(cell.H, cell.HV, cell.B, cell.T, True, False, cell.state_dtype), device, slots)
    steps = bench_gdn_spec.make_steps(cell, slots, device)
    whole = bench_gdn_spec.Ours(cell, pool)
    row = Row(str(cell), whole.tactic)
    try:
        bench_gdn_spec.check_ours(whole, steps)
    except AssertionError as error:
        row.wrong = str(error)
    variants = {"nothing": whole}
    config = STEP_KERNELS.config(cell.problem(), arch, row.tactic)
    for name in STEP_STAGES:
        variants[name] = bench_gdn_spec.Ours(cell, pool)
        variants[name].launch = STAGES.load(StagesConfig(config, name), arch.name)
    whole.cache.reset_slots(torch.arange(slots, device=device))
    indices = range(len(steps.accepted))
    timed = {name: [variant.step(steps, i) for i in indices] for name, variant in variants.items()}
    row.us = time_cuda_us(timed, repeats=bench_gdn_spec.REPEATS, warmup=1)
    measured = bench_gdn_spec.Row(cell, copy_gb_s)
    _, measured.folds_per_step, measured.pending_per_step = bench_gdn_spec.simulate(
        cell, steps, 1 + bench_gdn_spec.REPEATS
    )
    moved = dict.fromkeys(row.us, measured.necessary_nbytes)
    moved[STEP_STAGES[-1]] = cell.B * cell.slot_nbytes
    row.fraction = {name: moved[name] / us / 1e3 / copy_gb_s for name, us in row.us.items()}
    return row


def time_host(device: torch.device) -> dict[str, float]:
    """Microseconds of the host: of `Plan.run`, and of the launch of an empty kernel."""
    found = {}
    for name, (T, cache) in bench_gdn_mtp.HOST_CASES.items():
        cell = Cell(H, HV, 1, T, True, cache, torch.float32)
        call = make_calls(cell, make_pool(cell, device, 8), count=1)[0]
        found[f"Plan.run, {name}"] = host_us(Ours(cell, device).bound(call))
    empty = EMPTY.load(None, as_arch(device).name)
    found["empty kernel"] = host_us(functools.partial(empty, torch.zeros(1, device=device)))
    return found


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench_gdn_stages: needs a CUDA device; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record = environment(*DISTRIBUTIONS)
    print(*(f"{name} {value}" for name, value in record.items()), sep=", ")
    copy_gb_s = copy_bandwidth_gb_s(device)
    print(f"copy bandwidth {copy_gb_s:.0f} GB/s; us and fraction of it, by what is left out")
    cells = [Cell(H, HV, B, T, True, cache, torch.float32) for T, cache in CALLS for B in options.batch]
    pool = make_pool(cells[0], device, max(cell.pool_slots for cell in cells))
    rows: list[Row] = []
    for cell in progress(cells, "calls"):
        rows.append(time_calls(cell, pool, copy_gb_s))
        print(rows[-1].line(), flush=True)
    del pool
    steps = [
        bench_gdn_spec.Cell(H, HV, B, T, dtype, bench_gdn_spec.CAPACITY[T], "auto")
        for T, dtype in STEPS
        for B in options.batch
    ]
    for step in progress(steps, "steps"):
        rows.append(time_steps(step, copy_gb_s, device))
        print(rows[-1].line(), flush=True)
    host = time_host(device)
    print("host us:", ", ".join(f"{name} {us:.2f}" for name, us in host.items()))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {"environment": record, "date": time.strftime("%Y-%m-%d")}
        facts["command"] = shlex.join(["python", "benchmarks/bench_gdn_stages.py", *sys.argv[1:]])
        facts |= {"copy_gb_s": copy_gb_s, "host_us": host, "rows": [vars(row) for row in rows]}
        text = json.dumps(facts, indent=1) + "\n"
        (options.out / "results.json").write_text(text, encoding="utf-8")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
