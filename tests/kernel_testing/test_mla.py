"""Decode calls with known results: right ones pass, wrong elements fail, memory is as the case says."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import UNUSED_INDEX
from kernel_testing.mla import E4M3, HEAD_DIM, LATENT, Case, Inputs

CASES = [
    Case((70, 0, 1, 33), num_heads=3, page_size=16, absent=((0, 1), (3, 0)), gap=8),
    Case((45, 130), "fp16", 2, q_lens=(2, 3)),
    Case((100, 2), "e4m3", 5, 4, 32),
]


def results(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by a loop over keys, in float64, then rounded."""
    case = inputs.case
    out = torch.zeros(inputs.out.shape, dtype=torch.float64)
    lse = torch.full(inputs.lse.shape, -math.inf, dtype=torch.float64)
    counts = case.q_lens or (case.q_len,) * len(case.lengths)
    for request, (length, count) in enumerate(zip(case.lengths, counts, strict=True)):
        for token in range(count):
            at = sum(counts[:request]) + token if case.q_lens else (request, token)
            keys = []
            for position in range(length - count + token + 1):
                page = int(inputs.block_tables[request, position // case.page_size])
                if page >= 0:
                    keys.append(inputs.kv_cache[page, position % case.page_size].double())
            if keys:
                scores = inputs.query[at].double() @ torch.stack(keys).T * case.scale
                lse[at] = scores.exp().sum(-1).log()
                out[at] = torch.softmax(scores, -1) @ torch.stack(keys)[:, :LATENT]
    return out.to(inputs.out.dtype), lse.float()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_results_pass_and_wrong_ones_do_not(case: Case) -> None:
    inputs = Inputs(case)
    out, lse = results(inputs)
    worst = inputs.check(out, lse)
    assert 0.0 < worst <= 1.0
    assert inputs.check(out, None) == worst
    last = (-1,) * out.dim()
    for changed in (out[last] * 2 + 1, math.nan):
        wrong = out.clone()
        wrong[last] = changed
        with pytest.raises(AssertionError, match=r"out, in units of its bound: 1 of"):
            inputs.check(wrong, lse)
    with pytest.raises(AssertionError, match="lse"):
        inputs.check(out, lse + 0.01)
    with pytest.raises(AssertionError, match="out"):
        inputs.check(out, lse, output_scale=2.0)
    with pytest.raises(AssertionError):
        inputs.check(inputs.out, inputs.lse)  # as nobody wrote them


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_must_not_be_read_is_poisoned(case: Case) -> None:
    inputs = Inputs(case)
    assert inputs.out.float().isnan().all()
    assert inputs.lse.isnan().all()
    assert inputs.query.stride(-2) == HEAD_DIM + case.gap
    used = 0
    for request, length in enumerate(case.lengths):
        pages = -(-length // case.page_size)
        row = inputs.block_tables[request].tolist()
        assert all(entry == UNUSED_INDEX for entry in row[pages:-1])
        assert row[-1] < 0
        missing = [column for at, column in case.absent if at == request]
        assert [column for column in range(pages) if row[column] < 0] == missing
        used += sum(
            min(case.page_size, length - column * case.page_size)
            for column in range(pages)
            if column not in missing
        )
    rows_of_keys = ~inputs.kv_cache.float().isnan().any(-1)
    assert int(rows_of_keys.sum()) == used
    assert (inputs.query.dtype is E4M3) == (case.dtype == "e4m3")


def test_a_request_alone_is_what_it_is_in_its_batch() -> None:
    batch = Inputs(Case((70, 0, 33), num_heads=3, q_len=2, page_size=16, gap=8))
    expected = results(batch)
    for request, length in enumerate(batch.case.lengths):
        alone = batch.alone(request)
        assert alone.case.lengths == (length,)
        assert alone.kv_cache is batch.kv_cache
        assert alone.block_tables.shape[1] == max(1, -(-length // 16)) + 1
        out, lse = results(alone)
        alone.check(out, lse)
        assert torch.equal(out[0], expected[0][request])
        assert torch.equal(lse[0], expected[1][request])
        assert alone.out.isnan().all()


def test_inputs_take_over_those_of_another_case() -> None:
    static, other = (
        Inputs(Case(lengths, num_heads=2, seed=seed)) for seed, lengths in ((1, (70, 5)), (2, (9, 0)))
    )
    tensors = static.positional
    expected = results(other)
    static.load(other)
    assert all(x is y for x, y in zip(static.positional, tensors, strict=True))
    static.case = other.case
    for actual, wanted in zip(results(static), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_plan_is_run_with_what_the_case_has() -> None:
    class Plan:
        workspace_nbytes = 7

        def run(self, *positional: torch.Tensor, **options: object) -> None:
            self.given = positional, options

    inputs, plan = Inputs(Case((3, 5), q_lens=(1, 2))), Plan()
    inputs.run(plan, output_scale=2.0)
    positional, options = plan.given
    assert all(x is y for x, y in zip(positional, inputs.positional, strict=True))
    workspace = options.pop("workspace")
    assert workspace.tolist() == [255] * 7
    names = {"out": inputs.out, "lse": inputs.lse, "cum_seq_lens_q": inputs.cum_seq_lens_q}
    assert all(options.pop(name) is tensor for name, tensor in names.items())
    assert options == {"softmax_scale": inputs.case.scale, "output_scale": 2.0}
    own = torch.empty(1, dtype=torch.uint8)
    inputs.run(plan, own)
    assert plan.given[1]["workspace"] is own
