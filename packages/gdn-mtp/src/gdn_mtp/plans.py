"""Plans: a problem resolved to a prepared kernel, and the functional calls' cache of them."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import get_args

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    NoKernelError,
    PlanCache,
    Selection,
    as_arch,
    check_scale,
    choose,
    debug_mode,
    resolve,
)
from kernel_dispatch.devices import as_device
from torch import Tensor

from gdn_mtp.problem import GatedDeltaRuleProblem, StateRows
from gdn_mtp.specs import (
    CallFlags,
    CallForm,
    CallTensors,
    FlagTuple,
    TensorTuple,
    check_backend,
    check_call,
    misalignment,
    written_slots,
)

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


class Plan:
    """One problem on one device, its kernel prepared: `run` launches and does nothing else.

    problem, device: as given to `plan`. provider, tactic, reason: what was chosen and why.
    """

    def __init__(self, problem: GatedDeltaRuleProblem, device: torch.device, selection: Selection) -> None:
        self.problem = problem
        self.device = device
        self.provider = selection.provider.name
        self.tactic = selection.tactic
        self.reason = selection.reason
        self._launcher = _prepare(problem, device, selection)
        self._default_scale = problem.K**-0.5
        self.always_checked = device.type == "cpu"

    def __repr__(self) -> str:
        return f"Plan({self.problem.describe()} on {self.device}: {self.provider}, tactic {self.tactic})"

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
        checks itself, so the call can be captured in a CUDA graph; on the CPU and in debug mode the arguments
        are checked as a functional call's are.
        """
        tensors = (
            q,
            k,
            v,
            A_log,
            a,
            dt_bias,
            b,
            state,
            initial_state_indices,
            output_state_indices,
            intermediate_states_buffer,
            ssm_state_indices,
            output,
        )
        if self.always_checked or debug_mode():
            self._check(CallTensors._make(tensors), scale)
        _start(self._launcher, self._default_scale if scale is None else scale, tensors, output)

    def launch(self, tensors: TensorTuple, scale: float | Tensor | None, output: Tensor) -> None:
        """Launch on checked tensors in the order of `CallTensors`; `output` stands in for the last."""
        _start(self._launcher, self._default_scale if scale is None else scale, tensors, output)

    def _check(self, tensors: CallTensors, scale: float | Tensor | None) -> None:
        """Raises, naming the argument, unless the tensors pose exactly the plan's problem."""
        problem = self.problem
        if tensors.output is None:
            raise ArgumentTypeError("output", "None, expected a tensor [B, T, HV, V]")
        expected = problem.index_dtype
        for name in ("initial_state_indices", "output_state_indices", "ssm_state_indices"):
            indices = getattr(tensors, name)
            if isinstance(indices, Tensor) and indices.dtype != expected:
                raise ArgumentTypeError(name, f"dtype {indices.dtype}, expected {expected} from the plan")
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
        ranks = get_args(StateRows)
        if ranks.index(posed.state_rows) > ranks.index(problem.state_rows):
            raise ArgumentError(
                "state", f"state_rows = {posed.state_rows!r}, expected {problem.state_rows!r} from the plan"
            )
        for field, argument in _ARGUMENT_OF_FIELD.items():
            came, planned = getattr(posed, field), getattr(problem, field)
            if came != planned:
                raise ArgumentTypeError(argument, f"{field} = {came}, expected {planned} from the plan")


def plan(
    problem: GatedDeltaRuleProblem, device: torch.device | str | None = None, backend: str = "auto"
) -> Plan:
    """Resolve `problem` and compile or load its kernel.

    device: None for the current CUDA device, or the CPU where there is none. backend: a provider's name, or
    "auto" for the tuned or else the preferred one. Raises NoKernelError with every provider's reason, or if
    the chosen one asks for a workspace, which this operation does not have.
    `kernel_dispatch.explain(problem)` shows the same choice without loading anything.
    """
    if not isinstance(problem, GatedDeltaRuleProblem):
        raise ArgumentTypeError("problem", f"{type(problem).__name__}, expected a GatedDeltaRuleProblem")
    check_backend(backend)
    device = as_device(device)
    return Plan(problem, device, resolve(problem, as_arch(device), backend))


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
        known = _PLANS.get(_key(form, tensors, scale, flags), _given(tensors))
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
    selection = _select(problem, tensors, problem.K**-0.5 if scale is None else scale, output, flags)
    plan = Plan(problem, tensors.q.device, selection)
    _PLANS.put(_key(form, tensors, scale, flags), plan, _given(tensors))
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


def _given(tensors: TensorTuple) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _output_of(tensors: TensorTuple) -> Tensor:
    """The output that the caller gave, or a new one like v."""
    v: Tensor = tensors[2]
    output: Tensor | None = tensors[-1]
    return v.new_empty(v.shape) if output is None else output


def _select(
    problem: GatedDeltaRuleProblem,
    tensors: CallTensors,
    scale: float | Tensor,
    output: Tensor,
    flags: CallFlags,
) -> Selection:
    """The kernel and tactic for a call; inside `kernel_dispatch.autotune()` they are timed on its tensors."""
    device = tensors.q.device
    arch = as_arch(device)
    if flags.backend != "auto":
        return resolve(problem, arch, flags.backend)

    def make_run(selection: Selection) -> Callable[[], None]:
        return partial(_start, _prepare(problem, device, selection), scale, tensors, output)

    return choose(problem, arch, device, make_run, partial(_snapshot, problem, tensors))


def _prepare(
    problem: GatedDeltaRuleProblem, device: torch.device, selection: Selection
) -> Callable[..., None]:
    """The launcher of a chosen tactic. Raises NoKernelError for one that needs what launchers do not get."""
    arch = as_arch(device)
    workspace_nbytes = selection.kernel.workspace_nbytes(problem, arch)
    if workspace_nbytes:
        raise NoKernelError(
            f"provider {selection.provider.name!r} asks for {workspace_nbytes} bytes of workspace for "
            f"{problem.describe()}; launchers of {problem.entry_point_group} get none"
        )
    return selection.kernel.prepare(problem, arch, device, selection.tactic)


def _start(
    launcher: Callable[..., None], scale: float | Tensor, tensors: TensorTuple, output: Tensor
) -> None:
    """Call a launcher; index tensors reach it with the dtype of the first, the scale as a float or [1]."""
    q, k, v, A_log, a, dt_bias, b, state, reads, writes, buffer, scatter, _ = tensors
    if not isinstance(scale, Tensor):
        scale = float(scale)
    elif scale.dim() != 1:
        scale = scale.view(1)
    if writes is not None and reads is not None:
        writes = writes.to(reads.dtype)
    if scatter is not None and reads is not None:
        scatter = scatter.to(reads.dtype)
    launcher(q, k, v, a, b, A_log, dt_bias, scale, state, reads, writes, buffer, scatter, output)


def _snapshot(problem: GatedDeltaRuleProblem, tensors: CallTensors) -> Callable[[], None]:
    """Save the slots that the call writes; the result puts them back."""
    if not problem.update_state:
        return lambda: None
    state = tensors.state
    _, slots = written_slots(tensors)
    slots = torch.arange(problem.B, device=state.device) if slots is None else slots.flatten().long()
    named = slots[slots >= 0]
    saved = state.index_select(0, named)

    def restore() -> None:
        state.index_copy_(0, named, saved)

    return restore
