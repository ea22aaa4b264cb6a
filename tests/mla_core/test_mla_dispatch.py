"""Workspaces, plan caching and autotuning, with a provider that needs a workspace and has two tactics."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_dispatch import ArgumentError, autotune, clear_tuning, debug, registered
from kernel_testing import Guarded, poisoned
from mla_cases import BF16, Case, assert_decoded, bits
from mla_core import DecodeProblem, decode, plan, workspace_nbytes
from mla_fakes import FakeKernel

GROUP = DecodeProblem.entry_point_group
CASE = Case((30, 0, 70), q_len=2, num_heads=4)
PROBLEM = DecodeProblem(batch=3, q_len=2, num_heads=4, page_size=64, max_seq_len=192, max_pages=3)


@pytest.fixture(autouse=True)
def untuned():
    yield
    clear_tuning()


def decode_case(**options: object) -> torch.Tensor:
    return decode(*CASE.inputs().positional, softmax_scale=CASE.scale, **options)


def test_given_workspace_is_used_whatever_it_holds_and_not_outgrown() -> None:
    with registered(GROUP, FakeKernel(nbytes=1000).provider()):
        assert workspace_nbytes(PROBLEM, "cpu") == 1000
        assert workspace_nbytes(PROBLEM, "cpu", "torch") == 0
        workspace = Guarded((1000,), torch.uint8)
        assert_decoded(decode_case(workspace=workspace.tensor), None, CASE.inputs(), softmax_scale=CASE.scale)
        assert (workspace.tensor == 0xAB).all()
        workspace.check()


def test_a_plan_needs_what_its_own_tactic_needs() -> None:
    kernel = FakeKernel(nbytes=1000, tactic_names=("none", "fast"))
    with registered(GROUP, kernel.provider()):
        assert workspace_nbytes(PROBLEM, "cpu") == 1000
        for tactic, nbytes in (("none", 0), ("fast", 1000)):
            assert plan(PROBLEM, "cpu", tactic=tactic).workspace_nbytes == nbytes
        run_plan(out=poisoned((3, 2, 4, 512), BF16))  # of the first tactic, which needs none
    assert kernel.runs == ["none"]


def run_plan(**options: object) -> None:
    plan(PROBLEM, "cpu").run(*CASE.inputs().positional, softmax_scale=CASE.scale, **options)


@pytest.mark.parametrize("call", [decode_case, run_plan], ids=lambda call: call.__name__)
def test_workspace_too_small_states_both_sizes(call: Callable[..., object]) -> None:
    kernel = FakeKernel(nbytes=1000)
    out = poisoned((3, 2, 4, 512), BF16)
    before = bits(out)
    short = torch.zeros(999, dtype=torch.uint8)
    refused = pytest.raises(ArgumentError, match="workspace: 999 bytes, expected at least 1000")
    with registered(GROUP, kernel.provider()), refused:
        call(workspace=short, out=out)
    assert kernel.runs == []
    assert torch.equal(bits(out), before)


@pytest.mark.parametrize("call", [decode_case, run_plan], ids=lambda call: call.__name__)
def test_a_given_workspace_is_guarded_in_debug_mode(call: Callable[..., object]) -> None:
    out, workspace = poisoned((3, 2, 4, 512), BF16), torch.zeros(1000, dtype=torch.uint8)
    overrun = pytest.raises(RuntimeError, match="workspace of 1000 bytes: 1 bytes were written past its end")
    with registered(GROUP, FakeKernel(nbytes=1000, overrun=1).provider()), debug(), overrun:
        call(workspace=workspace, out=out)
    assert not workspace.any()


def test_workspace_is_allocated_where_none_is_given_and_guarded_in_debug_mode() -> None:
    with registered(GROUP, FakeKernel(nbytes=1000).provider()), debug():
        decode_case()
    overrun = pytest.raises(RuntimeError, match="workspace of 1000 bytes: 1 bytes were written past its end")
    with registered(GROUP, FakeKernel(nbytes=1000, overrun=1).provider()), debug(), overrun:
        decode_case()


def test_a_plan_of_a_named_tactic() -> None:
    kernel = FakeKernel()
    with registered(GROUP, kernel.provider()):
        plans = [plan(PROBLEM, "cpu", tactic=tactic) for tactic in (None, "fast", "slow", "fast")]
        assert [x.tactic for x in plans] == ["slow", "fast", "slow", "fast"]
        assert plans[1] is plans[3]
        out = poisoned((3, 2, 4, 512), BF16)
        plans[1].run(*CASE.inputs().positional, softmax_scale=CASE.scale, out=out)
        assert kernel.runs == ["fast"]
        with pytest.raises(ArgumentError, match="tactic: 'other', expected one of slow, fast"):
            plan(PROBLEM, "cpu", tactic="other")


def test_plan_has_no_workspace_of_its_own() -> None:
    with registered(GROUP, FakeKernel(nbytes=1000).provider()):
        fake_plan = plan(PROBLEM, "cpu")
        assert (fake_plan.provider, fake_plan.tactic, fake_plan.workspace_nbytes) == ("fake", "slow", 1000)
        with pytest.raises(ArgumentError, match="workspace: None, expected a uint8 tensor of 1000 bytes"):
            run_plan(out=torch.empty(3, 2, 4, 512, dtype=BF16))


def test_a_provider_that_comes_or_goes_ends_cached_plans() -> None:
    kernel = FakeKernel()
    decode_case()
    with registered(GROUP, kernel.provider()):
        decode_case()
    decode_case()
    assert kernel.runs == ["slow"]


def test_calls_that_differ_in_anything_do_not_share_a_plan() -> None:
    inputs = CASE.inputs()
    plain = decode_case()
    with pytest.raises(ArgumentError, match="seq_lens: lengths differ"):
        decode_case(is_var_seq=False)
    with pytest.raises(ArgumentError, match="seq_lens"):
        decode_case(max_seq_len=69)
    wide = inputs.query.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ArgumentError, match="query: stride 2 in the last dimension"):
        decode(wide, *inputs.positional[1:], softmax_scale=CASE.scale)
    assert torch.equal(decode_case(), plain)


def test_tuning_picks_the_fastest_and_honours_the_callers_outputs(tmp_path: Path) -> None:
    kernel = FakeKernel(nbytes=64, tactic_names=("slow", "failing", "fast"))
    out, lse = poisoned((3, 2, 4, 512), BF16), poisoned((3, 2, 4), torch.float32)
    options = {"out": out, "lse": lse, "return_lse": True}
    with registered(GROUP, kernel.provider()):
        with (
            autotune(cache=tmp_path / "tune.json", progress=False),
            pytest.warns(RuntimeWarning, match="failing"),
        ):
            returned = decode_case(**options)
        assert returned[0] is out
        assert returned[1] is lse
        assert_decoded(out, lse, CASE.inputs(), softmax_scale=CASE.scale)
        assert {"slow", "fast", "failing"} <= set(kernel.runs)
        chosen = plan(replace(PROBLEM, return_lse=True), "cpu")
        assert (chosen.provider, chosen.tactic) in {("fake", "fast"), ("torch", "chunked")}
        kernel.runs.clear()
        decode_case(**options)
        assert set(kernel.runs) <= {"fast"}


@pytest.mark.parametrize(
    ("max_seq_len", "bucket"), [(1, 1), (100, 128), (192, 256), (256, 256), (257, 512), (100_000, 131_072)]
)
def test_a_bucket_rounds_the_batch_down_and_the_lengths_up(max_seq_len: int, bucket: int) -> None:
    problem = replace(PROBLEM, max_seq_len=max_seq_len, max_pages=3 + max_seq_len // 64)
    expected = replace(PROBLEM, batch=2, max_seq_len=bucket, max_pages=-(-bucket // 64))
    assert problem.bucketed() == expected
    assert expected.bucketed() == expected


def test_a_growing_table_is_tuned_once_per_power_of_two() -> None:
    kernel = FakeKernel(tactic_names=("fast",))
    inputs = CASE.inputs()
    with registered(GROUP, kernel.provider()), autotune(progress=False) as tuner:
        for width in (5, 6, 8, 9):  # 512 keys, and 576
            table = torch.full((3, width), -1, dtype=torch.int32)
            table[:, :2] = inputs.block_tables[:, :2]
            decode(inputs.query, inputs.kv_cache, table, inputs.seq_lens, softmax_scale=CASE.scale)
    assert len(tuner.choices) == 2


def test_tuning_checks_values_before_the_first_write() -> None:
    inputs = CASE.inputs()
    inputs.block_tables[2, 0] = 10_000
    out = poisoned((3, 2, 4, 512), BF16)
    before = bits(out)
    kernel = FakeKernel()
    refused = pytest.raises(ArgumentError, match="block_tables: 10000")
    with registered(GROUP, kernel.provider()), autotune(progress=False), refused:
        decode(*inputs.positional, softmax_scale=CASE.scale, out=out)
    assert kernel.runs == []
    assert torch.equal(bits(out), before)


def test_tuning_keeps_no_choice_that_a_small_workspace_made() -> None:
    kernel = FakeKernel(nbytes=64, tactic_names=("fast",))
    with registered(GROUP, kernel.provider()), autotune(progress=False) as tuner:
        with (
            pytest.warns(RuntimeWarning, match="workspace: 8 bytes, expected at least 64"),
            pytest.raises(ArgumentError, match="workspace: 8 bytes, expected at least 64"),
        ):
            decode_case(workspace=torch.empty(8, dtype=torch.uint8))
        assert kernel.runs == []
        assert not tuner.choices
        assert plan(PROBLEM, "cpu").provider == "fake"  # the heuristic's choice, whatever one call brought
