"""Plans of speculative calls: a problem resolved to a prepared kernel, and the functions' cache of them."""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, PlanCache, Selection, check_scale, debug_mode
from torch import Tensor

from gdn_mtp.planning import PreparedKernel, check_planned, given, saved_slots, select
from gdn_mtp.specs import misalignment
from gdn_mtp.speculative.cache import SpeculativeCache, tensors_of
from gdn_mtp.speculative.folding import FoldPolicy, fold_limit
from gdn_mtp.speculative.problem import Mode, SpeculativeProblem
from gdn_mtp.speculative.specs import (
    IN_EVERY_MODE,
    OPTIONAL,
    OUTPUT,
    STATE_INDICES,
    STATE_POOL,
    STATES,
    TOKENS,
    UP_TO_OUTPUT,
    CallFlags,
    CallTensors,
    FlagTuple,
    TensorTuple,
    V,
    check_call,
    without_tokens,
)

DIMENSIONS = ("B", "H", "HV", "K", "V")

# The argument of `run` that each field of a problem describes.
_ARGUMENT_OF_FIELD = {
    "io_dtype": "cache",
    "state_dtype": "state_pool",
    "index_dtype": "state_indices",
}
_ARGUMENT_OF_TOKEN_FIELD = {
    "gate_dtype": "a",
    "dt_bias_dtype": "dt_bias",
    "out_dtype": "output",
    "variable_tokens": "num_tokens",
    "tree": "parent_indices",
    "tensor_scale": "scale",
}
_ARGUMENT_OF_ACCEPT = {"counts": "num_accepted", "nodes": "accepted_nodes"}


class SpeculativePlan(PreparedKernel[SpeculativeProblem]):
    """One speculative problem on one device, its kernel prepared: `run` launches and does nothing else.

    problem, device: as given to `gdn_mtp.plan`. provider, tactic, reason: what was chosen and why.
    The problem's mode makes it a `VerifyPlan`, a `CommitPlan` or a `MaterializePlan`; `run` takes the
    arguments of the function of that name, short of what the problem says, and writes into what it is given.

    On a GPU `run` allocates nothing, waits for nothing and checks only that the cache is of this pool and has
    room for T tokens, besides what the launcher checks itself; it can be captured in a CUDA graph. On the CPU
    and in debug mode the arguments are checked as the function's are, and against the problem.
    """

    run: Callable[..., None]

    def __init__(self, problem: SpeculativeProblem, device: torch.device, selection: Selection) -> None:
        super().__init__(problem, device, selection)
        self._fold_limits: dict[tuple[int, str], int] = {}

    def launch(
        self, tensors: TensorTuple, scale: float | Tensor | None, max_tokens: int, fold: str | int
    ) -> None:
        """Launch on checked tensors in the order of `CallTensors`, outputs included.

        max_tokens: of the cache. scale and fold matter to a verify alone.
        """
        mode = self.problem.mode
        if mode == "commit":
            self._launcher(*tensors[IN_EVERY_MODE])
        elif mode == "materialize":
            self._launcher(*tensors[IN_EVERY_MODE], tensors[STATES])
        else:
            scale, limit = self._launch_scale(scale), self.fold_limit(max_tokens, fold)
            self._launcher(*tensors[TOKENS], scale, *tensors[UP_TO_OUTPUT], limit, tensors[OUTPUT])

    def fold_limit(self, max_tokens: int, fold: str | int) -> int:
        """Pending tokens that a verify leaves pending at most, with a cache for `max_tokens`."""
        limit = self._fold_limits.get((max_tokens, fold)) if isinstance(fold, str) else None
        if limit is None:
            if max_tokens < self.problem.T:
                expected = f"at least T = {self.problem.T} of the plan"
                raise ArgumentError("cache", f"max_tokens = {max_tokens}, expected {expected}")
            limit = fold_limit(self.problem, max_tokens, fold)
            if isinstance(fold, str):
                self._fold_limits[max_tokens, fold] = limit
        return limit

    def _run(
        self,
        tensors: TensorTuple,
        cache: SpeculativeCache,
        scale: float | Tensor | None = None,
        fold: FoldPolicy | int = "always",
    ) -> None:
        if self.always_checked or debug_mode():
            self._check(CallTensors._make(tensors), cache.max_tokens, scale, fold)
        pool = tensors[STATE_POOL]
        bound = cache.is_bound_to(pool)
        if not bound:
            cache.check_pool(pool)
        self.launch(tensors, scale, cache.max_tokens, fold)
        if not bound:
            cache.adopt(pool)

    def _check(
        self, tensors: CallTensors, max_tokens: int, scale: float | Tensor | None, fold: FoldPolicy | int
    ) -> None:
        """Raises, naming the argument, unless the tensors pose exactly the plan's problem."""
        problem = self.problem
        verifies = problem.mode == "verify"
        result = {"verify": "output", "commit": "state_pool", "materialize": "states"}[problem.mode]
        if getattr(tensors, result) is None:
            raise ArgumentTypeError(result, "None, expected a tensor to write into")
        flags = CallFlags(problem.mode, max_tokens, problem.use_qk_l2norm, fold, self.provider)
        dims = {name: getattr(problem, name) for name in DIMENSIONS} | {"capacity": problem.capacity}
        if verifies:
            dims["T"] = problem.T
        posed = check_call(tensors, 1.0 if scale is None else scale, flags, dims=dims, device=self.device)
        assert posed is not None, "B is at least 1 in every problem"
        if posed.accept != problem.accept:
            asked, came = problem.accept, posed.accept
            argument = _ARGUMENT_OF_ACCEPT[asked if came == "none" else came]
            raise ArgumentError(argument, f"accept = {came!r}, expected {asked!r} from the plan")
        fields = _ARGUMENT_OF_FIELD | (_ARGUMENT_OF_TOKEN_FIELD if verifies else {})
        check_planned(posed, problem, "state_pool", fields)


