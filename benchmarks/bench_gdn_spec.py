"""Times a step of speculative decoding on gdn-mtp's compact cache beside FlashInfer's caching path.

    python benchmarks/bench_gdn_spec.py
    python benchmarks/bench_gdn_spec.py --heads 16/16/32 --batch 1 64 --tokens 4 --peers none
    python benchmarks/bench_gdn_spec.py --tactics --peers none

A step verifies T tokens per request and makes the accepted ones current. Ours: one `gdn_mtp.verify`, which
accepts tokens of the step before and folds them into the pool where that is due. FlashInfer: its verify,
which stores the state after every token, and a copy of each request's accepted state to the pool, in one
kernel that reads and writes them once. How many tokens a request accepts is random, 1 to T, and cursors
advance: a graph has several steps of every request, and after the replays the cursors are compared with a
simulation of them, which also counts the folds and the pending tokens that were read.

Before it is timed, ours runs a few steps of which outputs and final states are compared with float64 decoding
of the accepted tokens alone, FlashInfer's one step, likewise. Ours is not timed if it is wrong; FlashInfer's
is, its time marked, and no ratio is made of it. A time is the median of replays of a CUDA graph, variants in
turn, every step on slots that are not in the L2 cache. Necessary bytes are those of states read, states
written by folds, the ring's entries read and written, q, k, v and the output; the ceiling is the copy
bandwidth measured in the same run. The memory compared is that of a slot of the cache with that of a request
in a buffer of the states after every token.

The exit status is 1 if ours is wrong or there is no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gdn_mtp
import torch
from _gdn_cases import (
    HEAD_DIM,
    OUR_ERROR,
    PEER_ERROR,
    POOL_SLOTS,
    STATE_DTYPES,
    UNIT_ROUNDOFF,
    checked_requests,
    parse_heads,
)
from _gdn_spec_report import Cell, Row, verdicts
from _gdn_variants import import_peer, progress
from _results import results_folder
from gdn_mtp import SpeculativeCache
from gdn_mtp.reference import gated_delta_rule_reference
from kernel_dispatch import as_arch, resolve
from kernel_testing import (
    assert_close_elementwise,
    calls_for_cold_l2,
    copy_bandwidth_gb_s,
    environment,
    time_cuda_us,
)
from torch import Tensor

HEADS = ("16/16/32", "16/16/64")
BATCHES = (1, 4, 16, 32, 64, 128, 256)
TOKENS = (4, 8)
CAPACITY = {4: 16, 8: 24}  # of the ring, by T
FOLDS = ("auto", "always", "full")

STEPS_PER_SLOT = 8  # in a graph, at least
MIN_STEPS = 24  # of a graph
REPEATS = 9
CHECKED_STEPS = 9
CHECKED_REQUESTS = 3
DISTRIBUTIONS = ("gdn-mtp", "kernel-dispatch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "triton")


@dataclass
class Steps:
    """The tensors of a graph's steps: step i is of slots `groups[i % len(groups)]`.

    tokens: q, k, v, a, b of each step. accepted: [steps, B] int32, of the window before.
    """

    tokens: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    groups: list[Tensor]
    accepted: Tensor
    output: Tensor

    def slots(self, step: int) -> Tensor:
        return self.groups[step % len(self.groups)]


def cold_groups(cell: Cell, device: torch.device) -> int:
    """Sets of B slots in rotation: so many that a step finds none of its states in the L2 cache."""
    return calls_for_cold_l2(cell.B * cell.slot_nbytes, device)


def make_steps(cell: Cell, pool_size: int, device: torch.device) -> Steps:
    """Random tokens and accept counts, and groups of slots drawn from the pool."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    B, T, H, HV = cell.B, cell.T, cell.H, cell.HV
    count = cold_groups(cell, device)
    steps = max(MIN_STEPS, STEPS_PER_SLOT * count)
    order = torch.randperm(pool_size, generator=generator, device=device).to(torch.int32)
    tokens = []
    for _ in range(min(steps, MIN_STEPS + 1)):
        x = {"q": normal(B, T, H, HEAD_DIM), "k": normal(B, T, H, HEAD_DIM)}
        tokens.append(x | {"v": normal(B, T, HV, HEAD_DIM), "a": normal(B, T, HV), "b": normal(B, T, HV)})
    accepted = torch.randint(1, T + 1, (steps, B), generator=generator, device=device, dtype=torch.int32)
    return Steps(
        tokens=tokens,
        weights={"A_log": 0.5 * normal(HV, dtype=torch.float32), "dt_bias": normal(HV, dtype=torch.float32)},
        groups=[order[i * B : (i + 1) * B].contiguous() for i in range(count)],
        accepted=accepted,
        output=torch.empty_like(tokens[0]["v"]),
    )


