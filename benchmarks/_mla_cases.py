"""Inputs of an MLA decode call, its float64 result with its bound, and what it must move and compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from kernel_testing import assert_close_elementwise
from kernel_testing.mla import HEAD_DIM, LATENT, LSE_RELATIVE, lse_bound, output_rounding, token_result
from mla_core import DecodeProblem
from mla_core.specs import DecodeTensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


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
        scale = HEAD_DIM**-0.5
        for request in sorted({0, cell.batch - 1}):
            pages = self.kv_cache[self.block_tables[request].long()]
            keys = pages.view(-1, HEAD_DIM)[: cell.seq_len].double()
            for token in range(cell.q_len):
                seen = keys[: cell.seq_len - cell.q_len + token + 1]
                lse, out, bound = token_result(self.query[request, token], seen, scale)
                bound = bound + output_rounding(out, self.out.dtype)
                # assert_close_elementwise has one absolute bound: errors are measured in units of each bound.
                error = (self.out[request, token].double() - out) / bound
                name = f"{what} {cell} request {request} token {token}"
                assert_close_elementwise(error, torch.zeros_like(error), 1.0, 0.0, f"{name}: out, in bounds")
                lse_error = (lse_bound(scale), LSE_RELATIVE)
                assert_close_elementwise(self.lse[request, token], lse, *lse_error, f"{name}: lse")
