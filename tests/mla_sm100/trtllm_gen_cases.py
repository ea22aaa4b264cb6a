"""Problems of `trtllm-gen` and their float64 results; what must not be used holds NaN or no index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_testing import UNUSED_INDEX, assert_close_elementwise, poisoned
from mla_core import decode, decode_reference

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
NAME = "trtllm-gen-model"  # of the provider where it is registered for the CPU
SCALE = 576**-0.5

# The model computes in float64: what is left is the rounding of an output to bf16, and of the scale, which is
# a float32 as in FlashInfer, times logits that stay below 64.
OUT_ROUNDOFF, LOGIT_BOUND = 2.0**-8, 64 * 2.0**-22
LSE_ROUNDOFF = 2.0**-23


@dataclass(frozen=True)
class Case:
    """Lengths of requests, and what they share; `q_lens` makes the query ragged."""

    lengths: tuple[int, ...]
    q_len: int = 1
    num_heads: int = 16
    page_size: int = 64
    dtype: torch.dtype = BF16
    q_lens: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    latent: int = 512

    def __str__(self) -> str:
        queries = "q" + ".".join(map(str, self.q_lens or (self.q_len,)))
        dtype = "e4m3" if self.dtype is E4M3 else "bf16"
        return f"B{len(self.lengths)}-{queries}-H{self.num_heads}-p{self.page_size}-d{self.latent}-{dtype}"

    def inputs(self) -> dict[str, Any]:
        """Arguments of `decode` but for scales and outputs; what must not be used is NaN or no index."""
        generator = torch.Generator().manual_seed(len(self.lengths))
        head_dim = self.latent + 64
        pages_of = [-(-length // self.page_size) for length in self.lengths]
        width = max(max(pages_of), -(-(self.max_seq_len or 1) // self.page_size)) + 1
        kv_cache = poisoned((sum(pages_of) + 2, self.page_size, head_dim), self.dtype)
        block_tables = torch.full((len(self.lengths), width), UNUSED_INDEX, dtype=torch.int32)
        order = torch.randperm(len(kv_cache), generator=generator).tolist()
        for request, length in enumerate(self.lengths):
            for column in range(pages_of[request]):
                page, filled = order.pop(), min(self.page_size, length - column * self.page_size)
                block_tables[request, column] = page
                kv_cache[page, :filled] = torch.randn(filled, head_dim, generator=generator).to(self.dtype)
        leading = (sum(self.q_lens),) if self.q_lens else (len(self.lengths), self.q_len)
        query = torch.randn(*leading, self.num_heads, head_dim, generator=generator).to(self.dtype)
        arguments = {
            "query": query,
            "kv_cache": kv_cache,
            "block_tables": block_tables,
            "seq_lens": torch.tensor(self.lengths, dtype=torch.int32),
            "kv_lora_rank": self.latent,
        }
        if self.max_seq_len:
            arguments["max_seq_len"] = self.max_seq_len
        if self.q_lens:
            arguments["cum_seq_lens_q"] = torch.tensor([0, *self.q_lens]).cumsum(0).to(torch.int32)
            arguments["max_q_len"] = max(self.q_lens)
        return arguments


CASES = [
    Case((70, 1, 64, 300)),
    Case((0, 65, 129), q_len=3, num_heads=128, page_size=32),
    Case((3, 2, 200), q_len=4, num_heads=5),
    Case((0, 100, 2), q_len=3, num_heads=64, dtype=E4M3, max_seq_len=4096),
    Case((33, 0, 90), q_lens=(2, 1, 4), page_size=32),
    Case((33, 2, 90), q_lens=(2, 3, 1), num_heads=8, max_seq_len=2048),
    Case((40, 129), num_heads=32, latent=256),
]


def decode_here(arguments: dict[str, Any], **options: Any) -> Any:
    """Decode on the model, whose CALLS and COUNTERS end with this launch."""
    inputs = dict(arguments)
    tensors = [inputs.pop(name) for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    options = {"softmax_scale": SCALE, "backend": NAME, **inputs, **options}
    return decode(*tensors, **options)


def reference(arguments: dict[str, Any], **scales: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in float64."""
    tensors = [arguments[name] for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    options = {name: arguments.get(name) for name in ("kv_lora_rank", "cum_seq_lens_q")}
    return decode_reference(*tensors, **options, **scales)


def assert_decoded(out: torch.Tensor, arguments: dict[str, Any], **scales: float) -> None:
    """Hold an output against the oracle, every element inside its bound."""
    want, _ = reference(arguments, **scales)
    largest = arguments["kv_cache"].double().nan_to_num(0.0).abs().max().item()
    assert_close_elementwise(
        out, want, abs(scales.get("output_scale", 1.0)) * largest * 2 * LOGIT_BOUND, OUT_ROUNDOFF, "out"
    )


def assert_lse(lse: torch.Tensor, arguments: dict[str, Any], **scales: float) -> None:
    """Hold an LSE against the oracle, every element inside its bound."""
    _, want = reference(arguments, **scales)
    assert_close_elementwise(lse, want, LOGIT_BOUND, LSE_ROUNDOFF, "lse")


def decode_and_check(case: Case) -> None:
    """Decode into poisoned outputs with scales other than 1, and hold the result against the oracle."""
    arguments = case.inputs()
    shape = (*arguments["query"].shape[:-1], case.latent)
    out = poisoned(shape, BF16)
    scales = {"softmax_scale": 1.3 * SCALE, "output_scale": -0.7}
    if case.q_lens:
        assert decode_here(arguments, out=out, **scales) is out
    else:
        lse = poisoned(shape[:-1], torch.float32)
        returned = decode_here(arguments, out=out, lse=lse, return_lse=True, **scales)
        assert returned[0] is out
        assert returned[1] is lse
        assert_lse(lse, arguments, **scales)
    assert_decoded(out, arguments, **scales)
