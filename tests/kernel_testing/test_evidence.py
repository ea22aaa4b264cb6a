"""The support table: what a row must say for its grade, and how the README is rewritten."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from kernel_testing import evidence

CPU: dict[str, Any] = {
    "operation": "MLA decode",
    "dtype": "bf16",
    "arch": "cpu",
    "provider": "torch",
    "grade": "ran on hardware",
    "device": "a CPU",
    "date": datetime.date(2024, 2, 29),
    "command": "nox -s test",
}
GPU = CPU | {"arch": "sm_90a", "device": "a GPU", "result": "benchmarks/results/run.json"}
EMULATED = {name: value for name, value in GPU.items() if name not in ("device", "result")} | {
    "grade": "ran on the emulator"
}
COMPILED = EMULATED | {"grade": "compiled", "report": "40 registers, 0 spills"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one result file and a README without a table."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/run.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"before\n{evidence.BEGIN}\n{evidence.END}\nafter\n")
    return tmp_path


def write_rows(root: Path, *rows: dict[str, Any]) -> None:
    """Write `rows` as the evidence of a package named mla-core."""
    folder = root / "packages/mla-core"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        lines.append("[[evidence]]")
        lines += [f"{key} = {v}" if key == "date" else f"{key} = {str(v)!r}" for key, v in row.items()]
    (folder / "evidence.toml").write_text("\n".join(lines))


@pytest.mark.parametrize("row", [CPU, GPU, EMULATED, COMPILED], ids=["cpu", "gpu", "emulated", "compiled"])
def test_note_ends_the_cell_of_every_grade(root: Path, row: dict[str, Any]) -> None:
    checked = evidence.check_row("mla-core", row | {"note": "all but the combine kernel"}, root)
    assert checked.cell.endswith("`nox -s test`, all but the combine kernel")


@pytest.mark.parametrize("row", [CPU, GPU, EMULATED, COMPILED], ids=["cpu", "gpu", "emulated", "compiled"])
def test_complete_row_is_accepted(root: Path, row: dict[str, Any]) -> None:
    assert evidence.check_row("mla-core", row, root).command == "nox -s test"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (CPU, "device"),
        (CPU, "date"),
        (CPU, "command"),
        (CPU, "dtype"),
        (CPU, "provider"),
        (CPU, "grade"),
        (GPU, "result"),
        (EMULATED, "command"),
        (COMPILED, "report"),
    ],
)
def test_row_without_a_needed_field_is_refused(root: Path, row: dict[str, Any], name: str) -> None:
    incomplete = {key: value for key, value in row.items() if key != name}
    with pytest.raises(evidence.EvidenceError, match=name):
        evidence.check_row("mla-core", incomplete, root)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (CPU, {"grade": "works"}),
        (CPU, {"date": "2024-02-29"}),
        (CPU, {"command": ""}),
        (EMULATED, {"arch": "Hopper"}),
        (CPU, {"tactic": "fast"}),
        (CPU, {"package": "other"}),
        (CPU, {"report": "40 registers"}),
        (EMULATED, {"device": "a GPU"}),
        (COMPILED, {"device": "a GPU"}),
        (GPU, {"result": "benchmarks/results/absent.json"}),
        (GPU, {"result": "README.md"}),
        (GPU, {"result": "benchmarks/results/../../README.md"}),
    ],
    ids=lambda value: next(iter(value)) if len(value) == 1 else value["grade"],
)
def test_row_that_claims_what_it_cannot_is_refused(root: Path, row: dict[str, Any], change: dict) -> None:
    with pytest.raises(evidence.EvidenceError, match=next(iter(change))):
        evidence.check_row("mla-core", row | change, root)


def test_two_rows_of_one_subject_and_grade_are_refused(root: Path) -> None:
    write_rows(root, CPU, CPU | {"device": "another CPU"})
    with pytest.raises(evidence.EvidenceError, match="two rows"):
        evidence.read_evidence(root)


def test_grades_of_one_subject_have_a_column_each(root: Path) -> None:
    write_rows(root, COMPILED, GPU, EMULATED)
    table = evidence.render_table(evidence.read_evidence(root)).splitlines()
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert len(table) == 3
    assert cells[:5] == ["mla-core", "MLA decode", "bf16", "sm_90a", "torch"]
    assert cells[5] == "a GPU, [2024-02-29](benchmarks/results/run.json), `nox -s test`"
    assert cells[6] == "2024-02-29, `nox -s test`"
    assert cells[7] == "40 registers, 0 spills, 2024-02-29, `nox -s test`"


def test_write_then_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(root, CPU)
    readme = root / "README.md"
    assert evidence.main([str(readme), "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert evidence.main([str(readme), "--write"]) == 0
    assert evidence.main([str(readme), "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| mla-core | MLA decode | bf16 | cpu | torch | a CPU, 2024-02-29," in text


@pytest.mark.parametrize(
    "text", ["", evidence.BEGIN, evidence.END + evidence.BEGIN, evidence.BEGIN * 2 + evidence.END]
)
def test_markers_have_to_be_there_once_and_in_order(text: str) -> None:
    with pytest.raises(evidence.EvidenceError, match="expected the line"):
        evidence.replace_table(text, "table")
