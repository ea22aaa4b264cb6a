"""The arguments of `trtllm_batch_decode_with_kv_cache_mla`, ours and those of the installed FlashInfer."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from pathlib import Path

import pytest
from flashinfer_mla import installed
from mla_core import trtllm_batch_decode_with_kv_cache_mla

pytestmark = pytest.mark.skipif(not installed(), reason="needs flashinfer-python; see nox -s peers")

NAME = trtllm_batch_decode_with_kv_cache_mla.__name__
REQUIRED = "required"


def flashinfers() -> dict[str, object]:
    """Name and default of each parameter, from its source: the module needs what FlashInfer depends on."""
    root = importlib.metadata.distribution("flashinfer-python").locate_file("flashinfer/mla/_core.py")
    module = ast.parse(Path(str(root)).read_text(encoding="utf-8"))
    (function,) = (x for x in module.body if isinstance(x, ast.FunctionDef) and x.name == NAME)
    arguments = function.args
    assert not arguments.posonlyargs
    assert not arguments.kwonlyargs
    names = [x.arg for x in arguments.args]
    defaults = [ast.literal_eval(x) for x in arguments.defaults]
    return dict(zip(names, [REQUIRED] * (len(names) - len(defaults)) + defaults, strict=True))


def test_ours_begin_like_flashinfers() -> None:
    parameters = inspect.signature(trtllm_batch_decode_with_kv_cache_mla).parameters.values()
    ours = [(p.name, REQUIRED if p.default is inspect.Parameter.empty else p.default) for p in parameters]
    theirs = list(flashinfers().items())
    assert len(theirs) > 10
    assert ours[: len(theirs)] == theirs
