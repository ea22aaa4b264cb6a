"""What of the time of gdn-mtp's calls is whose? Times kernels with stages left out, beside the whole kernels.

    python benchmarks/bench_gdn_stages.py [--batch 16 32 64] [--out FOLDER]

Calls, of fp32 and of bf16 states: without arithmetic (states are stored as they were, v as output); also
without tokens (q, k, v, gates and output); also without registers (what comes to shared memory is stored from
there); the same with slots in order instead of at random; then also without the index that names them. Beside
them an element-wise copy of as many bytes by PyTorch. Speculative steps: without arithmetic; without all but
reading the states. What is left out makes results wrong; the whole kernels are compared with float64 first,
and a row is not timed if its own is wrong. Kernels have the tactic that the whole one has by default. A time
is the median of replays of a CUDA graph, variants in turn, with the L2 cache cold. Fractions are of the copy
bandwidth measured in the same run, for the bytes of states that a call moves; of a step, for all that is
necessary, or for the states that are read.

Last, the host's microseconds for a call, of batches in turn: `Plan.run`; the launcher that it calls, with the
same arguments; a launcher that describes and checks the same ones, and launches one block that does nothing;
and one that takes a single tensor and launches one thread. So the first less the second is what `Plan.run`
does in Python, and the third less the last what the other arguments and the launch's attributes take.

Writes results.json; the exit status is 1 if a whole kernel is wrong or there is no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_gdn_spec
import torch
from _gdn_cases import HEAD_DIM, POOL_SLOTS, Call, Cell, fill_pool, make_calls, make_pool
from _gdn_spec_report import Cell as Step
from _gdn_spec_report import Row as StepRow
from _gdn_stages import EMPTY, STAGES, STEP_STAGES, StagesConfig
from _gdn_variants import Ours, progress, timed_calls
from _host_time import HostTime, time_host
from _results import results_folder
from bench_copy_floor import Copies
from bench_gdn_mtp import DISTRIBUTIONS, HOST_CASES, checked
from gdn_mtp.cute.compile import FUNCTION
from gdn_mtp.cute.kernels import KERNELS
from gdn_mtp.cute.kernels_speculative import KERNELS as STEP_KERNELS
from kernel_dispatch import as_arch
from kernel_testing import copy_bandwidth_gb_s, environment, time_cuda_us
from torch import Tensor

CALLS = [(1, False), (4, False), (8, False), (4, True)]  # T, whether every state is kept
VARIANTS = {  # of a call, what is left out last: the kernel of `StagesConfig`, whether slots lie in order
    "arithmetic": ("arithmetic", False),
    "tokens": ("tokens", False),
    "registers": ("registers", False),
    "disorder": ("registers", True),
    "index": ("index", True),
}
STATE_DTYPES = (torch.float32, torch.bfloat16)
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
        found = f"WRONG: {self.wrong}" if self.wrong else "without " + ", ".join(times)
        return f"{self.cell:<34} {self.tactic:<7} {found}"


def bound(launch: Callable[..., None], call: Call, in_order: bool = False) -> Callable[[], None]:
    """A launch with the call's arguments; in_order: on slots that lie one behind the other."""
    x = call.inputs
    state, indices = call.pool, call.indices
    if in_order:
        state = state[call.first_slot : call.first_slot + len(indices)]
        indices = torch.arange(len(indices), dtype=indices.dtype, device=indices.device)
    return functools.partial(
        launch, x["q"], x["k"], x["v"], x["a"], x["b"], x["A_log"], x["dt_bias"], HEAD_DIM**-0.5, state,
        indices, None, call.intermediate, None, call.output,
    )  # fmt: skip


