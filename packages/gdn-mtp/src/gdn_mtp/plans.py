"""Plans: a problem resolved to a prepared kernel, and the functional calls' cache of them."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import overload

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    PlanCache,
    Selection,
    as_arch,
    as_device,
    check_backend,
    check_scale,
    debug_mode,
    dtype_name,
    resolve,
)
from torch import Tensor

from gdn_mtp.planning import PreparedKernel, check_planned, given, saved_slots, select
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_mtp.specs import (
    CallFlags,
    CallForm,
    CallTensors,
    FlagTuple,
    TensorTuple,
    check_call,
    misalignment,
    written_slots,
)
from gdn_mtp.speculative.plans import SpeculativePlan, make_plan
from gdn_mtp.speculative.problem import SpeculativeProblem

# The argument of Plan.run that each field of a problem describes.
_ARGUMENT_OF_FIELD = {
    "io_dtype": "q",
    "gate_dtype": "a",
    "dt_bias_dtype": "dt_bias",
    "out_dtype": "output",
    "state_dtype": "state",
    "separate_write_indices": "output_state_indices",
    "tensor_scale": "scale",
}
_ARGUMENT_OF_INTERMEDIATE = {"buffer": "intermediate_states_buffer", "scatter": "ssm_state_indices"}


class Plan(PreparedKernel[GatedDeltaRuleProblem]):
    """One problem on one device, its kernel prepared: `run` launches and does nothing else.

    problem, device: as given to `plan`. provider, tactic, reason: what was chosen and why.
    """

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        A_log: Tensor,
        a: Tensor,
        dt_bias: Tensor,
        b: Tensor,
        *,
        output: Tensor,
        scale: float | Tensor | None = None,
        initial_state_indices: Tensor | None = None,
        output_state_indices: Tensor | None = None,
        intermediate_states_buffer: Tensor | None = None,
        ssm_state_indices: Tensor | None = None,
    ) -> None:
        """Launch on tensors that fit the problem; writes `output` and what the problem says is written.

        Arguments are those of `gdn_mtp.gated_delta_rule_mtp`; `state` is the pool, or one state per request,
        in the problem's layout. On a GPU nothing is allocated, waited for, or checked but what the launcher
        checks itself (dtypes, sizes, alignment and the strides that the kernel relies on; ValueError or
        TypeError), so the call can be captured in a CUDA graph; on the CPU and in debug mode the arguments
        are checked as a functional call's are.
        """
        reads, writes = initial_state_indices, output_state_indices
        buffer, scatter = intermediate_states_buffer, ssm_state_indices
        if self.always_checked or debug_mode():
            self._check(
                CallTensors(q, k, v, A_log, a, dt_bias, b, state, reads, writes, buffer, scatter, output),
                scale,
            )
        scale = self._default_scale if scale is None else self._launch_scale(scale)
        self._launcher(q, k, v, a, b, A_log, dt_bias, scale, state, reads, writes, buffer, scatter, output)

    def launch(self, tensors: TensorTuple, scale: float | Tensor | None, output: Tensor) -> None:
        """Launch on the checked tensors of a function call; `output` stands in for the last of them.

        Index tensors, which may differ in dtype there, reach the launcher with that of the first.
        """
        q, k, v, A_log, a, dt_bias, b, state, reads, writes, buffer, scatter, _ = tensors
        if reads is not None:
            writes, scatter = _narrowed(writes, reads.dtype), _narrowed(scatter, reads.dtype)
        scale = self._default_scale if scale is None else self._launch_scale(scale)
        self._launcher(q, k, v, a, b, A_log, dt_bias, scale, state, reads, writes, buffer, scatter, output)

    def _check(self, tensors: CallTensors, scale: float | Tensor | None) -> None:
        """Raises, naming the argument, unless the tensors pose exactly the plan's problem."""
        problem = self.problem
        if tensors.output is None:
            raise ArgumentTypeError("output", "None, expected a tensor [B, T, HV, V]")
        expected = problem.index_dtype
        for name in ("initial_state_indices", "output_state_indices", "ssm_state_indices"):
            indices = getattr(tensors, name)
            if isinstance(indices, Tensor) and indices.dtype != expected:
                wanted = "no index tensors" if expected is None else dtype_name(expected)
                raise ArgumentTypeError(
                    name, f"dtype {dtype_name(indices.dtype)}, expected {wanted} from the plan"
                )
        form = CallForm(
            "plan", "state", problem.state_layout, pooled=expected is not None, single_token=False
        )
        flags = CallFlags(problem.use_qk_l2norm, not problem.update_state, self.provider)
        dims = {name: getattr(problem, name) for name in ("B", "T", "H", "HV", "K", "V")}
        scale = 1.0 if scale is None else scale
        posed = check_call(form, tensors, scale, flags, dims=dims, device=self.device)
        assert posed is not None, "B is at least 1 in every problem"
        if posed.intermediate != problem.intermediate:
            asked, given = problem.intermediate, posed.intermediate
            argument = _ARGUMENT_OF_INTERMEDIATE[asked if given == "none" else given]
            raise ArgumentError(argument, f"intermediate = {given!r}, expected {asked!r} from the plan")
        check_planned(posed, problem, "state", _ARGUMENT_OF_FIELD)


