"""Results of the CuTe DSL kernels on a GPU, per tactic."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gdn_mtp
import pytest
import torch
from gdn_mtp.cute.kernels import KERNELS, TACTICS
from gdn_mtp.problem import GatedDeltaRuleProblem, short_dtype
from gdn_mtp.torch_kernel import KERNEL
from gdn_problems import HOPPER, KMAJOR, PROBLEM, problem
from gdn_support import (
    BACKEND,
    BF16,
    DEVICE,
    FP16,
    FP32,
    NAN,
    Case,
    assert_result,
    assert_same_bits,
    slots_tensor,
)
from kernel_testing import poisoned

needs_hopper = pytest.mark.skipif(BACKEND != "cute", reason="needs a GPU of SM90 or newer")
QWEN = Case(H=16, HV=32, K=128, V=128)
SEED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BUFFER_ROWS_BEYOND = 1
CHAINED_CALLS = 16
STATES_PER_CHECK = 64  # compared at once, in float64, which is 4 MiB for each at Qwen3-Next's heads


class Call:
    """A call on NaN-poisoned memory: its arguments, and the checks of what it has written.

    Request i starts from `states[i]`, in a slot of its own; request 1 of three or more is padding.
    mode: where the states after each token go: "none", a "buffer", or "scatter", slots of the pool; or
    "write", the last state to a slot other than that it was read from, and that of request 0 to none.
    """

    def __init__(self, case, mode="none", update=True, state_rows="contiguous", index_dtype=torch.int32):
        self.case, self.update = case, update
        self.problem = GatedDeltaRuleProblem(
            **{name: getattr(case, name) for name in ("B", "T", "H", "HV", "K", "V")},
            io_dtype=case.io,
            gate_dtype=case.gates,
            dt_bias_dtype=case.bias,
            state_dtype=case.state,
            use_qk_l2norm=case.l2norm,
            update_state=update,
            intermediate=mode if mode in ("buffer", "scatter") else "none",
            index_dtype=index_dtype,
            separate_write_indices=mode == "write",
            state_rows=state_rows,
        )
        pool_slots = case.B + 3 + {"scatter": case.B * case.T, "write": case.B}.get(mode, 0)
        permutation = torch.randperm(pool_slots, generator=torch.Generator().manual_seed(case.T)).to(DEVICE)
        self.reads = permutation[: case.B].to(index_dtype)
        if case.B > 2:
            self.reads[1] = -1
        self.valid = self.reads >= 0
        self.states = case.states(case.B)
        self.pool = strided_pool(case, pool_slots, state_rows)
        self.pool[self.reads[self.valid].long()] = self.states[self.valid]
        self.inputs = case.inputs()
        self.output = poisoned((case.B, case.T, case.HV, case.V), case.io, DEVICE)
        self.buffer = self.scatter = self.writes = None
        if mode == "buffer":
            shape = (case.B + BUFFER_ROWS_BEYOND, case.T + 1, case.HV, case.V, case.K)
            self.buffer = poisoned(shape, case.state, DEVICE)
        if mode == "scatter":
            free = permutation[case.B : case.B + case.B * case.T]
            self.scatter = free.view(case.B, case.T).to(index_dtype)
            if self.scatter.numel() > 1:
                self.scatter[0, 0] = -1
        if mode == "write":
            self.writes = permutation[case.B : 2 * case.B].to(index_dtype)
            self.writes[0] = -1

    def run(self, backend):
        """The functional call."""
        gdn_mtp.gated_delta_rule_mtp(
            **self.arguments,
            initial_state=self.pool,
            disable_state_update=not self.update,
            use_qk_l2norm=self.case.l2norm,
            backend=backend,
        )

    def run_plan(self, backend, tactic):
        """The plan of a tactic by its name."""
        gdn_mtp.plan(self.problem, DEVICE, backend, tactic).run(**self.arguments, state=self.pool)

    @property
    def arguments(self):
        """Those of the functional call and of a plan alike."""
        return {
            **self.inputs,
            "scale": self.case.scale,
            "initial_state_indices": self.reads,
            "output_state_indices": self.writes,
            "intermediate_states_buffer": self.buffer,
            "ssm_state_indices": self.scatter,
            "output": self.output,
        }

    def check(self):
        """Every result is right, and nothing else has been written."""
        step = max(1, STATES_PER_CHECK // self.case.T)
        for start in range(0, self.case.B, step):
            self.check_requests(slice(start, min(start + step, self.case.B)))
        self.check_untouched()

    def check_requests(self, requests):
        case, valid = self.case, self.valid[requests]
        inputs = {
            name: x[requests] if name in ("q", "k", "v", "a", "b") else x for name, x in self.inputs.items()
        }
        own = torch.where(valid, torch.arange(len(valid), device=DEVICE), -1)
        expected = case.reference(
            inputs, self.states[requests], initial_state_indices=own, update_state=self.update
        )
        output = self.output[requests]
        assert bool((output[~valid] == 0).all())
        final, each = expected.state[valid], expected.intermediate_states[valid]
        stored = None if self.buffer is None else self.buffer[requests, : case.T][valid]
        if self.scatter is not None:
            final = self.states[requests][valid].double()  # the last token's state goes elsewhere too
            slots = self.scatter[requests][valid].long()
            stored, each = self.pool[slots[slots >= 0]], each[slots >= 0]
        slots = self.reads[requests][valid].long()
        if self.writes is not None:
            slots = self.writes[requests][valid].long()
            final, slots = final[slots >= 0], slots[slots >= 0]
        expected = expected._replace(state=final, intermediate_states=each)
        state = self.pool[slots]
        assert_result(case, expected, output, state, intermediate_states=stored, q=inputs["q"])

    def check_untouched(self):
        """Slots that are not written hold what they held, and rows of the buffer beyond the call's NaN."""
        named = [slots for slots in (self.scatter, self.writes) if slots is not None]
        written = named[0][self.valid] if named else self.reads
        untouched = torch.ones(len(self.pool), dtype=torch.bool, device=DEVICE)
        if self.update:
            untouched[written[written >= 0].long()] = False
        (slots,) = untouched.nonzero(as_tuple=True)
        assert_same_bits(self.pool[slots], self.before(slots), "slots that are not written")
        if self.buffer is not None:
            assert bool(self.buffer[self.case.B :].isnan().all())
            assert bool(self.buffer[:, self.case.T :].isnan().all())
            assert bool(self.buffer[: self.case.B][~self.valid].isnan().all())

    def before(self, slots):
        """What `slots` [n] of the pool held before the call; a copy of the pool might not fit beside it."""
        (requests,) = self.valid.nonzero(as_tuple=True)
        starting = torch.full((len(self.pool),), -1, device=DEVICE)
        starting[self.reads[requests].long()] = requests
        starting = starting[slots]
        held = strided_pool(self.case, len(slots), "contiguous")
        held[starting >= 0] = self.states[starting[starting >= 0]]
        return held


