"""Sessions of the repository; `nox --list` names them, plain `nox` runs what the README calls the tests.

A package is a folder under `shared/` or `packages/` that holds a `pyproject.toml`; its tests are in
`tests/<module name>`, so a new package needs no change to what tests, checks and builds all of them; sessions
about some, such as `device` and `sanitize`, name those.

What our packages declare from others (torch, a kernel language) and the test runner are installed once, into
`.nox/base-<key>`; a session that needs them sees that environment through a `.pth` file. Our own wheels are
installed afresh into the session's environment. An import of something that is in the base but not declared
is caught by `tests/repository/test_imports.py`.

Code that a session runs keeps compiled kernels in a folder that one run of nox shares and removes, never in
the user's cache.
"""

from __future__ import annotations

import ast
import atexit
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import nox
from nox.project import load_toml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
TESTS = ROOT / "tests"

BASE_TOOLS = ("numpy", "ml-dtypes", "pytest", "hypothesis", "hatchling")
CLIENT_REQUIREMENTS = ("transformers", "matplotlib")
TEST_HELPERS = ("kernel-testing", "ptx-emulator")  # what tests compare with, and a CPU that runs GPU code
CACHE_VARIABLE = "KERNEL_DISPATCH_CACHE_DIR"
EMULATOR_CACHE_VARIABLE = "PTX_EMULATOR_CACHE_DIR"
TEST_REQUIREMENTS = {"mla-sm120": ("nvidia-cuda-nvrtc",)}  # of a package's tests, beside what it declares
PEERS = ("flashinfer-python",)
PRIVATE_CLASSIFIER = "Private :: Do Not Upload"

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "repository", "test", "integration", "demo"]


@dataclass(frozen=True)
class Package:
    """One distribution of this repository, read from its folder.

    `name` is canonical (`mla-core`), `module` the import name; `requirements` are the declared ones, in-repo
    ones among them; `private` packages are not published.
    """

    name: str
    folder: Path
    requirements: tuple[Requirement, ...]
    private: bool

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src"

    @property
    def tests(self) -> Path:
        return TESTS / self.module

    @property
    def version(self) -> str:
        about = ast.parse((self.source / self.module / "__about__.py").read_text(encoding="utf-8"))
        for node in about.body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__version__"]:
                return str(ast.literal_eval(node.value))
        raise ValueError(f"{self.name}: __about__.py assigns no __version__")


def discover_packages(root: Path = ROOT) -> dict[str, Package]:
    """Every package of the repository by canonical name, in alphabetical order."""
    found = {}
    for pyproject in sorted([*root.glob("shared/*/pyproject.toml"), *root.glob("packages/*/pyproject.toml")]):
        project = load_toml(pyproject)["project"]
        name = canonicalize_name(project["name"])
        found[name] = Package(
            name=name,
            folder=pyproject.parent,
            requirements=tuple(Requirement(text) for text in project.get("dependencies", ())),
            private=PRIVATE_CLASSIFIER in project.get("classifiers", ()),
        )
    return dict(sorted(found.items()))


PACKAGES = discover_packages()


def closure(names: Iterable[str]) -> list[Package]:
    """The named packages and every package of ours that they depend on, by name."""
    pending, seen = list(names), set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            declared = (canonicalize_name(requirement.name) for requirement in PACKAGES[name].requirements)
            pending += [dependency for dependency in declared if dependency in PACKAGES]
    return [PACKAGES[name] for name in sorted(seen)]


def third_party_requirements() -> list[str]:
    """What the packages declare that is not ours, as written in their pyproject.toml."""
    declared = (requirement for package in PACKAGES.values() for requirement in package.requirements)
    return sorted({str(found) for found in declared if canonicalize_name(found.name) not in PACKAGES})


def base_python(session: nox.Session) -> Path:
    """The interpreter of the shared base environment, which is built first where it is missing."""
    requirements = [*BASE_TOOLS, *third_party_requirements()]
    key = "\n".join([CONSTRAINTS.read_text(encoding="utf-8"), *requirements, sys.version])
    folder = ROOT / ".nox" / f"base-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
        pip_install = [str(python), "-m", "pip", "install", "-c", str(CONSTRAINTS), *requirements]
        session.run_install(*pip_install, external=True, silent=True)
        complete.touch()
    return python