class Ours:
    """The kernel of one tactic, and a pool and a cache of its own, which its steps advance."""

    def __init__(self, cell: Cell, pool: Tensor, tactic: str | None = None) -> None:
        device = pool.device
        problem, arch = cell.problem(), as_arch(device)
        chosen = resolve(problem, arch, "cute", tactic)
        self.cell, self.pool = cell, pool.clone()
        self.tactic = chosen.tactic
        self.launch = chosen.kernel.prepare(problem, arch, device, self.tactic)
        self.cache = SpeculativeCache(
            len(pool), cell.H, cell.HV, HEAD_DIM, HEAD_DIM,
            max_tokens=cell.T, capacity=cell.capacity, device=device,
        )  # fmt: skip

    def step(self, steps: Steps, i: int) -> Callable[[], None]:
        """Step i of a graph."""
        x, w = steps.tokens[i % len(steps.tokens)], steps.weights
        arguments = (
            x["q"], x["k"], x["v"], x["a"], x["b"], w["A_log"], w["dt_bias"], HEAD_DIM**-0.5, self.pool,
            steps.slots(i), *self.cache.tensors, steps.accepted[i], None, None, None, self.cell.fold_above,
            steps.output,
        )  # fmt: skip
        return functools.partial(self.launch, *arguments)


class FlashInfer:
    """Its verify with every intermediate state, then the accepted ones copied to the pool."""

    def __init__(self, cell: Cell, pool: Tensor) -> None:
        if cell.B * cell.intermediate_nbytes // cell.state_dtype.itemsize >= 2**31:
            raise ValueError("has 32-bit offsets into the intermediate states, which are too many")
        module = import_peer("flashinfer.gdn_decode")
        fp32 = cell.state_dtype == torch.float32
        self.verify = module.gated_delta_rule_mtp if fp32 else module.gated_delta_rule_decode_pretranspose
        self.state = {} if fp32 else {"state": None}
        self.cell, self.pool = cell, pool.clone()
        shape = (cell.B, cell.T, cell.HV, HEAD_DIM, HEAD_DIM)
        count = calls_for_cold_l2(cell.B * cell.intermediate_nbytes, pool.device) - 1
        nan = float("nan")
        self.buffers = [
            torch.full(shape, nan, dtype=cell.state_dtype, device=pool.device) for _ in range(count)
        ]

    def step(self, steps: Steps, i: int) -> Callable[[], None]:
        """Step i of a graph."""
        from _gdn_gather import gather_accepted

        buffer = self.buffers[i % len(self.buffers)]
        slots, accepted = steps.slots(i).clone(), steps.accepted[i]  # it asks for 16-byte alignment
        arguments = steps.tokens[i % len(steps.tokens)] | steps.weights | self.state

        def run() -> None:
            self.verify(
                **arguments, initial_state=self.pool, initial_state_indices=slots, output=steps.output,
                intermediate_states_buffer=buffer, disable_state_update=True,
            )  # fmt: skip
            gather_accepted(buffer, accepted, self.pool, slots)

        return run


def simulate(cell: Cell, steps: Steps, rounds: int) -> tuple[Tensor, float, float]:
    """Ring lengths [groups, B] after `rounds` of all steps; folds and pending tokens of a request and step.

    The first round, in which rings fill up, is not counted.
    """
    accepted = steps.accepted.cpu()
    count = len(steps.groups)
    lengths = torch.zeros(count, cell.B, dtype=torch.int64)
    verified = [False] * count
    folds = pending = counted = 0
    for number in range(rounds):
        for i, accept in enumerate(accepted):
            group = i % count
            length = lengths[group]
            if verified[group]:
                length += accept
            verified[group] = True
            full = length > cell.fold_above
            if number or rounds == 1:
                pending += int(length.sum())
                folds += int(full.sum())
                counted += cell.B
            length[full] = 0
    return lengths, folds / counted, pending / counted


