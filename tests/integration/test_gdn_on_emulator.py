"""The CuTe DSL kernels of gdn_mtp on the emulator, for three architectures, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cutlass.cute.runtime import make_fake_stream
from emulator_recording import TYPES
from gdn_mtp.cute.config import Config, KernelConfig
from gdn_mtp.cute.kernel import GatedDeltaRule
from gdn_mtp.cute.kernel_kmajor import GatedDeltaRuleKMajor
from gdn_mtp.cute.kernels import KERNELS
from gdn_mtp.cute.trace import fake_arguments
from gdn_mtp.problem import GatedDeltaRuleProblem, short_dtype
from gdn_support import BF16, FP32, NAN, Case, assert_result, assert_same_bits, rows_apart
from kernel_dispatch import Arch
from ptx_emulator import Emulated, compile_cute, emulate, explore
from torch import Tensor

SCHEDULES = 3  # fair, greedy, asynchronous copies late
UNTOUCHED_SLOTS = 2


def config_of(problem: GatedDeltaRuleProblem, arch: str, tactic: str) -> Config:
    return KERNELS.config(problem, Arch.from_name(arch), tactic)


def emulated(problem: GatedDeltaRuleProblem, arch: str, tactic: str) -> Emulated:
    """The kernel of one tactic, with its host code."""
    config = config_of(problem, arch, tactic)
    kernel = GatedDeltaRule if isinstance(config, KernelConfig) else GatedDeltaRuleKMajor
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    compiled = compile_cute(kernel(config), *fake_arguments(config), stream, arch=arch)
    return emulate(compiled, arch, uninitialised=("output",))


def problem_of(case: Case, layout: str = "vk", intermediate: str = "none") -> GatedDeltaRuleProblem:
    return GatedDeltaRuleProblem(
        B=case.B, T=case.T, H=case.H, HV=case.HV, K=case.K, V=case.V,
        io_dtype=case.io, gate_dtype=case.gates, dt_bias_dtype=case.bias, state_dtype=case.state,
        state_layout=layout, intermediate=intermediate, index_dtype=torch.int32 if layout == "vk" else None,
    )  # fmt: skip


def run(
    function: Emulated,
    inputs: dict[str, Tensor],
    state: Tensor,
    output: Tensor,
    indices: Tensor | None = None,
    buffer: Tensor | None = None,
) -> None:
    """All schedules: no findings, and the same bits."""
    tokens = [inputs[name] for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias")]
    scale = inputs["q"].shape[-1] ** -0.5
    for tensor in (*tokens, state, output, indices, buffer):
        if tensor is not None:
            TYPES[tensor.data_ptr()] = str(tensor.dtype).removeprefix("torch.")
    call = function.call(*tokens, scale, state, indices, None, buffer, None, output)
    explore(call, SCHEDULES, progress=False).raise_if_wrong()


def id_of(value: str | int | torch.dtype) -> str:
    if isinstance(value, bool):
        return "cached" if value else "final"
    return (
        short_dtype(value)
        if isinstance(value, torch.dtype)
        else f"T{value}"
        if isinstance(value, int)
        else value
    )


def on_cpu(case: Case) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in case.inputs().items()}


@pytest.mark.parametrize(
    ("arch", "tactic", "tokens", "state", "cached"),
    [
        ("sm_90a", "w2t1s", 1, FP32, False),
        ("sm_90a", "w2t1sa2b4", 5, FP32, False),
        ("sm_90a", "w4t1sa1b2", 3, BF16, False),
        ("sm_90a", "w2t1sa2b4", 10, BF16, False),
        ("sm_90a", "w4t1r", 4, BF16, True),
        ("sm_90a", "w4t1e", 8, FP32, True),
        ("sm_90a", "w4t1e", 8, FP32, False),
        ("sm_90a", "w2t1s", 6, BF16, False),
        ("sm_100a", "w4t1s", 4, FP32, True),
        ("sm_100a", "w4t1e", 8, BF16, False),
        ("sm_120a", "w2t1f", 4, BF16, True),
        ("sm_120a", "w4t1s", 1, FP32, False),
        ("sm_120a", "w2t1s", 8, FP32, False),
    ],
    ids=id_of,
)
def test_pool_of_states(arch: str, tactic: str, tokens: int, state: torch.dtype, cached: bool) -> None:
    check(Case(B=3, T=tokens, H=1, HV=2, K=64, V=64, state=state), arch, tactic, cached)


@pytest.mark.parametrize(("io", "cached"), [(FP32, False), (FP32, True), (BF16, False)], ids=id_of)
def test_the_second_chunk_meets_the_state_as_it_advanced(io: torch.dtype, cached: bool) -> None:
    """With a bf16 pool it is not what bf16 or tf32 hold; of what is hardly forgotten that is seen."""
    case = Case(B=3, T=16, H=1, HV=1, K=64, V=64, io=io, gates=io, state=BF16, slow=True)
    check(case, "sm_90a", "w4t1s", cached)


@pytest.mark.parametrize(
    ("io", "tactic", "cached"),
    [(BF16, "w1t1r", False), (BF16, "w4t1f", True), (FP32, "w4t1f", True)],
    ids=id_of,
)
def test_two_chunks_of_the_widest_heads(io: torch.dtype, tactic: str, cached: bool) -> None:
    """Where registers are scarcest: tokens come in groups, the second chunk asks anew where it works."""
    case = Case(B=3, T=10, H=1, HV=1, K=256, V=64, io=io, gates=io, state=BF16)
    check(case, "sm_90a", tactic, cached)


def check(case: Case, arch: str, tactic: str, cached: bool) -> None:
    """Run a case on a pool under every schedule and hold it against the reference."""
    state = case.state
    problem = problem_of(case, intermediate="buffer" if cached else "none")
    function = emulated(problem, arch, tactic)
    inputs = on_cpu(case)
    indices = torch.tensor([3, -1, 0], dtype=torch.int32)
    valid = indices >= 0
    slots = indices[valid].long()
    pool = torch.full((2 + UNTOUCHED_SLOTS, case.HV, case.V, case.K), NAN, dtype=state)
    pool[slots] = case.states(2).cpu()
    before = pool.clone()
    output = torch.full((case.B, case.T, case.HV, case.V), NAN, dtype=case.io)
    buffer = torch.full((case.B, case.T, *pool.shape[1:]), NAN, dtype=state) if cached else None
    run(function, inputs, pool, output, indices, buffer)
    assert [x.shared_bytes for x in function.launches] == [config_of(problem, arch, tactic).smem_bytes]

    entry = before[indices.long().clamp_min(0)]
    expected = case.reference(inputs, entry, initial_state_indices=torch.tensor([0, -1, 2]))
    expected = expected._replace(
        state=expected.state[valid], intermediate_states=expected.intermediate_states[valid]
    )
    stored = None if buffer is None else buffer[valid]
    assert_result(case, expected, output, pool[slots], intermediate_states=stored, q=inputs["q"])
    assert bool((output[~valid] == 0).all())
    assert_same_bits(pool[1:3], before[1:3], "slots nobody names")
    if buffer is not None:
        assert bool(buffer[~valid].isnan().all())


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_tokens_that_forget_everything_do_not_spoil_those_after_them(tokens: int) -> None:
    case = Case(B=3, T=tokens, H=1, HV=2, K=64, V=64, forgets=True)
    check(case, "sm_90a", "w4t1s", cached=True)


def test_rows_that_lie_apart_are_refused_where_rows_are_copied_together() -> None:
    case = Case(B=1, T=2, H=1, HV=1, K=64, V=64)
    function = emulated(problem_of(case, intermediate="buffer"), "sm_90a", "w4t1s")
    inputs, state = on_cpu(case), case.states(1).cpu()
    buffer = torch.full((case.B, case.T, *state.shape[1:]), NAN, dtype=state.dtype)
    tensors = {"state": state, "intermediate_states_buffer": buffer}
    indices, output = torch.zeros(1, dtype=torch.int32), torch.full_like(inputs["v"], NAN)
    for i, name in enumerate(tensors):
        given = {**tensors, name: rows_apart(tensors[name])}
        with pytest.raises(ValueError, match=rf"{name}\.strides\[{2 + i}\]"):
            run(function, inputs, given["state"], output, indices, given["intermediate_states_buffer"])
    assert not function.launches
    assert bool(output.isnan().all())


@pytest.mark.parametrize(
    ("arch", "state", "tactic"),
    [("sm_90a", FP32, "c64r16"), ("sm_100a", BF16, "c64r8"), ("sm_120a", BF16, "c128r16")],
    ids=id_of,
)
def test_k_major_states(arch: str, state: torch.dtype, tactic: str) -> None:
    case = Case(B=3, T=1, H=1, HV=2, K=64, V=128, state=state)
    problem = problem_of(case, "kv")
    function = emulated(problem, arch, tactic)
    inputs, states = on_cpu(case), case.states(3, "kv").cpu()
    expected = case.reference(inputs, states, state_layout="kv")
    output = torch.full((case.B, case.T, case.HV, case.V), NAN, dtype=case.io)
    run(function, inputs, states, output)
    assert [x.shared_bytes for x in function.launches] == [config_of(problem, arch, tactic).smem_bytes]
    assert_result(case, expected, output, states, q=inputs["q"], layout="kv")
