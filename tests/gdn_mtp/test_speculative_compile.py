"""The speculative kernels as compiled, for architectures that need not be there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gdn_mtp import SpeculativeProblem
from gdn_mtp.cute.kernels_speculative import HEURISTIC, KERNELS, TACTICS, regime
from gdn_support import BF16, FP16, FP32, check_every_row_is_chosen, check_resources
from kernel_dispatch import Arch

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
SMALL, MEDIUM, LARGE = 1, 32, 128  # batches whose tactics differ


def problem(**fields) -> SpeculativeProblem:
    sizes = {"B": LARGE, "T": 4, "H": 16, "HV": 32, "K": 128, "V": 128, "capacity": 16}
    return SpeculativeProblem(**{**sizes, **fields})


PROBLEMS = {
    "T4": problem(),
    "T4-bf16state": problem(state_dtype=BF16),
    "T4-bf16state-small": problem(state_dtype=BF16, B=SMALL),
    "T4-bf16state-medium": problem(state_dtype=BF16, B=MEDIUM),
    "T4-bf16state-tree": problem(state_dtype=BF16, tree=True, accept="nodes"),
    "T8-bf16state-tree-small": problem(
        T=8, capacity=24, state_dtype=BF16, B=SMALL, tree=True, accept="nodes"
    ),
    "T8-bf16state-variable-small": problem(
        T=8, capacity=24, state_dtype=BF16, B=SMALL, variable_tokens=True, tensor_scale=True
    ),
    "T8-bf16state-tree-medium": problem(
        T=8, capacity=24, state_dtype=BF16, B=MEDIUM, tree=True, accept="nodes"
    ),
    "T8-bf16state-variable-medium": problem(
        T=8, capacity=24, state_dtype=BF16, B=MEDIUM, variable_tokens=True, tensor_scale=True
    ),
    "T1-bf16state-int64-medium": problem(
        T=1, capacity=8, state_dtype=BF16, B=MEDIUM, index_dtype=torch.int64
    ),
    "T4-bf16state-variable-medium": problem(state_dtype=BF16, B=MEDIUM, variable_tokens=True),
    "T4-bf16state-none-medium": problem(state_dtype=BF16, B=MEDIUM, accept="none"),
    "T5-bf16state-R16-medium": problem(T=5, state_dtype=BF16, B=MEDIUM, variable_tokens=True),
    "T8-bf16state-R16-tree-medium": problem(
        T=8, state_dtype=BF16, B=MEDIUM, variable_tokens=True, tree=True, accept="nodes"
    ),
    "T6-bf16state-variable-medium": problem(
        T=6, capacity=24, state_dtype=BF16, B=MEDIUM, variable_tokens=True
    ),
    "T7-bf16state-variable-K64": problem(
        T=7, capacity=24, K=64, V=64, state_dtype=BF16, variable_tokens=True
    ),
    "T8-bf16state-tree-K64": problem(
        T=8, capacity=24, K=64, V=64, state_dtype=BF16, variable_tokens=True, tree=True, accept="nodes"
    ),
    "T6-tree-fp16": problem(T=6, capacity=24, tree=True, accept="nodes", io_dtype=FP16, gate_dtype=FP16),
    "T8": problem(T=8, capacity=24),
    "T8-bf16state": problem(T=8, capacity=24, state_dtype=BF16),
    "T8-variable": problem(T=8, capacity=24, variable_tokens=True, tensor_scale=True),
    "T8-fp32-K64": problem(T=8, capacity=24, K=64, V=64, io_dtype=FP32, gate_dtype=FP32),
    "T8-fp32-bf16state": problem(T=8, capacity=24, io_dtype=FP32, gate_dtype=FP32, state_dtype=BF16),
    "T16": problem(T=16, capacity=32),
    "T16-small": problem(T=16, capacity=32, B=SMALL),
    "T16-int64": problem(T=16, capacity=32, index_dtype=torch.int64),
    "T16-tree": problem(T=16, capacity=32, tree=True, accept="nodes"),
    "T16-nodes-int64-fp32": problem(
        T=16, capacity=32, accept="nodes", index_dtype=torch.int64, io_dtype=FP32, gate_dtype=FP32
    ),
    "T16-variable": problem(T=16, capacity=32, variable_tokens=True),
    "T16-bf16state-small": problem(T=16, capacity=32, state_dtype=BF16, B=SMALL),
    "T16-bf16state-tree": problem(T=16, capacity=32, state_dtype=BF16, tree=True, accept="nodes"),
    "T6-bf16state-aligned": problem(T=6, capacity=24, state_dtype=BF16, state_rows="aligned"),
    "T4-bf16state-tree-aligned": problem(state_dtype=BF16, tree=True, accept="nodes", state_rows="aligned"),
    "T4-fp32-aligned": problem(io_dtype=FP32, gate_dtype=FP32, state_rows="aligned"),
    "T16-aligned": problem(T=16, capacity=32, state_rows="aligned"),
    "T16-bf16state-aligned": problem(T=16, capacity=32, state_dtype=BF16, state_rows="aligned"),
    "commit": replace(problem(), mode="commit", T=0),
    "materialize": replace(problem(state_dtype=BF16), mode="materialize", T=0),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("asked", PROBLEMS.values(), ids=PROBLEMS)
def test_compiled_code_keeps_everything_in_registers(arch: str, asked: SpeculativeProblem) -> None:
    """Code for the tactic that the heuristic picks has no stack frame, hence spills no register."""
    check_compiled(arch, asked)


@pytest.mark.parametrize("arch", ["sm_103a", "sm_110a", "sm_121a"])
@pytest.mark.parametrize("mode", ["T4", "T16", "commit", "materialize"])
def test_the_other_architectures_compile(arch: str, mode: str) -> None:
    check_compiled(arch, PROBLEMS[mode])


def check_compiled(arch: str, asked: SpeculativeProblem) -> None:
    target = Arch.from_name(arch)
    check_resources(KERNELS.config(asked, target, KERNELS.tactics(asked, target)[0]), target)


def test_the_heuristic_reaches_every_row_of_its_table() -> None:
    hopper = Arch.from_name("sm_90a")
    tokens = ((4, 16), (7, 16), (16, 32))  # and the capacity
    asked = [problem(T=t, capacity=r, state_dtype=x) for t, r in tokens for x in (torch.float32, BF16)]
    asked.append(PROBLEMS["commit"])
    assert {regime(one) for one in asked} == set(HEURISTIC)
    for one in asked:
        rows = HEURISTIC[regime(one)]
        batches = (1, 8, 10, 12, 14, 16, 24, 32, 128)
        check_every_row_is_chosen(KERNELS, rows, [replace(one, B=b) for b in batches], hopper)
        assert set(rows.values()) <= set(TACTICS)
