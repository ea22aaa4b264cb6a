"""The emulated GPU: loads PTX, takes launches, runs them."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ptx_emulator.build import build
from ptx_emulator.counts import COUNT_NAMES, LaunchCounts
from ptx_emulator.errors import EmulatorError
from ptx_emulator.launch_registers import fits, launch_registers
from ptx_emulator.options import ASYNC_POLICIES, WARP_POLICIES, Options
from ptx_emulator.program import Program, lower
from ptx_emulator.ptx.module import Module
from ptx_emulator.ptx.names import matching
from ptx_emulator.ptx.parser import parse
from ptx_emulator.reports import EmulationError, Report, reports_from_json
from ptx_emulator.targets import check_runs_on
from ptx_emulator.targets import target as find_target
from ptx_emulator.timeline import Row, notable_mask, rows_from_json

READ_ONLY, UNINITIALISED, CONSTANT = 1, 2, 4  # MemoryMap flags of runtime/memory.h
_GLOBAL_ALIGNMENT = 256
_SIGNAL_SECONDS = 0.2  # between looks for signals
_THREAD_SECONDS = 1.0  # until a thread that was started runs


class _Launch(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_uint32),
        ("registers_per_thread", ctypes.c_uint32),
        ("pdl", ctypes.c_uint32),
        ("num_params_bytes", ctypes.c_uint32),
        ("params", ctypes.c_char_p),
    ]


class _Special(ctypes.Structure):
    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("bits", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("number", ctypes.c_uint64),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("sm", ctypes.c_uint32),
        ("max_shared_bytes", ctypes.c_uint32),
        ("num_sms", ctypes.c_uint32),
        ("warps", ctypes.c_uint32),
        ("asyncs", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("check", ctypes.c_uint32),
        ("trace", ctypes.c_uint32),
        ("early_dependents", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    for name in ("ptxe_operations", "ptxe_error", "ptxe_findings", "ptxe_timeline"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("ptxe_program", "ptxe_machine"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


@cache
def operations() -> dict[str, int]:
    """The operations of the runtime by name, with their index."""
    names = _runtime().ptxe_operations().decode().split()
    assert len(set(names)) == len(names), "an operation is registered twice"
    return {name: index for index, name in enumerate(names)}


class Kernel:
    """A kernel in the runtime. `program` says what it was lowered to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        specials = (_Special * len(program.specials))(
            *(_Special(slot, bits, name.encode(), number) for slot, bits, name, number in program.specials)
        )
        self.handle = _runtime().ptxe_program(
            program.name.encode(),
            program.code.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(len(program.code)),
            program.args.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(len(program.args)),
            program.constants.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(len(program.constants)),
            specials,
            ctypes.c_uint64(len(program.specials)),
            ctypes.c_uint32(program.register_bytes),
            ctypes.c_uint32(program.local_bytes),
            ctypes.c_uint32(program.shared_base),
            ctypes.c_uint32(program.static_shared_bytes),
            ctypes.c_uint64(notable_mask(program.op_classes)),
        )
        if not self.handle:
            name = _runtime().ptxe_error().decode()
            raise EmulatorError(f"{program.name}: special register %{name} is not known to the emulator")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            _runtime().ptxe_free_program(ctypes.c_void_p(self.handle))


