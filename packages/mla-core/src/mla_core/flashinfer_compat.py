"""FlashInfer's entry point over `decode`: its argument names, order and defaults, so that one import changes.

Where the meaning is FlashInfer's and not `decode`'s, the docstring says so. An option that is not implemented
raises when it is given a value other than its default.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, TensorSpec, bind

from .api import decode
from .problem import check_bool, check_positive
from .specs import Scale

LOG2_E = math.log2(math.e)

# Arguments of `decode` that go by another name here.
_RENAMED = {"softmax_scale": "bmm1_scale", "output_scale": "bmm2_scale", "workspace": "workspace_buffer"}


def trtllm_batch_decode_with_kv_cache_mla(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    workspace_buffer: torch.Tensor,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor | None,
    max_seq_len: int,
    sparse_mla_top_k: int = 0,
    out: torch.Tensor | None = None,
    bmm1_scale: Scale = 1.0,
    bmm2_scale: Scale = 1.0,
    sinks: list[torch.Tensor] | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    is_var_seq: bool = True,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    cute_dsl_impl: str = "auto",
    kv_scale_format: str = "auto",
    cum_seq_lens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    sparse_mla_top_k_lens: torch.Tensor | None = None,
    enable_dcp: bool = False,
    cp_world: int = 1,
    cp_rank: int = 0,
    causal_seqlens_kv_global: torch.Tensor | None = None,
    use_fp16_softmax: bool | None = None,
    return_lse_base: Literal["basee", "base2"] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`mla_core.decode` under FlashInfer's argument list; arguments not named here mean what they mean there.

    workspace_buffer: uint8 or int8, one dimension; need not be zeroed. Too small is an error with both sizes.
    qk_nope_head_dim: a positive int; the query is absorbed already, so that nothing depends on it.
    seq_lens: required. max_seq_len: other than in FlashInfer, at most what the block table has pages for.
    bmm1_scale: the softmax_scale, on the logits only. bmm2_scale: the output_scale, on the output only.
    backend: "auto" or the name of a provider of `mla_core.decode.v1`.
    lse: [total tokens, num_heads], or the query's shape without its last dimension; returned in the shape
        given, or in the first of the two where none is given.
    return_lse_base: "base2" for the base-2 logarithm; "basee" and None for the natural one. Other than in
        FlashInfer, None does not depend on the backend. Refused without return_lse.
    cum_seq_lens_q without max_q_len: the longest request is read from cum_seq_lens_q, which synchronises.

    Not implemented, and refused: sparse_mla_top_k, sinks, skip_softmax_threshold_scale_factor, cute_dsl_impl,
    uses_shared_paged_kv_idx=False, kv_scale_format, multi_ctas_kv_counter_buffer, sparse_mla_top_k_lens,
    enable_dcp, cp_world, cp_rank, causal_seqlens_kv_global, use_fp16_softmax=True.
    """
    check_bool("use_fp16_softmax", use_fp16_softmax, optional=True)
    for name, value, default in (
        ("sparse_mla_top_k", sparse_mla_top_k, 0),
        ("sinks", sinks, None),
        ("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor, None),
        ("uses_shared_paged_kv_idx", uses_shared_paged_kv_idx, True),
        ("cute_dsl_impl", cute_dsl_impl, "auto"),
        ("kv_scale_format", kv_scale_format, "auto"),
        ("multi_ctas_kv_counter_buffer", multi_ctas_kv_counter_buffer, None),
        ("sparse_mla_top_k_lens", sparse_mla_top_k_lens, None),
        ("enable_dcp", enable_dcp, False),
        ("cp_world", cp_world, 1),
        ("cp_rank", cp_rank, 0),
        ("causal_seqlens_kv_global", causal_seqlens_kv_global, None),
        ("use_fp16_softmax", use_fp16_softmax or None, None),
    ):
        _check_default(name, value, default)
    check_positive("qk_nope_head_dim", qk_nope_head_dim)
    check_positive("max_seq_len", max_seq_len)
    check_bool("return_lse", return_lse)
    if return_lse_base not in (None, "basee", "base2"):
        raise ArgumentError("return_lse_base", f"{return_lse_base!r}, expected 'basee', 'base2' or None")
    if return_lse_base is not None and lse is None and not return_lse:
        raise ArgumentError("return_lse_base", f"{return_lse_base!r} without return_lse=True")
    if seq_lens is None:
        raise ArgumentTypeError("seq_lens", "None, expected a tensor [batch]")
    if not isinstance(workspace_buffer, torch.Tensor):
        raise ArgumentTypeError("workspace_buffer", f"{type(workspace_buffer).__name__}, expected a tensor")
    if cum_seq_lens_q is not None and max_q_len is None:
        max_q_len = _longest_request(query, cum_seq_lens_q)
    try:
        result = decode(
            query,
            kv_cache,
            block_tables,
            seq_lens,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            softmax_scale=bmm1_scale,
            output_scale=bmm2_scale,
            max_seq_len=max_seq_len,
            out=out,
            return_lse=return_lse,
            lse=_with_leading_dims_of(query, lse),
            workspace=workspace_buffer,
            is_var_seq=is_var_seq,
            cum_seq_lens_q=cum_seq_lens_q,
            max_q_len=max_q_len,
            enable_pdl=enable_pdl,
            backend=backend,
        )
    except ArgumentError as error:
        raise type(error)(_RENAMED.get(error.argument, error.argument), error.problem) from None
    if isinstance(result, torch.Tensor):
        return result
    written_out, written_lse = result
    if return_lse_base == "base2":
        written_lse.mul_(LOG2_E)
    if lse is not None:
        return written_out, lse
    return written_out, written_lse.flatten(0, -2)


def _check_default(name: str, value: object, default: object) -> None:
    if value is default or (type(value) is type(default) and value == default):
        return
    shown = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    raise ArgumentError(name, f"{shown} is not implemented, expected {default!r}")


def _longest_request(query: torch.Tensor, cum_seq_lens_q: torch.Tensor) -> int:
    """The most tokens of a request, read from offsets that are first checked to be such."""
    if not isinstance(query, torch.Tensor):
        raise ArgumentTypeError("query", f"{type(query).__name__}, expected a tensor")
    spec = TensorSpec("cum_seq_lens_q", ("batch + 1",), (torch.int32,))
    sizes = bind((spec,), {spec.name: cum_seq_lens_q}, device=query.device)
    if sizes["batch + 1"] < 2:
        raise ArgumentError(spec.name, f"{sizes['batch + 1']} entries, expected batch + 1, at least 2")
    if cum_seq_lens_q.is_meta:
        raise ArgumentError(spec.name, "on meta, expected a tensor with data, or max_q_len beside it")
    return max(1, int(cum_seq_lens_q.diff().max()))


def _with_leading_dims_of(query: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor | None:
    """A view of lse [batch * q_len, num_heads] as [batch, q_len, num_heads]; anything else as it is."""
    if not isinstance(lse, torch.Tensor) or not isinstance(query, torch.Tensor):
        return lse
    if lse.dim() == 2 and query.dim() == 4:
        batch, q_len = query.shape[:2]
        if lse.shape[0] != batch * q_len:
            raise ArgumentError("lse", f"{lse.shape[0]} rows, expected batch * q_len = {batch * q_len}")
        return torch.unflatten(lse, 0, (batch, q_len))
    return lse
