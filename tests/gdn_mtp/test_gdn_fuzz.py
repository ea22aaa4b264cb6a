"""Random shapes, strides, dtypes, index sets and options against the oracle."""

import gdn_mtp
import pytest
import torch
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_mtp.specs import state_rows
from gdn_support import BF16, DEVICE, FP16, FP32, Case, assert_result
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_dispatch import explain
from kernel_testing import poisoned, snapshot_untouched

FLOATS = st.sampled_from([BF16, FP16, FP32])
STATES = st.sampled_from([FP32, BF16])
KERNEL_DIMS = st.sampled_from([64, 128, 256])  # K and V that the provider `cute` takes, and no others
OTHER_DIMS = st.tuples(st.sampled_from([1, 8, 33, 64]), st.sampled_from([1, 16, 40]))
HEAD_DIMS = st.tuples(KERNEL_DIMS, KERNEL_DIMS) | OTHER_DIMS
TOKENS = st.integers(1, 5) | st.integers(6, 16)
ANY_GAP = (0, 1, 3, 8)
STATE_GAPS = st.sampled_from([(0, 8), ANY_GAP])  # with the first, the rows of a state are 16-byte aligned


@st.composite
def cases(draw, tokens=TOKENS):
    key_dim, value_dim = draw(HEAD_DIMS)
    drawn_tokens = draw(tokens)
    large = drawn_tokens > 5 or max(key_dim, value_dim) > 128  # then fewer states, for the time it takes
    heads = draw(st.integers(1, 1 if large else 3))
    return Case(
        B=draw(st.integers(1, 3 if large else 5)),
        T=drawn_tokens,
        H=heads,
        HV=heads * draw(st.integers(1, 2 if large else 4)),
        K=key_dim,
        V=value_dim,
        io=draw(FLOATS),
        gates=draw(FLOATS),
        bias=draw(STATES),
        state=draw(STATES),
        l2norm=draw(st.booleans()),
        scale=draw(st.none() | st.floats(-4, 4, width=32)),
    )


def some_skipped(draw, slots):
    """`slots` with some made negative: padding, or states that are not written."""
    skipped = draw(st.lists(st.booleans(), min_size=slots.numel(), max_size=slots.numel()))
    return slots.masked_fill(torch.tensor(skipped, device=DEVICE).view(slots.shape), -1)


def strided(draw, tensor, gaps=ANY_GAP):
    """The same values in memory of another order and with gaps; the last dimension keeps stride 1."""
    order = draw(st.permutations(range(tensor.dim() - 1)))
    gap = draw(st.sampled_from(gaps))
    sizes = [tensor.shape[dim] for dim in order]
    memory = poisoned((*sizes, tensor.shape[-1] + gap), tensor.dtype, DEVICE)
    inverse = [order.index(dim) for dim in range(len(order))]
    view = memory[..., : tensor.shape[-1]].permute(*inverse, len(order))
    return view.copy_(tensor)


@pytest.mark.parametrize("mode", ["update", "frozen", "write", "buffer", "scatter"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_mtp(mode, data):
    draw = data.draw
    case = draw(cases())
    inputs = case.inputs(seed=draw(st.integers(0, 9)))
    inputs = {name: strided(draw, x) if name not in ("A_log", "dt_bias") else x for name, x in inputs.items()}
    slots = case.B * (case.T + 1) + 2
    gaps = draw(STATE_GAPS)
    pool = strided(draw, case.states(slots), gaps)
    order = draw(st.permutations(range(slots)))
    reads = some_skipped(draw, torch.tensor(order[: case.B], device=DEVICE))
    free = torch.tensor(order[case.B : case.B * (case.T + 1)], device=DEVICE).view(case.B, case.T)

    arguments, semantics, touched, buffer = {}, {}, reads, None
    if mode == "frozen":
        touched = torch.tensor([-1])
    elif mode == "write":
        writes = some_skipped(draw, free[:, 0])
        touched = writes.masked_fill(reads < 0, -1)
        arguments = semantics = {"output_state_indices": writes}
    elif mode == "buffer":
        shape = (case.B + draw(st.integers(0, 1)), case.T + draw(st.integers(0, 1)), *pool.shape[1:])
        buffer = strided(draw, poisoned(shape, case.state, DEVICE), gaps)
        arguments = {"intermediate_states_buffer": buffer}
    elif mode == "scatter":
        writes = some_skipped(draw, free)
        touched = writes.masked_fill((reads < 0)[:, None], -1)
        arguments = semantics = {"ssm_state_indices": writes}

    semantics = {"initial_state_indices": reads, "update_state": mode != "frozen", **semantics}
    expected = case.reference(inputs, pool, **semantics)
    unchanged = snapshot_untouched(pool, touched.flatten().tolist())
    output, _ = gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=pool,
        initial_state_indices=reads.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        disable_state_update=mode == "frozen",
        output=strided(draw, poisoned((case.B, case.T, case.HV, case.V), draw(FLOATS), DEVICE)),
        **case.options,
        **arguments,
    )
    unchanged()
    filled = None if buffer is None else buffer[: case.B, : case.T]
    assert_result(case, expected, output, pool, intermediate_states=filled, q=inputs["q"])


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_states_per_request(data):
    draw = data.draw
    k_major = draw(st.booleans())
    case = draw(cases(tokens=st.just(1) if k_major else TOKENS))
    layout = "kv" if k_major else "vk"
    function = gdn_mtp.gated_delta_rule_decode if k_major else gdn_mtp.gated_delta_rule_decode_pretranspose
    inputs = {name: strided(draw, x) if x.dim() > 1 else x for name, x in case.inputs().items()}
    state = strided(draw, case.states(case.B, layout), draw(STATE_GAPS))
    expected = case.reference(inputs, state, state_layout=layout)
    output, _ = function(**inputs, state=state, **case.options)
    assert_result(case, expected, output, state, q=inputs["q"], layout=layout)


def test_some_cases_are_for_the_kernels():
    """With "auto" a GPU then compares the kernels, not PyTorch alone."""
    chosen, sizes = [], set()

    @given(st.data())
    @settings(max_examples=80, deadline=None, derandomize=True)
    def draw_problems(data):
        case = data.draw(cases())
        problem = GatedDeltaRuleProblem(
            **{name: getattr(case, name) for name in ("B", "T", "H", "HV", "K", "V")},
            state_dtype=case.state,
            state_rows=state_rows(strided(data.draw, case.states(2), data.draw(STATE_GAPS))),
        )
        chosen.append(explain(problem, "sm_90a").chosen)
        if chosen[-1] == "cute":
            sizes.update({f"K{case.K}", f"V{case.V}", "one chunk" if case.T <= 8 else "two chunks"})

    draw_problems()
    assert sizes == {"K64", "K128", "K256", "V64", "V128", "V256", "one chunk", "two chunks"}
    assert min(chosen.count("cute"), chosen.count("torch")) >= 10
