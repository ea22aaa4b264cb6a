"""Autotuning: inside `with autotune(...)` each bucket's candidates are timed once, and the fastest is kept.

An operation calls `choose` where it would call `resolve`, on tensors that it is about to use. Outside the
context `choose` is `resolve`, which asks for the tuned choice and else takes the heuristic's.

How a candidate is timed: compiled or loaded first, then warm-up runs, then the median of the repeats. On a
CUDA device each repeat is timed by events on the current stream with a cold L2 cache (a buffer of twice its
size is written before each), on the CPU by the wall clock with warm caches.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ._callers import warn_caller
from .arch import Arch
from .errors import ArgumentError, CompilationForbiddenError, NoKernelError
from .providers import Problem, check_problem
from .resolution import Selection, candidates, resolve
from .tuning import bucket_key, invalidate_plans, key_digest, lookup, put_in_effect
from .tuning_store import Choice, TuningStore, check_file

WARMUP_RUNS = 3
MAX_REPEATS = 20
MIN_REPEATS = 3
TIME_BUDGET_US = 200_000  # a candidate slower than this in total stops after MIN_REPEATS; it will hardly win

MakeRun = Callable[[Selection], Callable[[], None]]
Snapshot = Callable[[], Callable[[], None]]

_active: list[Tuner] = []
_active_lock = threading.Lock()
_profiling_lock = threading.RLock()  # one candidate at a time: timings must not disturb each other


class Tuner:
    """One `autotune` block: where its choices are saved, and which buckets it has met.

    choices: by key digest, what the file held and the choice of every bucket met in the block.
    """

    def __init__(self, store: TuningStore | None, progress: bool) -> None:
        self._store = store
        self._progress = progress
        self.choices: dict[str, Choice] = {}
        if store is not None:
            store.check_writable()
            self.choices.update(store.read())

    def tune(
        self, problem: Problem, arch: Arch, device: torch.device, make_run: MakeRun, snapshot: Snapshot
    ) -> None:
        """Sees to it that the problem's bucket has a choice in effect and in the file; see `choose`."""
        key = bucket_key(problem, arch)
        choice = lookup(key)
        if choice is None:
            contenders = candidates(problem, arch)
            if len(contenders) < 2:
                return
            _reject_capture(problem, device)
            fastest = self._fastest(problem, arch, device, contenders, make_run, snapshot)
            if fastest is None:
                return
            choice = Choice(key, *fastest)
            put_in_effect({key_digest(key): choice})
        self._save(key_digest(key), choice)

    def _fastest(
        self,
        problem: Problem,
        arch: Arch,
        device: torch.device,
        contenders: Sequence[Selection],
        make_run: MakeRun,
        snapshot: Snapshot,
    ) -> tuple[str, str, float] | None:
        """(provider, tactic, median in µs) of the fastest contender, the earlier one of a tie.

        None if a contender refused the caller's arguments. Raises the ArgumentError if all did, and
        NoKernelError if all failed.
        """
        timed: list[tuple[str, str, float]] = []
        failures: list[str] = []
        refusals: list[ArgumentError] = []
        title = f"tuning {problem.describe()}"
        bar = tqdm(contenders, title, unit="candidate", file=sys.stderr, disable=not self._progress)
        for selection in bar:
            name, tactic = selection.provider.name, selection.tactic
            restore = snapshot()
            try:
                timed.append((name, tactic, measure_us(make_run(selection), device, arch.l2_bytes)))
            except CompilationForbiddenError:
                raise
            except Exception as error:  # a candidate may fail in any way; it is reported and left out
                failures.append(f"{name} {tactic}: {type(error).__name__}: {error}")
                remark = ""
                if isinstance(error, ArgumentError):
                    refusals.append(error)
                    remark = "; this call's arguments do not fit it, so no choice is kept"
                warn_caller(f"{title} leaves out {failures[-1]}{remark}", problem)
            finally:
                restore()
        if len(refusals) == len(contenders):
            raise refusals[0]
        if not timed:
            listed = "\n  ".join(failures)
            raise NoKernelError(f"{title} on {arch.name}: every candidate failed\n  {listed}")
        return None if refusals else min(timed, key=lambda row: row[2])

    def _save(self, name: str, choice: Choice) -> None:
        if self.choices.get(name) != choice:
            self.choices[name] = choice
            if self._store is not None:
                self._store.merge({name: choice})


