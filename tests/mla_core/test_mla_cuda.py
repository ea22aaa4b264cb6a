"""What only a GPU shows: no synchronisation, and CUDA graphs replayed with changed lengths and tables."""

import pytest
import torch
from kernel_testing import poison_, poisoned
from mla_cases import BF16, E4M3, FP16, Case, Inputs, assert_decoded, bits
from mla_core import DecodeProblem, decode, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = [
    Case((300, 0, 67), q_len=2, num_heads=16),
    Case((70, 1, 513), num_heads=128, page_size=1, dtype=FP16),
    Case((300, 5), num_heads=8, q_lens=(1, 3), dtype=E4M3),
]
INVARIANT = [
    Case((1000,) * 7, q_len=2, num_heads=128),
    Case((600, 0, 1, 300) * 8, num_heads=1),
    Case((300, 70) * 65, num_heads=16),
]


@pytest.fixture(autouse=True)
def exact_float32_products():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def on_gpu(inputs: Inputs) -> Inputs:
    moved = (
        None if tensor is None else tensor.cuda() for tensor in (*inputs.positional, inputs.cum_seq_lens_q)
    )
    return Inputs(*moved, inputs.max_q_len)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle_without_synchronising(case: Case) -> None:
    inputs = on_gpu(case.inputs())
    scale = torch.tensor([case.scale], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = decode(
            *inputs.positional, softmax_scale=scale, return_lse=True, backend="torch", **inputs.ragged
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_decoded(out, lse, case.inputs(), softmax_scale=case.scale)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_same_bits_run_to_run_alone_and_in_a_batch(case: Case) -> None:
    query, kv_cache, block_tables, seq_lens = on_gpu(case.inputs()).positional
    options = {"softmax_scale": case.scale, "max_seq_len": max(case.lengths), "backend": "torch"}
    out = decode(query, kv_cache, block_tables, seq_lens, **options)
    assert torch.equal(bits(decode(query, kv_cache, block_tables, seq_lens, **options)), bits(out))
    for request in range(len(case.lengths)):
        one = slice(request, request + 1)
        alone = decode(query[one], kv_cache, block_tables[one], seq_lens[one], **options)
        assert torch.equal(bits(alone[0]), bits(out[request]))


def test_graph_replays_with_changed_lengths_tables_and_scales() -> None:
    first, second = Case((300, 0, 67), q_len=2, seed=1), Case((5, 290, 64), q_len=2, seed=2)
    static = on_gpu(first.inputs())
    max_pages = static.block_tables.shape[1]
    problem = DecodeProblem(
        batch=3,
        q_len=2,
        num_heads=16,
        page_size=64,
        max_seq_len=300,
        max_pages=max_pages,
        return_lse=True,
        softmax_scale_is_tensor=True,
    )
    out, lse = poisoned((3, 2, 16, 512), BF16, "cuda"), poisoned((3, 2, 16), torch.float32, "cuda")
    scale = torch.tensor([0.1], device="cuda")
    decode_plan = plan(problem, "cuda", "torch")
    workspace = torch.empty(decode_plan.workspace_nbytes, dtype=torch.uint8, device="cuda")

    def run() -> None:
        decode_plan.run(*static.positional, softmax_scale=scale, out=out, lse=lse, workspace=workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case, value in ((first, 0.1), (second, 0.05)):
        inputs = case.inputs()
        for target, source in zip(static.positional, inputs.positional, strict=True):
            target.copy_(source)
        scale.fill_(value)
        poison_(out)
        poison_(lse)
        graph.replay()
        assert_decoded(out, lse, inputs, softmax_scale=value)
