"""Problems, plans, the plan cache, providers and tuning of the speculative functions."""

import random
from dataclasses import replace

import gdn_mtp
import pytest
import torch
from gdn_mtp.speculative.torch_kernel import KERNEL, requests_per_chunk
from gdn_support import BF16, DEVICE, FP16, FP32, NAN, assert_same_bits
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
from speculative_support import History, Setup, arguments, index_tensor, int32, random_tree

GROUP = gdn_mtp.SpeculativeProblem.entry_point_group
SETUP = Setup()


def problem(**changes):
    fields = {"B": 3, "T": 4, "H": 2, "HV": 4, "K": 16, "V": 8, "capacity": 16}
    return gdn_mtp.SpeculativeProblem(**{**fields, **changes})


def test_description_tells_problems_apart():
    changes = [
        {},
        {"B": 4},
        {"T": 2},
        {"capacity": 24},
        {"mode": "commit", "T": 0},
        {"mode": "materialize", "T": 0},
        {"accept": "none"},
        {"accept": "nodes"},
        {"io_dtype": FP32},
        {"gate_dtype": FP32},
        {"dt_bias_dtype": BF16},
        {"out_dtype": FP32},
        {"state_dtype": BF16},
        {"index_dtype": torch.int64},
        {"use_qk_l2norm": False},
        {"variable_tokens": True},
        {"tree": True},
        {"tensor_scale": True},
        {"debug": True},
        {"state_rows": "any"},
    ]
    assert len({problem(**change).describe() for change in changes}) == len(changes)


def test_buckets():
    assert problem(B=100).bucketed() == problem(B=64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("B", 0),
        ("T", 9),
        ("H", 3),
        ("HV", 2**24),  # 2^31 elements of updates in a slot and more
        ("capacity", 33),
        ("mode", "peek"),
        ("accept", "all"),
        ("tree", 1),
        ("io_dtype", torch.int8),
        ("state_dtype", FP16),
    ],
)
def test_impossible_problems_name_the_field(field, value):
    with pytest.raises(ValueError) as raised:
        problem(**{field: value})
    assert raised.value.argument in (field, "HV")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"K": 64, "V": 64, "T": 16, "capacity": 32, "tree": True, "state_dtype": BF16}, None),
        ({"mode": "commit", "T": 0}, None),
        ({"K": 256}, "K = 256, the kernels have 64, 128"),
        ({"V": 32}, "V = 32, the kernels have 64, 128"),
        ({"B": 70_000}, "at most 65535"),
        ({"state_rows": "any"}, "not 16-byte aligned"),
    ],
)
def test_cute_takes_what_its_kernels_do(changes, reason):
    asked = problem(**{"K": 128, "V": 128, **changes})
    rows = {row.name: row for row in explain(asked, "sm_90a").rows}
    if reason is None:
        assert rows["cute"].status == "chosen"
    else:
        assert (rows["cute"].status, rows["torch"].status) == ("declined", "chosen")
        assert reason in rows["cute"].reason


@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_90a", "sm_100a", "sm_121a"])
def test_explain_answers_for_any_arch(arch):
    explanation = explain(problem(), arch)
    assert {row.name for row in explanation.rows} >= {"torch", "cute"}
    assert explain(problem(), arch, backend="torch").chosen == "torch"
    if arch in ("cpu", "sm_80"):
        assert explanation.chosen == "torch"


def test_the_second_call_of_a_kind_reuses_the_plan():
    prepared, launched = [], []

    class Spy:
        workspace_nbytes, tactics = KERNEL.workspace_nbytes, KERNEL.tactics

        def prepare(self, problem, arch, device, tactic):
            prepared.append(problem)
            launch = KERNEL.prepare(problem, arch, device, tactic)
            return lambda *tensors: (launched.append(problem.mode), launch(*tensors))

    provider = Provider("spy", ("any",), lambda problem, arch: None, Spy, 50)
    history = History(SETUP)
    with registered(GROUP, provider):
        for step in range(3):
            accepted = int32([step, 0])
            gdn_mtp.verify(*arguments(history, [4, 1], 4, seed=step), accepted)
        gdn_mtp.commit(history.pool, index_tensor([4, 1]), history.cache, accepted)
        assert [problem.mode for problem in prepared] == ["verify", "commit"]
        gdn_mtp.verify(*arguments(history, [4, 1], 3), None)
        gdn_mtp.verify(*arguments(history, [4, 1], 3), None, use_qk_l2norm=False)
        with debug():
            gdn_mtp.verify(*arguments(history, [4, 1], 3), None)
    assert len(prepared) == 5
    assert prepared[-1].debug
    assert launched == ["verify"] * 3 + ["commit"] + ["verify"] * 3


