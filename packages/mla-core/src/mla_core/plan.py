"""Plans: everything about a decode problem that is settled before the first launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from kernel_dispatch import (
    Arch,
    ArgumentTypeError,
    PlanCache,
    Selection,
    as_arch,
    as_device,
    check_backend,
    check_workspace,
    debug_mode,
    launch_workspace,
    resolve,
)

from .problem import DecodeProblem, check_problem
from .specs import DecodeTensors, Scale, bind_tensors, check_values

_plans: PlanCache[Plan] = PlanCache()


@dataclass(frozen=True)
class Plan:
    """A provider and tactic chosen and prepared for one problem on one device; see `plan`.

    provider: its name. tactic: its variant. reason: why it was chosen.
    workspace_nbytes: bytes of workspace that each run needs; one workspace per stream in flight.
    A plan holds no tensors and may be used from several threads.
    """

    problem: DecodeProblem
    device: torch.device
    provider: str
    tactic: str
    reason: str
    workspace_nbytes: int
    _launch: Callable[..., None] = field(repr=False)

    @cached_property
    def always_checked(self) -> bool:
        """Whether every run checks its arguments, as on the CPU, and not only those in debug mode."""
        return self.device.type == "cpu"

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        softmax_scale: Scale,
        output_scale: Scale = 1.0,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        cum_seq_lens_q: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """Launch, and nothing else: write `out`, and `lse` if the problem has return_lse.

        Arguments are those of `mla_core.decode`, with the sizes and dtypes of the problem. Nothing is
        allocated, synchronised or compiled, so a run can be captured in a CUDA graph. Arguments are checked
        on the CPU and in debug mode; elsewhere only the size of the workspace is, and other tensors that do
        not fit the problem are undefined behaviour.
        """
        tensors = DecodeTensors(
            query,
            kv_cache,
            block_tables,
            seq_lens,
            cum_seq_lens_q,
            softmax_scale,
            output_scale,
            out,
            lse,
            workspace,
        )
        if self.always_checked or debug_mode():
            self._check(tensors)
        elif self.workspace_nbytes and (workspace is None or workspace.nbytes < self.workspace_nbytes):
            check_workspace(workspace, self.workspace_nbytes, self.device)
        self.launch(tensors)

    def launch(self, tensors: DecodeTensors) -> None:
        """Launch on tensors that have been checked; without query tokens there is nothing to do."""
        if not tensors.query.numel():
            return
        if self.workspace_nbytes and debug_mode():
            with launch_workspace(tensors.workspace, self.workspace_nbytes, self.device) as workspace:
                self._launch(*tensors._replace(workspace=workspace).launch_arguments())
        else:
            self._launch(*tensors.launch_arguments())

    def _check(self, tensors: DecodeTensors) -> None:
        problem = self.problem
        tensors.check_types()
        for name, given, wanted in (
            ("out", tensors.out, True),
            ("lse", tensors.lse, problem.return_lse),
            ("cum_seq_lens_q", tensors.cum_seq_lens_q, problem.ragged),
        ):
            if (given is not None) != wanted:
                came = "None" if given is None else "a tensor"
                expected = "a tensor" if wanted else "None"
                raise ArgumentTypeError(name, f"{came}, expected {expected} by the plan")
        for name, scale, is_tensor in (
            ("softmax_scale", tensors.softmax_scale, problem.softmax_scale_is_tensor),
            ("output_scale", tensors.output_scale, problem.output_scale_is_tensor),
        ):
            if isinstance(scale, torch.Tensor) != is_tensor:
                expected = "a tensor" if is_tensor else "a float"
                raise ArgumentTypeError(name, f"{type(scale).__name__}, expected {expected} by the plan")
        bind_tensors(
            tensors,
            kv_lora_rank=problem.kv_lora_rank,
            head_dim=problem.head_dim,
            out_dtype=problem.out_dtype,
            problem=problem,
            device=self.device,
        )
        check_workspace(tensors.workspace, self.workspace_nbytes, self.device)
        tensors.check_memory()
        check_values(tensors, problem)


def plan(
    problem: DecodeProblem,
    device: torch.device | str | None = None,
    backend: str = "auto",
    tactic: str | None = None,
) -> Plan:
    """Choose a provider for `problem`, and compile or load its kernel.

    device: None is the current CUDA device, or the CPU where there is none.
    backend: the name of a provider, or "auto" for the tuner's choice if it has one and else the highest
        priority that supports the problem.
    tactic: the name of one of that provider's; None for the tuned one, or else the one that it prefers.
    Plans are cached. Raises NoKernelError with every provider's reason; ArgumentError naming `tactic`
    and those that there are.
    """
    check_problem(problem)
    check_backend(backend)
    device = as_device(device)
    return cached_plan(problem, device, backend, tactic, lambda: resolve(problem, device, backend, tactic))


def cached_plan(
    problem: DecodeProblem,
    device: torch.device,
    backend: str,
    tactic: str | None,
    select: Callable[[], Selection],
) -> Plan:
    """The cached plan of these arguments, or one of what `select` chooses, which is then cached."""
    key = (problem, device, backend, tactic)
    cached = _plans.get(key)
    if cached is None:
        cached = plan_selection(select(), problem, device)
        _plans.put(key, cached)
    return cached


def plan_selection(selection: Selection, problem: DecodeProblem, device: torch.device) -> Plan:
    """The plan of a provider and tactic that are already chosen; not cached."""
    arch = as_arch(device)
    return Plan(
        problem=problem,
        device=device,
        provider=selection.provider.name,
        tactic=selection.tactic,
        reason=selection.reason,
        workspace_nbytes=selection.kernel.workspace_nbytes(problem, arch, selection.tactic),
        _launch=selection.kernel.prepare(problem, arch, device, selection.tactic),
    )


def workspace_nbytes(
    problem: DecodeProblem, arch: Arch | str | torch.device | None = None, backend: str = "auto"
) -> int:
    """Bytes of workspace for any launch of `problem` on `arch`, with the provider that `backend` resolves to.

    They are enough for each of its tactics, so for what a tuner may choose later; a `Plan` may need fewer.
    arch: a name such as "sm_90a" will do on a machine without that GPU. It stands for one number of SMs: a
    GPU with another may need more, or less, so where the device is at hand it is what to pass.
    """
    check_problem(problem)
    check_backend(backend)
    arch = as_arch(arch)
    return resolve(problem, arch, backend).kernel.workspace_nbytes(problem, arch)
