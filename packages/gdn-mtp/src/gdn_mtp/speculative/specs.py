"""What verify, commit and materialize accept: tensor specs, and rules between arguments."""

from typing import Any, NamedTuple, TypeAlias

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    TensorSpec,
    bind,
    check_backend,
    check_no_overlap,
    check_registered,
    check_scale,
    debug_mode,
    dtype_name,
    values_are_readable,
)
from torch import Tensor

from gdn_mtp.problem import BIAS_DTYPES, INDEX_DTYPES, INPUT_DTYPES, STATE_DTYPES
from gdn_mtp.specs import state_rows
from gdn_mtp.speculative.cache import CACHE_SPECS, CacheTensors
from gdn_mtp.speculative.folding import check_policy, check_threshold
from gdn_mtp.speculative.problem import Accept, Mode, SpeculativeProblem
from gdn_mtp.speculative.values import (
    check_accepted,
    check_window,
    cursor_fault,
    named_slots,
)

COUNT_DTYPES = (torch.int32,)


class CallTensors(NamedTuple):
    """The tensors of a call in any mode, None where the mode or the caller has none.

    output: of verify [B, T, HV, V]. states: of materialize [B, HV, V, K].
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    a: Tensor | None
    b: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    state_pool: Tensor
    state_indices: Tensor
    keys: Tensor
    updates: Tensor
    gates: Tensor
    k_scale: Tensor
    cursor: Tensor
    live: Tensor
    num_accepted: Tensor | None
    accepted_nodes: Tensor | None
    num_tokens: Tensor | None
    parent_indices: Tensor | None
    output: Tensor | None
    states: Tensor | None

    def named(self) -> dict[str, Tensor | None]:
        """By argument, the cache's tensors as `cache.keys` and so on."""
        return {_ARGUMENT.get(name, name): tensor for name, tensor in self._asdict().items()}


_ARGUMENT = {name: f"cache.{name}" for name in CacheTensors._fields}

# Places in a plain tuple of what CallTensors has; launchers take runs of them.
V, STATE_POOL, STATE_INDICES, NUM_ACCEPTED, NUM_TOKENS, OUTPUT, STATES = map(
    CallTensors._fields.index,
    ("v", "state_pool", "state_indices", "num_accepted", "num_tokens", "output", "states"),
)
TOKENS = slice(STATE_POOL)  # q to dt_bias
IN_EVERY_MODE = slice(STATE_POOL, NUM_TOKENS)  # state_pool to accepted_nodes
UP_TO_OUTPUT = slice(STATE_POOL, OUTPUT)  # state_pool to parent_indices
OPTIONAL = slice(NUM_ACCEPTED, None)  # num_accepted to states


def without_tokens(
    state_pool: Tensor,
    state_indices: Tensor,
    cache: tuple[Tensor, ...],
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
    states: Tensor | None,
) -> CallTensors:
    """The tensors of a commit or of a materialize."""
    shared = (state_pool, state_indices, *cache, num_accepted, accepted_nodes)
    return CallTensors._make((*[None] * 7, *shared, None, None, None, states))


class CallFlags(NamedTuple):
    """The arguments of a call that are not tensors and that its plan depends on."""

    mode: Mode
    max_tokens: int
    use_qk_l2norm: bool
    fold: str | int
    backend: str


TensorTuple: TypeAlias = tuple[Any, ...]  # the values of CallTensors, plain and not yet checked
FlagTuple: TypeAlias = tuple[Any, ...]  # those of CallFlags

