"""The speculative kernels on a GPU: random histories against sequential decoding in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gdn_mtp.cute.compile import FUNCTION
from gdn_mtp.cute.config_speculative import SpeculativeConfig
from gdn_mtp.cute.kernels_speculative import TACTICS
from gdn_support import BF16, DEVICE, FP16, FP32
from kernel_dispatch import as_arch
from speculative_history import CROWDED, MISUSES, USES, KernelHistory, KernelSetup

SETUPS = (
    KernelSetup(K=128, V=128, variable=False),
    KernelSetup(
        max_tokens=8,
        capacity=24,
        H=2,
        HV=4,
        K=128,
        V=128,
        state=BF16,
        variable=False,
        tactic=TACTICS["w4t1e"],
    ),
    KernelSetup(max_tokens=8, capacity=32, H=2, HV=6, K=128, V=128, tactic=TACTICS["w4t2"]),
    KernelSetup(max_tokens=6, capacity=29, tree=True, index=torch.int64, tactic=TACTICS["w2t1s"]),
    KernelSetup(max_tokens=6, capacity=24, K=128, V=128, tree=True, state=BF16, tactic=TACTICS["w4t1s"]),
    KernelSetup(max_tokens=4, K=128, V=128, tree=True, state=BF16, tactic=TACTICS["w4t1sb5"], crowded=True),
    KernelSetup(max_tokens=8, capacity=24, tactic=TACTICS["w4t1s"], **CROWDED),
    KernelSetup(max_tokens=6, capacity=24, tree=True, tactic=TACTICS["w4t1sb6"], **CROWDED),
    KernelSetup(max_tokens=3, H=2, HV=6, index=torch.int64, tactic=TACTICS["w4t1s"], **CROWDED),
    KernelSetup(max_tokens=4, tactic=TACTICS["w4t1sb7"], debug=True, **CROWDED),
    KernelSetup(max_tokens=4, tree=True, forgets=True, tactic=TACTICS["w4t1sb7"], **CROWDED),
    KernelSetup(max_tokens=16, capacity=32, H=2, HV=4, K=128, V=128, tree=True, tactic=TACTICS["w4t1s"]),
    KernelSetup(max_tokens=16, capacity=32, K=128, V=128, tactic=TACTICS["w4t2s"]),
    KernelSetup(max_tokens=11, capacity=32, K=128, V=128, tree=True, io=FP16, state=BF16, variable=False),
    KernelSetup(max_tokens=16, capacity=32, K=128, V=128, tree=True, state=BF16, tactic=TACTICS["w4t2s"]),
    KernelSetup(max_tokens=16, capacity=32, io=FP32, l2norm=False, tactic=TACTICS["w4t1r"]),
    KernelSetup(max_tokens=5, capacity=16, K=128, V=128, tactic=TACTICS["w2t2s"]),
    KernelSetup(max_tokens=1, capacity=9, state=BF16, variable=False, tactic=TACTICS["w2t1r"]),
    KernelSetup(max_tokens=6, capacity=29, tree=True, tactic=TACTICS["w4t1s"], debug=True),
    KernelSetup(HV=3, V=128, gates=FP32, bias=BF16, forgets=True, tactic=TACTICS["w4t1sb4"]),
    KernelSetup(max_tokens=11, capacity=32, K=128, tree=True, state=BF16, forgets=True),
    KernelSetup(K=128, V=128, state=BF16, apart=True, tactic=TACTICS["w4t1r"]),
)
STEPS = 60


def arch_of_device() -> Any:
    return as_arch(DEVICE) if DEVICE.type == "cuda" else None


def has_kernels() -> bool:
    arch = arch_of_device()
    return arch is not None and arch.supports_pdl


def launch(config: SpeculativeConfig, args: tuple[Any, ...]) -> None:
    FUNCTION.load(config, arch_of_device().name)(*args)


def test_histories_have_every_tactic() -> None:
    assert {setup.tactic for setup in SETUPS} == set(TACTICS.values())
    one_reader = [x for x in SETUPS if x.config("verify", x.max_tokens, "counts").one_reader]
    assert {x.tree for x in one_reader} == {False, True}


@pytest.mark.skipif(not has_kernels(), reason="needs a GPU of SM90 or newer")
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_history(setup: KernelSetup) -> None:
    history = KernelHistory(setup, launch, pool_size=9, device=DEVICE)
    full = setup.capacity - 2 * setup.max_tokens
    history.verify([2, -1, 0, 7], setup.max_tokens, full)
    history.verify([2, 0, 1, 7], setup.max_tokens, full)
    history.materialize([0, -1, 3])
    for _ in range(STEPS):
        history.step(5)
    history.commit(list(range(9)))


def misuse(name: str) -> None:
    """That misuse in debug mode, which ends the process's use of the GPU."""
    MISUSES[name].launch(launch, DEVICE)
    torch.cuda.synchronize()


@pytest.mark.skipif(not has_kernels(), reason="needs a GPU of SM90 or newer")
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_stops_the_kernel_in_debug_mode(name: str) -> None:
    code = f"import test_speculative_kernel as t; t.misuse({name!r})"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert MISUSES[name].message in done.stdout + done.stderr
    assert "device-side assert" in done.stderr


@pytest.mark.skipif(not has_kernels(), reason="needs a GPU of SM90 or newer")
@pytest.mark.parametrize("name", USES)
def test_what_is_passed_over_does_not_stop_the_kernel(name: str) -> None:
    USES[name].launch(launch, DEVICE)
    torch.cuda.synchronize()
