"""The functions as `torch.library` operations, seen through by `torch.compile`.

Each writes into tensors that it is given and returns nothing, so tracing needs no shape function. To
`torch.export` the tensors of a cache are constants, which a program that is lowered further may not change.
"""

import torch
from kernel_dispatch import is_plain, is_watched, register_op, split_scale
from torch import Tensor

from gdn_mtp.specs import check_traced
from gdn_mtp.speculative.plans import run_known, run_new
from gdn_mtp.speculative.specs import (
    IN_EVERY_MODE,
    OUTPUT,
    CallFlags,
    CallTensors,
    check_call,
    check_flags,
    tensor_specs,
    without_tokens,
)


def _run(tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags) -> None:
    if run_known(tensors, scale, flags) is None:
        run_new(tensors, scale, flags)


def speculative_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    keys: Tensor,
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
    num_tokens: Tensor | None,
    parent_indices: Tensor | None,
    output: Tensor,
    scale: float | None,
    scale_tensor: Tensor | None,
    max_tokens: int,
    use_qk_l2norm: bool,
    fold: str,
    fold_above: int | None,
    backend: str,
) -> None:
    """`gdn_mtp.verify` on the tensors of a cache; arguments as in `CallTensors` and `CallFlags`.

    scale or scale_tensor, and fold or else fold_above, are one argument of verify each.
    """
    tensors = CallTensors(
        *(q, k, v, a, b, A_log, dt_bias, state_pool, state_indices),
        *(keys, updates, gates, k_scale, cursor, live),
        *(num_accepted, accepted_nodes, num_tokens, parent_indices, output, None),
    )
    chosen_fold = fold if fold_above is None else fold_above
    flags = CallFlags("verify", max_tokens, use_qk_l2norm, chosen_fold, backend)
    _run(tensors, scale if scale_tensor is None else scale_tensor, flags)


def speculative_commit(
    state_pool: Tensor,
    state_indices: Tensor,
    keys: Tensor,
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
    max_tokens: int,
    backend: str,
) -> None:
    """`gdn_mtp.commit` on the tensors of a cache."""
    cache = (keys, updates, gates, k_scale, cursor, live)
    tensors = without_tokens(state_pool, state_indices, cache, num_accepted, accepted_nodes, None)
    _run(tensors, None, CallFlags("commit", max_tokens, True, "always", backend))


def speculative_materialize(
    state_pool: Tensor,
    state_indices: Tensor,
    keys: Tensor,
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
    states: Tensor,
    max_tokens: int,
    backend: str,
) -> None:
    """`gdn_mtp.materialize` on the tensors of a cache."""
    cache = (keys, updates, gates, k_scale, cursor, live)
    tensors = without_tokens(state_pool, state_indices, cache, num_accepted, accepted_nodes, states)
    _run(tensors, None, CallFlags("materialize", max_tokens, True, "always", backend))


_VERIFY = register_op(
    "gdn_mtp::speculative_verify",
    speculative_verify,
    mutates_args=("state_pool", "keys", "updates", "gates", "k_scale", "cursor", "live", "output"),
)
_COMMIT = register_op(
    "gdn_mtp::speculative_commit", speculative_commit, mutates_args=("state_pool", "cursor", "live")
)
_MATERIALIZE = register_op(
    "gdn_mtp::speculative_materialize", speculative_materialize, mutates_args=("states",)
)


def trace_call(tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags) -> Tensor:
    """Record the call with whoever traces, or hand it to autograd or a tensor subclass. Returns its result.

    A call for autograd is checked here; others, whose tensors may have no memory, when they run.
    """
    if is_watched() or not all(is_plain(tensor) for tensor in tensors if tensor is not None):
        check_flags(tensors, flags)
        check_traced(tensor_specs(flags.mode), tensors.named())
    else:
        check_call(tensors, 1.0 if scale is None else scale, flags)
    shared = tuple(tensors)[IN_EVERY_MODE]
    if flags.mode == "commit":
        _COMMIT(*shared, flags.max_tokens, flags.backend)
        return tensors.state_pool
    if flags.mode == "materialize":
        pool = tensors.state_pool
        states = tensors.states
        if states is None:
            states = pool.new_empty((tensors.state_indices.shape[0], *pool.shape[1:]))
        _MATERIALIZE(*shared, states, flags.max_tokens, flags.backend)
        return states
    output = tensors.output
    if output is None:
        output = torch.empty_like(tensors.v, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
    fold = (flags.fold, None) if isinstance(flags.fold, str) else ("auto", flags.fold)
    options = (flags.max_tokens, flags.use_qk_l2norm, *fold, flags.backend)
    _VERIFY(*tensors[:OUTPUT], output, *split_scale("scale", scale), *options)
    return output
