"""Who may import whom: our packages each other, and every package only what its pyproject declares.

`kernel_dispatch` imports none of ours, leaf packages never each other, and importing a package reaches no
kernel language: that is for the modules that `Provider.load()` leads to.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nox.project import load_toml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(
    path.parent for pattern in ("shared/*", "packages/*") for path in ROOT.glob(f"{pattern}/pyproject.toml")
)

# Which of ours a package may import; a package that is not named here may import kernel_dispatch.
ALLOWED = {
    "kernel_dispatch": set[str](),
    "kernel_testing": set[str](),
    "ptx_emulator": set[str](),
    "gdn_mtp": {"cute_kernels", "kernel_dispatch"},
    "mla_sm100": {"mla_core", "cute_kernels", "kernel_dispatch"},
    "mla_sm120": {"mla_core", "kernel_dispatch"},
}
DEFAULT_ALLOWED = {"kernel_dispatch"}

KERNEL_LANGUAGES = {"cutlass", "triton", "tilelang", "tvm_ffi", "cuda", "cupy", "numba"}

# Import names of distributions whose name differs from what is imported.
DISTRIBUTION_OF = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi", "cuda": "cuda-bindings"}


@dataclass(frozen=True)
class Import:
    """One import: the top-level module it names, where, and whether it runs when the file is imported."""

    module: str
    place: str
    at_import: bool


def imports_of(path: Path) -> Iterator[Import]:
    """Every absolute import of a file, those under `if TYPE_CHECKING:` left out."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        place = (
            f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{getattr(node, 'lineno', 0)}"
        )
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.partition(".")[0], place, at_import)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield Import(node.module.partition(".")[0], place, at_import)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), at_import=True)


def module_of(folder: Path) -> str:
    """The import name of a package's folder."""
    (about,) = folder.glob("src/*/__about__.py")
    return about.parent.name


MODULES = {module_of(folder): folder for folder in FOLDERS}


def package_imports(folder: Path) -> list[Import]:
    return [found for path in sorted(folder.glob("src/**/*.py")) for found in imports_of(path)]


def declared(folder: Path) -> set[str]:
    """Canonical names of the distributions a package depends on, those of its extras included."""
    project = load_toml(folder / "pyproject.toml")["project"]
    extras = project.get("optional-dependencies", {}).values()
    lines = itertools.chain(project.get("dependencies", []), *extras)
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_only_those_of_ours_they_may(module: str) -> None:
    allowed = ALLOWED.get(module, DEFAULT_ALLOWED) | {module}
    wrong = [
        f"{i.place} imports {i.module}"
        for i in package_imports(MODULES[module])
        if i.module in MODULES.keys() - allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_only_what_they_declare(module: str) -> None:
    folder = MODULES[module]
    names = declared(folder)
    wrong = [
        f"{found.place} imports {found.module}, which {folder.name}'s pyproject.toml does not declare"
        for found in package_imports(folder)
        if found.module not in sys.stdlib_module_names
        and found.module != module
        and canonicalize_name(DISTRIBUTION_OF.get(found.module, found.module)) not in names
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_kernel_languages_load_late(module: str) -> None:
    """The modules that `import package` reaches name no kernel language at their top level."""
    source = MODULES[module] / "src"
    reached = reachable(source, module)
    assert source / module / "__init__.py" in reached
    wrong = [
        f"{found.place} imports {found.module} when {module} is imported"
        for path in sorted(reached)
        for found in imports_of(path)
        if found.at_import and found.module in KERNEL_LANGUAGES
    ]
    assert not wrong, "\n".join(wrong)


def reachable(source: Path, module: str) -> set[Path]:
    """The files of a package that run when `module` is imported, by its own top-level imports."""
    todo, seen = [source / module / "__init__.py"], set[Path]()
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        todo += own_imports(source, path)
    return seen


def own_imports(source: Path, path: Path) -> Iterator[Path]:
    """The files that the top-level imports of `path` may mean, whether they exist or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.parent.relative_to(source).parts  # of a module and of an __init__ alike
    functions = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in functions:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module.split(".") if node.module else ()))
            names = [target, *((*target, alias.name) for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        for name in names:
            for end in range(1, len(name) + 1):
                yield source.joinpath(*name[:end], "__init__.py")
            yield source.joinpath(*name).with_suffix(".py")


def test_dependencies_between_ours_are_ranges() -> None:
    ours = {canonicalize_name(folder.name) for folder in FOLDERS}
    for folder in FOLDERS:
        for line in load_toml(folder / "pyproject.toml")["project"].get("dependencies", []):
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) in ours:
                operators = {specifier.operator for specifier in requirement.specifier}
                assert operators == {">=", "<"}, f"{folder.name}: {line}"


def test_reader_of_imports(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import os.path, torch\nfrom typing import TYPE_CHECKING\nfrom . import near\n"
        "if TYPE_CHECKING:\n    import hidden\n"
        "def load():\n    from cutlass import cute\n"
        "class A:\n    import json\n"
    )
    found = {(i.module, i.at_import) for i in imports_of(path)}
    assert found == {("os", True), ("torch", True), ("typing", True), ("cutlass", False), ("json", True)}
    assert {re.sub(r".*:", "", i.place) for i in imports_of(path)} == {"1", "2", "7", "9"}
