"""Qwen3-Next of transformers on gdn_mtp, against the untouched model."""

from __future__ import annotations

import copy
import functools

import checks
import common
import gdn_mtp
import pytest
import qwen3_next
import torch
from gdn_mtp.plans import Plan
from gdn_mtp.speculative.plans import SpeculativePlan
from transformers import Qwen3NextForCausalLM

PROMPT_LENS = (2, 9, 24)  # shorter than the convolution; two longer ones
NUM_TOKENS = 12
MAX_LEN = 48
MAX_BATCH = 4  # one row more than requests: padding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_KERNELS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
ON_DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU of SM90 or newer")),
]
PROVIDERS = {"cpu": "torch", "cuda": "cute"}

SEEDS = [pytest.param(seed, id=f"seed{seed}") for seed in (0, 1, 2)]
ROLLBACKS = ["compact", "gather", "scatter"]
TREES = {
    "pairs": [-1, 0, 0, 1, 1, 2, 2],
    "wide": [-1, 0, 0, 0, 1, 3, 3, 6],
    "two roots of drafts": [-1, 0, 1, 2, 0, 4, 5],
    "chain": [-1, 0, 1, 2],
}


@functools.cache
def stock_model(seed: int, device: str) -> Qwen3NextForCausalLM:
    return common.random_model(Qwen3NextForCausalLM, qwen3_next.small_config(), seed, device=device)


@functools.cache
def cases_of(seed: int, device: str = DEVICE) -> list[common.Case]:
    return common.make_cases(stock_model(seed, device), PROMPT_LENS, NUM_TOKENS, seed, candidates=96)


@functools.cache
def patched_model(seed: int, device: str) -> Qwen3NextForCausalLM:
    model = copy.deepcopy(stock_model(seed, device))
    qwen3_next.patch(model)
    return model


def engine_of(
    seed: int, num_drafts: int = 0, rollback: str = "gather", trees: bool = False, device: str = DEVICE
) -> qwen3_next.PooledEngine:
    return qwen3_next.PooledEngine(
        patched_model(seed, device),
        max_batch=MAX_BATCH,
        max_len=MAX_LEN,
        num_verify=1 + num_drafts,
        rollback=rollback,
        trees=trees,
        seed=seed,
    )


def prompts_of(cases: list[common.Case]) -> list[torch.Tensor]:
    return [case.prompt for case in cases]


def drafter_of(cases: list[common.Case], wrong: float, seed: int) -> common.NoisyDrafter:
    return common.NoisyDrafter([case.stock.tokens for case in cases], 64, wrong, seed)


