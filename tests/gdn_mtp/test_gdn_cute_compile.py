"""The CuTe DSL kernels as compiled, for architectures that need not be there."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gdn_mtp.cute.compile import FUNCTION
from gdn_mtp.cute.kernels import KERNELS
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_problems import (
    ARCHS,
    FEW,
    HOPPER,
    KMAJOR,
    MANY,
    MEDIUM,
    PROBLEM,
    SOME,
    TACTICS_OF_HEURISTIC,
    problem,
)
from gdn_support import BF16, FP16, FP32, check_resources
from kernel_dispatch import Arch, forbid_compilation, resolve

COMPILED = {
    "T1": problem(T=1),
    "T1-few": problem(T=1, B=FEW),
    "T1-some": problem(T=1, B=SOME),
    "T1-many": problem(T=1, B=MANY),
    "T1-bf16state": problem(T=1, state_dtype=BF16),
    "T1-bf16state-few": problem(T=1, state_dtype=BF16, B=FEW),
    "T4-bf16state-medium": problem(state_dtype=BF16, B=MEDIUM),
    "T8-bf16state-medium": problem(T=8, state_dtype=BF16, B=MEDIUM),
    "T2-buffer": problem(T=2, intermediate="buffer"),
    "T2-buffer-few": problem(T=2, intermediate="buffer", B=FEW),
    "T4": PROBLEM,
    "T4-few": problem(B=FEW),
    "T6": problem(T=6),
    "T4-many": problem(B=MANY),
    "T8": problem(T=8),
    "T8-medium": problem(T=8, B=MEDIUM),
    "T8-buffer": problem(T=8, intermediate="buffer"),
    "T8-bf16state-many": problem(T=8, state_dtype=BF16, B=MANY),
    "T16-few": problem(T=16, B=FEW),
    "T16-many": problem(T=16, B=MANY, index_dtype=torch.int64),
    "T16-buffer-some": problem(T=16, intermediate="buffer", B=SOME),
    "T16-buffer-many": problem(T=16, intermediate="buffer", B=MANY),
    "T16-bf16state": problem(T=16, state_dtype=BF16),
    "T16-bf16state-many": problem(T=16, state_dtype=BF16, B=MANY),
    "T16-bf16state-buffer": problem(T=16, state_dtype=BF16, intermediate="buffer", index_dtype=torch.int64),
    "T16-bf16state-buffer-many": problem(T=16, state_dtype=BF16, intermediate="buffer", B=MANY),
    "T3-scatter-some": problem(T=3, intermediate="scatter", B=SOME),
    "T16-aligned": problem(T=16, state_rows="aligned"),
    "T8-K256": problem(T=8, K=256, V=256),
    "T4-K256-buffer": problem(K=256, V=256, intermediate="buffer"),
    "T16-K256-buffer": problem(T=16, K=256, V=256, intermediate="buffer"),
    "T16-K256-bf16state-buffer": problem(T=16, K=256, V=256, intermediate="buffer", state_dtype=BF16),
    "T16-K256-fp32-bf16state-buffer": problem(
        T=16, K=256, V=256, intermediate="buffer", state_dtype=BF16, io_dtype=FP32, gate_dtype=FP32
    ),
    "T9-K256-bf16state-buffer": problem(T=9, K=256, V=256, intermediate="buffer", state_dtype=BF16),
    "T12-K256-fp32-bf16state-scatter": problem(
        T=12, K=256, V=256, intermediate="scatter", state_dtype=BF16, io_dtype=FP32, gate_dtype=FP32
    ),
    "T5-K64-frozen": problem(T=5, K=64, V=64, update_state=False, index_dtype=torch.int64),
    "T2-fp32-tensorscale": problem(
        T=2, io_dtype=FP32, gate_dtype=FP32, tensor_scale=True, separate_write_indices=True
    ),
    "T1-kmajor": KMAJOR,
    "T1-kmajor-many": replace(KMAJOR, B=MANY),
    "T1-kmajor-K64-bf16state": replace(KMAJOR, K=64, B=MANY, state_dtype=BF16),
    "T1-kmajor-K256-bf16state": replace(KMAJOR, K=256, V=256, state_dtype=BF16),
    "T1-kmajor-K256-bf16state-few": replace(KMAJOR, HV=16, K=256, V=256, state_dtype=BF16, B=FEW),
    "T1-kmajor-bf16state-few": replace(KMAJOR, B=FEW, state_dtype=BF16),
    "T1-kmajor-bf16state": replace(KMAJOR, state_dtype=BF16, out_dtype=FP16, io_dtype=FP16),
}


def test_every_tactic_that_the_heuristic_picks_is_among_those_compiled():
    assert {KERNELS.tactics(asked, HOPPER)[0] for asked in COMPILED.values()} >= TACTICS_OF_HEURISTIC


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("asked", COMPILED.values(), ids=COMPILED)
def test_compiled_code_keeps_everything_in_registers(arch, asked):
    """Code for the tactic that the heuristic picks has no stack frame, hence spills no register."""
    target = Arch.from_name(arch)
    selection = resolve(asked, target, "cute")
    check_compiled(asked, arch, selection.tactic)
    with forbid_compilation():
        selection.kernel.prepare(asked, target, torch.device("cpu"), selection.tactic)


@pytest.mark.parametrize(
    ("asked", "tactic"),
    [
        (COMPILED["T16-K256-fp32-bf16state-buffer"], "w4t1s"),
        (COMPILED["T16-K256-bf16state-buffer"], "w2t1r"),
        (COMPILED["T16-K256-bf16state-buffer"], "w1t1r"),
        (problem(T=16, K=256, V=256), "w1t1r"),
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else value,
)
def test_a_tactic_that_is_named_keeps_everything_in_registers_too(asked, tactic):
    """Those that need most: for 256 columns of the state in two chunks, and for all tokens in one warp."""
    assert tactic in KERNELS.tactics(asked, HOPPER)
    check_compiled(asked, HOPPER.name, tactic)


def test_what_is_traced_is_in_the_key():
    """The kernels import nothing of the package that the compile cache does not look at."""
    folder, *others = FUNCTION.sources
    imported = set()
    for source in folder.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = importlib.util.resolve_name("." * node.level + (node.module or ""), "gdn_mtp.cute")
                imported.add(module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.partition(".")[0] == "gdn_mtp"}
    outside = {name for name in ours if not name.startswith("gdn_mtp.cute")}
    found = {Path(inspect.getsourcefile(importlib.import_module(name))) for name in outside}
    assert found == set(others)


def check_compiled(asked, arch, tactic):
    target = Arch.from_name(arch)
    check_resources(KERNELS.config(asked, target, tactic), target)
