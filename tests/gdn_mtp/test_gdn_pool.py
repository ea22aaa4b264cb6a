"""State pools: padding, index tensors, intermediate states, and slots that must keep their bits."""

import gdn_mtp
import pytest
import torch
from gdn_mtp.problem import INDEX_DTYPES
from gdn_mtp.torch_kernel import store_slots
from gdn_support import (
    BACKEND,
    BF16,
    DEVICE,
    FP32,
    NAN,
    Case,
    assert_result,
    assert_same_bits,
    slots_tensor,
)
from kernel_testing import poisoned, snapshot_untouched

CASE = Case(B=4, T=3, H=2, HV=4, K=64, V=64)  # what the provider `cute` takes too
SLOTS = 9


def run(case, inputs, pool, indices, *, update=True, backend=BACKEND, **arguments):
    return gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=not update,
        backend=backend,
        **arguments,
    )[0]


def pool_with_nan_outside(case, named, slots=SLOTS):
    pool = case.states(slots)
    unnamed = [slot for slot in range(slots) if slot not in named]
    pool[unnamed] = NAN
    return pool


@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_padding_touches_nothing_and_gives_zero(index_dtype, state):
    case = Case(**{**vars(CASE), "state": state})
    inputs, pool = case.inputs(), pool_with_nan_outside(case, [7, 2])
    for name in ("q", "k", "v", "a", "b"):
        inputs[name][[1, 3]] = NAN  # whatever a padded row holds
    indices = slots_tensor(7, -1, 2, -5, dtype=index_dtype)
    expected = case.reference(inputs, pool, initial_state_indices=indices)
    unchanged = snapshot_untouched(pool, [7, 2])
    output = run(case, inputs, pool, indices)
    unchanged()
    assert torch.equal(output[[1, 3]], torch.zeros_like(output[[1, 3]]))
    assert_result(case, expected, output, pool, q=inputs["q"])


@pytest.mark.parametrize("options", ["none", "buffer", "scatter", "write"])
def test_padding_alone_changes_nothing_else(options):
    inputs, pool = CASE.inputs(), CASE.states(SLOTS)
    pool[1:] = NAN
    unchanged = snapshot_untouched(pool, [])
    indices = slots_tensor(-1, -1, -1, -1)
    buffer = poisoned((CASE.B, CASE.T, CASE.HV, CASE.V, CASE.K), FP32, DEVICE)
    buffer_unchanged = snapshot_untouched(buffer, [])
    arguments = {
        "none": {},
        "buffer": {"intermediate_states_buffer": buffer},
        "scatter": {"ssm_state_indices": torch.arange(12, device=DEVICE).view(4, 3) % SLOTS},
        "write": {"output_state_indices": slots_tensor(0, 0, 3, 4)},
    }[options]
    output = run(CASE, inputs, pool, indices, **arguments)
    assert (output == 0).all()
    unchanged()
    buffer_unchanged()


def test_skipped_stores_repeat_the_store_of_a_named_slot():
    pool = torch.full((5, 1, 2, 2), NAN, device=DEVICE)
    states = torch.arange(12.0, device=DEVICE).view(3, 1, 2, 2)
    unchanged = snapshot_untouched(pool, [3])
    store_slots(pool, slots_tensor(-1, 3, -7), states)
    unchanged()
    assert_same_bits(pool[3], states[1], "slot 3")


def test_pool_may_be_a_strided_view():
    named = [3, 0, 8, 5]
    memory = poisoned((SLOTS, CASE.HV + 1, CASE.V, CASE.K + 16), FP32, DEVICE)
    pool = memory[:, 1:, :, : CASE.K]
    pool[named] = CASE.states(len(named))
    inputs, indices = CASE.inputs(), slots_tensor(*named)
    expected = CASE.reference(inputs, pool, initial_state_indices=indices)
    unchanged = snapshot_untouched(memory, named)
    output = run(CASE, inputs, pool, indices)
    unchanged()
    assert memory[:, 0].isnan().all()
    assert memory[..., CASE.K :].isnan().all()
    assert_result(CASE, expected, output, pool, q=inputs["q"])


def test_slots_lie_past_two_to_the_31_elements():
    case = Case(B=1, T=2, H=1, HV=1, K=32, V=32, state=BF16)
    stride = 2**31 + 64
    memory = torch.empty(
        stride + case.V * case.K, dtype=BF16
    )  # 4 GiB of address space, of which one page is used
    pool = memory.as_strided((2, 1, case.V, case.K), (stride, case.V * case.K, case.K, 1))
    state = case.states(1).cpu()
    pool[1] = state[0]
    inputs = {name: x.cpu() for name, x in case.inputs().items()}
    expected = case.reference(inputs, state)
    output = run(case, inputs, pool, torch.tensor([1]), backend="torch")
    assert_result(case, expected, output, pool[1:], q=inputs["q"])


@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.parametrize("update", [True, False])
def test_intermediate_states_buffer(update, state):
    case = Case(**{**vars(CASE), "state": state})
    named = [6, 4, 1]
    inputs, pool = case.inputs(), pool_with_nan_outside(case, named)
    indices = slots_tensor(6, -1, 4, 1)
    memory = poisoned((case.B + 2, case.T + 1, case.HV, case.V, case.K + 8), state, DEVICE)
    buffer = memory[..., : case.K]
    expected = case.reference(inputs, pool, initial_state_indices=indices, update_state=update)
    unchanged = snapshot_untouched(pool, named if update else [])
    buffer_unchanged = snapshot_untouched(memory, [0, 2, 3], "intermediate_states_buffer")
    output = run(case, inputs, pool, indices, update=update, intermediate_states_buffer=buffer)
    unchanged()
    buffer_unchanged()
    assert memory[:, case.T :].isnan().all()
    assert memory[..., case.K :].isnan().all()
    filled = buffer[: case.B, : case.T]
    assert_result(case, expected, output, pool, intermediate_states=filled, q=inputs["q"])
    if update:
        assert_same_bits(pool[6], buffer[0, case.T - 1], "final state")


