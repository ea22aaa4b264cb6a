"""The eager decode call: from checked types to a launch, through cached plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from kernel_dispatch import (
    ArgumentError,
    PlanCache,
    Selection,
    as_arch,
    check_backend,
    check_registered,
    check_workspace,
    choose,
    is_watched,
    resolve,
)

from .plan import Plan, cached_plan, plan_selection
from .problem import DecodeProblem, check_bool, check_positive, default_out_dtype
from .specs import DecodeTensors, bind_tensors, check_scales, check_values

_plans: PlanCache[Plan] = PlanCache()


class Options(NamedTuple):
    """The arguments of a call that are neither tensors nor scales; see `mla_core.decode`."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    max_seq_len: int | None
    max_q_len: int | None
    is_var_seq: bool
    enable_pdl: bool | None
    backend: str

    def check(self) -> None:
        """Raise ArgumentError or ArgumentTypeError, naming the argument, for what no call takes."""
        check_positive("kv_lora_rank", self.kv_lora_rank)
        check_positive("qk_rope_head_dim", self.qk_rope_head_dim)
        if self.max_seq_len is not None:
            check_positive("max_seq_len", self.max_seq_len)
        if self.max_q_len is not None:
            check_positive("max_q_len", self.max_q_len)
        check_bool("is_var_seq", self.is_var_seq)
        check_bool("enable_pdl", self.enable_pdl, optional=True)
        check_backend(self.backend)


Results = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def run_known(
    given: DecodeTensors, options: Options, out_dtype: torch.dtype | None, return_lse: bool
) -> Results | None:
    """Run a call that looks like an earlier one by the plan of that one; return its results, None if new.

    Nothing has been checked yet; what `remember` was told has been, for tensors that look the same.
    """
    if is_watched():
        return None
    try:
        plan = _plans.get(_key(given, options, out_dtype, return_lse), given.all_but_numbers())
    except (AttributeError, TypeError):  # no tensor, or an option that cannot be hashed; `execute` says which
        return None
    if plan is None:
        return None
    if given.out is not None or given.lse is not None or given.workspace is not None:
        given.check_memory()
    tensors = with_outputs(given, options.kv_lora_rank, out_dtype, return_lse)
    _run(plan, tensors)
    return results(tensors)


def execute(tensors: DecodeTensors, options: Options) -> Plan | None:
    """Check a call in full, make its plan and run it. `out` is given; lse is wanted if it is given.

    Returns the plan; None if there is nothing to do.
    """
    if tensors.query.is_meta:
        raise ArgumentError("query", "on meta, expected a tensor with data")
    sizes = bind_call(tensors, options)
    if not tensors.query.shape[0]:
        _check_empty(tensors, options, sizes)
        return None
    if not sizes["batch"]:
        raise ArgumentError("cum_seq_lens_q", f"has no requests for {tensors.query.shape[0]} tokens of query")
    tensors.check_memory()
    problem = _problem_of(tensors, options, sizes)
    device, backend = tensors.query.device, options.backend
    plan = cached_plan(problem, device, backend, None, lambda: _select(problem, tensors, backend))
    _run(plan, tensors)
    return plan


def _check_empty(tensors: DecodeTensors, options: Options, sizes: dict[str, int]) -> None:
    """Check a call without requests, or without tokens, which no provider is asked to take."""
    check_registered(DecodeProblem.entry_point_group, options.backend)
    problem = _problem_of(tensors, options, sizes | {"batch": max(1, sizes["batch"])})
    if sizes["batch"]:
        check_values(tensors, problem)
    else:
        check_scales(tensors)
    check_workspace(tensors.workspace, 0, tensors.query.device)


def remember(
    plan: Plan, given: DecodeTensors, options: Options, out_dtype: torch.dtype | None, return_lse: bool
) -> None:
    """Keep the plan of a call that went well for `run_known`."""
    _plans.put(_key(given, options, out_dtype, return_lse), plan, given.all_but_numbers())


def with_outputs(
    given: DecodeTensors, kv_lora_rank: int, out_dtype: torch.dtype | None, return_lse: bool
) -> DecodeTensors:
    """The tensors of a call with new outputs where the caller gave none."""
    query, out, lse = given.query, given.out, given.lse
    if out is None:
        out = query.new_empty(
            (*query.shape[:-1], kv_lora_rank), dtype=out_dtype or default_out_dtype(query.dtype)
        )
    if return_lse and lse is None:
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return given._replace(out=out, lse=lse)


def results(tensors: DecodeTensors) -> Results:
    """What a call returns."""
    assert tensors.out is not None
    return tensors.out if tensors.lse is None else (tensors.out, tensors.lse)


def _run(plan: Plan, tensors: DecodeTensors) -> None:
    """Check values and the workspace, for which there is memory if none is given, and launch."""
    check_values(tensors, plan.problem)
    device = tensors.query.device
    if tensors.workspace is not None or not plan.workspace_nbytes:
        check_workspace(tensors.workspace, plan.workspace_nbytes, device)
    else:
        workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device=device)
        tensors = tensors._replace(workspace=workspace)
    plan.launch(tensors)


def _key(given: DecodeTensors, options: Options, out_dtype: torch.dtype | None, return_lse: bool) -> Hashable:
    """What the plan of a call depends on, short of what the cache compares itself: how its tensors look.

    Of those the shapes that change as requests come and go are part of it: a cache of plans compares the
    tensors of a key one plan after the other.
    """
    optional = (given.cum_seq_lens_q, given.out, given.lse, given.workspace)
    return (
        options,
        (out_dtype, return_lse),
        tuple(map(type, (*options, return_lse))),  # 512.0 equals 512, but is refused
        given.query.shape,
        given.block_tables.shape,
        tuple(x is None for x in optional),
        isinstance(given.softmax_scale, torch.Tensor),
        isinstance(given.output_scale, torch.Tensor),
        torch.is_grad_enabled(),
    )


def bind_call(tensors: DecodeTensors, options: Options) -> dict[str, int]:
    """Check the tensors and what combines them with options; return the named sizes. Takes fake tensors."""
    if tensors.ragged and options.max_q_len is None:
        raise ArgumentError("max_q_len", "None, expected the most tokens of a request of cum_seq_lens_q")
    if not tensors.ragged and options.max_q_len is not None:
        raise ArgumentError("max_q_len", f"{options.max_q_len} without cum_seq_lens_q, expected None")
    head_dim = options.kv_lora_rank + options.qk_rope_head_dim
    return bind_tensors(tensors, kv_lora_rank=options.kv_lora_rank, head_dim=head_dim, out_dtype=None)


def _problem_of(tensors: DecodeTensors, options: Options, sizes: dict[str, int]) -> DecodeProblem:
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
        softmax_scale_is_tensor=isinstance(tensors.softmax_scale, torch.Tensor),
        output_scale_is_tensor=isinstance(tensors.output_scale, torch.Tensor),
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
