"""Ways to launch the kernel of an MLA decode call, for their host time.

`Plan.run` calls the launcher, which reads the tensors and calls the driver; so it does with tensors of layers
in turn, which share a plan. For mla-sm120 there is a call of two launches, too, and the driver is called by
itself, with the configuration and the packed parameters of the launcher: through cuda-bindings, as the
launcher does; through ctypes; and through the launcher of TVM-FFI. That is a C++ header: functions that use
it are compiled here, one that only launches, and one that takes the tensors of the call first, as a launcher
in C++ would. cuda.core takes no struct as a parameter, which these kernels have: it launches an empty kernel
with a pointer, and cuda-bindings does so beside it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _mla_cases import Call, Cell
from _mla_ceilings import checked, compile_cubin, load_function
from kernel_dispatch import as_arch
from mla_core import plan

CELL = Cell("bf16", 1, 16, 32)  # one launch, of which a queue holds many; the tile has as many rows
LAYERS = 61  # of DeepSeek-V3
BLOCK_THREADS = 256  # of the empty kernel
EMPTY_SOURCE = 'extern "C" __global__ void empty(float*) {}'
TVM_FFI_SOURCE = """
#include <memory>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/cuda/cubin_launcher.h>

namespace ffi = tvm::ffi;

std::unique_ptr<ffi::CubinKernel> kernel;

void find(int64_t library, ffi::String name) {
  kernel = std::make_unique<ffi::CubinKernel>(reinterpret_cast<CUlibrary>(library), name.c_str());
}

int64_t launch(int64_t config, int64_t pointers) {
  return kernel->LaunchEx(reinterpret_cast<void**>(pointers), *reinterpret_cast<CUlaunchConfig*>(config));
}

int64_t launch_on(ffi::TensorView query, ffi::TensorView kv_cache, ffi::TensorView block_tables,
                  ffi::TensorView seq_lens, ffi::TensorView out, ffi::TensorView lse,
                  ffi::TensorView workspace, int64_t config, int64_t pointers) {
  return launch(config, pointers);
}
"""


class Launches:
    """Launches on the stream that is current now. runs: by name; missing: why others are not among them."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self._backend, self._device = backend, device
        self._plan = plan(CELL.problem, device, backend)
        self._launcher: Any = self._plan._launch
        self._call = Call(CELL, device, self._plan.workspace_nbytes)
        self._kept: list[object] = []  # memory that launches have the address of
        self.runs: dict[str, Callable[[], object]] = {}
        self.missing: dict[str, str] = {}
        self._plans()
        if type(self._launcher).__module__ != "mla_sm120.launch":
            return
        state = self._launcher._threads.own
        ((self._config, self._function),) = state.configs
        self._parameters_address = next(iter(state.calls.values())).address
        for name, add in (
            ("Plan.run, cut in two", self._cut),
            ("cuda-bindings", self._cuda_bindings),
            ("ctypes", self._ctypes),
            ("TVM-FFI", self._tvm_ffi),
            ("cuda.core", self._cuda_core),
        ):
            try:
                add()
            except Exception as error:  # not installed, or nothing to compile with
                self.missing[name] = f"{type(error).__name__}: {str(error)[:300]}"

    def _plans(self) -> None:
        calls = [self._call]
        calls += [Call(CELL, self._device, self._plan.workspace_nbytes) for _ in range(LAYERS - 1)]
        layers = []
        for positional, named in (call.arguments for call in calls):
            layers.append(partial(self._plan.run, *positional, **named))
            layers[-1]()
        self.runs["Plan.run"] = layers[0]
        in_turn = itertools.cycle(layers)
        self.runs["Plan.run, layers in turn"] = lambda: next(in_turn)()
        self.runs["launcher"] = partial(self._launcher, *self._call.launch_arguments)

    def _cut(self) -> None:
        """A request more than there are SMs, which is launched on its own."""
        cell = replace(CELL, batch=as_arch(self._device).sm_count + 1)
        cut = plan(cell.problem, self._device, self._backend, f"m{CELL.num_heads}-tail")
        positional, named = Call(cell, self._device, cut.workspace_nbytes).arguments
        run = partial(cut.run, *positional, **named)
        run()
        self.runs["Plan.run, cut in two"] = run

    def _cuda_bindings(self) -> None:
        """The launcher's call."""
        from cuda.bindings import driver

        given = (self._config, self._function, self._parameters_address, 0)
        self._add("cuda-bindings", partial(driver.cuLaunchKernelEx, *given))

    def _ctypes(self) -> None:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        launch.argtypes, launch.restype = [ctypes.c_void_p] * 4, ctypes.c_int
        given = (int(self._config.getPtr()), int(self._function), self._parameters_address, None)
        self._add("ctypes", partial(launch, *given))

    def _tvm_ffi(self) -> None:
        """`CubinKernel.LaunchEx` of the kernel, which is a C++ function, without and with tensors."""
        from mla_sm120.config import DTYPE_UNITS
        from mla_sm120.load import load_library
        from torch.utils.cpp_extension import CUDA_HOME
        from tvm_ffi.cpp import load_inline

        if CUDA_HOME is None:
            raise RuntimeError("no CUDA toolkit, whose headers it needs")
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # the library is not linked with it
        module = load_inline(
            "mla_launches",
            cpp_sources=TVM_FFI_SOURCE,
            functions=["find", "launch", "launch_on"],
            extra_cflags=["-DTVM_FFI_CUBIN_LAUNCHER_USE_DRIVER_API=1"],
            extra_include_paths=[str(Path(CUDA_HOME) / "include")],
        )
        unit = DTYPE_UNITS[self._launcher.problem.q_dtype]
        library = load_library(unit, as_arch(self._device).name)
        module.find(int(library), self._launcher.division.kernel_name)
        addresses = (int(self._config.getPtr()), self._parameters_address)
        positional, named = self._call.arguments
        tensors = (*positional, named["out"], named["lse"], named["workspace"])
        self._add("TVM-FFI", partial(module.launch, *addresses))
        self._add("TVM-FFI, with the tensors", partial(module.launch_on, *tensors, *addresses))

    def _cuda_core(self) -> None:
        """An empty kernel by cuda.core, and by cuda-bindings."""
        from cuda.bindings import driver
        from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

        code = compile_cubin(EMPTY_SOURCE, "empty", as_arch(self._device).name)
        Device(self._device.index).set_current()
        kernel = ObjectCode.from_cubin(code).get_kernel("empty")
        handle = torch.cuda.current_stream(self._device).cuda_stream
        config = LaunchConfig(grid=1, block=BLOCK_THREADS)
        address = self._call.out.data_ptr()
        run = partial(launch, Stream.from_handle(handle), config, kernel, address)
        run()
        self.runs["cuda.core, empty kernel"] = run
        config = driver.CUlaunchConfig()
        config.gridDimX = config.gridDimY = config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = BLOCK_THREADS, 1, 1
        config.hStream = handle
        parameter = ctypes.c_void_p(address)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        self._kept += [parameter, pointers]
        given = (config, load_function(code, "empty"), ctypes.addressof(pointers), 0)
        self._add("cuda-bindings, empty kernel", partial(driver.cuLaunchKernelEx, *given))

    def _add(self, name: str, launch: Callable[[], Any]) -> None:
        """Take what returns a status, if its first launch and the kernel are a success."""
        status = launch()
        checked(status if isinstance(status, tuple) else (status,))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.runs[name] = launch
