"""The public functions against the oracle over sizes, dtypes and layouts; what is written and what is not."""

from fractions import Fraction

import gdn_mtp
import pytest
import torch
from gdn_support import BF16, DEVICE, FP16, FP32, Case, assert_result, assert_same_bits, bits, slots_tensor
from kernel_testing import poisoned

SIZES = [
    Case(B=1, T=1),
    Case(B=5, T=2, H=3, HV=3),
    Case(B=3, T=3, H=2, HV=6, K=128, V=64),
    Case(B=2, T=4, H=1, HV=4, K=64, V=128),
    Case(B=2, T=8, H=2, HV=4, K=128, V=128),
    Case(B=1, T=16, H=1, HV=2, K=256, V=64),
    Case(B=1, T=5, H=1, HV=1, K=64, V=256),
    Case(B=7, T=1, H=2, HV=4, K=32, V=16),
]
DTYPES = [
    Case(io=io, gates=gates, bias=bias, state=state)
    for io, gates, bias in ((BF16, FP32, BF16), (FP16, FP16, FP32), (FP32, FP32, BF16), (FP32, BF16, FP32))
    for state in (FP32, BF16)
]
OPTIONS = [Case(l2norm=False), Case(scale=0.3), Case(scale=-2.0, l2norm=False), Case(T=16, state=BF16)]
CASES = SIZES + DTYPES + OPTIONS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mtp(case):
    inputs, pool = case.inputs(), case.states(case.B + 2)
    indices = torch.randperm(case.B + 2)[: case.B].to(DEVICE)
    expected = case.reference(inputs, pool, initial_state_indices=indices)
    before = {name: bits(x).clone() for name, x in inputs.items()}
    output, returned = gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=False,
        **case.options,
    )
    assert returned is pool
    assert output.dtype == case.io
    assert_result(case, expected, output, pool, q=inputs["q"])
    for name, x in inputs.items():
        assert torch.equal(bits(x), before[name]), f"{name} was changed"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pretranspose_with_a_state_per_request(case):
    inputs, state = case.inputs(), case.states(case.B)
    expected = case.reference(inputs, state)
    output, returned = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=state, **case.options)
    assert returned is state
    assert_result(case, expected, output, state, q=inputs["q"])


@pytest.mark.parametrize("case", [case for case in CASES if case.T <= 2], ids=str)
def test_decode_with_k_major_states(case):
    case = Case(**{**vars(case), "T": 1})
    inputs, state = case.inputs(), case.states(case.B, "kv")
    expected = case.reference(inputs, state, state_layout="kv")
    output, returned = gdn_mtp.gated_delta_rule_decode(**inputs, state=state, **case.options)
    assert returned is state
    assert_result(case, expected, output, state, q=inputs["q"], layout="kv")


@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("io", [BF16, FP32])
def test_output_is_written_in_place_in_its_own_dtype(io, out_dtype):
    case = Case(io=io)
    inputs, state = case.inputs(), case.states(case.B)
    expected = case.reference(inputs, state)
    memory = poisoned((case.T, case.B, case.HV, case.V + 8), out_dtype, DEVICE)
    target = memory.transpose(0, 1)[..., : case.V]
    output, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=state, output=target)
    assert output is target
    assert_result(case, expected, target, state, q=inputs["q"])
    assert memory[..., case.V :].isnan().all()


def test_inputs_may_be_slices_of_a_fused_projection():
    case = Case(B=3, T=4)
    inputs, state = case.inputs(), case.states(case.B)
    expected = case.reference(inputs, state)
    widths = [case.H * case.K, case.H * case.K, case.HV * case.V]
    fused = torch.cat([inputs[name].flatten(2) for name in "qkv"], dim=-1)
    q, k, v = (
        part.unflatten(-1, (-1, width))
        for part, width in zip(fused.split(widths, -1), (case.K, case.K, case.V), strict=True)
    )
    ab = torch.cat([inputs["a"], inputs["b"]], dim=-1)
    a, b = ab.chunk(2, dim=-1)
    assert not any(x.is_contiguous() for x in (q, k, v, a, b))
    output, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(
        **{**inputs, "q": q, "k": k, "v": v, "a": a, "b": b}, state=state
    )
    assert_result(case, expected, output, state, q=q)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scale_may_be_a_tensor(shape):
    case = Case(scale=0.25)
    inputs, state = case.inputs(), case.states(case.B)
    other = state.clone()
    by_number, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=state, scale=0.25)
    scale = torch.full(shape, 0.25, device=DEVICE)
    by_tensor, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=other, scale=scale)
    assert_same_bits(by_tensor, by_number, "output")
    assert_same_bits(other, state, "state")


