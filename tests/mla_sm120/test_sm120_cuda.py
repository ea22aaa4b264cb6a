"""The kernels on a GPU against float64: every path, CUDA graphs, streams, same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import mla_core
import pytest
import torch
from kernel_dispatch import ArgumentError, as_arch, resolve
from kernel_testing import poison_, poisoned
from kernel_testing.mla import (
    E4M3,
    FP16,
    Case,
    Inputs,
    check_graph_replays,
    check_new_thread,
    check_streams,
)
from mla_core import DecodeProblem, plan_splits
from mla_core.plan import Plan, plan_selection
from mla_sm120 import config
from mla_sm120.kernels import launcher

BACKENDS = {"sm_90": "sm90", "sm_120": "sm120", "sm_121": "sm121"}
ARCH = as_arch(None)
BACKEND = BACKENDS.get(ARCH.base, "")
pytestmark = pytest.mark.skipif(not BACKEND, reason="needs a GPU of SM90, SM120 or SM121")

LENGTHS = (0, 1, 127, 128, 1000, 8192)
MATRIX = [
    Case(LENGTHS, dtype, num_heads, q_len, page_size)
    for dtype, page_size, num_heads, q_len in itertools.product(
        ("bf16", "fp16", "e4m3"), (16, 32, 64, 128), (1, 8, 16, 32, 64, 96, 128), (1, 2, 4)
    )
]
BATCHES = [
    Case(tuple((0, 1, 33, 127, 300)[request % 5] for request in range(batch)), dtype, num_heads)
    for dtype, num_heads, batch in itertools.product(("bf16", "fp16", "e4m3"), (16, 128), (1, 3, 64, 1024))
]
BATCHES += [
    Case((LENGTHS * 11)[:64], dtype, num_heads, q_len)
    for dtype, num_heads, q_len in itertools.product(("bf16", "fp16", "e4m3"), (16, 128), (1, 4))
]
ALONE = [
    Case((length,), dtype, num_heads, q_len)
    for dtype, num_heads, q_len, length in itertools.product(
        ("bf16", "fp16", "e4m3"), (8, 16, 128), (1, 4), LENGTHS[1:]
    )
]
MOST_SPLITS = [
    Case((65536,), dtype, num_heads)
    for dtype, num_heads in itertools.product(("bf16", "fp16", "e4m3"), (8, 32, 64, 128))
]
OF_ONE_LENGTH = [
    Case((length,) * batch, dtype)
    for dtype, (batch, length) in itertools.product(
        ("bf16", "fp16", "e4m3"), ((2, 8192), (16, 1000), (256, 128), (1024, 1000))
    )
]
RAGGED = [
    Case((9, 130, 2, 70), q_lens=(2, 1, 4, 0)),
    Case((300,), "e4m3", 128, q_lens=(3,)),
    Case((0, 5, 64, 4000), "fp16", 7, page_size=16, q_lens=(1, 5, 2, 1)),
]


def lengths_of(batch: int) -> tuple[int, ...]:
    return tuple((300, 0, 1000, 1, 33)[request % 5] for request in range(batch))


CUT = lengths_of(ARCH.sm_count + 3)  # with 16 heads, in two parts by CUT_TACTIC
CUT_TACTIC = "m16-tail"


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def plan_of(inputs: Inputs, tactic: str | None = None) -> Plan:
    problem, device = DecodeProblem(**inputs.sizes), torch.device("cuda", torch.cuda.current_device())
    return plan_selection(resolve(problem, device, BACKEND, tactic), problem, device)


def cut_plan(inputs: Inputs) -> Plan:
    assert len(config.parts(DecodeProblem(**inputs.sizes), ARCH, CUT_TACTIC)) == 2
    return plan_of(inputs, CUT_TACTIC)


@pytest.mark.parametrize("case", MATRIX + BATCHES + ALONE + MOST_SPLITS + OF_ONE_LENGTH + RAGGED, ids=str)
def test_matches_float64(case: Case) -> None:
    inputs = Inputs(case, "cuda")
    inputs.run(plan_of(inputs))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize(
    "tactic",
    [
        f"m{tile}{end}"
        for tile in config.TILE_ROWS
        for end in ("", *(f"-c{size}" for size in config.CLUSTER_SIZES), config.WHOLE, config.TAIL)
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_every_tactic(dtype: str, tactic: str) -> None:
    inputs = Inputs(Case((500, 0, 77, 1), dtype, 24, 3), "cuda")
    inputs.run(plan_of(inputs, tactic))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("ragged", [False, True], ids=["batch", "ragged"])
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("splits", [1, 2], ids=["whole", "pairs"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_requests_left_after_whole_waves(dtype: str, splits: int, num_heads: int, ragged: bool) -> None:
    tile = max(16, min(64, num_heads))
    batch = ARCH.sm_count // (num_heads // tile * splits) + 3
    q_lens = tuple(request % 2 for request in range(batch)) if ragged else None
    inputs = Inputs(Case(lengths_of(batch), dtype, num_heads, q_lens=q_lens), "cuda")
    parts = config.parts(DecodeProblem(**inputs.sizes), ARCH, f"m{tile}-tail")
    assert [part.problem.batch for part in parts] == [batch - 3, 3]
    assert parts[0].division.num_splits == splits
    inputs.run(plan_of(inputs, f"m{tile}-tail"))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FP16, E4M3], ids=str)
def test_output_dtypes_and_scales_on_the_device(dtype: str, out_dtype: torch.dtype) -> None:
    inputs = Inputs(Case((300, 31), dtype, 16, 2, out_dtype=out_dtype), "cuda")
    scales = {"softmax_scale": torch.tensor([inputs.case.scale]), "output_scale": torch.tensor([-2.5])}
    mla_core.decode(
        *inputs.positional,
        out=inputs.out,
        lse=inputs.lse,
        return_lse=True,
        backend=BACKEND,
        **{name: scale.cuda() for name, scale in scales.items()},
    )
    inputs.check(inputs.out, inputs.lse, output_scale=-2.5)


def test_absent_pages() -> None:
    inputs = Inputs(Case((300, 130, 64), num_heads=4, q_len=2, absent=((0, 1), (1, 2), (2, 0))), "cuda")
    inputs.run(plan_of(inputs))
    inputs.check(inputs.out, inputs.lse)
    assert inputs.lse[2].isneginf().all()  # its only page is absent


@pytest.mark.parametrize("tactic", ["m16", "m16-whole", "m64-whole", "m16-c2", "m64-c2"])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float8_e4m3fn), ("e4m3", torch.float16)],
)
def test_strided_tensors(dtype: str, out_dtype: torch.dtype, tactic: str) -> None:
    """Rows of the query and the output are not aligned, those of the cache are to 16 bytes."""
    inputs = Inputs(Case((300, 5), dtype, 8, 2, out_dtype=out_dtype, gap=3), "cuda")
    compact = inputs.kv_cache
    inputs.kv_cache = poisoned((len(compact), 70, 640), compact.dtype, "cuda")[:, :64, :576]
    inputs.kv_cache.view(torch.uint8).copy_(compact.view(torch.uint8))
    inputs.run(plan_of(inputs, tactic))
    inputs.check(inputs.out, inputs.lse)


@pytest.mark.parametrize(
    "name", ["query", "kv_cache", "block_tables", "seq_lens", "out", "lse", "workspace", "softmax_scale"]
)
def test_a_tensor_that_is_not_on_the_gpu_is_named(name: str) -> None:
    inputs = Inputs(Case((70, 5)), "cuda")
    plan = plan_of(inputs)
    arguments = {
        **dict(zip(("query", "kv_cache", "block_tables", "seq_lens"), inputs.positional, strict=True)),
        "out": inputs.out,
        "lse": inputs.lse,
        "workspace": torch.empty(max(1, plan.workspace_nbytes), dtype=torch.uint8, device="cuda"),
        "softmax_scale": torch.tensor([inputs.case.scale], device="cuda"),
    }
    plan.run(**arguments)
    inputs.check(inputs.out, inputs.lse)
    poison_(inputs.out)
    with pytest.raises(ArgumentError, match=f"^{name}: on cpu"):
        plan.run(**{**arguments, name: arguments[name].cpu()})
    assert inputs.out.isnan().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_plan_is_for_its_gpu_alone() -> None:
    here, other = torch.cuda.current_device(), 1 - torch.cuda.current_device()
    inputs = Inputs(Case((300, 5)), "cuda")
    with torch.cuda.device(other):
        there = Inputs(Case((300, 5)), "cuda")
        plan = plan_of(there)
        there.run(plan)
        there.check(there.out, there.lse)
        with pytest.raises(ArgumentError, match=f"query: on cuda:{here} with cuda:{other} current"):
            inputs.run(plan)
    with pytest.raises(ArgumentError, match=f"query: on cuda:{here} with cuda:{here} current"):
        inputs.run(plan)
    with pytest.raises(ArgumentError, match=f"query: on cuda:{other} with cuda:{here} current"):
        there.run(plan)
    with torch.cuda.stream(torch.cuda.Stream(device=other)):  # makes its GPU the current one
        there.run(plan)
        there.kv_cache = inputs.kv_cache
        with pytest.raises(ArgumentError, match=f"kv_cache: on cuda:{here}, expected cuda:{other}"):
            there.run(plan)


@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_same_bits_run_to_run_alone_and_in_a_batch(dtype: str) -> None:
    case = Case((1000, 0, 1, 300, 8000) * 4, dtype, 20, 2)
    inputs = Inputs(case, "cuda")
    plan = plan_of(inputs, "m64-whole")
    inputs.run(plan)
    inputs.check(inputs.out, inputs.lse)
    first = inputs.out.clone()
    inputs.run(plan)
    assert torch.equal(inputs.out.view(torch.uint8), first.view(torch.uint8))
    for request in range(len(case.lengths)):
        alone = inputs.alone(request)
        alone.run(plan_of(alone, "m64-whole"))
        assert torch.equal(alone.out.view(torch.uint8)[0], first.view(torch.uint8)[request])


def check_same_bits(plan: Plan, inputs: Inputs, workspace: torch.Tensor | None = None) -> None:
    inputs.run(plan, workspace)
    inputs.check(inputs.out, inputs.lse)
    first = [tensor.view(torch.uint8).clone() for tensor in (inputs.out, inputs.lse)]
    for _ in range(20):
        poison_(inputs.out)
        inputs.run(plan, workspace)
        again = (inputs.out.view(torch.uint8), inputs.lse.view(torch.uint8))
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("tactic", [None, "m16-c1", "m32-c2", "m64-c4", "m64-c8", "m64-whole"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_same_bits_however_splits_are_merged(dtype: str, tactic: str | None) -> None:
    inputs = Inputs(Case((8192, 70, 0, 3000), dtype, 64), "cuda")
    check_same_bits(plan_of(inputs, tactic), inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_same_bits_of_a_call_that_is_cut(dtype: str) -> None:
    inputs = Inputs(Case(CUT, dtype, 16), "cuda")
    plan = cut_plan(inputs)
    check_same_bits(plan, inputs, torch.full((plan.workspace_nbytes,), 255, dtype=torch.uint8, device="cuda"))


@pytest.mark.parametrize(("cluster_size", "num_partials"), [(1, 3), (2, 1), (2, 4), (8, 2)])
@pytest.mark.parametrize("tile", config.TILE_ROWS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "e4m3"])
def test_same_bits_alone_as_in_a_batch_with_as_many_splits(
    dtype: str, tile: int, cluster_size: int, num_partials: int
) -> None:
    def run_divided(inputs: Inputs) -> None:
        sizes = {**inputs.sizes, "max_seq_len": 8192}  # a request alone is divided as in the batch
        problem, device = DecodeProblem(**sizes), torch.device("cuda", torch.cuda.current_device())
        whole = plan_splits(problem, sm_count=1, tile_m=tile, tile_n=config.TILE_KEYS)
        splits = replace(whole, num_splits=cluster_size * num_partials)
        division = config.Division(tile, splits, cluster_size)
        workspace = torch.full(
            (max(1, division.partials.workspace_bytes),), 255, dtype=torch.uint8, device=device
        )
        scales, outputs = (inputs.case.scale, 1.0), (inputs.out, inputs.lse, workspace)
        launcher(problem, division, ARCH, device)(*inputs.positional, None, *scales, *outputs)

    batch = Inputs(Case((3000, 145, 0, 8192), dtype, 20, 2), "cuda")
    run_divided(batch)
    batch.check(batch.out, batch.lse)
    for request in range(len(batch.case.lengths)):
        alone = batch.alone(request)
        run_divided(alone)
        assert torch.equal(alone.out.view(torch.uint8)[0], batch.out.view(torch.uint8)[request])
        assert torch.equal(alone.lse[0], batch.lse[request])


@pytest.mark.parametrize(
    ("lengths", "q_len", "make_plan"),
    [(((3000, 0, 67), (5, 2900, 64)), 2, plan_of), ((CUT, CUT[::-1]), 1, cut_plan)],
    ids=["one", "cut"],
)
def test_graph_replays_with_changed_lengths_and_tables(
    lengths: tuple[tuple[int, ...], ...], q_len: int, make_plan: Callable[[Inputs], Plan]
) -> None:
    cases = [Case(given, num_heads=16, q_len=q_len, seed=seed) for seed, given in enumerate(lengths)]
    check_graph_replays(make_plan, cases)


@pytest.mark.parametrize(
    ("lengths", "make_plan"), [((5000, 70, 900), plan_of), (CUT, cut_plan)], ids=["one", "cut"]
)
def test_two_streams_at_once(lengths: tuple[int, ...], make_plan: Callable[[Inputs], Plan]) -> None:
    check_streams(make_plan, [Case(lengths, num_heads=16, seed=seed) for seed in (1, 2)])


def test_a_thread_that_has_not_used_cuda_yet() -> None:
    check_new_thread(plan_of, Case((300, 70)))
