"""What only a GPU shows of the speculative functions: one launch, no wait, CUDA graphs, offsets past 2^31."""

from functools import partial

import gdn_mtp
import pytest
import torch
from gdn_support import BF16, DEVICE, FP32, assert_same_bits
from speculative_support import History, Setup, arguments, index_tensor, int32
from test_speculative_kernel import has_kernels
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
SETUP = Setup(K=64, V=64)  # what the kernels take


def calls(history, slots, **window):
    """Each function on `slots`, with memory for what it returns."""
    inputs, accepted = arguments(history, slots, 4), int32([0] * len(slots))
    states = torch.empty_like(history.pool[: len(slots)])
    return {
        "verify": partial(
            gdn_mtp.verify, *inputs, accepted, **window, fold="always", output=torch.empty_like(inputs[2])
        ),
        "commit": partial(gdn_mtp.commit, *inputs[7:], accepted),
        "materialize": partial(gdn_mtp.materialize, *inputs[7:], accepted, states=states),
    }


@needs_gpu
@pytest.mark.parametrize("mode", ["verify", "commit", "materialize"])
def test_a_call_is_one_launch(mode):
    call = calls(History(SETUP), [4, -1, 0])[mode]
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    assert len(kernels) == 1, kernels


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["verify", "commit", "materialize"])
def test_no_call_waits_for_the_device(mode, backend):
    call = calls(History(SETUP), [4, -1, 0], num_tokens=int32([4, 0, 2]))[mode]
    call(backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_captured_once_replayed_with_other_acceptance(backend):
    setup = Setup(K=64, V=64)
    history, replayed = History(setup, backend), History(setup, backend)
    slots = [4, -1, 0]
    *tokens, pool, indices, cache = arguments(replayed, slots, 4)
    accepted = int32([0, 0, 0])
    run = partial(gdn_mtp.verify, *tokens, pool, indices, cache, accepted, backend=backend)
    run()
    cache.reset_slots(index_tensor([4, 0]))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            output = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, counts in enumerate(([0, 0, 0], [4, 0, 2], [1, 0, 4], [0, 0, 3], [4, 0, 4], [4, 0, 4])):
        expected = history.verify(slots, 4, step, {"num_accepted": int32(counts)}, out=BF16)
        for name, x in zip("qkvab", tokens[:5], strict=True):
            x.copy_(setup.tokens(3, 4, step)[name])
        accepted.copy_(int32(counts))
        graph.replay()
        assert_same_bits(output, expected, f"output of step {step}")
    assert_same_bits(pool, history.pool, "pool")


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_plans_are_captured_and_replayed(backend):
    setup = Setup(K=64, V=64)
    slots = [4, -1, 0]
    history, captured = History(setup, backend), History(setup, backend)
    sizes = {"B": 3, "H": setup.H, "HV": setup.HV, "K": 64, "V": 64, "capacity": 16}
    verify, commit, materialize = (
        gdn_mtp.plan(
            gdn_mtp.SpeculativeProblem(**sizes, mode=mode, T=4 if mode == "verify" else 0), DEVICE, backend
        )
        for mode in ("verify", "commit", "materialize")
    )
    inputs = arguments(captured, slots, 4)
    none, accepted = int32([0, 0, 0]), int32([0, 0, 0])
    output, states = torch.empty_like(inputs[2]), torch.empty_like(captured.pool[:3])

    def run():
        verify.run(*inputs, none, output=output)
        materialize.run(*inputs[7:], accepted, states=states)
        commit.run(*inputs[7:], accepted)

    saved = captured.pool.clone()
    run()
    captured.pool.copy_(saved)
    captured.cache.reset_slots(index_tensor([4, 0]))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, counts in enumerate(([0, 0, 0], [4, 0, 1], [2, 0, 4])):
        expected = history.verify(slots, 4, step, {"num_accepted": none}, out=BF16)
        history.commit(slots, {"num_accepted": int32(counts)})
        for name, x in zip("qkvab", inputs[:5], strict=True):
            x.copy_(setup.tokens(3, 4, step)[name])
        accepted.copy_(int32(counts))
        graph.replay()
        assert_same_bits(output, expected, f"output of step {step}")
        assert_same_bits(captured.pool, history.pool, f"pool after step {step}")
        assert_same_bits(states[[0, 2]], history.pool[[4, 0]], f"states of step {step}")


@needs_gpu
def test_slots_are_copied_and_reset_in_a_graph():
    history, replayed = History(SETUP), History(SETUP)
    src, dst, gone = index_tensor([-1, -1]), index_tensor([-1, -1]), index_tensor([-1])

    def move():
        replayed.cache.copy_slots(src, dst, replayed.pool)
        replayed.cache.reset_slots(gone)

    for each in (history, replayed):
        each.verify([0, 1, 2], 4, 0)
    move()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()
    for sources, targets, forgotten in (([0, 1], [1, 0], -1), ([2, -1], [5, 3], 0), ([5, 1], [4, 2], 5)):
        src.copy_(index_tensor(sources))
        dst.copy_(index_tensor(targets))
        gone.fill_(forgotten)
        graph.replay()
        history.cache.copy_slots(index_tensor(sources), index_tensor(targets), history.pool)
        history.cache.reset_slots(index_tensor([forgotten]))
        assert_same_bits(replayed.pool, history.pool, "pool")
        for name, tensor in replayed.cache.state_dict().items():
            assert_same_bits(tensor, history.cache.state_dict()[name], name)


@needs_gpu
def test_offsets_past_two_to_the_31_elements():
    """The last slot of a pool of 2^32 elements, whose cache has 2^31 of updates, and that of a small one."""
    H, HV, D, capacity = 1, 32, 64, 32
    setup = Setup(pool_size=1, H=H, HV=HV, K=D, V=D, max_tokens=4, capacity=capacity, state=BF16)
    inputs, states = {**setup.tokens(1, 4, 0), **setup.heads()}, setup.pool()
    accepted, results = int32([3]), []
    for pool_size in (3, 2**31 // (capacity * HV * D) + 8):
        pool = torch.empty((pool_size, HV, D, D), dtype=BF16, device=DEVICE)
        pool[-1] = states[0]
        cache = gdn_mtp.SpeculativeCache(
            pool_size, H, HV, D, D, max_tokens=4, capacity=capacity, device=DEVICE
        )
        named = {"state_pool": pool, "state_indices": index_tensor([pool_size - 1]), "cache": cache}
        gdn_mtp.verify(**inputs, **named, num_accepted=None)
        gdn_mtp.verify(**inputs, **named, num_accepted=accepted, fold="full")
        output = gdn_mtp.verify(**inputs, **named, num_accepted=accepted, fold="always")
        materialized = gdn_mtp.materialize(**named, num_accepted=accepted)
        gdn_mtp.commit(**named, num_accepted=accepted)
        results.append((output, materialized, pool[-1].clone()))
    assert cache.updates.numel() > 2**31
    for what, x, y in zip(("output", "states", "pool"), *results, strict=True):
        assert_same_bits(x, y, what)


@pytest.mark.skipif(not has_kernels(), reason="needs a GPU of SM90 or newer")
@pytest.mark.parametrize("state", [FP32, BF16])
def test_same_bits_alone_as_in_a_batch_and_again(state):
    setup = Setup(pool_size=9, K=64, V=64, state=state)

    def run(rows):
        history, slots = History(setup), index_tensor(list(range(9)))[rows]
        for step in range(4):
            tokens = {name: x[rows] for name, x in setup.tokens(9, 4, step).items()}
            named = {"state_pool": history.pool, "state_indices": slots, "cache": history.cache}
            accepted = int32([(slot + step) % 5 if step else 0 for slot in range(9)])[rows]
            output = gdn_mtp.verify(
                **tokens, **setup.heads(), **named, num_accepted=accepted, fold=4, backend="cute"
            )
        return output, gdn_mtp.materialize(**named, num_accepted=None, backend="cute")

    together = run(slice(None))
    for what, x, y in zip(("output", "states"), run(slice(None)), together, strict=True):
        assert_same_bits(x, y, what)
    for row in (0, 5, 8):
        for what, x, y in zip(("output", "states"), run(slice(row, row + 1)), together, strict=True):
            assert_same_bits(x, y[row : row + 1], f"{what} of request {row} alone")
