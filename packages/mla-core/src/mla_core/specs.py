"""The tensor arguments of a decode call: specs, checks on values, and the views a launcher takes."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    TensorSpec,
    are_disjoint,
    bind,
    check_index_range,
    check_no_overlap,
    check_scale,
    values_are_readable,
)

from .problem import INPUT_DTYPES, MAX_NUM_HEADS, OUT_DTYPES, DecodeProblem

Scale = float | torch.Tensor

_REQUIRED = ("query", "kv_cache", "block_tables", "seq_lens")
_SCALES = ("softmax_scale", "output_scale")
_WRITTEN = ("out", "lse", "workspace")


class DecodeTensors(NamedTuple):
    """The tensors of a call as the caller passed them, in a launcher's order; shapes as in `mla_core.decode`.

    A tuple rather than a dataclass, since one is made for every launch.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    cum_seq_lens_q: torch.Tensor | None
    softmax_scale: Scale
    output_scale: Scale
    out: torch.Tensor | None
    lse: torch.Tensor | None
    workspace: torch.Tensor | None

    @property
    def ragged(self) -> bool:
        """Whether the query is [total_q, num_heads, head_dim]."""
        return self.cum_seq_lens_q is not None

    def check_types(self) -> None:
        """Raise for whatever is not a strided tensor; scales are left to `check_values`."""
        for name, value in self._by_name().items():
            if value is None and name not in _REQUIRED:
                continue
            if not isinstance(value, torch.Tensor):
                raise ArgumentTypeError(name, f"{type(value).__name__}, expected a tensor")
            if value.layout is not torch.strided:
                raise ArgumentError(name, f"layout {value.layout}, expected torch.strided")

    def all_tensors(self) -> list[torch.Tensor]:
        """Every tensor that was given, scales among them."""
        return [value for value in self if isinstance(value, torch.Tensor)]

    def all_but_numbers(self) -> list[torch.Tensor]:
        """What was given and is no number: tensors, or what should be."""
        return [value for value in self if value is not None and not isinstance(value, (float, int, Real))]

    def check_memory(self) -> None:
        """Raise ArgumentError if an output or the workspace shares memory with another argument."""
        inputs = (self.query, self.kv_cache, self.block_tables, self.seq_lens, self.cum_seq_lens_q)
        read = [x for x in (*inputs, self.softmax_scale, self.output_scale) if isinstance(x, torch.Tensor)]
        if are_disjoint([x for x in (self.out, self.lse, self.workspace) if x is not None], read):
            return
        tensors = self._by_name()
        outputs = {name: tensors.pop(name) for name in _WRITTEN}
        scales = {name: getattr(self, name) for name in _SCALES}
        tensors |= {name: scale for name, scale in scales.items() if isinstance(scale, torch.Tensor)}
        check_no_overlap(outputs, tensors)

    def launch_arguments(self) -> DecodeTensors:
        """What a launcher takes: queries with q_len, caches without a unit dimension, float scales."""
        canonical = self
        if self.cum_seq_lens_q is None and self.query.dim() == 3:
            assert self.out is not None
            canonical = self._replace(
                query=self.query.unsqueeze(1),
                out=self.out.unsqueeze(1),
                lse=None if self.lse is None else self.lse.unsqueeze(1),
            )
        if self.kv_cache.dim() == 4:
            canonical = canonical._replace(kv_cache=self.kv_cache.select(1, 0))
        if type(self.softmax_scale) is not float and not isinstance(self.softmax_scale, torch.Tensor):
            canonical = canonical._replace(softmax_scale=float(self.softmax_scale))
        if type(self.output_scale) is not float and not isinstance(self.output_scale, torch.Tensor):
            canonical = canonical._replace(output_scale=float(self.output_scale))
        return canonical

    def _by_name(self) -> dict[str, torch.Tensor | None]:
        return {name: value for name, value in self._asdict().items() if name not in _SCALES}


