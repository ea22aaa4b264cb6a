"""The rate of matrix products on this device: the ceiling of compute-bound decode.

Where there are tcgen05 tensor cores it is that of a large product by cuBLAS, elsewhere that of mma.sync.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from kernel_dispatch import Arch
from kernel_testing import time_cuda_us

TCGEN05_MAJORS = (10, 11)  # of compute capabilities
MATMUL_SIZE = 8192
WARPS, TILES, STEPS = 8, 16, 2000
SOURCE = """
extern "C" __global__ void __launch_bounds__(256) mma_rate(float* out) {
  float c[%(tiles)d][4];
  for (int t = 0; t < %(tiles)d; ++t) c[t][0] = c[t][1] = c[t][2] = c[t][3] = threadIdx.x * t;
  unsigned a[4] = {threadIdx.x * 2654435761u, 0x3c003c01u, 0x3c023c03u, 0x3c043c05u};
  unsigned b[2] = {0x3c063c07u, 0x3c083c09u};
  for (int i = 0; i < %(steps)d; ++i) {
#pragma unroll
    for (int t = 0; t < %(tiles)d; ++t)
      asm volatile("%(mma)s {%%0, %%1, %%2, %%3}, {%%4, %%5, %%6, %%7}, {%%8, %%9}, {%%0, %%1, %%2, %%3};"
                   : "+f"(c[t][0]), "+f"(c[t][1]), "+f"(c[t][2]), "+f"(c[t][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  float sum = 0;
  for (int t = 0; t < %(tiles)d; ++t) sum += c[t][0] + c[t][1] + c[t][2] + c[t][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""
INSTRUCTIONS = {
    "bf16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16),
    "fp16": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16),
    "fp8": ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 32),
}


def matrix_tflops(dtype: str, arch: Arch) -> float:
    """TFLOP/s of matrix products of a dtype."""
    return matmul_tflops(dtype) if arch.major in TCGEN05_MAJORS else mma_tflops(dtype, arch.name)


def matrix_unit(arch: Arch) -> str:
    """What `matrix_tflops` measures."""
    return "cuBLAS" if arch.major in TCGEN05_MAJORS else "mma.sync"


def matmul_tflops(dtype: str) -> float:
    """TFLOP/s of a product of large square matrices by cuBLAS."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[dtype]
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(torch_dtype)
    one = torch.ones((), device="cuda")

    def product() -> None:
        if dtype == "fp8":
            torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        else:
            torch.mm(a, b.T)

    microseconds = time_cuda_us({"matmul": [product]}, repeats=7)["matmul"]
    return 2 * MATMUL_SIZE**3 / microseconds / 1e6


def mma_tflops(dtype: str, arch: str) -> float:
    """TFLOP/s of a plain loop of independent mma.sync in every warp of every SM."""
    instruction, depth = INSTRUCTIONS[dtype]
    source = SOURCE % {"mma": instruction, "tiles": TILES, "steps": STEPS}
    function = load_function(compile_cubin(source, "mma_rate", arch), "mma_rate")
    from cuda.bindings import driver

    blocks = 2 * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(blocks * WARPS * 32, device="cuda")

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        parameters = ((out.data_ptr(),), (ctypes.c_void_p,))
        checked(driver.cuLaunchKernel(function, blocks, 1, 1, WARPS * 32, 1, 1, 0, stream, parameters, 0))

    microseconds = time_cuda_us({"mma": [launch]}, repeats=7)["mma"]
    return 2 * 16 * 8 * depth * TILES * STEPS * WARPS * blocks / microseconds / 1e6


def compile_cubin(source: str, name: str, arch: str) -> bytes:
    """What NVRTC makes of a kernel's source."""
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [b"-std=c++17", f"-arch={arch}".encode()]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


def load_function(code: bytes, name: str) -> Any:
    """The kernel `name` of a cubin, on the current device."""
    from cuda.bindings import driver

    library = checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    return driver.CUfunction(int(checked(driver.cuLibraryGetKernel(library, name.encode()))))


def checked(result: tuple[Any, ...]) -> Any:
    """The value that a function of cuda-bindings returned after its status, if it returned one."""
    status, *values = result
    assert not int(status), status
    return values[0] if values else None
