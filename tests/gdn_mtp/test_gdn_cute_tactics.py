"""Which kernels and tactics of CuTe DSL a problem gets."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gdn_mtp.cute.kernels import (
    HEURISTIC,
    KERNELS,
    KMAJOR_HEURISTIC,
    KMAJOR_TACTICS,
    TACTICS,
    heuristic_rows,
)
from gdn_mtp.cute.kernels_speculative import KERNELS as SPECULATIVE_KERNELS
from gdn_mtp.cute.prefetch import may_prefetch
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_problems import ARCHS, FEW, HOPPER, KMAJOR, MANY, PROBLEM, SOME, TACTICS_OF_HEURISTIC, problem
from gdn_support import BF16, FP32, check_every_row_is_chosen
from kernel_dispatch import Arch, explain


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (problem(K=96), "K = 96"),
        (problem(V=32), "V = 32"),
        (problem(T=17), "at most 16 tokens"),
        (problem(state_rows="any"), "16-byte aligned"),
        (problem(B=70000), "B = 70000"),
        (problem(H=70000, HV=140000), "H = 70000"),
        (replace(KMAJOR, HV=70000), "HV = 70000"),
        (replace(KMAJOR, T=2), "K-major"),
        (replace(KMAJOR, index_dtype=torch.int32), "K-major"),
        (replace(KMAJOR, update_state=False), "always updated"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_what_the_kernels_decline_goes_to_torch_with_a_reason(asked, words):
    explained = explain(asked, HOPPER)
    assert explained.chosen == "torch"
    (row,) = [row for row in explained.rows if row.name == "cute"]
    assert words in row.reason


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("asked", [PROBLEM, KMAJOR, problem(T=1), problem(T=16)], ids=lambda p: p.describe())
def test_the_kernels_are_preferred_where_they_apply(arch, asked):
    assert explain(asked, arch).chosen == "cute"
    assert explain(asked, "cpu").chosen == "torch"


def test_every_tactic_is_offered_and_the_heuristic_names_no_other():
    assert set(KERNELS.tactics(PROBLEM, HOPPER)) == set(TACTICS)
    assert set(TACTICS) >= TACTICS_OF_HEURISTIC


@pytest.mark.parametrize(
    ("asked", "tactics"),
    [
        (replace(KMAJOR, B=FEW), ["c64r16", "c128r16"]),
        (replace(KMAJOR, B=SOME), ["c128r16", "c64r16"]),
        (replace(KMAJOR, B=MANY), ["c64r16", "c128r16"]),
        (replace(KMAJOR, B=FEW, state_dtype=BF16), ["c64r8", "c128r16"]),
        (replace(KMAJOR, B=MANY, state_dtype=BF16), ["c128r16", "c64r8"]),
        (replace(KMAJOR, B=MANY, V=64, state_dtype=BF16), ["c64r8"]),  # c128r16: 128 columns a block
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else None,
)
def test_k_major_tactics_are_those_of_the_dtype_that_fit_the_preferred_one_first(asked, tactics):
    assert KERNELS.tactics(asked, HOPPER) == tactics


def test_every_k_major_tactic_is_in_the_heuristic():
    assert {name for rows in KMAJOR_HEURISTIC.values() for name in rows.values()} == set(KMAJOR_TACTICS)


def test_the_heuristic_reaches_every_row_of_its_table():
    stored = ("none", "buffer", "scatter")
    problems = [
        problem(T=t, state_dtype=dtype, intermediate=intermediate)
        for t, dtype, intermediate in itertools.product(range(1, 9), (torch.float32, BF16), stored)
    ]
    every = [rows for by_tokens in HEURISTIC.values() for rows in by_tokens.values()]
    assert all(any(heuristic_rows(asked) is rows for asked in problems) for rows in every)
    for asked in problems:
        of_batches = [replace(asked, B=b) for b in (1, 2, 4, 8, 16, 32, 64, 512)]
        check_every_row_is_chosen(KERNELS, heuristic_rows(asked), of_batches, HOPPER)


@pytest.mark.parametrize("stored", HEURISTIC)
def test_limits_of_the_heuristic_ascend_and_the_last_is_none(stored):
    for limits in (HEURISTIC[stored], *HEURISTIC[stored].values()):
        assert list(limits) == sorted(limits)
        assert max(limits) == float("inf")


def test_a_number_of_tokens_takes_the_first_rows_whose_limit_it_does_not_exceed():
    by_tokens = HEURISTIC["final fp32 state"]
    for t, limit in [(1, 1), (2, 5), (5, 5), (6, 7), (7, 7), (8, float("inf")), (16, float("inf"))]:
        assert heuristic_rows(problem(T=t)) is by_tokens[limit]


@pytest.mark.parametrize(
    ("asked", "twins"),
    [
        (problem(T=4), set()),
        (problem(T=6), {"w2t1sa2b7"}),  # shared memory for seven blocks of two warps
        (problem(T=16), {"w2t1sa2b7", "w2t1sa2b4", "w4t1sa1b2", "w4t1sa2"}),  # registers for eight warps
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else None,
)
def test_limits_on_blocks_that_do_not_fit_anyway_are_not_offered(asked, twins):
    assert set(TACTICS) - set(KERNELS.tactics(asked, HOPPER)) == twins


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16])
def test_a_cap_is_the_number_of_blocks_that_fit(arch, tokens):
    target = Arch.from_name(arch)
    for state, intermediate in itertools.product((FP32, BF16), ("none", "buffer")):
        asked = problem(T=tokens, state_dtype=state, intermediate=intermediate)
        for name in KERNELS.tactics(asked, target):
            config = KERNELS.config(asked, target, name)
            per_sm = target.smem_optin_bytes + 1024
            taken = -(-config.smem_bytes // 128) * 128 + 1024  # of a multiprocessor, as the driver counts
            assert config.blocks_per_sm * taken <= per_sm
            cap = config.tactic.max_blocks_per_sm
            if cap is not None:
                assert config.blocks_per_sm == cap
                assert (cap + 1) * taken > per_sm


@pytest.mark.parametrize(
    ("blocks", "first"),
    [(20, 0), (21, 30), (100, 30)],  # the first that prefetches, of 10 multiprocessors with four blocks each
)
def test_which_blocks_prefetch_ahead(blocks, first):
    prefetching = [block for block in range(blocks) if may_prefetch(block, blocks, 10, 4, ahead=1)]
    assert prefetching == list(range(first, blocks))


KEPT = {"intermediate": "buffer", "update_state": False}
WINDOW = SpeculativeProblem(B=1, T=4, H=16, HV=32, K=128, V=128, capacity=16)
SERVED = {  # kernels that calls of 1 to 256 requests of Qwen3-Next need, with fp32 and bf16 states
    "single tokens": (KERNELS, problem(T=1), 1, 2),
    "T4, kept": (KERNELS, problem(T=4, **KEPT), 4, 4),
    "T8, kept": (KERNELS, problem(T=8, **KEPT), 4, 4),
    "T4, updated": (KERNELS, problem(T=4), 3, 3),
    "T8, updated": (KERNELS, problem(T=8), 3, 3),
    "verify": (SPECULATIVE_KERNELS, WINDOW, 1, 4),
    "commit": (SPECULATIVE_KERNELS, replace(WINDOW, mode="commit", T=0), 1, 1),
    "materialize": (SPECULATIVE_KERNELS, replace(WINDOW, mode="materialize", T=0), 1, 1),
}


@pytest.mark.parametrize(("kernels", "asked", "fp32", "bf16"), SERVED.values(), ids=SERVED)
def test_a_server_compiles_what_the_readme_says(kernels, asked, fp32, bf16):
    for state, count in ((FP32, fp32), (BF16, bf16)):
        configs = set()
        for batch in range(1, 257):
            of_batch = replace(asked, B=batch, state_dtype=state)
            configs.add(kernels.config(of_batch, HOPPER, kernels.tactics(of_batch, HOPPER)[0]))
        assert len(configs) == count


@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@pytest.mark.parametrize("rows", ["contiguous", "aligned"])
@pytest.mark.parametrize("intermediate", ["none", "buffer", "scatter"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_121a"])
def test_every_accepted_problem_has_a_tactic(head, tokens, rows, intermediate, arch):
    for state in (FP32, BF16):
        asked = problem(
            T=tokens, K=head, V=head, state_rows=rows, intermediate=intermediate, state_dtype=state
        )
        assert KERNELS.tactics(asked, Arch.from_name(arch))


@pytest.mark.parametrize(
    ("asked", "arch", "nearest"),
    [
        (problem(K=256, V=256, intermediate="buffer"), "sm_120a", "w2t1f"),  # w4t2f: too much shared memory
        # w4t2f: too few registers
        (problem(T=9, K=256, V=256, intermediate="buffer", state_dtype=BF16), "sm_90a", "w4t1f"),
        (problem(V=64, intermediate="buffer", B=16), "sm_90a", "w4t1f"),  # w4t2f: 128 rows a block
        (problem(state_rows="aligned", T=8, B=MANY), "sm_90a", "w4t1r"),
        (problem(state_rows="aligned", T=1, B=FEW), "sm_90a", "w2t1r"),
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else value,
)
def test_a_tactic_that_does_not_fit_gives_way_to_the_nearest(asked, arch, nearest):
    assert KERNELS.tactics(asked, Arch.from_name(arch))[0] == nearest
