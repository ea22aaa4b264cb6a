"""verify, commit and materialize as a caller makes them, launched on the emulator instead of a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import gdn_mtp
import pytest
import torch
from cutlass.cute.runtime import make_fake_stream
from emulator_recording import TYPES
from gdn_mtp.cute.kernels_speculative import KERNELS
from gdn_mtp.cute.trace import arguments, kernel
from gdn_mtp.speculative.cute_provider import PROVIDER
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_support import BF16, DEVICE, FP32
from kernel_dispatch import Arch, Provider, registered
from ptx_emulator import Options, compile_cute, emulate, explore
from speculative_support import History, Setup, index_tensor, int32, random_tree
from torch import Tensor

ARCH = "sm_90a"
WRITTEN = {"verify": ("output",), "commit": (), "materialize": ("states",)}


class Emulated:
    """The kernels of the provider `cute`, prepared for the emulator."""

    options = Options()

    def workspace_nbytes(self, problem: SpeculativeProblem, arch: Arch, tactic: str | None = None) -> int:
        return KERNELS.workspace_nbytes(problem, Arch.from_name(ARCH), tactic)

    def tactics(self, problem: SpeculativeProblem, arch: Arch) -> Sequence[str]:
        return KERNELS.tactics(problem, Arch.from_name(ARCH))

    def prepare(
        self, problem: SpeculativeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        config = KERNELS.config(problem, Arch.from_name(ARCH), tactic)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        compiled = compile_cute(kernel(config), *arguments(config), stream, arch=ARCH)
        function = emulate(compiled, ARCH, uninitialised=WRITTEN[problem.mode])

        def launch(*tensors: object) -> None:
            for x in tensors:
                if isinstance(x, Tensor):
                    TYPES[x.data_ptr()] = str(x.dtype).removeprefix("torch.")
            absent = (None,) if problem.mode == "commit" else ()  # states to write elsewhere
            call = function.call(*tensors, *absent)
            explore(call, 1, options=self.options, progress=False).raise_if_wrong()

        return launch


@pytest.fixture(scope="module", autouse=True)
def provider():
    def supports(problem: SpeculativeProblem, arch: Arch) -> str | None:
        return PROVIDER.objection(problem, Arch.from_name(ARCH))

    emulated = Provider("emulated", ("cpu",), supports, Emulated, priority=50)
    with registered(SpeculativeProblem.entry_point_group, emulated):
        yield


on_the_cpu = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="the histories are on the GPU, the emulator on the CPU"
)


@on_the_cpu
@pytest.mark.parametrize(("state", "trees"), [(FP32, False), (BF16, True)], ids=["chains-fp32", "trees-bf16"])
def test_history(state: torch.dtype, trees: bool) -> None:
    setup = Setup(pool_size=4, H=1, HV=2, K=64, V=64, max_tokens=3, state=state)
    history, rng = History(setup, backend="emulated"), random.Random(0)
    for step, slots in enumerate(([2, -1, 0], [0, 3, 2], [3, 2, 0], [2, 0, 3])):
        history.verify(
            slots,
            3,
            step,
            history.random_acceptance(slots, rng)
            if trees
            else {"num_accepted": int32([2 if step else 0, 0, 0])},
            num_tokens=[3, 2, 0] if step == 2 else None,
            parents=[random_tree(3, rng) for _ in slots] if trees else None,
            fold="always" if step == 3 else "auto",
            out=BF16,
        )
    history.commit([0, -1, 2, 3], history.random_acceptance([0, -1, 2, 3], rng))


@on_the_cpu
def test_a_scale_may_lie_on_the_device() -> None:
    setup = Setup(pool_size=3, H=1, HV=2, K=64, V=64, max_tokens=3)
    outputs = []
    for scale in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        history = History(setup)
        named = {"state_pool": history.pool, "state_indices": index_tensor([2, 0]), "cache": history.cache}
        outputs.append(
            gdn_mtp.verify(
                **setup.tokens(2, 3, 0),
                **setup.heads(),
                **named,
                num_accepted=None,
                scale=scale,
                backend="emulated",
            )
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


GARBAGE = (-(2**31), -17, -1, 0, 1, 3, 15, 16, 31, 32, 99, 2**31 - 1)


@on_the_cpu
@pytest.mark.parametrize("accept", ["num_accepted", "accepted_nodes"])
def test_garbage_in_a_cursor_stays_in_its_slot(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No access is out of bounds and no other slot changes, whatever cursors and accept counts hold.

    Races are not looked for: a new window may then lie over pending tokens of the same slot.
    """
    monkeypatch.setattr(Emulated, "options", Options(checks=False))
    monkeypatch.setattr("gdn_mtp.speculative.specs.values_are_readable", lambda tensor: False)
    rng = random.Random(len(accept))

    def words(*shape: int) -> Tensor:
        return int32([rng.choice(GARBAGE) for _ in range(torch.Size(shape).numel())]).view(shape)

    setup = Setup(pool_size=4, H=1, HV=2, K=64, V=64, max_tokens=3)
    history = History(setup, backend="emulated")
    history.verify([0, 1, 2], 3, 0, out=BF16)
    for _ in range(4):
        slots = rng.sample(range(4), 2)
        for slot in slots:
            history.cache.cursor[slot, :3], history.cache.live[slot] = words(3), rng.choice(GARBAGE)
        named = {
            "state_pool": history.pool,
            "state_indices": index_tensor([*slots, rng.choice([-1, 6, 2**31 - 1])]),
            "cache": history.cache,
            "num_accepted": None,
            accept: words(3) if accept == "num_accepted" else words(3, 5),
        }
        unchanged = history.snapshot(slots)
        gdn_mtp.materialize(**named, backend="emulated")
        gdn_mtp.verify(
            **setup.tokens(3, 3, 3), **setup.heads(), **named, num_tokens=words(3),
            parent_indices=words(3, 3), fold=rng.choice(["auto", "always"]), backend="emulated",
        )  # fmt: skip
        gdn_mtp.commit(**named, backend="emulated")
        unchanged()
