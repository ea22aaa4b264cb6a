"""The problem a speculative kernel is chosen and compiled for: sizes, dtypes and flags, no tensors."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from kernel_dispatch import ArgumentError, bucket_batch

from gdn_mtp.problem import (
    INDEX_DTYPES,
    StateRows,
    check_fields,
    check_size,
    short_dtype,
)

Mode = Literal["verify", "commit", "materialize"]
Accept = Literal["none", "counts", "nodes"]

MAX_CAPACITY = 32  # tokens of a ring: the bits of an int32


@dataclass(frozen=True)
class SpeculativeProblem:
    """What a provider needs to know to accept a call on a `SpeculativeCache`, choose a tactic and compile.

    A violated rule raises `ArgumentError` (`ArgumentTypeError` for a wrong type or dtype) naming the field.

    B: requests. T: tokens per request that a verify takes. H: query and key heads. HV: value heads, a
    multiple of H. K, V: elements of a key and of a value head. capacity: tokens of a ring.
    mode: the function called. "verify" alone takes tokens: in other modes T is 0 and every field about tokens
    has its default. accept: what says which tokens of the last window are accepted: nothing, their number, or
    their nodes.
    io_dtype: of q, k, v and the keys of the cache. gate_dtype: of a and b. out_dtype: of the output. None at
    construction stands for io_dtype in both. dt_bias_dtype: of dt_bias. state_dtype: of the pool and of
    materialized states. index_dtype: of state_indices. use_qk_l2norm: q and k are normalised first.
    variable_tokens: requests have a number of tokens each. tree: tokens name their parents.
    tensor_scale: the scale is a one-element tensor on the device.
    debug: the kernel stops with a message where slots, the cache, tokens, their parents or what is accepted
    are out of range.
    state_rows: how the rows of a state lie in memory; see `GatedDeltaRuleProblem`.
    """

    entry_point_group: ClassVar[str] = "gdn_mtp.speculative.v1"

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    capacity: int
    mode: Mode = "verify"
    accept: Accept = "counts"
    io_dtype: torch.dtype = torch.bfloat16
    gate_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    dt_bias_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    state_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    use_qk_l2norm: bool = True
    variable_tokens: bool = False
    tree: bool = False
    tensor_scale: bool = False
    debug: bool = False
    state_rows: StateRows = "contiguous"

    def __post_init__(self) -> None:
        check_fields(
            self,
            sizes=("B", "H", "HV", "K", "V", "capacity"),
            index_dtypes=INDEX_DTYPES,
            choices={"mode": get_args(Mode), "accept": get_args(Accept), "state_rows": get_args(StateRows)},
            flags=("use_qk_l2norm", "variable_tokens", "tree", "tensor_scale", "debug"),
        )
        if self.capacity > MAX_CAPACITY:
            raise ArgumentError("capacity", f"{self.capacity}, expected at most {MAX_CAPACITY}")
        check_slot(self.capacity, self.H, self.HV, self.K, self.V)
        self._check_mode()

    def _check_mode(self) -> None:
        if self.mode == "verify":
            check_size("T", self.T)
            if self.capacity < 2 * self.T:
                raise ArgumentError("T", f"{self.T}, expected at most half of capacity = {self.capacity}")
            return
        without_tokens = {
            "T": 0,
            "gate_dtype": self.io_dtype,
            "dt_bias_dtype": torch.float32,
            "out_dtype": self.io_dtype,
            "use_qk_l2norm": True,
            "variable_tokens": False,
            "tree": False,
            "tensor_scale": False,
        }
        for name, expected in without_tokens.items():
            came = getattr(self, name)
            if came != expected:
                raise ArgumentError(name, f"{came}, expected {expected}, for {self.mode} takes no tokens")

    @property
    def heads_per_group(self) -> int:
        """Value heads that share one query and key head."""
        return self.HV // self.H

    def bucketed(self) -> "SpeculativeProblem":
        """The tuner's stand-in for this problem: B rounded down to a power of two, at most 2048."""
        return replace(self, B=bucket_batch(self.B))

    def describe(self) -> str:
        """One line such as `verify-B8-T4-H16-HV32-K128-V128-R16-counts-bf16-gates.bf16.fp32-...`."""
        parts = [self.mode, *(f"{name}{getattr(self, name)}" for name in ("B", "T", "H", "HV", "K", "V"))]
        parts += [f"R{self.capacity}", self.accept, short_dtype(self.io_dtype)]
        parts.append(f"gates.{short_dtype(self.gate_dtype)}.{short_dtype(self.dt_bias_dtype)}")
        parts.append(f"out.{short_dtype(self.out_dtype)}")
        parts.append(f"state.{short_dtype(self.state_dtype)}")
        parts.append(short_dtype(self.index_dtype))
        if self.use_qk_l2norm:
            parts.append("l2norm")
        parts += [
            name for name in ("variable_tokens", "tree", "tensor_scale", "debug") if getattr(self, name)
        ]
        if self.state_rows != "contiguous":
            parts.append(f"rows.{self.state_rows}")
        return "-".join(parts)


def check_slot(capacity: int, H: int, HV: int, K: int, V: int) -> None:
    """Raise ArgumentError naming H or HV where a slot has 2^31 elements of keys or updates, or more."""
    for name, heads, width in (("H", H, K), ("HV", HV, V)):
        if capacity * heads * width >= 2**31:
            expected = f"less than 2^31 elements of a slot, {capacity} x {name} x {width}"
            raise ArgumentError(name, f"{heads}, expected {expected}")