def site_packages(session: nox.Session, python: str) -> Path:
    """Where `python` installs pure-Python distributions."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(str(session.run(python, "-c", query, silent=True, external=True)).strip())


def use_base(session: nox.Session) -> None:
    """Make the base environment importable in the session, behind what the session itself installs."""
    base = site_packages(session, str(base_python(session)))
    # Not the bare path: .pth files of the base, such as the one of nvidia-cutlass-dsl, are to act as well.
    line = f"import site; site.addsitedir({str(base)!r})\n"
    (site_packages(session, "python") / "base.pth").write_text(line, encoding="utf-8")


@cache
def kernel_cache() -> Path:
    """Where this run of nox keeps compiled kernels, for all its sessions.

    What KERNEL_DISPATCH_CACHE_DIR names, if it is set; else a folder that is empty at first, then removed.
    """
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE]).resolve()
    (ROOT / ".nox").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kernels-", dir=ROOT / ".nox"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run_code(session: nox.Session, *command: str, env: dict[str, str] | None = None, **options: Any) -> None:
    """Run a command that may compile kernels, with the variables `env` and the options of `session.run`."""
    folder = kernel_cache()
    caches = {CACHE_VARIABLE: str(folder), EMULATOR_CACHE_VARIABLE: str(folder / "ptx-emulator")}
    session.run(*command, env={**caches, **(env or {})}, **options)


def build_distributions(session: nox.Session, packages: Iterable[Package], into: Path, *targets: str) -> None:
    """Build the `targets` ("wheel", "sdist") of `packages` into the folder `into`."""
    flags = [argument for target in targets for argument in ("-t", target)]
    for package in packages:
        with session.chdir(package.folder):
            command = [str(base_python(session)), "-m", "hatchling", "build", "-d", str(into), *flags]
            session.run_install(*command, external=True, silent=True)


def install_packages(
    session: nox.Session, packages: Sequence[Package], *others: str, constraints: Path = CONSTRAINTS
) -> None:
    """Install the wheels of `packages`, what they declare, and `others`; check that our versions arrived."""
    with tempfile.TemporaryDirectory() as folder:
        build_distributions(session, packages, Path(folder), "wheel")
        wheels = [str(path) for path in sorted(Path(folder).iterdir())]
        # An environment that nox reuses may hold another build of the same version.
        session.install("--force-reinstall", "--no-deps", *wheels)
        session.install("-c", str(constraints), *wheels, *others)
    for package in packages:
        query = f"import importlib.metadata; print(importlib.metadata.version({package.name!r}))"
        installed = str(session.run("python", "-c", query, silent=True)).strip()
        if installed != package.version:
            session.error(f"{package.name}: {installed} is installed, the tree holds {package.version}")


def run_tests(session: nox.Session, folder: Path, *arguments: str) -> None:
    """Run the tests of `folder` from an empty directory outside the tree, so that no source is importable."""
    command = ["python", "-m", "pytest", "-c", str(ROOT / "pytest.ini"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", str(folder), *arguments]
    with tempfile.TemporaryDirectory() as outside, session.chdir(outside):
        run_code(session, *command, env={"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"})


@nox.session
@nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])
def test(session: nox.Session, package: str) -> None:
    """Test one package as installed from its wheel; arguments after -- go to pytest."""
    use_base(session)
    install_packages(session, closure([package, *TEST_HELPERS]), *TEST_REQUIREMENTS.get(package, ()))
    run_tests(session, PACKAGES[package].tests, *session.posargs)


@nox.session
def repository(session: nox.Session) -> None:
    """Test the repository itself: versions, changelogs, README, discovery of packages, imports."""
    use_base(session)
    install_packages(session, list(PACKAGES.values()), "nox")
    run_tests(session, TESTS / "repository", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Run models of transformers through the packages; arguments after -- go to pytest."""
    use_base(session)
    install_packages(session, list(PACKAGES.values()), *CLIENT_REQUIREMENTS)
    run_tests(session, TESTS / "integration", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """Run every combination of mla-sm100 on the emulator, for hours; arguments after -- go to pytest."""
    use_base(session)
    install_packages(session, closure(["mla-sm100", *TEST_HELPERS]))
    run_tests(session, TESTS / "mla_sm100" / "full_product.py", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Run published kernels of others on the emulator; arguments after -- go to pytest."""
    use_base(session)
    install_packages(session, closure(["mla-sm100", *TEST_HELPERS]))
    # Without what they depend on, which is gigabytes: the tests import the kernels' modules alone.
    session.install("--no-deps", "-c", str(CONSTRAINTS), *PEERS)
    run_tests(session, TESTS / "peers", *session.posargs)


@nox.session
def compilers(session: nox.Session) -> None:
    """Test the emulator's builds with the compilers that come as wheels, ziglang and NVRTC."""
    use_base(session)
    install_packages(session, closure(["ptx-emulator", *TEST_HELPERS]), "ziglang", "nvidia-cuda-nvrtc")
    tests = PACKAGES["ptx-emulator"].tests
    run_tests(session, tests / "test_build.py", str(tests / "test_cuda_source.py"), *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Decode with small DeepSeek-V3 and Qwen3-Next models; arguments after -- go to the demo."""
    use_base(session)
    install_packages(session, list(PACKAGES.values()), *CLIENT_REQUIREMENTS)
    run_code(session, "python", str(ROOT / "examples" / "demo.py"), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run benchmarks/bench_*.py one after the other, or only those named after --."""
    found = {path.stem: path for path in sorted(ROOT.glob("benchmarks/bench_*.py"))}
    unknown = [name for name in session.posargs if name not in found]
    if unknown:
        session.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(found) or 'none'}")
    if not found:
        session.skip("there is no benchmarks/bench_*.py")
    use_base(session)
    install_packages(session, list(PACKAGES.values()))
    for name in session.posargs or found:
        run_code(session, "python", str(found[name]))


# Of each package whose kernels may be new to a GPU: the provider that bench_mla_decode.py takes.
DEVICE_PROVIDERS = {"mla-sm100": "sm100", "mla-sm120": "sm120"}


def cuda_device(session: nox.Session) -> str:
    """The model of the GPU, as names of files have it; the session fails if there is none."""
    query = "import torch; from kernel_testing import device_model"
    query += "; print(device_model(torch.cuda.get_device_name()) if torch.cuda.is_available() else '')"
    model = str(session.run("python", "-c", query, silent=True)).strip()
    if not model:
        session.error("PyTorch finds no CUDA device")
    return model


@nox.session
def device(session: nox.Session) -> None:
    """Test and time the package after -- on this machine's GPU; the record is kept in benchmarks/results/."""
    if len(session.posargs) != 1 or session.posargs[0] not in DEVICE_PROVIDERS:
        session.error(f"name one package after --: {', '.join(DEVICE_PROVIDERS)}")
    package = PACKAGES[session.posargs[0]]
    use_base(session)
    install_packages(session, closure([package.name, *TEST_HELPERS]))
    folder = ROOT / "benchmarks" / "results" / f"{package.module}-{cuda_device(session)}"
    folder.mkdir(parents=True, exist_ok=True)
    tests = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package.tests))
    benchmark = str(ROOT / "benchmarks" / "bench_mla_decode.py")
    session.log("testing; the output goes to %s", folder / "tests.txt")
    with (folder / "tests.txt").open("w", encoding="utf-8") as report:
        run_code(session, *tests, stdout=report, success_codes=[0, 1])
    provider = DEVICE_PROVIDERS[package.name]
    run_code(session, "python", benchmark, "--provider", provider, "--out", str(folder))
    session.log("%s holds the record", folder)


