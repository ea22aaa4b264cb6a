"""The functions' cache of plans: a problem resolved to a prepared kernel, and the threshold of its folds."""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from kernel_dispatch import (
    NoKernelError,
    PlanCache,
    Selection,
    as_arch,
    check_scale,
    choose,
    debug_mode,
    resolve,
)
from torch import Tensor

from gdn_mtp.specs import misalignment
from gdn_mtp.speculative.folding import FLOAT_BYTES, fold_above
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_mtp.speculative.specs import CallFlags, CallTensors, FlagTuple, TensorTuple, check_call

SHARED = slice(7, 17)  # of CallTensors: what a launcher takes in every mode, pool to accepted nodes


class SpeculativePlan:
    """One problem on one device, its kernel prepared: `launch` does nothing else.

    problem, device: what it is for. provider, tactic, reason: what was chosen and why. fold_above: pending
    tokens that a verify leaves pending at most.
    """

    def __init__(
        self, problem: SpeculativeProblem, device: torch.device, flags: CallFlags, selection: Selection
    ) -> None:
        self.problem = problem
        self.device = device
        self.provider = selection.provider.name
        self.tactic = selection.tactic
        self.reason = selection.reason
        self.fold_above = fold_limit(problem, flags)
        self.always_checked = device.type == "cpu"
        self._launcher = _prepare(problem, device, selection)
        self._default_scale = problem.K**-0.5

    def launch(self, tensors: TensorTuple, scale: float | Tensor | None) -> None:
        """Launch on checked tensors in the order of `CallTensors`, outputs included."""
        mode = self.problem.mode
        if mode == "commit":
            self._launcher(*tensors[SHARED])
        elif mode == "materialize":
            self._launcher(*tensors[SHARED], tensors[20])
        else:
            if scale is None:
                scale = self._default_scale
            elif not isinstance(scale, Tensor):
                scale = float(scale)
            elif scale.dim() != 1:
                scale = scale.view(1)
            self._launcher(*tensors[:7], scale, *tensors[7:19], self.fold_above, tensors[19])


def fold_limit(problem: SpeculativeProblem, flags: CallFlags) -> int:
    """The threshold of a verify's folds; see `gdn_mtp.speculative.folding`."""
    heads, value_heads = problem.H, problem.HV
    key_bytes = heads * (problem.K * problem.io_dtype.itemsize + FLOAT_BYTES)
    return fold_above(
        flags.fold,
        problem.capacity,
        flags.max_tokens,
        accepted=(problem.T + 1) / 2,
        token_bytes=key_bytes + value_heads * (problem.V + 1) * FLOAT_BYTES,
        state_bytes=value_heads * problem.V * problem.K * problem.state_dtype.itemsize,
    )


_PLANS: PlanCache[SpeculativePlan] = PlanCache()


def run_known(tensors: TensorTuple, scale: float | Tensor | None, flags: FlagTuple) -> Tensor | None:
    """Run a call that looks like an earlier one by the plan of that one; returns what it wrote, None if new.

    tensors, flags: the values of `CallTensors` and `CallFlags`, not yet checked. On a GPU the scale alone is
    checked again; on the CPU and in debug mode the whole call, memory overlap and values included.
    """
    try:
        known = _PLANS.get(_key(tensors, scale, flags), _given(tensors))
    except (AttributeError, TypeError):  # an argument is no tensor, or no flag; check_call says which
        return None
    if known is None:
        return None
    if known.always_checked or known.problem.debug:
        check_call(CallTensors._make(tensors), 1.0 if scale is None else scale, CallFlags._make(flags))
    elif scale is not None:
        check_scale("scale", scale, known.device)
    filled, result = _with_output(tensors, flags[0])
    known.launch(filled, scale)
    return result


def run_new(tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags) -> Tensor:
    """Check a call in full, plan it, run it, and keep the plan for calls like it; returns what it wrote."""
    problem = check_call(tensors, 1.0 if scale is None else scale, flags)
    filled, result = _with_output(tensors, flags.mode)
    if problem is None:  # no requests
        return result
    device = tensors.state_pool.device
    plan = SpeculativePlan(problem, device, flags, _select(problem, filled, scale, flags))
    _PLANS.put(_key(tensors, scale, flags), plan, _given(tensors))
    plan.launch(filled, scale)
    return result


def new_output(tensors: TensorTuple, mode: str) -> Tensor:
    """What a call returns: what the caller gave to write into, or a new tensor; the pool for commit."""
    v, pool, output, states = tensors[2], tensors[7], tensors[19], tensors[20]
    result: Tensor
    if mode == "commit":
        result = pool
    elif mode == "verify":
        result = v.new_empty(v.shape) if output is None else output
    else:
        result = pool.new_empty((len(tensors[8]), *pool.shape[1:])) if states is None else states
    return result


def _with_output(tensors: TensorTuple, mode: str) -> tuple[TensorTuple, Tensor]:
    """The tensors with what the call writes into among them, and that."""
    result = new_output(tensors, mode)
    if mode == "verify":
        return (*tensors[:19], result, None), result
    if mode == "materialize":
        return (*tensors[:20], result), result
    return tensors, result


def _key(tensors: TensorTuple, scale: float | Tensor | None, flags: FlagTuple) -> Hashable:
    """What the plan of a call depends on, short of what the cache compares itself: how its tensors look."""
    pool = tensors[7]
    return (
        flags,
        pool.shape,
        misalignment(pool),
        misalignment(tensors[20]),
        tuple(tensor is None for tensor in tensors[15:]),
        isinstance(scale, Tensor),
        debug_mode(),
        torch.is_grad_enabled(),
    )


def _given(tensors: TensorTuple) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _select(
    problem: SpeculativeProblem, tensors: TensorTuple, scale: float | Tensor | None, flags: CallFlags
) -> Selection:
    """The kernel and tactic for a call; inside `kernel_dispatch.autotune()` they are timed on its tensors."""
    device = tensors[7].device
    arch = as_arch(device)
    if flags.backend != "auto":
        return resolve(problem, arch, flags.backend)

    def make_run(selection: Selection) -> Callable[[], None]:
        return partial(SpeculativePlan(problem, device, flags, selection).launch, tensors, scale)

    return choose(problem, arch, device, make_run, partial(_snapshot, CallTensors._make(tensors)))


def _prepare(problem: SpeculativeProblem, device: torch.device, selection: Selection) -> Callable[..., None]:
    """The launcher of a chosen tactic. Raises NoKernelError for one that needs what launchers do not get."""
    arch = as_arch(device)
    workspace_nbytes = selection.kernel.workspace_nbytes(problem, arch)
    if workspace_nbytes:
        raise NoKernelError(
            f"provider {selection.provider.name!r} asks for {workspace_nbytes} bytes of workspace for "
            f"{problem.describe()}; launchers of {problem.entry_point_group} get none"
        )
    return selection.kernel.prepare(problem, arch, device, selection.tactic)


def _snapshot(tensors: CallTensors) -> Callable[[], None]:
    """Save the slots that the call writes, of the pool and of the cache; the result puts them back."""
    slots = tensors.state_indices.long()
    named = slots[(slots >= 0) & (slots < tensors.state_pool.shape[0])]
    written = (
        tensors.state_pool,
        tensors.keys,
        tensors.updates,
        tensors.gates,
        tensors.k_scale,
        tensors.cursor,
        tensors.live,
    )
    saved = [tensor.index_select(0, named) for tensor in written]

    def restore() -> None:
        for tensor, rows in zip(written, saved, strict=True):
            tensor.index_copy_(0, named, rows)

    return restore
