"""From the arguments of `mla_core.decode.v1` to those of a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from kernel_dispatch import ArgumentError
from mla_core import DecodeProblem

from .config import STRIDE_ALIGN_BYTES

if TYPE_CHECKING:
    from .kernels import Division

# What a compiled function takes, in order; None for what its configuration lacks.
PARAMETERS = (
    *("query", "kv_cache", "block_tables", "seq_lens", "cum_seq_lens_q", "softmax_scale", "output_scale"),
    *("out", "lse", "workspace", "q_len", "num_splits", "tiles_per_split", "num_clusters"),
)


class Launcher:
    """Launches one problem; takes what every launcher of `mla_core.decode.v1` takes.

    The function checks shapes, dtypes, strides, devices and alignment of its tensors, and launches on
    PyTorch's current stream of the device that they are on.
    """

    def __init__(self, function: Callable[..., None], problem: DecodeProblem, division: Division) -> None:
        self._function = function
        self._scales_are_floats = not (problem.softmax_scale_is_tensor or problem.output_scale_is_tensor)
        self._split = division.config.split
        self._sizes = (
            problem.q_len,
            division.splits.num_splits,
            max(1, division.splits.tiles_per_split),
            division.num_clusters,
        )

    def __call__(
        self,
        query: torch.Tensor,  # [batch, q_len, num_heads, 576], or ragged [total_q, num_heads, 576]
        kv_cache: torch.Tensor,  # [num_pages, page_size, 576]
        block_tables: torch.Tensor,  # [batch, max_pages] int32
        seq_lens: torch.Tensor,  # [batch] int32
        cum_seq_lens_q: torch.Tensor | None,  # [batch + 1] int32
        softmax_scale: float | torch.Tensor,
        output_scale: float | torch.Tensor,
        out: torch.Tensor,  # [..., num_heads, 512]
        lse: torch.Tensor | None,  # [..., num_heads] float32
        workspace: torch.Tensor | None,
    ) -> None:
        """Write `out` and, where given, `lse`. Raises ArgumentError naming a tensor that TMA cannot read."""
        if not self._scales_are_floats:
            softmax_scale, output_scale = one_element(softmax_scale), one_element(output_scale)
        if not self._split:
            workspace = None
        elif workspace is not None and workspace.dtype is not torch.uint8:
            workspace = workspace.view(torch.uint8)
        try:
            self._function(
                query,
                kv_cache,
                block_tables,
                seq_lens,
                cum_seq_lens_q,
                softmax_scale,
                output_scale,
                out,
                lse,
                workspace,
                *self._sizes,
            )
        except (TypeError, ValueError, RuntimeError):
            check_alignment("query", query)
            check_alignment("kv_cache", kv_cache)
            check_alignment("out", out)
            raise


def one_element(scale: Any) -> Any:
    """A tensor of one element as [1]; a float as it is."""
    return scale.reshape(1) if isinstance(scale, torch.Tensor) and scale.dim() != 1 else scale


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    """Raise ArgumentError unless the address and all strides but the last are multiples of 16 bytes.

    The stride of a dimension of one element means nothing.
    """
    sizes = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    strides = [stride * tensor.element_size() for size, stride in sizes if size > 1]
    for what, value in (("its address", tensor.data_ptr()), *(("a stride in bytes", x) for x in strides)):
        if value % STRIDE_ALIGN_BYTES:
            raise ArgumentError(
                name, f"{what} is {value}, expected a multiple of {STRIDE_ALIGN_BYTES} for this provider"
            )