def check_ours(ours: Ours, steps: Steps) -> None:
    """Raises AssertionError unless a few steps of the first group agree with float64 decoding.

    Compared are the outputs of the last step and the states it would commit, of some requests.
    """
    cell, pool = ours.cell, ours.pool
    slots = steps.groups[0]
    device = slots.device
    rows = torch.linspace(0, cell.B - 1, min(cell.B, CHECKED_REQUESTS), device=device).round().long()
    entry = pool[slots[rows].long()].clone()
    taken: list[list[dict[str, Tensor]]] = [[] for _ in rows]
    window: list[dict[str, Tensor]] = []
    count = len(steps.groups)
    indices = [i for i in range(len(steps.accepted)) if i % count == 0][:CHECKED_STEPS]
    for i in indices:
        steps.output.fill_(float("nan"))
        ours.step(steps, i)()
        for r, row in enumerate(rows.tolist()):
            if window:
                number = int(steps.accepted[i, row])
                taken[r].append({name: x[row : row + 1, :number] for name, x in window[-1].items()})
        window.append(steps.tokens[i % len(steps.tokens)])
    states = gdn_mtp.materialize(pool, slots, ours.cache, None, backend="cute")
    assert_written(steps.output)
    for r, row in enumerate(rows.tolist()):
        history = {name: torch.cat([part[name] for part in taken[r]], 1) for name in window[0]}
        number = history["q"].shape[1]
        tokens = {name: torch.cat([x, window[-1][name][row : row + 1]], 1) for name, x in history.items()}
        rounding = UNIT_ROUNDOFF[cell.state_dtype] if cell.state_dtype != torch.float32 else 0.0
        error = (number + cell.T) * OUR_ERROR + CHECKED_STEPS * rounding
        compare(cell, steps, tokens, entry[r : r + 1], number, steps.output[row], states[row], error)


def fault_of(peer: FlashInfer, steps: Steps) -> str:
    """Run FlashInfer's first step; what is wrong with outputs or accepted states of some requests, or ""."""
    cell, slots = peer.cell, steps.slots(0).long()
    rows = checked_requests(cell.B, slots.device)
    entry = peer.pool[slots[rows]]
    steps.output.fill_(float("nan"))
    peer.step(steps, 0)()
    error = cell.T * PEER_ERROR[cell.state_dtype]
    try:
        assert_written(steps.output)
        for r, row in enumerate(rows.tolist()):
            tokens = {name: x[row : row + 1] for name, x in steps.tokens[0].items()}
            number, state = int(steps.accepted[0, row]), peer.pool[slots[row]]
            compare(cell, steps, tokens, entry[r : r + 1], number, steps.output[row], state, error)
    except AssertionError as found:
        return str(found)
    return ""


def assert_written(output: Tensor) -> None:
    """Raises AssertionError unless the output of a step, which was NaN before it, is finite everywhere."""
    if not bool(output.isfinite().all()):
        raise AssertionError("output: not finite everywhere; it was NaN before the step")


def compare(
    cell: Cell, steps: Steps, tokens: dict[str, Tensor], entry: Tensor, number: int, output: Tensor,
    state: Tensor, error: float,
) -> None:  # fmt: skip
    """Raises AssertionError unless a request's results are those of float64 decoding from state `entry`.

    tokens: of the request alone; the last T of them are the window that `output` [T, HV, V] belongs to.
    state: [HV, V, K], after the first `number` tokens. error: of the arithmetic, in norms of a state row.
    """
    expected = gated_delta_rule_reference(**tokens, **steps.weights, state=entry)
    expected_state = expected.intermediate_states[0, number - 1]
    norm = max(x.double().norm(dim=-1).max().item() for x in (entry, expected_state))
    atol, unit = norm * error, UNIT_ROUNDOFF[torch.bfloat16]
    expected_output = expected.output[0, -cell.T :]
    assert_close_elementwise(output, expected_output, HEAD_DIM**-0.5 * atol, unit, "output")
    assert_close_elementwise(state, expected_state, atol, UNIT_ROUNDOFF[cell.state_dtype], "state")


