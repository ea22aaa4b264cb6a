"""What has to hold for a client's output, checked alike by the demo and the tests.

The reference is the untouched model, and its float32 copy for errors. Both sides compute in the same 16-bit
dtype, so the yardstick for our error is the error the untouched model makes itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from common import Case, Greedy
from torch import Tensor

RMS_ERROR_FACTOR = 1.5  # our RMS logit error over the batch, relative to the untouched model's
MAX_ERROR_FACTOR = 2.0  # the same for the largest error
MARGIN_FACTOR = 3.0  # smallest decision margin, relative to our RMS logit error: below it, equality is luck


@dataclasses.dataclass(frozen=True)
class Check:
    """One statement about a run, whether it held, and the numbers behind it."""

    name: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class LogitError:
    """Distance of logits [n, vocab] from the float32 copy's."""

    rms: float
    largest: float

    @staticmethod
    def of(logits: Sequence[Tensor], exact: Sequence[Tensor]) -> LogitError:
        """Over all requests and steps."""
        difference = torch.cat(list(logits)).double() - torch.cat(list(exact)).double()
        return LogitError(float(difference.square().mean().sqrt()), float(difference.abs().max()))


def check_outputs(cases: Sequence[Case], outputs: Sequence[Greedy]) -> list[Check]:
    """Tokens equal the untouched model's, logits as near to float32 as its own, margins beyond errors."""
    different = sum(
        int((case.stock.tokens != output.tokens).sum()) for case, output in zip(cases, outputs, strict=True)
    )
    total = sum(len(case.stock.tokens) for case in cases)
    tokens = Check(
        "tokens equal the untouched model's", not different, f"{total - different} of {total} equal"
    )
    if different:
        return [tokens]  # from the first wrong token on, logits answer another question

    exact = [case.exact for case in cases]
    ours = LogitError.of([output.logits for output in outputs], exact)
    stock = LogitError.of([case.stock.logits for case in cases], exact)
    margin = min(case.margin for case in cases)
    return [
        tokens,
        Check(
            f"RMS logit error within {RMS_ERROR_FACTOR:g} x the untouched model's",
            ours.rms <= RMS_ERROR_FACTOR * stock.rms,
            f"{ours.rms:.4f}, untouched {stock.rms:.4f}",
        ),
        Check(
            f"largest logit error within {MAX_ERROR_FACTOR:g} x the untouched model's",
            ours.largest <= MAX_ERROR_FACTOR * stock.largest,
            f"{ours.largest:.4f}, untouched {stock.largest:.4f}",
        ),
        Check(
            f"smallest decision margin at least {MARGIN_FACTOR:g} x the RMS error",
            margin >= MARGIN_FACTOR * ours.rms,
            f"{margin:.4f}, {margin / ours.rms:.1f} x the error",
        ),
    ]


def check_acceptance(accepted: Sequence[Sequence[int]], num_drafts: int) -> Check:
    """The drafts exercised what they should: full and partial acceptance, and requests out of step."""
    counts = [count for request in accepted for count in request]
    varied = min(counts) < num_drafts and max(counts) == num_drafts
    uneven = any(len(set(step)) > 1 for step in zip(*accepted, strict=False))
    mean = sum(counts) / len(counts)
    detail = f"{mean:.2f} of {num_drafts} drafts accepted per step, from {min(counts)} to {max(counts)}"
    return Check(
        "drafts were accepted in full and in part, differently per request", varied and uneven, detail
    )
