"""Tensor specs: what an operation asks of its arguments, and checks that say what came and what was expected.

An operation declares one `TensorSpec` per tensor argument and calls `bind` once per plan. The checks that
read values (`check_index_range`, `check_scale`) never synchronise with a GPU outside debug mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._tensors import dtype_name, has_data, same_device, values_are_readable
from .errors import ArgumentError, ArgumentTypeError

Layout = Literal["any", "inner", "contiguous"]
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor argument must be.

    shape: an int is a fixed size, a str names a size that must agree wherever the name appears.
    layout: "inner" asks for stride 1 in the last dimension (a dimension of size 1 is free), "contiguous" for
        row-major without gaps, "any" for nothing.
    optional: None will do. written: the operation writes to it, so no two elements may share memory.
    """

    name: str
    shape: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...]
    layout: Layout = "inner"
    optional: bool = False
    written: bool = False

    @property
    def signature(self) -> str:
        """The shape as messages show it: "[batch, q_len, 576]"."""
        return f"[{', '.join(map(str, self.shape))}]"


def bind(
    specs: Sequence[TensorSpec],
    tensors: Mapping[str, Tensor | None],
    dims: Mapping[str, int] | None = None,
    device: torch.device | None = None,
    source: str = "the arguments",
) -> dict[str, int]:
    """Checks `tensors` against `specs` in order and returns the sizes of the named dimensions.

    dims: sizes known beforehand. source: what messages say they are from.
    device: where every tensor must be, by default where the first one is.
    Fake tensors are welcome; their sizes may be symbolic.

    Raises ArgumentTypeError (missing, not a tensor, wrong dtype) or ArgumentError (device, shape, layout)
    naming the argument: "block_tables: batch = 4, expected 3 from query".
    """
    sizes = dict(dims or {})
    sources = dict.fromkeys(sizes, source)
    assert tensors.keys() <= {spec.name for spec in specs}, "a tensor without a spec would go unchecked"
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None and spec.optional:
            continue
        if not isinstance(tensor, Tensor):
            came = "None" if tensor is None else type(tensor).__name__
            raise ArgumentTypeError(spec.name, f"{came}, expected a tensor {spec.signature}")
        if tensor.dtype not in spec.dtypes:
            expected = " or ".join(map(dtype_name, spec.dtypes))
            raise ArgumentTypeError(spec.name, f"dtype {dtype_name(tensor.dtype)}, expected {expected}")
        if device is None:
            device = tensor.device
        elif not same_device(tensor.device, device):
            raise ArgumentError(spec.name, f"on {tensor.device}, expected {device}")
        _bind_shape(spec, tensor, sizes, sources)
        _check_layout(spec, tensor)
    return sizes


def _bind_shape(spec: TensorSpec, tensor: Tensor, sizes: dict[str, int], sources: dict[str, str]) -> None:
    """Adds the named dimensions of `tensor` to `sizes` (and where each came from to `sources`), or raises."""
    shape = tensor.shape
    if len(shape) != len(spec.shape):
        expected = f"expected {len(spec.shape)}: {spec.signature}"
        raise ArgumentError(spec.name, f"shape {list(shape)} has {len(shape)} dimensions, {expected}")
    for index, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                raise ArgumentError(spec.name, f"dimension {index} = {size}, expected {dim}")
        elif dim not in sizes:
            sizes[dim] = size
            sources[dim] = spec.name
        elif size != sizes[dim]:
            raise ArgumentError(spec.name, f"{dim} = {size}, expected {sizes[dim]} from {sources[dim]}")


