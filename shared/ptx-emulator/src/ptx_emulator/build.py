"""Compiles the runtime once and keeps it in the user's cache folder.

Objects are keyed by their sources, the headers, the compiler and the processor, so a change of one file
compiles what it is part of and no more. Most of the time goes into headers, into templates that each file
instantiates again, and into optimising what seldom runs: a whole build precompiles the headers, related files
are compiled as one, and some are optimised less. Compilers in order: `$CXX`, g++, clang++, and the `ziglang`
wheel. Of processes that need the runtime at the same time one compiles, the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeAlias

from platformdirs import user_cache_path
from tqdm import tqdm

from ptx_emulator.errors import BuildError

CACHE_VARIABLE = "PTX_EMULATOR_CACHE_DIR"
_RUNTIME = Path(__file__).parent / "runtime"
Unit: TypeAlias = tuple[Path, ...]  # sources that are compiled as one
_FLAGS = (
    "-std=c++17",
    "-march=native",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",  # else comparisons of floats keep loops from being vectorised
    "-ffp-contract=off",
)
_LEVEL = ("-O3",)  # -O2, even with -ftree-vectorize, makes matrix instructions half as fast
_SELDOM_LEVEL = ("-O1",)
# What executes seldom, or copies and waits: no slower for it, and it takes a third less time to compile.
_LESS_OPTIMISED = frozenset(
    (
        "api",
        "async_copy",
        "atomic",
        "barrier",
        "bulk",
        "cluster",
        "core",
        "fence",
        "findings",
        "grid",
        "matrix_descriptor",
        "matrix_types",
        "mbarrier",
        "tcgen05_alloc",
        "tcgen05_copy",
        "tensor_copy",
        "tensor_map",
        "timeline",
    )
)
# Files that are compiled as one; their names must not clash. All others are compiled by themselves.
_TOGETHER = (
    ("checker", "accesses", "clocks", "shadow", "traffic"),
    ("memory", "lane_access", "load_store", "scheduler"),
    ("convert", "control", "move", "warp"),
    ("wgmma", "mma"),
    ("api", "cluster", "core", "fence", "findings", "grid", "timeline"),
    ("bulk", "async_copy", "barrier", "mbarrier", "tensor_copy", "tensor_map"),
    ("atomic", "matrix_descriptor", "matrix_types", "tcgen05_alloc", "tcgen05_copy"),
)
_PRECOMPILED = ("core.h", "memory.h", "checker.h", "program.h")
_WORTH_PRECOMPILING = 6  # objects: what precompiling takes is what it saves for so many


def cache_folder() -> Path:
    """Where compiled files are kept: `$PTX_EMULATOR_CACHE_DIR`, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("ptx-emulator", appauthor=False)


@cache
def compiler() -> tuple[str, ...]:
    """The command of a C++17 compiler.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get("CXX"):
        return tuple(shlex.split(os.environ["CXX"]))
    for name in ("g++", "clang++"):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise BuildError("no C++ compiler: install g++ or clang++, or `pip install ptx-emulator[zig]`")


@cache
def compiler_version() -> str:
    """The command of the compiler and the version that it names."""
    version = run_compiler("--version").splitlines()
    return f"{shlex.join(compiler())}: {version[0] if version else 'no version'}"


def build(jobs: int | None = None, *, progress: bool = True) -> Path:
    """The shared library of the runtime, compiled if it is not in the cache.

    Args:
        jobs: compilers at a time; one per core by default.
        progress: whether a bar on stderr counts the files that are compiled.

    Raises:
        BuildError: what the compiler said.
    """
    headers = sorted(_RUNTIME.glob("*.h"))
    common = _digest(_identity(), *(h.name + h.read_text(encoding="utf-8") for h in headers))
    keys = {
        unit: _digest(common, *(source.name + source.read_text(encoding="utf-8") for source in unit))
        for unit in _units()
    }
    folder = cache_folder()
    library = folder / f"runtime-{_digest(*keys.values())}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = {unit: folder / f"{unit[0].stem}-{key}.o" for unit, key in keys.items()}
    with _alone(folder / "build.lock"):
        if not library.exists():  # nobody else has compiled it in the meantime
            _compile_and_link(objects, library, jobs, progress)
    return library


def _units() -> list[Unit]:
    """The sources, those that are compiled as one side by side."""
    sources = {source.stem: source for source in sorted(_RUNTIME.glob("*.cpp"))}
    groups = [tuple(sources.pop(name) for name in names if name in sources) for names in _TOGETHER]
    return [*filter(None, groups), *((source,) for source in sources.values())]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process or thread is inside; the system lets go of what a killed process held."""
    with lock.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_and_link(objects: dict[Unit, Path], library: Path, jobs: int | None, progress: bool) -> None:
    """Makes the library out of all objects, those that do not exist first."""
    missing = [unit for unit, target in objects.items() if not target.exists()]
    missing.sort(key=lambda unit: -sum(source.stat().st_size for source in unit))  # no long one last
    title = "ptx-emulator: compiling its runtime, once"
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(jobs or os.cpu_count()) as pool,
        tqdm(total=len(missing) + 1, desc=title, unit="file", file=sys.stderr, disable=not progress) as bar,
    ):
        include = _precompile(Path(scratch)) if len(missing) >= _WORTH_PRECOMPILING else ()
        for _ in pool.map(lambda unit: _compile(unit, objects[unit], Path(scratch), include), missing):
            bar.update()
        run_compiler("-shared", "-o", _partial(library), *map(str, objects.values()), "-lpthread")
        os.replace(_partial(library), library)
        bar.update()


def _precompile(scratch: Path) -> tuple[str, ...]:
    """Options that include the precompiled headers; none for a compiler that does not precompile any."""
    header = scratch / "precompiled.h"
    header.write_text("".join(f'#include "{_RUNTIME / name}"\n' for name in _PRECOMPILED), encoding="utf-8")
    command = [*compiler(), *_FLAGS, *_LEVEL, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    done = subprocess.run(command, capture_output=True, check=False)
    return ("-include", str(header)) if done.returncode == 0 else ()


def _compile(unit: Unit, target: Path, scratch: Path, include: tuple[str, ...]) -> None:
    level = _SELDOM_LEVEL if unit[0].stem in _LESS_OPTIMISED else _LEVEL
    source = scratch / f"{unit[0].stem}.cpp"
    source.write_text("".join(f'#include "{path}"\n' for path in unit), encoding="utf-8")
    run_compiler(*_FLAGS, *level, *include, "-c", str(source), "-o", _partial(target))
    os.replace(_partial(target), target)


def _partial(path: Path) -> str:
    return f"{path}.{os.getpid()}.partial"


def run_compiler(*arguments: str) -> str:
    """What the C++ compiler printed on stdout.

    Raises:
        BuildError: what it said when it failed.
    """
    command = [*compiler(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}; is $CXX right?") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


@cache
def _identity() -> str:
    """Compiler version and processor: code for this processor runs on no other."""
    version = run_compiler("--version")
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "\n".join(
        (
            version,
            platform.machine(),
            flags,
            " ".join((*_FLAGS, *_LEVEL, *_SELDOM_LEVEL, *sorted(_LESS_OPTIMISED))),
        )
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
