"""The PTX of the kernels, run on a CPU by shared/ptx-emulator with its checks for races, against float64."""

from __future__ import annotations

from typing import Any

import ptx_emulator
import pytest
import torch
from kernel_dispatch import as_arch
from kernel_testing.mla import E4M3, Case, Inputs
from mla_core import DecodeProblem, plan_splits
from mla_core.planning import SplitPlan
from mla_sm120 import config, launch, sources
from mla_sm120.config import Division

pytestmark = pytest.mark.skipif(sources.find_nvcc() is None, reason="needs nvcc")

CASES = [
    (Case((70, 0, 1, 33), page_size=16), 16, 8),
    (Case((370,), page_size=16), 16, 1),
    (Case((70, 200), "e4m3"), 16, 1),
    (Case((45, 130), "e4m3", 40, q_lens=(2, 3)), 64, 8),
    (Case((150, 45), "bf16", 20, 2), 32, 8),
    (Case((150, 40), "bf16", 64), 64, 1),
    (Case((100,), "fp16", 5, 2, 32), 16, 1),
]


def tensor_map(inputs: Inputs) -> Any:
    from ptx_emulator.tensor_map import DataType, Swizzle, TensorMap

    cache = inputs.kv_cache
    element_bytes = cache.element_size()
    key = launch.MapKey(cache.data_ptr(), cache.shape[0], cache.stride(0), cache.stride(1))
    dims, strides, box = launch.map_shape(key, inputs.case.page_size, element_bytes)
    return TensorMap(
        data_type=DataType.UINT8 if element_bytes == 1 else DataType.UINT16,
        address=key.address,
        dims=dims,
        strides=strides,
        box=box,
        element_strides=(1,) * len(dims),
        swizzle=list(Swizzle)[2 if element_bytes == 1 else 3],
    )


def launches(inputs: Inputs, arch: str, tile: int, splits: SplitPlan, options: tuple[str, ...]) -> Any:
    problem = DecodeProblem(**inputs.sizes)
    launcher = launch.Launcher(problem, Division(tile, splits), None, None, 0, pdl=True)
    workspace = torch.full((max(1, splits.workspace_bytes),), 255, dtype=torch.uint8)
    parameters = bytearray(launch.PARAMETER_BYTES)
    parameters[: launch.TENSOR_MAP_BYTES] = tensor_map(inputs).encode()
    query, _, tables, lengths = inputs.positional
    scales = (inputs.case.scale, 1.0)
    outputs = (inputs.out, inputs.lse, workspace)
    launcher._pack(parameters, query, tables, lengths, inputs.cum_seq_lens_q, *scales, *outputs)
    memory = dict(zip(("query", "cache", "tables", "lengths"), inputs.positional, strict=True))
    memory |= dict(zip(("out", "lse", "workspace"), outputs, strict=True))
    if inputs.cum_seq_lens_q is not None:
        memory["offsets"] = inputs.cum_seq_lens_q

    def one(unit: str, name: str, **sizes: Any) -> Any:
        ptx = ptx_emulator.compile_cuda(sources.CUDA_FOLDER / f"{unit}.cu", arch, options)
        return ptx_emulator.Launch(ptx, name, args=[bytes(parameters)], memory=memory, pdl=True, **sizes)

    grid = (-(-problem.rows // tile), splits.num_splits, problem.batch)
    unit = config.DTYPE_UNITS[problem.q_dtype]
    stream = [
        one(
            unit,
            f"mla_decode_m{tile}",
            grid=grid,
            block=config.block_threads(tile),
            shared_bytes=config.SMEM_BYTES,
        )
    ]
    if splits.num_splits > 1:
        grid, block = launch.combine_sizes(problem, splits.num_splits)
        name = "mla_combine" if tile == 16 else "mla_combine_many"
        stream.append(one("combine", name, grid=grid, block=block))
    return ptx_emulator.Launches(stream)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_120a-portable"])
@pytest.mark.parametrize(("case", "tile", "sm_count"), CASES, ids=lambda value: str(value))
def test_matches_float64_without_races(case: Case, tile: int, sm_count: int, arch: str) -> None:
    name, _, portable = arch.partition("-")
    if portable and case.dtype != "e4m3":
        pytest.skip("only one-byte elements have two transposes")
    assert as_arch(name).smem_optin_bytes >= config.SMEM_BYTES
    inputs = Inputs(case)
    splits = plan_splits(
        DecodeProblem(**inputs.sizes), sm_count=sm_count, tile_m=tile, tile_n=config.TILE_KEYS
    )
    options = ("-DMLA_PORTABLE_TRANSPOSE",) if portable else ()
    launches(inputs, name, tile, splits, options).run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("schedule", ["greedy", "late", "random"])
def test_schedules_agree(schedule: str) -> None:
    inputs = Inputs(Case((200, 33), "e4m3", 16, 2))
    splits = plan_splits(DecodeProblem(**inputs.sizes), sm_count=4, tile_m=32, tile_n=config.TILE_KEYS)
    launches(inputs, "sm_120a", 32, splits, ()).run(ptx_emulator.Options(schedule=schedule))
    inputs.check(inputs.out, inputs.lse)
    assert inputs.query.dtype is E4M3
