"""Slots of the register file: values that are never live together share one.

Only values of the same width share, so that a lane's part of a slot is the same bytes for all of them: lanes
that diverged keep their values while others write theirs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from ptx_emulator.lower.context import Op, Value
from ptx_emulator.lower.flow import Block

LANES = 32
_PREDICATE_BYTES = 4
_ALIGNMENT = 64


def slot_bytes(bits: int) -> int:
    """Size of a slot: one word of lane bits for a predicate, else 32 values side by side."""
    return _PREDICATE_BYTES if bits == 1 else LANES * bits // 8


@dataclass
class Allocation:
    """Byte offset of each value's slot, and the size of the register file."""

    slots: dict[Value, int]
    register_bytes: int


def allocate(ops: list[Op], blocks: list[Block], fixed: list[Value]) -> Allocation:
    """Assigns slots by linear scan over live intervals; `fixed` values keep theirs to the end."""
    intervals = _intervals(ops, blocks, set(fixed))
    place: dict[Value, tuple[int, int]] = {}  # value -> (width, index within the slots of the width)
    used: dict[int, int] = {}
    for value in fixed:
        place[value] = (value.bits, used.get(value.bits, 0))
        used[value.bits] = used.get(value.bits, 0) + 1
    free: dict[int, list[int]] = {}
    active: list[tuple[int, int, int]] = []  # (end, width, index)
    for value, (start, end) in sorted(intervals.items(), key=lambda item: item[1]):
        while active and active[0][0] < start:
            _, bits, index = heapq.heappop(active)
            heapq.heappush(free.setdefault(bits, []), index)
        available = free.get(value.bits)
        if available:
            index = heapq.heappop(available)
        else:
            index = used.get(value.bits, 0)
            used[value.bits] = index + 1
        place[value] = (value.bits, index)
        heapq.heappush(active, (end, value.bits, index))
    base, at = {}, 0
    for bits in sorted(used):
        base[bits] = at
        at += -(-used[bits] * slot_bytes(bits) // _ALIGNMENT) * _ALIGNMENT
    slots = {value: base[bits] + index * slot_bytes(bits) for value, (bits, index) in place.items()}
    return Allocation(slots, at)


def _intervals(ops: list[Op], blocks: list[Block], fixed: set[Value]) -> dict[Value, tuple[int, int]]:
    """First and last operation at which each value is live; a guarded write keeps what was there before."""
    numbers: dict[Value, int] = {}
    values: list[Value] = []
    first: list[int] = []
    last: list[int] = []
    reads_first, writes = [0] * len(blocks), [0] * len(blocks)
    for b, block in enumerate(blocks):
        exposed = written = 0
        for index in range(block.start, block.end):
            op = ops[index]
            defined = 0
            for use in op.uses():
                if use.value in fixed:
                    continue
                n = numbers.setdefault(use.value, len(values))
                if n == len(values):
                    values.append(use.value)
                    first.append(index)
                    last.append(index)
                last[n] = index  # blocks are in order
                bit = 1 << n
                if use.reads and not written & bit:
                    exposed |= bit
                if use.writes:
                    if op.guard is not None and not written & bit:
                        exposed |= bit
                    defined |= bit
            written |= defined
        reads_first[b], writes[b] = exposed, written
    live_in = _liveness(blocks, reads_first, writes)
    _extend(live_in, blocks, first, last)
    return {value: (first[n], last[n]) for n, value in enumerate(values)}


def _liveness(blocks: list[Block], reads_first: list[int], writes: list[int]) -> list[int]:
    live_in = list(reads_first)
    changed = True
    while changed:
        changed = False
        for b in range(len(blocks) - 1, -1, -1):
            out = 0
            for s in blocks[b].successors:
                out |= live_in[s]
            new = reads_first[b] | (out & ~writes[b])
            if new != live_in[b]:
                live_in[b] = new
                changed = True
    return live_in


def _extend(live_in: list[int], blocks: list[Block], first: list[int], last: list[int]) -> None:
    """Makes intervals reach from the first block that a value enters to the last that it leaves."""
    seen = 0
    for b, block in enumerate(blocks):
        for n in bits_set(live_in[b] & ~seen):
            first[n] = min(first[n], block.start)
        seen |= live_in[b]
    seen = 0
    for block in reversed(blocks):
        live_out = 0
        for s in block.successors:
            live_out |= live_in[s]
        for n in bits_set(live_out & ~seen):
            last[n] = max(last[n], block.end - 1)
        seen |= live_out


def bits_set(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