def measure(cell: Cell, row: Row, pool: Tensor, options: argparse.Namespace) -> None:
    """Check and time every variant of one cell."""
    device = pool.device
    steps = make_steps(cell, len(pool), device)
    ours = {"ours": Ours(cell, pool)}
    row.tactic = ours["ours"].tactic
    row.cache_nbytes = ours["ours"].cache.nbytes // len(pool)
    if options.tactics is not None:
        problem, arch = cell.problem(), as_arch(device)
        names = resolve(problem, arch, "cute").kernel.tactics(problem, arch)
        wanted = [name for name in options.tactics or names if name in names and name != row.tactic]
        ours |= {name: Ours(cell, pool, name) for name in wanted}
    for variant in ours.values():
        try:
            check_ours(variant, steps)
        except AssertionError as error:
            row.wrong = f"{variant.tactic}: {error}"
            return
        variant.cache.reset_slots(torch.arange(len(pool), device=device))
        variant.pool.copy_(pool)
    indices = range(len(steps.accepted))
    timed = {name: [variant.step(steps, i) for i in indices] for name, variant in ours.items()}
    if "flashinfer" in options.peers:
        try:
            peer = FlashInfer(cell, pool)
            fault = fault_of(peer, steps)
            if fault:
                row.failed["flashinfer"] = fault
            timed["flashinfer"] = [peer.step(steps, i) for i in indices]
        except Exception as error:
            row.notes["flashinfer"] = f"{type(error).__name__}: {str(error)[:300]}"
    row.us = time_cuda_us(timed, repeats=REPEATS, warmup=1)
    lengths, row.folds_per_step, row.pending_per_step = simulate(cell, steps, 1 + REPEATS)
    for variant in ours.values():
        for group, expected in zip(steps.groups, lengths, strict=True):
            found = variant.cache.cursor[group.long(), 1].cpu().long()
            if not torch.equal(found, expected):
                row.wrong = (
                    f"{variant.tactic}: rings have lengths {found.tolist()}, expected {expected.tolist()}"
                )
                return


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--heads", nargs="+", default=HEADS, help="query/key/value heads; default %(default)s"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--capacity", nargs="+", type=int, help="of the rings; by default 16 for T = 4, 24 for 8"
    )
    parser.add_argument(
        "--fold",
        nargs="+",
        type=parse_fold,
        default=("auto",),
        help="auto, always, full, or numbers of tokens",
    )
    parser.add_argument("--state-dtype", nargs="+", choices=STATE_DTYPES, default=tuple(STATE_DTYPES))
    parser.add_argument("--peers", nargs="+", choices=("flashinfer", "none"), default=("flashinfer",))
    parser.add_argument("--tactics", nargs="*", help="time these tactics of ours as well, or all of them")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args(arguments)
    try:
        options.heads = [parse_heads(text) for text in options.heads]
    except ValueError as error:
        parser.error(f"--heads: {error}")
    return options


def parse_fold(text: str) -> str | int:
    """A policy's name, or a number of pending tokens beyond which a verify folds."""
    if text in FOLDS:
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(FOLDS)} or a number")
    return int(text)


def make_cells(options: argparse.Namespace) -> list[Cell]:
    """The rows asked for; those that share a pool follow each other."""
    return [
        Cell(H, HV, B, T, STATE_DTYPES[name], capacity, fold)
        for H, HV in options.heads
        for name in options.state_dtype
        for T in options.tokens
        for capacity in options.capacity or (CAPACITY.get(T, 32),)
        for fold in options.fold
        for B in options.batch
        if capacity >= 2 * T and (isinstance(fold, str) or fold <= capacity - 2 * T)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print(f"bench_gdn_spec: needs a CUDA device; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    record = environment(*DISTRIBUTIONS, *(["flashinfer-python"] if "flashinfer" in options.peers else []))
    command = shlex.join(["python", "benchmarks/bench_gdn_spec.py", *arguments])
    folder = options.out or results_folder("gdn_spec", record["device"])
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"environment": record, "command": command, "date": time.strftime("%Y-%m-%d")}
    print(command)
    print(*(f"{name} {value}" for name, value in record.items()), sep=", ", flush=True)
    copy_gb_s = copy_bandwidth_gb_s(device)
    content["copy_gb_s"] = {"start": copy_gb_s}
    print(f"copy bandwidth {copy_gb_s:.0f} GB/s, read plus written", flush=True)
    rows: list[Row] = []
    pool, pool_key = torch.empty(0, device=device), None
    for cell in progress(make_cells(options), "time"):
        slots = max(POOL_SLOTS, cell.B * cold_groups(cell, device))
        key = (cell.HV, cell.state_dtype, slots)
        if key != pool_key:
            pool = torch.empty(0, device=device)
            torch.cuda.empty_cache()
            shape = (slots, cell.HV, HEAD_DIM, HEAD_DIM)
            pool, pool_key = torch.empty(shape, dtype=cell.state_dtype, device=device), key
        pool.normal_(std=0.5)
        row = Row(cell, copy_gb_s)
        measure(cell, row, pool, options)
        rows.append(row)
        print(row.line(), flush=True)
        content["rows"] = [row.record() for row in rows]
        (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content["copy_gb_s"]["end"] = copy_bandwidth_gb_s(device)
    content["targets"] = verdicts(rows)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        for variant, note in row.notes.items():
            print(f"{variant} is missing at {row.cell}: {note}")
        for variant, fault in row.failed.items():
            print(f"{variant} is wrong at {row.cell}: {fault}")
    print(f"copy bandwidth at the end {content['copy_gb_s']['end']:.0f} GB/s")
    print(*(f"{name}: {verdict}" for name, verdict in content["targets"].items()), sep="\n")
    print(f"wrote {folder / 'results.json'}")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
