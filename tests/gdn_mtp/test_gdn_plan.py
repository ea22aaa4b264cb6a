"""Problems, plans, the plan cache, providers and tuning."""

import subprocess
import sys
from functools import partial

import gdn_mtp
import pytest
import torch
from gdn_mtp.ops import trace_call
from gdn_mtp.torch_kernel import KERNEL, launch, requests_per_chunk
from gdn_support import BF16, DEVICE, FP32, Case, assert_same_bits, slots_tensor
from kernel_dispatch import (
    Arch,
    ArgumentError,
    NoKernelError,
    Provider,
    autotune,
    clear_tuning,
    debug,
    explain,
    registered,
)
from kernel_testing import poisoned, snapshot_untouched

GROUP = gdn_mtp.GatedDeltaRuleProblem.entry_point_group
CASE = Case(B=3, T=2, K=32, V=16)


def problem(case=CASE, **changes):
    fields = {
        **{name: getattr(case, name) for name in ("B", "T", "H", "HV", "K", "V")},
        "io_dtype": case.io,
        "gate_dtype": case.gates,
        "dt_bias_dtype": case.bias,
        "out_dtype": case.io,
        "state_dtype": case.state,
        "state_layout": "vk",
        "use_qk_l2norm": True,
        "update_state": True,
        "intermediate": "none",
        "index_dtype": torch.int64,
        "separate_write_indices": False,
    }
    return gdn_mtp.GatedDeltaRuleProblem(**{**fields, **changes})


class SpyKernel:
    """Runs the PyTorch kernel and counts what is asked of it; `failing` is a tactic that raises."""

    def __init__(self, *tactics, failing=None, workspace=0):
        self.names, self.failing, self.prepared, self.launched = tactics, failing, [], []
        self.workspace = workspace

    def workspace_nbytes(self, problem, arch, tactic=None):
        return self.workspace

    def tactics(self, problem, arch):
        return self.names

    def prepare(self, problem, arch, device, tactic):
        self.prepared.append(tactic)
        return partial(self.run, problem, tactic)

    def run(self, problem, tactic, *tensors):
        self.launched.append(tactic)
        launch(problem, *tensors)
        if tactic == self.failing:
            raise RuntimeError("no such instruction")


def spy_provider(kernel, priority=5):
    return Provider("spy", ("any",), lambda problem, arch: None, lambda: kernel, priority)


def mtp(pool, indices, **options):
    return gdn_mtp.gated_delta_rule_mtp(
        **CASE.inputs(),
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=False,
        **options,
    )[0]


@pytest.mark.parametrize(
    ("batch", "bucket"), [(1, 1), (3, 2), (64, 64), (100, 64), (2048, 2048), (9000, 2048)]
)
def test_buckets(batch, bucket):
    assert problem(B=batch).bucketed() == problem(B=bucket)


def test_description_tells_problems_apart():
    changes = [
        {},
        {"B": 4},
        {"io_dtype": FP32},
        {"gate_dtype": FP32},
        {"dt_bias_dtype": BF16},
        {"out_dtype": FP32},
        {"state_dtype": BF16},
        {"state_layout": "kv"},
        {"use_qk_l2norm": False},
        {"update_state": False},
        {"intermediate": "buffer"},
        {"intermediate": "scatter"},
        {"index_dtype": None},
        {"index_dtype": torch.int32},
        {"separate_write_indices": True},
    ]
    assert len({problem(**change).describe() for change in changes}) == len(changes)


def test_sizes_alone_make_a_problem():
    sizes = {"B": 3, "T": 2, "H": 2, "HV": 4, "K": 64, "V": 64}
    plain = gdn_mtp.GatedDeltaRuleProblem(**sizes)
    assert plain == problem(Case(**sizes), index_dtype=None)
    half = gdn_mtp.GatedDeltaRuleProblem(**sizes, io_dtype=torch.float16)
    assert (half.gate_dtype, half.out_dtype) == (torch.float16, torch.float16)
    mixed = gdn_mtp.GatedDeltaRuleProblem(**sizes, gate_dtype=FP32, out_dtype=FP32)
    assert (mixed.io_dtype, mixed.gate_dtype, mixed.out_dtype) == (BF16, FP32, FP32)


