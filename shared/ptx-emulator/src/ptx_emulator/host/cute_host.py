"""The host code of a compiled CuTe DSL function, linked to a stand-in for CUDA, and the launches it makes.

`export_to_c` gives an object file whose undefined symbols are the DSL's runtime and a few CUDA calls;
`cuda_stub.cpp` defines them. What is left comes from TVM-FFI, through which the function is called.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ptx_emulator.build import cache_folder, compiler, run_compiler
from ptx_emulator.errors import EmulatorError
from ptx_emulator.targets import Target

ATTRIBUTE_BYTES = 72  # of a cudaLaunchAttribute: id, four bytes of padding, value
ATTRIBUTE_CLUSTER, ATTRIBUTE_PDL = 4, 6
_ATTRIBUTE_IGNORED = 0
_ATTRIBUTE_COOPERATIVE = 2
_STUB = Path(__file__).with_name("cuda_stub.cpp")


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint32),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Config), ctypes.POINTER(ctypes.c_void_p)
)


class _Device(ctypes.Structure):
    _fields_ = [
        ("launch", _Callback),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("num_sms", ctypes.c_int32),
        ("max_shared_bytes", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class CapturedLaunch:
    """A launch that host code made; `args` are the addresses of the arguments, valid until it returns."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    pdl: bool
    cooperative: bool
    args: Any

    def params(self, sizes: Sequence[tuple[int, int]]) -> bytes:
        """The parameter block, from (offset, bytes) of each parameter of the kernel."""
        end = max((offset + num_bytes for offset, num_bytes in sizes), default=0)
        block = bytearray(end)
        for index, (offset, num_bytes) in enumerate(sizes):
            block[offset : offset + num_bytes] = ctypes.string_at(self.args[index], num_bytes)
        return bytes(block)


class HostFunction:
    """The host side of a compiled function, as a TVM-FFI function that hands its launches to a callback."""

    def __init__(self, object_file: Path, name: str, target: Target) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, f"{name}.so")
            parts = [str(object_file), str(_stub_object()), _tvm_ffi_library()]
            run_compiler("-shared", "-Wl,-Bsymbolic,-z,defs", *parts, "-o", str(library))
            self._library = ctypes.CDLL(str(library))
        self._callback = _Callback(self._launched)
        self._receive: Callable[[CapturedLaunch], None] | None = None
        self._error: BaseException | None = None
        device = _Device(
            self._callback, target.sm // 10, target.sm % 10, target.num_sms, target.max_shared_bytes
        )
        self._library.ptxe_host_device(ctypes.byref(device))
        self._function = self._tvm_ffi_function(name)

    def __call__(self, receive: Callable[[CapturedLaunch], None], *args: Any) -> Any:
        """Runs the host code; every launch it makes goes to `receive`, whose exceptions come out here."""
        self._receive, self._error = receive, None
        try:
            return self._function(*args)
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._receive = None

    def _tvm_ffi_function(self, name: str) -> Any:
        import tvm_ffi

        symbol = getattr(self._library, f"__tvm_ffi_{name}")
        address = ctypes.cast(symbol, ctypes.c_void_p).value
        return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=self)

    def _launched(self, kernel: bytes, config: Any, args: Any) -> int:
        """Called by the host code through the stub; nothing may escape into C."""
        try:
            assert self._receive is not None
            self._receive(_captured(kernel.decode(), config.contents, args))
        except BaseException as error:
            self._error = error
            return 1
        return 0


def _captured(kernel: str, config: _Config, args: Any) -> CapturedLaunch:
    cluster, pdl, cooperative = (1, 1, 1), False, False
    for index in range(config.num_attributes):
        attribute = config.attributes + index * ATTRIBUTE_BYTES
        number = ctypes.c_uint32.from_address(attribute).value
        value = (ctypes.c_uint32 * 3).from_address(attribute + 8)
        if number == ATTRIBUTE_CLUSTER:
            cluster = (value[0], value[1], value[2])
        elif number == ATTRIBUTE_PDL:
            pdl = bool(value[0])
        elif number == _ATTRIBUTE_COOPERATIVE:
            cooperative = bool(value[0])
        elif number != _ATTRIBUTE_IGNORED:
            raise EmulatorError(f"{kernel}: launch attribute {number} is not supported")
    return CapturedLaunch(
        kernel=kernel,
        grid=tuple(config.grid),
        block=tuple(config.block),
        cluster=cluster,
        shared_bytes=config.dynamic_shared_bytes,
        pdl=pdl,
        cooperative=cooperative,
        args=args,
    )


@cache
def _stub_object() -> Path:
    """The compiled stand-in for CUDA, from the cache folder if it is there."""
    key = " ".join(compiler()).encode() + _STUB.read_bytes()
    target = cache_folder() / f"cuda_stub-{hashlib.sha256(key).hexdigest()[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder, target.name)
            flags = ["-std=c++17", "-O2", "-fPIC"]
            run_compiler(*flags, "-c", str(_STUB), "-o", str(partial))
            partial.replace(target)
    return target


def _tvm_ffi_library() -> str:
    import tvm_ffi.libinfo

    return str(tvm_ffi.libinfo.find_libtvm_ffi())
