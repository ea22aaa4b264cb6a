"""The kernels on a GPU of SM100, SM103 or SM110 against float64: all paths, CUDA graphs, streams, bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mla_core
import pytest
import torch
from kernel_dispatch import ArgumentError, as_arch, resolve
from kernel_testing.mla import (
    E4M3,
    FP16,
    Case,
    Inputs,
    check_graph_replays,
    check_new_thread,
    check_streams,
)
from mla_core import DecodeProblem
from mla_core.plan import Plan, plan_selection
from mla_sm100.config import PROBABILITY_SHIFT_LOG2
from mla_sm100.kernels import TACTICS
from mla_sm100.provider import ARCHS

E4M3_SMALLEST_WEIGHT = 2.0**-10 / 2.0 ** PROBABILITY_SHIFT_LOG2["e4m3"]  # see emulation.py
pytestmark = pytest.mark.skipif(
    as_arch(None).base not in ARCHS, reason="needs a GPU of SM100, SM103 or SM110"
)

LENGTHS = (0, 1, 127, 128, 129, 700, 8192)
MATRIX = [
    Case(LENGTHS, dtype, num_heads, q_len, page_size)
    for dtype, page_size, num_heads, q_len in itertools.product(
        ("bf16", "fp16", "e4m3"), (16, 32, 64, 128), (1, 16, 64, 96, 128), (1, 2, 4)
    )
]
OTHERS = [
    *(
        Case(tuple((0, 1, 33, 127, 300)[request % 5] for request in range(batch)), dtype, num_heads)
        for dtype, num_heads, batch in itertools.product(("bf16", "e4m3"), (16, 128), (1, 64, 1024))
    ),
    Case((9, 130, 2, 70), q_lens=(2, 1, 4, 0)),
    Case((300,), "e4m3", 128, q_lens=(3,)),
    Case((0, 5, 64, 4000), "fp16", 7, page_size=16, q_lens=(1, 5, 2, 1)),
    Case((300, 130, 64), num_heads=4, q_len=2, absent=((0, 1), (1, 2), (2, 0))),
    Case((300, 5), num_heads=8, q_len=2, gap=64),
]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def plan_of(inputs: Inputs, tactic: str | None = None, **changes: object) -> Plan:
    problem = DecodeProblem(**{**inputs.sizes, **changes})
    selection = resolve(problem, device(), "sm100")
    if tactic is not None:
        selection = replace(selection, tactic=tactic)
    return plan_selection(selection, problem, device())


def check(inputs: Inputs, output_scale: float = 1.0) -> None:
    inputs.check(inputs.out, inputs.lse, output_scale, e4m3_smallest_weight=E4M3_SMALLEST_WEIGHT)


@pytest.mark.parametrize("case", MATRIX + OTHERS, ids=str)
def test_matches_float64(case: Case) -> None:
    inputs = Inputs(case, "cuda")
    inputs.run(plan_of(inputs))
    check(inputs)


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_every_tactic(dtype: str, tactic: str, pdl: bool) -> None:
    inputs = Inputs(Case((500, 0, 3077, 1), dtype, 24, 3), "cuda")
    inputs.run(plan_of(inputs, tactic, enable_pdl=pdl))
    check(inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FP16, E4M3], ids=str)
def test_output_dtypes_and_scales_on_the_device(dtype: str, out_dtype: torch.dtype) -> None:
    inputs = Inputs(Case((300, 31), dtype, 16, 2, out_dtype=out_dtype), "cuda")
    scales = {"softmax_scale": torch.tensor([inputs.case.scale]), "output_scale": torch.tensor(-2.5)}
    mla_core.decode(
        *inputs.positional,
        out=inputs.out,
        lse=inputs.lse,
        return_lse=True,
        backend="sm100",
        **{name: scale.cuda() for name, scale in scales.items()},
    )
    check(inputs, output_scale=-2.5)


def test_a_cache_that_is_not_aligned_is_named() -> None:
    inputs = Inputs(Case((5,)), "cuda")
    inputs.kv_cache = torch.zeros(4, 64, 577, dtype=torch.bfloat16, device="cuda")[..., :576]
    with pytest.raises(ArgumentError, match="kv_cache"):
        inputs.run(plan_of(inputs))


@pytest.mark.parametrize("tactic", ["single-whole", "pair-whole-persistent"])
@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_same_bits_run_to_run_alone_and_in_a_batch(dtype: str, tactic: str) -> None:
    case = Case((1000, 0, 1, 300, 8000) * 4, dtype, 20, 2)
    inputs = Inputs(case, "cuda")
    plan = plan_of(inputs, tactic)
    inputs.run(plan)
    first = inputs.out.clone()
    inputs.run(plan)
    assert torch.equal(inputs.out.view(torch.uint8), first.view(torch.uint8))
    for request in range(len(case.lengths)):
        alone = inputs.alone(request)
        alone.run(plan_of(alone, tactic))
        assert torch.equal(alone.out.view(torch.uint8)[0], first.view(torch.uint8)[request])


def test_graph_replays_with_changed_lengths_and_tables() -> None:
    lengths = ((3000, 0, 67), (5, 2900, 64))
    cases = [Case(given, num_heads=16, q_len=2, seed=seed) for seed, given in enumerate(lengths)]
    check_graph_replays(plan_of, cases)


def test_two_streams_at_once() -> None:
    check_streams(plan_of, [Case((5000, 70, 900), num_heads=16, seed=seed) for seed in (1, 2)])


def test_a_thread_that_has_not_used_cuda_yet() -> None:
    check_new_thread(plan_of, Case((300, 70)))