def test_defaults_are_what_a_plain_call_poses():
    """Problem and call agree: the plan of a plain problem takes the tensors of a plain call."""
    case = Case()
    plan = gdn_mtp.plan(gdn_mtp.GatedDeltaRuleProblem(B=3, T=2, H=2, HV=4, K=64, V=64), "cpu")
    inputs = {name: tensor.cpu() for name, tensor in case.inputs().items()}
    state, other = case.states(3).cpu(), case.states(3).cpu()
    output = torch.empty_like(inputs["v"])
    plan.run(**inputs, state=state, output=output)
    expected, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=other)
    assert_same_bits(output, expected, "output")
    assert_same_bits(state, other, "state")


def test_a_tactic_that_there_is_not_is_named_with_those_that_there_are():
    speculative = gdn_mtp.SpeculativeProblem(B=1, T=2, H=2, HV=4, K=64, V=64, capacity=8)
    for asked in (problem(), speculative):
        named = gdn_mtp.plan(asked, "cpu", tactic=gdn_mtp.plan(asked, "cpu").tactic)
        assert named.reason.endswith("tactic named")
        with pytest.raises(ArgumentError, match=r"tactic: 'w4t1s', expected one of .* provider 'torch'"):
            gdn_mtp.plan(asked, "cpu", tactic="w4t1s")


@pytest.mark.parametrize("arch", ["cpu", "sm_90a", "sm_100a", "sm_121a"])
def test_explain_answers_for_any_arch(arch):
    explanation = explain(problem(), arch)
    assert explanation.chosen is not None
    assert "torch" in {row.name for row in explanation.rows}
    assert explain(problem(), arch, backend="torch").chosen == "torch"


def test_a_plan_runs_what_the_function_runs():
    plan = gdn_mtp.plan(problem(), DEVICE)
    indices, pool, other = slots_tensor(4, -1, 0), CASE.states(6), CASE.states(6)
    output = poisoned((CASE.B, CASE.T, CASE.HV, CASE.V), BF16, DEVICE)
    plan.run(**CASE.inputs(), state=pool, initial_state_indices=indices, output=output)
    assert_same_bits(output, mtp(other, indices), "output")
    assert_same_bits(pool, other, "pool")
    assert plan.provider in repr(plan)


def test_a_plan_for_states_of_the_requests_takes_no_indices():
    plan = gdn_mtp.plan(problem(index_dtype=None), "cpu")
    inputs = {name: tensor.cpu() for name, tensor in CASE.inputs().items()}
    state, indices = CASE.states(3).cpu(), torch.tensor([2, 1, 0])
    with pytest.raises(ArgumentError, match="initial_state_indices: dtype int64, expected no index tensors"):
        plan.run(**inputs, state=state, initial_state_indices=indices, output=torch.empty_like(inputs["v"]))
    assert_same_bits(state, CASE.states(3).cpu(), "state")


def test_the_second_call_of_a_kind_reuses_the_plan():
    kernel = SpyKernel("only")
    with registered(GROUP, spy_provider(kernel)):
        for batch_of_slots in ((4, -1, 0), (1, 2, 3)):
            mtp(CASE.states(6), slots_tensor(*batch_of_slots), backend="spy")
        mtp(CASE.states(6), slots_tensor(1, 2, 3), backend="spy", scale=2.0)
        assert kernel.prepared == ["only"]
        mtp(CASE.states(7), slots_tensor(1, 2, 3), backend="spy", use_qk_l2norm=False)
        mtp(CASE.states(12)[::2], slots_tensor(1, 2, 3), backend="spy")
    assert kernel.prepared == ["only"] * 3
    assert len(kernel.launched) == 5


def test_what_autograd_tracks_goes_through_the_operation_every_time(monkeypatch):
    traced = []
    monkeypatch.setattr(
        gdn_mtp.api, "trace_call", lambda *call: traced.append(torch.is_grad_enabled()) or trace_call(*call)
    )
    inputs = CASE.inputs()
    inputs["A_log"].requires_grad_()
    call = partial(gdn_mtp.gated_delta_rule_mtp, **inputs, disable_state_update=False)
    for _ in range(3):
        call(initial_state=CASE.states(6), initial_state_indices=slots_tensor(4, -1, 0))
        with torch.no_grad():
            call(initial_state=CASE.states(6), initial_state_indices=slots_tensor(4, -1, 0))
    assert traced == [True] * 3