def _check_layout(spec: TensorSpec, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ArgumentError(spec.name, f"layout {tensor.layout}, expected torch.strided")
    if tensor.is_contiguous():
        return
    came = f"strides {list(tensor.stride())} for shape {list(tensor.shape)}"
    if spec.layout == "contiguous":
        raise ArgumentError(spec.name, f"{came}, expected a contiguous tensor")
    if spec.layout == "inner" and tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
        raise ArgumentError(spec.name, f"stride {tensor.stride(-1)} in the last dimension, expected 1")
    if spec.written and _may_overlap_itself(tensor):
        raise ArgumentError(spec.name, f"{came}, expected an address of its own for every element")


def _may_overlap_itself(tensor: Tensor) -> bool:
    """Whether two elements may share an address: some stride does not clear the extent of the smaller ones.

    Exact for every tensor made by slicing, transposing and expanding; interleavings that only `as_strided`
    can build count as overlapping.
    """
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= extent:
                return True
            extent += (size - 1) * stride
    return False


def check_no_overlap(outputs: Mapping[str, Tensor | None], inputs: Mapping[str, Tensor | None]) -> None:
    """Raises ArgumentError naming the output if its memory overlaps that of an input or of another output.

    Memory means the byte range from first to last element; two views that interleave with a common outer
    stride (slots of two kinds in one pool) are told apart. Fake and meta tensors have no address and pass.
    """
    written = _memory(outputs)
    for first, second in combinations(written, 2):
        if _overlap(first, second):
            raise ArgumentError(second.name, f"shares memory with {first.name}, expected memory of its own")
    for output, other in product(written, _memory(inputs)):
        if _overlap(output, other):
            raise ArgumentError(output.name, f"shares memory with {other.name}, expected memory of its own")


def are_disjoint(written: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether no byte range of `written` meets another of them, or one of `others`; quick, for every launch.

    False says nothing yet: `check_no_overlap` knows of tensors that interleave, of devices, and of fake ones.
    """
    ranges = []
    for tensor in (*written, *others):
        start = tensor.data_ptr()
        ranges.append((start, start + _extent_bytes(tensor)))
    for place, (start, end) in enumerate(ranges[: len(written)], start=1):
        for other_start, other_end in ranges[place:]:
            if start < other_end and other_start < end:
                return False
    return True


class _Memory(NamedTuple):
    """The bytes [start, end) that a tensor's elements lie in."""

    name: str
    tensor: Tensor
    start: int
    end: int


def _memory(tensors: Mapping[str, Tensor | None]) -> list[_Memory]:
    return [
        _Memory(name, tensor, tensor.data_ptr(), tensor.data_ptr() + _extent_bytes(tensor))
        for name, tensor in tensors.items()
        if tensor is not None and has_data(tensor) and tensor.numel() > 0
    ]


def _overlap(a: _Memory, b: _Memory) -> bool:
    if a.end <= b.start or b.end <= a.start or a.tensor.device != b.tensor.device:
        return False
    return not (_lies_between(a, b) or _lies_between(b, a))


def _lies_between(a: _Memory, b: _Memory) -> bool:
    """Whether b, or each item of it if they have the same period, lies in the gaps between the items of a."""
    outer, b_outer = _outer_dim(a.tensor), _outer_dim(b.tensor)
    if outer is None or a.tensor.stride(outer) == 0:
        return False
    period = a.tensor.stride(outer) * a.tensor.element_size()
    b_bytes = b.end - b.start
    if b_outer is not None and b.tensor.stride(b_outer) * b.tensor.element_size() == period:
        b_bytes = _extent_bytes(b.tensor.select(b_outer, 0))
    gap = (b.start - a.start) % period  # from the start of an item of a to that of the next one of b
    return gap >= _extent_bytes(a.tensor.select(outer, 0)) and gap + b_bytes <= period


def _extent_bytes(tensor: Tensor) -> int:
    """Bytes from the start of the first element to the end of the last; `tensor` is not empty."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _outer_dim(tensor: Tensor) -> int | None:
    """The dimension with the largest stride among those longer than 1."""
    long_dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
    return max(long_dims, key=tensor.stride, default=None)


def check_index_range(name: str, indices: Tensor, upper: int, lower: int = -1) -> None:
    """Raises ArgumentError unless every index is in [lower, upper); with lower -1, any negative is padding.

    indices: an integer tensor of any shape. Its values are read on the CPU and in debug mode; otherwise, and
    for fake tensors and during graph capture, nothing is checked.
    """
    if indices.numel() == 0 or not values_are_readable(indices):
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(indices))
    too_small = lower >= 0 and smallest < lower
    if not too_small and largest < upper:
        return
    value = smallest if too_small else largest
    position = torch.nonzero(indices == value)[0].tolist()
    padding = "" if lower >= 0 else ", or negative for padding"
    raise ArgumentError(name, f"{value} at {position}, expected {max(lower, 0)} to {upper - 1}{padding}")


def check_scale(
    name: str, value: float | Real | Tensor, device: torch.device | None = None
) -> float | Tensor:
    """Raises unless `value` is a finite real number or a one-element float32 tensor (on `device`, if given).

    Returns what a launcher takes: the tensor itself, any other number (a `numbers.Real` but for bool, such as
    a NumPy scalar) as a float. A tensor's value is read on the CPU and in debug mode only.

    Raises ArgumentTypeError for another type or dtype, ArgumentError for more elements, another device, NaN,
    infinity, or a number beyond the range of float32, in which kernels take it.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            raise ArgumentTypeError(name, f"dtype {dtype_name(value.dtype)}, expected float32")
        if value.numel() != 1:
            raise ArgumentError(name, f"shape {list(value.shape)}, expected one element")
        if device is not None and not same_device(value.device, device):
            raise ArgumentError(name, f"on {value.device}, expected {device}")
        if values_are_readable(value):
            _check_finite(name, value.item())
        return value
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):  # the ABC is asked last: slow
        raise _no_scale(name, value)
    try:
        number = float(value)
    except OverflowError:  # the number is not shown: it may have thousands of digits
        came = f"{type(value).__name__} beyond the range of float32"
        raise ArgumentError(name, f"{came}, expected a finite number") from None
    _check_finite(name, number)
    if abs(number) > FLOAT32_MAX:
        raise ArgumentError(name, f"{number} beyond the range of float32, expected a finite number")
    return number


def split_scale(name: str, value: float | Real | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A scale as two arguments of an operation, whose schema has no union: a number or else a tensor.

    Raises ArgumentTypeError for what is neither. Which numbers and tensors will do, `check_scale` says when
    the operation runs: to a tracer a number may be a symbol, and one of NumPy an array.
    """
    if value is None or isinstance(value, Tensor):
        return None, value
    if not isinstance(value, (bool, str, bytes)):
        try:
            return float(value), None
        except (TypeError, ValueError):
            pass
    raise _no_scale(name, value)


def _no_scale(name: str, value: object) -> ArgumentTypeError:
    came = type(value).__name__
    return ArgumentTypeError(name, f"{came}, expected a float or a float32 tensor of one element")


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ArgumentError(name, f"{number}, expected a finite number")
