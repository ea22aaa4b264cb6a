"""The problem a gated-delta-rule kernel is chosen and compiled for: sizes, dtypes and flags, no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, bucket_batch

StateLayout = Literal["vk", "kv"]
Intermediate = Literal["none", "buffer", "scatter"]
StateRows = Literal["contiguous", "aligned", "any"]

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATE_DTYPES = (torch.float32, torch.bfloat16)
BIAS_DTYPES = (torch.float32, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)

L2NORM_EPSILON = 1e-6  # x / sqrt(sum x^2 + epsilon)


@dataclass(frozen=True)
class GatedDeltaRuleProblem:
    """What a provider needs to know to accept a call, choose a tactic and compile.

    Strides beyond `state_rows`, the number of pool slots and the scale's value are left to the launch. A
    violated rule raises `ArgumentError` (`ArgumentTypeError` for a wrong type or dtype) naming the field.

    B: requests. T: tokens per request. H: query and key heads. HV: value heads, a multiple of H; value head h
    uses query and key head h // (HV // H). K, V: elements of a key and of a value head.
    io_dtype: of q, k and v. gate_dtype: of a and b. out_dtype: of the output. None at construction stands for
    io_dtype in both. state_dtype: also of the intermediate states.
    state_layout: "vk" for states [HV, V, K], "kv" for [HV, K, V].
    update_state: the state after token T - 1 is written to the pool.
    intermediate: "buffer" stores the state after each token in a tensor of its own, "scatter" in pool slots
    (the last of which is the updated state, so nothing else is written back).
    index_dtype: None where request i owns slot i, else the dtype of every index tensor of the call.
    separate_write_indices: states are written to other slots than they are read from.
    tensor_scale: the scale is a one-element tensor on the device.
    state_rows: how the rows of the state, and of a buffer for intermediate states, lie in memory: each starts
    at a multiple of 16 bytes ("aligned"), also follows the one before ("contiguous"), or neither ("any").
    """

    entry_point_group: ClassVar[str] = "gdn_mtp.decode.v1"

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    io_dtype: torch.dtype = torch.bfloat16
    gate_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    dt_bias_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    state_dtype: torch.dtype = torch.float32
    state_layout: StateLayout = "vk"
    use_qk_l2norm: bool = True
    update_state: bool = True
    intermediate: Intermediate = "none"
    index_dtype: torch.dtype | None = None
    separate_write_indices: bool = False
    tensor_scale: bool = False
    state_rows: StateRows = "contiguous"

    def __post_init__(self) -> None:
        check_fields(
            self,
            sizes=("B", "T", "H", "HV", "K", "V"),
            index_dtypes=(None, *INDEX_DTYPES),
            choices={
                "state_layout": get_args(StateLayout),
                "intermediate": get_args(Intermediate),
                "state_rows": get_args(StateRows),
            },
            flags=("use_qk_l2norm", "update_state", "separate_write_indices", "tensor_scale"),
        )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.separate_write_indices and self.index_dtype is None:
            raise ArgumentError("separate_write_indices", "True without state indices (index_dtype is None)")
        if self.separate_write_indices and not self.update_state:
            raise ArgumentError("separate_write_indices", "True although update_state is False")
        if self.intermediate != "scatter":
            return
        if self.index_dtype is None:
            raise ArgumentError("intermediate", "'scatter' without state indices (index_dtype is None)")
        if not self.update_state:
            raise ArgumentError("intermediate", "'scatter' writes states although update_state is False")
        if self.separate_write_indices:
            raise ArgumentError("intermediate", "'scatter' names every write slot; write indices exclude it")

    @property
    def writes_state(self) -> bool:
        """Whether the ordinary write-back of the final state takes place."""
        return self.update_state and self.intermediate != "scatter"

    def bucketed(self) -> "GatedDeltaRuleProblem":
        """The tuner's stand-in for this problem: B rounded down to a power of two, at most 2048."""
        return replace(self, B=bucket_batch(self.B))

    def describe(self) -> str:
        """One line such as `B8-T4-H16-HV32-K128-V128-bf16-gates.bf16.fp32-out.bf16-state.fp32.vk-update`."""
        parts = [f"{name}{getattr(self, name)}" for name in ("B", "T", "H", "HV", "K", "V")]
        parts.append(short_dtype(self.io_dtype))
        parts.append(f"gates.{short_dtype(self.gate_dtype)}.{short_dtype(self.dt_bias_dtype)}")
        parts.append(f"out.{short_dtype(self.out_dtype)}")
        parts.append(f"state.{short_dtype(self.state_dtype)}.{self.state_layout}")
        parts.append("update" if self.update_state else "frozen")
        if self.use_qk_l2norm:
            parts.append("l2norm")
        if self.intermediate != "none":
            parts.append(self.intermediate)
        if self.index_dtype is not None:
            parts.append(short_dtype(self.index_dtype))
        if self.separate_write_indices:
            parts.append("write_indices")
        if self.tensor_scale:
            parts.append("tensor_scale")
        if self.state_rows != "contiguous":
            parts.append(f"rows.{self.state_rows}")
        return "-".join(parts)


def short_dtype(dtype: torch.dtype) -> str:
    """`bf16`, `fp32` and so on."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def check_size(name: str, value: int) -> None:
    """Raises unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(name, f"{value!r}, expected an int")
    if value < 1:
        raise ArgumentError(name, f"{value}, expected at least 1")


def check_fields(
    problem: Any,
    *,
    sizes: Sequence[str],
    index_dtypes: tuple[torch.dtype | None, ...],
    choices: Mapping[str, tuple[str, ...]],
    flags: Sequence[str],
) -> None:
    """Check the fields that the problems of all functions have; dtypes that are not given become io_dtype.

    sizes, flags: names of fields. index_dtypes, choices: what index_dtype and other fields may be. Raises
    ArgumentError or ArgumentTypeError naming the field.
    """
    for name in sizes:
        check_size(name, getattr(problem, name))
    if problem.HV % problem.H:
        raise ArgumentError("HV", f"{problem.HV}, expected a multiple of H = {problem.H}")
    for name in ("gate_dtype", "out_dtype"):
        if getattr(problem, name) is None:
            object.__setattr__(problem, name, problem.io_dtype)  # a frozen dataclass has no other way
    for name, allowed in (
        ("io_dtype", INPUT_DTYPES),
        ("gate_dtype", INPUT_DTYPES),
        ("dt_bias_dtype", BIAS_DTYPES),
        ("out_dtype", INPUT_DTYPES),
        ("state_dtype", STATE_DTYPES),
        ("index_dtype", index_dtypes),
    ):
        value = getattr(problem, name)
        if value not in allowed:
            raise ArgumentTypeError(name, f"{value}, expected one of {', '.join(map(str, allowed))}")
    for name, words in choices.items():
        value = getattr(problem, name)
        if value not in words:
            raise ArgumentError(name, f"{value!r}, expected one of {', '.join(map(repr, words))}")
    for name in flags:
        if not isinstance(getattr(problem, name), bool):
            raise ArgumentTypeError(name, f"{getattr(problem, name)!r}, expected a bool")
