"""What the public functions accept: tensor specs, rules between arguments, and the use of pool slots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    TensorSpec,
    bind,
    check_backend,
    check_index_range,
    check_no_overlap,
    check_registered,
    check_scale,
    dtype_name,
    values_are_readable,
)
from torch import Tensor

from gdn_mtp.problem import (
    BIAS_DTYPES,
    INDEX_DTYPES,
    INPUT_DTYPES,
    STATE_DTYPES,
    GatedDeltaRuleProblem,
    Intermediate,
    StateLayout,
    StateRows,
)

ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class CallForm:
    """How one public function names and lays out its state.

    name: unique. state: the name of the state argument. layout: that of the state. pooled: a pool with
    indices rather than one state per request. single_token: T is 1.
    """

    name: str
    state: str
    layout: StateLayout
    pooled: bool
    single_token: bool


PRETRANSPOSE = CallForm("decode_pretranspose", "state", "vk", pooled=False, single_token=False)
PRETRANSPOSE_POOL = CallForm(
    "decode_pretranspose_pool", "initial_state", "vk", pooled=True, single_token=False
)
DECODE = CallForm("decode", "state", "kv", pooled=False, single_token=True)
MTP = CallForm("mtp", "initial_state", "vk", pooled=True, single_token=False)
FORMS = {form.name: form for form in (PRETRANSPOSE, PRETRANSPOSE_POOL, DECODE, MTP)}


class CallTensors(NamedTuple):
    """The tensors of one call under the names that every function but `state` shares."""

    q: Tensor
    k: Tensor
    v: Tensor
    A_log: Tensor
    a: Tensor
    dt_bias: Tensor
    b: Tensor
    state: Tensor
    initial_state_indices: Tensor | None = None
    output_state_indices: Tensor | None = None
    intermediate_states_buffer: Tensor | None = None
    ssm_state_indices: Tensor | None = None
    output: Tensor | None = None

    def named(self, form: CallForm) -> dict[str, Tensor | None]:
        """By the names that the caller of `form` used."""
        return {form.state if name == "state" else name: tensor for name, tensor in self._asdict().items()}


class CallFlags(NamedTuple):
    """The arguments of a call that are not tensors and that its plan depends on."""

    use_qk_l2norm: bool
    disable_state_update: bool
    backend: str


TensorTuple: TypeAlias = tuple[Any, ...]  # the values of CallTensors, plain and not yet checked
FlagTuple: TypeAlias = tuple[bool, bool, str]  # those of CallFlags


def tensor_specs(form: CallForm, writes_pool: bool) -> tuple[TensorSpec, ...]:
    """One spec per tensor argument, in the order in which dimensions are bound."""
    tokens: int | str = 1 if form.single_token else "T"
    state_dims = ("HV", "V", "K") if form.layout == "vk" else ("HV", "K", "V")
    slots = "pool" if form.pooled else "B"
    return (
        TensorSpec("q", ("B", tokens, "H", "K"), INPUT_DTYPES),
        TensorSpec("k", ("B", tokens, "H", "K"), INPUT_DTYPES),
        TensorSpec("v", ("B", tokens, "HV", "V"), INPUT_DTYPES),
        TensorSpec("A_log", ("HV",), (torch.float32,)),
        TensorSpec("a", ("B", tokens, "HV"), INPUT_DTYPES),
        TensorSpec("dt_bias", ("HV",), BIAS_DTYPES),
        TensorSpec("b", ("B", tokens, "HV"), INPUT_DTYPES),
        TensorSpec(form.state, (slots, *state_dims), STATE_DTYPES, written=writes_pool),
        TensorSpec("initial_state_indices", ("B",), INDEX_DTYPES, layout="any", optional=not form.pooled),
        TensorSpec("output_state_indices", ("B",), INDEX_DTYPES, layout="any", optional=True),
        TensorSpec(
            "intermediate_states_buffer",
            ("buffer_rows", "buffer_tokens", *state_dims),
            STATE_DTYPES,
            optional=True,
            written=True,
        ),
        TensorSpec("ssm_state_indices", ("B", tokens), INDEX_DTYPES, layout="any", optional=True),
        TensorSpec("output", ("B", tokens, "HV", "V"), INPUT_DTYPES, optional=True, written=True),
    )


def check_flags(tensors: CallTensors, flags: CallFlags) -> None:
    """Raises where options have the wrong type or exclude each other; reads no tensor."""
    for name in ("use_qk_l2norm", "disable_state_update"):
        value = getattr(flags, name)
        if not isinstance(value, bool):
            raise ArgumentTypeError(name, f"{value!r}, expected a bool")
    check_backend(flags.backend)
    if tensors.output_state_indices is not None and flags.disable_state_update:
        raise ArgumentError(
            "output_state_indices", "excludes disable_state_update=True, which writes no state"
        )
    if tensors.ssm_state_indices is None:
        return
    if tensors.intermediate_states_buffer is not None:
        raise ArgumentError("ssm_state_indices", "excludes intermediate_states_buffer, give one of the two")
    if flags.disable_state_update:
        raise ArgumentError("ssm_state_indices", "excludes disable_state_update=True, which writes no state")
    if tensors.output_state_indices is not None:
        raise ArgumentError("ssm_state_indices", "excludes output_state_indices, give one of the two")


def check_call(
    form: CallForm,
    tensors: CallTensors,
    scale: float | Tensor,
    flags: CallFlags,
    *,
    dims: dict[str, int] | None = None,
    device: torch.device | None = None,
) -> GatedDeltaRuleProblem | None:
    """Checks a whole call and returns its problem, None if there are no requests; mutates nothing.

    dims, device: what the tensors have to agree with, where that is known beforehand.
    Raises ArgumentError or ArgumentTypeError naming the argument as the caller of `form` wrote it. Values of
    tensors are read only on the CPU and in debug mode.
    """
    check_flags(tensors, flags)
    writes_pool = not flags.disable_state_update
    named = tensors.named(form)
    dims = bind(tensor_specs(form, writes_pool), named, dims, device, "the plan")
    _check_same_dtypes(form, tensors)
    _check_sizes(form, tensors, dims)
    check_scale("scale", scale, tensors.q.device)
    outputs = {name: named.pop(name) for name in ("output", "intermediate_states_buffer")}
    if writes_pool:
        outputs[form.state] = named.pop(form.state)
    if isinstance(scale, Tensor):
        named["scale"] = scale
    check_no_overlap(outputs, named)
    _check_slots(tensors, writes_pool)
    if dims["B"] == 0:
        check_registered(GatedDeltaRuleProblem.entry_point_group, flags.backend)
        return None
    return problem_of(form, tensors, scale, flags)


def problem_of(
    form: CallForm, tensors: CallTensors, scale: float | Tensor, flags: CallFlags
) -> GatedDeltaRuleProblem:
    """The problem that checked tensors pose."""
    batch, tokens, heads, key_dim = tensors.q.shape
    intermediate: Intermediate = "none"
    if tensors.intermediate_states_buffer is not None:
        intermediate = "buffer"
    elif tensors.ssm_state_indices is not None:
        intermediate = "scatter"
    return GatedDeltaRuleProblem(
        B=batch,
        T=tokens,
        H=heads,
        HV=tensors.v.shape[2],
        K=key_dim,
        V=tensors.v.shape[3],
        io_dtype=tensors.q.dtype,
        gate_dtype=tensors.a.dtype,
        dt_bias_dtype=tensors.dt_bias.dtype,
        out_dtype=tensors.q.dtype if tensors.output is None else tensors.output.dtype,
        state_dtype=tensors.state.dtype,
        state_layout=form.layout,
        use_qk_l2norm=flags.use_qk_l2norm,
        update_state=not flags.disable_state_update,
        intermediate=intermediate,
        index_dtype=None if tensors.initial_state_indices is None else tensors.initial_state_indices.dtype,
        separate_write_indices=tensors.output_state_indices is not None,
        tensor_scale=isinstance(scale, Tensor),
        state_rows=state_rows(tensors.state, tensors.intermediate_states_buffer),
    )


def check_traced(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ArgumentTypeError, naming it, for what is no tensor; all else is checked when the call runs."""
    for spec in specs:
        tensor = tensors[spec.name]
        if not isinstance(tensor, Tensor) and (tensor is not None or not spec.optional):
            came = "None" if tensor is None else type(tensor).__name__
            raise ArgumentTypeError(spec.name, f"{came}, expected a tensor {spec.signature}")