class VerifyPlan(SpeculativePlan):
    """The plan of a problem of mode "verify"."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state_pool: Tensor,
        state_indices: Tensor,
        cache: SpeculativeCache,
        num_accepted: Tensor | None = None,
        accepted_nodes: Tensor | None = None,
        *,
        num_tokens: Tensor | None = None,
        parent_indices: Tensor | None = None,
        scale: float | Tensor | None = None,
        fold: FoldPolicy | int = "auto",
        output: Tensor,
    ) -> None:
        """`gdn_mtp.verify` on tensors that fit the problem; writes `output` [B, T, HV, V], cache and pool."""
        tensors = (
            *(q, k, v, a, b, A_log, dt_bias, state_pool, state_indices),
            *tensors_of(cache),
            *(num_accepted, accepted_nodes, num_tokens, parent_indices, output, None),
        )
        self._run(tensors, cache, scale, fold)


class CommitPlan(SpeculativePlan):
    """The plan of a problem of mode "commit"."""

    def run(
        self,
        state_pool: Tensor,
        state_indices: Tensor,
        cache: SpeculativeCache,
        num_accepted: Tensor | None = None,
        accepted_nodes: Tensor | None = None,
    ) -> None:
        """`gdn_mtp.commit` on tensors that fit the problem; writes pool and cache."""
        tensors = tensors_of(cache)
        self._run(
            without_tokens(state_pool, state_indices, tensors, num_accepted, accepted_nodes, None), cache
        )


class MaterializePlan(SpeculativePlan):
    """The plan of a problem of mode "materialize"."""

    def run(
        self,
        state_pool: Tensor,
        state_indices: Tensor,
        cache: SpeculativeCache,
        num_accepted: Tensor | None = None,
        accepted_nodes: Tensor | None = None,
        *,
        states: Tensor,
    ) -> None:
        """`gdn_mtp.materialize` on tensors that fit the problem; writes `states` [B, HV, V, K]."""
        tensors = tensors_of(cache)
        self._run(
            without_tokens(state_pool, state_indices, tensors, num_accepted, accepted_nodes, states), cache
        )


_PLAN_OF_MODE: dict[Mode, type[SpeculativePlan]] = {
    "verify": VerifyPlan,
    "commit": CommitPlan,
    "materialize": MaterializePlan,
}


def make_plan(problem: SpeculativeProblem, device: torch.device, selection: Selection) -> SpeculativePlan:
    """The plan of the problem's mode, its kernel prepared."""
    return _PLAN_OF_MODE[problem.mode](problem, device, selection)


