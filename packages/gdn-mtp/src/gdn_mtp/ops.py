"""The functional call as a `torch.library` operation, seen through by `torch.compile` and `torch.export`."""

import torch
from kernel_dispatch import is_plain, is_watched, register_op, split_scale
from torch import Tensor

from gdn_mtp.plans import run_known, run_new
from gdn_mtp.specs import (
    FORMS,
    CallFlags,
    CallForm,
    CallTensors,
    check_call,
    check_flags,
    check_traced,
    tensor_specs,
)


def gated_delta_rule(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    state: Tensor,
    initial_state_indices: Tensor | None,
    output_state_indices: Tensor | None,
    intermediate_states_buffer: Tensor | None,
    ssm_state_indices: Tensor | None,
    output: Tensor,
    scale: float | None,
    scale_tensor: Tensor | None,
    use_qk_l2norm: bool,
    disable_state_update: bool,
    backend: str,
) -> None:
    """Run the call described by `form`, a key of `gdn_mtp.specs.FORMS`; tensors as in `CallTensors`."""
    tensors = CallTensors(
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        state,
        initial_state_indices,
        output_state_indices,
        intermediate_states_buffer,
        ssm_state_indices,
        output,
    )
    flags = CallFlags(use_qk_l2norm, disable_state_update, backend)
    chosen_scale = scale if scale_tensor is None else scale_tensor
    if run_known(FORMS[form], tensors, chosen_scale, flags) is None:
        run_new(FORMS[form], tensors, chosen_scale, flags)


_OP = register_op(
    "gdn_mtp::gated_delta_rule",
    gated_delta_rule,
    mutates_args=("state", "intermediate_states_buffer", "output"),
)


def trace_call(
    form: CallForm, tensors: CallTensors, scale: float | Tensor | None, flags: CallFlags
) -> Tensor:
    """Record the call with whoever traces, or hand it to autograd or a tensor subclass. Returns the output.

    A call for autograd is checked here; others, whose tensors may have no memory, when they run.
    """
    if is_watched() or not all(is_plain(tensor) for tensor in tensors if tensor is not None):
        check_flags(tensors, flags)
        check_traced(tensor_specs(form, not flags.disable_state_update), tensors.named(form))
    else:
        check_call(form, tensors, 1.0 if scale is None else scale, flags)
    output = torch.empty_like(tensors.v, memory_format=torch.contiguous_format)
    if tensors.output is not None:
        output = tensors.output
    _OP(form.name, *tensors._replace(output=output), *split_scale("scale", scale), *flags)
    return output
