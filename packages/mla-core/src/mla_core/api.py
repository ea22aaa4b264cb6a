"""`decode`: the functional call."""

from __future__ import annotations

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, needs_op

from .call import Options, execute, remember, results, run_known, with_outputs
from .ops import decode_through_op
from .problem import OUT_DTYPES, check_bool, check_dtype
from .specs import DecodeTensors, Scale


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    softmax_scale: Scale,
    output_scale: Scale = 1.0,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    lse: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    is_var_seq: bool = True,
    cum_seq_lens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    enable_pdl: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA decode over a paged cache: `out`, or `(out, lse)` with return_lse.

        s_k = softmax_scale * query . key_k      out = output_scale * sum_k softmax(s)_k latent(key_k)

    A key is kv_lora_rank latent elements followed by qk_rope_head_dim rope elements, head_dim together; the
    query is laid out alike. Query token i of a request sees the keys before seq_len - q_len + i + 1.

    query: [batch, q_len, num_heads, head_dim]; or [batch, num_heads, head_dim], one token per request; or
        ragged, [total_q, num_heads, head_dim] with cum_seq_lens_q. bfloat16, float16 or float8_e4m3fn;
        num_heads 1 to 128.
    kv_cache: [num_pages, page_size, head_dim] or [num_pages, 1, page_size, head_dim], dtype of the query.
    block_tables: [batch, max_pages] int32. A negative entry is not read, and its keys are absent. Entries
        beyond the pages of seq_len may hold anything.
    seq_lens: [batch] int32, keys per request, those of the query tokens included. A row that sees no key
        gets zeros and lse = -inf.
    softmax_scale, output_scale: a float, or a one-element float32 tensor that is read on the device.
    max_seq_len: upper bound of seq_lens; by default what a row of the block table holds. It is part of the
        plan, as the width of the table is: keep both constant while requests grow, as a CUDA graph needs.
    out: written and returned, [..., num_heads, kv_lora_rank] with the leading dimensions of the query.
    out_dtype: bfloat16, float16 or float8_e4m3fn (saturating); by default that of `out`, else that of the
        query, bfloat16 for an fp8 query.
    lse: written and returned with return_lse, float32 [..., num_heads]: natural log of the sum of exp(s_k).
    workspace: uint8 [at least `workspace_nbytes`], contents on entry do not matter; allocated if None. One
        per stream in flight.
    is_var_seq: False promises equal seq_lens.
    cum_seq_lens_q, max_q_len: ragged queries. Tokens cum_seq_lens_q[b] to cum_seq_lens_q[b + 1] of the query
        belong to request b; [batch + 1] int32, from 0 to total_q. No request has more than max_q_len tokens.
    enable_pdl: programmatic dependent launch; None asks the device, True is refused by providers that cannot.
    backend: name of a provider, which is then used or raises; or "auto".

    All tensors are on one device and have stride 1 in the last dimension; out, lse and workspace share no
    memory with other arguments. Values (lengths, indices, offsets, scale tensors) are checked on the CPU and
    in debug mode, before anything is written; elsewhere they are the caller's responsibility, as nothing
    synchronises. Raises ArgumentError or ArgumentTypeError naming the argument, NoKernelError with every
    provider's reason.
    """
    options = Options(kv_lora_rank, qk_rope_head_dim, max_seq_len, max_q_len, is_var_seq, enable_pdl, backend)
    given = DecodeTensors(
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
    known = run_known(given, options, out_dtype, return_lse)
    if known is not None:
        return known
    options.check()
    check_bool("return_lse", return_lse)
    if lse is not None and not return_lse:
        raise ArgumentError("lse", "given without return_lse=True")
    if not isinstance(query, torch.Tensor):
        raise ArgumentTypeError("query", f"{type(query).__name__}, expected a tensor")
    if out_dtype is not None:
        check_dtype("out_dtype", out_dtype, OUT_DTYPES)
        if isinstance(out, torch.Tensor):
            check_dtype("out", out.dtype, (out_dtype,))
    tensors = with_outputs(given, kv_lora_rank, out_dtype, return_lse)
    tensors.check_types()
    if needs_op(*tensors.all_tensors()):
        decode_through_op(tensors, options)
    else:
        plan = execute(tensors, options)
        if plan is not None:
            remember(plan, given, options, out_dtype, return_lse)
    return results(tensors)