class LoadedModule:
    """A PTX module with its global variables in memory; kernels are lowered when they are first asked for."""

    def __init__(self, text: str, arch: str | None = None) -> None:
        self.module: Module = parse(text)
        self.text = text
        self.arch = arch or self.module.target
        check_runs_on(self.module.target, self.arch)
        self._kernels: dict[str, Kernel] = {}
        self.variables: dict[str, np.ndarray] = {}
        for variable in self.module.variables:
            if variable.space in ("global", "const"):
                raw = np.zeros(max(variable.bytes, 1) + _GLOBAL_ALIGNMENT, dtype=np.uint8)
                start = -raw.ctypes.data % _GLOBAL_ALIGNMENT
                memory = raw[start : start + max(variable.bytes, 1)]
                if variable.data:
                    memory[: len(variable.data)] = np.frombuffer(variable.data, dtype=np.uint8)
                self.variables[variable.name] = memory

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel of a name; see `kernel_name`.

        Raises:
            EmulatorError: there is no such kernel, or more than one to choose from.
            UnsupportedInstruction: it holds an instruction that the emulator does not know.
        """
        name = self.kernel_name(name)
        if name not in self._kernels:
            symbols = {variable: memory.ctypes.data for variable, memory in self.variables.items()}
            function = self.module.functions[name]
            base = find_target(self.arch).shared_base
            self._kernels[name] = Kernel(lower(self.module, function, symbols, operations(), base))
        return self._kernels[name]

    def kernel_name(self, name: str | None = None) -> str:
        """The name that the PTX has for a kernel.

        Args:
            name: this name, or that of a C++ function without its parameters, such as `gemm::kernel` or
                `kernel`; None for the only kernel of the module.

        Raises:
            EmulatorError: there is no such kernel, or more than one to choose from.
        """
        names = list(self.module.functions)
        found = names if name is None else matching(names, name)
        if len(found) == 1:
            return found[0]
        if name is None:
            raise EmulatorError(f"kernel: the module has {', '.join(names) or 'none'}, say which")
        if found:
            raise EmulatorError(f"kernel: {name} is ambiguous, it may be {', '.join(found)}")
        raise EmulatorError(f"kernel: the module has {', '.join(names) or 'none'}, not {name!r}")


@dataclass(frozen=True)
class _Queued:
    """A launch in the stream; `num_warps` are those of a CTA."""

    kernel: Kernel
    grid: tuple[int, int, int]
    num_warps: int


@dataclass
class Result:
    """What a run of the queue gave: findings, and per launch what was executed.

    `allowed` are the findings of kinds that the machine was told to allow; `reports` are all others.
    `timeline` is empty unless the run was traced. `seconds` is how long the kernels ran: neither compiling
    the runtime nor reading and lowering the PTX is in it.
    """

    reports: list[Report]
    counts: list[LaunchCounts]
    timeline: list[Row] = field(default_factory=list)
    allowed: list[Report] = field(default_factory=list)
    seconds: float = 0.0

    def raise_reports(self) -> None:
        """Raises EmulationError if something was found."""
        if self.reports:
            raise EmulationError(self.reports)


class Machine:
    """An emulated GPU with a stream of launches.

    Args:
        device: architecture, such as `sm_100a`.
        options: how launches are run; `strict` and `progress` are for those who run them through a `Job`.

    Raises:
        EmulatorError: an unknown device.
    """

    def __init__(self, device: str, options: Options | None = None) -> None:
        self._handle: int | None = None
        self.device = device
        self.target = find_target(device)
        self.options = options or Options()
        warps, asyncs = self.options.policies
        self._options = _Options(
            self.target.sm,
            self.target.max_shared_bytes,
            self.target.num_sms,
            WARP_POLICIES[warps],
            ASYNC_POLICIES[asyncs],
            self.options.workers or os.cpu_count() or 1,
            self.options.checks,
            self.options.trace,
            self.options.early_dependents,
            self.options.seed,
        )
        self._launches: list[_Queued] = []
        self._keep: list[Any] = []
        self._ranges: dict[int, tuple[str, int, int]] = {}  # base -> name, bytes, flags
        self._new_queue()

    def add_range(
        self, name: str, address: int, num_bytes: int, *, initialised: bool = True, read_only: bool = False
    ) -> None:
        """Makes memory accessible to kernels.

        Args:
            name: what reports call it.
            initialised: False for an output or a workspace: a read of what no kernel has written since this
                call is reported. (The same call again changes nothing.)
        """
        flags = (READ_ONLY if read_only else 0) | (0 if initialised else UNINITIALISED)
        self._keep_range(name, address, num_bytes, flags)

    def attach(self, module: LoadedModule) -> None:
        """Makes the variables of a module that is already loaded accessible here, too.

        Raises:
            EmulatorError: its PTX does not run on this device.
        """
        check_runs_on(module.module.target, self.device)
        spaces = {variable.name: variable.space for variable in module.module.variables}
        for name, memory in module.variables.items():
            flags = READ_ONLY | CONSTANT if spaces[name] == "const" else 0
            self._keep_range(name, memory.ctypes.data, len(memory), flags)
        self._keep.append(module)

    def enqueue(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int] = (1, 1, 1),
        shared_bytes: int = 0,
        params: bytes = b"",
        pdl: bool = False,
    ) -> None:
        """Appends a launch to the stream; `shared_bytes` is the dynamic shared memory.

        Raises:
            EmulatorError: sizes that the target or the kernel does not allow.
        """
        program = kernel.program
        self._check_launch(program, grid, block, cluster, shared_bytes, params)
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            (ctypes.c_uint32 * 3)(*cluster),
            shared_bytes,
            self._launch_registers(program, block),
            pdl,
            len(params),
            params,
        )
        _runtime().ptxe_enqueue(self._pointer(), ctypes.c_void_p(kernel.handle), ctypes.byref(launch))
        self._launches.append(_Queued(kernel, grid, -(-block[0] * block[1] * block[2] // 32)))

    def synchronize(self, during: AbstractContextManager[None] | None = None) -> Result:
        """Runs the launches of the stream to the end and empties it.

        Args:
            during: entered while they run, such as a progress bar.

        Raises:
            KeyboardInterrupt: the run was interrupted; what its kernels have written until then stays.
        """
        runtime = _runtime()
        with during or nullcontext():
            start = time.perf_counter()
            self._run()
            seconds = time.perf_counter() - start
        programs = [queued.kernel.program for queued in self._launches]
        locations = {program.name: program.locations for program in programs}
        findings = json.loads(runtime.ptxe_findings(self._pointer()).decode())
        reports = reports_from_json(findings, locations)
        result = Result(
            reports=[report for report in reports if report.kind not in self.options.allow],
            allowed=[report for report in reports if report.kind in self.options.allow],
            counts=list(self._counts()),
            timeline=rows_from_json(
                json.loads(runtime.ptxe_timeline(self._pointer()).decode()),
                [(program.name, program.op_classes, program.locations) for program in programs],
                [queued.grid for queued in self._launches],
            ),
            seconds=seconds,
        )
        self._new_queue()
        return result

    def progress(self) -> tuple[int, int]:
        """Clusters that have finished and all clusters of the stream; also from `during` of synchronize."""
        finished, total = ctypes.c_uint64(), ctypes.c_uint64()
        _runtime().ptxe_progress(self._pointer(), ctypes.byref(finished), ctypes.byref(total))
        return finished.value, total.value

    # ------------------------------------------------------------------ inside

    def _run(self) -> None:
        """Runs the stream in a thread of its own: Python handles no signals inside the runtime."""
        begun, finished = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            _runtime().ptxe_synchronize(self._pointer())
            finished.set()

        try:
            threading.Thread(target=work, name="ptx-emulator", daemon=True).start()
            while not finished.wait(_SIGNAL_SECONDS):
                pass  # a signal that came to another thread does not end a wait
        except BaseException:
            # A stop that comes before the runtime has begun is lost.
            while begun.wait(_THREAD_SECONDS) and not finished.wait(_SIGNAL_SECONDS):
                _runtime().ptxe_stop(self._pointer())
            self._new_queue()
            raise

    def _pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._handle)

    def _new_queue(self) -> None:
        earlier = self._handle
        self._handle = _runtime().ptxe_machine(ctypes.byref(self._options))
        self._launches = []
        for base, (name, num_bytes, flags) in self._ranges.items():
            self._add_range(name, base, num_bytes, flags)
        if earlier:
            _runtime().ptxe_inherit(self._pointer(), ctypes.c_void_p(earlier))
            _runtime().ptxe_free_machine(ctypes.c_void_p(earlier))

    def _keep_range(self, name: str, address: int, num_bytes: int, flags: int) -> None:
        if num_bytes and self._ranges.get(address) != (name, num_bytes, flags):
            self._ranges[address] = (name, num_bytes, flags)
            self._add_range(name, address, num_bytes, flags)

    def _add_range(self, name: str, base: int, num_bytes: int, flags: int) -> None:
        _runtime().ptxe_add_range(
            self._pointer(), name.encode(), ctypes.c_uint64(base), ctypes.c_uint64(num_bytes), flags
        )

    def _free(self) -> None:
        if self._handle:
            _runtime().ptxe_free_machine(self._pointer())
            self._handle = None

    def __del__(self) -> None:
        self._free()

    def _check_launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        shared_bytes: int,
        params: bytes,
    ) -> None:
        total = program.static_shared_bytes + shared_bytes
        if total > self.target.max_shared_bytes:
            raise EmulatorError(
                f"shared_bytes: {program.name} asks for {total} bytes of shared memory, "
                f"{program.static_shared_bytes} of them static; {self.target.name} has "
                f"{self.target.max_shared_bytes}"
            )
        if shared_bytes < 0:
            raise EmulatorError(f"shared_bytes: {shared_bytes} is negative")
        if min(block) < 1 or block[2] > 64:
            raise EmulatorError(f"block: {block}, every direction has at least 1 thread, z at most 64")
        if grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise EmulatorError(f"grid: {grid} has more than 2**31 - 1 CTAs in x, or 65,535 in y or z")
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= 1024:
            raise EmulatorError(f"block: {block} has {threads} threads, a CTA has 1 to 1024")
        if min(grid) < 1 or min(cluster) < 1:
            raise EmulatorError(f"grid: {grid} and cluster {cluster} need a CTA in every direction")
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise EmulatorError(f"grid: {grid} is not a multiple of the cluster {cluster}")
        num_ctas = cluster[0] * cluster[1] * cluster[2]
        if num_ctas > 16:
            raise EmulatorError(f"cluster: {cluster} has more than 16 CTAs")
        if num_ctas > 1 and self.target.sm < 90:
            raise EmulatorError(f"cluster: {cluster}, {self.target.name} has no clusters")
        for name, given, directive in (
            ("block", block, "reqntid"),
            ("cluster", cluster, "reqnctapercluster"),
        ):
            required = program.function.directives.get(directive)
            if required and given != (*required, 1, 1)[:3]:
                raise EmulatorError(f"{name}: {given}, the kernel requires {required}")
        most = program.function.directives.get("maxntid")
        if most and threads > prod(most):
            raise EmulatorError(f"block: {block} has {threads} threads, the kernel allows {prod(most)}")
        if len(params) != program.parameter_bytes:
            raise EmulatorError(
                f"params: {len(params)} bytes, {program.name} takes {program.parameter_bytes} bytes"
            )

    def _launch_registers(self, program: Program, block: tuple[int, int, int]) -> int:
        """Registers per thread if the kernel changes them and the number is known, otherwise 0."""
        if not program.sets_registers:
            return 0
        registers = launch_registers(program.function.directives, self.options.max_registers) or 0
        if not fits(registers, prod(block)):
            raise EmulatorError(
                f"block: {block} has {prod(block)} threads with {registers} registers each, more than "
                "a multiprocessor has"
            )
        return registers

    def _counts(self) -> Iterator[LaunchCounts]:
        for index, queued in enumerate(self._launches):
            kernel = queued.kernel
            executed = np.zeros((queued.num_warps, len(kernel.program.code)), dtype=np.uint64)
            counts = np.zeros((queued.num_warps, len(COUNT_NAMES)), dtype=np.uint64)
            _runtime().ptxe_counts(
                self._pointer(),
                index,
                executed.ctypes.data_as(ctypes.c_void_p),
                counts.ctypes.data_as(ctypes.c_void_p),
            )
            yield LaunchCounts(
                kernel.program.name,
                executed,
                counts,
                kernel.program.code["op_class"],
                kernel.program.op_classes,
                kernel.program.code["line"],
            )