# One token and a whole chunk of eight with every tactic; two chunks with the one preferred.
GDN_EVERY_TACTIC = "(test_every_tactic[ and (-1- or -8-)) or (other_slots and fp32) or test_history["
GDN_EVERY_LOOP = (
    f"{GDN_EVERY_TACTIC} or (sizes_and_modes and -16- and (128 or 256-bf16)) or (k_major_states and 128)"
)
# What compute-sanitizer looks at: a package's tests, and per tool a pytest selection, every path, small.
SANITIZED = {
    "gdn-mtp": (
        ("test_gdn_cute.py", "test_speculative_kernel.py"),
        {
            "memcheck": f"{GDN_EVERY_TACTIC} or k_major_states or rows_lie_apart"
            " or (sizes_and_modes and (64-fp32 or (-16- and (128-bf16 or 256-bf16))))",
            "racecheck": GDN_EVERY_LOOP,
            "synccheck": GDN_EVERY_LOOP,
        },
    ),
    "mla-sm120": (
        ("test_sm120_cuda.py",),
        {
            "memcheck": "every_tactic or absent_pages or strided_tensors or left_after or (B4 and q2.1.4.0)",
            "racecheck": "every_tactic or (B4 and q2.1.4.0)",
            "synccheck": "every_tactic or absent_pages or left_after",
        },
    ),
}
# Launchers ask the driver for what it may not have: a function, a further parameter of a kernel.
SANITIZER_OPTIONS = {"memcheck": ("--report-api-errors", "no")}
UNCHECKED_KERNELS = "kernel_substring=at6native"  # PyTorch's, with which tests spend most of the time
NO_MEMORY_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER_ENVIRONMENT = {
    ("gdn-mtp", "memcheck"): NO_MEMORY_CACHING,
    ("mla-sm120", "memcheck"): NO_MEMORY_CACHING,
    # One lane of a warp arrives on an mbarrier for all, which racecheck does not follow.
    ("mla-sm120", "racecheck"): {"MLA_SM120_NVRTC_OPTIONS": "-DMLA_EVERY_LANE_ARRIVES"},
}


