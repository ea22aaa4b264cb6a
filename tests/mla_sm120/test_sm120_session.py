"""What a session on a GPU says at its end, with workers of xdist and without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mla_sm120 import load


@pytest.fixture
def plugin(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The conftest of this folder, as if no test had run."""
    found = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    monkeypatch.setattr(found, "origins", {})
    monkeypatch.setattr(found, "largest_errors", {})
    monkeypatch.setattr(load, "origins", {})
    return found


def summary(plugin: Any) -> list[str]:
    lines: list[str] = []
    plugin.pytest_terminal_summary(SimpleNamespace(section=lines.append, line=lines.append))
    return lines


def test_without_workers(plugin: Any) -> None:
    assert summary(plugin) == []
    load.origins["decode_bf16", "sm_90a"] = "cubin of the wheel, ptxas 13.0.88"
    for error in (0.25, 0.5, 0.125):
        plugin.keep({}, {"bf16": error})
    plugin.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace()))
    assert summary(plugin) == [
        "mla-sm120 on a GPU",
        "decode_bf16 for sm_90a: cubin of the wheel, ptxas 13.0.88",
        "largest error of bf16: 0.500 of its bound",
    ]


def test_with_workers(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = [SimpleNamespace()]  # one that crashed
    for unit, errors in (("combine", {"bf16": 0.5, "fp16": 0.75}), ("decode_fp16", {"bf16": 0.25})):
        monkeypatch.setattr(plugin, "origins", {})
        monkeypatch.setattr(plugin, "largest_errors", errors)
        monkeypatch.setattr(load, "origins", {(unit, "sm_90a"): "NVRTC 13.1"})
        nodes.append(SimpleNamespace(workeroutput={}))
        plugin.pytest_sessionfinish(SimpleNamespace(config=nodes[-1]))
    monkeypatch.setattr(plugin, "origins", {})
    monkeypatch.setattr(plugin, "largest_errors", {})
    for node in nodes:
        plugin.pytest_testnodedown(node)
    assert summary(plugin) == [
        "mla-sm120 on a GPU",
        "combine for sm_90a: NVRTC 13.1",
        "decode_fp16 for sm_90a: NVRTC 13.1",
        "largest error of bf16: 0.500 of its bound",
        "largest error of fp16: 0.750 of its bound",
    ]