def test_a_strict_backend_never_falls_back():
    declining = Provider("spy", ("any",), lambda problem, arch: "not today", lambda: KERNEL, 5)
    history = History(SETUP)
    everything = history.snapshot([])
    with registered(GROUP, declining), pytest.raises(NoKernelError, match="not today"):
        gdn_mtp.verify(*arguments(history, [1], 2), None, backend="spy")
    everything()


def test_a_provider_that_asks_for_a_workspace_is_refused():
    class Greedy:
        tactics, prepare = KERNEL.tactics, KERNEL.prepare

        def workspace_nbytes(self, problem, arch, tactic=None):
            return 512

    provider = Provider("greedy", ("any",), lambda problem, arch: None, Greedy, 50)
    with registered(GROUP, provider), pytest.raises(NoKernelError, match="'greedy' asks for 512 bytes"):
        gdn_mtp.verify(*arguments(History(SETUP), [1], 2), None)


@pytest.mark.parametrize("inference", [False, True])
def test_tuning_leaves_the_effect_of_one_call(inference):
    class Two:
        workspace_nbytes, prepare = KERNEL.workspace_nbytes, KERNEL.prepare

        def tactics(self, problem, arch):
            return ("first", "second")

    def run():
        history = History(SETUP)
        with torch.inference_mode(inference):  # memory made there is written outside
            history.pool, history.cache = history.pool.clone(), SETUP.cache()
        gdn_mtp.verify(*arguments(history, [4, -1, 0], 4), None)
        acceptance = int32([3, 0, 1])
        output = gdn_mtp.verify(*arguments(history, [4, -1, 0], 4), acceptance, fold="always")
        return output, history.pool, history.cache.state_dict()

    expected = run()
    clear_tuning()
    try:
        provider = Provider("two", ("any",), lambda problem, arch: None, Two, 50)
        with registered(GROUP, provider), autotune(progress=False):
            results = run()
    finally:
        clear_tuning()
    assert_same_bits(results[0], expected[0], "output")
    assert_same_bits(results[1], expected[1], "pool")
    for name, tensor in results[2].items():
        assert_same_bits(tensor, expected[2][name], name)


def test_temporaries_are_bounded():
    big = gdn_mtp.SpeculativeProblem(B=256, T=8, H=16, HV=32, K=128, V=128, capacity=24)
    assert requests_per_chunk(big) == 7  # 32 MiB for two states of 2 MiB and 576 KiB of tokens each
    assert KERNEL.workspace_nbytes(big, Arch.from_name("cpu")) == 0


def test_requests_in_chunks_of_one(monkeypatch):
    monkeypatch.setattr("gdn_mtp.speculative.torch_kernel.CHUNK_BYTES", 1)
    history = History(SETUP, backend="torch")
    for step in range(6):
        accepted = {"num_accepted": int32([4, 0, 3] if step else [0] * 3)}
        trees = [random_tree(4, random.Random(step))] * 3 if step == 5 else None
        history.verify([5, -1, 2], 4, step, accepted, parents=trees)
    history.commit([5, -1, 2], {"accepted_nodes": int32([[0], [-1], [0]])})


TOKEN_FIELDS = {
    "T": 4,
    "gate_dtype": FP32,
    "dt_bias_dtype": BF16,
    "out_dtype": FP32,
    "use_qk_l2norm": False,
    "variable_tokens": True,
    "tree": True,
    "tensor_scale": True,
}


