"""From sources or packaged cubins to kernels on a device.

A cubin of the wheel is taken if it was compiled from the sources that are installed, and if the driver takes
it: one of CUDA 12 refuses those of an nvcc of CUDA 13. Otherwise NVRTC compiles, once, into the compile
cache. So it does where the environment variable MLA_SM120_NVRTC_OPTIONS, read at the first load of a kernel,
has further options, such as -DMLA_PORTABLE_TRANSPOSE.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from kernel_dispatch import CompileCache, CompileKey

from .config import SMEM_BYTES
from .sources import CUDA_FOLDER, HASH_NAME, NVRTC_OPTIONS, cubin_name, sources_digest

OPTIONS_VARIABLE = "MLA_SM120_NVRTC_OPTIONS"
PACKAGED = Path(__file__).with_name("cubins")
# What a driver says of a cubin that is newer than itself.
REFUSALS = (
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
)
# (unit, arch) of what this process has loaded -> where it is from; reports of tests and benchmarks say it.
origins: dict[tuple[str, str], str] = {}


def packaged_cubin(unit: str, arch: str) -> Path | None:
    """The wheel's file with the kernels of `unit` for `arch`, such as "sm_120a", if it is to be taken."""
    path = PACKAGED / cubin_name(unit, arch)
    if _more_options() or not path.is_file():
        return None
    return path if (PACKAGED / HASH_NAME).read_text(encoding="ascii").strip() == _digest() else None


def compiled_cubin(unit: str, arch: str) -> Path:
    """The compile cache's file of `unit` for `arch`, which NVRTC compiles if it is not there."""
    key = CompileKey(
        kernel=unit,
        config={},
        arch=arch,
        options=NVRTC_OPTIONS + _more_options(),
        toolchain={"nvrtc": _dotted(_nvrtc_version()), "nvrtc_bytes": str(_nvrtc_bytes())},
        source_hash=_digest(),
    )
    folder = CompileCache().get_or_build(key, lambda into: _compile(unit, arch, key.options, into))
    return folder / cubin_name(unit, arch)


def find_cubin(unit: str, arch: str) -> Path:
    """The packaged cubin of `unit` for `arch`, or the compiled one; needs no GPU."""
    return packaged_cubin(unit, arch) or compiled_cubin(unit, arch)


def compiler_of(cubin: bytes) -> str:
    """The compiler that a cubin names in its section `.note.nv.tkinfo`, such as "ptxas 13.0.88"."""
    found = re.search(rb"\0(\w+)\0Cuda compilation tools, release [\d.]+, V([\d.]+)\0", cubin)
    return "unknown compiler" if found is None else b" ".join(found.groups()).decode("ascii")


@cache
def load_kernel(unit: str, name: str, arch: str, device_index: int) -> Any:
    """The CUfunction `name` of `unit` on a device, allowed all the shared memory that it may use."""
    from cuda.bindings import driver

    library = load_library(unit, arch)
    kernel = checked(driver.cuLibraryGetKernel(library, name.encode()))
    if unit != "combine":
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = checked(driver.cuDeviceGet(device_index))
        checked(driver.cuKernelSetAttribute(attribute, SMEM_BYTES, kernel, device))
    return driver.CUfunction(int(kernel))  # what launches take; a CUkernel runs in the current context


@cache
def load_library(unit: str, arch: str) -> Any:
    """The CUlibrary of `unit`, of the packaged cubin, or of a compiled one where the driver refuses that."""
    from cuda.bindings import driver

    def load(path: Path) -> tuple[Any, ...]:
        loaded: tuple[Any, ...] = driver.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0)
        return loaded

    packaged = packaged_cubin(unit, arch)
    if packaged is not None:
        result = load(packaged)
        if result[0].name not in REFUSALS:
            origins[unit, arch] = f"cubin of the wheel, {compiler_of(packaged.read_bytes())}"
            return checked(result)
    result = load(compiled_cubin(unit, arch))
    if result[0].name in REFUSALS and _driver_version() < _nvrtc_version():
        supported, compiler = _dotted(_driver_version()), _dotted(_nvrtc_version())
        raise RuntimeError(
            f"mla-sm120: the GPU's driver supports CUDA {supported} and refuses {unit} for {arch} as "
            f"compiled by NVRTC {compiler} ({result[0].name}); install cuda-bindings and NVRTC of CUDA "
            f"{supported}, or a driver for CUDA {compiler} or newer"
        )
    origins[unit, arch] = " ".join(("NVRTC", _dotted(_nvrtc_version()), *_more_options()))
    return checked(result)


@cache
def _digest() -> str:
    return sources_digest()


def _more_options() -> tuple[str, ...]:
    return tuple(os.environ.get(OPTIONS_VARIABLE, "").split())


def _dotted(version: tuple[int, int]) -> str:
    """A version of CUDA as people write it."""
    return f"{version[0]}.{version[1]}"


def _driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver supports."""
    from cuda.bindings import driver

    version = checked(driver.cuDriverGetVersion())
    return version // 1000, version % 1000 // 10


def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        major, minor = checked(nvrtc.nvrtcVersion())
        return major, minor
    except DynamicLibNotFoundError as error:
        raise RuntimeError(
            "mla-sm120: there is no cubin of these sources for this GPU and its driver, and no NVRTC to "
            "compile one with; install a wheel that was built where nvcc is, or nvidia-cuda-nvrtc"
        ) from error


def _nvrtc_bytes() -> int:
    """The size of NVRTC's library, which tells releases apart that have one version."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    path = load_nvidia_dynamic_lib("nvrtc").abs_path
    return 0 if path is None else Path(path).stat().st_size


def _compile(unit: str, arch: str, options: tuple[str, ...], into: Path) -> None:
    from cuda.bindings import nvrtc

    text = (CUDA_FOLDER / f"{unit}.cu").read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(text, f"{unit}.cu".encode(), 0, [], []))
    try:
        words = [word.encode() for word in (*options, f"-arch={arch}", f"--include-path={CUDA_FOLDER}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{unit} for {arch}: NVRTC {_dotted(_nvrtc_version())} failed\n{log.decode()}")
        code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        (into / cubin_name(unit, arch)).write_bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings returned after its status; raises RuntimeError if that is an error."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
