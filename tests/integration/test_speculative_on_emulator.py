"""The speculative kernels of gdn_mtp on the emulator: random histories against float64 decoding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cutlass.cute.runtime import make_fake_stream
from emulator_recording import TYPES
from gdn_mtp.cute.config import Tactic
from gdn_mtp.cute.config_speculative import SpeculativeConfig
from gdn_mtp.cute.fragments import read_index
from gdn_mtp.cute.kernels_speculative import TACTICS
from gdn_mtp.cute.speculative import Verify
from gdn_mtp.cute.trace import ASSERTIONS, arguments, kernel
from gdn_support import BF16, FP16, FP32, assert_same_bits, rows_apart
from ptx_emulator import Emulated, Launches, ScheduleError, compile_cute, emulate, explore
from ptx_emulator.host.cute import Call, ptx_of
from speculative_history import CROWDED, MISUSES, USES, KernelHistory, KernelSetup
from torch import Tensor

SCHEDULES = 3  # fair, greedy, asynchronous copies late

PRINTS = re.compile(
    r"st\.param\.b64\s+\[param0\], (%rd\d+);\s+call\.uni \(retval0\), vprintf, \(param0, param1\);"
)
ASSERTS = r"""
    .param .b32 line; .param .b64 function; .param .b64 size;
    st.param.b64 [param0], \1; st.param.b64 [param1], \1; st.param.b32 [line], 0;
    st.param.b64 [function], \1; st.param.b64 [size], 1;
    call.uni __assertfail, (param0, param1, line, function, size);"""


def asserting(ptx: str) -> str:
    """PTX that fails an assertion where the DSL prints a message and traps: the emulator does not print."""
    return PRINTS.sub(ASSERTS, ptx)


class Emulator:
    """Launches on the emulator, under every schedule: no findings, and the same bits."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.functions: dict[SpeculativeConfig, Emulated] = {}

    def __call__(self, config: SpeculativeConfig, args: tuple[Any, ...]) -> None:
        explore(self.call(config, args), SCHEDULES, progress=False).raise_if_wrong()
        assert [x.shared_bytes for x in self.functions[config].launches] == [config.smem_bytes]

    def call(self, config: SpeculativeConfig, args: tuple[Any, ...]) -> Call:
        """A launch, to be run."""
        if config not in self.functions:
            stream = make_fake_stream(use_tvm_ffi_env_stream=True)
            options = ASSERTIONS if config.debug else ""
            compiled = compile_cute(
                kernel(config), *arguments(config), stream, arch=self.arch, options=options
            )
            written = {"verify": ("output",), "commit": (), "materialize": ("states",)}[config.mode]
            ptx = asserting(ptx_of(compiled)) if config.debug else None
            self.functions[config] = emulate(compiled, self.arch, ptx=ptx, uninitialised=written)
        for x in args:
            if isinstance(x, Tensor):
                TYPES[x.data_ptr()] = str(x.dtype).removeprefix("torch.")
        return self.functions[config].call(*args)


@pytest.mark.parametrize(
    ("arch", "setup"),
    [
        ("sm_90a", KernelSetup()),
        ("sm_90a", KernelSetup(max_tokens=8, capacity=24, H=2, HV=4, state=BF16, tactic=Tactic(2, 2))),
        ("sm_90a", KernelSetup(max_tokens=6, capacity=29, tree=True, index=torch.int64)),
        ("sm_90a", KernelSetup(max_tokens=6, capacity=24, tree=True, state=BF16, tactic=Tactic(4, 1))),
        ("sm_90a", KernelSetup(max_tokens=6, capacity=24, K=128, V=128, tree=True, state=BF16, crowded=True)),
        ("sm_90a", KernelSetup(max_tokens=11, capacity=32, tree=True, io=FP16, variable=False)),
        ("sm_100a", KernelSetup(max_tokens=16, capacity=32, io=FP32, l2norm=False, tactic=Tactic(2, 2))),
        (
            "sm_120a",
            KernelSetup(max_tokens=1, capacity=9, state=BF16, variable=False, tactic=Tactic(1, 1, True)),
        ),
        (
            "sm_100a",
            KernelSetup(
                max_tokens=4, capacity=32, K=128, V=128, HV=1, tree=True, tactic=Tactic(4, 1, trigger="start")
            ),
        ),
        ("sm_90a", KernelSetup(max_tokens=5, capacity=16, tree=True, debug=True)),
        (
            "sm_90a",
            KernelSetup(
                K=128, V=128, HV=1, state=BF16, variable=False, tactic=TACTICS["w4t1sb7"], crowded=True
            ),
        ),
        (
            "sm_90a",
            KernelSetup(max_tokens=8, capacity=24, K=128, V=128, state=BF16, debug=True, crowded=True),
        ),
        ("sm_90a", KernelSetup(HV=3, V=128, gates=FP32, bias=BF16, forgets=True)),
        ("sm_90a", KernelSetup(max_tokens=11, capacity=32, K=128, tree=True, state=BF16, forgets=True)),
        ("sm_90a", KernelSetup(state=BF16, apart=True, tactic=Tactic(4, 1, row_copies=True))),
    ],
    ids=str,
)
def test_history(arch: str, setup: KernelSetup) -> None:
    history = KernelHistory(setup, Emulator(arch), pool_size=4, device=torch.device("cpu"))
    full = setup.capacity - 2 * setup.max_tokens
    history.verify([2, -1, 0], setup.max_tokens, full)
    history.verify([2, 0, 1], setup.max_tokens, full)
    history.materialize([0, -1, 3])
    for _ in range(6):
        history.step(2)
    history.commit([0, 1, 2])


