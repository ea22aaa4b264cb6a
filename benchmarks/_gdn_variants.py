"""What bench_gdn_mtp.py times: our kernels, FlashInfer's and flash-linear-attention's, called alike."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import gdn_mtp
import torch
from _gdn_cases import HEAD_DIM, OUR_ERROR, PEER_ERROR, Call, Cell, Outcome, make_calls, make_pool
from kernel_dispatch import as_arch, resolve
from kernel_testing import calls_for_cold_l2
from torch import Tensor
from tqdm import tqdm

PEERS = ("flashinfer", "fla")


class Variant:
    """A way to compute one cell, writing states and outputs in place; `run` launches one call."""

    name: str
    error: float  # of its arithmetic, see `_gdn_cases.check`
    k_major = False  # whether it takes K-major states of consecutive slots, not V-major ones by index

    def run(self, call: Call) -> object:
        raise NotImplementedError

    def before(self, call: Call, requests: Tensor) -> Tensor:
        """The states [n, HV, V, K] that a call reads for `requests`; a copy."""
        if self.k_major:
            return call.consecutive[requests].mT.contiguous()
        return call.pool[call.indices[requests].long()]

    def outcome(self, call: Call, returned: object, requests: Tensor) -> Outcome:
        """What the call left behind for `requests`."""
        intermediate = None if call.intermediate is None else call.intermediate[requests]
        return Outcome(call.output, self.before(call, requests), intermediate)


class Ours(Variant):
    """`gdn_mtp.plan(..., backend="cute")`, by itself or with a tactic other than the table's."""

    name = "ours"
    error = OUR_ERROR

    def __init__(self, cell: Cell, device: torch.device, tactic: str | None = None) -> None:
        self.plan = gdn_mtp.plan(cell.problem(), device, "cute", tactic)
        self.k_major = cell.state_layout == "kv"
        if tactic is not None:
            self.name = tactic

    def run(self, call: Call) -> None:
        self.bound(call)()

    def bound(self, call: Call) -> Callable[[], None]:
        """`Plan.run` with the call's arguments, for timing it by itself."""
        states: dict[str, Any] = {"state": call.consecutive}
        if not self.k_major:
            states = {"state": call.pool, "initial_state_indices": call.indices}
            states["intermediate_states_buffer"] = call.intermediate
        return partial(self.plan.run, **call.inputs, **states, output=call.output)


def bound_functional(cell: Cell, call: Call) -> Callable[[], object]:
    """Ours as one function call that finds its plan itself, with the call's arguments."""
    return partial(
        gdn_mtp.gated_delta_rule_mtp,
        **call.inputs,
        initial_state=call.pool,
        initial_state_indices=call.indices,
        output=call.output,
        intermediate_states_buffer=call.intermediate,
        disable_state_update=not cell.update,
        backend="cute",
    )


class FlashInfer(Variant):
    """Its functions of the same names as ours; that for one V-major token also for windows of bf16 states."""

    name = "flashinfer"

    def __init__(self, cell: Cell) -> None:
        if cell.T == 1 and (cell.cache or not cell.update):
            raise Unsupported("takes one token only to update the state")
        if cell.cache and cell.B * cell.T * cell.slot_nbytes // cell.state_dtype.itemsize >= 2**31:
            raise Unsupported("has 32-bit offsets into the intermediate states, which are too many")
        if cell.state_layout == "kv" and cell.state_dtype != torch.float32:
            raise Unsupported("takes K-major states in fp32")
        module = import_peer("flashinfer.gdn_decode")
        self.k_major = cell.state_layout == "kv"
        self.error = PEER_ERROR[cell.state_dtype]
        self._cell = cell
        self._decode_k_major = module.gated_delta_rule_decode
        self._decode = module.gated_delta_rule_decode_pretranspose
        self._mtp = module.gated_delta_rule_mtp

    def run(self, call: Call) -> None:
        if self.k_major:
            self._decode_k_major(**call.inputs, state=call.consecutive, output=call.output)
            return
        pool = {"initial_state": call.pool, "initial_state_indices": call.indices, "output": call.output}
        flags: dict[str, Any] = {}
        if self._cell.T > 1:
            flags["intermediate_states_buffer"] = call.intermediate
            flags["disable_state_update"] = not self._cell.update
        if self._cell.T == 1 or self._cell.state_dtype == torch.bfloat16:
            self._decode(**call.inputs, state=None, **pool, **flags)
        else:
            self._mtp(**call.inputs, **pool, **flags)


