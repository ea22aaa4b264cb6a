"""Compiled CuTe DSL functions, called with CPU tensors as if they were the GPU functions."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptx_emulator.errors import EmulatorError
from ptx_emulator.host.arrays import Memory, is_array, memories_of
from ptx_emulator.host.cute_host import CapturedLaunch, HostFunction
from ptx_emulator.host.job import finish, give
from ptx_emulator.machine import LoadedModule, Machine, Result
from ptx_emulator.options import Options
from ptx_emulator.targets import target as find_target

_ARCH_VARIABLE = "CUTE_DSL_ARCH"
_DLTENSOR_DEVICE_TYPE = 8  # bytes from the start of a DLTensor
_DL_CUDA = 2
_EXPORTED = "emulated"  # what a function is called in its object file
_FROM_ENVIRONMENT = object()  # in place of a stream
_compile_lock = threading.Lock()  # the DSL traces one function at a time, and its architecture is a variable


def compile_cute(
    function: Callable[..., Any],
    *args: Any,
    arch: str = "sm_100a",
    options: str = "",
    lineinfo: bool = True,
) -> Any:
    """`cute.compile` with what the emulator needs: TVM-FFI, PTX kept, source lines; no GPU is needed.

    Args:
        function: what `cute.compile` takes, with its arguments after it.
        arch: architecture to compile for.
        options: more options for `cute.compile`, such as `--opt-level 2`.
        lineinfo: whether the PTX refers to source lines, so that findings do.
    """
    import cutlass.cute as cute

    with _compile_lock, tempfile.TemporaryDirectory() as folder:
        words = ["--enable-tvm-ffi", f"--gpu-arch {arch}", "--keep-ptx", f"--dump-dir {folder}"]
        words += ["--generate-line-info"] * lineinfo + [options] * bool(options)
        before = os.environ.get(_ARCH_VARIABLE)
        os.environ[_ARCH_VARIABLE] = arch
        try:
            return cute.compile(function, *args, options=" ".join(words))
        finally:
            if before is None:
                del os.environ[_ARCH_VARIABLE]
            else:
                os.environ[_ARCH_VARIABLE] = before


def ptx_of(compiled: Any) -> str:
    """The PTX of a compiled CuTe DSL function.

    Raises:
        EmulatorError: it was compiled without keeping its PTX.
    """
    text = getattr(compiled, "__ptx__", None)
    if text and ".version" not in text and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    if not text or ".version" not in text:
        raise EmulatorError(
            "compiled: its PTX was not kept; compile with ptx_emulator.compile_cute, or with the options "
            "--keep-ptx and --dump-dir FOLDER of cute.compile (the folder must exist)"
        )
    return str(text)


@dataclasses.dataclass(frozen=True)
class CuteFiles:
    """A compiled CuTe DSL function that was kept in files, in place of what `cute.compile` returned.

    Args:
        object_file: what `export_to_c(object_file, function_name=function)` wrote; compiled with
            `--enable-tvm-ffi`.
        function: the function's name there.
        ptx: the text of its PTX.
        parameters: names of its parameters, but for a stream that it takes from the environment.
    """

    object_file: Path
    function: str
    ptx: str
    parameters: Sequence[str]

    @property
    def signature(self) -> inspect.Signature:
        """The parameters that it takes at run time."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.parameters])


def emulate(
    compiled: Any,
    device: str = "sm_100a",
    *,
    options: Options | None = None,
    ptx: str | None = None,
    uninitialised: Sequence[str] = (),
    read_only: Sequence[str] = (),
) -> Emulated:
    """A compiled CuTe DSL function as a callable that takes CPU tensors and runs on the emulator.

    Args:
        compiled: what `cute.compile` returned, with `--enable-tvm-ffi`; `compile_cute` sets all options. Or
            the files that it was kept in.
        device: the architecture it was compiled for.
        options: how to run it.
        ptx: its PTX, if it was compiled without keeping it.
        uninitialised: parameters whose content counts as never written: outputs and workspaces.
        read_only: parameters that the kernels may not write.

    Raises:
        EmulatorError: a function without TVM-FFI or without PTX, or an unknown device.
    """
    return Emulated(compiled, device, options or Options(), ptx, uninitialised, read_only)


