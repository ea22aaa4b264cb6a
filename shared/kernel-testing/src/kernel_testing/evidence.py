"""The support table of a README, generated from the `evidence.toml` of every package.

`python -m kernel_testing.evidence README.md --write` replaces what stands between the two markers; `--check`
exits with status 1 if that would change anything. A row says that one provider computed one operation for one
dtype on one arch, and how that is known:

    [[evidence]]
    operation = "MLA decode"
    dtype = "bf16"
    arch = "sm_90a"                  # "cpu" or the name of a compute capability
    provider = "torch"
    grade = "ran on hardware"        # or "ran on the emulator", or "compiled"
    device = "NVIDIA H100 80GB HBM3" # hardware only
    date = 2024-02-29                # unquoted
    command = "nox -s bench"
    result = "benchmarks/results/…"  # needed for a GPU that ran it, otherwise optional
    report = "168 registers, …"      # compiled only: registers, spills, stack, shared memory
    note = "sources of 1234567, …"   # optional: what the run did not see of the present sources

The grades have a column each, so that one is never read as another.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BEGIN = "<!-- evidence: begin; written by python -m kernel_testing.evidence README.md --write -->"
END = "<!-- evidence: end -->"

HARDWARE = "ran on hardware"
EMULATOR = "ran on the emulator"
COMPILED = "compiled"
GRADES = (HARDWARE, EMULATOR, COMPILED)

RESULTS_FOLDER = "benchmarks/results/"
_ARCH = re.compile(r"cpu|sm_\d{2,3}[af]?")


class EvidenceError(ValueError):
    """A row of an `evidence.toml`, or the README's markers, are not as they have to be."""


@dataclass(frozen=True)
class Evidence:
    """One checked row; see the module's docstring for what the fields mean."""

    package: str
    operation: str
    dtype: str
    arch: str
    provider: str
    grade: str
    date: datetime.date
    command: str
    device: str | None = None
    result: str | None = None
    report: str | None = None
    note: str | None = None

    @property
    def subject(self) -> tuple[str, str, str, str, str]:
        """What the row is about: the rows that share it share a line of the table."""
        return (self.package, self.operation, self.dtype, self.arch, self.provider)

    @property
    def cell(self) -> str:
        """The row as text of its grade's column, in Markdown."""
        what = self.device if self.grade == HARDWARE else self.report
        linked = f"[{self.date}]({self.result})" if self.result else str(self.date)
        text = ", ".join(part for part in (what, linked, f"`{self.command}`", self.note) if part)
        return text.replace("|", r"\|")


_FIELDS = {field.name: field for field in fields(Evidence)}
_REQUIRED = {
    HARDWARE: {"device"},
    EMULATOR: set[str](),
    COMPILED: {"report"},
}
_FORBIDDEN = {
    HARDWARE: {"report"},
    EMULATOR: {"device", "report"},
    COMPILED: {"device"},
}
_ALWAYS = {"operation", "dtype", "arch", "provider", "grade", "date", "command"}


def check_row(package: str, row: Mapping[str, Any], root: Path) -> Evidence:
    """Check one `[[evidence]]` table of `package`; raises `EvidenceError` that names what is wrong.

    `root` is the folder that `result` is relative to.
    """
    where = f"{package}: {row.get('operation')} {row.get('dtype')} {row.get('arch')}"
    grade = row.get("grade")
    if grade not in GRADES:
        raise EvidenceError(f"{where}: grade = {grade!r}, expected one of {', '.join(GRADES)}")
    required = _ALWAYS | _REQUIRED[grade]
    if grade == HARDWARE and row.get("arch") != "cpu":
        required |= {"result"}
    missing = sorted(required - row.keys())
    if missing:
        raise EvidenceError(f"{where}: a row that {grade!r} has to name {', '.join(missing)}")
    unknown = sorted((row.keys() - _FIELDS.keys()) | (row.keys() & (_FORBIDDEN[grade] | {"package"})))
    if unknown:
        raise EvidenceError(f"{where}: a row that {grade!r} cannot have {', '.join(unknown)}")
    for name, value in row.items():
        expected = datetime.date if name == "date" else str
        if type(value) is not expected or not value:
            raise EvidenceError(
                f"{where}: {name} = {value!r}, expected a {expected.__name__} that is not empty"
            )
    if not _ARCH.fullmatch(row["arch"]):
        raise EvidenceError(f"{where}: arch = {row['arch']!r}, expected 'cpu' or a name such as 'sm_90a'")
    if "result" in row:
        _check_result(where, row["result"], root)
    return Evidence(package=package, **row)


def _check_result(where: str, result: str, root: Path) -> None:
    path = (root / result).resolve()
    if not path.is_relative_to((root / RESULTS_FOLDER).resolve()) or not path.is_file():
        raise EvidenceError(f"{where}: result = {result!r}, expected an existing file under {RESULTS_FOLDER}")


def read_evidence(root: Path) -> list[Evidence]:
    """The rows of every package under `root`, checked, sorted by subject and grade."""
    rows = []
    for path in sorted([*root.glob("shared/*/evidence.toml"), *root.glob("packages/*/evidence.toml")]):
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        if document.keys() - {"evidence"}:
            raise EvidenceError(f"{path.parent.name}: evidence.toml holds more than [[evidence]] tables")
        rows += [check_row(path.parent.name, row, root) for row in document.get("evidence", ())]
    rows.sort(key=lambda row: (row.subject, GRADES.index(row.grade)))
    for one, other in itertools.pairwise(rows):
        if (one.subject, one.grade) == (other.subject, other.grade):
            raise EvidenceError(f"{one.package}: two rows say {one.grade!r} of {', '.join(one.subject[1:])}")
    return rows


def render_table(rows: Sequence[Evidence]) -> str:
    """The Markdown table of `rows`: one line per subject, one column per grade."""
    header = ["package", "operation", "dtype", "arch", "provider", *GRADES]
    lines = [header, ["---"] * len(header)]
    for subject in sorted({row.subject for row in rows}):
        cells = {row.grade: row.cell for row in rows if row.subject == subject}
        lines.append([*subject, *(cells.get(grade, "") for grade in GRADES)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_table(text: str, table: str) -> str:
    """`text` with `table` between the two markers, each of which has to stand in it once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise EvidenceError(f"expected the line {BEGIN!r} once and after it {END!r} once")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or rewrite the table of a README; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernel_testing.evidence", description="The support table."
    )
    parser.add_argument("readme", type=Path, help="the README in the root folder of the repository")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="exit with status 1 if the table is out of date")
    mode.add_argument("--write", action="store_true", help="bring the table up to date")
    options = parser.parse_args(arguments)

    text = options.readme.read_text(encoding="utf-8")
    rows = read_evidence(options.readme.resolve().parent)
    updated = replace_table(text, render_table(rows))
    if options.write:
        options.readme.write_text(updated, encoding="utf-8")
    elif updated != text:
        print(f"{options.readme}: the support table is out of date; run this command with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