_TOKEN_SPECS = (
    TensorSpec("q", ("B", "T", "H", "K"), INPUT_DTYPES),
    TensorSpec("k", ("B", "T", "H", "K"), INPUT_DTYPES),
    TensorSpec("v", ("B", "T", "HV", "V"), INPUT_DTYPES),
    TensorSpec("a", ("B", "T", "HV"), INPUT_DTYPES),
    TensorSpec("b", ("B", "T", "HV"), INPUT_DTYPES),
    TensorSpec("A_log", ("HV",), (torch.float32,)),
    TensorSpec("dt_bias", ("HV",), BIAS_DTYPES),
)
_ACCEPT_SPECS = (
    TensorSpec("num_accepted", ("B",), COUNT_DTYPES, optional=True),
    TensorSpec("accepted_nodes", ("B", "nodes"), COUNT_DTYPES, optional=True),
)
_WINDOW_SPECS = (
    TensorSpec("num_tokens", ("B",), COUNT_DTYPES, optional=True),
    TensorSpec("parent_indices", ("B", "T"), COUNT_DTYPES, optional=True),
    TensorSpec("output", ("B", "T", "HV", "V"), INPUT_DTYPES, optional=True, written=True),
)


def tensor_specs(mode: Mode) -> tuple[TensorSpec, ...]:
    """One spec per tensor of the mode, in the order in which dimensions are bound."""
    shared = (
        TensorSpec("state_pool", ("pool", "HV", "V", "K"), STATE_DTYPES, written=mode != "materialize"),
        TensorSpec("state_indices", ("B",), INDEX_DTYPES, layout="any"),
        *CACHE_SPECS,
        *_ACCEPT_SPECS,
    )
    if mode == "verify":
        return (*_TOKEN_SPECS, *shared, *_WINDOW_SPECS)
    if mode == "commit":
        return shared
    return (*shared, TensorSpec("states", ("B", "HV", "V", "K"), STATE_DTYPES, optional=True, written=True))


def check_flags(tensors: CallTensors, flags: CallFlags) -> None:
    """Raises where options have the wrong type or exclude each other; reads no tensor."""
    if not isinstance(flags.use_qk_l2norm, bool):
        raise ArgumentTypeError("use_qk_l2norm", f"{flags.use_qk_l2norm!r}, expected a bool")
    check_policy(flags.fold)
    check_backend(flags.backend)
    if tensors.num_accepted is not None and tensors.accepted_nodes is not None:
        raise ArgumentError("accepted_nodes", "given besides num_accepted, expected one of the two")


def check_call(
    tensors: CallTensors,
    scale: float | Tensor,
    flags: CallFlags,
    *,
    dims: dict[str, int] | None = None,
    device: torch.device | None = None,
) -> SpeculativeProblem | None:
    """Checks a whole call and returns its problem, None if there are no requests; mutates nothing.

    dims, device: what the tensors have to agree with, where that is known beforehand.
    Raises ArgumentError or ArgumentTypeError naming the argument. Values of tensors are read only on the CPU
    and in debug mode.
    """
    check_flags(tensors, flags)
    specs = tensor_specs(flags.mode)
    names = {spec.name for spec in specs}
    named = {name: tensor for name, tensor in tensors.named().items() if name in names}
    dims = bind(specs, named, dims, device, "the plan")
    _check_same_dtypes(tensors)
    _check_sizes(dims, flags)
    check_threshold(flags.fold, dims["capacity"], flags.max_tokens)
    if flags.mode == "verify":
        check_scale("scale", scale, tensors.state_pool.device)
        if isinstance(scale, Tensor):
            named["scale"] = scale
    written = {spec.name for spec in specs if spec.written}
    if flags.mode == "materialize":
        written = {"states"}
    outputs = {name: tensor for name, tensor in named.items() if name in written}
    check_no_overlap(outputs, {name: tensor for name, tensor in named.items() if name not in written})
    if values_are_readable(tensors.state_pool):
        _check_values(tensors, flags, dims)
    if dims["B"] == 0:
        check_registered(SpeculativeProblem.entry_point_group, flags.backend)
        return None
    return problem_of(tensors, scale, flags)