_PLANS: PlanCache[SpeculativePlan] = PlanCache()


def run_known(tensors: TensorTuple, scale: float | Tensor | None, flags: FlagTuple) -> Tensor | None:
    """Run a call that looks like an earlier one by the plan of that one; returns what it wrote, None if new.

    tensors, flags: the values of `CallTensors` and `CallFlags`, not yet checked. On a GPU the scale alone is
    checked again; on the CPU and in debug mode the whole call, memory overlap and values included.
    """
    try:
        known = _PLANS.get(_key(tensors, scale, flags), given(tensors))
    except (AttributeError, TypeError):  # an argument is no tensor, or no flag; check_call says which
        return None
    if known is None:
        return None
    mode, max_tokens, _, fold, _ = flags
    if known.always_checked or known.problem.debug:
        check_call(CallTensors._make(tensors), 1.0 if scale is None else scale, CallFlags._make(flags))
    elif scale is not None:
        check_scale("scale", scale, known.device)
    filled, result = _with_output(tensors, mode)
    known.launch(filled, scale, max_tokens, fold)
    return result


def run_new(tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags) -> Tensor:
    """Check a call in full, plan it, run it, and keep the plan for calls like it; returns what it wrote."""
    problem = check_call(tensors, 1.0 if scale is None else scale, flags)
    filled, result = _with_output(tensors, flags.mode)
    if problem is None:  # no requests
        return result
    device = tensors.state_pool.device
    call = (filled, scale, flags.max_tokens, flags.fold)

    def make_run(selection: Selection) -> Callable[[], None]:
        return partial(make_plan(problem, device, selection).launch, *call)

    selection = select(problem, device, flags.backend, make_run, partial(_snapshot, tensors))
    plan = make_plan(problem, device, selection)
    _PLANS.put(_key(tensors, scale, flags), plan, given(tensors))
    plan.launch(*call)
    return result


def _with_output(tensors: TensorTuple, mode: Mode) -> tuple[TensorTuple, Tensor]:
    """The tensors with what the call writes into among them, new where the caller gave nothing; and that."""
    v, pool, output, states = tensors[V], tensors[STATE_POOL], tensors[OUTPUT], tensors[STATES]
    if mode == "verify":
        output = v.new_empty(v.shape) if output is None else output
        return (*tensors[:OUTPUT], output, None), output
    if mode == "materialize":
        states = pool.new_empty((len(tensors[STATE_INDICES]), *pool.shape[1:])) if states is None else states
        return (*tensors[:STATES], states), states
    return tensors, pool


def _key(tensors: TensorTuple, scale: float | Tensor | None, flags: FlagTuple) -> Hashable:
    """What the plan of a call depends on, short of what the cache compares itself: how its tensors look."""
    pool = tensors[STATE_POOL]
    mode, max_tokens, use_qk_l2norm, _, backend = flags  # a plan folds as each launch says
    return (
        (mode, max_tokens, use_qk_l2norm, backend),
        pool.shape,
        tensors[STATE_INDICES].shape,
        misalignment(pool),
        misalignment(tensors[STATES]),
        tuple(tensor is None for tensor in tensors[OPTIONAL]),
        isinstance(scale, Tensor),
        debug_mode(),
        torch.is_grad_enabled(),
    )


def _snapshot(tensors: CallTensors) -> Callable[[], None]:
    """Save the slots that the call writes, of the pool and of the cache; the result puts them back."""
    slots = tensors.state_indices.long()
    named = slots[(slots >= 0) & (slots < tensors.state_pool.shape[0])]
    cache = (tensors.keys, tensors.updates, tensors.gates, tensors.k_scale, tensors.cursor, tensors.live)
    return saved_slots((tensors.state_pool, *cache), named)
