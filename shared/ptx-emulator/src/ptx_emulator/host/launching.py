"""Launches of kernels given as PTX."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ptx_emulator.errors import EmulatorError
from ptx_emulator.host.arrays import Memory, disjoint, is_array, memories_of, memory_of
from ptx_emulator.host.job import finish, give
from ptx_emulator.machine import Kernel, LoadedModule, Machine, Result
from ptx_emulator.options import Options
from ptx_emulator.ptx.module import Parameter
from ptx_emulator.tensor_map import TensorMap

Size = int | tuple[int, ...]
_FLOATS = {2: "<e", 4: "<f", 8: "<d"}  # by bytes


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        ptx: the module's text, or the path of a file as a `Path`.
        kernel: name of the kernel, as in the PTX or as in C++ (`gemm::kernel`, `kernel`); None if the module
            has only one.
        grid, block, cluster: sizes, `x` or `(x, y, z)` with missing ones 1.
        shared_bytes: dynamic shared memory.
        args: in the order of the kernel's parameters: tensors and arrays (their address is passed), integers,
            floats, NumPy scalars, tensor maps, or the bytes of a parameter such as a struct. An integer for a
            floating-point parameter is converted; a float for an integer parameter is an error. NumPy arrays
            start at multiples of 16 bytes, GPU memory at multiples of 256; `aligned` makes such copies.
        names: of the arrays in `args`, for reports; `arg0`, `arg1`, … without.
        pdl: whether it may start before its predecessor has completed (programmatic stream serialization).
        device: architecture; the module's `.target` without.
        uninitialised: names of arrays whose content counts as never written.
        read_only: names of arrays that the kernel may not write.
        memory: more arrays that the kernel reaches by pointers inside structs or tensor maps, by name.
    """

    ptx: str | Path
    kernel: str | None = None
    grid: Size = 1
    block: Size = 32
    cluster: Size = 1
    shared_bytes: int = 0
    args: Sequence[Any] = ()
    names: Sequence[str] = ()
    pdl: bool = False
    device: str | None = None
    uninitialised: Sequence[str] = ()
    read_only: Sequence[str] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    _loaded: list[LoadedModule] = field(default_factory=list, init=False, repr=False, compare=False)

    def module(self) -> LoadedModule:
        """The parsed module; its kernels are lowered once."""
        if not self._loaded:
            text = self.ptx.read_text(encoding="utf-8") if isinstance(self.ptx, Path) else self.ptx
            self._loaded.append(LoadedModule(text, self.device))
        return self._loaded[0]

    @property
    def arch(self) -> str:
        """The architecture it runs on."""
        return self.device or self.module().arch

    def memories(self) -> list[Memory]:
        """The memory of the arrays among the arguments."""
        if self.names and len(self.names) != len(self.args):
            raise ValueError(f"names: {len(self.names)} for {len(self.args)} arguments")
        names = self.names or [f"arg{index}" for index in range(len(self.args))]
        arrays: dict[str, Any] = {}
        given = [(name, arg) for name, arg in zip(names, self.args, strict=True) if is_array(arg)]
        for name, array in (*given, *self.memory.items()):
            if name in arrays:
                raise ValueError(f"names: {name!r} is the name of two arrays")
            arrays[name] = array
        return memories_of(arrays, uninitialised=self.uninitialised, read_only=self.read_only)

    def enqueue(self, machine: Machine, module: LoadedModule | None = None) -> None:
        """Appends the launch to the stream of a machine; see `run`."""
        module = module or self.module()
        machine.attach(module)
        give(machine, self.memories())
        kernel = module.kernel(self.kernel)
        machine.enqueue(
            kernel,
            size3("grid", self.grid),
            size3("block", self.block),
            size3("cluster", self.cluster),
            self.shared_bytes,
            pack(kernel, self.args),
            self.pdl,
        )

    def run(self, options: Options | None = None, module: LoadedModule | None = None) -> Result:
        """Runs the launch once, in place.

        Args:
            module: kernels to run in place of the PTX's own, such as a mutant.

        Raises:
            EmulationError: findings, if the options are strict.
        """
        chosen = options or Options()
        machine = Machine(self.arch, chosen)
        self.enqueue(machine, module)
        return finish(machine, chosen)


class Queued(Protocol):
    """What can be a part of `Launches`: a `Launch`, or a compiled function with its arguments."""

    @property
    def arch(self) -> str:
        """The architecture."""
        ...

    def memories(self) -> list[Memory]:
        """The memory that it may touch."""
        ...

    def enqueue(self, machine: Machine) -> None:
        """Appends it to the stream of a machine."""
        ...