def test_intermediate_states_of_a_state_per_request():
    inputs, state = CASE.inputs(), CASE.states(CASE.B)
    expected = CASE.reference(inputs, state, update_state=False)
    buffer = poisoned((CASE.B, CASE.T, CASE.HV, CASE.V, CASE.K), FP32, DEVICE)
    before = state.clone()
    output, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(
        **inputs, state=state, intermediate_states_buffer=buffer, disable_state_update=True, backend=BACKEND
    )
    assert_same_bits(state, before, "state")
    assert_result(CASE, expected, output, state, intermediate_states=buffer, q=inputs["q"])


@pytest.mark.parametrize("state", [FP32, BF16])
def test_scatter_to_pool_slots(state):
    case = Case(**{**vars(CASE), "state": state})
    inputs, pool = case.inputs(), pool_with_nan_outside(case, [2, 5, 0], slots=14)
    indices = slots_tensor(2, 5, -1, 0)
    scatter = torch.tensor([[2, 7, 8], [1, -1, 3], [9, 2, 5], [12, 13, -1]], device=DEVICE)
    expected = case.reference(inputs, pool, initial_state_indices=indices, ssm_state_indices=scatter)
    unchanged = snapshot_untouched(pool, [2, 7, 8, 1, 3, 12, 13])  # row 2 is padding; 5 and 0 are only read
    output = run(case, inputs, pool, indices, ssm_state_indices=scatter.int())  # int32 beside int64 is fine
    unchanged()
    assert_result(case, expected, output, pool, q=inputs["q"])


@pytest.mark.parametrize("name", ["output_state_indices", "ssm_state_indices"])
@pytest.mark.parametrize("padding", [-(2**32), torch.iinfo(torch.int64).min])
def test_slots_of_64_bits_stay_padding_beside_those_of_32(name, padding):
    """Their low 32 bits name slot 0."""
    inputs, pool = CASE.inputs(), pool_with_nan_outside(CASE, [2, 4, 5, 7])
    indices = slots_tensor(2, 4, 5, 7, dtype=torch.int32)
    writes = torch.full((CASE.B, CASE.T), padding, device=DEVICE)
    unchanged = snapshot_untouched(pool, [])
    run(CASE, inputs, pool, indices, **{name: writes if name == "ssm_state_indices" else writes[:, 0]})
    unchanged()


def test_write_indices():
    inputs, pool = CASE.inputs(), pool_with_nan_outside(CASE, [2, 4, 5])
    indices = slots_tensor(2, 2, 4, 5)  # two requests continue from one prefix
    writes = slots_tensor(0, 7, -1, 5, dtype=torch.int32)
    expected = CASE.reference(inputs, pool, initial_state_indices=indices, output_state_indices=writes)
    unchanged = snapshot_untouched(pool, [0, 7, 5])
    output = run(CASE, inputs, pool, indices, output_state_indices=writes)
    unchanged()
    assert_result(CASE, expected, output, pool, q=inputs["q"])


def test_update_disabled_leaves_the_pool():
    inputs, pool = CASE.inputs(), CASE.states(SLOTS)
    indices = slots_tensor(3, 3, 3, 1)  # sharing a slot is fine where nobody writes
    expected = CASE.reference(inputs, pool, initial_state_indices=indices, update_state=False)
    unchanged = snapshot_untouched(pool, [])
    output = run(CASE, inputs, pool, indices, update=False)
    unchanged()
    assert_result(CASE, expected, output, pool, q=inputs["q"])


def test_pretranspose_on_a_pool_is_mtp():
    inputs, pool = CASE.inputs(), CASE.states(SLOTS)
    other = pool.clone()
    indices, writes = slots_tensor(1, -1, 3, 4), slots_tensor(1, 0, 8, -1)
    output, returned = gdn_mtp.gated_delta_rule_decode_pretranspose(
        **inputs,
        state=None,
        initial_state=pool,
        initial_state_indices=indices,
        output_state_indices=writes,
        backend=BACKEND,
    )
    assert returned is pool
    assert_same_bits(output, run(CASE, inputs, other, indices, output_state_indices=writes), "output")
    assert_same_bits(pool, other, "pool")


def test_rollback_to_an_accepted_token_continues_as_if_the_rest_had_not_been():
    """What intermediate states are for: three drafts, two accepted, then one more token."""
    case = Case(B=2, T=3)
    inputs, pool = case.inputs(), case.states(4)
    indices = slots_tensor(3, 0)
    sequential, accepted = pool.clone(), 2
    buffer = poisoned((case.B, case.T, case.HV, case.V, case.K), FP32, DEVICE)
    run(case, inputs, pool, indices, update=False, intermediate_states_buffer=buffer)
    pool[indices] = buffer[:, accepted - 1]
    for t in range(accepted):
        token = {name: x[:, t : t + 1] if x.dim() > 1 else x for name, x in inputs.items()}
        run(case, token, sequential, indices)
    torch.testing.assert_close(pool, sequential, rtol=0, atol=1e-5)


def test_a_pool_made_in_inference_mode_is_written_outside_of_it():
    pool, indices = CASE.states(SLOTS), slots_tensor(3, -1, 0, 7)
    with torch.inference_mode():
        kept = pool.clone()
    assert kept.is_inference()
    output = run(CASE, CASE.inputs(), pool, indices)
    assert_same_bits(run(CASE, CASE.inputs(), kept, indices), output, "output")
    assert_same_bits(kept, pool, "pool")
