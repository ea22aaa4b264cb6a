"""Merging of attention over disjoint sets of keys: outputs weighted by their log-sum-exp."""

from __future__ import annotations

import torch
from kernel_dispatch import ArgumentTypeError, TensorSpec, bind, needs_op, register_op

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_states(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of two disjoint sets of keys into that of their union.

        lse = log(exp(lse_a) + exp(lse_b))        o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

    o_a, o_b: [..., head_dim], normalised outputs of one dtype: float32, bfloat16 or float16.
    lse_a, lse_b: [...], natural log, float32. -inf marks a side without keys: the other side is returned
        exactly, whatever the output of the empty side holds. With -inf on both the result is zero and -inf.
    Returns new tensors of the dtypes of o_a and lse_a. Raises ArgumentError naming the argument.
    """
    for name, value in (("o_a", o_a), ("lse_a", lse_a), ("o_b", o_b), ("lse_b", lse_b)):
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(name, f"{type(value).__name__}, expected a tensor")
    if needs_op(o_a, lse_a, o_b, lse_b):
        merged: tuple[torch.Tensor, torch.Tensor] = _merge_op(o_a, lse_a, o_b, lse_b)
        return merged
    return _merge(o_a, lse_a, o_b, lse_b)


def _combine(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge o [parts, ..., head_dim] and lse [parts, ...] over their first dimension; unchecked."""
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
    return _combine(torch.stack((o_a, o_b)), torch.stack((lse_a, lse_b)))


def _merge_fake(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(o_a, lse_a, o_b, lse_b)
    return o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)


def _check(o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    leading = tuple(f"dimension {index}" for index in range(o_a.dim() - 1))
    specs = (
        TensorSpec("o_a", (*leading, "head_dim"), STATE_DTYPES, layout="any"),
        TensorSpec("lse_a", leading, (torch.float32,), layout="any"),
        TensorSpec("o_b", (*leading, "head_dim"), (o_a.dtype,), layout="any"),
        TensorSpec("lse_b", leading, (torch.float32,), layout="any"),
    )
    bind(specs, {"o_a": o_a, "lse_a": lse_a, "o_b": o_b, "lse_b": lse_b})


_merge_op = register_op("mla_core::merge_states", _merge, mutates_args=(), fake=_merge_fake)
