"""Cases, inputs and error bounds that the tests of gdn_mtp share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from gdn_mtp.cute.compile import FUNCTION
from gdn_mtp.cute.config import LOWEST_LOG_DECAY, Config
from gdn_mtp.cute.config_speculative import SpeculativeConfig
from gdn_mtp.cute.kernels import heuristic_row
from gdn_mtp.problem import short_dtype
from gdn_mtp.reference import ReferenceResult, gated_delta_rule_reference
from kernel_dispatch import Arch, Kernel, Problem, as_arch
from kernel_testing import assert_close_elementwise, cubin_resources
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The provider that runs the sizes of `Case` here; asked for by name, no other can stand in for it.
BACKEND = "cute" if DEVICE.type == "cuda" and as_arch(DEVICE).supports_pdl else "torch"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")
REGISTERS_PER_SM, REGISTER_STEP = 65536, 8  # the second of a thread: they are given out in such steps

# Error bounds. A result is rounded once to its dtype: relative error u, absolute error `tiny` below the
# normal range. Before that, float32 arithmetic (u = 2^-24) errs per token by at most ROUNDINGS * u times the
# largest norm R of a state row: a few roundings for gates, normalisation and the rank-one update, and a
# blocked sum of K terms. Errors of earlier tokens do not grow, for S (I - beta k k^T) exp(g) is no longer
# than S where |k| <= 1, so after T tokens a state errs by T * ROUNDINGS * u * R, and an output by |scale| |q|
# times that.
ROUNDINGS = 32
UNIT_ROUNDOFF = {FP32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-8}
FORGETS = 6e4  # as `a`: of a state nothing is left, as exp(g) is 0
TINY = {FP32: 2.0**-150, FP16: 2.0**-25, BF16: 2.0**-134}


@dataclass(frozen=True)
class Case:
    B: int = 3
    T: int = 2
    H: int = 2
    HV: int = 4
    K: int = 64
    V: int = 64
    io: torch.dtype = BF16
    gates: torch.dtype = BF16
    bias: torch.dtype = FP32
    state: torch.dtype = FP32
    l2norm: bool = True
    scale: float | None = None
    slow: bool = False  # hardly anything is forgotten or learned
    forgets: bool = False  # every third token leaves nothing; of the last head each, its g beyond float32

    def __str__(self) -> str:
        sizes = f"B{self.B}-T{self.T}-H{self.H}-HV{self.HV}-K{self.K}-V{self.V}"
        dtypes = "-".join(short_dtype(dtype) for dtype in (self.io, self.gates, self.bias, self.state))
        return f"{sizes}-{dtypes}{'' if self.l2norm else '-raw'}{'' if self.scale is None else '-scaled'}"

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, A_log, a, dt_bias, b as keyword arguments; keys have about unit length in any case."""
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        tokens = {
            "q": normal(self.B, self.T, self.H, self.K) / (1.0 if self.l2norm else self.K**0.5),
            "k": normal(self.B, self.T, self.H, self.K) / (1.0 if self.l2norm else 1.25 * self.K**0.5),
            "v": normal(self.B, self.T, self.HV, self.V),
        }
        gates = {"a": normal(self.B, self.T, self.HV), "b": normal(self.B, self.T, self.HV)}
        if self.slow:
            gates = {"a": gates["a"] - 8.0, "b": gates["b"] - 4.0}
        dtypes = {
            "A_log": FP32,
            "dt_bias": self.bias,
            **dict.fromkeys("qkv", self.io),
            **dict.fromkeys("ab", self.gates),
        }
        heads = {"A_log": normal(self.HV) * 0.5, "dt_bias": normal(self.HV)}
        if self.forgets:
            gates["a"][:, ::3] = FORGETS
            heads["A_log"][-1] = 100.0
        return {name: x.to(DEVICE, dtypes[name]) for name, x in {**tokens, **heads, **gates}.items()}

    def states(self, slots: int, layout: str = "vk", seed: int = 1) -> Tensor:
        """Random states [slots, HV, V, K], or [slots, HV, K, V]."""
        shape = (slots, self.HV, self.V, self.K) if layout == "vk" else (slots, self.HV, self.K, self.V)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=DEVICE).mul_(0.5).to(self.state)

    @property
    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "use_qk_l2norm": self.l2norm}

    def reference(self, inputs: dict[str, Tensor], state: Tensor, **semantics: object) -> ReferenceResult:
        return gated_delta_rule_reference(**inputs, state=state, **self.options, **semantics)


def assert_result(
    case: Case,
    expected: ReferenceResult,
    output: Tensor,
    state: Tensor,
    *,
    intermediate_states: Tensor | None = None,
    q: Tensor,
    layout: str = "vk",
) -> None:
    """Every element of every result lies inside its bound."""
    row = -1 if layout == "vk" else -2
    pools = (expected.state, expected.intermediate_states)
    row_norm = max(
        (pool.nan_to_num(0.0).norm(dim=row).max().item() for pool in pools if pool.numel()), default=0.0
    )
    roundings = ROUNDINGS + (2 * round(-LOWEST_LOG_DECAY) if case.forgets else 0)  # decays are of sums of g
    arithmetic = case.T * roundings * UNIT_ROUNDOFF[FP32] * row_norm
    scale = case.K**-0.5 if case.scale is None else abs(case.scale)
    q_norm = 1.0 if case.l2norm else q.double().norm(dim=-1).max().item()
    assert_close(output, expected.output, scale * q_norm * arithmetic, "output")
    assert_close(state, expected.state, arithmetic, "state")
    if intermediate_states is not None:
        assert_close(intermediate_states, expected.intermediate_states, arithmetic, "intermediate_states")


def assert_close(actual: Tensor, expected: Tensor, arithmetic: float, what: str) -> None:
    """One rounding to the dtype of `actual` on top of an absolute error of `arithmetic`."""
    u = UNIT_ROUNDOFF[actual.dtype]
    assert_close_elementwise(actual, expected, (1 + u) * arithmetic + TINY[actual.dtype], u, what)


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals NaN and -0 differs from 0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(bits(actual), bits(expected)), f"{what} differs in its bits"


def rows_apart(states: Tensor) -> Tensor:
    """NaN-filled states of the same sizes whose rows lie 16 bytes apart."""
    gap = 16 // states.element_size()
    return states.new_full((*states.shape[:-1], states.shape[-1] + gap), NAN)[..., : states.shape[-1]]


def slots_tensor(*slots: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(slots, dtype=dtype, device=DEVICE)


def check_every_row_is_chosen(
    kernel: Kernel, rows: Mapping[float, str], problems: Sequence[Problem], arch: Arch
) -> None:
    """Each row of a regime's heuristic holds for one of `problems`, and names the tactic it prefers."""
    reached = set()
    for problem in problems:
        limit, tactic = heuristic_row(problem, arch, rows)
        assert kernel.tactics(problem, arch)[0] == tactic
        reached.add(limit)
    assert reached == set(rows)


def check_resources(config: Config | SpeculativeConfig, arch: Arch) -> None:
    """Compiled code has no stack frame, and as many blocks fit into a multiprocessor as was counted on."""
    assert config.smem_bytes <= arch.smem_optin_bytes
    resources = cubin_resources(FUNCTION.compiled(config, arch.name).cubin.read_bytes())
    assert resources.stack_bytes == 0
    registers = -(-resources.registers // REGISTER_STEP) * REGISTER_STEP
    assert registers * 32 * config.warps * config.blocks_per_sm <= REGISTERS_PER_SM