@dataclass(frozen=True)
class Launches:
    """Launches and calls of compiled functions in one stream, in order; all for one architecture."""

    launches: Sequence[Queued]

    def memories(self) -> list[Memory]:
        """The memory that the launches may touch."""
        return disjoint(memory for launch in self.launches for memory in launch.memories())

    def run(self, options: Options | None = None) -> Result:
        """Runs the launches once, in place."""
        chosen = options or Options()
        archs = {launch.arch for launch in self.launches}
        if len(archs) != 1:
            raise ValueError(f"launches: are for {sorted(archs)}, one architecture is needed")
        machine = Machine(archs.pop(), chosen)
        for launch in self.launches:
            launch.enqueue(machine)
        return finish(machine, chosen)


def launch(
    ptx: str | Path,
    kernel: str | None = None,
    *,
    grid: Size = 1,
    block: Size = 32,
    cluster: Size = 1,
    shared_bytes: int = 0,
    args: Sequence[Any] = (),
    names: Sequence[str] = (),
    pdl: bool = False,
    device: str | None = None,
    uninitialised: Sequence[str] = (),
    read_only: Sequence[str] = (),
    memory: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Result:
    """Runs one kernel on arrays, which it changes in place; see `Launch` for the arguments.

    Raises:
        EmulationError: findings, unless `options.strict` is off.
        EmulatorError: what the emulator cannot run.
    """
    described = Launch(
        ptx=ptx,
        kernel=kernel,
        grid=grid,
        block=block,
        cluster=cluster,
        shared_bytes=shared_bytes,
        args=args,
        names=names,
        pdl=pdl,
        device=device,
        uninitialised=uninitialised,
        read_only=read_only,
        memory=memory or {},
    )
    return described.run(options)


def size3(name: str, size: Size) -> tuple[int, int, int]:
    """A grid, block or cluster size in three dimensions."""
    given = size if isinstance(size, Iterable) and not isinstance(size, str) else (size,)
    try:
        sizes = tuple(map(operator.index, given))
    except TypeError:
        raise TypeError(f"{name}: {size!r}, expected an integer or up to three of them") from None
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: {size} has {len(sizes)} dimensions, a launch has one to three")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def pack(kernel: Kernel, args: Sequence[Any]) -> bytes:
    """The parameter block of a launch.

    Raises:
        EmulatorError: the number or the size of the arguments is not that of the kernel's parameters.
    """
    function = kernel.program.function
    parameters = function.parameters
    if len(args) != len(parameters):
        raise EmulatorError(f"args: {len(args)} given, {function.name} takes {len(parameters)}")
    block = bytearray(kernel.program.parameter_bytes)
    for parameter, arg in zip(parameters, args, strict=True):
        data = _encode(parameter, arg)
        if len(data) != parameter.bytes:
            raise EmulatorError(f"args: {parameter.name} has {parameter.bytes} bytes, not {len(data)}")
        block[parameter.offset : parameter.offset + parameter.bytes] = data
    return bytes(block)


def _encode(parameter: Parameter, arg: Any) -> bytes:
    """The bytes of an argument; their number may be wrong."""
    name = parameter.name
    if is_array(arg):
        if parameter.type not in ("u64", "s64", "b64"):
            raise EmulatorError(f"args: {name} is a .{parameter.type}, it cannot be the address of an array")
        return memory_of(name, arg).address.to_bytes(8, "little")
    if isinstance(arg, (bytes, bytearray, memoryview)):
        return bytes(arg)
    if isinstance(arg, TensorMap):
        return arg.encode()
    if arg is None:
        return bytes(parameter.bytes)
    if isinstance(arg, (bool, int, float, np.number, np.bool_)):
        return _encode_number(parameter, arg)
    raise EmulatorError(f"args: {name} cannot be a {type(arg).__name__}")


def _encode_number(parameter: Parameter, arg: Any) -> bytes:
    """A number as the type of the parameter has it; where that is `.b32`, as the number has it."""
    name, kind = parameter.name, parameter.type[:1]
    is_float = isinstance(arg, (float, np.floating))
    if is_float and kind in "us":
        raise EmulatorError(f"args: {name} is a .{parameter.type}, it cannot be {arg!r}")
    if isinstance(arg, np.generic) and (is_float or kind != "f"):
        return arg.tobytes()
    if is_float or kind == "f":
        if parameter.bytes not in _FLOATS:
            raise EmulatorError(f"args: {name} has {parameter.bytes} bytes, it cannot be {arg!r}")
        try:
            return struct.pack(_FLOATS[parameter.bytes], arg)
        except OverflowError:
            raise EmulatorError(f"args: {arg!r} does not fit {name}, a .{parameter.type}") from None
    try:
        return int(arg).to_bytes(parameter.bytes, "little", signed=arg < 0)
    except OverflowError:
        raise EmulatorError(f"args: {arg} does not fit {name}, which has {parameter.bytes} bytes") from None
