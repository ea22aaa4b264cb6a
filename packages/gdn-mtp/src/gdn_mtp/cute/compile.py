"""Compiles kernels once per configuration and loads them, where it can be without the compiler.

A kernel is traced and compiled by CuTe DSL for the architecture named, no GPU needed. Where there is a C
compiler it is linked into a library, which loads with only the DSL's runtime library and TVM-FFI, and which
launches by `launch.c`; where there is none, the DSL loads the object file, which launches by the CUDA
runtime. Functions take PyTorch tensors, whose shapes, strides, dtypes, devices and alignment they check, and
launch on PyTorch's current stream of the device that the tensors are on.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from kernel_dispatch import CompileCache, CompileKey, source_hash, toolchain_versions

from .config import Config

FUNCTION = "gated_delta_rule"
LIBRARY = f"{FUNCTION}.so"
OBJECT = f"{FUNCTION}.o"
PTX = f"{FUNCTION}.ptx"
CUBIN = f"{FUNCTION}.cubin"
LAUNCH_SOURCE = Path(__file__).with_name("launch.c")
DISTRIBUTIONS = ("nvidia-cutlass-dsl", "apache-tvm-ffi")
_compile_lock = threading.Lock()  # the DSL traces one kernel at a time


def load(config: Config, arch: str) -> Callable[..., None]:
    """The launcher for `config` on `arch` (a name such as "sm_90a"), compiled first if the cache lacks it."""
    return _load(compiled(config, arch))


def compiled(config: Config, arch: str) -> Path:
    """The cache directory with what `config` compiles to, built first if need be."""
    key = CompileKey(
        kernel=type(config).__name__,
        config=asdict(config),
        arch=arch,
        options=_options(arch),
        toolchain=_toolchain(),
        source_hash=_sources(),
    )
    return CompileCache().get_or_build(key, lambda directory: _build(config, arch, directory))


def _options(arch: str) -> tuple[str, ...]:
    return ("--enable-tvm-ffi", f"--gpu-arch {arch}")


@cache
def _toolchain() -> dict[str, str]:
    return toolchain_versions(*DISTRIBUTIONS)


@cache
def _sources() -> str:
    here = Path(__file__).parent
    return source_hash(*sorted(here.glob("*.py")), LAUNCH_SOURCE)


def _build(config: Config, arch: str, directory: Path) -> None:
    """Compile into `directory`: object file, PTX, cubin, and the library where a C compiler can link it."""
    with _compile_lock, tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("CUTE_DSL_ARCH", arch)  # without a GPU the DSL has no default of its own
        import cutlass.cute as cute

        from .trace import trace

        options = (*_options(arch), "--keep-ptx", "--keep-cubin", f"--dump-dir {scratch}")
        function = trace(config, " ".join(options))
        function.export_to_c(str(directory / OBJECT), function_name=FUNCTION)
        for name in (PTX, CUBIN):  # the compiler names its files after the kernel and the target
            (dumped,) = Path(scratch).glob(f"*{Path(name).suffix}")
            shutil.copyfile(dumped, directory / name)
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
        if compiler is not None:
            runtime = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
            parts = [str(directory / OBJECT), str(LAUNCH_SOURCE), *runtime]
            # Not linked to a C library, it takes that of the process, which may be older than the one here.
            flags = ("-O2", "-fPIC", "-shared", "-nodefaultlibs")
            command = [compiler, *flags, "-o", str(directory / LIBRARY), *parts]
            subprocess.run(command, check=True, capture_output=True, text=True)


@cache
def _load(directory: Path) -> Callable[..., None]:
    """The function in a cache directory: from its library, or from the object file by the DSL's linker."""
    launcher: Callable[..., None]
    if not (directory / LIBRARY).exists():
        import cutlass.cute as cute

        launcher = cute.runtime.load_module(str(directory / OBJECT), enable_tvm_ffi=True)[FUNCTION]
        return launcher
    _load_runtime()
    import tvm_ffi

    launcher = tvm_ffi.load_module(str(directory / LIBRARY))[FUNCTION]
    return launcher


@cache
def _load_runtime() -> None:
    """Load the DSL's runtime library, which compiled kernels link to, without importing the DSL."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        for library in sorted(Path(root).glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            return
    raise RuntimeError("libcute_dsl_runtime.so is not in the installed nvidia-cutlass-dsl")