def run(case, tactic=None, backend="cute", **options):
    """One call of `tactic`, or of the one preferred, with every result checked; options are those of Call."""
    call = Call(case, **options)
    if tactic is None:
        call.run(backend)
    else:
        call.run_plan(backend, tactic)
    call.check()


def strided_pool(case, slots, state_rows):
    """A NaN-filled pool; "aligned" rows lie apart, as do slots and heads."""
    if state_rows == "contiguous":
        return torch.full((slots, case.HV, case.V, case.K), NAN, dtype=case.state, device=DEVICE)
    whole = torch.full((slots, 2, case.HV, case.V, case.K + 16), NAN, dtype=case.state, device=DEVICE)
    return whole[:, 1, :, :, 8 : case.K + 8]


@pytest.fixture
def memory_given_back():
    """After the test, for tests in other processes: torch would keep gigabytes."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("state_rows", ["contiguous", "aligned"])
@pytest.mark.parametrize("mode", ["none", "buffer", "scatter", "write"])
@pytest.mark.parametrize("tactic", [None, *KERNEL.tactics(PROBLEM, HOPPER)])
def test_torch_passes_the_checks_of_the_kernels(tactic, mode, state_rows):
    run(Case(T=7, forgets=True), tactic, "torch", mode=mode)
    run(Case(B=5, T=3, state=BF16), tactic, "torch", mode=mode, state_rows=state_rows)
    run(Case(B=1, T=1, K=8, V=16), tactic, "torch", mode=mode, update=mode in ("scatter", "write"))
    run(Case(l2norm=False, scale=0.3), tactic, "torch", mode=mode)


@needs_hopper
@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize("tokens", range(2, 9))
@pytest.mark.parametrize("batch", SEED_BATCHES)
def test_qwen3_next_shapes_with_states_cached_and_updated(batch, tokens):
    run(replace(QWEN, B=batch, T=tokens), mode="buffer")


@needs_hopper
@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize("mode", ["none", "scatter"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("batch", [1, 8, 17, 64, 256])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_qwen3_next_shapes_with_the_preferred_tactic(state, batch, tokens, mode):
    """The largest pool, 256 requests' states after each of 16 tokens in float32, takes 8.5 GiB."""
    run(replace(QWEN, B=batch, T=tokens, state=state), mode=mode)


