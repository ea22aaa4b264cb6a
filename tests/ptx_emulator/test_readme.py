"""What the README shows runs as it is written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_emulator.host import cuda_source

README = Path(__file__).resolve().parents[2] / "shared/ptx-emulator/README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README.read_text(encoding="utf-8")) if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README describes."""
    folder = tmp_path_factory.mktemp("readme")
    (first,) = blocks("python")
    ptx = re.search(r'PTX = """\n(.*?)"""', first, re.DOTALL)
    assert ptx is not None
    (folder / "double_it.ptx").write_text(ptx[1])
    for text in blocks("py"):
        name = re.match(r"# (\w+\.py)\n", text)
        assert name is not None, "a Python file of the README begins with its name"
        (folder / name[1]).write_text(text)
    return folder


def run(folder: Path, *command: str) -> str:
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_files(folder: Path) -> None:
    assert "global load bytes" in run(folder, "scale.py")


@pytest.mark.skipif(
    not (os.environ.get("NVCC") or shutil.which("nvcc") or cuda_source._nvrtc()),
    reason="neither nvcc nor NVRTC is installed",
)
def test_a_cuda_source_with_a_tensor_map(folder: Path) -> None:
    run(folder, "transpose.py")


def test_the_test(folder: Path) -> None:
    plugin = [] if _is_installed() else ["-p", "ptx_emulator.pytest_plugin"]
    assert "1 passed" in run(folder, "-m", "pytest", "-q", *plugin, "test_scale.py")


@pytest.mark.parametrize("command", "".join(blocks("console")).splitlines())
def test_command(folder: Path, command: str) -> None:
    prompt, python, *arguments = shlex.split(command)
    assert (prompt, python) == ("$", "python")
    assert run(folder, *arguments)


def _is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.name == "ptx_emulator" for point in entry_points(group="pytest11"))
