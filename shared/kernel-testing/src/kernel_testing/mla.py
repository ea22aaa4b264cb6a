"""MLA decode calls with poisoned memory on any device, their float64 results, and every element's bound.

For a row (token, head) with query q and the keys k it sees, in float64:
    out = output_scale * sum_k w_k c_latent_k,  w = softmax(softmax_scale * q . k)    lse = log sum_k exp(...)
A kernel rounds the weights to the dtype of the values, for the second product, and the output to its own. The
bound of an element is the root of the sum of squares of those roundings, times WEIGHT_DEVIATIONS, and the
output's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .compare import assert_close_elementwise
from .poison import UNUSED_INDEX, poison_, poisoned

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
DTYPES = {"bf16": BF16, "fp16": FP16, "e4m3": E4M3}
LATENT, HEAD_DIM = 512, 576

# Half a unit in the last place of a number in [1, 2): significands have 8, 11 and 4 bits.
ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11, E4M3: 2.0**-4}
SMALLEST = {BF16: 2.0**-134, FP16: 2.0**-25, E4M3: 2.0**-10}  # half the smallest subnormal
LARGEST_E4M3 = 448.0
FP32_BOUND = 2.0**-18  # of sums of float32 products, relative to the largest value
# Weights are rounded to the dtype of the values: independent errors of at most a ROUNDOFF each add up to this
# many times their root of squares at most; ten standard deviations.
WEIGHT_DEVIATIONS = 4.0
E4M3_SMALLEST_WEIGHT = 2.0**-17  # relative to the largest of a row, which is stored as 2^7 at least
LSE_ABSOLUTE, LSE_RELATIVE = 2.0**-17, 2.0**-22  # the first per unit of 1 + |softmax_scale| * HEAD_DIM

PADDING_INDEX = -7  # any negative entry of a block table: its keys are absent
SPARE_PAGES = 3  # of NaN, which nobody's table names


def token_result(
    query: Tensor, keys: Tensor, scale: float, e4m3_smallest_weight: float = E4M3_SMALLEST_WEIGHT
) -> tuple[Tensor, Tensor, Tensor]:
    """What a query token has to become in float64, and how far off it may be before it is rounded.

    query: [num_heads, HEAD_DIM]. keys: [keys, HEAD_DIM] float64, those that it sees. scale: softmax_scale.
    e4m3_smallest_weight: half the smallest weight that the kernel does not take for zero, relative to the
        largest of a row: 2^-10 over the power of two that its largest weight is stored as, at least.

    Returns lse [num_heads], out [num_heads, LATENT], and of each element of `out` the bound of what rounded
    weights and float32 sums add up to.
    """
    scores = scale * query.double() @ keys.T
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    values = keys[:, :LATENT]
    spread = (weights.square() @ values.square()).sqrt()
    bound = WEIGHT_DEVIATIONS * ROUNDOFF[query.dtype] * spread + FP32_BOUND * values.abs().max()
    if query.dtype is E4M3:  # weights too small for e4m3, relative to the largest
        smallest = e4m3_smallest_weight * weights.amax(dim=-1, keepdim=True)
        bound = bound + WEIGHT_DEVIATIONS * smallest * values.square().sum(dim=0).sqrt()
    return lse, weights @ values, bound


def output_rounding(want: Tensor, dtype: torch.dtype) -> Tensor:
    """How far off rounding to the dtype of an output puts each element of `want`, at most."""
    return ROUNDOFF[dtype] * want.abs() + SMALLEST[dtype]


def lse_bound(scale: float) -> float:
    """The absolute part of the bound of an LSE."""
    return LSE_ABSOLUTE * (1.0 + abs(scale) * HEAD_DIM)


@dataclass(frozen=True)
class Case:
    """Lengths of requests, and what they share.

    q_lens: query tokens of each request, which makes the query ragged. absent: (request, column) of pages in
    use whose table entry is negative. gap: elements between rows of query, cache and output, which makes
    them strided.
    """

    lengths: tuple[int, ...]
    dtype: str = "bf16"
    num_heads: int = 16
    q_len: int = 1
    page_size: int = 64
    q_lens: tuple[int, ...] | None = None
    out_dtype: torch.dtype | None = None
    scale: float = HEAD_DIM**-0.5
    seed: int = 0
    absent: tuple[tuple[int, int], ...] = ()
    gap: int = 0

    def __str__(self) -> str:
        q_len = "q" + ".".join(map(str, self.q_lens)) if self.q_lens else f"q{self.q_len}"
        return f"B{len(self.lengths)}-{q_len}-H{self.num_heads}-p{self.page_size}-{self.dtype}"


class Inputs:
    """The tensors of a case. What must not be read holds NaN or UNUSED_INDEX, and outputs start as NaN."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        dtype, page_size = DTYPES[case.dtype], case.page_size
        generator = torch.Generator(device).manual_seed(case.seed)
        pages_of = [-(-length // page_size) for length in case.lengths]
        width = max(*pages_of, 1) + 1  # one column that no request uses
        num_pages = sum(pages_of) + SPARE_PAGES
        order = torch.randperm(num_pages, generator=generator, device=device).int()
        self.kv_cache = self._poisoned((num_pages, page_size, HEAD_DIM), dtype, device)
        self.block_tables = torch.full(
            (len(case.lengths), width), UNUSED_INDEX, dtype=torch.int32, device=device
        )
        self.block_tables[:, -1] = PADDING_INDEX
        used = 0
        for request, length in enumerate(case.lengths):
            pages = order[used : used + pages_of[request]]
            used += len(pages)
            self.block_tables[request, : len(pages)] = pages
            keys = torch.full((len(pages) * page_size, HEAD_DIM), math.nan, device=device)
            keys[:length] = torch.randn(length, HEAD_DIM, generator=generator, device=device)
            self.kv_cache[pages.long()] = keys.view(len(pages), page_size, HEAD_DIM).to(dtype)
        for request, column in case.absent:
            self.kv_cache[int(self.block_tables[request, column])] = math.nan
            self.block_tables[request, column] = PADDING_INDEX
        leading = (sum(case.q_lens),) if case.q_lens else (len(case.lengths), case.q_len)
        query = torch.randn(*leading, case.num_heads, HEAD_DIM, generator=generator, device=device)
        self.query = self._poisoned(query.shape, dtype, device)
        self.query.copy_(query)
        self.seq_lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.cum_seq_lens_q = None
        if case.q_lens:
            offsets = torch.tensor([0, *case.q_lens]).cumsum(0)
            self.cum_seq_lens_q = offsets.to(torch.int32).to(device)
        out_dtype = case.out_dtype or (BF16 if dtype is E4M3 else dtype)
        self.out = self._poisoned((*leading, case.num_heads, LATENT), out_dtype, device)
        self.lse = poisoned((*leading, case.num_heads), torch.float32, device)

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of `mla_core.DecodeProblem` that describe the call."""
        case = self.case
        return {
            "batch": len(case.lengths),
            "q_len": max(case.q_lens) if case.q_lens else case.q_len,
            "num_heads": case.num_heads,
            "page_size": case.page_size,
            "max_seq_len": max(*case.lengths, 1),
            "max_pages": self.block_tables.shape[1],
            "q_dtype": self.query.dtype,
            "out_dtype": self.out.dtype,
            "ragged": case.q_lens is not None,
            "return_lse": True,
        }

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """query, kv_cache, block_tables, seq_lens."""
        return self.query, self.kv_cache, self.block_tables, self.seq_lens

    def run(self, plan: Any, workspace: Tensor | None = None, **options: object) -> None:
        """Run a `mla_core.plan.Plan` of the case; out and lse are written, and the workspace.

        workspace: uint8; None for one of ones alone, which as floats are NaN. options: of `Plan.run`.
        """
        if workspace is None:
            workspace = torch.full((plan.workspace_nbytes,), 255, dtype=torch.uint8, device=self.query.device)
        arguments = {"softmax_scale": self.case.scale, "cum_seq_lens_q": self.cum_seq_lens_q, **options}
        plan.run(*self.positional, out=self.out, lse=self.lse, workspace=workspace, **arguments)

    def alone(self, request: int) -> Inputs:
        """One request of a batch that is not ragged: its query, its pages of the same cache, new outputs."""
        case = self.case
        assert case.q_lens is None
        assert not case.absent
        alone = Inputs(replace(case, lengths=(case.lengths[request],)), str(self.query.device))
        alone.query, alone.kv_cache = self.query[request : request + 1], self.kv_cache
        columns = alone.block_tables.shape[1]
        alone.block_tables = self.block_tables[request : request + 1, :columns].contiguous()
        return alone

    def load(self, other: Inputs) -> None:
        """Copy what a call reads from a case of the same sizes, in place, as for the replay of a graph."""
        self.query.copy_(other.query)
        self.seq_lens.copy_(other.seq_lens)
        self.kv_cache[: len(other.kv_cache)] = other.kv_cache
        columns = min(self.block_tables.shape[1], other.block_tables.shape[1])
        self.block_tables[:, :columns] = other.block_tables[:, :columns]

    def check(
        self,
        out: Tensor,
        lse: Tensor | None,
        output_scale: float = 1.0,
        *,
        e4m3_smallest_weight: float = E4M3_SMALLEST_WEIGHT,
    ) -> float:
        """Hold results against float64; every element lies inside its own bound.

        Returns the largest error of `out`, in units of its element's bound.
        e4m3_smallest_weight: as in `token_result`.
        """
        case = self.case
        want = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
        bound = torch.zeros_like(want)
        want_lse = torch.full(out.shape[:-1], -math.inf, dtype=torch.float64, device=out.device)
        for request, length in enumerate(case.lengths):
            first, last = self._tokens(request)
            keys, present = self._keys(request, length)
            for token in range(first, last):
                at = token if case.q_lens else (request, token)
                seen = keys[present & (torch.arange(length, device=out.device) < length - (last - token) + 1)]
                if len(seen):
                    want_lse[at], want[at], bound[at] = token_result(
                        self.query[at], seen, case.scale, e4m3_smallest_weight
                    )
        want, bound = want * output_scale, bound * abs(output_scale)
        if out.dtype is E4M3:
            want = want.clamp(-LARGEST_E4M3, LARGEST_E4M3)
        bound = bound + output_rounding(want, out.dtype)
        error = (out.double() - want) / bound
        what = f"{case}: out, in units of its bound"
        assert_close_elementwise(error, torch.zeros_like(error), 1.0, 0.0, what)
        assert (out.float()[want_lse == -math.inf] == 0).all(), f"{case}: rows that see no key"
        if lse is not None:
            assert_close_elementwise(lse, want_lse, lse_bound(case.scale), LSE_RELATIVE, f"{case}: lse")
        return float(error.abs().max()) if error.numel() else 0.0

    def _poisoned(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: str) -> Tensor:
        """NaN; its rows lie `gap` elements apart, which hold NaN too."""
        whole = poisoned((*shape[:-1], shape[-1] + self.case.gap), dtype, device)
        return whole[..., : shape[-1]]

    def _tokens(self, request: int) -> tuple[int, int]:
        if not self.case.q_lens:
            return 0, self.case.q_len
        first = sum(self.case.q_lens[:request])
        return first, first + self.case.q_lens[request]

    def _keys(self, request: int, length: int) -> tuple[Tensor, Tensor]:
        """The keys of a request [length, HEAD_DIM], and which of them are there [length]."""
        page_size = self.case.page_size
        pages = self.block_tables[request, : -(-length // page_size)].long()
        content = self.kv_cache.contiguous().view(torch.uint8)[pages.clamp_min(0)].view(self.kv_cache.dtype)
        present = (pages >= 0).repeat_interleave(page_size)
        return content.view(-1, HEAD_DIM)[:length].double(), present[:length]


MakePlan = Callable[[Inputs], Any]  # a `mla_core.plan.Plan` for the GPU


def check_graph_replays(make_plan: MakePlan, cases: Sequence[Case]) -> None:
    """Hold replays of one CUDA graph, with the contents of each case in turn, against float64."""
    static, *others = (Inputs(case, "cuda") for case in cases)
    plan = make_plan(static)
    workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device="cuda")
    static.run(plan, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.run(plan, workspace)
    for inputs in (static, *others):
        static.load(inputs)
        poison_(static.out)
        poison_(static.lse)
        graph.replay()
        inputs.check(static.out, static.lse)


def check_streams(make_plan: MakePlan, cases: Sequence[Case]) -> None:
    """Hold one plan, launched 20 times for each case in a stream of its own, against float64 and itself."""
    pairs = [(Inputs(case, "cuda"), torch.cuda.Stream()) for case in cases]  # type: ignore[no-untyped-call]
    plan = make_plan(pairs[0][0])
    torch.cuda.synchronize()
    rounds = []
    for _ in range(20):
        for inputs, stream in pairs:
            with torch.cuda.stream(stream):
                poison_(inputs.out)
                poison_(inputs.lse)
                inputs.run(plan)
                rounds.append((inputs, inputs.out.clone(), inputs.lse.clone()))
    torch.cuda.synchronize()
    for inputs, _ in pairs:
        inputs.check(inputs.out, inputs.lse)
    for inputs, out, lse in rounds:
        assert torch.equal(out, inputs.out)
        assert torch.equal(lse, inputs.lse)


def check_new_thread(make_plan: MakePlan, case: Case) -> None:
    """Hold a launch by a thread that has not used CUDA yet against float64."""
    inputs = Inputs(case, "cuda")
    plan = make_plan(inputs)
    workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(inputs.run, plan, workspace).result()
    torch.cuda.synchronize()
    inputs.check(inputs.out, inputs.lse)