@pytest.mark.parametrize("mode", ["commit", "materialize"])
@pytest.mark.parametrize("field", TOKEN_FIELDS)
def test_modes_without_tokens_have_no_fields_of_tokens(mode, field):
    with pytest.raises(ArgumentError, match=f"{mode} takes no tokens") as raised:
        problem(**{"mode": mode, "T": 0, field: TOKEN_FIELDS[field]})
    assert raised.value.argument == field


def test_the_problem_of_a_commit_from_that_of_a_verify():
    verify = problem(io_dtype=FP16)
    assert replace(verify, mode="commit", T=0) == problem(io_dtype=FP16, mode="commit", T=0)


RUNS = {
    "chain": ({}, {}),
    "bf16 states, float32 output, no norm": ({"state": BF16, "l2norm": False}, {"out_dtype": FP32}),
    "everything given": ({"io": FP16, "scale": 0.3}, {"variable_tokens": True, "tree": True}),
}


def planned_step(history, slots, step, plans, window):
    """What a plan of each mode makes of a step: the output, states before the commit, the pool after it."""
    setup = history.setup
    verify, commit, materialize = plans
    accepted = int32([1 if step else 0] * len(slots))
    inputs = arguments(history, slots, 4, seed=step)
    output = torch.full_like(inputs[2], NAN, dtype=verify.problem.out_dtype)
    states = torch.full((len(slots), *history.pool.shape[1:]), NAN, dtype=setup.state, device=DEVICE)
    verify.run(*inputs, accepted, **window, scale=setup.scale, output=output)
    materialize.run(*inputs[7:], accepted, states=states)
    if step == 3:
        commit.run(*inputs[7:], accepted)
    return output, states, history.pool.clone()


def called_step(history, slots, step, out, window):
    """`planned_step` by functions."""
    accepted = int32([1 if step else 0] * len(slots))
    inputs = arguments(history, slots, 4, seed=step)
    output = torch.full_like(inputs[2], NAN, dtype=out)
    gdn_mtp.verify(*inputs, accepted, **window, **history.setup.options, output=output)
    states = gdn_mtp.materialize(*inputs[7:], accepted)
    if step == 3:
        gdn_mtp.commit(*inputs[7:], accepted)
    return output, states, history.pool.clone()


def plans_of(setup, batch, fields):
    """A plan of each mode."""
    sizes = {"B": batch, "H": setup.H, "HV": setup.HV, "K": setup.K, "V": setup.V, "capacity": 16}
    dtypes = {"io_dtype": setup.io, "state_dtype": setup.state}
    verify = problem(**sizes, **dtypes, T=4, use_qk_l2norm=setup.l2norm, **fields)
    others = (problem(**sizes, **dtypes, T=0, mode=mode) for mode in ("commit", "materialize"))
    return [gdn_mtp.plan(each, DEVICE) for each in (verify, *others)]


@pytest.mark.parametrize("case", RUNS)
def test_plans_run_what_the_functions_run(case):
    changes, fields = RUNS[case]
    setup, slots = Setup(**changes), [4, -1, 0]
    plans = plans_of(setup, len(slots), fields)
    assert [type(plan) for plan in plans] == [
        gdn_mtp.VerifyPlan,
        gdn_mtp.CommitPlan,
        gdn_mtp.MaterializePlan,
    ]
    planned, called = History(setup), History(setup)
    for step in range(4):
        window = {}
        if fields.get("tree"):
            window["parent_indices"] = int32([random_tree(4, random.Random(step))] * 3)
        if fields.get("variable_tokens"):
            window["num_tokens"] = int32([3, 0, 4])
        ours = planned_step(planned, slots, step, plans, window)
        theirs = called_step(called, slots, step, plans[0].problem.out_dtype, window)
        for what, x, y in zip(("output", "states", "pool"), ours, theirs, strict=True):
            assert_same_bits(x, y, f"{what} of step {step}")
    for name, tensor in planned.cache.state_dict().items():
        assert_same_bits(tensor, called.cache.state_dict()[name], name)


