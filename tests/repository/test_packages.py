"""Every package is complete, its version is in its changelog, and what it needs is pinned."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in [*ROOT.glob("shared/*"), *ROOT.glob("packages/*")] if path.is_dir())


def pinned(constraints: str) -> set[str]:
    """The names that a constraints file pins."""
    return {line.split("==")[0] for line in constraints.splitlines() if "==" in line}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_package_is_complete(noxfile: ModuleType, folder: Path) -> None:
    package = noxfile.PACKAGES[folder.name]
    for name in ("pyproject.toml", "LICENSE", "CHANGELOG.md", "README.md"):
        assert (folder / name).is_file(), name
    assert (package.source / package.module / "py.typed").is_file()
    assert list(package.tests.glob("test_*.py")), f"no tests in {package.tests}"
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_versions_and_changelogs_agree(noxfile: ModuleType) -> None:
    assert noxfile.release_problems([]) == []


def test_tag_of_the_version_is_a_release(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        noxfile, "PACKAGES", {"alpha": fake_package(noxfile, tmp_path, "## 1.2.0 (2024-02-29)")}
    )
    assert noxfile.release_problems(["alpha-v1.2.0"]) == []


@pytest.mark.parametrize(
    ("heading", "tag", "problem"),
    [
        ("## 1.2.0 (unreleased)", "alpha-v1.3.0", "the tag says 1.3.0"),
        ("## 1.2.0 (unreleased)", "alpha-v1.2.0", "is tagged but has no date"),
        ("## 1.2.0", "alpha-v1.2.0", "is tagged but has no date"),
        ("## 1.2.0 (2024-02-30)", "alpha-v1.2.0", "is tagged but has no date"),
        ("## 1.2.0", None, "expected (unreleased) or a date"),
        ("## 1.2.0 2024-02-29", None, "expected (unreleased) or a date"),
        ("## 1.2.0.post1", None, "no heading for version 1.2.0"),
        ("## 1.1.0", None, "no heading for version 1.2.0"),
        ("## 1.2.0 (unreleased)", "beta-v1.2.0", "names no package"),
        ("## 1.2.0 (unreleased)", "v1.2.0", "names no package"),
    ],
)
def test_release_check_says_what_disagrees(
    noxfile: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    heading: str,
    tag: str | None,
    problem: str,
) -> None:
    monkeypatch.setattr(noxfile, "PACKAGES", {"alpha": fake_package(noxfile, tmp_path, heading)})
    problems = noxfile.release_problems([tag] if tag else [])
    assert len(problems) == 1
    assert problem in problems[0]


def fake_package(noxfile: ModuleType, folder: Path, heading: str) -> object:
    """A package named alpha of version 1.2.0 with one heading in its changelog."""
    (folder / "src/alpha").mkdir(parents=True)
    (folder / "src/alpha/__about__.py").write_text('"""The version."""\n\n__version__ = "1.2.0"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    return noxfile.Package(name="alpha", folder=folder, requirements=(), private=False)


def test_declared_dependencies_have_a_lower_bound_and_a_pin(noxfile: ModuleType) -> None:
    pins = pinned(noxfile.CONSTRAINTS.read_text(encoding="utf-8"))
    oldest = pinned("\n".join(noxfile.oldest_constraints()))
    for package in noxfile.PACKAGES.values():
        for requirement in package.requirements:
            if requirement.name not in noxfile.PACKAGES and requirement.marker is None:
                assert requirement.name in pins, f"{package.name}: {requirement}"
                assert requirement.name in oldest
                assert any(s.operator == ">=" for s in requirement.specifier), (
                    f"{package.name}: {requirement}"
                )


def test_oldest_constraints_take_the_lower_bounds(noxfile: ModuleType) -> None:
    bound = re.search(
        r">=([\d.]+)",
        next(
            str(requirement.specifier)
            for requirement in noxfile.PACKAGES["kernel-dispatch"].requirements
            if requirement.name == "torch"
        ),
    )
    assert bound is not None
    assert f"torch=={bound[1]}" in noxfile.oldest_constraints()
    assert not any(line.startswith("torch==2.13") for line in noxfile.oldest_constraints())


def test_every_session_requirement_is_pinned(noxfile: ModuleType) -> None:
    pins = pinned(noxfile.CONSTRAINTS.read_text(encoding="utf-8"))
    assert {
        *noxfile.BASE_TOOLS,
        *noxfile.CLIENT_REQUIREMENTS,
        *noxfile.PEERS,
        *(name for names in noxfile.TEST_REQUIREMENTS.values() for name in names),
        "ruff",
        "mypy",
        "nox",
        "pre-commit",
    } <= pins
