"""Speculative decoding on a state pool and a `SpeculativeCache`: verify drafts, accept a prefix or a path.

A loop per request: `verify` a window of T tokens (the pending one and drafts), compare its outputs with the
drafts, and tell the next `verify` how many tokens of the window are accepted. Accepted tokens stay pending in
the cache, as compact updates, until a verify folds them into the pool; rejected ones cost nothing. No state
is written after every token: `gated_delta_rule_mtp` has `intermediate_states_buffer` for callers who need
every state.

Shared rules, where they differ from those in `gdn_mtp.api`:

- state_pool [pool, HV, V, K], fp32 or bf16, and state_indices [B], int32 or int64; a request with a negative
  index is padding: nothing of it is read or written, and its outputs are zero. No two requests may name one
  slot. q, k and v have the io_dtype of the cache.
- num_accepted [B] int32: of the last window of request i, the first 0 to window tokens are accepted. Or
  accepted_nodes [B, n] int32, n at most the capacity, -1 where there is none: the accepted nodes of a tree,
  ascending. Either way they are a path from a root, which is for the caller to see to: the cache does not
  keep parents. With neither, nothing of the last window is accepted; num_accepted has no default, so that
  nobody rejects a window by leaving it out. A slot that has been reset, committed, or never verified has a
  window of 0 tokens.
- States are carried in float32. What a slot stands for is the pool's state with the pending tokens applied to
  it. A bf16 pool is rounded, to nearest, when a fold or a commit writes it and at no other time;
  `materialize` rounds what it returns. The window of a verify that folds is that of the state before the
  rounding: its outputs, and the updates that its tokens leave, do not depend on whether it folds. So those
  tokens do not correct that one rounding as the tokens of later windows do, and the error of a state stays
  that of rounding it after every accepted window, however many folds there were.
- Everything that changes from call to call is on the device, nothing waits for it, and a call can be captured
  in a CUDA graph; the first call of a kind has to come before the capture.
- On a GPU a stride of 2^31 elements or more between the tokens of a request, or between their heads, raises
  ValueError.
- Under `torch.compile` the pool and the cache may not be tensors that were made in `torch.inference_mode()`,
  unless the call is made in it: PyTorch refuses to change those elsewhere.
- A cache that is bound to another pool raises `ArgumentError`, but in code that `torch.compile` traces.
- On the CPU, and in debug mode (`kernel_dispatch.debug()`) outside a capture, values are checked before
  anything is written: slots, more accepted than verified, a cursor out of range raise `ArgumentError`. In
  debug mode the kernels also stop with a message. Otherwise a kernel takes num_accepted and num_tokens as the
  nearest that is allowed, passes over accepted nodes beyond the window and slots beyond the pool, and takes a
  parent that does not come before its token for -1; a cursor out of range spoils its own slot, never another.
"""

from kernel_dispatch import is_watched, needs_op
from torch import Tensor

from gdn_mtp.speculative.cache import SpeculativeCache, tensors_of
from gdn_mtp.speculative.folding import FoldPolicy
from gdn_mtp.speculative.ops import trace_call
from gdn_mtp.speculative.plans import run_known, run_new
from gdn_mtp.speculative.specs import CallFlags, CallTensors, without_tokens


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    cache: SpeculativeCache,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None = None,
    *,
    num_tokens: Tensor | None = None,
    parent_indices: Tensor | None = None,
    scale: float | Tensor | None = None,
    use_qk_l2norm: bool = True,
    fold: FoldPolicy | int = "auto",
    output: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Accept tokens of the last window, then run T tokens per request from there; one launch.

    q, k [B, T, H, K], v [B, T, HV, V], a, b [B, T, HV], A_log, dt_bias [HV]: as in `gated_delta_rule_mtp`, T
    at most `cache.max_tokens`. The T tokens become the new window: nothing of them is in the state until a
    later call accepts it.
    num_accepted, accepted_nodes: what of the last window is accepted; see the module.
    num_tokens: [B] int32, 0 to T tokens for each request; None for T. Outputs past them are zero.
    parent_indices: [B, T] int32, the token that each follows, -1 for the state itself, always an earlier one;
    None for a chain.
    fold: when accepted tokens are folded into the pool, so that it is written: "always" when there are any,
    "full" when the cache has no room for the window after this one, "auto" so that steps cost least, or when
    there are more than an int of 0 to cache.capacity - 2 * cache.max_tokens. A token counts as long as it is
    in the ring: so do dropped nodes of a tree that lie between accepted ones. With a capacity of two windows,
    all that there is for max_tokens = 16, every policy is "always".

    scale, use_qk_l2norm, output, backend: as in `gated_delta_rule_mtp`.

    Returns the output [B, T, HV, V]. Writes it, the cache's slots and, where it folds, the pool's.
    """
    tokens = (q, k, v, a, b, A_log, dt_bias, state_pool, state_indices)
    options = (num_accepted, accepted_nodes, num_tokens, parent_indices, output, None)
    tensors = CallTensors._make((*tokens, *tensors_of(cache), *options))
    return _call(tensors, scale, CallFlags("verify", cache.max_tokens, use_qk_l2norm, fold, backend), cache)


def commit(
    state_pool: Tensor,
    state_indices: Tensor,
    cache: SpeculativeCache,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Accept tokens of the last window, fold everything, and forget the window; one launch.

    Afterwards the pool alone holds the states of the named slots, for whatever reads it next.

    Returns state_pool. Writes its slots where there was something to fold, and the cache's.
    """
    tensors = without_tokens(state_pool, state_indices, tensors_of(cache), num_accepted, accepted_nodes, None)
    return _call(tensors, None, CallFlags("commit", cache.max_tokens, True, "always", backend), cache)


def materialize(
    state_pool: Tensor,
    state_indices: Tensor,
    cache: SpeculativeCache,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None = None,
    *,
    states: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The states that `commit` would write to the pool, without changing pool or cache.

    states: [B, HV, V, K] in the pool's dtype, to write into; None for a new tensor. Padding gives zeros.
    """
    tensors = without_tokens(
        state_pool, state_indices, tensors_of(cache), num_accepted, accepted_nodes, states
    )
    return _call(tensors, None, CallFlags("materialize", cache.max_tokens, True, "always", backend), cache)


def _call(
    tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags, cache: SpeculativeCache
) -> Tensor:
    pool, watched = tensors.state_pool, is_watched()
    if not watched and cache.is_bound_to(pool):
        known = run_known(tensors, scale, flags)
        if known is not None:
            return known
    checked = not watched and isinstance(pool, Tensor)
    if checked:
        cache.check_pool(pool)
    traced = needs_op(*tensors)
    result = None if traced else run_known(tensors, scale, flags)
    if result is None:
        result = (trace_call if traced else run_new)(tensors, scale, flags)
    if checked:
        cache.adopt(pool)
    return result