@pytest.mark.parametrize("scale", [Fraction(1, 4), 1], ids=["fraction", "int"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scale_may_be_any_real_number(scale, compiled):
    case = Case(scale=float(scale))
    inputs, state = case.inputs(), case.states(case.B)
    other = state.clone()
    by_float, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=state, scale=float(scale))

    def call():
        return gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=other, scale=scale)[0]

    output = torch.compile(call, backend="eager")() if compiled else call()
    assert_same_bits(output, by_float, "output")


@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_no_requests(layout):
    case = Case(B=0, T=1)
    inputs, state = case.inputs(), case.states(0, layout)
    function = (
        gdn_mtp.gated_delta_rule_decode_pretranspose if layout == "vk" else gdn_mtp.gated_delta_rule_decode
    )
    output, returned = function(**inputs, state=state)
    assert output.shape == (0, 1, case.HV, case.V)
    assert returned is state


@pytest.mark.parametrize("scatter", [False, True])
def test_no_requests_on_a_pool(scatter):
    case = Case(B=0)
    pool, indices = case.states(2), slots_tensor()
    options = {"ssm_state_indices": indices.view(0, 1).expand(0, case.T)} if scatter else {}
    output, returned = gdn_mtp.gated_delta_rule_mtp(
        **case.inputs(),
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=False,
        **options,
    )
    assert output.shape == (0, case.T, case.HV, case.V)
    assert returned is pool


def test_tokens_of_one_call_equal_single_calls():
    case = Case(B=3, T=6)
    inputs, state = case.inputs(), case.states(case.B)
    expected = case.reference(inputs, state)
    outputs = []
    for t in range(case.T):
        token = {name: x[:, t : t + 1] if x.dim() > 1 else x for name, x in inputs.items()}
        outputs.append(gdn_mtp.gated_delta_rule_decode_pretranspose(**token, state=state)[0])
    assert_result(case, expected, torch.cat(outputs, dim=1), state, q=inputs["q"])


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_a_thousand_chained_steps(state_dtype):
    steps = 1000
    case = Case(B=2, T=1, H=1, HV=2, K=64, V=64, state=state_dtype)
    long = Case(**{**vars(case), "T": steps})
    inputs, state = long.inputs(), case.states(case.B)
    exact = state.double()
    norm, worst = 0.0, []
    for t in range(steps):
        token = {name: x[:, t : t + 1] if x.dim() > 1 else x for name, x in inputs.items()}
        exact = case.reference(token, exact).state
        gdn_mtp.gated_delta_rule_decode_pretranspose(**token, state=state)
        norm = max(norm, exact.norm(dim=-1).max().item())
        worst.append((state.double() - exact).norm(dim=-1).max().item())
    # Each step errs by u times the row, and exp(g) then shrinks that error at every step: over its lifetime
    # it counts 1 / (1 - exp(mean g)) times in the slowest head, twice that for decays that vary.
    rate = -inputs["A_log"].double().exp() * torch.nn.functional.softplus(
        inputs["a"].double() + inputs["dt_bias"].double()
    )
    lifetime = 1.0 / (1.0 - rate.mean(dim=(0, 1)).exp().max().item())  # steps
    u = {FP32: 32 * 2.0**-24, BF16: 2.0**-8 + 32 * 2.0**-24}[state_dtype]
    assert max(worst) <= 2 * lifetime * u * norm
    assert max(worst[-100:]) <= 2 * max(worst[100:200]), "the error grows with the number of steps"


@pytest.mark.parametrize("requests_per_chunk", [1, 2, 3])
def test_many_chunks(requests_per_chunk, monkeypatch):
    case = Case(B=5, T=3)
    inputs, pool = case.inputs(), case.states(6)
    indices = slots_tensor(4, -1, -1, 0, 5)  # with chunks of one and of two requests, one holds padding alone
    expected = case.reference(inputs, pool, initial_state_indices=indices)
    monkeypatch.setattr("gdn_mtp.torch_kernel.requests_per_chunk", lambda problem: requests_per_chunk)
    output, _ = gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=False,
        backend="torch",
    )
    assert_result(case, expected, output, pool, q=inputs["q"])


def test_same_bits_run_to_run():
    case = Case(B=3, T=4)
    inputs, first = case.inputs(), case.states(case.B)
    second = first.clone()
    outputs = [
        gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=state)[0] for state in (first, second)
    ]
    assert_same_bits(outputs[0], outputs[1], "output")
    assert_same_bits(first, second, "state")
