"""What the providers take and say, without a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_dispatch
import pytest
import torch
from kernel_dispatch import Arch, NoKernelError, Provider, as_arch
from mla_core import DecodeProblem, workspace_nbytes
from mla_sm120 import config, kernels, launch, load, provider, sources
from mla_sm120.config import Division
from mla_sm120.kernels import KERNELS

PROBLEM = DecodeProblem(batch=3, q_len=2, num_heads=16, page_size=64, max_seq_len=8192)


@pytest.fixture(autouse=True)
def _no_kernels_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "origins", {})


@pytest.mark.parametrize(("arch", "name"), [("sm_120a", "sm120"), ("sm_121a", "sm121"), ("sm_90a", "sm90")])
def test_explain_says_what_will_run(arch: str, name: str) -> None:
    report = kernel_dispatch.explain(PROBLEM, arch)
    assert report.chosen == name
    others = {"sm120", "sm121", "sm90"} - {name}
    for other in others:
        needs = r"is for sm_\d+ \(compute capability .*; CUDA 1.* or newer\)"
        assert re.search(rf"{other} declined 10 mla-sm120 \S+ {needs}", " ".join(str(report).split()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 8, "max_pages": None}, "page_size = 8"),
        ({"page_size": 48, "max_pages": None}, "page_size = 48"),
        ({"kv_lora_rank": 256}, "kv_lora_rank"),
        ({"batch": 70000}, "batch = 70000"),
    ],
    ids=str,
)
def test_declines_with_a_reason(changes: dict[str, int], reason: str) -> None:
    problem = replace(PROBLEM, **changes)
    with pytest.raises(NoKernelError, match=reason):
        kernel_dispatch.resolve(problem, as_arch("sm_120a"), "sm120")


@pytest.mark.parametrize(
    ("registered", "version", "expected"),
    [
        (provider.SM120, "12.6", "compute capability 12.0.*CUDA 12.8 or newer.*CUDA 12.6"),
        (provider.SM121, "12.9", "compute capability 12.1.*DGX Spark.*CUDA 13.0 or newer.*CUDA 12.9"),
        (provider.SM120, "12.8", None),
        (provider.SM121, "13.0", None),
        (provider.SM121, None, None),
    ],
    ids=lambda value: value.name if isinstance(value, Provider) else str(value),
)
def test_each_gpu_names_the_cuda_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
    registered: kernel_dispatch.Provider,
    version: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    reason = registered.supports(PROBLEM, as_arch(registered.archs[0]))
    assert reason is None if expected is None else re.search(expected, str(reason))


def test_neither_cubin_nor_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

    def missing() -> None:
        raise pathfinder.DynamicLibNotFoundError("libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    monkeypatch.setattr(load, "PACKAGED", tmp_path)
    with pytest.raises(RuntimeError, match="install a wheel that was built where nvcc is"):
        load.load_library.__wrapped__("combine", "sm_120a")


@pytest.mark.parametrize("refusal", load.REFUSALS)
def test_a_cubin_that_the_driver_refuses_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: str
) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    (tmp_path / "packaged").write_bytes(b"packaged")
    (tmp_path / "compiled").write_bytes(b"compiled")
    monkeypatch.setattr(load, "packaged_cubin", lambda unit, arch: tmp_path / "packaged")
    monkeypatch.setattr(load, "compiled_cubin", lambda unit, arch: tmp_path / "compiled")
    answers = {b"packaged": getattr(driver.CUresult, refusal), b"compiled": driver.CUresult.CUDA_SUCCESS}
    monkeypatch.setattr(driver, "cuLibraryLoadData", lambda image, *_: (answers[image], image))
    monkeypatch.setattr(load, "_nvrtc_version", lambda: (13, 1))
    monkeypatch.setenv(load.OPTIONS_VARIABLE, "-DMLA_PORTABLE_TRANSPOSE")
    assert load.load_library.__wrapped__("combine", "sm_120a") == b"compiled"
    assert load.origins == {("combine", "sm_120a"): "NVRTC 13.1 -DMLA_PORTABLE_TRANSPOSE"}
    answers[b"packaged"] = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        load.load_library.__wrapped__("combine", "sm_120a")
    answers[b"packaged"] = driver.CUresult.CUDA_SUCCESS
    assert load.load_library.__wrapped__("combine", "sm_120a") == b"packaged"
    assert load.origins == {("combine", "sm_120a"): "cubin of the wheel, unknown compiler"}


@pytest.mark.parametrize("refusal", load.REFUSALS)
@pytest.mark.parametrize("packaged", [True, False])
def test_a_driver_that_is_too_old_for_nvrtc_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: str, packaged: bool
) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    (tmp_path / "cubin").write_bytes(b"cubin")
    monkeypatch.setattr(load, "packaged_cubin", lambda unit, arch: tmp_path / "cubin" if packaged else None)
    monkeypatch.setattr(load, "compiled_cubin", lambda unit, arch: tmp_path / "cubin")
    monkeypatch.setattr(driver, "cuLibraryLoadData", lambda *_: (getattr(driver.CUresult, refusal), None))
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (driver.CUresult.CUDA_SUCCESS, 12080))
    monkeypatch.setattr(load, "_nvrtc_version", lambda: (13, 1))
    advice = (
        rf"supports CUDA 12\.8 and refuses combine for sm_120a as compiled by NVRTC 13\.1 \({refusal}\); "
        r"install cuda-bindings and NVRTC of CUDA 12\.8, or a driver for CUDA 13\.1 or newer"
    )
    with pytest.raises(RuntimeError, match=advice):
        load.load_library.__wrapped__("combine", "sm_120a")
    monkeypatch.setattr(load, "_nvrtc_version", lambda: (12, 8))  # which this driver is not too old for
    with pytest.raises(RuntimeError, match=f"^CUDA: {refusal}$"):
        load.load_library.__wrapped__("combine", "sm_120a")


def test_a_device_with_less_shared_memory_is_declined() -> None:
    arch = replace(Arch.from_name("sm_120a"), smem_optin_bytes=65536)
    assert "65536 bytes of shared memory" in str(config.objection(PROBLEM, arch))


def test_lengths_that_kernels_cannot_count_are_declined() -> None:
    arch = Arch.from_name("sm_121a")
    for longest, declined in ((config.MAX_SEQ_LEN, False), (config.MAX_SEQ_LEN + 1, True), (2**40, True)):
        objection = config.objection(replace(PROBLEM, max_seq_len=longest, max_pages=None), arch)
        assert ("max_seq_len" in str(objection)) == declined


@pytest.mark.parametrize("dtype", config.DTYPE_UNITS)
@pytest.mark.parametrize("name", ["sm_90a", "sm_120a", "sm_121a"])
def test_a_few_requests_more_than_sms_are_cut_by_the_tactic_for_it(name: str, dtype: torch.dtype) -> None:
    arch = Arch.from_name(name)
    sizes = {"batch": arch.sm_count + 3, "q_len": 1, "num_heads": 16, "page_size": 64, "max_seq_len": 1000}
    assert len(config.parts(DecodeProblem(**sizes, q_dtype=dtype), arch, "m16-tail")) == 2


@pytest.mark.parametrize(
    ("num_heads", "q_len", "tile"),
    [(1, 1, 16), (8, 2, 16), (16, 1, 16), (16, 2, 32), (96, 1, 64), (128, 4, 64)],
)
def test_the_tile_follows_the_rows(num_heads: int, q_len: int, tile: int) -> None:
    problem = replace(PROBLEM, num_heads=num_heads, q_len=q_len)
    names = config.tactics(problem)
    assert names[0] == f"m{tile}"
    assert len(set(names)) == (3 + len(config.CLUSTER_SIZES)) * len(config.TILE_ROWS)


def test_whole_tactics_do_not_split_and_the_workspace_fits_every_tactic() -> None:
    arch = as_arch("sm_120a")
    needed = []
    for name in config.tactics(PROBLEM):
        (part,) = config.parts(PROBLEM, arch, name)
        needed.append(part.division.partials.workspace_bytes)
        assert KERNELS.workspace_nbytes(PROBLEM, arch, name) == needed[-1]
        assert (part.division.num_splits == 1) == name.endswith(config.WHOLE)
    assert workspace_nbytes(PROBLEM, arch, "sm120") == max(needed) > min(needed) == 0


def sizes_of(parts: list[config.Part]) -> list[tuple[int, int, int, int]]:
    return [(x.first, x.problem.batch, x.division.num_splits, x.division.cluster_size) for x in parts]


@pytest.mark.parametrize(
    ("num_heads", "batch", "expected"),
    [
        (128, 67, [(0, 66, 1, 1), (66, 1, 64, 1)]),  # two tiles more than SMs
        (128, 200, [(0, 198, 1, 1), (198, 2, 32, 1)]),  # four more than three waves
        (16, 136, [(0, 132, 1, 1), (132, 4, 32, 1)]),
        (16, 68, [(0, 66, 2, 2), (66, 2, 64, 1)]),  # with two splits as many as SMs, and four more
        (128, 66, [(0, 66, 1, 1)]),  # whole waves alone
        (16, 66, [(0, 66, 2, 2)]),
        (16, 3, [(0, 3, 43, 1)]),  # none
    ],
)
def test_a_tail_tactic_divides_what_is_left_after_whole_waves(
    num_heads: int, batch: int, expected: list[tuple[int, int, int, int]]
) -> None:
    problem = replace(PROBLEM, q_len=1, num_heads=num_heads, batch=batch, max_seq_len=4096, max_pages=None)
    arch = as_arch("sm_90a")
    tail = config.parts(problem, arch, f"m{config.preferred_tile(problem)}-tail")
    assert sizes_of(tail) == expected
    assert all(x.problem == replace(problem, batch=x.problem.batch) for x in tail)
    assert max(x.division.partials.workspace_bytes for x in tail) <= workspace_nbytes(problem, arch, "sm90")


@pytest.mark.parametrize(
    ("arch", "num_heads", "batch", "max_seq_len", "batches"),
    [
        ("sm_90a", 128, 67, 4096, [66, 1]),
        ("sm_90a", 64, 68, 8192, [66, 2]),  # in two splits each, then two
        ("sm_90a", 16, 136, 1024, [132, 4]),
        ("sm_90a", 128, 128, 4096, [128]),  # nearly two waves
        ("sm_90a", 16, 200, 1024, [200]),  # 68 load at the copy bandwidth for half of them
        ("sm_90a", 16, 226, 32, [226]),  # nothing to gain that a launch does not cost
        ("sm_90a", 32, 80, 8192, [66, 14]),
        ("sm_121a", 16, 50, 8192, [48, 2]),
        ("sm_120a", 16, 180, 8192, [170, 10]),
    ],
)
def test_the_heuristic_cuts_a_call_where_that_should_be_faster(
    arch: str, num_heads: int, batch: int, max_seq_len: int, batches: list[int]
) -> None:
    sizes = {"num_heads": num_heads, "batch": batch, "max_seq_len": max_seq_len, "max_pages": None}
    problem = replace(PROBLEM, q_len=1, **sizes)
    chosen, *others = config.tactics(problem)
    parts = config.parts(problem, as_arch(arch), chosen)
    assert [part.problem.batch for part in parts] == batches
    named = [sizes_of(config.parts(problem, as_arch(arch), name)) for name in others]
    assert sizes_of(parts) in named


def test_more_tiles_of_a_request_than_sms_leave_no_tail() -> None:
    problem = replace(PROBLEM, q_len=80, num_heads=128)
    (part,) = config.parts(problem, as_arch("sm_90a"), "m64-tail")
    assert part.problem == problem


@pytest.mark.parametrize(
    ("num_heads", "batch", "max_seq_len", "num_splits", "cluster_size"),
    [
        (128, 32, 4096, 2, 2),  # a cluster, hence no combine kernel
        (128, 64, 8192, 1, 1),
        (64, 32, 8192, 4, 1),
        (128, 4, 8192, 16, 2),
        (32, 1, 65536, 116, 4),
        (16, 1, 8192, 128, 1),
        (16, 1, 1, 1, 1),
        (128, 60, 4096, 1, 1),  # 120 tiles on 132 SMs
        (128, 67, 4096, 4, 1),  # 134 tiles: not two waves, the second of two blocks
        (128, 96, 4096, 2, 2),
        (128, 40, 1024, 1, 1),  # too few keys to pay for what a block takes besides
        (16, 100, 8192, 1, 1),  # 100 SMs load at the copy bandwidth
        (16, 136, 8192, 8, 1),
        (16, 256, 8192, 1, 1),
        (16, 1024, 8192, 1, 1),
        (128, 200, 4096, 2, 2),  # a cluster stores no partial results, for which rows are too many
    ],
)
def test_splits_of_a_call_that_is_not_cut(
    num_heads: int, batch: int, max_seq_len: int, num_splits: int, cluster_size: int
) -> None:
    sizes = {"num_heads": num_heads, "batch": batch, "max_seq_len": max_seq_len, "max_pages": None}
    problem = replace(PROBLEM, q_len=1, **sizes)
    division = Division.of(problem, as_arch("sm_90a"), config.tactics(problem)[0])
    assert (division.num_splits, division.cluster_size) == (num_splits, cluster_size)


@pytest.mark.parametrize(
    ("arch", "num_heads", "batch", "num_splits", "cluster_size"),
    [
        ("sm_121a", 128, 64, 1, 1),  # 128 tiles on 48 SMs, whose memory the last 32 keep busy
        ("sm_121a", 16, 50, 2, 2),  # two tiles more than SMs
        ("sm_120a", 128, 64, 5, 1),  # 128 tiles on 170 SMs, where arithmetic is the bound
        ("sm_120a", 128, 96, 4, 1),  # 192 tiles
        ("sm_120a", 16, 200, 2, 2),
    ],
)
def test_splits_of_a_call_that_is_not_cut_on_sm120(
    arch: str, num_heads: int, batch: int, num_splits: int, cluster_size: int
) -> None:
    problem = replace(PROBLEM, q_len=1, num_heads=num_heads, batch=batch)
    division = Division.of(problem, as_arch(arch), config.tactics(problem)[0])
    assert (division.num_splits, division.cluster_size) == (num_splits, cluster_size)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_121a"])
def test_a_workspace_has_at_most_97_mib(arch: str) -> None:
    for batch, num_heads, q_len in itertools.product((1, 67, 80, 140, 300, 1024), (8, 64, 128), (1, 4)):
        for max_seq_len in (512, 8192, 1 << 20):
            sizes = {"q_len": q_len, "max_seq_len": max_seq_len, "max_pages": None}
            problem = replace(PROBLEM, batch=batch, num_heads=num_heads, **sizes)
            assert workspace_nbytes(problem, as_arch(arch)) <= 97 << 20


def whole_us(batch: int, num_heads: int, arch: Arch, q_dtype: torch.dtype = torch.bfloat16) -> float:
    """What 8,192 keys of every request are expected to take, one split each, by the preferred tile."""
    sizes = {"num_heads": num_heads, "batch": batch, "max_seq_len": 8192, "max_pages": None}
    problem = replace(PROBLEM, q_len=1, q_dtype=q_dtype, kv_dtype=None, **sizes)
    tile_rows = config.preferred_tile(problem)
    return Division.of(problem, arch, f"m{tile_rows}-whole").cost_us(problem, arch)


KEY_TILES = 8192 // config.TILE_KEYS


def test_one_block_alone_takes_its_own_time() -> None:
    arch = as_arch("sm_90a")
    assert whole_us(1, 16, arch) == pytest.approx(KEY_TILES * 0.75 + 4, rel=1e-3)
    assert whole_us(1, 64, arch) == pytest.approx(KEY_TILES * 1.45 + 13, rel=1e-3)
    assert whole_us(1, 64, arch, torch.float8_e4m3fn) == pytest.approx(KEY_TILES * 2.0 + 13, rel=1e-3)


def test_a_wave_that_fills_the_gpu_takes_as_long_as_memory() -> None:
    arch = replace(as_arch("sm_90a"), memory_gb_s=1000)
    us = 132 * 8192 * 576 * 2 / (1000e3 * config.MEMORY_FRACTION)
    assert us < whole_us(132, 16, arch) < us + 5
    # Both row tiles of 128 heads read the keys of their request once.
    assert us / 2 < whole_us(66, 128, arch) < us / 2 * 1.01 + 13


def test_a_block_that_finds_no_sm_free_takes_a_wave_of_its_own() -> None:
    arch = as_arch("sm_90a")
    assert whole_us(133, 16, arch) == pytest.approx(whole_us(132, 16, arch) + whole_us(1, 16, arch))


@pytest.mark.parametrize(("arch", "tflops_per_sm"), [("sm_120a", 209.5 / 170), ("sm_121a", 92 / 48)])
def test_a_block_takes_no_less_than_its_arithmetic_on_sm120(arch: str, tflops_per_sm: float) -> None:
    us = 2 * 64 * 8192 * (576 + 512) / tflops_per_sm / 1e6
    assert whole_us(1, 64, as_arch(arch)) == pytest.approx(us + 13, rel=0.01)
    half = max(us / 2, KEY_TILES * 1.45)
    assert whole_us(1, 64, as_arch(arch), torch.float8_e4m3fn) == pytest.approx(half + 13, rel=0.01)


@pytest.mark.parametrize("name", [f"-c{size}" for size in config.CLUSTER_SIZES])
@pytest.mark.parametrize("max_seq_len", [1, 40, 70, 130, 300, 8192])
def test_clusters_are_whole_and_no_larger_than_the_keys(max_seq_len: int, name: str) -> None:
    problem = replace(PROBLEM, max_seq_len=max_seq_len, max_pages=None)
    division = Division.of(problem, as_arch("sm_120a"), f"m32{name}")
    assert division.cluster_size in config.CLUSTER_SIZES
    assert division.num_splits == division.num_partials * division.cluster_size
    assert division.num_splits <= division.splits.key_tiles
    assert division.kernel_name == ("mla_decode_m32" if division.cluster_size == 1 else "mla_merge_m32")


@pytest.mark.parametrize(("tactic", "cluster_size"), [("m64-c4", 4), ("m64-c1", 1)])
def test_a_launch_has_its_cluster(tactic: str, cluster_size: int) -> None:
    problem = replace(PROBLEM, batch=1, num_heads=64, max_seq_len=65536, max_pages=None)
    division = Division.of(problem, as_arch("sm_90a"), tactic)
    launcher = launch.Launcher(problem, division, "decode", "combine", 0, pdl=True)
    (decode, _), (combine, _) = launcher._threads.own.configs
    by_name = {attribute.id.name: attribute.value for attribute in decode.attrs}
    assert "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION" in by_name
    clusters = [value.clusterDim for name, value in by_name.items() if name.endswith("CLUSTER_DIMENSION")]
    assert [(size.x, size.y, size.z) for size in clusters] == [(1, cluster_size, 1)] * (cluster_size > 1)
    assert decode.gridDimY % cluster_size == 0
    assert combine.numAttrs == 1


def test_a_cache_is_cut_into_chunks_of_64_columns() -> None:
    key = launch.MapKey(address=0, num_pages=7, page_stride=64 * 640, key_stride=640)
    dims, strides, box = launch.map_shape(key, 64, 2)
    assert dims == (64, 64, 9, 7)
    assert strides == (640 * 2, 128, 64 * 640 * 2)
    assert box == (64, 16, 9, 1)


OUT_KINDS = {"Bf16": torch.bfloat16, "Fp16": torch.float16, "E4m3": torch.float8_e4m3fn}


def test_parameters_fill_the_struct() -> None:
    assert launch.TENSOR_MAP_BYTES + launch.PARAMETERS.size <= launch.PARAMETER_BYTES
    text = (sources.CUDA_FOLDER / "params.h").read_text()
    assert f"sizeof(DecodeParams) == {launch.PARAMETER_BYTES}" in text
    header = (sources.CUDA_FOLDER / "config.h").read_text()
    assert f"kMaxSmemBytes = {config.SMEM_BYTES};" in header
    assert f"kChunkElements = {launch.CHUNK_ELEMENTS};" in header
    types = ", ".join(f"kOut{kind} = {launch.OUT_TYPES[dtype]}" for kind, dtype in OUT_KINDS.items())
    assert f"enum OutType : int32 {{ {types} }};" in text
    assert f"kBoxKeys = {config.BOX_KEYS};" in header
    assert f"kTileKeys = {config.TILE_KEYS};" in header
    combine = (sources.CUDA_FOLDER / "combine.cu").read_text()
    assert f"kCombineWarps = {launch.COMBINE_WARPS};" in combine
    assert f"kQuarters = {config.COMBINE_ITEMS_PER_ROW};" in combine


def test_the_combine_kernel_follows_the_grid() -> None:
    problem = replace(PROBLEM, batch=1, q_len=1)
    (blocks, _, _), (lanes, warps, items) = launch.combine_sizes(problem, num_partials=64)
    assert (lanes, warps * items) == (32, launch.COMBINE_WARPS)
    assert blocks * items == problem.rows * config.COMBINE_ITEMS_PER_ROW
    assert launch.combine_name(problem, 64, sm_count=blocks) == "mla_combine"
    assert launch.combine_name(problem, 64, sm_count=blocks - 1) == "mla_combine_many"


@pytest.mark.parametrize("name", ["sm_120a", "sm_120", "sm_90"])
def test_kernels_are_compiled_ahead_where_there_is_no_such_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "find_cubin", lambda unit, arch: found.append((unit, arch)))
    target, device = f"{name.removesuffix('a')}a", torch.device("cuda")
    launch = KERNELS.prepare(PROBLEM, as_arch(name), device, "m16-whole")
    assert found == [("decode_bf16", target)]
    with pytest.raises(RuntimeError, match=f"was prepared for {target}, and cuda is no such GPU"):
        launch(*range(10))
    found.clear()
    KERNELS.prepare(
        replace(PROBLEM, q_dtype=torch.float8_e4m3fn, kv_dtype=torch.float8_e4m3fn),
        as_arch(name),
        device,
        "m16-c1",
    )
    assert found == [("combine", target), ("decode_e4m3", target)]


class Hook(SimpleNamespace):
    """Stands for hatchling's, of which the module needs the class alone."""


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the build hook; skipped where it is not beside its package."""
    path = Path(__file__).parents[2] / "packages" / "mla-sm120" / "build_cubins.py"
    interface = SimpleNamespace(BuildHookInterface=Hook)
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("build_cubins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CubinBuildHook


@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize(
    "script",
    ["echo sm_90; exit $(($# - 1))", "echo no compiler >&2; exit 1"],
    ids=["refuses the sources", "does not run"],
)
def test_an_nvcc_that_does_not_compile_the_sources_is_passed_over(
    build_hook: Any, script: str, asked_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("NVCC", raising=False)
    if asked_for:
        monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    warnings: list[str] = []
    hook = build_hook(app=SimpleNamespace(display_warning=warnings.append))
    build_data: dict[str, Any] = {"force_include": {}}
    if asked_for:
        with pytest.raises(RuntimeError):
            hook.initialize("standard", build_data)
    else:
        hook.initialize("standard", build_data)
        assert len(warnings) == 1
        assert "the wheel holds no cubins" in warnings[0]
    hook.finalize("standard", build_data, "")
    assert build_data == {"force_include": {}}