@pytest.mark.parametrize("fields", [{}, CROWDED], ids=["each warp reads", "one warp reads"])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_stops_the_kernel_in_debug_mode(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=MISUSES[name].message):
        MISUSES[name].launch(Emulator("sm_90a"), torch.device("cpu"), **fields)


@pytest.mark.parametrize("name", USES)
def test_what_is_passed_over_does_not_stop_the_kernel(name: str) -> None:
    USES[name].launch(Emulator("sm_90a"), torch.device("cpu"))


@pytest.mark.parametrize(
    "setup",
    [
        KernelSetup(tactic=TACTICS["w4t1s"], variable=False),
        KernelSetup(K=128, V=128, HV=1, state=BF16, variable=False, tactic=TACTICS["w4t1s"], crowded=True),
    ],
    ids=str,
)
def test_verifies_may_start_before_the_one_before_has_ended(setup: KernelSetup) -> None:
    """Each takes states, cursors and pending tokens as the one before leaves them."""
    emulator = Emulator("sm_90a")
    launches: list[tuple[SpeculativeConfig, tuple[Any, ...]]] = []

    def launch(config: SpeculativeConfig, args: tuple[Any, ...]) -> None:
        emulator(config, args)
        launches.append((config, args))

    history = KernelHistory(setup, launch, pool_size=3, device=torch.device("cpu"))
    tensors = (history.pool, *history.cache)
    history.verify([2, 0], setup.max_tokens, 2)
    launches.clear()
    before = [x.clone() for x in tensors]
    for slots in ([2, 0], [0, 2], [2, 0]):
        history.verify(slots, setup.max_tokens, 2)
    written = (*tensors, *(args[-1] for _, args in launches))
    expected = [x.clone() for x in written]

    for x, value in zip(tensors, before, strict=True):
        x.copy_(value)
    chain = Launches([emulator.call(config, args) for config, args in launches])
    explore(chain, SCHEDULES, progress=False).raise_if_wrong()
    for x, value in zip(written, expected, strict=True):
        assert_same_bits(x, value, "a chain of verifies")


@pytest.mark.parametrize("other", [1, 100])
def test_a_slot_that_changes_before_the_kernel_reads_it_again(other: int, monkeypatch: Any) -> None:
    """What one warp reads of the ring ahead is of the slot that was expected."""
    setup = KernelSetup(K=128, V=128, state=BF16, variable=False, tactic=TACTICS["w4t1s"], crowded=True)
    assert setup.config("verify", setup.max_tokens, "counts").one_reader
    monkeypatch.setattr(Verify, "expected_slot", lambda *args: read_index(*args[1:]) + other)
    history = KernelHistory(setup, Emulator("sm_90a"), pool_size=4, device=torch.device("cpu"))
    for slots in ([2, -1, 0], [0, 2], [3, 0], [2, 3]):
        history.verify(slots, setup.max_tokens, 4)
    history.commit([0, 2, 3])


def test_strides_that_the_kernel_does_not_take_are_refused() -> None:
    """Tokens whose strides inside a request need more than 32 bits, and a pool whose rows lie apart."""
    setup = KernelSetup(max_tokens=2, capacity=8, H=1, HV=1, tactic=Tactic(4, 1), variable=False)
    launches: list[tuple[SpeculativeConfig, tuple[Any, ...]]] = []
    history = KernelHistory(
        setup, lambda *call: launches.append(call), pool_size=2, device=torch.device("cpu")
    )
    with pytest.raises(AssertionError):  # nothing was written
        history.verify([1], setup.max_tokens, 2)
    (config, args), emulator = launches[0], Emulator("sm_90a")
    q, pool = args[0], args[8]
    far = q.as_strided(q.shape, (*q.stride()[:2], 2**31, 1))  # one head, so that it may have any stride
    wrong = ((0, far, r"q\.strides\[2\]"), (8, rows_apart(pool), r"state_pool\.strides\[2\]"))
    for place, tensor, message in wrong:
        with pytest.raises(ValueError, match=message):
            emulator(config, (*args[:place], tensor, *args[place + 1 :]))
    emulator(config, args)
