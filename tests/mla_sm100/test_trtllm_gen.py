"""The provider `trtllm-gen` without a GPU or FlashInfer: what it declines, and what a launch hands over.

FlashInfer is replaced by `trtllm_gen_model`, and the provider registered for the CPU.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import kernel_dispatch
import pytest
import torch
import trtllm_gen_model as model
from kernel_dispatch import Arch, ArgumentError, NoKernelError, Provider
from kernel_testing import assert_close_elementwise
from mla_core import DecodeProblem, plan
from mla_sm100 import trtllm_gen
from torch.utils._python_dispatch import TorchDispatchMode
from trtllm_gen_cases import (
    BF16,
    CASES,
    E4M3,
    FP16,
    LOGIT_BOUND,
    LSE_ROUNDOFF,
    NAME,
    SCALE,
    Case,
    assert_decoded,
    assert_lse,
    decode_and_check,
    decode_here,
)

GROUP = DecodeProblem.entry_point_group
PROBLEM = DecodeProblem(batch=3, q_len=2, num_heads=16, page_size=64, max_seq_len=8192)
B200 = Arch.from_name("sm_100a")


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """FlashInfer as modelled, in `sys.modules` and apparently installed."""
    package, mla, utils = (ModuleType(f"flashinfer{name}") for name in ("", ".mla", ".utils"))
    mla.trtllm_batch_decode_with_kv_cache_mla = model.trtllm_batch_decode_with_kv_cache_mla
    utils.get_trtllm_gen_multi_ctas_kv_counter_bytes = model.get_trtllm_gen_multi_ctas_kv_counter_bytes
    for module in (package, mla, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(trtllm_gen, "_installed_version", lambda: "0.7.2")
    monkeypatch.setattr(trtllm_gen, "_counters_of", {})
    kernel_dispatch.reload_providers()
    model.CALLS.clear()
    model.COUNTERS.clear()
    yield mla
    kernel_dispatch.reload_providers()


@pytest.fixture
def on_cpu() -> Iterator[Provider]:
    """The provider, registered for the CPU."""
    with kernel_dispatch.registered(
        GROUP, replace(trtllm_gen.PROVIDER, name=NAME, archs=("cpu",))
    ) as provider:
        yield provider


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_oracle(case: Case, on_cpu: Provider) -> None:
    decode_and_check(case)


def test_some_cases_have_rows_without_keys_both_split_and_not() -> None:
    blind = [(case, length) for case in CASES for length in case.lengths if length < case.q_len]
    assert {(case.max_seq_len or 0) > model.LONGEST_UNSPLIT for case, _ in blind} == {True, False}
    assert {length for _, length in blind} >= {0, 2}


def test_a_launch_hands_over_every_argument(on_cpu: Provider) -> None:
    case = Case((70, 300, 5), q_len=2)
    arguments = case.inputs()
    lse = torch.empty(3, 2, 16)
    out = torch.empty(3, 2, 16, 512, dtype=BF16)
    scales = {"softmax_scale": 0.25, "output_scale": 3.0}
    decode_here(arguments, out=out, lse=lse, return_lse=True, enable_pdl=True, is_var_seq=True, **scales)
    call = model.CALLS[-1]
    for name in ("query", "kv_cache", "block_tables", "seq_lens"):
        assert call[name].data_ptr() == arguments[name].data_ptr()
        assert call[name].shape == arguments[name].shape
    assert call["out"].data_ptr() == out.data_ptr()
    assert call["lse"].data_ptr() == lse.data_ptr()
    assert call["lse"].shape == (6, 16)
    plain = {name: value for name, value in call.items() if not isinstance(value, torch.Tensor)}
    assert plain == {
        "qk_nope_head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "max_seq_len": arguments["block_tables"].shape[1] * 64,
        "sparse_mla_top_k": 0,
        "bmm1_scale": 0.25,
        "bmm2_scale": 3.0,
        "sinks": None,
        "skip_softmax_threshold_scale_factor": None,
        "enable_pdl": True,
        "backend": "trtllm-gen",
        "is_var_seq": True,
        "uses_shared_paged_kv_idx": True,
        "return_lse": True,
        "cute_dsl_impl": "auto",
        "kv_scale_format": "auto",
        "cum_seq_lens_q": None,
        "max_q_len": None,
        "sparse_mla_top_k_lens": None,
        "enable_dcp": False,
        "cp_world": 1,
        "cp_rank": 0,
        "causal_seqlens_kv_global": None,
        "use_fp16_softmax": None,
        "return_lse_base": "basee",
    }


@pytest.mark.parametrize(
    ("option", "value", "argument"),
    [
        ("enable_pdl", False, "enable_pdl"),
        ("enable_pdl", None, "enable_pdl"),
        ("max_seq_len", 100, "max_seq_len"),
        ("is_var_seq", False, "is_var_seq"),
        ("return_lse", False, "return_lse_base"),
    ],
)
def test_options_reach_the_call(option: str, value: object, argument: str, on_cpu: Provider) -> None:
    decode_here(Case((64, 64)).inputs(), **{option: value})
    assert model.CALLS[-1][argument] == (None if option == "return_lse" else value)


def test_ragged_queries_bring_their_longest_request(on_cpu: Provider) -> None:
    arguments = Case((33, 50), q_lens=(2, 5)).inputs()
    decode_here(arguments)
    call = model.CALLS[-1]
    assert call["cum_seq_lens_q"] is arguments["cum_seq_lens_q"]
    assert call["max_q_len"] == 5
    assert call["query"].shape == (7, 16, 576)


def test_other_dimensions_bring_their_unabsorbed_size(on_cpu: Provider) -> None:
    decode_here(Case((5,), latent=256).inputs())
    call = model.CALLS[-1]
    assert (call["qk_nope_head_dim"], call["kv_lora_rank"], call["qk_rope_head_dim"]) == (64, 256, 64)


def test_device_scales_mean_what_floats_mean(on_cpu: Provider) -> None:
    arguments = Case((70, 300), q_len=2, dtype=E4M3).inputs()
    floats = {"softmax_scale": 0.125, "output_scale": 0.75}
    tensors = {name: torch.tensor([value]) for name, value in floats.items()}
    out, lse = decode_here(arguments, return_lse=True, **floats)
    assert isinstance(model.CALLS[-1]["bmm1_scale"], float)
    device_out, device_lse = decode_here(arguments, return_lse=True, **tensors)
    assert model.CALLS[-1]["bmm1_scale"].data_ptr() == tensors["softmax_scale"].data_ptr()
    assert model.CALLS[-1]["bmm2_scale"].data_ptr() == tensors["output_scale"].data_ptr()
    assert_decoded(out, arguments, **floats)
    assert_decoded(device_out, arguments, **floats)
    assert_close_elementwise(device_lse, lse.double(), LOGIT_BOUND, LSE_ROUNDOFF, "lse")


def test_each_scale_touches_its_own_product(on_cpu: Provider) -> None:
    arguments = Case((70, 300)).inputs()
    out, lse = decode_here(arguments, return_lse=True)
    doubled, same_lse = decode_here(arguments, return_lse=True, output_scale=2.0)
    assert torch.equal(doubled, 2 * out)
    assert torch.equal(same_lse, lse)
    _, other_lse = decode_here(arguments, return_lse=True, softmax_scale=2 * SCALE)
    assert not torch.equal(other_lse, lse)


def test_the_lse_of_one_key_is_its_logit(on_cpu: Provider) -> None:
    arguments = Case((1, 1)).inputs()
    _, lse = decode_here(arguments, return_lse=True, softmax_scale=0.5)
    key = arguments["kv_cache"][arguments["block_tables"][1, 0].long(), 0].double()
    logit = 0.5 * (arguments["query"][1, 0].double() @ key)
    assert_close_elementwise(lse[1, 0], logit, 4 * LOGIT_BOUND, 0.0, "lse")


# Workspace and counters


def test_counters_are_zeroed_once_per_workspace(on_cpu: Provider) -> None:
    arguments = Case((70, 300)).inputs()
    workspaces = [torch.full((4 << 20,), 0x7F, dtype=torch.uint8) for _ in range(2)]
    decode_here(arguments, workspace=workspaces[0])
    mine = model.COUNTERS[-1]
    version = mine._version
    for workspace in workspaces:
        decode_here(arguments, workspace=workspace)
    decode_here(arguments, workspace=workspaces[0])
    again, other, last = model.COUNTERS[-3:]
    assert again is mine
    assert last is mine
    assert mine._version == version  # nothing wrote to it, so nothing zeroed it again
    assert other.data_ptr() != mine.data_ptr()


def test_a_workspace_first_seen_in_a_capture_has_its_own_bytes_zeroed_at_every_launch(
    on_cpu: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Case((70, 300)).inputs()
    known, unknown = (torch.full((4 << 20,), 0x7F, dtype=torch.uint8) for _ in range(2))
    decode_here(arguments, workspace=known)
    mine = model.COUNTERS[-1]
    monkeypatch.setattr(trtllm_gen, "_capturing", lambda: True)
    decode_here(arguments, workspace=known)
    assert model.COUNTERS[-1] is mine
    for _ in range(2):
        unknown[:256] = 0x7F
        decode_here(arguments, workspace=unknown)  # the model checks that they are zero
        assert model.COUNTERS[-1].data_ptr() == unknown.data_ptr()
        assert (
            model.CALLS[-1]["workspace_buffer"].data_ptr() >= unknown.data_ptr() + model.COUNTERS[-1].numel()
        )
    monkeypatch.setattr(trtllm_gen, "_capturing", lambda: False)
    decode_here(arguments, workspace=unknown)
    assert model.COUNTERS[-1].data_ptr() != unknown.data_ptr()


def test_counters_are_kept_for_a_bounded_number_of_workspaces(
    on_cpu: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Case((70, 300)).inputs()
    decode_here(arguments)
    monkeypatch.setattr(trtllm_gen, "MAX_WORKSPACES", len(trtllm_gen._counters_of))
    workspace = torch.full((4 << 20,), 0x7F, dtype=torch.uint8)
    decode_here(arguments, workspace=workspace)
    assert model.COUNTERS[-1].data_ptr() == workspace.data_ptr()


def test_problems_of_other_counter_sizes_do_not_share_counters(on_cpu: Provider) -> None:
    workspace = torch.full((8 << 20,), 0x7F, dtype=torch.uint8)
    decode_here(Case((70, 300)).inputs(), workspace=workspace)
    small = model.COUNTERS[-1]
    decode_here(Case((70, 300), num_heads=64).inputs(), workspace=workspace)
    assert model.COUNTERS[-1].numel() > small.numel()
    decode_here(Case((70, 300)).inputs(), workspace=workspace)
    assert model.COUNTERS[-1] is small


@pytest.mark.parametrize("q_len", [1, 300])
def test_the_workspace_holds_what_flashinfer_carves_from_it(q_len: int) -> None:
    kernel = trtllm_gen.TrtllmGenKernel(
        model.trtllm_batch_decode_with_kv_cache_mla, model.get_trtllm_gen_multi_ctas_kv_counter_bytes
    )
    problem = replace(PROBLEM, batch=7, num_heads=128, q_len=q_len, return_lse=True)
    partial = 148 * 64 * (8 + 2 * 512)
    stats = 8 * 7 * 128 * (256 if q_len == 1 else 512) + (1 << 20)
    assert kernel.workspace_nbytes(problem, B200) >= partial + stats + 4 * 7 * 128
    without = kernel.workspace_nbytes(replace(problem, return_lse=False), B200)
    assert kernel.workspace_nbytes(problem, B200) - without == stats
    assert partial <= without <= 64 << 20


def test_nothing_outside_the_workspace_is_written(on_cpu: Provider) -> None:
    with kernel_dispatch.debug():  # canaries around it; the model fills what it is given
        decode_here(Case((70, 300), q_len=2).inputs(), return_lse=True)
    needed = plan(replace(PROBLEM, return_lse=True), "cpu", NAME).workspace_nbytes
    with pytest.raises(ArgumentError, match=r"workspace: \d+ bytes, expected at least"):
        decode_here(Case((70, 300)).inputs(), workspace=torch.empty(needed // 1000, dtype=torch.uint8))


# What a call may not look like


def spread(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values, twice as far apart along `dim`."""
    every_second = tuple(slice(None, None, 2) if axis == dim else slice(None) for axis in range(tensor.dim()))
    return tensor.repeat_interleave(2, dim)[every_second]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further on in memory."""
    memory = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    start = next(i for i in range(8) if (memory.data_ptr() + i * memory.element_size()) % 16 == 0) + 1
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def narrow_head(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in rows that are one element longer."""
    return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", lambda tensor: spread(tensor, 0)),
        ("out", lambda tensor: spread(tensor, 2)),
        ("out", shifted),
        ("block_tables", lambda tensor: spread(tensor, 0)),
        ("query", lambda tensor: spread(tensor, 0)),
        ("query", shifted),
        ("query", narrow_head),
        ("kv_cache", shifted),
        ("kv_cache", narrow_head),
        ("lse", lambda tensor: spread(tensor, 0)),
    ],
)
def test_layouts_that_flashinfer_misreads_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], on_cpu: Provider
) -> None:
    arguments = Case((70, 300), q_len=2).inputs()
    arguments["out"] = torch.zeros(2, 2, 16, 512, dtype=BF16)
    arguments["lse"] = torch.zeros(2, 2, 16)
    arguments["return_lse"] = True
    decode_here(arguments)
    arguments[name] = change(arguments[name])
    before = len(model.CALLS)
    with pytest.raises(ArgumentError, match=f"^{name}: .* for this provider"):
        decode_here(arguments)
    assert not any(call["out"].data_ptr() == arguments["out"].data_ptr() for call in model.CALLS[before:])


