"""Registers and stack of a compiled kernel, read from its cubin, so that no CUDA tool has to be installed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_INFO_ENTRY = struct.Struct("<BBH")
_SYMBOL_VALUE = struct.Struct("<II")
_SIZED_VALUE = 4  # the format of entries that carry their size
_FRAME_SIZE, _MIN_STACK_SIZE, _REGISTERS = 0x11, 0x12, 0x2F


class KernelResources(NamedTuple):
    """registers: per thread. stack_bytes: per thread, what registers spill to included."""

    registers: int
    stack_bytes: int


def cubin_resources(cubin: bytes) -> KernelResources:
    """The largest figures over the functions of a cubin (a 64-bit ELF file of the CUDA compiler).

    Reads the attributes EIATTR_REGCOUNT, EIATTR_FRAME_SIZE and EIATTR_MIN_STACK_SIZE of section `.nv.info`.
    Raises ValueError where there are none.
    """
    found: dict[int, list[int]] = {_FRAME_SIZE: [], _MIN_STACK_SIZE: [], _REGISTERS: []}
    info = next((content for name, content in sections(cubin) if name == ".nv.info"), None)
    if info is None:
        raise ValueError("the cubin has no section .nv.info")
    at = 0
    while at < len(info):
        kind, attribute, size = _INFO_ENTRY.unpack_from(info, at)
        at += _INFO_ENTRY.size
        if kind != _SIZED_VALUE:
            continue
        if attribute in found:
            found[attribute].append(_SYMBOL_VALUE.unpack_from(info, at)[1])
        at += size
    if not found[_REGISTERS]:
        raise ValueError("the cubin names no function's registers")
    stack = [*found[_FRAME_SIZE], *found[_MIN_STACK_SIZE], 0]
    return KernelResources(max(found[_REGISTERS]), max(stack))


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a cubin, in their order; raises ValueError if it is none."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    offset = struct.unpack_from("<Q", cubin, 40)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    headers = [_SECTION_HEADER.unpack_from(cubin, offset + i * entry_size) for i in range(count)]
    names = cubin[headers[names_index][4] :]
    for header in headers:
        name = names[header[0] : names.index(b"\0", header[0])]
        yield name.decode(), cubin[header[4] : header[4] + header[5]]