def misalignment(tensor: Tensor | None) -> int:
    """Bytes by which a tensor's first element misses a multiple of 16; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr() % ROW_ALIGNMENT_BYTES


def state_rows(*tensors: Tensor | None) -> StateRows:
    """How the rows of all the tensors lie; a dimension of size 1 may have any stride."""
    rows: StateRows = "contiguous"
    for tensor in tensors:
        if tensor is None:
            continue
        strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        outer = [stride * tensor.element_size() for size, stride in strides if size > 1]
        if misalignment(tensor) or any(stride % ROW_ALIGNMENT_BYTES for stride in outer):
            return "any"
        if tensor.shape[-2] > 1 and tensor.stride(-2) != tensor.shape[-1]:
            rows = "aligned"
    return rows


def written_slots(tensors: CallTensors) -> tuple[str, Tensor | None]:
    """The argument that names the slots a state-updating call writes, and these: [B] or [B, T].

    Negative where none is written, None where request i owns slot i.
    """
    reads = tensors.initial_state_indices
    for name in ("output_state_indices", "ssm_state_indices"):
        slots = getattr(tensors, name)
        if slots is not None and reads is not None:
            padding = (reads < 0).view(
                -1, *[1] * (slots.dim() - 1)
            )  # what a padded request names is not used
            return name, slots.masked_fill(padding, -1)
    return "initial_state_indices", reads


def _check_same_dtypes(form: CallForm, tensors: CallTensors) -> None:
    """Raises where tensors that share one dtype differ; index tensors may be int32 beside int64."""
    for name, first_name in (
        ("k", "q"),
        ("v", "q"),
        ("b", "a"),
        ("intermediate_states_buffer", "state"),
    ):
        tensor, first = getattr(tensors, name), getattr(tensors, first_name)
        if tensor is not None and first is not None and tensor.dtype != first.dtype:
            source = form.state if first_name == "state" else first_name
            came, expected = dtype_name(tensor.dtype), dtype_name(first.dtype)
            raise ArgumentTypeError(name, f"dtype {came}, expected {expected} as {source} has")


def _check_sizes(form: CallForm, tensors: CallTensors, dims: dict[str, int]) -> None:
    """Raises for a dimension other than B that is 0, heads that do not divide, and a buffer too small."""
    for argument, names in (("q", ("T", "H", "K")), ("v", ("HV", "V")), (form.state, ("pool",))):
        for name in names:
            if dims.get(name, 1) == 0:
                raise ArgumentError(argument, f"{name} = 0, expected at least 1")
    if dims["HV"] % dims["H"]:
        raise ArgumentError("v", f"HV = {dims['HV']}, expected a multiple of H = {dims['H']} from q")
    if tensors.intermediate_states_buffer is not None:
        for name, needed in (("buffer_rows", dims["B"]), ("buffer_tokens", dims.get("T", 1))):
            if dims[name] < needed:
                raise ArgumentError(
                    "intermediate_states_buffer", f"{name} = {dims[name]}, expected at least {needed} from q"
                )


def _check_slots(tensors: CallTensors, writes_pool: bool) -> None:
    """Raises for a slot out of range, written twice, or read by one request and written by another.

    Only where values may be read: on the CPU, and in debug mode outside graph capture.
    """
    reads = tensors.initial_state_indices
    if reads is None or not values_are_readable(reads):
        return
    pool_size = tensors.state.shape[0]
    check_index_range("initial_state_indices", reads, pool_size)
    if not writes_pool:
        return
    name, writes = written_slots(tensors)
    assert writes is not None, "a pool with read indices has write slots"
    check_index_range(name, writes, pool_size)
    writer_of: dict[int, int] = {}
    for request, slots in enumerate(writes.unsqueeze(-1).flatten(1).tolist()):
        for slot in slots:
            if slot >= 0 and slot in writer_of:
                other = writer_of[slot]
                requests = (
                    f"requests {other} and {request}" if other != request else f"request {request} twice"
                )
                raise ArgumentError(name, f"slot {slot} is written by {requests}")
            writer_of[slot] = request
    for request, slot in enumerate(reads.tolist()):
        writer = writer_of.get(slot, request)
        if slot >= 0 and writer != request:
            raise ArgumentError(name, f"request {writer} writes slot {slot}, which request {request} reads")