@pytest.mark.parametrize("dim", [1, 2])
def test_strides_that_flashinfer_understands_are_taken(dim: int, on_cpu: Provider) -> None:
    arguments = Case((70, 300), q_len=2).inputs()
    if dim == 2:
        arguments["query"] = spread(arguments["query"], 2)  # heads apart
    arguments["kv_cache"] = spread(arguments["kv_cache"], dim - 1)  # pages, or keys, apart
    heads_apart = torch.zeros(2, 2, 32)[..., :16]
    out, lse = decode_here(arguments, lse=heads_apart, return_lse=True)
    assert lse is heads_apart
    assert_decoded(out, arguments, softmax_scale=SCALE)
    assert_lse(lse, arguments, softmax_scale=SCALE)


def test_an_absent_page_in_use_is_refused_in_debug_mode(on_cpu: Provider) -> None:
    arguments = Case((70, 300)).inputs()
    arguments["block_tables"][:, -1] = -1
    with kernel_dispatch.debug():
        decode_here(arguments)
        arguments["block_tables"][1, 2] = -1
        with pytest.raises(ArgumentError, match="block_tables: a negative entry"):
            decode_here(arguments)


class NoSync(TorchDispatchMode):
    """Refuses whatever reads a device from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_to_copy"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("q_lens", [None, (2, 3)])
def test_a_launch_does_not_wait_for_the_device(q_lens: tuple[int, ...] | None) -> None:
    arguments = Case((70, 300), q_len=2, q_lens=q_lens, dtype=E4M3).inputs()
    offsets = arguments.get("cum_seq_lens_q")
    scales = {"softmax_scale_is_tensor": True, "output_scale_is_tensor": True}
    sizes = {"batch": 2, "q_len": 3 if q_lens else 2, "ragged": q_lens is not None}
    problem = replace(PROBLEM, q_dtype=E4M3, kv_dtype=E4M3, **sizes, **scales)
    layout = trtllm_gen.WorkspaceLayout(1024, 1 << 20)
    launcher = trtllm_gen.Launcher(problem, layout, lambda **call: None, torch.device("cpu"))
    lse = None if q_lens else torch.empty(2, 2, 16)
    out = torch.empty(*arguments["query"].shape[:-1], 512, dtype=BF16)
    tensors = [arguments[name] for name in ("query", "kv_cache", "block_tables", "seq_lens")]
    workspace = torch.empty(layout.nbytes, dtype=torch.uint8)
    with NoSync():
        launcher(*tensors, offsets, torch.ones(1), torch.ones(1), out, lse, workspace)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            tensors[3].sum().item()


# Choice, loading, planning


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 65}, "num_heads = 65, the kernels take 1 to 64, and 128"),
        ({"num_heads": 96}, "num_heads = 96"),
        ({"num_heads": 127}, "num_heads = 127"),
        ({"num_heads": 64, "kv_lora_rank": 256}, "num_heads = 64 with kv_lora_rank = 256.*up to 32"),
        ({"kv_lora_rank": 128}, r"kv_lora_rank \+ qk_rope_head_dim = 128 \+ 64"),
        ({"qk_rope_head_dim": 32}, r"512 \+ 32"),
        ({"page_size": 16, "max_pages": None}, "page_size = 16, the kernels take 32 and 64"),
        ({"page_size": 128, "max_pages": None}, "page_size = 128"),
        ({"q_dtype": FP16, "kv_dtype": FP16}, "query and cache in torch.float16"),
        ({"out_dtype": FP16}, "output in torch.float16"),
        ({"q_dtype": E4M3, "kv_dtype": E4M3, "out_dtype": E4M3}, "output in torch.float8_e4m3fn"),
        ({"ragged": True, "return_lse": True}, "return_lse with ragged queries"),
        ({"batch": 65536}, "batch = 65536"),
        ({"softmax_scale_is_tensor": True, "output_scale_is_tensor": True}, "bfloat16.*fp8 only"),
        ({"q_dtype": E4M3, "kv_dtype": E4M3, "softmax_scale_is_tensor": True}, "two of a kind"),
        ({"q_dtype": E4M3, "kv_dtype": E4M3, "output_scale_is_tensor": True}, "two of a kind"),
    ],
    ids=str,
)
def test_declines_with_a_reason(changes: dict[str, Any], reason: str, on_cpu: Provider) -> None:
    with pytest.raises(NoKernelError, match=reason):
        kernel_dispatch.resolve(replace(PROBLEM, **changes), "cpu", NAME)
    assert not model.CALLS


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 1},
        {"num_heads": 64},
        {"num_heads": 128},
        {"num_heads": 32, "kv_lora_rank": 256},
        {"page_size": 32, "max_pages": None},
        {"q_dtype": E4M3, "kv_dtype": E4M3, "softmax_scale_is_tensor": True, "output_scale_is_tensor": True},
        {"ragged": True},
        {"return_lse": True, "enable_pdl": True},
        {"batch": 65535},
    ],
    ids=str,
)
def test_takes(changes: dict[str, Any]) -> None:
    assert trtllm_gen.PROVIDER.objection(replace(PROBLEM, **changes), B200) is None


@pytest.mark.parametrize("arch", ["sm_90a", "sm_110a", "sm_120a", "cpu"])
def test_other_architectures_are_declined(arch: str) -> None:
    reason = trtllm_gen.PROVIDER.objection(PROBLEM, Arch.from_name(arch))
    assert reason == f"is for sm_100, sm_103; this is {arch}"
    assert trtllm_gen.PROVIDER.objection(PROBLEM, Arch.from_name("sm_103a")) is None


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        (None, False),
        ("0.6.18.post1", False),
        ("0.7.1", False),
        ("0.7.2", True),
        ("0.7.2.post1", True),
        ("0.7.10", True),
        ("0.8.0rc1", False),
        ("0.8", False),
        ("1.0", False),
        ("main", False),
    ],
)
def test_the_reason_names_the_installed_version(
    version: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtllm_gen, "_installed_version", lambda: version)
    reason = trtllm_gen.PROVIDER.objection(PROBLEM, B200)
    here = "none is installed" if version is None else f"{version} is installed"
    expected = f"needs flashinfer-python 0.7.2 or newer, below 0.8; {here}"
    assert reason == (None if taken else expected)


def test_auto_prefers_our_kernels_and_prefers_it_to_pytorch(on_cpu: Provider) -> None:
    assert kernel_dispatch.explain(PROBLEM, "cpu").chosen == NAME
    ours = replace(on_cpu, name="ours", supports=lambda problem, arch: None, priority=10)
    with kernel_dispatch.registered(GROUP, ours):
        explanation = kernel_dispatch.explain(PROBLEM, "cpu")
        assert explanation.chosen == "ours"
        assert {row.name: row.status for row in explanation.rows}[NAME] == "supported"
        assert NAME in {selection.provider.name for selection in kernel_dispatch.candidates(PROBLEM, "cpu")}


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_it_is_registered_behind_our_kernels(arch: str) -> None:
    explanation = kernel_dispatch.explain(PROBLEM, arch)
    assert explanation.chosen == "sm100"
    assert {row.name: row.status for row in explanation.rows}["trtllm-gen"] == "supported"
    assert kernel_dispatch.resolve(PROBLEM, arch, "trtllm-gen").kernel.tactics(PROBLEM, B200) == ("default",)
    smaller = replace(PROBLEM, kv_lora_rank=256)
    assert kernel_dispatch.explain(smaller, arch).chosen == "trtllm-gen"


def test_a_call_may_be_tuned_between_it_and_pytorch(on_cpu: Provider) -> None:
    with kernel_dispatch.autotune(progress=False) as tuner:
        decode_here(Case((70, 300)).inputs(), backend="auto")
    (choice,) = tuner.choices.values()
    assert choice.provider in (NAME, "torch")
    assert len(model.CALLS) > 3


def test_another_interface_is_named_when_it_is_loaded(on_cpu: Provider, flashinfer: ModuleType) -> None:
    flashinfer.trtllm_batch_decode_with_kv_cache_mla = lambda query, kv_cache, lse=None: None
    with pytest.raises(NoKernelError, match=r"0\.7\.2 has no argument backend, .*workspace_buffer"):
        kernel_dispatch.resolve(PROBLEM, "cpu", NAME)


def test_planning_launches_once_and_shows_what_flashinfer_says(
    on_cpu: Provider, flashinfer: ModuleType
) -> None:
    plan(replace(PROBLEM, return_lse=True), "cpu", NAME)
    (call,) = model.CALLS
    assert call["query"].shape == (3, 2, 16, 576)
    assert call["max_seq_len"] == 8192
    assert call["block_tables"].shape == (3, 128)
    plan(replace(PROBLEM, ragged=True), "cpu", NAME)
    assert model.CALLS[-1]["query"].shape == (3, 16, 576)

    def missing(**arguments: Any) -> None:
        raise RuntimeError("Missing TRTLLM-GEN kernel (decode)")

    missing.__signature__ = inspect.signature(model.trtllm_batch_decode_with_kv_cache_mla)
    flashinfer.trtllm_batch_decode_with_kv_cache_mla = missing
    kernel_dispatch.reload_providers()
    with pytest.raises(RuntimeError, match="Missing TRTLLM-GEN kernel"):
        plan(PROBLEM, "cpu", NAME)


def test_no_plan_is_made_while_a_graph_is_captured(on_cpu: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtllm_gen, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="none can be made while a CUDA graph is being captured"):
        plan(PROBLEM, "cpu", NAME)


def test_flashinfer_is_not_imported_before_loading() -> None:
    code = (
        "import sys; from kernel_dispatch import as_arch; from mla_core import DecodeProblem; "
        "from mla_sm100.trtllm_gen import PROVIDER; "
        "problem = DecodeProblem(batch=1, num_heads=16, page_size=64, max_seq_len=64); "
        "PROVIDER.objection(problem, as_arch('sm_100a')); "
        "sys.exit(any(name.startswith(('flashinfer', 'cutlass')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_blind_rows_are_those_before_the_first_key() -> None:
    seq_lens = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    blind = trtllm_gen.rows_without_keys(seq_lens, None, (4, 3))
    assert blind.tolist() == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]
    offsets = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32)
    ragged = trtllm_gen.rows_without_keys(seq_lens, offsets, (6,))
    assert ragged.tolist() == [True, True, True, False, False, False]
