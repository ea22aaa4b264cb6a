"""The provider `trtllm-gen` through the installed FlashInfer's own Python code, down to its launcher.

FlashInfer itself is not imported, as that needs what an installation for a GPU brings: its functions on the
way from the public function to the compiled launcher are taken from the source files and run, and in place of
the launcher stands the model that the provider's other tests use.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kernel_dispatch
import pytest
import torch
from flashinfer_mla import installed
from mla_core import DecodeProblem
from mla_sm100 import trtllm_gen

sys.path.insert(0, str(Path(__file__).parents[1] / "mla_sm100"))
import trtllm_gen_model as model
from trtllm_gen_cases import CASES, E4M3, NAME, Case, assert_decoded, decode_and_check, decode_here

pytestmark = pytest.mark.skipif(not installed(), reason="needs flashinfer-python; see nox -s peers")

PUBLIC = "trtllm_batch_decode_with_kv_cache_mla"
COUNTER_BYTES = "get_trtllm_gen_multi_ctas_kv_counter_bytes"
FROM_UTILS = (
    *("log2e", "round_up", "ceil_div", "check_shape_dtype_device", "check_trtllm_gen_sm107_only_feature"),
    *("_check_block_tables_shape", "_check_workspace_buffer_alignment", COUNTER_BYTES),
    "_get_trtllm_gen_multi_ctas_kv_counter_buffer",
    "_resolve_trtllm_gen_multi_ctas_kv_counter_buffer",
)
FROM_CORE = (
    *("MLAHeadDimensions", "deepseek_mla_dimensions", "smaller_mla_dimensions", "nope_mla_dimensions"),
    *("supported_mla_head_dimensions", "_check_trtllm_gen_mla_shape", "_round_to_seq_len_bucket"),
    *("_validate_mla_dcp_args", "TrtllmGenMlaDecodeRunner", f"_{PUBLIC}_impl", PUBLIC),
)


class Tuner:
    """FlashInfer's autotuner when it does not tune: the first runner, with its only tactic."""

    @staticmethod
    def get() -> type[Tuner]:
        return Tuner

    @staticmethod
    def choose_one(
        name: str, runners: list[Any], config: None, inputs: list[torch.Tensor]
    ) -> tuple[Any, int]:
        (runner,) = runners
        return runner, -1


class Runner:
    """Base class of FlashInfer's runners."""

    def __call__(self, inputs: list[torch.Tensor], **options: Any) -> Any:
        return self.forward(inputs, **options)  # type: ignore[attr-defined]


@cache
def flashinfer_code() -> dict[str, Any]:
    """The functions named above, from the installed source files."""
    namespace: dict[str, Any] = {name: getattr(typing, name) for name in typing.__all__}
    namespace |= {
        "AutoTuner": Tuner,
        "TunableRunner": Runner,
        "_build_mla_decode_tuning_config": lambda **options: None,
        "_cute_dsl_incompatibility_reason": lambda *options, **more: "not asked for",
        "dataclass": dataclass,
        "device_support_pdl": lambda device: True,
        "flashinfer_api": lambda trace: lambda function: function,
        "functools": functools,
        "get_compute_capability": lambda device: (10, 0),
        "get_device_sm_count": lambda device: model.SM_COUNT,
        "get_trtllm_gen_fmha_module": lambda: SimpleNamespace(
            trtllm_paged_attention_decode=model.paged_attention_decode
        ),
        "torch": torch,
        "trtllm_batch_decode_mla_trace_dispatch": None,
    }
    root = importlib.metadata.distribution("flashinfer-python").locate_file("flashinfer")
    for path, names in (("utils.py", FROM_UTILS), ("mla/_core.py", FROM_CORE)):
        file = Path(str(root)) / path
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if _defined(node) in names]
        assert {_defined(node) for node in tree.body} == set(names), "FlashInfer's source has changed"
        exec(compile(tree, str(file), "exec"), namespace)
    return namespace


def _defined(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The provider on the CPU, with the installed FlashInfer behind it."""
    modules = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.mla", "flashinfer.utils")}
    setattr(modules["flashinfer.mla"], PUBLIC, flashinfer_code()[PUBLIC])
    setattr(modules["flashinfer.utils"], COUNTER_BYTES, flashinfer_code()[COUNTER_BYTES])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    on_cpu = replace(trtllm_gen.PROVIDER, name=NAME, archs=("cpu",))
    kernel_dispatch.reload_providers()
    model.CALLS.clear()
    with kernel_dispatch.registered(DecodeProblem.entry_point_group, on_cpu):
        yield
    kernel_dispatch.reload_providers()


def test_the_model_has_the_signature_of_the_installed_function() -> None:
    real = inspect.signature(flashinfer_code()[PUBLIC])
    modelled = inspect.signature(getattr(model, PUBLIC))
    assert [(p.name, p.kind, p.default) for p in modelled.parameters.values()] == [
        (p.name, p.kind, p.default) for p in real.parameters.values()
    ]
    assert real.parameters.keys() >= trtllm_gen.PASSED


@pytest.mark.parametrize("batch", [1, 3, 2048])
def test_counters_are_sized_alike(batch: int) -> None:
    for sizes in ((batch, 5, 148), (batch, 128, 148)):
        assert flashinfer_code()[COUNTER_BYTES](*sizes) == getattr(model, COUNTER_BYTES)(*sizes)


def test_the_installed_version_is_one_the_provider_takes() -> None:
    problem = DecodeProblem(batch=3, num_heads=16, page_size=64, max_seq_len=8192)
    assert trtllm_gen.PROVIDER.objection(problem, kernel_dispatch.as_arch("sm_100a")) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_oracle(case: Case) -> None:
    decode_and_check(case)
    assert not model.CALLS  # it was the installed function that ran


@pytest.mark.parametrize("enable_pdl", [None, False])
def test_device_scales_mean_what_floats_mean(enable_pdl: bool | None) -> None:
    arguments = Case((70, 300), q_len=2, dtype=E4M3).inputs()
    floats = {"softmax_scale": 0.125, "output_scale": 0.75}
    tensors = {name: torch.tensor([value]) for name, value in floats.items()}
    assert_decoded(decode_here(arguments, enable_pdl=enable_pdl, **floats), arguments, **floats)
    assert_decoded(decode_here(arguments, enable_pdl=enable_pdl, **tensors), arguments, **floats)


@pytest.mark.parametrize("num_heads", [65, 96, 127])
def test_flashinfer_too_refuses_the_head_counts_that_the_provider_declines(num_heads: int) -> None:
    arguments = Case((70, 300), num_heads=num_heads).inputs()
    with pytest.raises(ValueError, match="64 < num_heads_q < 128"):
        flashinfer_code()[PUBLIC](
            query=arguments["query"],
            kv_cache=arguments["kv_cache"],
            workspace_buffer=torch.zeros(1 << 20, dtype=torch.uint8),
            qk_nope_head_dim=128,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            block_tables=arguments["block_tables"],
            seq_lens=arguments["seq_lens"],
            max_seq_len=300,
            backend="trtllm-gen",
        )
