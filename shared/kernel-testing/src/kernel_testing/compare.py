"""Comparison with a float64 reference: every element lies inside its bound, or the check fails."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_elementwise(actual: Tensor, expected64: Tensor, atol: float, rtol: float, what: str) -> None:
    """Raises AssertionError unless |actual - expected64| <= atol + rtol * |expected64| in every element.

    expected64: float64, of the shape of `actual`. NaN must meet NaN, and an infinity the same infinity, in
    the same position. what: names the result in the message, which shows how many elements failed and, of
    the one furthest outside its bound, the index, both values, the error and the bound.
    """
    if expected64.dtype != torch.float64:
        raise AssertionError(f"{what}: the reference is {expected64.dtype}, expected torch.float64")
    if actual.shape != expected64.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected64.shape)}")
    want = expected64.detach()
    got = actual.detach().to(want.device, torch.float64)
    same_special = (got.isnan() & want.isnan()) | (got.isinf() & (got == want))
    finite = got.isfinite() & want.isfinite()
    bound = atol + rtol * want.abs()
    error = (got - want).abs()
    failed = ~(same_special | (finite & (error <= bound)))
    if not failed.any():
        return
    # An element that is special on one side only is worse than any finite miss.
    limits = torch.finfo(torch.float64)
    badness = (error / bound.clamp(min=limits.tiny)).clamp(max=limits.max)
    badness = torch.where(finite, badness, torch.inf)
    worst = int(torch.where(failed, badness, -1.0).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    got_worst, want_worst = got.flatten()[worst].item(), want.flatten()[worst].item()
    raise AssertionError(
        f"{what}: {int(failed.sum())} of {failed.numel()} elements outside {atol:g} + {rtol:g} * |expected|; "
        f"the worst, at {index}: got {got_worst:.9g}, expected {want_worst:.9g}, "
        f"error {error.flatten()[worst].item():.3g}, bound {bound.flatten()[worst].item():.3g}"
    )
