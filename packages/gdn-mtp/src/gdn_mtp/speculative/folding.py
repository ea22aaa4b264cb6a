"""When a verify folds accepted tokens into the state pool: a threshold on how many are pending."""

import math
from typing import Literal, get_args

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError

from gdn_mtp.speculative.problem import SpeculativeProblem

FoldPolicy = Literal["auto", "always", "full"]
FLOAT_BYTES = 4

# What reading a byte of a pending token costs, its products included, in bytes of a state that a fold writes;
# by the dtype of the states. Fitted to the times in benchmarks/results/gdn_spec-h100/folds-*.json, by folds
# and pending tokens: 1.5 and 2.0 for fp32 states with 4 and 8 tokens, 1.3 and 1.5 for bf16 ones.
PENDING_COST = {torch.float32: 1.7, torch.bfloat16: 1.4}


def check_policy(fold: object) -> None:
    """Raises, naming `fold`, unless it is a policy's name or an int; `check_threshold` says which ints."""
    words = ", ".join(map(repr, get_args(FoldPolicy)))
    if isinstance(fold, bool) or not isinstance(fold, str | int):
        raise ArgumentTypeError("fold", f"{fold!r}, expected one of {words} or an int")
    if isinstance(fold, str) and fold not in get_args(FoldPolicy):
        raise ArgumentError("fold", f"{fold!r}, expected one of {words} or an int")


def check_threshold(fold: str | int, capacity: int, max_tokens: int) -> None:
    """Raises ArgumentError for an int that leaves no room for two windows in the ring."""
    room = capacity - 2 * max_tokens
    if not isinstance(fold, str) and not 0 <= fold <= room:
        expected = f"0 to capacity - 2 * max_tokens = {room}"
        raise ArgumentError("fold", f"{fold}, expected {expected}")


def token_nbytes(problem: SpeculativeProblem) -> int:
    """Bytes of a token in a ring: k and its factor, u and the gate."""
    keys = problem.H * (problem.K * problem.io_dtype.itemsize + FLOAT_BYTES)
    return keys + problem.HV * (problem.V + 1) * FLOAT_BYTES


def fold_limit(problem: SpeculativeProblem, max_tokens: int, fold: str | int) -> int:
    """`fold_above` for a verify of `problem` on a cache for `max_tokens`, if half of the drafts are accepted.

    Raises ArgumentError or ArgumentTypeError naming `fold`.
    """
    check_policy(fold)
    check_threshold(fold, problem.capacity, max_tokens)
    return fold_above(
        fold,
        problem.capacity,
        max_tokens,
        accepted=(problem.T + 1) / 2,
        token_bytes=token_nbytes(problem),
        state_bytes=problem.HV * problem.V * problem.K * problem.state_dtype.itemsize,
        pending_cost=PENDING_COST[problem.state_dtype],
    )


def fold_above(
    fold: str | int,
    capacity: int,
    max_tokens: int,
    *,
    accepted: float,
    token_bytes: int,
    state_bytes: int,
    pending_cost: float = 1.0,
) -> int:
    """The largest number of pending tokens that a verify leaves pending; `fold` is checked.

    At most capacity - 2 * max_tokens: the next verify accepts up to max_tokens more, and records as many
    without touching what it reads. "always" leaves none, "full" as many as there is room for, an int as many
    as it says. With a capacity of 2 * max_tokens, as for 16 tokens, none can be left: all act as "always".

    "auto" costs least if every verify has `accepted` tokens accepted. With a threshold f, a state is written
    every (f + accepted) / accepted calls, and a call reads f / 2 + accepted pending tokens on average, a byte
    of which costs as much as `pending_cost` bytes of that state: of what depends on f,
    state_bytes * accepted / (f + accepted) + pending_cost * token_bytes * f / 2, the least is at
    f = sqrt(2 * accepted * state_bytes / (pending_cost * token_bytes)) - accepted.
    """
    room = capacity - 2 * max_tokens
    if not isinstance(fold, str):
        return fold
    if fold == "always":
        return 0
    if fold == "full":
        return room
    cheapest = math.sqrt(2 * accepted * state_bytes / (pending_cost * token_bytes)) - accepted
    return min(room, max(0, round(cheapest)))
