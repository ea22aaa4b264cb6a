"""The documents are true: examples run, the support table is current, links point at what exists."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_testing import evidence

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "shared/*/*.md",
        "packages/*/*.md",
        "packages/*/docs/*.md",
        "examples/*.md",
        "benchmarks/*.md",
    )
    for path in ROOT.glob(pattern)
)
RESULTS = ROOT / "benchmarks" / "results"
GDN_TABLES = ROOT / "benchmarks" / "gdn_tables.py"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECORD = re.compile(r"`(?:benchmarks/results/)?((?:gdn|mla|copy|emulate)[a-z0-9_]*-[\w/.-]+)`")
RECORDED_FILE = re.compile(r"`([\w-]+\.(?:json|txt))`")  # where documents leave out the folder
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def python_blocks() -> list[object]:
    """Every Python block of every README; the ids are the document and the number of the block."""
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
        for path in DOCUMENTS
        if path.name == "README.md"
        for number, block in enumerate(PYTHON_BLOCK.findall(path.read_text(encoding="utf-8")), start=1)
    ]


def run_block(block: str, folder: Path) -> str:
    """Run a Python block in an interpreter of its own, in `folder`; returns what it printed."""
    command = [sys.executable, "-c", block]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("block", python_blocks())
def test_example_runs_as_written(block: str, tmp_path: Path) -> None:
    run_block(block, tmp_path)


@pytest.mark.parametrize("package", ["mla_core", "gdn_mtp"])
def test_readme_shows_what_explain_prints(package: str, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    explaining = (b for b in PYTHON_BLOCK.findall(text) if "print(kernel_dispatch.explain" in b)
    (block,) = (block for block in explaining if f"import {package}" in block)
    assert f"```python\n{block}```\n\n```\n{run_block(block, tmp_path)}```\n" in text


def test_readme_has_an_example_for_each_operation_package() -> None:
    blocks = "\n".join(PYTHON_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"mla_core", "gdn_mtp", "kernel_dispatch"} <= set(re.findall(r"import (\w+)", blocks))


def test_support_table_is_current() -> None:
    assert evidence.main([str(ROOT / "README.md"), "--check"]) == 0


def test_every_package_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in [*ROOT.glob("shared/*/pyproject.toml"), *ROOT.glob("packages/*/pyproject.toml")]:
        assert f"]({folder.parent.relative_to(ROOT)})" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_at_files_of_the_tree(path: Path) -> None:
    missing = [
        link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_records_that_are_named_exist(path: Path) -> None:
    packages = {folder.name for folder in (ROOT / "packages").iterdir()}
    named = set(RECORD.findall(path.read_text(encoding="utf-8"))) - packages
    assert [name for name in named if not (RESULTS / name).exists()] == []
    if path.parent.name == "docs":
        files = RECORDED_FILE.findall(path.read_text(encoding="utf-8"))
        assert [name for name in files if not any(RESULTS.rglob(name))] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "python -m pip install nox && python -m nox"
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == command
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_tables_of_times_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, GDN_TABLES, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_table_of_times_stands_in_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GDN_TABLES.parent))
    tables = runpy.run_path(str(GDN_TABLES))
    text = "".join(path.read_text(encoding="utf-8") for path in tables["DOCUMENTS"])
    assert sorted(found[2] for found in tables["MARKED"].finditer(text)) == sorted(tables["TABLES"])
    assert tables["unplaced"]([text.replace("<!-- table calls -->", "")]) == ["calls"]
