"""Operations that may access registers of tcgen05.ld or wgmma before the instruction that waits for them.

Registers are copied, packed and unpacked before the wait in what compilers make of correct sources, so a
move is no use: what it writes waits as what it reads does. The runtime says at each use whether the wait was
executed.
"""

from __future__ import annotations

from ptx_emulator.lower.context import Op, Use, Value
from ptx_emulator.lower.flow import Block
from ptx_emulator.lower.registers import bits_set

TMEM_LOAD, MMA = "tcgen05.ld", "wgmma.mma_async"
USES = {TMEM_LOAD: "tcgen05.use", MMA: "wgmma.use"}  # no kernel has both
_WAITS = ("tcgen05.wait.ld", "wgmma.wait_group")
_MOVES = ("mov", "pack", "unpack")

InFlight = dict[Value, int]  # value -> the operations it may be a result of, a bit for each


def guard_early_uses(ops: list[Op], blocks: list[Block], operations: dict[str, int]) -> None:
    """Puts `tcgen05.use` or `wgmma.use` around the operations that may access what was not waited for."""
    wrapper = next((USES[op.name] for op in ops if op.name in USES), None)
    if wrapper is None:
        return
    for index, producers in sorted(_early_uses(ops, blocks).items()):
        numbers = list(bits_set(producers))
        op = ops[index]
        op.args = [len(numbers), operations[op.name], *numbers, *op.args]
        op.name = wrapper


def _early_uses(ops: list[Op], blocks: list[Block]) -> dict[int, int]:
    """Operation -> those whose registers it may access too early."""
    entry: list[InFlight] = [{} for _ in blocks]
    found: dict[int, int] = {}
    todo = list(reversed(range(len(blocks))))
    while todo:
        number = todo.pop()
        in_flight = dict(entry[number])
        for index in range(blocks[number].start, blocks[number].end):
            op = ops[index]
            if op.name == MMA:
                _multiply(index, op, in_flight)
            elif in_flight or op.name == TMEM_LOAD:
                early = _step(index, ops, in_flight)
                if early:
                    found[index] = found.get(index, 0) | early
        for successor in blocks[number].successors:
            if _join(entry[successor], in_flight) and successor not in todo:
                todo.append(successor)
    return found


def _multiply(index: int, op: Op, in_flight: InFlight) -> None:
    """wgmma may follow wgmma on the same accumulators, and is the last of them to end.

    Copies of what it gave the last time are no longer in flight when it is.
    """
    for value, producers in list(in_flight.items()):
        _replace(in_flight, value, producers & ~(1 << index))
    for use in op.uses():
        if use.writes:
            in_flight[use.value] = 1 << index


def _step(index: int, ops: list[Op], in_flight: InFlight) -> int:
    """The effect of one operation; the operations whose registers it accesses too early."""
    op = ops[index]
    if op.name in _WAITS and op.guard is None:
        if op.name != "wgmma.wait_group" or op.args == [0]:
            in_flight.clear()
        return 0
    uses = op.uses()
    read = overwritten = 0
    for use in uses:
        if use.reads:
            read |= in_flight.get(use.value, 0)
    moves = op.name.partition(".")[0] in _MOVES
    written = 1 << index if op.name == TMEM_LOAD else read if moves else 0
    for use in uses:
        if use.writes:
            before = in_flight.get(use.value, 0)
            overwritten |= _accumulated(use, before, ops)
            _replace(in_flight, use.value, written | (before if op.guard is not None else 0))
    return (0 if read else overwritten) if moves else read | overwritten


def _accumulated(use: Use, producers: int, ops: list[Op]) -> int:
    """Those of the operations that have a register as an accumulator, not a copy of one."""
    mine = [
        n
        for n in bits_set(producers)
        if ops[n].name == MMA and any(u.value == use.value for u in ops[n].uses())
    ]
    return sum(1 << n for n in mine)


def _replace(in_flight: InFlight, value: Value, producers: int) -> None:
    in_flight.pop(value, None)
    if producers:
        in_flight[value] = producers


def _join(into: InFlight, other: InFlight) -> bool:
    """Adds what reaches a block from another; whether that is new."""
    changed = False
    for value, producers in other.items():
        if producers & ~into.get(value, 0):
            into[value] = into.get(value, 0) | producers
            changed = True
    return changed