@needs_hopper
@pytest.mark.parametrize("mode", ["none", "buffer", "scatter"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_sizes_and_modes(head, state, tokens, mode):
    run(Case(B=3, T=tokens, H=2, HV=6, K=head, V=head, state=state), mode=mode)


@needs_hopper
@pytest.mark.parametrize("mode", ["none", "buffer"])
@pytest.mark.parametrize("io", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_states_that_are_hardly_forgotten_over_two_chunks(state, io, mode):
    """The second chunk meets the state of the first, which a bf16 pool does not round in between."""
    run(Case(B=2, T=16, H=1, HV=2, K=128, V=128, io=io, gates=io, state=state, slow=True), mode=mode)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_tokens_that_forget_everything_do_not_spoil_those_after_them(state, tokens):
    run(Case(T=tokens, state=state, forgets=True), mode="buffer")


def offered(*modes):
    """(dtype of states, tactic, T, mode) wherever a tactic is offered."""
    return [
        (state, tactic, tokens, mode)
        for state, tokens, mode in itertools.product((FP32, BF16), (1, 4, 8), modes)
        for tactic in KERNELS.tactics(problem(T=tokens, state_dtype=state, intermediate=mode), HOPPER)
    ]


def id_of(value):
    return short_dtype(value) if isinstance(value, torch.dtype) else str(value)


@needs_hopper
@pytest.mark.parametrize(("state", "tactic", "tokens", "mode"), offered("none", "buffer"), ids=id_of)
def test_every_tactic(state, tactic, tokens, mode):
    run(Case(B=5, T=tokens, H=2, HV=4, K=128, V=128, state=state), tactic, mode=mode)


@needs_hopper
@pytest.mark.parametrize(
    ("state", "tactic", "tokens", "mode"), [x for x in offered("none") if TACTICS[x[1]].ahead], ids=id_of
)
def test_tactics_that_prefetch_ahead_on_a_grid_of_several_waves(state, tactic, tokens, mode):
    run(replace(QWEN, B=64, T=tokens, state=state), tactic, mode=mode)


@needs_hopper
@pytest.mark.parametrize(("state", "tactic", "tokens", "mode"), offered("none", "buffer"), ids=id_of)
def test_calls_that_overlap_have_the_bits_of_calls_that_do_not(state, tactic, tokens, mode):
    """Each call goes on from the states of the one before it, some of them while that still runs."""
    call = Call(replace(QWEN, B=32, T=tokens, state=state), mode)
    plan = gdn_mtp.plan(call.problem, DEVICE, "cute", tactic)
    start = call.pool.clone()
    for _ in range(CHAINED_CALLS):
        plan.run(**call.arguments, state=call.pool)
        torch.cuda.synchronize()
    alone, output = call.pool.clone(), call.output.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CHAINED_CALLS):
            plan.run(**call.arguments, state=call.pool)
    call.pool.copy_(start)
    call.output.fill_(NAN)
    graph.replay()
    assert_same_bits(call.output, output, "output")
    assert_same_bits(call.pool, alone, "pool")


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_pool_whose_rows_lie_apart(state, tokens):
    case = Case(B=4, T=tokens, H=1, HV=3, K=128, V=64, state=state)
    run(case, state_rows="aligned")
    run(case, state_rows="aligned", mode="scatter", index_dtype=torch.int64)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("l2norm", [True, False])
def test_input_dtypes_and_frozen_states(io, l2norm, tokens):
    run(
        Case(B=3, T=tokens, K=128, V=128, io=io, gates=io, l2norm=l2norm, scale=0.3),
        update=False,
        mode="buffer",
    )


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 3, 6, 8, 9, 16])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_frozen_states_of_which_none_is_stored(state, tokens):
    run(Case(B=3, T=tokens, K=128, V=128, state=state), update=False)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
