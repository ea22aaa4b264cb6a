"""Times gdn-mtp's CuTe kernels beside FlashInfer and flash-linear-attention, all in one run.

    python benchmarks/bench_gdn_mtp.py
    python benchmarks/bench_gdn_mtp.py --heads 16/16/32 --batch 1 64 --tokens 4 --no-update-state
    python benchmarks/bench_gdn_mtp.py --tactics --peers none
    python benchmarks/bench_gdn_mtp.py --state-layout kv --tokens 1

Before it is timed, every variant is compared with the float64 reference at the very shape, element by element
for all requests or, of more than eight, for eight spread over the batch. Ours is not timed if it is wrong;
a peer is, and its time marked. A time is the median of replays of a CUDA graph of several calls, variants in
turn, each call on inputs and state slots of its own, with the L2 cache cold. A row is timed again, up to
three times in all, if a copy before or after it takes more than 2 % longer than at the start. Bytes counted
are those of the states read and written, and the ceiling is the copy bandwidth measured in the same run.
Ratios are a peer's time over ours.

A row that does not fit into GPU memory is left out and named. The exit status is 1 if ours is wrong or
there is no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from _gdn_cases import (
    STATE_DTYPES,
    Call,
    Cell,
    check,
    checked_requests,
    fill_pool,
    make_calls,
    make_pool,
    modes,
    needed_nbytes,
    parse_heads,
)
from _gdn_report import (
    PEER_TITLES,
    Row,
    header,
    line,
    plot,
    summary,
    summary_lines,
    tactics_line,
)
from _gdn_stages import EMPTY
from _gdn_variants import (
    PEERS,
    Ours,
    Unsupported,
    Variant,
    bound_functional,
    compile_ahead,
    make_peer,
    progress,
    tactics_of,
    timed_calls,
)
from _host_time import time_host
from _pace import STEADY, Pace
from _results import results_folder
from gdn_mtp.problem import StateLayout
from kernel_dispatch import as_arch
from kernel_testing import copy_bandwidth_gb_s, environment, time_cuda_us

HEADS = ("16/16/32", "16/16/64")
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (1, 2, 4, 8)
QUICK = {"heads": HEADS[:1], "batch": (1, 16, 128), "tokens": (1, 4)}

SECONDS_PER_VARIANT = 0.15  # aimed at, within these numbers of replays
MIN_REPEATS, MAX_REPEATS = 7, 20
MEMORY_SHARE = 0.92  # of the free GPU memory that a row may take

HOST_CASES = {"B1-T1 update": (1, False), "B1-T4 cache+update": (4, True)}

DISTRIBUTIONS = ("gdn-mtp", "kernel-dispatch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "triton")
PEER_DISTRIBUTIONS = {"flashinfer": "flashinfer-python", "fla": "fla-core"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what depends on other options is filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--heads", nargs="+", help=f"query/key/value heads; {' '.join(HEADS)} if not given")
    parser.add_argument("--batch", nargs="+", type=_positive, help=f"{_words(BATCHES)} if not given")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=_positive,
        help=f"{_words(TOKENS)} if not given",
    )
    parser.add_argument(
        "--update-state", action=flag, help="only modes that update the state, or that do not"
    )
    parser.add_argument(
        "--cache-intermediate-states",
        action=flag,
        help="only modes that store the state after each token, or that do not; T = 1 is timed with this "
        "only if asked for",
    )
    parser.add_argument("--state-dtype", nargs="+", choices=STATE_DTYPES, default=list(STATE_DTYPES))
    parser.add_argument(
        "--state-layout",
        nargs="+",
        choices=get_args(StateLayout),
        default=["vk"],
        help="vk: V-major, at slots of a pool (default); kv: K-major, of T = 1, one state per request",
    )
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, "none"), default=list(PEERS))
    parser.add_argument("--tactics", action="store_true", help="time every tactic of ours as well")
    parser.add_argument("--host", action=flag, default=True, help="measure host time per call")
    parser.add_argument("--quick", action="store_true", help="few shapes and replays, for a first look")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="processes that compile before anything is timed (default %(default)s); 0 compiles one by one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json and plot.png; benchmarks/results/gdn_mtp-<model> if not given",
    )
    options = parser.parse_args(arguments)
    if "none" in options.peers:
        if len(options.peers) > 1:
            parser.error("--peers none excludes others")
        options.peers = []
    options.peers = [peer for peer in PEERS if peer in options.peers]
    if options.heads is None:
        options.heads = QUICK["heads"] if options.quick else HEADS
    if options.batch is None:
        options.batch = QUICK["batch"] if options.quick else BATCHES
    if options.tokens is None:
        options.tokens = QUICK["tokens"] if options.quick else TOKENS
    try:
        options.heads = [parse_heads(text) for text in options.heads]
    except ValueError as error:
        parser.error(f"--heads: {error}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)


def _words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def make_cells(options: argparse.Namespace) -> list[Cell]:
    """The rows asked for, in order; those that share a pool follow each other."""
    cells = []
    flags = modes(options.update_state, options.cache_intermediate_states)
    for (H, HV), name, T, (update, cache), layout in itertools.product(
        options.heads, options.state_dtype, options.tokens, flags, options.state_layout
    ):
        if T == 1 and cache and not options.cache_intermediate_states:
            continue
        if layout == "kv" and (T > 1 or cache):
            continue
        cells += [Cell(H, HV, B, T, update, cache, STATE_DTYPES[name], layout) for B in options.batch]
    return cells


def checked(variant: Variant, cell: Cell, call: Call) -> str | None:
    """What is wrong with the results of one call, or None; outputs start as NaN."""
    requests = checked_requests(cell.B, call.pool.device)
    before = variant.before(call, requests)
    call.output.fill_(float("nan"))
    if call.intermediate is not None:
        call.intermediate[requests] = float("nan")
    returned = variant.run(call)
    outcome = variant.outcome(call, returned, requests)
    try:
        check(cell, call, requests, before, outcome, variant.error)
    except AssertionError as error:
        return str(error)
    return None


def variants_of(cell: Cell, row: Row, options: argparse.Namespace, device: torch.device) -> list[Variant]:
    """All variants that the cell can be timed with; `row.notes` says why another cannot."""
    own = Ours(cell, device)
    row.tactic = own.plan.tactic
    variants: list[Variant] = [own]
    for peer in options.peers:
        try:
            variants.append(make_peer(peer, cell, device))
        except (Unsupported, ImportError) as error:
            row.notes[peer] = str(error)
    if options.tactics:
        others = [tactic for tactic in tactics_of(cell, device) if tactic != row.tactic]
        variants += [Ours(cell, device, tactic) for tactic in others]
    return variants


def measure(cell: Cell, row: Row, pool: torch.Tensor, options: argparse.Namespace, pace: Pace) -> None:
    """Check and time every variant of one cell."""
    calls = make_calls(cell, pool)
    timed: dict[str, list[Callable[[], object]]] = {}
    for variant in variants_of(cell, row, options, pool.device):
        try:
            wrong = checked(variant, cell, calls[0])
        except Exception as error:
            if isinstance(variant, Ours):
                raise
            row.notes[variant.name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        if wrong is None or not isinstance(variant, Ours):
            timed[variant.name] = timed_calls(variant, calls)
        if wrong is not None:
            row.failed[variant.name] = wrong
            fill_pool(pool)  # whatever it wrote there is not for the others to read
    # Not timed but assumed, to choose how often to repeat.
    graph_seconds = len(calls) * (4e-6 + cell.necessary_nbytes / (0.7e9 * row.copy_gb_s))
    wanted = int(SECONDS_PER_VARIANT / graph_seconds)
    row.calls = len(calls)
    row.repeats = MIN_REPEATS if options.quick else min(MAX_REPEATS, max(MIN_REPEATS, wanted))
    steady = pace.steady(lambda: time_cuda_us(timed, repeats=row.repeats, warmup=1))
    row.us, row.slowdown, row.attempts = steady
    if row.failed:
        fill_pool(pool)


def measure_all(
    cells: Sequence[Cell],
    options: argparse.Namespace,
    copy_gb_s: float,
    device: torch.device,
    results: Results,
) -> None:
    """Measure the cells; `results` is written and a line printed after each."""
    pool_key: tuple[object, ...] = ()
    pool = torch.empty(0, device=device)
    slots = max(cell.pool_slots for cell in cells)
    pace = Pace.on(device)
    bar = progress(cells, "time")
    show = bar.write if sys.stderr.isatty() else print
    for cell in bar:
        bar.set_postfix_str(str(cell), refresh=False)
        key = (cell.H, cell.HV, cell.state_dtype)
        if key != pool_key:
            pool, pool_key = torch.empty(0, device=device), ()
        torch.cuda.empty_cache()
        needed = needed_nbytes(cell, device) + (0 if pool_key else slots * cell.slot_nbytes)
        free = int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        if needed > free:
            results.left_out.append(f"{cell}: needs {_gib(needed)}, {_gib(free)} are usable")
            continue
        if not pool_key:
            pool, pool_key = make_pool(cell, device, slots), key
        row = Row(cell, copy_gb_s)
        measure(cell, row, pool, options, pace)
        results.add(row)
        lines = [line(row, options.peers)] + ([tactics_line(row)] if options.tactics else [])
        show("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def measure_host(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Host microseconds by case and way to call, in turn; with them those of a kernel that does nothing."""
    empty = functools.partial(EMPTY.load(None, as_arch(device).name), torch.zeros(1, device=device))
    found: dict[str, dict[str, float]] = {}
    for name, (T, cache) in HOST_CASES.items():
        H, HV = options.heads[0]
        cell = Cell(H, HV, 1, T, True, cache, torch.float32)
        call = make_calls(cell, make_pool(cell, device, 8), count=1)[0]
        runs: dict[str, Callable[[], object]] = {
            "Plan.run": Ours(cell, device).bound(call),
            "functional": bound_functional(cell, call),
            "empty kernel": empty,
        }
        for peer in options.peers:
            try:
                run = functools.partial(make_peer(peer, cell, device).run, call)
                run()
            except Exception as error:
                print(f"{name}: no host time of {peer}: {type(error).__name__}: {str(error)[:200]}")
            else:
                runs[peer] = run
        found[name] = {way: us.median for way, us in time_host(runs).items()}
    return found


