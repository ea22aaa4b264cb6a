"""Compiles the runtime once and keeps it in the user's cache folder.

Objects are keyed by the source, the headers, the compiler and the processor, so a change of one file compiles
that file alone. Compilers in order: `$CXX`, g++, clang++, and the `ziglang` wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

from ptx_emulator.errors import BuildError

CACHE_VARIABLE = "PTX_EMULATOR_CACHE_DIR"
_RUNTIME = Path(__file__).parent / "runtime"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",  # else comparisons of floats keep loops from being vectorised
    "-ffp-contract=off",
)


def cache_folder() -> Path:
    """Where compiled files are kept: `$PTX_EMULATOR_CACHE_DIR`, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("ptx-emulator", appauthor=False)


@cache
def compiler() -> tuple[str, ...]:
    """The command of a C++20 compiler.

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


def build(jobs: int | None = None) -> Path:
    """The shared library of the runtime, compiled if it is not in the cache.

    Raises:
        BuildError: what the compiler said.
    """
    sources = sorted(_RUNTIME.glob("*.cpp"))
    headers = sorted(_RUNTIME.glob("*.h"))
    common = _digest(_identity(), *(h.name + h.read_text(encoding="utf-8") for h in headers))
    objects = {s: _digest(common, s.name, s.read_text(encoding="utf-8")) for s in sources}
    folder = cache_folder()
    library = folder / f"runtime-{_digest(*objects.values())}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        paths = list(pool.map(lambda item: _compile(*item, folder), objects.items()))
    _run([*compiler(), "-shared", "-o", _partial(library), *map(str, paths), "-lpthread"])
    os.replace(_partial(library), library)
    return library


def _compile(source: Path, key: str, folder: Path) -> Path:
    target = folder / f"{source.stem}-{key}.o"
    if not target.exists():
        _run([*compiler(), *_FLAGS, "-c", str(source), "-o", _partial(target)])
        os.replace(_partial(target), target)
    return target


def _partial(path: Path) -> str:
    return f"{path}.{os.getpid()}.partial"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")


@cache
def _identity() -> str:
    """Compiler version and processor: code for this processor runs on no other."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "\n".join((version, platform.machine(), flags, " ".join(_FLAGS)))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
