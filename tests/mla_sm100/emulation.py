"""The kernels of mla-sm100 on the emulator: compiled, divided and launched as the package does.

What runs is the object file and the PTX of the compile cache. Outputs and workspace count as never written,
outputs start as NaN, and every element is held against float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from kernel_dispatch import Arch
from kernel_testing.mla import Inputs
from mla_core import DecodeProblem, SplitPlan
from mla_core.planning import num_key_tiles
from mla_sm100.config import PROBABILITY_SHIFT_LOG2, DecodeConfig
from mla_sm100.kernels import FUNCTION, TACTICS, Division, num_units
from mla_sm100.launch import PARAMETERS, Launcher
from ptx_emulator import CuteFiles, Emulated, Options, emulate, explore
from ptx_emulator.host.cute import Call

ARCH = "sm_100a"
SM_COUNT = 6  # of the GPU that tactics are planned for, so that small problems are split too
WRITTEN = ("out", "lse", "workspace")
READ = PARAMETERS[:5]
# Probabilities are stored as 2^(score - reference + shift). The reference is never above the largest score of
# its row, whose probability is therefore 2^shift at least.
E4M3_SMALLEST_WEIGHT = 2.0**-10 / 2.0 ** PROBABILITY_SHIFT_LOG2["e4m3"]


@dataclass(frozen=True)
class Run:
    """What a call did; `function` holds result, counts and launches of the last schedule."""

    inputs: Inputs
    division: Division
    function: Emulated


@functools.cache
def emulated(config: DecodeConfig, arch: str = ARCH) -> Emulated:
    """The function of one configuration, from the compile cache; built first if it is not there."""
    compiled = FUNCTION.compiled(config, arch)
    files = CuteFiles(compiled.object_file, compiled.name, compiled.ptx.read_text(), PARAMETERS)
    return emulate(files, arch, uninitialised=WRITTEN, read_only=READ)


def run_on_emulator(
    config: DecodeConfig,
    inputs: Inputs,
    *,
    num_splits: int = 1,
    tiles_per_split: int = 1,
    num_clusters: int | None = None,
    output_scale: float = 1.0,
    schedules: int = 1,
    options: Options | None = None,
    arch: str = ARCH,
) -> Run:
    """Decode `inputs` with one configuration and hold the results against float64.

    num_splits: more than one needs `config.split`. num_clusters: None is one for each unit of work.
    schedules: how many; all must give the same bits, without findings.
    """
    problem = problem_of(inputs, config)
    key_tiles = max(num_splits, num_key_tiles(problem.max_seq_len, config.tile_n))
    splits = SplitPlan(
        rows=problem.batch * problem.rows,
        kv_lora_rank=problem.kv_lora_rank,
        tile_n=config.tile_n,
        key_tiles=key_tiles,
        num_splits=num_splits,
        tiles_per_split=tiles_per_split,
    )
    units = num_units(problem, config, num_splits)
    division = Division(config, splits, units if num_clusters is None else num_clusters)
    return run_division(division, inputs, output_scale, schedules, options, arch)


def run_tactic(
    tactic: str, inputs: Inputs, *, sm_count: int = SM_COUNT, schedules: int = 1, **changes: object
) -> Run:
    """Decode as the provider would with that tactic, on a GPU of `sm_count` SMs; `changes` to the problem."""
    assert tactic in TACTICS
    problem = DecodeProblem(**{**inputs.sizes, **changes})
    arch = replace(Arch.from_name(ARCH), sm_count=sm_count)
    return run_division(Division.of(problem, arch, tactic), inputs, schedules=schedules)


def run_division(
    division: Division,
    inputs: Inputs,
    output_scale: float = 1.0,
    schedules: int = 1,
    options: Options | None = None,
    arch: str = ARCH,
) -> Run:
    """Launch through the package's launcher, under so many schedules, and check."""
    config = division.config
    function = emulated(config, arch)
    calls: list[Call] = []
    problem = problem_of(inputs, config)
    launcher = Launcher(lambda *arguments: calls.append(function.call(*arguments)), problem, division)
    scales = (inputs.case.scale, output_scale)
    are_tensors = (config.softmax_scale_is_tensor, config.output_scale_is_tensor)
    softmax_scale, output_scale_given = (
        torch.tensor(scale) if is_tensor else scale
        for scale, is_tensor in zip(scales, are_tensors, strict=True)
    )
    nbytes = division.splits.workspace_bytes
    launcher(
        *inputs.positional,
        inputs.cum_seq_lens_q,
        softmax_scale,
        output_scale_given,
        inputs.out,
        inputs.lse if config.return_lse else None,
        torch.full((nbytes,), 255, dtype=torch.uint8) if nbytes else None,
    )
    (call,) = calls
    explore(call, schedules, options=options, progress=False).raise_if_wrong()
    inputs.check(
        inputs.out,
        inputs.lse if config.return_lse else None,
        output_scale,
        e4m3_smallest_weight=E4M3_SMALLEST_WEIGHT,
    )
    return Run(inputs, division, function)


def config_of(inputs: Inputs, *, pair: bool, split: bool = False, pdl: bool = False) -> DecodeConfig:
    """The configuration for a call; `dataclasses.replace` changes the rest."""
    return DecodeConfig.of(DecodeProblem(**inputs.sizes), pair=pair, split=split, pdl=pdl)


def problem_of(inputs: Inputs, config: DecodeConfig) -> DecodeProblem:
    """The problem of a call with the options of `config`."""
    return DecodeProblem(
        **{
            **inputs.sizes,
            "return_lse": config.return_lse,
            "softmax_scale_is_tensor": config.softmax_scale_is_tensor,
            "output_scale_is_tensor": config.output_scale_is_tensor,
        }
    )
