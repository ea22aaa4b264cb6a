"""The three public functions; argument names and order are those of FlashInfer's functions of the same names.

All of them evaluate, per request and value head, for token t = 0 .. T - 1, in float32:

    g = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
    x <- x / sqrt(sum x^2 + 1e-6) for x in (q, k), with use_qk_l2norm
    S <- exp(g) S;  u = beta (v - S k);  S <- S + u k^T;  o = scale S q

A state is loaded once, carried in float32 through all T tokens, and rounded once at each store. Shared rules:

- q, k [B, T, H, K] and v [B, T, HV, V] share one dtype (bf16, fp16 or fp32), a and b [B, T, HV] likewise;
  A_log [HV] is fp32, dt_bias [HV] fp32 or bf16, a state fp32 or bf16, an index tensor int32 or int64. HV is a
  multiple of H. Any strides will do as long as the last dimension has stride 1.
- scale: a finite float, a one-element fp32 tensor on the same device (read there), or None for K ** -0.5.
- output: [B, T, HV, V] in bf16, fp16 or fp32 to write into; None allocates one with the dtype of q.
- backend: the name of a provider, or "auto". A named provider that declines is an error, never a fallback.
- Only the arguments documented as written are mutated. Bad input raises `kernel_dispatch.ArgumentError` (a
  ValueError; for types and dtypes `ArgumentTypeError`, also a TypeError) naming the argument before any
  write, `NoKernelError` if no provider accepts the call. On a GPU the values of index tensors are checked
  in debug mode only (`kernel_dispatch.debug()`), since that waits for the device, and whether arguments share
  memory in the first of the calls whose tensors look alike; on the CPU always.
- Results carry no gradient.

State pools: request i reads slot initial_state_indices[i]. A negative index marks padding: nothing of that
request is read or written, and its output is zero. No two requests may write one slot, no slot may be written
twice in a call, and none may be read by one request and written by another. Slots that nobody names keep
their bits.
"""

from kernel_dispatch import ArgumentError, ArgumentTypeError, is_watched, needs_op
from torch import Tensor

from gdn_mtp.ops import trace_call
from gdn_mtp.plans import run_known, run_new
from gdn_mtp.specs import (
    DECODE,
    MTP,
    PRETRANSPOSE,
    PRETRANSPOSE_POOL,
    CallFlags,
    CallForm,
    CallTensors,
    FlagTuple,
    TensorTuple,
)


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | Tensor | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decode T >= 1 tokens on V-major states, one per request or from a pool; shared rules: see the module.

    state: [B, HV, V, K], or None with initial_state [pool, HV, V, K] and initial_state_indices [B].
    output_state_indices: [B], slots to write instead of those read, negative to write none. Needs a pool.
    intermediate_states_buffer: [>= B, >= T, HV, V, K] in the state's dtype; entry [i, t] receives the state
    of request i after token t. Rows of padded requests and entries past T keep their bits.
    disable_state_update: leave the state as it is. Excludes output_state_indices.

    Returns (output, state or initial_state). Writes the state unless disabled; buffer and `output` if given.
    """
    form, pool = PRETRANSPOSE, state
    if initial_state is not None:
        if state is not None:
            raise ArgumentError("initial_state", "given besides state, expected one of the two")
        form, pool = PRETRANSPOSE_POOL, initial_state
    else:
        for name, indices in (
            ("initial_state_indices", initial_state_indices),
            ("output_state_indices", output_state_indices),
        ):
            if indices is not None:
                raise ArgumentError(name, "given without initial_state")
    if pool is None:
        raise ArgumentTypeError("state", "None, expected a tensor [B, HV, V, K], or initial_state instead")
    flags = (use_qk_l2norm, disable_state_update, backend)
    tensors = (
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        pool,
        initial_state_indices,
        output_state_indices,
        intermediate_states_buffer,
        None,
        output,
    )
    return _call(form, tensors, scale, flags), pool


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | Tensor | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decode one token (T = 1) on K-major states; see the module for shared rules.

    state: [B, HV, K, V], request i owning state i.

    Returns (output, state). Writes the state, and `output` if given.
    """
    tensors = (q, k, v, A_log, a, dt_bias, b, state, None, None, None, None, output)
    return _call(DECODE, tensors, scale, (use_qk_l2norm, False, backend)), state


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | Tensor | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    *,
    disable_state_update: bool,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Process T >= 1 tokens per request on a V-major pool, as verifying drafts does; rules: see the module.

    disable_state_update: True leaves the pool as it is. It has no default, because FlashInfer's default here
    is announced to change from True to False, and a wrong guess silently corrupts or drops states.
    initial_state: [pool, HV, V, K]. initial_state_indices: [B], the slots to read, negative for padding.
    output_state_indices: [B], slots to write the state after token T - 1 to instead of those read, negative
    to write none. Excludes disable_state_update=True.
    intermediate_states_buffer: [>= B, >= T, HV, V, K] in the state's dtype; entry [i, t] receives the state
    of request i after token t. Rows of padded requests and entries past T keep their bits.
    ssm_state_indices: [B, T], pool slots that receive the state after each token, negative to skip one. That
    of token T - 1 is the updated state, so nothing else is written back. Excludes intermediate_states_buffer,
    output_state_indices and disable_state_update=True.

    Returns (output, initial_state). Writes the pool unless disabled, the buffer and `output` if given.
    """
    flags = (use_qk_l2norm, disable_state_update, backend)
    tensors = (
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        initial_state,
        initial_state_indices,
        output_state_indices,
        intermediate_states_buffer,
        ssm_state_indices,
        output,
    )
    return _call(MTP, tensors, scale, flags), initial_state


def _call(
    form: CallForm,
    tensors: TensorTuple,
    scale: float | Tensor | None,
    flags: FlagTuple,
) -> Tensor:
    if not is_watched():
        output = run_known(form, tensors, scale, flags)
        if output is not None:
            return output
    named, named_flags = CallTensors._make(tensors), CallFlags._make(flags)
    run = trace_call if needs_op(*tensors) else run_new
    return run(form, named, scale, named_flags)
