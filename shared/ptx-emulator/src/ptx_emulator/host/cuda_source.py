"""PTX of CUDA C++ sources, by nvcc or by NVRTC, cached on disk."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ptx_emulator.build import cache_folder
from ptx_emulator.errors import BuildError

_TEXT = "<source>"  # what a source that was given as text is called
_NVRTC_SUCCESS = 0
_NVRTC_PATTERNS = ("cu13/lib/libnvrtc.so*", "cuda_nvrtc/lib/libnvrtc.so*")
_INCLUDE_PATTERNS = ("cu13/include", "cuda_runtime/include")


def compile_cuda(
    source: str | Path,
    arch: str = "sm_90a",
    options: Sequence[str] = (),
    *,
    compiler: str = "auto",
    lineinfo: bool = True,
) -> str:
    """The PTX of a CUDA source.

    Args:
        source: the text of a source, or the path of a file as a `Path`. Findings call a text `<source>`.
        arch: architecture, such as `sm_90a`.
        options: more options for the compiler.
        compiler: `nvcc`, `nvrtc`, or `auto`: nvcc if it is installed (`$NVCC`, or on the PATH), else NVRTC.
        lineinfo: whether the PTX refers to source lines.

    Raises:
        BuildError: what the compiler said, or that there is none.
        ValueError: an unknown `compiler`.
    """
    if compiler not in ("auto", "nvcc", "nvrtc"):
        raise ValueError(f"compiler: {compiler!r}, expected auto, nvcc or nvrtc")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if compiler == "nvcc" and nvcc is None:
        raise BuildError("compiler: nvcc is not installed")
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    flags = ["-lineinfo"] * lineinfo + list(options)
    if not any(re.fullmatch(r"--?std(=.*)?", flag) for flag in flags):
        flags.append("-std=c++17")
    if nvcc is not None and compiler != "nvrtc":
        version = _nvcc_version(nvcc)
        return _cached(
            (version, arch, text, str(source) if isinstance(source, Path) else _TEXT, *flags, *_more_flags()),
            lambda: _run_nvcc(nvcc, source, text, arch, flags),
        )
    library = _nvrtc()
    if library is None:
        raise BuildError("no CUDA compiler: install nvcc, or `pip install ptx-emulator[nvrtc]`")
    name = str(source) if isinstance(source, Path) else _TEXT
    return _run_nvrtc(library, name, text, arch, flags)


# ---------------------------------------------------------------------- nvcc


@cache
def _nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _run_nvcc(
    nvcc: str, source: str | Path, text: str, arch: str, flags: Sequence[str]
) -> tuple[str, list[str]]:
    """The PTX, and the files that it depends on."""
    with tempfile.TemporaryDirectory() as folder:
        path = source if isinstance(source, Path) else Path(folder, "source.cu")
        if path is not source:
            path.write_text(text, encoding="utf-8")
        ptx, depends = Path(folder, "out.ptx"), Path(folder, "out.d")
        command = [nvcc, "-ptx", f"-arch={arch}", *flags, "-o", str(ptx)]
        command += ["-MD", "-MF", str(depends), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr if path is source else done.stderr.replace(str(path), _TEXT)
            raise BuildError(f"nvcc failed:\n{said[-4000:]}")
        words = re.split(r"(?<!\\)\s+", depends.read_text(encoding="utf-8").replace("\\\n", " "))
        files = [word.replace("\\ ", " ") for word in words[1:] if word and not word.startswith(folder)]
        text = ptx.read_text(encoding="utf-8")
        if path is not source:
            text = text.replace(f'"{path}"', f'"{_TEXT}"')
        return text, [file for file in files if Path(file).is_file()]


def _cached(parts: Sequence[str], compile_now: Callable[[], tuple[str, list[str]]]) -> str:
    """PTX from the cache if no file that it depends on has changed, else compiled and put there."""
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    entry = cache_folder() / f"cuda-{key}.json"
    stored = _stored(entry)
    if stored is not None and all(_file_digest(path) == digest for path, digest in stored["files"].items()):
        return str(stored["ptx"])
    ptx, files = compile_now()
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_suffix(f".{uuid.uuid4().hex}")
    content = {"ptx": ptx, "files": {file: _file_digest(file) for file in files}}
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(entry)
    return ptx


def _stored(entry: Path) -> dict[str, Any] | None:
    """An entry of the cache; None if there is none, or none that can be read."""
    try:
        stored: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return stored


def _more_flags() -> tuple[str, ...]:
    """What nvcc takes from the environment besides its arguments."""
    return tuple(os.environ.get(f"NVCC_{place}_FLAGS", "") for place in ("PREPEND", "APPEND"))


def _file_digest(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


# ---------------------------------------------------------------------- NVRTC


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC from a wheel, or the system's."""
    for path in _in_wheels(*_NVRTC_PATTERNS):
        if "builtins" not in path.name and ".alt." not in path.name:
            # NVRTC opens this one by its name, which finds what is loaded but not what lies beside it.
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
    found = ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(found) if found else None


def _in_wheels(*patterns: str) -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        for pattern in patterns:
            yield from sorted(Path(root).glob(pattern), reverse=True)


def _run_nvrtc(library: ctypes.CDLL, name: str, text: str, arch: str, flags: Sequence[str]) -> str:
    includes = [f"--include-path={path}" for path in _in_wheels(*_INCLUDE_PATTERNS)]
    options = [f"--gpu-architecture={arch.replace('sm_', 'compute_')}", *includes, *flags]
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    if created != _NVRTC_SUCCESS:
        raise BuildError(f"nvrtcCreateProgram returned {created}")
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), words) != _NVRTC_SUCCESS:
            raise BuildError(f"NVRTC failed:\n{_nvrtc_text(library, program, 'ProgramLog')[-4000:]}")
        return _nvrtc_text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.value.decode()
