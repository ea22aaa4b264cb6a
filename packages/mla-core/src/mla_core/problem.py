"""The problem a decode kernel is chosen, compiled and tuned for: sizes, dtypes and flags, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError, bucket_batch

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)

MAX_NUM_HEADS = 128

SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}

_SIZES = ("batch", "q_len", "num_heads", "kv_lora_rank", "qk_rope_head_dim", "page_size", "max_seq_len")
_FLAGS = ("is_var_seq", "ragged", "return_lse", "softmax_scale_is_tensor", "output_scale_is_tensor")


def default_out_dtype(q_dtype: torch.dtype) -> torch.dtype:
    """The output dtype where the caller names none: bfloat16 for an fp8 query, else that of the query."""
    return torch.bfloat16 if q_dtype is torch.float8_e4m3fn else q_dtype


@dataclass(frozen=True, kw_only=True)
class DecodeProblem:
    """What a provider needs to know to accept a call, choose a tactic and compile.

    Strides, the number of pages, the number of ragged query tokens and the values of the scales are left to
    the launch. A violated rule raises `ArgumentError` (`ArgumentTypeError` for a wrong type or dtype) naming
    the field.

    batch: requests.
    q_len: query tokens per request; the most of any request where `ragged`.
    num_heads: query heads, 1 to 128.
    kv_lora_rank, qk_rope_head_dim: latent and rope elements of a key; the value is its latent part.
    page_size: keys per page.
    max_seq_len: upper bound of every sequence length, in keys.
    max_pages: width of the block table; None at construction stands for just enough pages for max_seq_len.
    kv_dtype: equal to q_dtype, which None at construction stands for.
    out_dtype: None at construction stands for `default_out_dtype(q_dtype)`.
    is_var_seq: False promises that all sequence lengths are equal.
    ragged: the query is [total_q, num_heads, head_dim] and comes with cum_seq_lens_q.
    return_lse: the log-sum-exp is written too.
    enable_pdl: programmatic dependent launch. None leaves it to the provider and the device; True requires
        it, so that a provider without it declines; False forbids it.
    softmax_scale_is_tensor, output_scale_is_tensor: the scale is read on the device at launch.
    """

    entry_point_group: ClassVar[str] = "mla_core.decode.v1"

    batch: int
    q_len: int = 1
    num_heads: int
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    page_size: int
    max_seq_len: int
    max_pages: int = None  # type: ignore[assignment]  # None only until __post_init__
    q_dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    out_dtype: torch.dtype = None  # type: ignore[assignment]  # None only until __post_init__
    is_var_seq: bool = True
    ragged: bool = False
    return_lse: bool = False
    enable_pdl: bool | None = None
    softmax_scale_is_tensor: bool = False
    output_scale_is_tensor: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_positive(name, getattr(self, name))
        if self.num_heads > MAX_NUM_HEADS:
            raise ArgumentError("num_heads", f"{self.num_heads}, expected at most {MAX_NUM_HEADS}")
        self._fill_defaults()
        check_positive("max_pages", self.max_pages)
        capacity = self.max_pages * self.page_size
        if self.max_seq_len > capacity:
            raise ArgumentError(
                "max_seq_len",
                f"{self.max_seq_len}, but a block table of {self.max_pages} pages of {self.page_size} keys "
                f"holds {capacity}",
            )
        self._check_dtypes()
        for name in _FLAGS:
            check_bool(name, getattr(self, name))
        check_bool("enable_pdl", self.enable_pdl, optional=True)

    def _fill_defaults(self) -> None:
        defaults = {
            "max_pages": -(-self.max_seq_len // self.page_size),
            "kv_dtype": self.q_dtype,
            "out_dtype": default_out_dtype(self.q_dtype),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # a frozen dataclass has no other way

    def _check_dtypes(self) -> None:
        check_dtype("q_dtype", self.q_dtype, INPUT_DTYPES)
        check_dtype("kv_dtype", self.kv_dtype, (self.q_dtype,))
        check_dtype("out_dtype", self.out_dtype, OUT_DTYPES)

    @property
    def head_dim(self) -> int:
        """Elements of a query head and of a key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rows(self) -> int:
        """(query token, head) rows of a request: what a kernel folds into M."""
        return self.q_len * self.num_heads

    def bucketed(self) -> DecodeProblem:
        """The problem that stands for this one in the tuner; only looked up, never run.

        The batch becomes its bucket. max_seq_len is rounded up to a power of two, and the block table is as
        wide as that takes, so that a table that grows is not tuned anew at each width.
        """
        max_seq_len = 1 << (self.max_seq_len - 1).bit_length()
        max_pages = -(-max_seq_len // self.page_size)
        return replace(self, batch=bucket_batch(self.batch), max_seq_len=max_seq_len, max_pages=max_pages)

    def describe(self) -> str:
        """One line such as `B3-q2-H128-p64-s8192-bf16`, followed by whatever is not the default."""
        parts = [f"B{self.batch}", f"q{self.q_len}", f"H{self.num_heads}", f"p{self.page_size}"]
        parts += [f"s{self.max_seq_len}", SHORT_DTYPES[self.q_dtype]]
        if self.out_dtype is not default_out_dtype(self.q_dtype):
            parts.append(f"out.{SHORT_DTYPES[self.out_dtype]}")
        if (self.kv_lora_rank, self.qk_rope_head_dim) != (512, 64):
            parts.append(f"d{self.kv_lora_rank}+{self.qk_rope_head_dim}")
        flags = {
            "fixed": not self.is_var_seq,
            "ragged": self.ragged,
            "lse": self.return_lse,
            "pdl": self.enable_pdl is True,
            "nopdl": self.enable_pdl is False,
            "softmax_scale.tensor": self.softmax_scale_is_tensor,
            "output_scale.tensor": self.output_scale_is_tensor,
        }
        return "-".join(parts + [name for name, present in flags.items() if present])


def check_problem(problem: DecodeProblem) -> None:
    """Raise unless `problem` is a DecodeProblem."""
    if not isinstance(problem, DecodeProblem):
        raise ArgumentTypeError("problem", f"{type(problem).__name__}, expected a DecodeProblem")


def check_positive(name: str, value: int) -> None:
    """Raise unless `value` is an int (under a tracer, possibly a symbolic one) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ArgumentTypeError(name, f"{value!r}, expected an int")
    if value < 1:
        raise ArgumentError(name, f"{value}, expected at least 1")


def check_index(name: str, value: int, below: int | None = None) -> None:
    """Raise unless `value` is an int of at least 0, and less than `below` where that is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(name, f"{value!r}, expected an int")
    if value < 0 or (below is not None and value >= below):
        expected = "at least 0" if below is None else f"0 to {below - 1}"
        raise ArgumentError(name, f"{value}, expected {expected}")


def check_bool(name: str, value: bool | None, optional: bool = False) -> None:
    """Raise unless `value` is a bool, or None where `optional`."""
    if not isinstance(value, bool) and not (optional and value is None):
        raise ArgumentTypeError(name, f"{value!r}, expected a bool{' or None' if optional else ''}")


def check_dtype(name: str, value: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` is one of the `allowed` dtypes."""
    if value not in allowed:
        raise ArgumentTypeError(name, f"{value}, expected {' or '.join(map(str, allowed))}")
