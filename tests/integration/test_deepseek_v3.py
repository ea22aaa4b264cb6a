"""DeepSeek-V3 of transformers on mla_core, against the untouched model."""

from __future__ import annotations

import copy
import functools

import checks
import common
import deepseek_v3
import mla_core
import pytest
import recording
import torch
from transformers import DeepseekV3ForCausalLM

PROMPT_LENS = (1, 9, 24)  # one token; a partial page; whole pages of 8
NUM_TOKENS = 12
NUM_DRAFTS = 3
PAGE_SIZE = 8
NUM_PAGES = 24
MAX_SEQ_LEN = max(PROMPT_LENS) + NUM_TOKENS + NUM_DRAFTS


@functools.cache
def stock_model(num_heads: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> DeepseekV3ForCausalLM:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return common.random_model(
        DeepseekV3ForCausalLM, deepseek_v3.small_config(num_heads), seed, dtype=dtype, device=device
    )


@functools.cache
def cases_of(num_heads: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[common.Case]:
    return common.make_cases(
        stock_model(num_heads, seed, dtype), PROMPT_LENS, NUM_TOKENS, seed, candidates=96
    )


@functools.cache
def patched_model(num_heads: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> DeepseekV3ForCausalLM:
    model = copy.deepcopy(stock_model(num_heads, seed, dtype))
    deepseek_v3.patch(model)
    return model


def engine_of(
    model: DeepseekV3ForCausalLM, seed: int = 0, num_pages: int = NUM_PAGES, max_seq_len: int = MAX_SEQ_LEN
) -> deepseek_v3.PagedEngine:
    return deepseek_v3.PagedEngine(model, num_pages, PAGE_SIZE, max_seq_len, seed)


def prompts_of(cases: list[common.Case]) -> list[torch.Tensor]:
    return [case.prompt for case in cases]


def failures(results: list[checks.Check]) -> list[checks.Check]:
    return [check for check in results if not check.passed]


SETUPS = [
    pytest.param(4, 0, torch.bfloat16, id="H4-seed0-bf16"),
    pytest.param(8, 1, torch.bfloat16, id="H8-seed1-bf16"),
    pytest.param(16, 2, torch.bfloat16, id="H16-seed2-bf16"),
    pytest.param(4, 3, torch.float16, id="H4-seed3-fp16"),
]


@pytest.mark.parametrize(("num_heads", "seed", "dtype"), SETUPS)
def test_greedy_equals_the_untouched_model(num_heads, seed, dtype):
    cases = cases_of(num_heads, seed, dtype)
    engine = engine_of(patched_model(num_heads, seed, dtype), seed)
    outputs = common.generate(engine, prompts_of(cases), NUM_TOKENS)
    assert not failures(checks.check_outputs(cases, outputs))


@pytest.mark.parametrize(("num_heads", "seed", "dtype"), SETUPS)
def test_speculative_equals_the_untouched_model(num_heads, seed, dtype):
    cases = cases_of(num_heads, seed, dtype)
    engine = engine_of(patched_model(num_heads, seed, dtype), seed)
    drafter = common.NoisyDrafter([case.stock.tokens for case in cases], 64, wrong=0.3, seed=seed)
    outputs, accepted = common.generate_speculative(
        engine, prompts_of(cases), NUM_TOKENS, drafter, NUM_DRAFTS
    )
    assert not failures(checks.check_outputs(cases, outputs))
    assert not failures([checks.check_acceptance(accepted, NUM_DRAFTS)])


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_page_size_changes_no_token(page_size):
    cases = cases_of(4, 0)
    num_pages = len(cases) * -(-(max(PROMPT_LENS) + NUM_TOKENS) // page_size)
    engine = deepseek_v3.PagedEngine(patched_model(4, 0), num_pages, page_size, MAX_SEQ_LEN, seed=5)
    outputs = common.generate(engine, prompts_of(cases), NUM_TOKENS)
    assert not failures(checks.check_outputs(cases, outputs))


def test_prefill_is_ragged_and_decode_dense(monkeypatch):
    calls = []
    decode = mla_core.decode

    def recording(query, kv_cache, **arguments):
        assert arguments["max_seq_len"] == MAX_SEQ_LEN
        assert arguments["block_tables"].shape[1] == -(-MAX_SEQ_LEN // PAGE_SIZE)
        calls.append((tuple(query.shape), arguments.get("max_q_len"), arguments["softmax_scale"]))
        return decode(query, kv_cache, **arguments)

    monkeypatch.setattr(mla_core, "decode", recording)
    cases = cases_of(4, 0)
    engine = engine_of(patched_model(4, 0))
    common.generate(engine, prompts_of(cases), 2)
    scale = stock_model(4, 0).model.layers[0].self_attn.scaling
    ragged, dense = (
        ((sum(PROMPT_LENS), 4, 576), max(PROMPT_LENS), scale),
        ((len(cases), 1, 4, 576), None, scale),
    )
    num_layers = stock_model(4, 0).config.num_hidden_layers
    assert calls == [ragged] * num_layers + [dense] * num_layers


def test_chunked_prefill_equals_whole():
    case = cases_of(4, 0)[-1]
    model = patched_model(4, 0)
    whole = engine_of(model).prefill([case.prompt])[0]
    chunked = engine_of(model)
    chunked.prefill([case.prompt[:5]])
    logits = chunked.verify([0], case.prompt[None, 5:])
    chunked.commit([0], [len(case.prompt) - 5])
    error = checks.LogitError.of([logits[0, -1:].float()], [whole[None].float()])
    assert error.largest < 0.1  # bfloat16 products in other shapes may round differently; logits have std 1


def test_rejected_tokens_leave_pages_and_nan_rows():
    case = cases_of(4, 0)[1]
    engine = engine_of(patched_model(4, 0))
    engine.prefill([case.prompt])  # 9 tokens: one row on the second page
    free = list(engine.cache.free_pages)
    engine.verify([0], case.stock.tokens[None, :10])
    assert len(engine.cache.free_pages) == len(free) - 1
    engine.commit([0], [3])
    assert sorted(engine.cache.free_pages) == sorted(free)
    assert engine.cache.seq_lens == [12]
    rows = engine.cache.pages[:, engine.cache.request_pages[0][1]]
    assert rows[:, :4].isfinite().all()
    assert rows[:, 4:].isnan().all()
    assert engine.cache.pages[:, engine.cache.free_pages].isnan().all()


def test_full_cache_says_so():
    engine = engine_of(patched_model(4, 0), num_pages=2)
    with pytest.raises(RuntimeError, match="no free page for request 0"):
        engine.prefill([torch.arange(17, device=engine.model.device)])


def test_too_long_a_request_says_so():
    engine = engine_of(patched_model(4, 0), max_seq_len=16)
    with pytest.raises(RuntimeError, match="request 0 grows to 17 tokens, the cache was built for 16"):
        engine.prefill([torch.arange(17, device=engine.model.device)])
    assert engine.cache.seq_lens == [0]
    assert len(engine.cache.free_pages) == NUM_PAGES


def test_growing_requests_pose_one_problem():
    cases = cases_of(4, 0)
    engine = engine_of(patched_model(4, 0))
    with recording.recorded_problems() as problems:
        common.generate(engine, prompts_of(cases), NUM_TOKENS)
    assert [(problem.ragged, problem.q_len) for problem in problems] == [(True, max(PROMPT_LENS)), (False, 1)]


def test_reading_the_wrong_page_is_noticed(monkeypatch):
    """Control: equality of tokens means nothing unless an attention error breaks it."""
    decode = mla_core.decode

    def swapped(query, kv_cache, *, block_tables, **arguments):
        return decode(query, kv_cache, block_tables=block_tables.roll(1, dims=0), **arguments)

    cases = cases_of(4, 0)
    same_length = [cases[1].prompt, cases[1].prompt.flip(0)]  # each request has the other's valid pages
    model = patched_model(4, 0)
    right = common.generate(engine_of(model), same_length, NUM_TOKENS)
    monkeypatch.setattr(mla_core, "decode", swapped)
    wrong = common.generate(engine_of(model), same_length, NUM_TOKENS)
    assert failures(checks.check_outputs([cases[1]], wrong[:1]))
    assert not failures(checks.check_outputs([cases[1]], right[:1]))


def test_unknown_backend_is_refused():
    model = copy.deepcopy(stock_model(4, 0))
    deepseek_v3.patch(model, backend="missing")
    with pytest.raises(RuntimeError, match="missing"):
        engine_of(model).prefill([cases_of(4, 0)[0].prompt])