def test_a_plan_says_what_it_is():
    plan = gdn_mtp.plan(problem(), "cpu", backend="torch")
    assert (plan.provider, plan.problem, plan.device) == ("torch", problem(), torch.device("cpu"))
    assert repr(plan).startswith("VerifyPlan(verify-B3-T4-H2-HV4-")
    assert isinstance(plan, gdn_mtp.SpeculativePlan)
    with pytest.raises(NoKernelError, match="nonesuch"):
        gdn_mtp.plan(problem(), "cpu", backend="nonesuch")


@pytest.mark.parametrize("fold", ["auto", "always", "full", 5])
def test_a_plan_folds_when_it_is_told_to(fold):
    plan = gdn_mtp.plan(problem(B=1), DEVICE)
    planned, called = History(SETUP), History(SETUP)
    for step in range(7):
        accepted = int32([3 if step else 0])
        inputs = arguments(planned, [2], 4, seed=step)
        plan.run(*inputs, accepted, fold=fold, output=torch.empty_like(inputs[2]))
        gdn_mtp.verify(*arguments(called, [2], 4, seed=step), accepted, fold=fold)
        assert_same_bits(planned.pool, called.pool, f"pool after step {step}")
        assert_same_bits(planned.cache.cursor, called.cache.cursor, f"cursor after step {step}")


class TestUncheckedRuns:
    """A plan's run as on a GPU outside debug mode: nothing but the launcher reads the arguments."""

    def unchecked(self, **changes):
        plan = gdn_mtp.plan(problem(**changes), DEVICE)
        plan.always_checked = False
        return plan

    def test_no_check_and_no_allocation_besides_the_launch(self, monkeypatch):
        launched = []
        plan = self.unchecked()
        plan._launcher = lambda *tensors: launched.append(tensors)
        for module in ("plans", "specs"):
            monkeypatch.setattr(f"gdn_mtp.speculative.{module}.check_call", None)
        inputs = arguments(History(SETUP), [4, -1, 0], 4)
        output, accepted = torch.empty_like(inputs[2]), int32([0, 0, 0])
        for _ in range(2):
            plan.run(*inputs, accepted, output=output)
        cache = inputs[9].tensors
        options = (accepted, None, None, None, plan.fold_limit(4, "auto"), output)
        expected = (*inputs[:7], SETUP.K**-0.5, *inputs[7:9], *cache, *options)
        for tensors in launched:
            for came, asked in zip(tensors, expected, strict=True):
                assert came is asked or (isinstance(came, float | int) and came == asked)

    def test_a_cache_of_another_pool_is_refused(self):
        first, second = History(SETUP), History(SETUP)
        for history in (first, second):
            history.verify([4, -1, 0], 4, 0)
        inputs = [*arguments(first, [4, -1, 0], 4)[:9], second.cache]
        everything = first.snapshot([])
        with pytest.raises(ArgumentError, match="cache: is of the state pool at"):
            self.unchecked().run(*inputs, int32([0, 0, 0]), output=torch.empty_like(inputs[2]))
        everything()

    def test_a_cache_for_fewer_tokens_is_refused(self):
        history = History(Setup(max_tokens=3, capacity=16))
        inputs = arguments(history, [4, -1, 0], 4)
        everything = history.snapshot([])
        with pytest.raises(ArgumentError, match="cache: max_tokens = 3, expected at least T = 4"):
            self.unchecked().run(*inputs, int32([0, 0, 0]), output=torch.empty_like(inputs[2]))
        everything()

    @pytest.mark.parametrize("fold", ["never", ["auto"], None, True, 9, -1, 2.0])
    def test_fold_is_a_policy(self, fold):
        inputs = arguments(History(SETUP), [4, -1, 0], 4)
        with pytest.raises(ArgumentError, match="fold: "):
            self.unchecked().run(*inputs, int32([0, 0, 0]), fold=fold, output=torch.empty_like(inputs[2]))

    def test_debug_mode_checks(self):
        history = History(SETUP)
        inputs = arguments(history, [4, 4, 0], 4)
        with debug(), pytest.raises(ArgumentError, match="state_indices: slot 4 is named"):
            self.unchecked().run(*inputs, int32([0, 0, 0]), output=torch.empty_like(inputs[2]))