class Emulated:
    """A compiled function on the emulator.

    `result` is that of the last call, `launches` what it launched; `module` holds the kernels.
    """

    def __init__(
        self,
        compiled: Any,
        device: str,
        options: Options,
        ptx: str | None,
        uninitialised: Sequence[str],
        read_only: Sequence[str],
    ) -> None:
        if not isinstance(compiled, CuteFiles) and "TVMFFI" not in type(compiled).__name__:
            raise EmulatorError(
                "compiled: was compiled without --enable-tvm-ffi; use ptx_emulator.compile_cute"
            )
        self.ptx = ptx or (compiled.ptx if isinstance(compiled, CuteFiles) else ptx_of(compiled))
        self.device = device
        self.options = options
        self.result: Result | None = None
        self.launches: list[CapturedLaunch] = []
        self._uninitialised, self._read_only = uninitialised, read_only
        self.module = LoadedModule(self.ptx, device)
        target = find_target(device)
        if isinstance(compiled, CuteFiles):
            self._execution_args: Any = None
            self._signature = compiled.signature
            self._host = HostFunction(compiled.object_file, compiled.function, target)
            return
        self._execution_args = compiled.execution_args
        self._signature = _signature(compiled)
        with tempfile.TemporaryDirectory() as folder:
            object_file = Path(folder, f"{_EXPORTED}.o")
            compiled.export_to_c(str(object_file), function_name=_EXPORTED)
            self._host = HostFunction(object_file, _EXPORTED, target)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Runs the function on CPU tensors, in place.

        Raises:
            EmulationError: findings, if the options are strict.
        """
        self.call(*args, **kwargs).run(self.options)

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """The function with its arguments, to be run under several options."""
        return Call(self, self._bind(args, kwargs))

    def run(
        self, arguments: Mapping[str, Any], options: Options, module: LoadedModule | None = None
    ) -> Result:
        """Runs the function once on arguments by name, in the order of its parameters.

        Args:
            module: kernels to run in place of the function's own, such as a mutant.
        """
        machine = Machine(self.device, options)
        self.enqueue(machine, arguments, module)
        self.result = finish(machine, replace(options, strict=False))
        if options.strict:
            self.result.raise_reports()
        return self.result

    def enqueue(
        self, machine: Machine, arguments: Mapping[str, Any], module: LoadedModule | None = None
    ) -> None:
        """Runs the host code, which appends its launches to the stream of a machine; see `run`."""
        kernels = module or self.module
        machine.attach(kernels)
        give(machine, self.memories(arguments))
        self.launches = []
        self._host(
            lambda launch: self._enqueue(machine, kernels, launch), *map(_on_device, arguments.values())
        )

    def memories(self, arguments: Mapping[str, Any]) -> list[Memory]:
        """The memory of the tensors among arguments by name."""
        arrays = dict(found for name, value in arguments.items() for found in _arrays(name, value))
        absent = [name for name, value in arguments.items() if value is None]
        return memories_of(
            arrays,
            uninitialised=[name for name in self._uninitialised if name not in absent],
            read_only=[name for name in self._read_only if name not in absent],
        )

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        execution = self._execution_args
        if getattr(execution, "has_pointer_address_arg_specs", False):
            args, kwargs = execution.convert_python_pointer_args_for_tvm_ffi(args, kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {name: arg for name, arg in bound.arguments.items() if arg is not _FROM_ENVIRONMENT}

    def _enqueue(self, machine: Machine, module: LoadedModule, launch: CapturedLaunch) -> None:
        kernel = module.kernel(launch.kernel)
        sizes = [(p.offset, p.bytes) for p in kernel.program.function.parameters]
        machine.enqueue(
            kernel,
            launch.grid,
            launch.block,
            launch.cluster,
            launch.shared_bytes,
            launch.params(sizes),
            launch.pdl,
        )
        self.launches.append(replace(launch, args=None))


@dataclasses.dataclass(frozen=True)
class Call:
    """A compiled function with its arguments: a job, which can be run again."""

    function: Emulated
    arguments: Mapping[str, Any]

    @property
    def arch(self) -> str:
        """The architecture that the function was compiled for."""
        return self.function.device

    def enqueue(self, machine: Machine) -> None:
        """Appends what the call launches to the stream of a machine."""
        self.function.enqueue(machine, self.arguments)

    def memories(self) -> list[Memory]:
        """The memory of the tensors among the arguments."""
        return self.function.memories(self.arguments)

    def run(self, options: Options | None = None, module: LoadedModule | None = None) -> Result:
        """Runs the call once, in place; see `Emulated.run`.

        Raises:
            EmulationError: findings, if the options are strict.
        """
        return self.function.run(self.arguments, options or self.function.options, module)


class _OnDevice:
    """A CPU tensor whose DLPack form says that it is on a CUDA device, at the same address."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DL_CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device_type = pointer(capsule, b"dltensor") + _DLTENSOR_DEVICE_TYPE
        ctypes.c_int32.from_address(device_type).value = _DL_CUDA
        return capsule


def _on_device(value: Any) -> Any:
    """An argument for the TVM-FFI function: tensors, also inside containers, as tensors on a CUDA device."""
    import tvm_ffi

    if is_array(value):
        return tvm_ffi.from_dlpack(_OnDevice(value.detach() if hasattr(value, "detach") else value))
    if isinstance(value, (tuple, list)):
        return tuple(map(_on_device, value))
    if isinstance(value, Mapping):
        return {key: _on_device(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(_on_device(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of an argument, also inside containers, with names such as `params.weight`."""
    if is_array(value):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from _arrays(f"{name}[{index}]", inner)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _arrays(f"{name}.{key}", inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _arrays(f"{name}.{field.name}", getattr(value, field.name))


def _signature(compiled: Any) -> inspect.Signature:
    """The parameters that a compiled function takes at run time.

    Without a wrapper (the DSL makes none for an architecture other than the one it runs for) it is not known
    whether a stream is passed or taken from the environment: it may then be left out.
    """
    execution = compiled.execution_args
    original = execution.original_signature.parameters
    wrapper = getattr(compiled, "_kwargs_wrapper", None)
    if wrapper is not None:
        names = list(inspect.signature(wrapper).parameters)
    else:
        names = execution.get_kwargs_wrapper_spec().arg_names
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for index, name in enumerate(names):
        default = original[name].default
        is_stream = "stream" in f"{name} {original[name].annotation}".lower()
        defaults_follow = all(original[n].default is not inspect.Parameter.empty for n in names[index + 1 :])
        if wrapper is None and is_stream and defaults_follow:
            default = _FROM_ENVIRONMENT
        parameters.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(parameters)