class FlashLinearAttention(Variant):
    """`fused_recurrent_gated_delta_rule`, in its favour: no gather from a pool, gates computed beforehand.

    It reads one K-major state per request and allocates the final states; those of enough calls are
    kept that they do not stay in the L2 cache.
    """

    name = "fla"
    k_major = True

    def __init__(self, cell: Cell, device: torch.device) -> None:
        if cell.cache or not cell.update:
            raise Unsupported("only updates the state")
        if cell.state_dtype != torch.float32:
            raise Unsupported("writes fp32 states")
        module = import_peer("fla.ops.gated_delta_rule.fused_recurrent")
        self.error = PEER_ERROR[cell.state_dtype]
        self._function = module.fused_recurrent_gated_delta_rule
        self._kept: deque[object] = deque(maxlen=calls_for_cold_l2(cell.B * cell.slot_nbytes, device))
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        g, beta = self._gates_of(call)
        x = call.inputs
        result: tuple[Tensor, Tensor] = self._function(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            g=g,
            beta=beta,
            scale=HEAD_DIM**-0.5,
            initial_state=call.consecutive,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        self._kept.append(result)
        return result

    def outcome(self, call: Call, returned: object, requests: Tensor) -> Outcome:
        assert isinstance(returned, tuple)
        output, final = returned
        return Outcome(output, final[requests].mT, None)

    def _gates_of(self, call: Call) -> tuple[Tensor, Tensor]:
        """Log decay and beta [B, T, HV] in fp32, computed once per call, before anything is timed."""
        known = self._gates.get(id(call))
        if known is None:
            x = {name: call.inputs[name].float() for name in ("A_log", "a", "dt_bias", "b")}
            g = -x["A_log"].exp() * torch.nn.functional.softplus(x["a"] + x["dt_bias"])
            known = self._gates[id(call)] = (g, x["b"].sigmoid())
        return known


class Unsupported(Exception):
    """A peer does not offer what a cell asks for."""


def make_peer(name: str, cell: Cell, device: torch.device) -> Variant:
    """Raises Unsupported with a reason, or ImportError where the peer is not installed."""
    return FlashInfer(cell) if name == "flashinfer" else FlashLinearAttention(cell, device)


@cache
def _import_or_error(module: str) -> Any:
    """The module, or the ImportError that says why not; either is found out once."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        spec = importlib.util.find_spec(package)
        if spec is None:
            return error
        folders = list(spec.submodule_search_locations or ())
        parents = module.split(".")[:-1]
        for depth, part in enumerate(parents):
            if depth:
                folders = [f"{folder}/{part}" for folder in folders]
            bare = types.ModuleType(".".join(parents[: depth + 1]))
            bare.__path__ = folders
            sys.modules[bare.__name__] = bare
        try:
            return importlib.import_module(module)
        except ImportError as second:
            return ImportError(f"{error}; past the __init__ of its packages: {second}")


def import_peer(module: str) -> Any:
    """Import a module of a peer, if need be past the `__init__` of its packages.

    Those import packages that the module at hand may do without and a machine may lack.
    """
    found = _import_or_error(module)
    if isinstance(found, ImportError):
        raise found
    return found


def progress(items: Iterable[Any], title: str, total: int | None = None) -> Any:
    """A bar on stderr; every ten seconds a line where that is no terminal."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, title, total=total, mininterval=seconds, miniters=1, file=sys.stderr)


def compile_ahead(jobs: int, cells: Sequence[Cell], peers: Sequence[str], tactics: bool) -> list[str]:
    """Fill the compile caches of all variants with `jobs` processes; returns what went wrong, by group.

    Nothing is kept in this process, whose later calls find the caches filled.
    """
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        kernel = (cell.T, cell.update, cell.cache, cell.states)
        groups.setdefault(("ours", *kernel), []).append(cell)
        if "flashinfer" in peers:  # specialised by head counts; caching is a run-time flag for fp32 states
            key = ("flashinfer", cell.heads, cell.T, cell.update, cell.states)
            groups.setdefault(key, []).append(cell)
    count = -(-jobs // len(groups))
    tasks = [
        (key, group, share)
        for key, group in groups.items()
        for share in _shares(tactics and key[0] == "ours", count)
    ]
    problems = []
    # A fresh interpreter each, for CUDA does not survive a fork.
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), mp_context=get_context("spawn")) as workers:
        futures = {
            workers.submit(_compile_group, str(key[0]), group, share): key for key, group, share in tasks
        }
        finished = as_completed(futures)
        for future in progress(finished, "compile", total=len(futures)):
            try:
                problems += future.result()
            except Exception as error:  # a worker that died; the main process will compile or say why not
                problems.append(f"{futures[future]}: {type(error).__name__}: {error}")
    return problems


