"""Merging of attention over disjoint sets of keys: outputs weighted by their log-sum-exp."""

from __future__ import annotations

import torch
from kernel_dispatch import TensorSpec, bind, needs_op, register_op

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LSE_DTYPES = (torch.float32, torch.float64)


def merge_states(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of two disjoint sets of keys into that of their union.

        lse = log(exp(lse_a) + exp(lse_b))        o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

    o_a, o_b: [..., head_dim], normalised outputs of one dtype (float32, bfloat16, float16 or float64).
    lse_a, lse_b: [...], natural log, float32 or float64. A side with -inf holds no keys: the other side is returned
    bit for bit, whatever `o` holds there. Where both are -inf the result is zero and -inf.
    Returns new tensors of the dtypes of o_a and lse_a. Raises ArgumentError naming the argument.
    """
    if needs_op(o_a, lse_a, o_b, lse_b):
        merged: tuple[torch.Tensor, torch.Tensor] = _merge_op(o_a, lse_a, o_b, lse_b)
        return merged
    return _merge(o_a, lse_a, o_b, lse_b)


def combine_states(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the first dimension of o [parts, ..., head_dim] and lse [parts, ...]: what a split-KV combine computes.

    Semantics of `merge_states`, for any number of parts of at least one.
    """
    lse_max = lse.amax(dim=0)
    finite_max = lse_max.masked_fill(torch.isneginf(lse_max), 0.0)  # -inf - -inf would be NaN
    weights = torch.exp(lse - finite_max)
    total = weights.sum(dim=0)
    shares = (weights / total).unsqueeze(-1)
    parts = torch.where(torch.isneginf(lse).unsqueeze(-1), 0.0, o.to(shares.dtype) * shares)  # 0 * NaN is NaN
    return parts.sum(dim=0).to(o.dtype), finite_max + total.log()


def _merge(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(o_a, lse_a, o_b, lse_b)
    return combine_states(torch.stack((o_a, o_b)), torch.stack((lse_a, lse_b)))


def _merge_fake(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(o_a, lse_a, o_b, lse_b)
    return torch.empty_like(o_a, memory_format=torch.contiguous_format), torch.empty_like(
        lse_a, memory_format=torch.contiguous_format
    )


def _check(o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    rank = o_a.dim() - 1 if isinstance(o_a, torch.Tensor) else 0
    leading = tuple(f"dimension {index}" for index in range(rank))
    o_dtypes = (o_a.dtype,) if isinstance(o_a, torch.Tensor) and o_a.dtype in STATE_DTYPES else STATE_DTYPES
    specs = (
        TensorSpec("o_a", (*leading, "head_dim"), o_dtypes, layout="any"),
        TensorSpec("lse_a", leading, LSE_DTYPES, layout="any"),
        TensorSpec("o_b", (*leading, "head_dim"), o_dtypes, layout="any"),
        TensorSpec("lse_b", leading, LSE_DTYPES, layout="any"),
    )
    bind(specs, {"o_a": o_a, "lse_a": lse_a, "o_b": o_b, "lse_b": lse_b})


_merge_op = register_op("mla_core::merge_states", _merge, mutates_args=(), fake=_merge_fake)