def time_calls(cell: Cell, pool: Tensor, copy_gb_s: float) -> Row:
    """Check the whole kernel on one cell, and time all variants if it is right."""
    arch = as_arch(pool.device)
    whole = Ours(cell, pool.device)
    calls = make_calls(cell, pool)
    row = Row(str(cell), whole.plan.tactic, wrong=checked(whole, cell, calls[0]) or "")
    if row.wrong:
        fill_pool(pool)  # whatever it wrote there is not for the others to read
        return row
    config = KERNELS.config(cell.problem(), arch, row.tactic)
    timed = {"nothing": timed_calls(whole, calls)}
    for name, (kernel, in_order) in VARIANTS.items():
        launch = STAGES.load(StagesConfig(config, kernel), arch.name)
        timed[name] = [bound(launch, call, in_order) for call in calls]
    copies = Copies(cell.necessary_nbytes // 2, pool.device)
    row.us = time_cuda_us({**timed, "copy": copies.calls}, repeats=REPEATS, warmup=1)
    copies.check()
    row.fraction = {name: cell.necessary_nbytes / us / 1e3 / copy_gb_s for name, us in row.us.items()}
    return row


def time_steps(cell: Step, copy_gb_s: float, device: torch.device) -> Row:
    """Check the whole kernel on one cell of speculative steps, and time all variants if it is right."""
    arch = as_arch(device)
    slots = max(POOL_SLOTS, cell.B * bench_gdn_spec.cold_groups(cell, device))
    pool = make_pool(Cell(cell.H, cell.HV, cell.B, cell.T, True, False, cell.state_dtype), device, slots)
    steps = bench_gdn_spec.make_steps(cell, slots, device)
    whole = bench_gdn_spec.Ours(cell, pool)
    row = Row(str(cell), whole.tactic)
    try:
        bench_gdn_spec.check_ours(whole, steps)
    except AssertionError as error:
        row.wrong = str(error)
        return row
    variants = {"nothing": whole}
    config = STEP_KERNELS.config(cell.problem(), arch, row.tactic)
    for name in STEP_STAGES:
        variants[name] = bench_gdn_spec.Ours(cell, pool)
        variants[name].launch = STAGES.load(StagesConfig(config, name), arch.name)
    whole.cache.reset_slots(torch.arange(slots, device=device))
    indices = range(len(steps.accepted))
    timed = {name: [variant.step(steps, i) for i in indices] for name, variant in variants.items()}
    row.us = time_cuda_us(timed, repeats=bench_gdn_spec.REPEATS, warmup=1)
    measured = StepRow(cell, copy_gb_s)
    _, measured.folds_per_step, measured.pending_per_step = bench_gdn_spec.simulate(
        cell, steps, 1 + bench_gdn_spec.REPEATS
    )
    moved = dict.fromkeys(row.us, measured.necessary_nbytes)
    moved[STEP_STAGES[-1]] = cell.B * cell.slot_nbytes
    row.fraction = {name: moved[name] / us / 1e3 / copy_gb_s for name, us in row.us.items()}
    return row


def host_runs(device: torch.device) -> dict[str, Callable[[], object]]:
    """What the host's time is taken of."""
    arch = as_arch(device)
    runs: dict[str, Callable[[], object]] = {}
    for name, (T, cache) in HOST_CASES.items():
        cell = Cell(H, HV, 1, T, True, cache, torch.float32)
        call = make_calls(cell, make_pool(cell, device, 8), count=1)[0]
        whole = Ours(cell, device)
        config = KERNELS.config(cell.problem(), arch, whole.plan.tactic)
        nothing = STAGES.load(StagesConfig(config, "everything"), arch.name)
        runs[f"Plan.run, {name}"] = whole.bound(call)
        runs[f"launcher, {name}"] = bound(FUNCTION.load(config, arch.name), call)
        runs[f"empty kernel of its arguments, {name}"] = bound(nothing, call)
    empty = EMPTY.load(None, arch.name)
    return runs | {"empty kernel": functools.partial(empty, torch.zeros(1, device=device))}


def time_all_calls(
    dtype: torch.dtype, batches: Sequence[int], copy_gb_s: float, device: torch.device
) -> list[Row]:
    """The rows of the calls with states of one dtype, which share a pool; each is printed."""
    cells = [Cell(H, HV, B, T, True, cache, dtype) for T, cache in CALLS for B in batches]
    pool = make_pool(cells[0], device, max(cell.pool_slots for cell in cells))
    rows = []
    for cell in progress(cells, f"calls, {cells[0].state_name}"):
        rows.append(time_calls(cell, pool, copy_gb_s))
        print(rows[-1].line(), flush=True)
    return rows


def time_all_steps(batches: Sequence[int], copy_gb_s: float, device: torch.device) -> list[Row]:
    """The rows of speculative steps; each is printed."""
    cells = [
        Step(H, HV, B, T, dtype, bench_gdn_spec.CAPACITY[T], "auto") for T, dtype in STEPS for B in batches
    ]
    rows = []
    for cell in progress(cells, "steps"):
        rows.append(time_steps(cell, copy_gb_s, device))
        print(rows[-1].line(), flush=True)
    return rows


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json; benchmarks/results/gdn_mtp-stages-<model> if not given",
    )
    return parser.parse_args(arguments)


def write_results(folder: Path, rows: Sequence[Row], host: Mapping[str, HostTime], **facts: Any) -> Path:
    """Write results.json; returns its path."""
    facts["host_us"] = {name: us.median for name, us in host.items()}
    facts["host_us_range"] = {name: [us.lowest, us.highest] for name, us in host.items()}
    content = {**facts, "rows": [vars(row) for row in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print(f"bench_gdn_stages: needs a CUDA device; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record = environment(*DISTRIBUTIONS)
    command = shlex.join(["python", "benchmarks/bench_gdn_stages.py", *arguments])
    print(*(f"{name} {value}" for name, value in record.items()), sep=", ")
    copy_gb_s = copy_bandwidth_gb_s(device)
    print(f"copy bandwidth {copy_gb_s:.0f} GB/s; us and fraction of it, by what is left out")
    rows: list[Row] = []
    for dtype in STATE_DTYPES:
        rows += time_all_calls(dtype, options.batch, copy_gb_s, device)
    rows += time_all_steps(options.batch, copy_gb_s, device)
    host = time_host(host_runs(device))
    print("host us per call, median of batches (lowest to highest):")
    print(*(f"{name}: {us}" for name, us in host.items()), sep="\n")
    out = options.out or results_folder("gdn_mtp-stages", record["device"])
    facts = {"environment": record, "date": time.strftime("%Y-%m-%d"), "command": command}
    print(f"wrote {write_results(out, rows, host, **facts, copy_gb_s=copy_gb_s)}")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