@nox.session
@nox.parametrize("package", [nox.param(name, id=name) for name in SANITIZED])
def sanitize(session: nox.Session, package: str) -> None:
    """Run a package's kernels under compute-sanitizer on this GPU; arguments after -- name the tools to run.

    Each tool has a report in benchmarks/results/: the commit, device and versions, then of each file of tests
    the command and what pytest and the tool say.
    """
    files, selections = SANITIZED[package]
    unknown = [tool for tool in session.posargs if tool not in selections]
    if unknown:
        session.error(f"no such tool for {package}: {', '.join(unknown)}; there are {', '.join(selections)}")
    if shutil.which("compute-sanitizer") is None:
        session.error("compute-sanitizer, a tool of the CUDA toolkit, is not on the PATH")
    use_base(session)
    install_packages(session, closure([package, *TEST_HELPERS]))
    cuda_device(session)
    query = "from kernel_testing import environment; print(environment())"
    facts = str(session.run("python", "-c", query, silent=True)).strip()
    for tool in session.posargs or selections:
        report = ROOT / "benchmarks" / "results" / f"{PACKAGES[package].module}-{tool}.txt"
        session.log("%s; the output goes to %s", tool, report)
        with report.open("w", encoding="utf-8") as output:
            print(facts, file=output)
            for file in files:  # in a process each, so that of a run cut short the report keeps the first
                sanitize_file(session, package, tool, file, output)


