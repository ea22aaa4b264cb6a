"""The provider `trtllm-gen` on a GPU of compute capability 10.0 or 10.3 with FlashInfer, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_dispatch import explain
from kernel_testing import assert_close_elementwise, poisoned
from mla_core import DecodeProblem, decode, plan
from trtllm_gen_cases import BF16, CASES, E4M3, SCALE, Case, reference

PROBLEM = DecodeProblem(batch=2, num_heads=16, page_size=64, max_seq_len=4096)
REASON = explain(PROBLEM, backend="trtllm-gen").reason
pytestmark = pytest.mark.skipif("asked for" not in REASON, reason=REASON)

# Weights are rounded to the dtype of the values, by half a unit in the last place: such errors add up
# to four times the root of the sum of squares of weight times value at most, ten standard deviations.
WEIGHT_ROUNDOFF = {BF16: 4 * 2.0**-8, E4M3: 4 * 2.0**-4}
OUT_ROUNDOFF = 2 * 2.0**-8  # partial outputs are rounded to bf16, and so is the output
LSE_BOUND = 2.0**-12


def on_gpu(case: Case) -> dict[str, Any]:
    """Arguments of `decode`. Zeros, not NaN, follow the end of a sequence: its page is read whole."""
    arguments = case.inputs()
    arguments["kv_cache"] = arguments["kv_cache"].float().nan_to_num(0.0).to(case.dtype)
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }


def root_of_squares(arguments: dict[str, Any], softmax_scale: float) -> torch.Tensor:
    """The root of the sum of squares of weight times value, shaped as the output.

    A weight squared is a weight at twice the scale, times exp(lse(2 s) - 2 lse(s)). The squares of the values
    go before the keys, where the query has zeros.
    """
    cache, query = arguments["kv_cache"].cpu().double(), arguments["query"].cpu().double()
    latent = arguments["kv_lora_rank"]
    squares = {
        "kv_cache": torch.cat((cache[..., :latent] ** 2, cache), dim=-1),
        "query": torch.nn.functional.pad(query, (latent, 0)),
    }
    _, lse = reference(arguments, softmax_scale=softmax_scale)
    mean, doubled = reference(arguments | squares, softmax_scale=2 * softmax_scale)
    return (mean * torch.exp(doubled - 2 * lse).nan_to_num(0.0).unsqueeze(-1)).sqrt()


def assert_right(
    out: torch.Tensor, arguments: dict[str, Any], softmax_scale: float, output_scale: float
) -> None:
    want, _ = reference(arguments, softmax_scale=softmax_scale, output_scale=output_scale)
    weights = WEIGHT_ROUNDOFF[arguments["query"].dtype] * root_of_squares(arguments, softmax_scale)
    bound = abs(output_scale) * weights + OUT_ROUNDOFF * want.abs() + torch.finfo(BF16).tiny
    in_bounds = (out.cpu().double() - want) / bound
    assert_close_elementwise(in_bounds, torch.zeros_like(want), 1.0, 0.0, "out, in units of its bound")


def run(arguments: dict[str, Any], **options: Any) -> Any:
    inputs = dict(arguments)
    tensors = [inputs.pop(name) for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    return decode(*tensors, backend="trtllm-gen", **inputs, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_oracle(case: Case) -> None:
    arguments = on_gpu(case)
    scales = {"softmax_scale": 1.3 * SCALE, "output_scale": -0.7}
    out = poisoned((*arguments["query"].shape[:-1], case.latent), BF16).cuda()
    if case.q_lens:
        run(arguments, out=out, **scales)
    else:
        _, lse = run(arguments, out=out, return_lse=True, **scales)
        _, want = reference(arguments, **scales)
        assert_close_elementwise(lse, want, LSE_BOUND, 2.0**-16, "lse")
    assert_right(out, arguments, **scales)


def test_device_scales_are_read_at_replay_of_a_graph() -> None:
    arguments = on_gpu(Case((70, 3000), dtype=E4M3))
    problem = DecodeProblem(
        batch=2,
        num_heads=16,
        page_size=64,
        max_seq_len=arguments["block_tables"].shape[1] * 64,
        q_dtype=E4M3,
        softmax_scale_is_tensor=True,
        output_scale_is_tensor=True,
    )
    planned = plan(problem, "cuda", "trtllm-gen")
    scales = {"softmax_scale": torch.ones(1).cuda(), "output_scale": torch.ones(1).cuda()}
    out = torch.empty(2, 1, 16, 512, dtype=BF16, device="cuda")
    inputs = [arguments[name] for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    workspace = torch.empty(planned.workspace_nbytes, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned.run(*inputs, **scales, out=out, workspace=workspace)
    for softmax_scale, output_scale in ((SCALE, 1.0), (0.5 * SCALE, -2.0)):
        scales["softmax_scale"].fill_(softmax_scale)
        scales["output_scale"].fill_(output_scale)
        out.fill_(torch.nan)
        graph.replay()
        assert_right(out, arguments, softmax_scale=softmax_scale, output_scale=output_scale)
