"""What the plans of all functions share: a prepared kernel, the choice of it, and checks against a plan."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, get_args

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    NoKernelError,
    Problem,
    Selection,
    as_arch,
    choose,
    resolve,
)
from torch import Tensor

from gdn_mtp.problem import StateRows


class StateProblem(Problem, Protocol):
    """What the problems of all functions have in common."""

    @property
    def K(self) -> int:
        """Elements of a key."""
        ...

    @property
    def state_rows(self) -> StateRows:
        """How the rows of a state lie in memory."""
        ...


ProblemT = TypeVar("ProblemT", bound=StateProblem)


class PreparedKernel(Generic[ProblemT]):
    """One problem on one device, its kernel compiled or loaded.

    problem, device: what it is for. provider, tactic, reason: what was chosen and why.
    Raises NoKernelError for a kernel that needs a workspace, which launchers here do not get.
    """

    def __init__(self, problem: ProblemT, device: torch.device, selection: Selection) -> None:
        arch = as_arch(device)
        workspace_nbytes = selection.kernel.workspace_nbytes(problem, arch, selection.tactic)
        if workspace_nbytes:
            raise NoKernelError(
                f"provider {selection.provider.name!r} asks for {workspace_nbytes} bytes of workspace for "
                f"{problem.describe()}; launchers of {problem.entry_point_group} get none"
            )
        self.problem = problem
        self.device = device
        self.provider = selection.provider.name
        self.tactic = selection.tactic
        self.reason = selection.reason
        self.always_checked = device.type == "cpu"
        self._launcher = selection.kernel.prepare(problem, arch, device, selection.tactic)
        self._default_scale: float = problem.K**-0.5

    def __repr__(self) -> str:
        kind, what = type(self).__name__, self.problem.describe()
        return f"{kind}({what} on {self.device}: {self.provider}, tactic {self.tactic})"

    def _launch_scale(self, scale: float | Tensor | None) -> float | Tensor:
        """What a launcher takes for a checked scale: a float, or a tensor [1]."""
        if scale is None:
            return self._default_scale
        if not isinstance(scale, Tensor):
            return float(scale)
        return scale if scale.dim() == 1 else scale.view(1)


def select(
    problem: Problem,
    device: torch.device,
    backend: str,
    make_run: Callable[[Selection], Callable[[], None]],
    snapshot: Callable[[], Callable[[], None]],
) -> Selection:
    """The kernel and tactic for a call. Inside `kernel_dispatch.autotune()` they are timed on its tensors.

    make_run, snapshot: what to time, and how to undo it; see `kernel_dispatch.choose`.
    """
    arch = as_arch(device)
    if backend != "auto":
        return resolve(problem, arch, backend)
    return choose(problem, arch, device, make_run, snapshot)


def given(tensors: Sequence[Any]) -> list[Tensor]:
    """The tensors of a call that are not None: a plan cache compares how they look."""
    return [tensor for tensor in tensors if tensor is not None]


def saved_slots(tensors: Sequence[Tensor], slots: Tensor) -> Callable[[], None]:
    """Save `slots` [n] int64, none negative, of each tensor; the result puts them back."""
    saved = [tensor.index_select(0, slots) for tensor in tensors]

    @torch.inference_mode()
    def restore() -> None:
        for tensor, rows in zip(tensors, saved, strict=True):
            tensor.index_copy_(0, slots, rows)

    return restore


def check_planned(
    posed: ProblemT, planned: ProblemT, state: str, argument_of_field: Mapping[str, str]
) -> None:
    """Raises, naming the argument, unless the problem that a call poses is the planned one.

    state: the name of the state argument. argument_of_field: the fields to compare, and which argument each
    describes. A state whose rows lie better than planned will do.
    """
    ranks = get_args(StateRows)
    if ranks.index(posed.state_rows) > ranks.index(planned.state_rows):
        raise ArgumentError(
            state, f"state_rows = {posed.state_rows!r}, expected {planned.state_rows!r} from the plan"
        )
    for field, argument in argument_of_field.items():
        came, expected = getattr(posed, field), getattr(planned, field)
        if came != expected:
            raise ArgumentTypeError(argument, f"{field} = {came}, expected {expected} from the plan")
