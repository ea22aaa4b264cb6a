"""Importing the package starts no CUDA and loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import kernel_dispatch
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"cuda": torch.cuda.is_initialized(), "new": new}))
"""


def imported() -> dict[str, object]:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(output)
    assert isinstance(result, dict)
    return result


def test_import_is_light() -> None:
    result = imported()
    assert result["cuda"] is False
    new = result["new"]
    assert isinstance(new, list)
    foreign = set(new) - set(sys.stdlib_module_names) - {"kernel_dispatch", "filelock", "tqdm"}
    assert not foreign, f"import kernel_dispatch brings in {sorted(foreign)}"


def test_every_exported_name_exists() -> None:
    import kernel_dispatch

    missing = [name for name in kernel_dispatch.__all__ if not hasattr(kernel_dispatch, name)]
    assert missing == []
    assert len(set(kernel_dispatch.__all__)) == len(kernel_dispatch.__all__)