@overload
def plan(
    problem: GatedDeltaRuleProblem,
    device: torch.device | str | None = None,
    backend: str = "auto",
    tactic: str | None = None,
) -> Plan: ...


@overload
def plan(
    problem: SpeculativeProblem,
    device: torch.device | str | None = None,
    backend: str = "auto",
    tactic: str | None = None,
) -> SpeculativePlan: ...


def plan(
    problem: GatedDeltaRuleProblem | SpeculativeProblem,
    device: torch.device | str | None = None,
    backend: str = "auto",
    tactic: str | None = None,
) -> Plan | SpeculativePlan:
    """Resolve `problem` and compile or load its kernel.

    A `GatedDeltaRuleProblem` gives a `Plan`, a `SpeculativeProblem` a `VerifyPlan`, `CommitPlan` or
    `MaterializePlan`, by its mode.
    device: None for the current CUDA device, or the CPU where there is none. backend: a provider's name, or
    "auto" for the tuned or else the preferred one. tactic: the name of one of that provider's, None for the
    tuned or else the preferred one. Raises NoKernelError with every provider's reason, or if the chosen one
    asks for a workspace, which these operations do not have; ArgumentError naming `tactic` and those that
    there are.
    `kernel_dispatch.explain(problem)` shows which provider that is and why, without loading anything; the
    tactic is the plan's `tactic`.
    """
    if not isinstance(problem, GatedDeltaRuleProblem | SpeculativeProblem):
        expected = "a GatedDeltaRuleProblem or a SpeculativeProblem"
        raise ArgumentTypeError("problem", f"{type(problem).__name__}, expected {expected}")
    check_backend(backend)
    device = as_device(device)
    selection = resolve(problem, as_arch(device), backend, tactic)
    if isinstance(problem, SpeculativeProblem):
        return make_plan(problem, device, selection)
    return Plan(problem, device, selection)


def _narrowed(indices: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Slots in `dtype`; those that do not fit it stay padding, or beyond any pool."""
    if indices is None or indices.dtype == dtype:
        return indices
    if dtype.itemsize < indices.dtype.itemsize:
        indices = indices.clamp(-1, torch.iinfo(dtype).max)
    return indices.to(dtype)


_PLANS: PlanCache[Plan] = PlanCache()


def run_known(
    form: CallForm,
    tensors: TensorTuple,
    scale: float | Tensor | None,
    flags: FlagTuple,
) -> Tensor | None:
    """Run a call that looks like an earlier one by the plan of that one; returns the output, None if new.

    tensors, flags: the values of `CallTensors` and `CallFlags`, not yet checked. On a GPU the scale alone is
    checked again; on the CPU and in debug mode the whole call, memory overlap and values included.
    """
    try:
        known = _PLANS.get(_key(form, tensors, scale, flags), given(tensors))
    except (AttributeError, TypeError):  # an argument is no tensor, or no flag; check_call says which
        return None
    if known is None:
        return None
    if known.always_checked or debug_mode():
        check_call(form, CallTensors._make(tensors), 1.0 if scale is None else scale, CallFlags._make(flags))
    elif scale is not None:
        check_scale("scale", scale, known.device)
    output = _output_of(tensors)
    known.launch(tensors, scale, output)
    return output


def run_new(form: CallForm, tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags) -> Tensor:
    """Check a call in full, plan it, run it, and keep the plan for calls like it; returns the output."""
    problem = check_call(form, tensors, 1.0 if scale is None else scale, flags)
    output = _output_of(tensors)
    if problem is None:  # no requests
        return output
    device = tensors.q.device

    def make_run(selection: Selection) -> Callable[[], None]:
        return partial(Plan(problem, device, selection).launch, tensors, scale, output)

    selection = select(problem, device, flags.backend, make_run, partial(_snapshot, problem, tensors))
    plan = Plan(problem, device, selection)
    _PLANS.put(_key(form, tensors, scale, flags), plan, given(tensors))
    plan.launch(tensors, scale, output)
    return output


def _key(
    form: CallForm,
    tensors: TensorTuple,
    scale: float | Tensor | None,
    flags: FlagTuple,
) -> Hashable:
    """What the plan of a call depends on, short of what the cache compares itself: how its tensors look."""
    q, _, _, _, _, _, _, state, reads, writes, buffer, scatter, output = tensors
    return (
        form.name,
        flags,
        q.shape,
        misalignment(state),
        misalignment(buffer),
        (reads is None, writes is None, buffer is None, scatter is None, output is None),
        isinstance(scale, Tensor),
        torch.is_grad_enabled(),
    )


def _output_of(tensors: TensorTuple) -> Tensor:
    """The output that the caller gave, or a new one like v."""
    v: Tensor = tensors[2]
    output: Tensor | None = tensors[-1]
    return v.new_empty(v.shape) if output is None else output


def _snapshot(problem: GatedDeltaRuleProblem, tensors: CallTensors) -> Callable[[], None]:
    """Save the slots that the call writes; the result puts them back."""
    if not problem.update_state:
        return lambda: None
    _, slots = written_slots(tensors)
    if slots is None:
        slots = torch.arange(problem.B, device=tensors.state.device)
    slots = slots.flatten().long()
    return saved_slots((tensors.state,), slots[slots >= 0])
