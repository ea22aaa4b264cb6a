"""When a verify folds accepted tokens into the state pool: a threshold on how many are pending."""

import math
from typing import Literal, get_args

from kernel_dispatch import ArgumentError

from gdn_mtp.speculative.problem import SpeculativeProblem

FoldPolicy = Literal["auto", "always", "full"]
FLOAT_BYTES = 4


def check_policy(fold: str) -> None:
    """Raises ArgumentError unless `fold` is a policy."""
    choices = get_args(FoldPolicy)
    if fold not in choices:
        raise ArgumentError("fold", f"{fold!r}, expected one of {', '.join(map(repr, choices))}")


def fold_limit(problem: SpeculativeProblem, max_tokens: int, fold: str) -> int:
    """`fold_above` for a verify of `problem` on a cache for `max_tokens`, if half of the drafts are accepted.

    Raises ArgumentError unless `fold` is a policy.
    """
    check_policy(fold)
    key_bytes = problem.H * (problem.K * problem.io_dtype.itemsize + FLOAT_BYTES)
    return fold_above(
        fold,
        problem.capacity,
        max_tokens,
        accepted=(problem.T + 1) / 2,
        token_bytes=key_bytes + problem.HV * (problem.V + 1) * FLOAT_BYTES,
        state_bytes=problem.HV * problem.V * problem.K * problem.state_dtype.itemsize,
    )


def fold_above(
    fold: str, capacity: int, max_tokens: int, *, accepted: float, token_bytes: int, state_bytes: int
) -> int:
    """The largest number of pending tokens that a verify leaves pending.

    At most capacity - 2 * max_tokens: the next verify accepts up to max_tokens more, and records as many
    without touching what it reads. "always" leaves none, "full" as many as there is room for.

    "auto" moves the fewest bytes if every verify has `accepted` tokens accepted. With a threshold f, a state
    is written every (f + accepted) / accepted calls, and a call reads f / 2 pending tokens on average:
    state_bytes * accepted / (f + accepted) + token_bytes * f / 2 is smallest at
    f = sqrt(2 * accepted * state_bytes / token_bytes) - accepted.
    """
    room = capacity - 2 * max_tokens
    if fold == "always":
        return 0
    if fold == "full":
        return room
    cheapest = math.sqrt(2 * accepted * state_bytes / token_bytes) - accepted
    return min(room, max(0, round(cheapest)))