def test_a_strict_backend_never_falls_back():
    declining = Provider("spy", ("any",), lambda problem, arch: "not today", lambda: KERNEL, 5)
    pool = CASE.states(4)
    unchanged = snapshot_untouched(pool, [])
    with registered(GROUP, declining), pytest.raises(NoKernelError, match="not today"):
        mtp(pool, slots_tensor(1, 2, 3), backend="spy")
    unchanged()


def test_a_provider_that_asks_for_a_workspace_is_refused_before_the_launch():
    kernel = SpyKernel("only", workspace=512)
    pool = CASE.states(6)
    unchanged = snapshot_untouched(pool, [])
    with registered(GROUP, spy_provider(kernel)):
        with pytest.raises(NoKernelError, match="'spy' asks for 512 bytes of workspace"):
            gdn_mtp.plan(problem(), DEVICE)
        with pytest.raises(NoKernelError, match="'spy' asks for 512 bytes of workspace"):
            mtp(pool, slots_tensor(4, -1, 0))
    assert kernel.prepared == []
    unchanged()


@pytest.mark.parametrize("mode", ["pool", "scatter", "write", "state"])
def test_tuning_leaves_the_effect_of_one_call(mode):
    case = CASE
    kernel = SpyKernel("first", "second")
    options = {
        "pool": {},
        "state": {},
        "scatter": {"ssm_state_indices": torch.tensor([[4, 1], [99, 99], [-1, 0]], device=DEVICE)},
        "write": {"output_state_indices": slots_tensor(3, 5, -1)},
    }[mode]

    def run(pool):
        if mode == "state":
            return gdn_mtp.gated_delta_rule_decode_pretranspose(**case.inputs(), state=pool[:3])[0]
        return mtp(pool, slots_tensor(4, -1, 0), **options)

    expected_pool, pool = case.states(6), case.states(6)
    expected = run(expected_pool)
    clear_tuning()
    try:
        with registered(GROUP, spy_provider(kernel)), autotune(progress=False):
            output = run(pool)
        assert set(kernel.launched) == {"first", "second"}
    finally:
        clear_tuning()
    assert_same_bits(output, expected, "output")
    assert_same_bits(pool, expected_pool, "pool")


def test_a_candidate_that_fails_while_tuning_is_left_out():
    kernel = SpyKernel("broken", failing="broken")
    pool, expected_pool = CASE.states(6), CASE.states(6)
    expected = mtp(expected_pool, slots_tensor(4, -1, 0))
    clear_tuning()
    try:
        with (
            registered(GROUP, spy_provider(kernel)),
            autotune(progress=False),
            pytest.warns(RuntimeWarning, match="no such instruction"),
        ):
            output = mtp(pool, slots_tensor(4, -1, 0))
    finally:
        clear_tuning()
    assert_same_bits(output, expected, "output")
    assert_same_bits(pool, expected_pool, "pool")


def test_debug_mode_runs_the_same():
    pool, other = CASE.states(6), CASE.states(6)
    with debug():
        output = mtp(pool, slots_tensor(4, -1, 0))
    assert_same_bits(output, mtp(other, slots_tensor(4, -1, 0)), "output")
    assert_same_bits(pool, other, "pool")


def test_temporaries_are_bounded():
    big = problem(B=256, T=4, H=16, HV=32, K=128, V=128)
    assert requests_per_chunk(big) == 14  # 32 MiB for 2 MiB of state and 192 KiB of tokens each
    assert requests_per_chunk(problem(H=64, HV=1024, K=256, V=256)) == 1
    assert KERNEL.workspace_nbytes(big, Arch.from_name("cpu")) == 0


def test_import_touches_neither_cuda_nor_a_kernel_language():
    code = """
import sys, torch, gdn_mtp
assert not torch.cuda.is_initialized()
assert not {"cutlass", "triton"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
