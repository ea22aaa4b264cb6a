"""The launcher: what it hands to a compiled function, what it refuses, and what it costs the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulation import ARCH, config_of, emulated, run_on_emulator, run_tactic
from kernel_dispatch import Arch, ArgumentError
from kernel_testing.mla import Case, Inputs
from mla_core import DecodeProblem
from mla_sm100.kernels import Division
from mla_sm100.launch import PARAMETERS, Launcher

CASE = Case((130, 0, 1), num_heads=16, q_len=2)


def launcher_of(
    inputs: Inputs, function: Callable[..., None], tactic: str = "single", **changes: Any
) -> tuple[Launcher, torch.Tensor | None]:
    """A launcher of `function` for a GPU of 6 SMs, and its workspace."""
    problem = DecodeProblem(**{**inputs.sizes, **changes})
    division = Division.of(problem, replace(Arch.from_name(ARCH), sm_count=6), tactic)
    nbytes = division.splits.workspace_bytes
    workspace = torch.empty(nbytes, dtype=torch.uint8) if nbytes else None
    return Launcher(function, problem, division), workspace


def launch(launcher: Launcher, inputs: Inputs, workspace: torch.Tensor | None, **changes: Any) -> None:
    query, kv_cache, block_tables, seq_lens = inputs.positional
    arguments = {
        "query": query,
        "kv_cache": kv_cache,
        "block_tables": block_tables,
        "seq_lens": seq_lens,
        "cum_seq_lens_q": inputs.cum_seq_lens_q,
        "softmax_scale": inputs.case.scale,
        "output_scale": 1.0,
        "out": inputs.out,
        "lse": inputs.lse,
        "workspace": workspace,
    }
    assert not changes.keys() - arguments.keys()
    launcher(*{**arguments, **changes}.values())


def test_a_function_gets_its_parameters_in_order() -> None:
    inputs, calls = Inputs(CASE), []
    launcher, workspace = launcher_of(inputs, lambda *given: calls.append(given))
    launch(launcher, inputs, workspace, output_scale=0.5)
    (given,) = calls
    named = dict(zip(PARAMETERS, given, strict=True))
    for name, tensor in zip(
        ("query", "kv_cache", "block_tables", "seq_lens"), inputs.positional, strict=True
    ):
        assert named[name] is tensor
    assert (named["softmax_scale"], named["output_scale"]) == (CASE.scale, 0.5)
    assert named["out"] is inputs.out
    assert named["lse"] is inputs.lse
    assert named["workspace"] is workspace
    assert workspace is not None
    # 3 key tiles of the longest request, 3 requests on 6 SMs
    assert [named[name] for name in PARAMETERS[-4:]] == [2, 2, 2, 6]


def test_a_kernel_that_does_not_split_gets_no_workspace() -> None:
    inputs, calls = Inputs(CASE), []
    launcher, workspace = launcher_of(inputs, lambda *given: calls.append(given), "single-whole-persistent")
    assert workspace is None
    launch(launcher, inputs, torch.empty(4096, dtype=torch.uint8))
    named = dict(zip(PARAMETERS, calls[0], strict=True))
    assert named["workspace"] is None
    assert (named["num_splits"], named["num_clusters"]) == (1, 3)


def test_scales_of_any_shape_and_workspaces_of_int8() -> None:
    inputs, calls = Inputs(CASE), []
    flags = {"softmax_scale_is_tensor": True, "output_scale_is_tensor": True}
    launcher, workspace = launcher_of(inputs, lambda *given: calls.append(given), **flags)
    assert workspace is not None
    scales = {"softmax_scale": torch.tensor(0.1), "output_scale": torch.full((1, 1), 2.0)}
    launch(launcher, inputs, workspace.view(torch.int8), **scales)
    named = dict(zip(PARAMETERS, calls[0], strict=True))
    for name, scale in scales.items():
        assert named[name].shape == (1,)
        assert named[name].data_ptr() == scale.data_ptr()
    assert named["workspace"].dtype is torch.uint8


def shifted(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values so many elements after an address that is a multiple of 16 bytes."""
    block = tensor.new_empty(tensor.numel() + 16)
    start = -block.data_ptr() // tensor.element_size() % 8 + elements
    return block[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def spread(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values with rows that lie so many elements apart."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + elements)
    return tensor.new_empty(shape)[..., : tensor.shape[-1]].copy_(tensor)


@pytest.mark.parametrize("name", ["query", "kv_cache", "out"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: shifted(tensor, 4), r"its address is \d+, expected a multiple of 16"),
        (lambda tensor: spread(tensor, 4), r"a stride in bytes is \d+, expected a multiple of 16"),
    ],
    ids=["address", "stride"],
)
def test_memory_that_is_not_aligned_is_an_error_that_names_it(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    inputs = Inputs(CASE)
    config = config_of(inputs, pair=False, split=True, pdl=True)
    launcher, workspace = launcher_of(inputs, emulated(config))
    tensors = dict(zip(PARAMETERS, inputs.positional, strict=False)) | {"out": inputs.out}
    with pytest.raises(ArgumentError, match=message) as error:
        launch(launcher, inputs, workspace, **{name: change(tensors[name])})
    assert error.value.argument == name
    assert inputs.lse.isnan().all()


def test_other_errors_of_the_function_come_out_as_they_are() -> None:
    inputs = Inputs(CASE)
    config = config_of(inputs, pair=False, split=True, pdl=True)
    launcher, workspace = launcher_of(inputs, emulated(config))
    with pytest.raises(Exception, match=r"dtype|Mismatched type") as error:
        launch(launcher, inputs, workspace, seq_lens=inputs.seq_lens.long())
    assert not isinstance(error.value, ArgumentError)


@pytest.mark.parametrize(
    "tactic",
    [
        *("single", "pair", "single-whole", "pair-whole-persistent", "single-persistent"),
        *("single-x4", "pair-x4-persistent"),
    ],
)
def test_tactics_as_the_provider_launches_them(tactic: str) -> None:
    run = run_tactic(tactic, Inputs(Case((300, 0, 65, 130), num_heads=16, q_len=2, gap=8)))
    decode, *combine = run.function.launches
    config = run.division.config
    assert decode.grid == (run.division.num_clusters * config.cluster_size, 1, 1)
    assert decode.cluster == (config.cluster_size, 1, 1)
    assert decode.shared_bytes == config.smem_bytes
    assert len(combine) == config.split
    assert config.split or "-x" not in tactic
    assert all(launched.pdl == config.pdl for launched in (decode, *combine))


def test_one_request_with_odd_strides_of_one_element_dimensions() -> None:
    """Strides of dimensions of one element mean nothing, whatever they are."""
    inputs = Inputs(Case((65,), num_heads=1))
    inputs.seq_lens = torch.tensor([65, 7], dtype=torch.int32)[::2]
    inputs.lse = torch.full((1, 1, 3), float("nan"))[..., ::3]
    assert inputs.seq_lens.stride() == (2,)
    run_on_emulator(config_of(inputs, pair=False), inputs)


def test_packing_costs_little() -> None:
    """What Plan.run costs beside the compiled function; the bound is for a busy machine."""
    inputs = Inputs(CASE)
    launcher, workspace = launcher_of(inputs, lambda *given: None)
    query, kv_cache, block_tables, seq_lens = inputs.positional
    arguments = (query, kv_cache, block_tables, seq_lens, None, 0.1, 1.0, inputs.out, inputs.lse, workspace)
    best = min(timed(launcher, arguments) for _ in range(20))
    assert best < 5e-6


def timed(launcher: Launcher, arguments: tuple[Any, ...], calls: int = 200) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        launcher(*arguments)
    return (time.perf_counter() - start) / calls
