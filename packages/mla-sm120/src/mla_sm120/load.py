"""From sources or packaged cubins to kernels on a device.

A cubin of the wheel is taken if it was compiled from the sources that are installed. Otherwise NVRTC
compiles, once, into the compile cache. So it does where the environment variable MLA_SM120_NVRTC_OPTIONS,
read at the first load of a kernel, has further options, such as -DMLA_PORTABLE_TRANSPOSE.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from kernel_dispatch import CompileCache, CompileKey, toolchain_versions

from .config import SMEM_BYTES
from .sources import CUDA_FOLDER, HASH_NAME, NVRTC_OPTIONS, cubin_name, sources_digest

OPTIONS_VARIABLE = "MLA_SM120_NVRTC_OPTIONS"
PACKAGED = Path(__file__).with_name("cubins")


def cubin(unit: str, arch: str) -> Path:
    """The file with the kernels of `unit` for `arch`, such as "sm_120a", compiled first if need be."""
    digest = _digest()
    more_options = tuple(os.environ.get(OPTIONS_VARIABLE, "").split())
    packaged = PACKAGED / cubin_name(unit, arch)
    if (
        not more_options
        and packaged.is_file()
        and (PACKAGED / HASH_NAME).read_text(encoding="ascii").strip() == digest
    ):
        return packaged
    key = CompileKey(
        kernel=unit,
        config={},
        arch=arch,
        options=NVRTC_OPTIONS + more_options,
        toolchain=toolchain_versions("cuda-bindings") | {"nvrtc": _nvrtc_version()},
        source_hash=digest,
    )
    folder = CompileCache().get_or_build(key, lambda into: _compile(unit, arch, key.options, into))
    return folder / cubin_name(unit, arch)


@cache
def load_kernel(unit: str, name: str, arch: str, device_index: int) -> Any:
    """The CUfunction `name` of `unit` on a device, allowed all the shared memory that it may use."""
    from cuda.bindings import driver

    library = _library(cubin(unit, arch))
    kernel = _checked(driver.cuLibraryGetKernel(library, name.encode()))
    if unit != "combine":
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = _checked(driver.cuDeviceGet(device_index))
        _checked(driver.cuKernelSetAttribute(attribute, SMEM_BYTES, kernel, device))
    return driver.CUfunction(int(kernel))  # what launches take; a CUkernel runs in the current context


@cache
def _digest() -> str:
    return sources_digest()


@cache
def _library(path: Path) -> Any:
    from cuda.bindings import driver

    return _checked(driver.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0))


def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        major, minor = _checked(nvrtc.nvrtcVersion())
    except DynamicLibNotFoundError as error:
        raise RuntimeError(
            "mla-sm120: there is no cubin of these sources for this GPU, and no NVRTC to compile one with; "
            "install a wheel that was built where nvcc is, or nvidia-cuda-nvrtc"
        ) from error
    return f"{major}.{minor}"


def _compile(unit: str, arch: str, options: tuple[str, ...], into: Path) -> None:
    from cuda.bindings import nvrtc

    text = (CUDA_FOLDER / f"{unit}.cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, f"{unit}.cu".encode(), 0, [], []))
    try:
        words = [word.encode() for word in (*options, f"-arch={arch}", f"--include-path={CUDA_FOLDER}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{unit} for {arch}: NVRTC {_nvrtc_version()} failed\n{log.decode()}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        (into / cubin_name(unit, arch)).write_bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings returned after its status; raises RuntimeError if that is an error."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
