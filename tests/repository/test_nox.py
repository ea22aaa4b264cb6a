"""Nox finds packages by folder; plain nox runs what the README calls the tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest
from gdn_mtp.cute import kernels, kernels_speculative
from gdn_mtp.problem import GatedDeltaRuleProblem
from kernel_dispatch import Arch

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


def test_the_base_holds_what_packages_declare_so_that_it_is_installed_once(noxfile: ModuleType) -> None:
    names = {re.split(r"[<>=]", text)[0] for text in noxfile.third_party_requirements()}
    declared = {requirement.name for p in noxfile.PACKAGES.values() for requirement in p.requirements}
    assert names == declared - set(noxfile.PACKAGES)
    assert {"torch", "nvidia-cutlass-dsl", "apache-tvm-ffi"} <= names


def test_sessions_see_the_base_and_what_its_pth_files_add(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    (base / "inner").mkdir(parents=True)
    own.mkdir()
    (base / "language.pth").write_text("inner\n")
    (base / "inner" / "kernel_language.py").touch()
    monkeypatch.setattr(noxfile, "base_python", lambda session: base)
    monkeypatch.setattr(noxfile, "site_packages", lambda session, python: own if python == "python" else base)
    noxfile.use_base(None)
    program = "import site, sys; site.addsitedir(sys.argv[1]); import kernel_language"
    subprocess.run([sys.executable, "-c", program, str(own)], check=True, env={})


class RecordingSession:
    """Stands for a nox session; keeps the environments of the commands it is asked to run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.posargs: list[str] = []
        self.environments: list[dict[str, str]] = []

    def run(self, *command: str, env: dict[str, str] | None = None) -> None:
        self.environments.append(env or {})

    def chdir(self, folder: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def create_tmp(self) -> str:
        return str(self._folder)


@pytest.mark.parametrize("named", [None, "kernels"])
@pytest.mark.parametrize("name", ["test", "repository", "integration", "demo", "bench", "lowest"])
def test_sessions_keep_compiled_kernels_in_a_folder_of_the_run_or_in_that_which_is_named(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, named: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERNEL_DISPATCH_CACHE_DIR", raising=False)
    if named is not None:
        monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", named)
    monkeypatch.setattr(noxfile, "ROOT", tmp_path)
    monkeypatch.setattr(noxfile, "use_base", lambda session: None)
    monkeypatch.setattr(noxfile, "install_packages", lambda *arguments, **options: None)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_nothing.py").touch()
    noxfile.kernel_cache.cache_clear()
    session = RecordingSession(tmp_path)
    function = getattr(noxfile, name).func
    function(session, "mla-core") if name == "test" else function(session)
    folders = {environment["KERNEL_DISPATCH_CACHE_DIR"] for environment in session.environments}
    assert len(folders) == 1, "one folder for the run, so that nothing is compiled twice"
    folder = Path(folders.pop())
    assert folder == tmp_path / named if named is not None else folder.parent == tmp_path / ".nox"
    noxfile.kernel_cache.cache_clear()


def test_plain_nox_runs_every_kind_of_test(noxfile: ModuleType) -> None:
    selected = noxfile.nox.options.sessions
    assert {"lint", "types", "test", "repository", "integration", "demo"} == set(selected)


def test_packages_for_a_device_name_a_provider_of_theirs(noxfile: ModuleType) -> None:
    for name, provider in noxfile.DEVICE_PROVIDERS.items():
        project = noxfile.load_toml(noxfile.PACKAGES[name].folder / "pyproject.toml")["project"]
        assert provider in project["entry-points"]["mla_core.decode.v1"]


class SanitizingSession:
    """Stands for a nox session on a GPU; keeps the commands that write a report, which all say "passed".

    fails_after: that many do, the next one fails.
    """

    def __init__(self, *posargs: str, fails_after: int | None = None) -> None:
        self.posargs = list(posargs)
        self.commands: list[tuple[str, ...]] = []
        self.fails_after = fails_after

    def run(self, *command: str, stdout: TextIO | None = None, **options: object) -> str:
        if stdout is None:
            return "facts of the device\n"
        if len(self.commands) == self.fails_after:
            raise RuntimeError("a command failed")
        self.commands.append(command)
        os.write(stdout.fileno(), b"passed\n")  # as a process of its own does, past Python's buffer
        return ""

    def log(self, *arguments: object) -> None:
        pass

    def error(self, message: str) -> None:
        raise ValueError(message)


Sanitize = Callable[[SanitizingSession, str], None]


@pytest.fixture
def sanitize(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sanitize]:
    """The session `sanitize`, with its reports under `tmp_path`."""
    monkeypatch.setattr(noxfile, "ROOT", tmp_path)
    for name in ("use_base", "install_packages", "cuda_device"):
        monkeypatch.setattr(noxfile, name, lambda *arguments: None)
    monkeypatch.setattr(noxfile.shutil, "which", lambda name: name)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.delenv("KERNEL_DISPATCH_CACHE_DIR", raising=False)
    noxfile.kernel_cache.cache_clear()
    yield noxfile.sanitize.func
    noxfile.kernel_cache.cache_clear()


def tool_of(command: tuple[str, ...]) -> str:
    return command[command.index("--tool") + 1]


def test_sanitize_runs_every_tool_or_those_named(noxfile: ModuleType, sanitize: Sanitize) -> None:
    for package, (files, selections) in noxfile.SANITIZED.items():
        for named in ([], ["racecheck"]):
            sanitize(session := SanitizingSession(*named), package)
            runs = [(tool_of(command), Path(command[-1]).name) for command in session.commands]
            assert runs == list(itertools.product(named or selections, files))


def test_sanitize_names_an_unknown_tool_before_it_runs_any(sanitize: Sanitize) -> None:
    session = SanitizingSession("memcheck", "racechek")
    with pytest.raises(ValueError, match="no such tool for gdn-mtp: racechek; there are memcheck, racecheck"):
        sanitize(session, "gdn-mtp")
    assert not session.commands


@pytest.mark.parametrize(
    ("package", "tool", "variables", "fails_after"),
    [
        ("gdn-mtp", "memcheck", ["PYTORCH_NO_CUDA_MEMORY_CACHING=1"], 1),
        ("gdn-mtp", "racecheck", [], None),
        ("mla-sm120", "racecheck", ["MLA_SM120_NVRTC_OPTIONS=-DMLA_EVERY_LANE_ARRIVES"], None),
    ],
)
def test_sanitize_reports_each_file_behind_its_command(
    noxfile: ModuleType,
    sanitize: Sanitize,
    tmp_path: Path,
    package: str,
    tool: str,
    variables: list[str],
    fails_after: int | None,
) -> None:
    session = SanitizingSession(tool, fails_after=fails_after)
    with contextlib.nullcontext() if fails_after is None else pytest.raises(RuntimeError):
        sanitize(session, package)
    report = tmp_path / "benchmarks" / "results" / f"{package.replace('-', '_')}-{tool}.txt"
    facts, *lines = report.read_text().splitlines()
    assert facts == "facts of the device"
    files, selections = noxfile.SANITIZED[package]
    for file, line in zip(files, lines[::2], strict=True):
        words = shlex.split(line)
        assert words[: len(variables) + 3] == [*variables, "compute-sanitizer", "--tool", tool]
        assert words[-2:] == [selections[tool], file]
    assert lines[1::2] == ["passed"] * (len(files) if fails_after is None else fails_after)


COLLECT = """\
import json, sys
import pytest
for arguments in json.loads(sys.argv[1]):
    print("selected from:", arguments[-1])
    assert pytest.main([*arguments, "--collect-only"]) == 0
"""


def test_sanitize_looks_at_every_tactic_of_gdn_mtp(root: Path, sanitize: Sanitize) -> None:
    sanitize(session := SanitizingSession(), "gdn-mtp")
    arguments = [command[command.index("pytest") + 1 :] for command in session.commands]
    collect = [sys.executable, "-c", COLLECT, json.dumps(arguments)]
    done = subprocess.run(
        collect, cwd=root, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, *listings = done.stdout.split("selected from:")
    selected: dict[str, set[str]] = {}
    for command, listing in zip(session.commands, listings, strict=True):
        ids = re.findall(r"::(\w+\[\S+\])$", listing, re.MULTILINE)
        selected.setdefault(tool_of(command), set()).update(ids)
    assert set(selected) == {"memcheck", "racecheck", "synccheck"}

    tactics = {
        name
        for by_tokens in kernels.HEURISTIC.values()
        for rows in by_tokens.values()
        for name in rows.values()
    }
    of_windows = {name for rows in kernels_speculative.HEURISTIC.values() for name in rows.values()}
    asked, hopper = GatedDeltaRuleProblem(B=1, T=1, H=1, HV=1, K=128, V=128), Arch.from_name("sm_90a")
    wanted = {
        f"test_every_tactic[fp32-{name}-{tokens}-{mode}]"
        for tokens, mode in itertools.product((1, 8), ("none", "buffer"))
        for name in tactics
        & set(kernels.KERNELS.tactics(replace(asked, T=tokens, intermediate=mode), hopper))
    }
    for ids in selected.values():
        assert wanted <= ids
        assert tactics <= {name.removeprefix("test_every_tactic[fp32-").split("-")[0] for name in ids}
        two_chunks = itertools.product((128, 256), ("none", "buffer", "scatter"))
        assert {f"test_sizes_and_modes[{head}-bf16-16-{mode}]" for head, mode in two_chunks} <= ids
        assert "test_states_written_to_other_slots_or_to_none[fp32-16]" in ids
        histories = {name.strip("]").split("-")[-1] for name in ids if name.startswith("test_history[")}
        assert of_windows <= histories