def bind_tensors(
    tensors: DecodeTensors,
    *,
    kv_lora_rank: int,
    head_dim: int,
    out_dtype: torch.dtype | None,
    problem: DecodeProblem | None = None,
    device: torch.device | None = None,
) -> dict[str, int]:
    """Check dtypes, shapes, strides and devices of everything but the workspace; return the named sizes.

    out_dtype: None lets `out` choose. problem: sizes and dtypes the tensors must have, where they are known.
    Raises ArgumentError or ArgumentTypeError naming the argument. Takes fake tensors.
    """
    query_shape = _query_shape(tensors, problem)
    cache_shape: tuple[int | str, ...] = ("num_pages", "page_size", "head_dim")
    if tensors.kv_cache.dim() == 4:
        cache_shape = ("num_pages", 1, "page_size", "head_dim")
    q_dtypes = (problem.q_dtype,) if problem else INPUT_DTYPES
    int32 = (torch.int32,)
    specs = (
        TensorSpec("query", (*query_shape, "head_dim"), q_dtypes),
        TensorSpec("kv_cache", cache_shape, (tensors.query.dtype,)),
        TensorSpec("block_tables", ("batch", "max_pages"), int32),
        TensorSpec("seq_lens", ("batch",), int32),
        TensorSpec("cum_seq_lens_q", ("batch + 1",), int32, optional=True),
        TensorSpec(
            "out",
            (*query_shape, "kv_lora_rank"),
            OUT_DTYPES if out_dtype is None else (out_dtype,),
            optional=True,
            written=True,
        ),
        TensorSpec("lse", query_shape, (torch.float32,), optional=True, written=True),
    )
    known = {"kv_lora_rank": kv_lora_rank, "head_dim": head_dim}
    if problem:
        known |= {name: getattr(problem, name) for name in ("num_heads", "batch", "page_size", "max_pages")}
        known |= {"q_len": problem.q_len, "batch + 1": problem.batch + 1}
    source = "the plan" if problem else "kv_lora_rank and qk_rope_head_dim"
    sizes = bind(specs, {spec.name: getattr(tensors, spec.name) for spec in specs}, known, device, source)
    _check_sizes(sizes)
    return sizes


def _query_shape(tensors: DecodeTensors, problem: DecodeProblem | None) -> tuple[str, ...]:
    if problem.ragged if problem else tensors.ragged:
        return ("total_q", "num_heads")
    if tensors.query.dim() == 3 and (problem is None or problem.q_len == 1):
        return ("batch", "num_heads")
    return ("batch", "q_len", "num_heads")


def _check_sizes(sizes: dict[str, int]) -> None:
    """The limits that a shape alone does not express."""
    for argument, name, least in (
        ("query", "q_len", 1),
        ("query", "num_heads", 1),
        ("kv_cache", "num_pages", 1),
        ("kv_cache", "page_size", 1),
        ("block_tables", "max_pages", 1),
    ):
        if sizes.get(name, least) < least:
            raise ArgumentError(argument, f"{name} = {sizes[name]}, expected at least {least}")
    if sizes["num_heads"] > MAX_NUM_HEADS:
        raise ArgumentError("query", f"num_heads = {sizes['num_heads']}, expected at most {MAX_NUM_HEADS}")
    offsets = sizes.get("batch + 1")
    if offsets is not None and offsets != sizes["batch"] + 1:
        raise ArgumentError("cum_seq_lens_q", f"{offsets} entries, expected batch + 1 = {sizes['batch'] + 1}")


def check_scales(tensors: DecodeTensors) -> None:
    """Check both scales; the value of a tensor where it may be read."""
    device = tensors.query.device
    check_scale("softmax_scale", tensors.softmax_scale, device)
    check_scale("output_scale", tensors.output_scale, device)


def check_values(tensors: DecodeTensors, problem: DecodeProblem) -> None:
    """Check scales, lengths, offsets and the table entries in use, where they may be read.

    That is on the CPU and in debug mode; a float scale is checked always.
    """
    check_scales(tensors)
    if not values_are_readable(tensors.query):
        return
    seq_lens = tensors.seq_lens
    check_index_range("seq_lens", seq_lens, upper=problem.max_seq_len + 1, lower=0)
    if not problem.is_var_seq and bool((seq_lens != seq_lens[0]).any()):
        raise ArgumentError("seq_lens", "lengths differ, expected equal ones with is_var_seq=False")
    first_key = torch.arange(problem.max_pages, device=seq_lens.device) * problem.page_size
    in_use = tensors.block_tables.masked_fill(first_key >= seq_lens.unsqueeze(1), -1)
    check_index_range("block_tables", in_use, upper=tensors.kv_cache.shape[0])
    if tensors.cum_seq_lens_q is not None:
        _check_offsets(tensors.cum_seq_lens_q, tensors.query.shape[0], problem.q_len)


def _check_offsets(cum_seq_lens_q: torch.Tensor, total_q: int, max_q_len: int) -> None:
    first, last = int(cum_seq_lens_q[0]), int(cum_seq_lens_q[-1])
    if first != 0 or last != total_q:
        raise ArgumentError("cum_seq_lens_q", f"runs from {first} to {last}, expected 0 to {total_q} tokens")
    shortest, longest = (int(bound) for bound in torch.aminmax(cum_seq_lens_q.diff()))
    if shortest < 0:
        raise ArgumentError("cum_seq_lens_q", "decreases, expected offsets that do not")
    if longest > max_q_len:
        raise ArgumentError("max_q_len", f"{max_q_len}, but cum_seq_lens_q has a request of {longest} tokens")