def test_states_written_to_other_slots_or_to_none(state, tokens):
    run(Case(B=4, T=tokens, K=128, V=128, state=state), mode="write")


@needs_hopper
def test_offsets_beyond_two_to_the_31_elements():
    case = Case(B=1, T=2, H=16, HV=32, K=128, V=128, state=BF16)
    slots = 2**31 // (32 * 128 * 128) + 8
    pool = torch.full((slots, 32, 128, 128), NAN, dtype=BF16, device=DEVICE)
    pool[-1] = case.states(1)[0]
    inputs, indices = case.inputs(), slots_tensor(slots - 1)
    alone = case.states(1)
    expected = case.reference(inputs, alone)
    output, _ = gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=pool,
        initial_state_indices=indices,
        disable_state_update=False,
        backend="cute",
    )
    assert_result(case, expected, output, pool[-1:], q=inputs["q"])


@needs_hopper
def test_intermediate_offsets_beyond_two_to_the_31_elements():
    case = Case(B=3, T=2, H=1, HV=2, K=128, V=128, state=BF16)
    row = case.HV * 128 * 128
    memory = torch.empty(2**31 + 2**20, dtype=BF16, device=DEVICE)
    buffer = memory.as_strided((3, 2, case.HV, 128, 128), (2**30, row, 128 * 128, 128, 1))
    inputs, state = case.inputs(), case.states(3)
    expected = case.reference(inputs, state)
    output, _ = gdn_mtp.gated_delta_rule_mtp(
        **inputs,
        initial_state=state,
        initial_state_indices=slots_tensor(0, 1, 2),
        intermediate_states_buffer=buffer,
        disable_state_update=False,
        backend="cute",
    )
    assert_result(case, expected, output, state, intermediate_states=buffer, q=inputs["q"])


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_same_bits_alone_as_in_a_batch_and_again(tokens):
    case = Case(B=9, T=tokens, H=2, HV=4, K=128, V=128)
    inputs, pool = case.inputs(), case.states(9)

    def call(rows):
        tokens_of = {name: x[rows] if name in ("q", "k", "v", "a", "b") else x for name, x in inputs.items()}
        state = pool.clone()
        indices = torch.arange(9, device=DEVICE)[rows]
        output, _ = gdn_mtp.gated_delta_rule_mtp(
            **tokens_of, initial_state=state, initial_state_indices=indices, disable_state_update=False,
            backend="cute",
        )  # fmt: skip
        return output, state

    whole, whole_state = call(slice(0, 9))
    again, again_state = call(slice(0, 9))
    assert_same_bits(whole, again, "output")
    assert_same_bits(whole_state, again_state, "state")
    for i in range(9):
        alone, alone_state = call(slice(i, i + 1))
        assert_same_bits(alone[0], whole[i], f"output of request {i}")
        assert_same_bits(alone_state[i], whole_state[i], f"state of request {i}")


@needs_hopper
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [1, 4])
def test_a_thousand_steps_stay_close(T, state):
    """Errors of states stay within a bound over 1,000 chained calls, and do not grow."""
    case = Case(B=2, T=T, H=2, HV=4, K=128, V=128, state=state)
    pool = case.states(2)
    exact = pool.double()
    errors = []
    for step in range(1000):
        inputs = case.inputs(seed=step)
        exact = case.reference(inputs, exact).state
        gdn_mtp.gated_delta_rule_mtp(
            **inputs,
            initial_state=pool,
            initial_state_indices=slots_tensor(0, 1),
            disable_state_update=False,
            backend="cute",
        )
        errors.append(((pool.double() - exact).norm() / exact.norm()).item())
    bound = 2e-6 if state == FP32 else 1e-2
    assert max(errors) <= bound, f"relative error {max(errors):.1e}, allowed {bound:.0e}"
    assert max(errors[500:]) <= 2 * max(errors[:500]), "errors grow"


