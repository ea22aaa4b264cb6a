"""C++ sources of the shared packages keep to 120 columns, as no formatter does it for them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for suffix in ("cpp", "h") for path in ROOT.glob(f"shared/*/src/**/*.{suffix}"))
COLUMNS = 120


def test_lines_are_short() -> None:
    assert SOURCES
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not long
