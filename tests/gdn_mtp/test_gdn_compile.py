"""The functions under torch.compile, torch.export, fake tensors and autocast."""

import gdn_mtp
import pytest
import torch
from gdn_support import BF16, DEVICE, FP32, Case, assert_same_bits, slots_tensor
from kernel_dispatch import ArgumentError, debug
from kernel_testing import poisoned
from torch._subclasses.fake_tensor import FakeTensorMode

CASE = Case(B=3, T=2, K=32, V=16)


class Verify(torch.nn.Module):
    """A call with everything that is written: pool, intermediate states and, inside the graph, the output."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def forward(self, inputs, pool, indices, buffer):
        output, pool = gdn_mtp.gated_delta_rule_mtp(
            **inputs,
            initial_state=pool,
            initial_state_indices=indices,
            intermediate_states_buffer=buffer,
            disable_state_update=False,
            scale=self.scale,
        )
        return 2 * output, pool.sum()


def arguments(case=CASE):
    shape = (case.B, case.T, case.HV, case.V, case.K)
    indices = slots_tensor(2, -1, *range(3, case.B + 1))
    return case.inputs(), case.states(case.B + 1), indices, poisoned(shape, FP32, DEVICE)


def assert_same_effect(function, case=CASE, scale=None):
    """`function` returns and writes exactly what the module does eagerly."""
    expected_arguments, given = arguments(case), arguments(case)
    expected = Verify(scale)(*expected_arguments)
    results = function(*given)
    for what, got, want in (
        ("output", results[0], expected[0]),
        ("sum", results[1], expected[1]),
        ("pool", given[1], expected_arguments[1]),
        ("buffer", given[3], expected_arguments[3]),
    ):
        assert_same_bits(got, want, what)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5, "tensor"])
def test_compile_without_graph_breaks(scale, dynamic):
    scale = torch.tensor([0.5], device=DEVICE) if scale == "tensor" else scale
    torch._dynamo.reset()
    compiled = torch.compile(Verify(scale), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same_effect(compiled, scale=scale)
    assert_same_effect(compiled, Case(B=5, T=2, K=32, V=16), scale=scale)


def test_compile_of_the_other_functions():
    torch._dynamo.reset()
    case = Case(B=2, T=1, K=16, V=8)

    def both(inputs, v_major, k_major):
        first, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(**inputs, state=v_major)
        second, _ = gdn_mtp.gated_delta_rule_decode(**inputs, state=k_major)
        return first, second

    states = [(case.states(2), case.states(2).transpose(-1, -2).contiguous()) for _ in range(2)]
    expected = both(case.inputs(), *states[0])
    results = torch.compile(both, fullgraph=True, backend="aot_eager")(case.inputs(), *states[1])
    for got, want in zip((*results, *states[1]), (*expected, *states[0]), strict=True):
        assert_same_bits(got, want, "result")


def test_export():
    exported = torch.export.export(Verify(), arguments())
    assert any("gdn_mtp.gated_delta_rule" in str(node.target) for node in exported.graph.nodes)
    assert_same_effect(exported.module())


def test_shapes_on_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        inputs, pool, indices, buffer = torch.utils._pytree.tree_map(mode.from_tensor, arguments())
        output, total = Verify()(inputs, pool, indices, buffer)
    assert output.shape == (CASE.B, CASE.T, CASE.HV, CASE.V)
    assert output.dtype == BF16
    assert total.shape == ()


def test_the_operation_passes_opcheck():
    inputs, pool, indices, buffer = arguments()
    output = poisoned((CASE.B, CASE.T, CASE.HV, CASE.V), BF16, DEVICE)
    tensors = (*(inputs[name] for name in ("q", "k", "v", "A_log", "a", "dt_bias", "b")), pool, indices)
    options = (None, None, True, False, "auto")
    torch.library.opcheck(
        torch.ops.gdn_mtp.gated_delta_rule.default, ("mtp", *tensors, None, buffer, None, output, *options)
    )


def test_bad_arguments_raise_under_compile_as_well():
    torch._dynamo.reset()
    inputs, pool, indices, buffer = arguments()
    compiled = torch.compile(Verify(), fullgraph=True, backend="aot_eager")
    with debug(), pytest.raises(ArgumentError, match="initial_state_indices"):
        compiled(inputs, pool, indices + 100, buffer)
    assert buffer.isnan().all()


def test_autocast_changes_nothing():
    def run(inputs, pool, indices, buffer):
        with torch.autocast(DEVICE.type, dtype=BF16):
            return Verify()(inputs, pool, indices, buffer)

    assert_same_effect(run)


def test_inputs_that_require_gradients_give_results_without():
    inputs, pool, indices, buffer = arguments()
    inputs["q"].requires_grad_()
    before = pool.clone()
    output, _ = Verify()(inputs, pool, indices, buffer)
    assert not pool.equal(before)
    assert output.isfinite().all()