K_MAJOR = pytest.mark.parametrize(
    ("state", "tactic"),
    [(FP32, "c64r16"), (FP32, "c128r16"), (BF16, "c64r8"), (BF16, "c128r16")],
    ids=["fp32-c64r16", "fp32-c128r16", "bf16-c64r8", "bf16-c128r16"],
)


def run_k_major(case, tactic=None, state_rows="contiguous", backend="cute"):
    """One call of a K-major tactic, or of the preferred one, with every result checked."""
    apart = 2 if state_rows == "aligned" else 1
    memory = torch.full((case.B, case.HV, case.K, apart * case.V), NAN, dtype=case.state, device=DEVICE)
    states = memory[..., : case.V]
    states.copy_(case.states(case.B, "kv"))
    inputs = case.inputs()
    expected = case.reference(inputs, states.clone(), state_layout="kv")
    output = torch.full_like(inputs["v"], NAN)
    asked = replace(
        KMAJOR, B=case.B, H=case.H, HV=case.HV, K=case.K, V=case.V, state_dtype=case.state, io_dtype=case.io,
        gate_dtype=case.gates, dt_bias_dtype=case.bias, out_dtype=case.io, use_qk_l2norm=case.l2norm,
        state_rows=state_rows,
    )  # fmt: skip
    gdn_mtp.plan(asked, DEVICE, backend, tactic).run(**inputs, state=states, output=output)
    assert_result(case, expected, output, states, q=inputs["q"], layout="kv")
    assert bool(memory[..., case.V :].isnan().all())


@pytest.mark.parametrize("state_rows", ["contiguous", "aligned"])
def test_torch_passes_the_checks_of_the_k_major_kernels(state_rows):
    run_k_major(Case(B=3, T=1, H=1, HV=2, K=64, V=32), state_rows=state_rows, backend="torch")


@needs_hopper
@K_MAJOR
@pytest.mark.parametrize("head", [64, 128, 256])
def test_k_major_states(head, state, tactic):
    run_k_major(Case(B=5, T=1, H=2, HV=4, K=head, V=max(head, 128), state=state), tactic)


@needs_hopper
@K_MAJOR
def test_k_major_states_of_a_grid_of_several_waves(state, tactic):
    run_k_major(replace(QWEN, B=64, T=1, state=state), tactic)


@needs_hopper
@pytest.mark.parametrize("state_rows", ["contiguous", "aligned"])
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [3, 200])
def test_k_major_states_of_64_columns_whose_rows_may_lie_apart(batch, state, state_rows):
    run_k_major(Case(B=batch, T=1, H=2, HV=4, K=128, V=64, state=state), state_rows=state_rows)


@needs_hopper
def test_a_scale_on_the_device_and_graph_replay():
    case = Case(B=3, T=4, H=2, HV=4, K=128, V=128)
    scale = torch.tensor([0.5], device=DEVICE)
    pool, indices, inputs = case.states(6), slots_tensor(4, -1, 0, dtype=torch.int32), case.inputs()

    def call(state, rows, factor):
        output, _ = gdn_mtp.gated_delta_rule_mtp(
            **inputs,
            initial_state=state,
            initial_state_indices=rows,
            scale=factor,
            disable_state_update=False,
            backend="cute",
        )
        return output

    call(pool.clone(), indices, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(pool, indices, scale)
    for factor, slots in ((2.0, (1, 2, -1)), (0.25, (-1, -1, -1)), (1.0, (5, 0, 3))):
        pool.copy_(case.states(6))
        scale.fill_(factor)
        rows = slots_tensor(*slots, dtype=torch.int32)
        indices.copy_(rows)
        graph.replay()
        expected_pool = case.states(6)
        expected = call(expected_pool, rows, factor)
        assert_same_bits(output, expected, "output")
        assert_same_bits(pool, expected_pool, "pool")