class Results:
    """What results.json holds; written after every row, so that a run that is cut short leaves something."""

    def __init__(self, folder: Path, peers: Sequence[str], **facts: Any) -> None:
        self.path = folder / "results.json"
        self.peers = peers
        self.facts = facts
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        records = [row.record(self.peers) for row in self.rows]
        content = {**self.facts, "left_out": self.left_out, "rows": records}
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def notes(self) -> list[str]:
        """Once each, what kept a variant or a row from being timed; rows that were timed again; all wrong."""
        why: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for missing in row.notes.items():
                why.setdefault(missing, []).append(str(row.cell))
        lines = [
            f"{variant} is missing from {len(cells)} rows, the first {cells[0]}: {note}"
            for (variant, note), cells in why.items()
        ]
        lines += [f"left out: {sentence}" for sentence in self.left_out]
        lines += [
            f"{'SLOW: ' * (row.slowdown > STEADY)}{row.cell}: timed {row.attempts} times; a copy took "
            f"{row.slowdown:.3f} of its time at the start"
            for row in self.rows
            if row.attempts > 1
        ]
        return lines + [
            f"WRONG: {variant} at {row.cell}: {wrong}"
            for row in self.rows
            for variant, wrong in row.failed.items()
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    cells = make_cells(options)
    if not cells:
        print("bench_gdn_mtp: the options leave no shape to time", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"bench_gdn_mtp: needs a CUDA device; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record = environment(*DISTRIBUTIONS, *(PEER_DISTRIBUTIONS[peer] for peer in options.peers))
    command = shlex.join(["python", "benchmarks/bench_gdn_mtp.py", *arguments])
    date = time.strftime("%Y-%m-%d")
    out = options.out or results_folder("gdn_mtp", record["device"])
    results = Results(out, options.peers, environment=record, command=command, date=date)
    print(command)
    print(*(f"{name} {value}" for name, value in record.items()), sep=", ", flush=True)

    if options.jobs > 0:
        print(f"compiling with {options.jobs} processes", file=sys.stderr)
        for problem in compile_ahead(options.jobs, cells, options.peers, options.tactics):
            print(f"while compiling: {problem}", file=sys.stderr)
    copy_gb_s = copy_bandwidth_gb_s(device)
    print(f"copy bandwidth {copy_gb_s:.0f} GB/s, read plus written")
    print("GB/s: bytes of the states read and written over our time; ratio: a peer's time over ours")
    print("!: a time of wrong results")
    if "fla" in options.peers:
        print("FLA: without gathering states from the pool, and with gates computed beforehand")
    print(header(options.peers), flush=True)
    measure_all(cells, options, copy_gb_s, device, results)
    copy_end_gb_s = copy_bandwidth_gb_s(device)
    host = measure_host(options, device) if options.host else {}
    verdicts = summary(results.rows, host)
    results.facts |= {"copy_gb_s": {"start": copy_gb_s, "end": copy_end_gb_s}, "host_us": host}
    results.facts["targets"] = verdicts
    results.write()

    print("", *results.notes(), f"copy bandwidth at the end {copy_end_gb_s:.0f} GB/s", sep="\n")
    for case, times in host.items():
        listed = ", ".join(f"{PEER_TITLES.get(name, name)} {us:.2f}" for name, us in times.items())
        print(f"host us per call, {case}: {listed}")
    print(*summary_lines(verdicts), sep="\n")
    no_plot = plot(results.rows, record, date, out / "plot.png")
    print(f"wrote {results.path}" + (f"; skipped the plot: {no_plot}" if no_plot else " and plot.png"))
    return 1 if any(row.failed.keys() - set(PEERS) for row in results.rows) else 0  # also a tactic of ours


if __name__ == "__main__":
    sys.exit(main())