def failures(results: list[checks.Check]) -> list[checks.Check]:
    return [check for check in results if not check.passed]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The providers whose kernels a test launches."""
    providers = set()
    for kind in (Plan, SpeculativePlan):

        def recording(plan, *arguments, _launch=kind.launch):
            providers.add(plan.provider)
            return _launch(plan, *arguments)

        monkeypatch.setattr(kind, "launch", recording)
    return providers


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_equals_the_untouched_model(seed):
    cases = cases_of(seed)
    outputs = common.generate(engine_of(seed), prompts_of(cases), NUM_TOKENS)
    assert not failures(checks.check_outputs(cases, outputs))


@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("device", ON_DEVICES)
def test_speculative_equals_the_untouched_model(device, seed, rollback, launched):
    cases = cases_of(seed, device)
    engine, drafter = engine_of(seed, 3, rollback, device=device), drafter_of(cases, 0.3, seed)
    outputs, accepted = common.generate_speculative(engine, prompts_of(cases), NUM_TOKENS, drafter, 3)
    assert not failures(checks.check_outputs(cases, outputs))
    assert not failures([checks.check_acceptance(accepted, 3)])
    assert launched == {PROVIDERS[device]}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("device", ON_DEVICES)
def test_trees_of_drafts_equal_the_untouched_model(device, seed, tree, launched):
    cases, shape = cases_of(seed, device), TREES[tree]
    engine = engine_of(seed, len(shape) - 1, "compact", trees=True, device=device)
    drafter = drafter_of(cases, 0.3, seed)
    outputs, paths = common.generate_from_trees(engine, prompts_of(cases), NUM_TOKENS, drafter, shape)
    assert not failures(checks.check_outputs(cases, outputs))
    taken = {tuple(path) for request in paths for path in request}
    assert len(taken) > 2
    if tree != "chain":
        assert any(path != tuple(range(len(path))) for path in taken)  # accepted nodes with others between
    assert launched == {PROVIDERS[device]}


@pytest.mark.parametrize("wrong", [0.0, 1.0], ids=["right", "wrong"])
def test_trees_all_right_and_all_wrong(wrong):
    cases, shape = cases_of(0), TREES["pairs"]
    engine, drafter = engine_of(0, len(shape) - 1, "compact", trees=True), drafter_of(cases, wrong, 0)
    outputs, paths = common.generate_from_trees(engine, prompts_of(cases), NUM_TOKENS, drafter, shape)
    assert not failures(checks.check_outputs(cases, outputs))
    full_steps = [len(path) for request in paths for path in request[:-1]]  # the last may run past the end
    assert full_steps == [1 if wrong else 3] * len(full_steps)


def test_trees_are_for_compact_updates():
    with pytest.raises(ValueError, match="'scatter' takes chains"):
        engine_of(0, 3, "scatter", trees=True)


@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("num_drafts", [1, 7], ids=["T2", "T8"])
@pytest.mark.parametrize(("wrong", "accepts"), [(0.0, True), (1.0, False)], ids=["right", "wrong"])
def test_drafts_all_right_and_all_wrong(rollback, num_drafts, wrong, accepts):
    cases = cases_of(0)
    engine, drafter = engine_of(0, num_drafts, rollback), drafter_of(cases, wrong, 0)
    outputs, accepted = common.generate_speculative(
        engine, prompts_of(cases), NUM_TOKENS, drafter, num_drafts
    )
    assert not failures(checks.check_outputs(cases, outputs))
    full_steps = [count for request in accepted for count in request[:-1]]  # the last may run past the end
    assert full_steps == [num_drafts if accepts else 0] * len(full_steps)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_decode_goes_on_after_rollback(rollback):
    """Verify and single-token decode may alternate on the same states."""
    case = cases_of(1)[1]
    tokens = case.stock.tokens
    engine = engine_of(1, 3, rollback)
    rows = [engine.prefill([case.prompt])[0]]
    drafts = torch.stack([tokens[0], tokens[1], (tokens[2] + 1) % 64, tokens[3]])  # the second draft is wrong
    rows += list(engine.verify([0], drafts[None])[0, :2])
    engine.commit([0], [2])
    rows += [engine.decode([0], token[None])[0] for token in tokens[2:-1]]
    assert not failures(checks.check_outputs([case], [common.Greedy.from_logits(rows)]))


def test_padding_leaves_other_states_alone():
    cases = cases_of(0)
    engine = engine_of(0, 3)
    engine.prefill(prompts_of(cases))
    pool = engine.pool
    before = {layer: state.clone() for layer, state in pool.state.items()}
    engine.decode([1], cases[1].stock.tokens[:1])  # requests 0 and 2 sit out
    touched = int(pool.slots[1])
    for layer, state in pool.state.items():
        changed = [slot for slot in range(len(state)) if not state[slot].equal(before[layer][slot])]
        unused = [slot for slot in range(len(state)) if slot not in pool.slots[:3].tolist()]
        assert state[unused].isnan().all()
        assert [slot for slot in changed if slot not in unused] == [touched]
    assert pool.lengths.tolist() == [PROMPT_LENS[0], PROMPT_LENS[1] + 1, PROMPT_LENS[2], 0, 0]


def test_verify_alone_changes_no_state():
    cases = cases_of(0)
    engine = engine_of(0, 3)
    engine.prefill(prompts_of(cases))
    before = {layer: state.clone() for layer, state in engine.pool.state.items()}
    engine.verify([0, 1, 2], torch.stack([case.stock.tokens[:4] for case in cases]))
    for layer, state in engine.pool.state.items():
        assert state.view(torch.int32).equal(before[layer].view(torch.int32))  # NaN slots too


def test_compact_drafts_reach_no_state_before_they_are_accepted():
    """The pool keeps its bits until accepted tokens are folded, and then holds what plain decoding makes."""
    cases = cases_of(0)
    engine, plain = engine_of(0, 3, "compact"), engine_of(0)
    for each in (engine, plain):
        each.prefill(prompts_of(cases))
    before = {layer: state.clone() for layer, state in engine.pool.state.items()}
    for step in range(2):
        tokens = torch.stack([case.stock.tokens[2 * step : 2 * step + 4] for case in cases])
        engine.verify([0, 1, 2], tokens)
        engine.commit([0, 1, 2], [2, 2, 2])
        for t in range(2):
            plain.decode([0, 1, 2], tokens[:, t])
    for layer, state in engine.pool.state.items():
        assert state.view(torch.int32).equal(before[layer].view(torch.int32))  # NaN slots too
    engine._fold(torch.tensor([0, 1, 2], device=engine.model.device))
    for layer, state in engine.pool.state.items():
        for request in range(3):
            ours, theirs = (
                state[engine.pool.slots[request]],
                plain.pool.state[layer][plain.pool.slots[request]],
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_compact_memory_is_a_sixteenth_of_intermediate_states():
    compact, gather = engine_of(0, 7, "compact"), engine_of(0, 7)
    assert gather.intermediate is not None
    buffers = sum(states.nbytes for states in gather.intermediate.values())
    assert sum(cache.nbytes for cache in compact.pool.caches.values()) <= buffers / 16


def test_scatter_moves_slots_and_copies_nothing():
    cases = cases_of(0)
    engine = engine_of(0, 3, "scatter")
    engine.prefill(prompts_of(cases))
    slots, spares = engine.pool.slots.clone(), engine.spare_slots.clone()
    engine.verify([0, 1, 2], torch.stack([case.stock.tokens[:4] for case in cases]))
    states = {layer: state.clone() for layer, state in engine.pool.state.items()}
    engine.commit([0, 1, 2], [1, 3, 4])
    assert engine.pool.slots[:3].tolist() == [int(spares[0, 0]), int(spares[1, 2]), int(spares[2, 3])]
    assert engine.spare_slots[1, 2] == slots[1]
    for layer, state in engine.pool.state.items():
        assert state.view(torch.int32).equal(states[layer].view(torch.int32))


@pytest.mark.parametrize("skipped", ["state", "convolution", "length"])
def test_incomplete_rollback_is_noticed(skipped):
    """Control: equality of tokens means nothing unless a stale state breaks it."""
    cases = cases_of(0)
    engine = engine_of(0, 3)
    commit = engine.commit

    def incomplete(requests, kept):
        pool = engine.pool
        saved = {
            "state": {layer: state.clone() for layer, state in pool.state.items()},
            "convolution": {layer: conv.clone() for layer, conv in pool.conv.items()},
            "length": pool.lengths.clone(),
        }[skipped]
        commit(requests, kept)
        if skipped == "length":
            pool.lengths.copy_(saved)
        else:
            target = pool.state if skipped == "state" else pool.conv
            for layer, value in saved.items():
                target[layer].copy_(value)

    engine.commit = incomplete
    outputs, _ = common.generate_speculative(
        engine, prompts_of(cases), NUM_TOKENS, drafter_of(cases, 0.3, 0), 3
    )
    assert failures(checks.check_outputs(cases, outputs))


@pytest.mark.parametrize("trees", [False, True], ids=["chain", "tree"])
def test_wrong_acceptance_is_noticed(trees):
    """Control: the compact path is told the truth, and tokens differ where it is not."""
    cases, shape = cases_of(0), TREES["pairs"]
    engine = engine_of(0, len(shape) - 1 if trees else 3, "compact", trees=trees)
    told = engine._accepted

    def untrue(rows):
        counts, nodes = told(rows)
        if not trees:
            return counts.clamp_max(1), None
        nodes = nodes.clamp_max(0)
        nodes[:, 1:] = -1
        return None, nodes

    engine._accepted = untrue
    drafter = drafter_of(cases, 0.3, 0)
    if trees:
        outputs, _ = common.generate_from_trees(engine, prompts_of(cases), NUM_TOKENS, drafter, shape)
    else:
        outputs, _ = common.generate_speculative(engine, prompts_of(cases), NUM_TOKENS, drafter, 3)
    assert failures(checks.check_outputs(cases, outputs))


def test_gdn_runs_once_per_layer_and_step(monkeypatch):
    calls = []
    for name in ("gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"):
        function = getattr(gdn_mtp, name)

        def recording(*arguments, _name=name, _function=function, **options):
            calls.append((_name, arguments[0].shape[:2]))
            return _function(*arguments, **options)

        monkeypatch.setattr(gdn_mtp, name, recording)
    cases = cases_of(0)
    engine = engine_of(0, 3)
    engine.prefill(prompts_of(cases))
    engine.decode([0, 1, 2], torch.stack([case.stock.tokens[0] for case in cases]))
    engine.verify([0, 2], torch.stack([cases[i].stock.tokens[1:5] for i in (0, 2)]))
    decode, verify = "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"
    assert calls == [(decode, (MAX_BATCH, 1))] * 3 + [(verify, (MAX_BATCH, 4))] * 3


def test_too_long_a_request_says_so():
    engine = engine_of(0)
    with pytest.raises(RuntimeError, match=f"{MAX_LEN + 1} tokens"):
        engine.prefill([torch.arange(MAX_LEN + 1, device=engine.model.device) % 64])
