"""The CuTe DSL kernels: what they accept, what they compile to, and, on a GPU, their results per tactic."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gdn_mtp
import pytest
import torch
from gdn_mtp.cute.kernels import (
    HEURISTIC,
    KERNELS,
    KMAJOR_HEURISTIC,
    KMAJOR_TACTICS,
    TACTICS,
    heuristic_rows,
)
from gdn_mtp.cute.kernels_speculative import KERNELS as SPECULATIVE_KERNELS
from gdn_mtp.cute.prefetch import may_prefetch
from gdn_mtp.problem import GatedDeltaRuleProblem, short_dtype
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_mtp.torch_kernel import KERNEL
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
    check_every_row_is_chosen,
    check_resources,
    slots_tensor,
)
from kernel_dispatch import Arch, explain, forbid_compilation, resolve
from kernel_testing import poisoned

PROBLEM = GatedDeltaRuleProblem(
    B=8, T=4, H=16, HV=32, K=128, V=128,
    io_dtype=BF16, gate_dtype=BF16, dt_bias_dtype=FP32, out_dtype=BF16, state_dtype=FP32, state_layout="vk",
    use_qk_l2norm=True, update_state=True, intermediate="none", index_dtype=torch.int32,
    separate_write_indices=False,
)  # fmt: skip
KMAJOR = replace(PROBLEM, T=1, state_layout="kv", index_dtype=None)
HOPPER = Arch.from_name("sm_90a")
FEW, SOME, MEDIUM, MANY = 1, 4, 16, 512  # batches whose tactics differ, from each other and from that of 8
TACTICS_OF_HEURISTIC = {
    name for by_tokens in HEURISTIC.values() for rows in by_tokens.values() for name in rows.values()
}
ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a")


def problem(**changes: object) -> GatedDeltaRuleProblem:
    return replace(PROBLEM, **changes)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (problem(K=96), "K = 96"),
        (problem(V=32), "V = 32"),
        (problem(T=17), "at most 16 tokens"),
        (problem(state_rows="any"), "16-byte aligned"),
        (problem(B=70000), "B = 70000"),
        (problem(H=70000, HV=140000), "H = 70000"),
        (replace(KMAJOR, HV=70000), "HV = 70000"),
        (replace(KMAJOR, T=2), "K-major"),
        (replace(KMAJOR, index_dtype=torch.int32), "K-major"),
        (replace(KMAJOR, update_state=False), "always updated"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_what_the_kernels_decline_goes_to_torch_with_a_reason(asked, words):
    explained = explain(asked, HOPPER)
    assert explained.chosen == "torch"
    (row,) = [row for row in explained.rows if row.name == "cute"]
    assert words in row.reason


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("asked", [PROBLEM, KMAJOR, problem(T=1), problem(T=16)], ids=lambda p: p.describe())
def test_the_kernels_are_preferred_where_they_apply(arch, asked):
    assert explain(asked, arch).chosen == "cute"
    assert explain(asked, "cpu").chosen == "torch"


def test_every_tactic_is_offered_and_the_heuristic_names_no_other():
    assert set(KERNELS.tactics(PROBLEM, HOPPER)) == set(TACTICS)
    assert set(TACTICS) >= TACTICS_OF_HEURISTIC


@pytest.mark.parametrize(
    ("asked", "tactics"),
    [
        (replace(KMAJOR, B=FEW), ["c64r16", "c128r16"]),
        (replace(KMAJOR, B=SOME), ["c128r16", "c64r16"]),
        (replace(KMAJOR, B=MANY), ["c64r16", "c128r16"]),
        (replace(KMAJOR, B=FEW, state_dtype=BF16), ["c64r8", "c128r16"]),
        (replace(KMAJOR, B=MANY, state_dtype=BF16), ["c128r16", "c64r8"]),
        (replace(KMAJOR, B=MANY, V=64, state_dtype=BF16), ["c64r8"]),  # c128r16: 128 columns a block
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else None,
)
def test_k_major_tactics_are_those_of_the_dtype_that_fit_the_preferred_one_first(asked, tactics):
    assert KERNELS.tactics(asked, HOPPER) == tactics


def test_every_k_major_tactic_is_in_the_heuristic():
    assert {name for rows in KMAJOR_HEURISTIC.values() for name in rows.values()} == set(KMAJOR_TACTICS)


def test_the_heuristic_reaches_every_row_of_its_table():
    stored = ("none", "buffer", "scatter")
    problems = [
        problem(T=t, state_dtype=dtype, intermediate=intermediate)
        for t, dtype, intermediate in itertools.product(range(1, 9), (torch.float32, BF16), stored)
    ]
    every = [rows for by_tokens in HEURISTIC.values() for rows in by_tokens.values()]
    assert all(any(heuristic_rows(asked) is rows for asked in problems) for rows in every)
    for asked in problems:
        of_batches = [replace(asked, B=b) for b in (1, 2, 4, 8, 16, 32, 64, 512)]
        check_every_row_is_chosen(KERNELS, heuristic_rows(asked), of_batches, HOPPER)


@pytest.mark.parametrize("stored", HEURISTIC)
def test_limits_of_the_heuristic_ascend_and_the_last_is_none(stored):
    for limits in (HEURISTIC[stored], *HEURISTIC[stored].values()):
        assert list(limits) == sorted(limits)
        assert max(limits) == float("inf")


def test_a_number_of_tokens_takes_the_first_rows_whose_limit_it_does_not_exceed():
    by_tokens = HEURISTIC["final fp32 state"]
    for t, limit in [(1, 1), (2, 5), (5, 5), (6, 7), (7, 7), (8, float("inf")), (16, float("inf"))]:
        assert heuristic_rows(problem(T=t)) is by_tokens[limit]


@pytest.mark.parametrize(
    ("asked", "twins"),
    [
        (problem(T=4), set()),
        (problem(T=6), {"w2t1sa2b7"}),  # shared memory for seven blocks of two warps
        (problem(T=16), {"w2t1sa2b7", "w2t1sa2b4", "w4t1sa1b2", "w4t1sa2"}),  # registers for eight warps
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else None,
)
def test_limits_on_blocks_that_do_not_fit_anyway_are_not_offered(asked, twins):
    assert set(TACTICS) - set(KERNELS.tactics(asked, HOPPER)) == twins


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16])
def test_a_cap_is_the_number_of_blocks_that_fit(arch, tokens):
    target = Arch.from_name(arch)
    for state, intermediate in itertools.product((FP32, BF16), ("none", "buffer")):
        asked = problem(T=tokens, state_dtype=state, intermediate=intermediate)
        for name in KERNELS.tactics(asked, target):
            config = KERNELS.config(asked, target, name)
            per_sm = target.smem_optin_bytes + 1024
            taken = -(-config.smem_bytes // 128) * 128 + 1024  # of a multiprocessor, as the driver counts
            assert config.blocks_per_sm * taken <= per_sm
            cap = config.tactic.max_blocks_per_sm
            if cap is not None:
                assert config.blocks_per_sm == cap
                assert (cap + 1) * taken > per_sm


@pytest.mark.parametrize(
    ("blocks", "first"),
    [(20, 0), (21, 30), (100, 30)],  # the first that prefetches, of 10 multiprocessors with four blocks each
)
def test_which_blocks_prefetch_ahead(blocks, first):
    prefetching = [block for block in range(blocks) if may_prefetch(block, blocks, 10, 4, ahead=1)]
    assert prefetching == list(range(first, blocks))


KEPT = {"intermediate": "buffer", "update_state": False}
WINDOW = SpeculativeProblem(B=1, T=4, H=16, HV=32, K=128, V=128, capacity=16)
SERVED = {  # kernels that calls of 1 to 256 requests of Qwen3-Next need, with fp32 and bf16 states
    "single tokens": (KERNELS, problem(T=1), 1, 2),
    "T4, kept": (KERNELS, problem(T=4, **KEPT), 4, 4),
    "T8, kept": (KERNELS, problem(T=8, **KEPT), 4, 4),
    "T4, updated": (KERNELS, problem(T=4), 3, 3),
    "T8, updated": (KERNELS, problem(T=8), 3, 3),
    "verify": (SPECULATIVE_KERNELS, WINDOW, 1, 3),
    "commit": (SPECULATIVE_KERNELS, replace(WINDOW, mode="commit", T=0), 1, 1),
    "materialize": (SPECULATIVE_KERNELS, replace(WINDOW, mode="materialize", T=0), 1, 1),
}


@pytest.mark.parametrize(("kernels", "asked", "fp32", "bf16"), SERVED.values(), ids=SERVED)
def test_a_server_compiles_what_the_readme_says(kernels, asked, fp32, bf16):
    for state, count in ((FP32, fp32), (BF16, bf16)):
        configs = set()
        for batch in range(1, 257):
            of_batch = replace(asked, B=batch, state_dtype=state)
            configs.add(kernels.config(of_batch, HOPPER, kernels.tactics(of_batch, HOPPER)[0]))
        assert len(configs) == count


@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@pytest.mark.parametrize("rows", ["contiguous", "aligned"])
@pytest.mark.parametrize("intermediate", ["none", "buffer", "scatter"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_121a"])
def test_every_accepted_problem_has_a_tactic(head, tokens, rows, intermediate, arch):
    for state in (FP32, BF16):
        asked = problem(
            T=tokens, K=head, V=head, state_rows=rows, intermediate=intermediate, state_dtype=state
        )
        assert KERNELS.tactics(asked, Arch.from_name(arch))


COMPILED = {
    "T1": problem(T=1),
    "T1-few": problem(T=1, B=FEW),
    "T1-some": problem(T=1, B=SOME),
    "T1-many": problem(T=1, B=MANY),
    "T1-bf16state": problem(T=1, state_dtype=BF16),
    "T1-bf16state-few": problem(T=1, state_dtype=BF16, B=FEW),
    "T4-bf16state-medium": problem(state_dtype=BF16, B=MEDIUM),
    "T8-bf16state-medium": problem(T=8, state_dtype=BF16, B=MEDIUM),
    "T2-buffer": problem(T=2, intermediate="buffer"),
    "T2-buffer-few": problem(T=2, intermediate="buffer", B=FEW),
    "T4": PROBLEM,
    "T4-few": problem(B=FEW),
    "T6": problem(T=6),
    "T4-many": problem(B=MANY),
    "T8": problem(T=8),
    "T8-medium": problem(T=8, B=MEDIUM),
    "T8-buffer": problem(T=8, intermediate="buffer"),
    "T8-bf16state-many": problem(T=8, state_dtype=BF16, B=MANY),
    "T16-few": problem(T=16, B=FEW),
    "T16-many": problem(T=16, B=MANY, index_dtype=torch.int64),
    "T16-buffer-some": problem(T=16, intermediate="buffer", B=SOME),
    "T16-buffer-many": problem(T=16, intermediate="buffer", B=MANY),
    "T16-bf16state": problem(T=16, state_dtype=BF16),
    "T16-bf16state-many": problem(T=16, state_dtype=BF16, B=MANY),
    "T16-bf16state-buffer": problem(T=16, state_dtype=BF16, intermediate="buffer", index_dtype=torch.int64),
    "T16-bf16state-buffer-many": problem(T=16, state_dtype=BF16, intermediate="buffer", B=MANY),
    "T3-scatter-some": problem(T=3, intermediate="scatter", B=SOME),
    "T16-aligned": problem(T=16, state_rows="aligned"),
    "T8-K256": problem(T=8, K=256, V=256),
    "T4-K256-buffer": problem(K=256, V=256, intermediate="buffer"),
    "T16-K256-buffer": problem(T=16, K=256, V=256, intermediate="buffer"),
    "T16-K256-bf16state-buffer": problem(T=16, K=256, V=256, intermediate="buffer", state_dtype=BF16),
    "T16-K256-fp32-bf16state-buffer": problem(
        T=16, K=256, V=256, intermediate="buffer", state_dtype=BF16, io_dtype=FP32, gate_dtype=FP32
    ),
    "T9-K256-bf16state-buffer": problem(T=9, K=256, V=256, intermediate="buffer", state_dtype=BF16),
    "T12-K256-fp32-bf16state-scatter": problem(
        T=12, K=256, V=256, intermediate="scatter", state_dtype=BF16, io_dtype=FP32, gate_dtype=FP32
    ),
    "T5-K64-frozen": problem(T=5, K=64, V=64, update_state=False, index_dtype=torch.int64),
    "T2-fp32-tensorscale": problem(
        T=2, io_dtype=FP32, gate_dtype=FP32, tensor_scale=True, separate_write_indices=True
    ),
    "T1-kmajor": KMAJOR,
    "T1-kmajor-many": replace(KMAJOR, B=MANY),
    "T1-kmajor-K64-bf16state": replace(KMAJOR, K=64, B=MANY, state_dtype=BF16),
    "T1-kmajor-K256-bf16state": replace(KMAJOR, K=256, V=256, state_dtype=BF16),
    "T1-kmajor-K256-bf16state-few": replace(KMAJOR, HV=16, K=256, V=256, state_dtype=BF16, B=FEW),
    "T1-kmajor-bf16state-few": replace(KMAJOR, B=FEW, state_dtype=BF16),
    "T1-kmajor-bf16state": replace(KMAJOR, state_dtype=BF16, out_dtype=FP16, io_dtype=FP16),
}


@pytest.mark.parametrize(
    ("asked", "arch", "nearest"),
    [
        (problem(K=256, V=256, intermediate="buffer"), "sm_120a", "w2t1f"),  # w4t2f: too much shared memory
        # w4t2f: too few registers
        (problem(T=9, K=256, V=256, intermediate="buffer", state_dtype=BF16), "sm_90a", "w4t1f"),
        (problem(V=64, intermediate="buffer", B=16), "sm_90a", "w4t1f"),  # w4t2f: 128 rows a block
        (problem(state_rows="aligned", T=8, B=MANY), "sm_90a", "w4t1r"),
        (problem(state_rows="aligned", T=1, B=FEW), "sm_90a", "w2t1r"),
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else value,
)
def test_a_tactic_that_does_not_fit_gives_way_to_the_nearest(asked, arch, nearest):
    assert KERNELS.tactics(asked, Arch.from_name(arch))[0] == nearest


def test_every_tactic_that_the_heuristic_picks_is_among_those_compiled():
    assert {KERNELS.tactics(asked, HOPPER)[0] for asked in COMPILED.values()} >= TACTICS_OF_HEURISTIC


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("asked", COMPILED.values(), ids=COMPILED)
def test_compiled_code_keeps_everything_in_registers(arch, asked):
    """Code for the tactic that the heuristic picks has no stack frame, hence spills no register."""
    target = Arch.from_name(arch)
    selection = resolve(asked, target, "cute")
    check_compiled(asked, arch, selection.tactic)
    with forbid_compilation():
        selection.kernel.prepare(asked, target, torch.device("cpu"), selection.tactic)


@pytest.mark.parametrize(
    ("asked", "tactic"),
    [
        (COMPILED["T16-K256-fp32-bf16state-buffer"], "w4t1s"),
        (COMPILED["T16-K256-bf16state-buffer"], "w2t1r"),
        (COMPILED["T16-K256-bf16state-buffer"], "w1t1r"),
        (problem(T=16, K=256, V=256), "w1t1r"),
    ],
    ids=lambda value: value.describe() if isinstance(value, GatedDeltaRuleProblem) else value,
)
def test_a_tactic_that_is_named_keeps_everything_in_registers_too(asked, tactic):
    """Those that need most: for 256 columns of the state in two chunks, and for all tokens in one warp."""
    assert tactic in KERNELS.tactics(asked, HOPPER)
    check_compiled(asked, HOPPER.name, tactic)


def check_compiled(asked, arch, tactic):
    target = Arch.from_name(arch)
    check_resources(KERNELS.config(asked, target, tactic), target)


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
