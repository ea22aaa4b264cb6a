"""Nox finds packages by folder; plain nox runs what the README calls the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

PYPROJECT = """\
[project]
name = "{name}"
dependencies = {dependencies}
"""


def listed_sessions(folder: Path) -> set[str]:
    """The sessions that nox lists for the noxfile in `folder`."""
    command = [sys.executable, "-m", "nox", "-f", str(folder / "noxfile.py"), "--list", "--json"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return {entry["session"] for entry in json.loads(listing.stdout)}


def add_package(root: Path, parent: str, name: str, dependencies: list[str]) -> None:
    """Add a package to the repository at `root`: a folder with a pyproject.toml."""
    folder = root / parent / name
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, dependencies=json.dumps(dependencies)))


def test_a_package_is_a_folder_with_a_pyproject(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "noxfile.py", tmp_path)
    assert not any(name.startswith("test(") for name in listed_sessions(tmp_path))
    add_package(tmp_path, "shared", "kernel-base", [])
    add_package(tmp_path, "packages", "leaf-kernels", ["kernel-base>=1,<2"])
    (tmp_path / "packages/notes").mkdir()
    found = {name for name in listed_sessions(tmp_path) if name.startswith("test(")}
    assert found == {"test(kernel-base)", "test(leaf-kernels)"}


def test_every_package_of_the_tree_has_a_session(root: Path, noxfile: ModuleType) -> None:
    assert {f"test({name})" for name in noxfile.PACKAGES} <= listed_sessions(root)


def test_closure_follows_the_declared_dependencies(noxfile: ModuleType) -> None:
    names = [package.name for package in noxfile.closure(["mla-core"])]
    assert names == ["kernel-dispatch", "mla-core"]


def test_plain_nox_runs_every_kind_of_test(noxfile: ModuleType) -> None:
    selected = noxfile.nox.options.sessions
    assert {"lint", "types", "test", "repository", "integration", "demo"} == set(selected)
