"""Compiles functions once per configuration and loads them, where it can be without the compiler.

A function is traced and compiled by CuTe DSL for the architecture named, no GPU needed. Where there is a C
compiler it is linked into a library, which loads with only the DSL's runtime library and TVM-FFI, is called
by `call.c` and launches by `launch.c`; where there is none, the DSL loads the object file, which is called by
TVM-FFI and launches by the CUDA runtime. Functions take PyTorch tensors, whose shapes, strides, dtypes,
devices and alignment they check, and launch on PyTorch's current stream of the device of the tensors.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernel_dispatch import CompileCache, CompileKey, source_hash, toolchain_versions

from .load import cuda_of_dsl, load_library

LINKED_SOURCES = tuple(Path(__file__).with_name(name) for name in ("call.c", "launch.c"))
DISTRIBUTIONS = ("nvidia-cutlass-dsl", "apache-tvm-ffi")

VARIABLE_PREFIX = "CUTE_DSL_"  # of the variables that the DSL reads
# Those that change no code: what is printed, kept or cached, and the architecture, which is always an option.
HARMLESS_VARIABLES = (
    *("ARCH", "CACHE_DIR", "DISABLE_FILE_CACHING", "DUMP_DIR", "FILTER_STACKTRACE", "JIT_CACHE_MAX_ELEMS"),
    *("JIT_TIME_PROFILING", "KEEP", "LOG_", "NO_CACHE", "PRINT_", "SHOW_STACKTRACE", "WARNINGS_IGNORE"),
)

_compile_lock = threading.Lock()  # the DSL traces one function at a time


@dataclass(frozen=True)
class Compiled:
    """What one configuration compiled to, as files in `directory`.

    `ptx` and `cubin` hold every kernel of the function. `library` may be absent, see `cute_kernels.compile`.
    """

    name: str
    directory: Path

    @property
    def object_file(self) -> Path:
        """The host code, with the cubin inside; exports the function as `__tvm_ffi_<name>`."""
        return self.directory / f"{self.name}.o"

    @property
    def library(self) -> Path:
        """The object file linked with `call.c` and `launch.c`."""
        return self.directory / f"{self.name}.so"

    @property
    def ptx(self) -> Path:
        return self.directory / f"{self.name}.ptx"

    @property
    def cubin(self) -> Path:
        return self.directory / f"{self.name}.cubin"

    def load(self) -> Callable[..., None]:
        """The function, loaded once per process: from its library, or else by the DSL's linker."""
        return _load(self)


@dataclass(frozen=True)
class CuteFunction:
    """A function of CuTe DSL that is compiled for configurations.

    name: a C identifier; what the compiled function is called.
    trace(config, options): calls `cute.compile` with those options and returns its result. It and what it
        calls may import the DSL; they read nothing but `config` (a dataclass that `canonical_json` takes),
        the code in `sources` and the DSL itself.
    sources: files and directories with all the code that is run while tracing.
    options: more options of `cute.compile`.
    """

    name: str
    trace: Callable[[Any, str], Any]
    sources: tuple[Path, ...]
    options: tuple[str, ...] = ()

    def load(self, config: object, arch: str) -> Callable[..., None]:
        """The launcher for `config` on `arch` (a name such as "sm_90a"), compiled first if need be."""
        return self.compiled(config, arch).load()

    def compiled(self, config: object, arch: str) -> Compiled:
        """The files that `config` compiles to, in the compile cache; built first if it lacks them."""
        key = self.key(config, arch)
        directory = CompileCache().get_or_build(key, lambda into: self._build(config, arch, into))
        return Compiled(self.name, directory)

    def key(self, config: object, arch: str) -> CompileKey:
        """Everything that the compiled code depends on."""
        return CompileKey(
            kernel=f"{self.name} of {type(config).__name__}",
            config=config,
            arch=arch,
            options=self._options(arch),
            toolchain={**_toolchain(), **dsl_variables()},
            source_hash=_hash_of(self.sources),
        )

    def _options(self, arch: str) -> tuple[str, ...]:
        return ("--enable-tvm-ffi", f"--gpu-arch {arch}", *self.options)

    def _build(self, config: object, arch: str, directory: Path) -> None:
        """Compile into `directory`: object file, PTX, cubin, and the library where it can be linked."""
        compiled = Compiled(self.name, directory)
        with _compile_lock, tempfile.TemporaryDirectory() as scratch:
            options = (
                *self._options(arch),
                "--keep-ptx",
                "--keep-cubin",
                f"--dump-dir {shlex.quote(scratch)}",
            )
            function = self.trace(config, " ".join(options))
            function.export_to_c(str(compiled.object_file), function_name=self.name)
            for target in (compiled.ptx, compiled.cubin):  # the compiler names its files after the arguments
                (dumped,) = Path(scratch).glob(f"*{target.suffix}")
                shutil.copyfile(dumped, target)
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
        if compiler is not None:
            _link(compiler, compiled)


def dsl_variables() -> dict[str, str]:
    """The variables of the environment, read now, that may change what the DSL compiles."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(VARIABLE_PREFIX)
        and not name.removeprefix(VARIABLE_PREFIX).startswith(HARMLESS_VARIABLES)
    }


def _link(compiler: str, compiled: Compiled) -> None:
    import cutlass.cute as cute
    import tvm_ffi.libinfo

    runtime = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
    parts = [str(compiled.object_file), *map(str, LINKED_SOURCES), *runtime]
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    named = (f"-DFUNCTION=__tvm_ffi_{compiled.name}", f'-DNAME="{compiled.name}"')
    # Not linked to a C library, it takes that of the process, which may be older than the one here; but the
    # function that it calls is its own, whichever else has that name.
    flags = ("-O2", "-fPIC", "-shared", "-nodefaultlibs", "-Wl,-Bsymbolic")
    options = (*flags, *named, *(f"-I{folder}" for folder in includes))
    command = [compiler, *options, "-o", str(compiled.library), *parts]
    linked = subprocess.run(command, check=False, capture_output=True, text=True)
    if linked.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {linked.returncode}\n{linked.stderr}")


@cache
def _toolchain() -> dict[str, str]:
    """What compiles: the DSL, its compiler of one CUDA, and the machine that the host code is for."""
    compiler = f"nvidia-cutlass-dsl-libs-cu{cuda_of_dsl()}"
    return {**toolchain_versions(*DISTRIBUTIONS, compiler), "machine": platform.machine()}


@cache
def _hash_of(sources: tuple[Path, ...]) -> str:
    return source_hash(*sources, Path(__file__), *LINKED_SOURCES)


@cache
def _load(compiled: Compiled) -> Callable[..., None]:
    if compiled.library.exists():
        return load_library(compiled.library, compiled.name)
    import cutlass.cute as cute

    module = cute.runtime.load_module(str(compiled.object_file), enable_tvm_ffi=True)
    launcher: Callable[..., None] = module[compiled.name]
    return launcher