@contextmanager
def autotune(cache: str | Path | None = None, progress: bool = True) -> Iterator[Tuner]:
    """Tunes every operation of the process, in any thread, until the block ends; calls with backend="auto".

    cache: a JSON file whose choices come into effect on entry and into which each new choice is merged as
        soon as it is found; it need not exist. None keeps the choices in the process alone.
    progress: a bar per bucket on stderr.

    The choices stay in effect after the block. In nested blocks the innermost one tunes and saves, and a
    bucket whose choice is already in effect is not timed again but saved in the innermost block's file too;
    so each file holds every bucket that its block met. `clear_tuning()` beforehand makes a block time
    everything anew.

    Raises ArgumentTypeError or ArgumentError naming `cache` for what is no path or is a directory, and
    OSError on entry if the file cannot be written; folders that it lies in are made. A corrupt file is moved
    aside and a foreign one left alone, each with a RuntimeWarning.
    """
    store = None
    if cache is not None:
        check_file("cache", cache)
        store = TuningStore(cache)
    tuner = Tuner(store, progress)
    put_in_effect(tuner.choices)
    with _active_lock:
        _active.append(tuner)
    invalidate_plans()  # a plan made before the block would keep its problem from ever reaching `choose`
    try:
        yield tuner
    finally:
        with _active_lock:
            _active.remove(tuner)


def choose(
    problem: Problem, arch: Arch, device: torch.device, make_run: MakeRun, snapshot: Snapshot
) -> Selection:
    """What `resolve(problem, arch)` answers, after tuning the bucket if an `autotune` block asks for it.

    A bucket is tuned once, and only with two or more candidates (pairs of provider and tactic).
    make_run(selection) prepares the candidate and returns a call that runs it on the caller's own tensors,
    `out` included. snapshot() saves what such a run changes in place and returns a function that puts it
    back; both are called around every candidate, so the tensors end as they began.

    A candidate that fails gives a RuntimeWarning and is left out; NoKernelError lists them if all fail. One
    that raises ArgumentError refuses the caller's arguments (a workspace too small for it, say). Then no
    choice is kept: the heuristic decides, until a call that fits every candidate comes here. An operation
    that caches plans asks again in the next `autotune` block. If all refuse, the first one's ArgumentError is
    raised.

    Raises RuntimeError if the bucket would have to be tuned while a CUDA graph is being captured, and
    CompilationForbiddenError if a candidate needs a build inside `forbid_compilation()`.
    """
    check_problem(problem)
    tuner = _innermost()
    if tuner is not None:
        with _profiling_lock:
            tuner.tune(problem, arch, device, make_run, snapshot)
    return resolve(problem, arch)


def measure_us(run: Callable[[], None], device: torch.device, l2_bytes: int) -> float:
    """Median time of `run()` in microseconds; the module's docstring has the method.

    Calls it WARMUP_RUNS + MAX_REPEATS times, fewer if it is slow.
    """
    if device.type != "cuda":
        return _median_us(lambda: _wall_clock_us(run))
    with torch.cuda.device(device):
        flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
        return _median_us(lambda: _cold_cuda_us(run, flush))


def _median_us(sample_us: Callable[[], float]) -> float:
    for _ in range(WARMUP_RUNS):
        sample_us()
    samples: list[float] = []
    for repeat in range(MAX_REPEATS):
        if repeat >= MIN_REPEATS and sum(samples) > TIME_BUDGET_US:
            break
        samples.append(sample_us())
    return statistics.median(samples)


def _wall_clock_us(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _cold_cuda_us(run: Callable[[], None], flush: torch.Tensor) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    flush.zero_()  # empties the L2 cache, and keeps the device busy while the host launches
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3  # from milliseconds


def _innermost() -> Tuner | None:
    with _active_lock:
        return _active[-1] if _active else None


def _reject_capture(problem: Problem, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{problem.describe()} is not tuned yet, and cannot be while a CUDA graph is being captured; "
            "call the operation once inside autotune() before the capture, or capture outside autotune()"
        )
