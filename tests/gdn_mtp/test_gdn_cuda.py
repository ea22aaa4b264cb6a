"""What only a GPU shows: no wait for the device, CUDA graphs, the bound on temporaries."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gdn_mtp
import pytest
import torch
from gdn_mtp.torch_kernel import CHUNK_BYTES
from gdn_support import BACKEND, DEVICE, FP32, NAN, Case, assert_same_bits, slots_tensor
from kernel_dispatch import ArgumentError, debug
from kernel_testing import poisoned

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
CASE = Case(B=3, T=2)


def mtp(pool, indices, case=CASE, **options):
    inputs = case.inputs()
    options = {"disable_state_update": False, "backend": "torch", **options}
    return lambda: gdn_mtp.gated_delta_rule_mtp(
        **inputs, initial_state=pool, initial_state_indices=indices, **options
    )[0]


@needs_gpu
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
@pytest.mark.parametrize("mode", ["plain", "buffer", "scatter", "write"])
def test_no_call_waits_for_the_device(mode, backend):
    options = {
        "plain": {},
        "buffer": {"intermediate_states_buffer": poisoned((3, 2, CASE.HV, CASE.V, CASE.K), FP32, DEVICE)},
        "scatter": {"ssm_state_indices": torch.tensor([[4, 1], [2, 2], [-1, 0]], device=DEVICE)},
        "write": {"output_state_indices": slots_tensor(3, 5, -1)},
    }[mode]
    call = mtp(CASE.states(6), slots_tensor(4, -1, 0), **options, backend=backend)
    call()  # plans it, and loads the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_captured_graph_follows_its_inputs():
    pool, expected_pool, indices = CASE.states(6), CASE.states(6), slots_tensor(4, -1, 0)
    call = mtp(pool, indices)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for slots in ((1, 2, -1), (-1, -1, -1), (5, 0, 3)):
        pool.copy_(expected_pool)
        indices.copy_(slots_tensor(*slots))
        graph.replay()
        expected = mtp(expected_pool, slots_tensor(*slots))()
        assert_same_bits(output, expected, "output")
        assert_same_bits(pool, expected_pool, "pool")


@needs_gpu
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
def test_a_captured_plan_follows_its_inputs(backend):
    sizes = {name: getattr(CASE, name) for name in ("B", "T", "H", "HV", "K", "V")}
    problem = gdn_mtp.GatedDeltaRuleProblem(**sizes, index_dtype=torch.int64, tensor_scale=True)
    plan = gdn_mtp.plan(problem, DEVICE, backend)
    inputs, pool, indices = CASE.inputs(), CASE.states(6), slots_tensor(4, -1, 0)
    scale, output = torch.ones(1, device=DEVICE), torch.empty_like(inputs["v"])
    run = partial(plan.run, **inputs, state=pool, initial_state_indices=indices, scale=scale, output=output)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step, slots in enumerate(((1, 2, -1), (-1, -1, -1), (5, 0, 3)), start=1):
        for name, values in CASE.inputs(seed=step).items():
            inputs[name].copy_(values)
        pool.copy_(CASE.states(6, seed=step))
        indices.copy_(slots_tensor(*slots))
        scale.fill_(0.5 * step)
        output.fill_(NAN)
        graph.replay()
        expected_pool = CASE.states(6, seed=step)
        expected, _ = gdn_mtp.gated_delta_rule_mtp(
            **CASE.inputs(seed=step),
            initial_state=expected_pool,
            initial_state_indices=slots_tensor(*slots),
            scale=torch.full((1,), 0.5 * step, device=DEVICE),
            disable_state_update=False,
            backend=backend,
        )
        assert_same_bits(output, expected, "output")
        assert_same_bits(pool, expected_pool, "pool")


@needs_gpu
def test_a_thread_that_has_not_used_cuda_yet():
    """Kernels are launched by the driver, for which such a thread has no context."""
    pool, expected_pool, indices = CASE.states(6), CASE.states(6), slots_tensor(4, -1, 0)
    output = poisoned((CASE.B, CASE.T, CASE.HV, CASE.V), CASE.io, DEVICE)
    expected = mtp(expected_pool, indices, backend="auto")()
    call = mtp(pool, indices, backend="auto", output=output)
    with ThreadPoolExecutor(max_workers=1) as fresh:
        fresh.submit(call).result()
    torch.cuda.synchronize()
    assert_same_bits(output, expected, "output")
    assert_same_bits(pool, expected_pool, "pool")


@needs_gpu
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_temporaries_stay_within_their_bound(state):
    case = Case(B=64, T=2, H=16, HV=32, K=128, V=128, state=state)
    call = mtp(case.states(64), torch.arange(64, device=DEVICE), case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = call()
    assert torch.cuda.max_memory_allocated() - before - output.nbytes <= 4 * CHUNK_BYTES


@needs_gpu
def test_debug_mode_reads_the_indices():
    call = mtp(CASE.states(6), slots_tensor(4, 4, 0))
    with debug(), pytest.raises(ArgumentError, match="initial_state_indices: slot 4"):
        call()