def _shares(tactics: bool, count: int) -> list[slice | None]:
    """The tactics dealt out among `count` tasks, as slices of their list; None: the preferred one alone."""
    return [slice(first, None, count) for first in range(count)] if tactics else [None]


def _compile_group(name: str, cells: Sequence[Cell], tactics: slice | None) -> list[str]:
    """In a worker process: compile what `cells` need of one variant; returns what went wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    if name == "flashinfer":
        _unlock_flashinfer_builds()
        cells = _one_per_specialisation(cells)
    problems = []
    for cell in cells:
        try:
            if name == "ours":
                for tactic in [None] if tactics is None else tactics_of(cell, device)[tactics]:
                    Ours(cell, device, tactic)
            else:
                FlashInfer(cell).run(make_calls(cell, make_pool(cell, device, cell.B), count=1)[0])
                torch.cuda.synchronize()
        except (Unsupported, ImportError):  # said once the cell is timed
            continue
        except Exception as error:
            problems.append(f"{name} {cell}: {type(error).__name__}: {str(error)[:300]}")
            break
    return problems


# Number of states (batch size x value heads) above which FlashInfer's choice of kernel no longer changes.
FLASHINFER_LARGEST_STEP = 1024


def _one_per_specialisation(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose kernels FlashInfer 0.7 may compile apart; larger batches only waste memory here."""
    step = min((cell.B for cell in cells if cell.B * cell.HV > FLASHINFER_LARGEST_STEP), default=0)
    return [cell for cell in cells if cell.B * cell.HV <= FLASHINFER_LARGEST_STEP or step == cell.B]


def _unlock_flashinfer_builds() -> None:
    """Let several processes compile at once: by default FlashInfer holds a lock per module meanwhile."""
    try:
        import_peer("flashinfer.gdn_decode")
        spec_class = importlib.import_module("flashinfer.jit.cute_dsl_core").JitSpecCuteDsl
    except (ImportError, AttributeError):
        return

    def build_and_load(spec: Any) -> Any:
        loaded = spec.try_load()
        if loaded is None:
            spec.compile_and_persist()
            loaded = spec.load()
        return loaded

    if hasattr(spec_class, "compile_and_persist"):
        spec_class.build_and_load = build_and_load


def tactics_of(cell: Cell, device: torch.device) -> Sequence[str]:
    """Every tactic of our kernels for the cell, the table's choice first."""
    problem, arch = cell.problem(), as_arch(device)
    return resolve(problem, arch, "cute").kernel.tactics(problem, arch)


def timed_calls(variant: Variant, calls: Sequence[Call]) -> list[Callable[[], object]]:
    """For `kernel_testing.time_cuda_us`."""

    def launch(call: Call) -> Callable[[], object]:
        return lambda: variant.run(call)

    return [launch(call) for call in calls]
