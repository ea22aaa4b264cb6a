"""The PTX of the kernels, run on a CPU by shared/ptx-emulator with its checks for races, against float64."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ptx_emulator
import pytest
import torch
from kernel_dispatch import as_arch
from kernel_testing.mla import BF16, E4M3, FP16, HEAD_DIM, Case, Inputs
from mla_core import DecodeProblem, plan_splits
from mla_core.planning import SplitPlan
from mla_core.specs import DecodeTensors
from mla_sm120 import config, launch, sources
from mla_sm120.config import Division, Part

pytestmark = pytest.mark.skipif(sources.find_nvcc() is None, reason="needs nvcc")

CASES = [
    (Case((70, 0, 1, 33), page_size=16), 16, 8),
    (Case((370,), page_size=16), 16, 1),
    (Case((70, 300), "e4m3", page_size=256), 16, 1),
    (Case((45, 130), "e4m3", 40, q_lens=(2, 3)), 64, 8),
    (Case((150, 45), "bf16", 20, 2), 32, 8),
    (Case((150, 40), "bf16", 64), 64, 1),
    (Case((100,), "fp16", 5, 2, 32), 16, 1),
]
SCHEDULES = ("fair", "greedy", "late", "greedy-late", "random")
MANY_SPLITS = 140  # more than the warps of a combine block load at once: eight times sixteen


Scales = tuple[float | torch.Tensor, float | torch.Tensor]


def hand_over_case(dtype: str, tile: int) -> Case:
    """Seven steps of the softmax, which is more than the ring holds, on the longest request.

    The last of its boxes is partial, a page is absent, one request has one key, one an even number of steps,
    one no key, one no token. Two row tiles, of which the second is partly empty; rows of the same tile see
    different keys. Logits are so large that maxima grow after the first step as well.
    """
    step_keys = 32 if dtype == "e4m3" else 16
    lengths = (6 * step_keys + 5, 1, 4 * step_keys, 40, 0)
    heads = tile // 2 - 1
    return Case(lengths, dtype, heads, q_lens=(3, 1, 1, 0, 2), page_size=32, scale=0.5, absent=((0, 2),))


HAND_OVERS = [(dtype, tile) for dtype in ("bf16", "fp16", "e4m3") for tile in config.TILE_ROWS]


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


def splits_of(inputs: Inputs, tile: int, sm_count: int) -> SplitPlan:
    problem = DecodeProblem(**inputs.sizes)
    return plan_splits(problem, sm_count=sm_count, tile_m=tile, tile_n=config.TILE_KEYS)


def launches(
    inputs: Inputs,
    arch: str,
    tile: int,
    splits: SplitPlan,
    options: tuple[str, ...] = (),
    sm_count: int = 1,
    cluster_size: int = 1,
    scales: Scales | None = None,
) -> Any:
    problem, division = DecodeProblem(**inputs.sizes), Division(tile, splits, cluster_size)
    return launches_of_parts(inputs, arch, [Part(0, problem, division)], options, sm_count, scales)


def launches_of_parts(
    inputs: Inputs,
    arch: str,
    parts: list[Part],
    options: tuple[str, ...] = (),
    sm_count: int = 1,
    scales: Scales | None = None,
) -> Any:
    nbytes = max(part.division.partials.workspace_bytes for part in parts)
    workspace = torch.full((max(1, nbytes),), 255, dtype=torch.uint8)
    scales = scales or (inputs.case.scale, 1.0)
    arguments = (arch, workspace, options, sm_count, scales)
    return ptx_emulator.Launches([x for part in parts for x in launches_of(inputs, part, *arguments)])


def launches_of(
    inputs: Inputs,
    part: Part,
    arch: str,
    workspace: torch.Tensor,
    options: tuple[str, ...],
    sm_count: int,
    scales: Scales,
) -> list[Any]:
    problem, division, tile = part.problem, part.division, part.division.tile_rows
    launcher = launch.Launcher(problem, division, None, None, 0, pdl=True, first_request=part.first)
    parameters = bytearray(launch.PARAMETER_BYTES)
    parameters[: launch.TENSOR_MAP_BYTES] = tensor_map(inputs).encode()
    outputs = (inputs.out, inputs.lse, workspace)
    arguments = DecodeTensors(*inputs.positional, inputs.cum_seq_lens_q, *scales, *outputs)
    launcher._pack(parameters, arguments)
    memory = dict(zip(("query", "cache", "tables", "lengths"), inputs.positional, strict=True))
    memory |= dict(zip(("out", "lse", "workspace"), outputs, strict=True))
    named_scales = zip(("softmax_scale", "output_scale"), scales, strict=True)
    memory |= {name: scale for name, scale in named_scales if isinstance(scale, torch.Tensor)}
    if inputs.cum_seq_lens_q is not None:
        memory["offsets"] = inputs.cum_seq_lens_q

    def one(unit: str, name: str, **sizes: Any) -> Any:
        ptx = ptx_emulator.compile_cuda(sources.CUDA_FOLDER / f"{unit}.cu", arch, options)
        return ptx_emulator.Launch(ptx, name, args=[bytes(parameters)], memory=memory, pdl=True, **sizes)

    grid = (-(-problem.rows // tile), division.num_splits, problem.batch)
    unit = config.DTYPE_UNITS[problem.q_dtype]
    stream = [
        one(
            unit,
            division.kernel_name,
            grid=grid,
            cluster=(1, division.cluster_size, 1),
            block=config.block_threads(tile),
            shared_bytes=config.SMEM_BYTES,
        )
    ]
    if division.num_partials > 1:
        grid, block = launch.combine_sizes(problem, division.num_partials)
        name = launch.combine_name(problem, division.num_partials, sm_count)
        stream.append(one("combine", name, grid=grid, block=block))
    return stream


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_120a-portable"])
@pytest.mark.parametrize(("case", "tile", "sm_count"), CASES, ids=lambda value: str(value))
def test_matches_float64_without_races(case: Case, tile: int, sm_count: int, arch: str) -> None:
    name, _, portable = arch.partition("-")
    if portable and case.dtype != "e4m3":
        pytest.skip("only one-byte elements have two transposes")
    assert as_arch(name).smem_optin_bytes >= config.SMEM_BYTES
    inputs = Inputs(case)
    splits = splits_of(inputs, tile, sm_count)
    options = ("-DMLA_PORTABLE_TRANSPOSE",) if portable else ()
    launches(inputs, name, tile, splits, options, sm_count).run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("on_device", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(
    ("cluster_size", "num_partials"), [(1, 1), (1, 3), (2, 1)], ids=["whole", "combine", "merge"]
)
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("bf16", BF16), ("fp16", E4M3), ("e4m3", FP16), ("e4m3", E4M3)], ids=str
)
def test_scales_and_rows_that_are_not_aligned(
    dtype: str,
    out_dtype: torch.dtype,
    tile: int,
    cluster_size: int,
    num_partials: int,
    gap: int,
    on_device: bool,
) -> None:
    """A negative output scale, and rows of the query and the output that lie 3 elements apart."""
    inputs = Inputs(Case((150, 1, 40), dtype, 5, 2, out_dtype=out_dtype, gap=gap))
    inputs.kv_cache = inputs.kv_cache.contiguous()  # of which TMA takes no such rows
    splits = replace(splits_of(inputs, tile, sm_count=1), num_splits=cluster_size * num_partials)
    floats = (inputs.case.scale, -2.5)
    scales = tuple(map(torch.tensor, floats)) if on_device else floats
    stream = launches(inputs, "sm_120a", tile, splits, cluster_size=cluster_size, scales=scales)
    stream.run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse, output_scale=-2.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dtype", "tile"), HAND_OVERS)
def test_hand_overs_under_every_schedule(dtype: str, tile: int, schedule: str) -> None:
    inputs = Inputs(hand_over_case(dtype, tile))
    whole = splits_of(inputs, tile, sm_count=1)
    launches(inputs, "sm_120a", tile, whole).run(ptx_emulator.Options(schedule=schedule))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_gathered_partials_under_every_schedule(arch: str, dtype: str, schedule: str) -> None:
    inputs = Inputs(hand_over_case(dtype, 64))
    splits = replace(splits_of(inputs, 64, sm_count=1), num_splits=2)
    launches(inputs, arch, 64, splits).run(ptx_emulator.Options(schedule=schedule))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize(("dtype", "tile"), HAND_OVERS)
def test_every_lane_may_arrive(dtype: str, tile: int) -> None:
    inputs = Inputs(hand_over_case(dtype, tile))
    whole = splits_of(inputs, tile, sm_count=1)
    launches(inputs, "sm_90a", tile, whole, ("-DMLA_EVERY_LANE_ARRIVES",)).run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("num_splits", [2, 3])
@pytest.mark.parametrize(("dtype", "tile"), HAND_OVERS)
def test_splits_of_odd_lengths_and_without_keys(dtype: str, tile: int, num_splits: int) -> None:
    # Logits so small that every key counts, absent ones too; with e4m3 half a step is absent.
    inputs = Inputs(replace(hand_over_case(dtype, tile), scale=HEAD_DIM**-0.5, page_size=16))
    splits = replace(splits_of(inputs, tile, sm_count=1), num_splits=num_splits)
    options = ptx_emulator.Options(schedule="random", seed=num_splits)
    launches(inputs, "sm_120a", tile, splits).run(options)
    inputs.check(inputs.out, inputs.lse)


def merge_case(dtype: str, tile: int) -> Case:
    """Splits with several steps, one, or no key; a token that sees no key; none; no token; an absent page."""
    lengths, q_lens = (530, 45, 2, 0, 100), (1, 2, 3, 1, 0)
    heads = tile // 2 - 1
    return Case(lengths, dtype, heads, q_lens=q_lens, page_size=32, absent=((0, 2),))


@pytest.mark.parametrize(("cluster_size", "num_partials"), [(2, 1), (2, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize(("dtype", "tile"), HAND_OVERS)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_clusters_merge_their_splits(
    arch: str, dtype: str, tile: int, cluster_size: int, num_partials: int
) -> None:
    inputs = Inputs(merge_case(dtype, tile))
    splits = replace(splits_of(inputs, tile, sm_count=1), num_splits=cluster_size * num_partials)
    options = ptx_emulator.Options(schedule="random", seed=cluster_size)
    launches(inputs, arch, tile, splits, cluster_size=cluster_size).run(options)
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cluster_size", [2, 8], ids="cluster-{}".format)
@pytest.mark.parametrize("tile", config.TILE_ROWS)
def test_merging_under_every_schedule(tile: int, cluster_size: int, schedule: str) -> None:
    inputs = Inputs(merge_case("bf16", tile))
    splits = replace(splits_of(inputs, tile, sm_count=1), num_splits=cluster_size)
    options = ptx_emulator.Options(schedule=schedule)
    launches(inputs, "sm_90a", tile, splits, cluster_size=cluster_size).run(options)
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize(("cluster_size", "num_partials"), [(1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize(("dtype", "tile"), [("bf16", 64), ("fp16", 16), ("e4m3", 32)])
def test_same_bits_alone_as_in_a_batch_with_as_many_splits(
    dtype: str, tile: int, cluster_size: int, num_partials: int
) -> None:
    def run(inputs: Inputs) -> None:
        splits = replace(splits_of(inputs, tile, sm_count=1), num_splits=cluster_size * num_partials)
        launches(inputs, "sm_120a", tile, splits, cluster_size=cluster_size).run(ptx_emulator.Options())

    batch = Inputs(Case((300, 145, 530), dtype, tile - 1, page_size=32))
    run(batch)
    batch.check(batch.out, batch.lse)
    for i in range(len(batch.case.lengths)):
        alone = batch.alone(i)
        run(alone)
        assert torch.equal(alone.out.view(torch.uint8)[0], batch.out.view(torch.uint8)[i])
        assert torch.equal(alone.lse[0], batch.lse[i])


@pytest.mark.parametrize("q_lens", [None, (1, 2, 0, 2, 2, 1, 2)], ids=["batch", "ragged"])
@pytest.mark.parametrize(
    ("dtype", "tactic", "splits", "longest"),
    [
        ("bf16", "m32-tail", 1, 300),
        ("e4m3", "m16-tail", 1, 300),
        ("fp16", "m64-tail", 1, 300),
        ("bf16", "m16-tail", 2, 520),
    ],
)
def test_requests_left_after_whole_waves(
    dtype: str, tactic: str, splits: int, longest: int, q_lens: tuple[int, ...] | None
) -> None:
    inputs = Inputs(Case((40, 70, 33, 1, 130, 0, longest), dtype, 8, 2, page_size=32, q_lens=q_lens))
    arch = replace(as_arch("sm_120a"), sm_count=5 * splits)
    whole, rest = config.parts(DecodeProblem(**inputs.sizes), arch, tactic)
    assert (whole.division.num_splits, rest.first) == (splits, whole.problem.batch)
    assert rest.division.num_splits > 1
    launches_of_parts(inputs, "sm_120a", [whole, rest]).run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("sm_count", [1, 1000], ids=["mla_combine_many", "mla_combine"])
def test_more_splits_than_a_combine_block_loads_at_once(sm_count: int) -> None:
    inputs = Inputs(Case((MANY_SPLITS * config.TILE_KEYS - 5, 33), num_heads=3))
    splits = replace(splits_of(inputs, 16, sm_count=1), num_splits=MANY_SPLITS)
    launches(inputs, "sm_120a", 16, splits, sm_count=sm_count).run(ptx_emulator.Options())
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
@pytest.mark.parametrize("unit", config.DTYPE_UNITS.values())
def test_lanes_meet_before_one_of_them_arrives(unit: str, arch: str) -> None:
    # Only this test sees it: on the emulator a warp's accesses are in the order of its program anyway.
    ptx = ptx_emulator.compile_cuda(sources.CUDA_FOLDER / f"{unit}.cu", arch)
    events = re.findall(r"(?m)^\s*(?:@\S+\s+)?(\S+)", ptx)
    last, arrivals = "", 0
    for event in events:
        if re.match(r"(ld|st)\.shared|ldmatrix|bar\.warp\.sync", event):
            last = event
        elif re.match(r"mbarrier\.arrive\.shared", event):
            arrivals += 1
            assert last.startswith("bar.warp.sync"), f"arrival {arrivals} after {last}"
    kernels = 2 * len(config.TILE_ROWS)  # with splits merged in clusters, and without
    assert arrivals >= 4 * kernels  # logits, empty, weights, and full of the last keys
