"""Decode problems with poisoned memory, and the error bounds that results are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from kernel_testing import UNUSED_INDEX, assert_close_elementwise, poisoned
from mla_core import decode, decode_reference

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
DTYPE_NAMES = {BF16: "bf16", FP16: "fp16", E4M3: "e4m3"}

FP32_ROUNDOFF = 2.0**-24
SQRT_TERMS = 32  # roundings of a sum of up to 1024 terms add up like a random walk: sqrt(terms) of them


@dataclass(frozen=True)
class Rounding:
    """Rounding to a dtype: relative (half an ulp of a normal number) plus absolute (that of a subnormal)."""

    relative: float
    absolute: float


# The significand's bits, the hidden one included, are 8, 11 and 4; half the smallest subnormal follows.
OUTPUT_ROUNDING = {
    BF16: Rounding(2.0**-8, 2.0**-134),
    FP16: Rounding(2.0**-11, 2.0**-25),
    E4M3: Rounding(2.0**-4, 2.0**-10),
}


@dataclass(frozen=True)
class Inputs:
    """The tensor arguments of a call. Memory that must not be read holds NaN or UNUSED_INDEX."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    cum_seq_lens_q: torch.Tensor | None = None
    max_q_len: int | None = None

    @property
    def positional(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.kv_cache, self.block_tables, self.seq_lens

    @property
    def ragged(self) -> dict[str, object]:
        return {"cum_seq_lens_q": self.cum_seq_lens_q, "max_q_len": self.max_q_len}


@dataclass(frozen=True)
class Case:
    """A decode problem with its lengths; `q_lens` makes the query ragged."""

    lengths: tuple[int, ...]
    q_len: int = 1
    num_heads: int = 16
    page_size: int = 64
    dtype: torch.dtype = BF16
    q_lens: tuple[int, ...] | None = None
    latent: int = 512
    rope: int = 64
    spare_pages: int = 3
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        q_len = "q" + ".".join(map(str, self.q_lens)) if self.q_lens else f"q{self.q_len}"
        return f"B{len(self.lengths)}-{q_len}-H{self.num_heads}-p{self.page_size}-{DTYPE_NAMES[self.dtype]}"

    @property
    def scale(self) -> float:
        return (self.latent + self.rope) ** -0.5

    @property
    def ranks(self) -> dict[str, int]:
        return {"kv_lora_rank": self.latent, "qk_rope_head_dim": self.rope}

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        head_dim = self.latent + self.rope
        pages_of = [-(-length // self.page_size) for length in self.lengths]
        width = max(*pages_of, 1) + 1  # one column that no request uses
        num_pages = sum(pages_of) + self.spare_pages
        order = torch.randperm(num_pages, generator=generator).tolist()
        kv_cache = poisoned((num_pages, self.page_size, head_dim), self.dtype)
        block_tables = torch.full((len(self.lengths), width), UNUSED_INDEX, dtype=torch.int32)
        block_tables[:, -1] = -7
        for request, length in enumerate(self.lengths):
            for column in range(pages_of[request]):
                page, filled = order.pop(), min(self.page_size, length - column * self.page_size)
                block_tables[request, column] = page
                kv_cache[page, :filled] = torch.randn(filled, head_dim, generator=generator).to(self.dtype)
        leading = (sum(self.q_lens),) if self.q_lens else (len(self.lengths), self.q_len)
        query = torch.randn(*leading, self.num_heads, head_dim, generator=generator).to(self.dtype)
        seq_lens = torch.tensor(self.lengths, dtype=torch.int32)
        if not self.q_lens:
            return Inputs(query, kv_cache, block_tables, seq_lens)
        offsets = torch.tensor([0, *self.q_lens]).cumsum(0).to(torch.int32)
        return Inputs(query, kv_cache, block_tables, seq_lens, offsets, max(self.q_lens))


def lse_bound(inputs: Inputs, softmax_scale: float) -> float:
    """Bound of a float32 logit's error, and so of the LSE's, which is a mean of them plus a logarithm.

    A logit sums products bounded by |q| |k| (Cauchy-Schwarz) with SQRT_TERMS roundings.
    """
    q_norm = inputs.query.double().norm(dim=-1).max().item()
    k_norm = inputs.kv_cache.double().nan_to_num(0.0).norm(dim=-1).max().item()
    return SQRT_TERMS * FP32_ROUNDOFF * (1.0 + abs(softmax_scale) * q_norm * k_norm)


def out_bound(inputs: Inputs, softmax_scale: float, output_scale: float, out_dtype: torch.dtype) -> Rounding:
    """Bound of an output's error: the rounding to its dtype and that of the float32 weights and their sums.

    An error d of the logits moves a weight by 2 d relatively; the weighted sums add SQRT_TERMS roundings.
    """
    largest_value = inputs.kv_cache.double().nan_to_num(0.0).abs().max().item()
    weights = 2 * lse_bound(inputs, softmax_scale) + 2 * SQRT_TERMS * FP32_ROUNDOFF
    rounding = OUTPUT_ROUNDING[out_dtype]
    return Rounding(rounding.relative, rounding.absolute + abs(output_scale) * largest_value * weights)


def assert_decoded(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    inputs: Inputs,
    *,
    softmax_scale: float,
    output_scale: float = 1.0,
    kv_lora_rank: int = 512,
) -> None:
    """Hold a result against the oracle, every element inside its bound."""
    out64, lse64 = decode_reference(
        *inputs.positional,
        kv_lora_rank=kv_lora_rank,
        softmax_scale=softmax_scale,
        output_scale=output_scale,
        cum_seq_lens_q=inputs.cum_seq_lens_q,
    )
    bound = out_bound(inputs, softmax_scale, output_scale, out.dtype)
    if out.dtype is E4M3:
        out64 = out64.clamp(-448.0, 448.0)
    assert_close_elementwise(out, out64, bound.absolute, bound.relative, "out")
    if lse is not None:
        assert_close_elementwise(lse, lse64, lse_bound(inputs, softmax_scale), 4 * FP32_ROUNDOFF, "lse")
        assert (out.float()[lse == -math.inf] == 0).all()


def decode_and_check(case: Case, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode into poisoned outputs and hold the result against the oracle."""
    inputs = case.inputs()
    out_dtype = options.pop("out_dtype", BF16 if case.dtype is E4M3 else case.dtype)
    out = poisoned((*inputs.query.shape[:-1], case.latent), out_dtype)
    lse = poisoned(inputs.query.shape[:-1], torch.float32)
    arguments = {"softmax_scale": case.scale, **case.ranks, **inputs.ragged, **options}
    returned = decode(*inputs.positional, out=out, lse=lse, return_lse=True, **arguments)
    assert returned[0] is out
    assert returned[1] is lse
    scales = {name: float(arguments.get(name, 1.0)) for name in ("softmax_scale", "output_scale")}
    assert_decoded(out, lse, inputs, kv_lora_rank=case.latent, **scales)
    return out, lse


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN compares equal to itself and -0 differs from 0."""
    return tensor.detach().contiguous().view(torch.uint8).clone()
