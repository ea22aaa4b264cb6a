"""Inputs of an MLA decode call, its float64 result with its bound, and what it must move and compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from kernel_testing import assert_close_elementwise
from kernel_testing.mla import HEAD_DIM, LATENT, ROUNDOFF, WEIGHT_DEVIATIONS
from mla_core import DecodeProblem
from mla_core.specs import DecodeTensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
FP32_BOUND = 2.0**-19  # of sums of float32 products: 32 roundings
CHECKED_REQUESTS = 2


@dataclass(frozen=True)
class Cell:
    """One shape: equal sequence lengths, pages in random order."""

    dtype: str
    batch: int
    num_heads: int
    seq_len: int
    q_len: int = 1
    page_size: int = 64

    def __str__(self) -> str:
        name = f"B{self.batch}-q{self.q_len}-H{self.num_heads}-p{self.page_size}-s{self.seq_len}"
        return f"{name}-{self.dtype}"

    @property
    def problem(self) -> DecodeProblem:
        return DecodeProblem(
            batch=self.batch,
            q_len=self.q_len,
            num_heads=self.num_heads,
            page_size=self.page_size,
            max_seq_len=self.seq_len,
            q_dtype=DTYPES[self.dtype],
            return_lse=True,
        )

    @property
    def necessary_bytes(self) -> int:
        """Keys, queries and outputs, each once."""
        problem = self.problem
        rows = self.batch * problem.rows
        keys = self.batch * self.seq_len * HEAD_DIM * problem.q_dtype.itemsize
        return keys + rows * (HEAD_DIM * problem.q_dtype.itemsize + LATENT * problem.out_dtype.itemsize + 4)

    @property
    def flops(self) -> int:
        """Of both products; keys that draft tokens do not see are few and counted too."""
        return 2 * self.batch * self.problem.rows * self.seq_len * (HEAD_DIM + LATENT)


class Call:
    """The tensors of one call, with a cache of its own."""

    def __init__(self, cell: Cell, device: torch.device, workspace_nbytes: int) -> None:
        problem = cell.problem
        num_pages = cell.batch * problem.max_pages
        rows = (cell.batch, cell.q_len, cell.num_heads)
        self.query = torch.randn(*rows, HEAD_DIM, device=device).to(problem.q_dtype)
        self.kv_cache = torch.empty(
            num_pages, cell.page_size, HEAD_DIM, dtype=problem.kv_dtype, device=device
        )
        for pages in self.kv_cache.split(4096):  # type: ignore[no-untyped-call]
            pages.copy_(torch.randn(pages.shape, device=device))
        order = torch.randperm(num_pages, device=device, dtype=torch.int32)
        self.block_tables = order.view(cell.batch, problem.max_pages)
        self.seq_lens = torch.full((cell.batch,), cell.seq_len, dtype=torch.int32, device=device)
        self.out = torch.full((*rows, LATENT), math.nan, dtype=problem.out_dtype, device=device)
        self.lse = torch.full(rows, math.nan, device=device)
        self.workspace = torch.empty(max(workspace_nbytes, 1), dtype=torch.uint8, device=device)

    @property
    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What `Plan.run` takes."""
        named = {
            "out": self.out,
            "lse": self.lse,
            "workspace": self.workspace,
            "softmax_scale": HEAD_DIM**-0.5,
        }
        return (self.query, self.kv_cache, self.block_tables, self.seq_lens), named

    @property
    def launch_arguments(self) -> DecodeTensors:
        """What a launcher takes."""
        positional, named = self.arguments
        return DecodeTensors(*positional, cum_seq_lens_q=None, output_scale=1.0, **named)

    def check(self, cell: Cell, what: str) -> None:
        """Hold the results of some requests against float64; every element inside its bound."""
        for request in sorted({0, cell.batch - 1})[:CHECKED_REQUESTS]:
            keys = (
                self.kv_cache[self.block_tables[request].long()].view(-1, HEAD_DIM)[: cell.seq_len].double()
            )
            for token in range(cell.q_len):
                seen = keys[: cell.seq_len - cell.q_len + token + 1]
                scores = self.query[request, token].double() @ seen.T * HEAD_DIM**-0.5
                lse = torch.logsumexp(scores, dim=-1)
                weights = torch.exp(scores - lse.unsqueeze(-1))
                out = weights @ seen[:, :LATENT]
                spread = (weights.square() @ seen[:, :LATENT].square()).sqrt()
                # assert_close_elementwise has one absolute bound: errors are measured in units of each bound.
                bound = ROUNDOFF[self.out.dtype] * out.abs() + FP32_BOUND
                bound += WEIGHT_DEVIATIONS * ROUNDOFF[self.query.dtype] * spread
                error = (self.out[request, token].double() - out) / bound
                name = f"{what} {cell} request {request} token {token}"
                assert_close_elementwise(error, torch.zeros_like(error), 1.0, 0.0, f"{name}: out, in bounds")
                assert_close_elementwise(self.lse[request, token], lse, 2e-5, 0.0, f"{name}: lse")