def problem_of(tensors: CallTensors, scale: float | Tensor, flags: CallFlags) -> SpeculativeProblem:
    """The problem that checked tensors pose."""
    pool, keys, q = tensors.state_pool, tensors.keys, tensors.q
    accept: Accept = "none"
    if tensors.num_accepted is not None:
        accept = "counts"
    elif tensors.accepted_nodes is not None:
        accept = "nodes"
    return SpeculativeProblem(
        B=tensors.state_indices.shape[0],
        T=0 if q is None else q.shape[1],
        H=keys.shape[2],
        HV=pool.shape[1],
        K=pool.shape[3],
        V=pool.shape[2],
        capacity=keys.shape[1],
        mode=flags.mode,
        accept=accept,
        io_dtype=keys.dtype,
        gate_dtype=None if tensors.a is None else tensors.a.dtype,  # type: ignore[arg-type]
        dt_bias_dtype=torch.float32 if tensors.dt_bias is None else tensors.dt_bias.dtype,
        out_dtype=None if tensors.output is None else tensors.output.dtype,  # type: ignore[arg-type]
        state_dtype=pool.dtype,
        index_dtype=tensors.state_indices.dtype,
        use_qk_l2norm=flags.use_qk_l2norm,
        variable_tokens=tensors.num_tokens is not None,
        tree=tensors.parent_indices is not None,
        tensor_scale=isinstance(scale, Tensor) and flags.mode == "verify",
        debug=debug_mode(),
        state_rows=state_rows(pool, tensors.states),
    )


def _check_same_dtypes(tensors: CallTensors) -> None:
    for name, first_name in (
        ("q", "keys"),
        ("k", "keys"),
        ("v", "keys"),
        ("b", "a"),
        ("states", "state_pool"),
    ):
        tensor, first = getattr(tensors, name), getattr(tensors, first_name)
        if tensor is not None and tensor.dtype != first.dtype:
            source = _ARGUMENT.get(first_name, first_name)
            came, expected = dtype_name(tensor.dtype), dtype_name(first.dtype)
            raise ArgumentTypeError(name, f"dtype {came}, expected {expected} as {source} has")


def _check_sizes(dims: dict[str, int], flags: CallFlags) -> None:
    """Raises for a dimension other than B that is 0, heads that do not divide, and too many tokens."""
    named = (("q", ("T",)), ("state_pool", ("pool", "HV", "V", "K")), ("cache.keys", ("capacity", "H")))
    for argument, names in named:
        for name in names:
            if dims.get(name, 1) == 0:
                raise ArgumentError(argument, f"{name} = 0, expected at least 1")
    if dims["HV"] % dims["H"]:
        raise ArgumentError("state_pool", f"HV = {dims['HV']}, expected a multiple of H = {dims['H']}")
    if dims.get("T", 0) > flags.max_tokens:
        raise ArgumentError(
            "q", f"T = {dims['T']}, expected at most max_tokens = {flags.max_tokens} of cache"
        )
    if dims.get("nodes", 0) > dims["capacity"]:
        raise ArgumentError("accepted_nodes", f"nodes = {dims['nodes']}, expected at most {dims['capacity']}")


def _check_values(tensors: CallTensors, flags: CallFlags, dims: dict[str, int]) -> None:
    """Raises for slots out of range or named twice, a broken cursor, and more accepted than verified."""
    slots = named_slots("state_indices", tensors.state_indices, dims["pool"])
    rows = tensors.state_indices.new_tensor([slot for _, slot in slots])
    cursors = tensors.cursor.index_select(0, rows).tolist()
    lives = tensors.live.index_select(0, rows).tolist()
    for (_, slot), cursor, live in zip(slots, cursors, lives, strict=True):
        fault = cursor_fault(slot, cursor, live, dims["capacity"], flags.max_tokens)
        if fault is not None:
            raise ArgumentError("cache", fault[1])
    windows = [window for _, _, window, _ in cursors]
    check_accepted(slots, windows, tensors.num_accepted, tensors.accepted_nodes)
    if flags.mode == "verify":
        check_window(slots, tensors.num_tokens, tensors.parent_indices, dims["T"])
