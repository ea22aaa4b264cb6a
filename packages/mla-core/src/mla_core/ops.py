"""The custom op `mla_core::decode`: how torch.compile, torch.export and fake tensors see a decode call.

It writes `out`, `lse` and `workspace` and returns nothing. A scale comes as two arguments, a float or else a
tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_dispatch import register_op, split_scale

from .call import Options, bind_call, execute, remember, run_known
from .specs import DecodeTensors


def decode_through_op(tensors: DecodeTensors, options: Options) -> None:
    """`execute` by way of the dispatcher."""
    _decode_op(
        tensors.query,
        tensors.kv_cache,
        tensors.block_tables,
        tensors.seq_lens,
        tensors.cum_seq_lens_q,
        *split_scale("softmax_scale", tensors.softmax_scale),
        *split_scale("output_scale", tensors.output_scale),
        tensors.out,
        tensors.lse,
        tensors.workspace,
        options.kv_lora_rank,
        options.qk_rope_head_dim,
        options.max_seq_len,
        options.max_q_len,
        options.is_var_seq,
        options.enable_pdl,
        options.backend,
    )


def _decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    cum_seq_lens_q: torch.Tensor | None,
    softmax_scale: float | None,
    softmax_scale_tensor: torch.Tensor | None,
    output_scale: float | None,
    output_scale_tensor: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    max_seq_len: int | None,
    max_q_len: int | None,
    is_var_seq: bool,
    enable_pdl: bool | None,
    backend: str,
) -> None:
    tensors, options = _packed(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        cum_seq_lens_q,
        softmax_scale,
        softmax_scale_tensor,
        output_scale,
        output_scale_tensor,
        out,
        lse,
        workspace,
        kv_lora_rank,
        qk_rope_head_dim,
        max_seq_len,
        max_q_len,
        is_var_seq,
        enable_pdl,
        backend,
    )
    return_lse = tensors.lse is not None
    if run_known(tensors, options, None, return_lse) is None:
        options.check()
        plan = execute(tensors, options)
        if plan is not None:
            remember(plan, tensors, options, None, return_lse)


def _decode_fake(*arguments: Any) -> None:
    tensors, options = _packed(*arguments)
    options.check()
    bind_call(tensors, options)


def _packed(*arguments: Any) -> tuple[DecodeTensors, Options]:
    """The arguments of the op as what `execute` takes; the inverse of `decode_through_op`."""
    query, kv_cache, block_tables, seq_lens, cum_seq_lens_q, *arguments_from_scales = arguments
    softmax_scale, softmax_scale_tensor, output_scale, output_scale_tensor, *rest = arguments_from_scales
    out, lse, workspace, *options = rest
    tensors = DecodeTensors(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        cum_seq_lens_q,
        softmax_scale if softmax_scale_tensor is None else softmax_scale_tensor,
        output_scale if output_scale_tensor is None else output_scale_tensor,
        out,
        lse,
        workspace,
    )
    return tensors, Options(*options)


_decode_op = register_op(
    "mla_core::decode", _decode, mutates_args=("out", "lse", "workspace"), fake=_decode_fake
)
