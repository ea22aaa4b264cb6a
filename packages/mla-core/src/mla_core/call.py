"""The eager decode call: from checked types to a launch, through cached plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_dispatch import (
    ArgumentError,
    PlanCache,
    Selection,
    as_arch,
    check_workspace,
    choose,
    resolve,
    tensor_key,
)

from .plan import Plan, cached_plan, plan_selection
from .problem import DecodeProblem, check_backend, check_bool, check_positive
from .specs import DecodeTensors, bind_tensors, check_values

_plans: PlanCache[Plan] = PlanCache()


@dataclass(frozen=True)
class Options:
    """The arguments of a call that are neither tensors nor scales; see `mla_core.decode`."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    max_seq_len: int | None
    max_q_len: int | None
    is_var_seq: bool
    enable_pdl: bool | None
    backend: str

    def __post_init__(self) -> None:
        check_positive("kv_lora_rank", self.kv_lora_rank)
        check_positive("qk_rope_head_dim", self.qk_rope_head_dim)
        if self.max_seq_len is not None:
            check_positive("max_seq_len", self.max_seq_len)
        if self.max_q_len is not None:
            check_positive("max_q_len", self.max_q_len)
        check_bool("is_var_seq", self.is_var_seq)
        check_bool("enable_pdl", self.enable_pdl, optional=True)
        check_backend(self.backend)


def execute(tensors: DecodeTensors, options: Options) -> None:
    """Check what the plan cache does not cover, and launch. `out` is given; lse is wanted if it is given."""
    if tensors.query.is_meta:
        raise ArgumentError("query", "on meta, expected a tensor with data")
    if tensors.query.dim() and not tensors.query.shape[0]:  # no requests, or no tokens
        bind_call(tensors, options)
        return
    plan = _plan_for(tensors, options)
    check_values(tensors, plan.problem)
    device = tensors.query.device
    if tensors.workspace is not None or not plan.workspace_nbytes:
        check_workspace(tensors.workspace, plan.workspace_nbytes, device)
    else:
        workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device=device)
        tensors = tensors._replace(workspace=workspace)
    plan.launch(tensors)


def bind_call(tensors: DecodeTensors, options: Options) -> dict[str, int]:
    """Check the tensors and what combines them with options; return the named sizes. Takes fake tensors."""
    if tensors.ragged and options.max_q_len is None:
        raise ArgumentError("max_q_len", "None, expected the most tokens of a request of cum_seq_lens_q")
    if not tensors.ragged and options.max_q_len is not None:
        raise ArgumentError("max_q_len", f"{options.max_q_len} without cum_seq_lens_q, expected None")
    head_dim = options.kv_lora_rank + options.qk_rope_head_dim
    return bind_tensors(tensors, kv_lora_rank=options.kv_lora_rank, head_dim=head_dim, out_dtype=None)


def _plan_for(tensors: DecodeTensors, options: Options) -> Plan:
    scales = (tensors.softmax_scale, tensors.output_scale)
    scales_are_tensors = tuple(isinstance(scale, torch.Tensor) for scale in scales)
    optional = (tensors.cum_seq_lens_q, tensors.out, tensors.lse)
    key = (
        options,
        scales_are_tensors,
        tensor_key(tensors.query),
        tensor_key(tensors.kv_cache),
        tensor_key(tensors.block_tables),
        tensor_key(tensors.seq_lens),
        *(None if tensor is None else tensor_key(tensor) for tensor in optional),
    )
    plan = _plans.get(key)
    if plan is None:
        problem = _problem_of(tensors, options, bind_call(tensors, options), scales_are_tensors)
        backend = options.backend
        device = tensors.query.device
        plan = cached_plan(problem, device, backend, None, lambda: _select(problem, tensors, backend))
        _plans.put(key, plan)
    return plan


def _problem_of(
    tensors: DecodeTensors, options: Options, sizes: dict[str, int], scales_are_tensors: tuple[bool, ...]
) -> DecodeProblem:
    assert tensors.out is not None
    capacity = sizes["max_pages"] * sizes["page_size"]
    return DecodeProblem(
        batch=sizes["batch"],
        q_len=options.max_q_len or sizes.get("q_len", 1),
        num_heads=sizes["num_heads"],
        kv_lora_rank=options.kv_lora_rank,
        qk_rope_head_dim=options.qk_rope_head_dim,
        page_size=sizes["page_size"],
        max_seq_len=capacity if options.max_seq_len is None else options.max_seq_len,
        max_pages=sizes["max_pages"],
        q_dtype=tensors.query.dtype,
        kv_dtype=tensors.kv_cache.dtype,
        out_dtype=tensors.out.dtype,
        is_var_seq=options.is_var_seq,
        ragged=tensors.ragged,
        return_lse=tensors.lse is not None,
        enable_pdl=options.enable_pdl,
        softmax_scale_is_tensor=scales_are_tensors[0],
        output_scale_is_tensor=scales_are_tensors[1],
    )


def _select(problem: DecodeProblem, tensors: DecodeTensors, backend: str) -> Selection:
    """Resolve, or inside `autotune` profile the candidates on the tensors of this call."""
    device = tensors.query.device
    if backend != "auto":
        return resolve(problem, device, backend)
    check_values(tensors, problem)  # profiling would write

    def make_run(candidate: Selection) -> Callable[[], None]:
        plan = plan_selection(candidate, problem, device)
        workspace = tensors.workspace
        if workspace is None and plan.workspace_nbytes:
            workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device=device)
        check_workspace(workspace, plan.workspace_nbytes, device)
        arguments = tensors._replace(workspace=workspace)
        return lambda: plan.launch(arguments)

    def snapshot() -> Callable[[], None]:
        written = [tensor for tensor in (tensors.out, tensors.lse) if tensor is not None]
        saved = [tensor.clone() for tensor in written]

        def restore() -> None:
            for tensor, value in zip(written, saved, strict=True):
                tensor.copy_(value)

        return restore

    return choose(problem, as_arch(device), device, make_run, snapshot)