def sanitize_file(session: nox.Session, package: str, tool: str, file: str, report: TextIO) -> None:
    """Run a package's tests in `file` under a tool; the command and its output go to the end of `report`."""
    selection = SANITIZED[package][1][tool]
    command = ["compute-sanitizer", "--tool", tool, *SANITIZER_OPTIONS.get(tool, ()), "--error-exitcode", "9"]
    command += ["--kernel-name-exclude", UNCHECKED_KERNELS]
    command += ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    variables = SANITIZER_ENVIRONMENT.get((package, tool), {})
    shown = [*(f"{name}={value}" for name, value in variables.items()), *command, file]
    print(shlex.join(shown), file=report, flush=True)
    path = str(PACKAGES[package].tests / file)
    run_code(session, *command, path, stdout=report, external=True, env=variables)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `-- --fix` mends what can be mended."""
    session.install("-c", str(CONSTRAINTS), "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), str(ROOT))
    session.run("ruff", "format", *([] if fix else ["--check"]), str(ROOT))


@nox.session(reuse_venv=True)
def types(session: nox.Session) -> None:
    """Check the types of every package with mypy --strict."""
    use_base(session)
    session.install("-c", str(CONSTRAINTS), "mypy")
    sources = [str(package.source) for package in PACKAGES.values()]
    search_path = {"MYPYPATH": os.pathsep.join(sources)}
    session.run("mypy", "--config-file", str(ROOT / "mypy.ini"), *sources, env=search_path)


def oldest_constraints() -> list[str]:
    """constraints.txt with every dependency that a package declares pinned to its declared lower bound."""
    lowest: dict[str, str] = {}
    for package in PACKAGES.values():
        for requirement in package.requirements:
            name = canonicalize_name(requirement.name)
            bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==", "~=")]
            if name not in PACKAGES and bounds:
                lowest[name] = f"{name}=={bounds[0]}"
    pins = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if "==" in line]
    others = [pin for pin in pins if canonicalize_name(pin.split("==")[0]) not in lowest]
    return others + sorted(lowest.values())


@nox.session
def lowest(session: nox.Session) -> None:
    """Test every package with the oldest dependency versions declared (downloads that version of torch)."""
    constraints = Path(session.create_tmp()) / "oldest.txt"
    constraints.write_text("\n".join(oldest_constraints()) + "\n", encoding="utf-8")
    of_tests = [name for names in TEST_REQUIREMENTS.values() for name in names]
    install_packages(session, list(PACKAGES.values()), *BASE_TOOLS, *of_tests, constraints=constraints)
    for package in PACKAGES.values():
        run_tests(session, package.tests, *session.posargs)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build the wheel and the sdist of every published package into dist/."""
    published = [package for package in PACKAGES.values() if not package.private]
    (ROOT / "dist").mkdir(exist_ok=True)
    build_distributions(session, published, ROOT / "dist", "wheel", "sdist")
    session.log("dist/ holds %s", ", ".join(sorted(path.name for path in (ROOT / "dist").iterdir())))


def release_problems(tags: Iterable[str]) -> list[str]:
    """What disagrees between the tags of a commit (`<name>-v<version>`), the versions and the changelogs.

    Every version needs a heading in CHANGELOG.md: `## 1.2.0 (unreleased)` before the release, the date in
    place of the word, `## 1.2.0 (2024-02-29)`, once it is tagged.
    """
    tagged = {}
    problems = []
    for tag in tags:
        name, _, version = tag.rpartition("-v")
        if name in PACKAGES:
            tagged[name] = version
        else:
            problems.append(f"tag {tag}: names no package; expected <name>-v<version>")
    for name, package in PACKAGES.items():
        changelog = package.folder / "CHANGELOG.md"
        text = changelog.read_text(encoding="utf-8") if changelog.exists() else ""
        heading = re.search(rf"^## {re.escape(package.version)}(?![\w.])(.*)$", text, re.MULTILINE)
        when = "" if heading is None else heading[1].strip()
        if heading is None:
            problems.append(f"{name}: CHANGELOG.md has no heading for version {package.version}")
        elif tagged.get(name) == package.version and not is_date(when):
            problems.append(
                f"{name}: {package.version} is tagged but has no date in CHANGELOG.md, {heading[0]!r}"
            )
        elif when != "(unreleased)" and not is_date(when):
            problems.append(f"{name}: CHANGELOG.md says {heading[0]!r}, expected (unreleased) or a date")
        if name in tagged and tagged[name] != package.version:
            problems.append(f"{name}: the tag says {tagged[name]}, __about__.py says {package.version}")
    return problems


def is_date(text: str) -> bool:
    """Whether `text` is a day in parentheses, "(2024-02-29)"."""
    match = re.fullmatch(r"\((\d{4}-\d{2}-\d{2})\)", text)
    try:
        return match is not None and bool(date.fromisoformat(match[1]))
    except ValueError:  # no day of the calendar
        return False


@nox.session(venv_backend="none")
def release_check(session: nox.Session) -> None:
    """Check that the tags of this commit, the versions and the changelogs agree."""
    tags = session.run("git", "-C", str(ROOT), "tag", "--points-at", "HEAD", external=True, silent=True)
    problems = release_problems(str(tags).split())
    if problems:
        session.error("\n".join(problems))
