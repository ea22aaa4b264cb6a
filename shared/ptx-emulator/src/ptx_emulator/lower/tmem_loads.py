"""Operations that may read registers of tcgen05.ld before tcgen05.wait::ld.

Registers are copied, packed and unpacked before the wait in what compilers make of correct sources, so a
move is no use: what it writes waits as what it reads does. The runtime says at each use whether the wait was
executed.
"""

from __future__ import annotations

from ptx_emulator.lower.context import Op, Value
from ptx_emulator.lower.flow import Block
from ptx_emulator.lower.registers import bits_set

LOAD, WAIT, USE = "tcgen05.ld", "tcgen05.wait.ld", "tcgen05.use"
_MOVES = ("mov", "pack", "unpack")

Loaded = dict[Value, int]  # value -> the loads it may hold the result of, a bit for each operation


def guard_early_uses(ops: list[Op], blocks: list[Block], operations: dict[str, int]) -> None:
    """Puts `tcgen05.use` around the operations that may read what has not been waited for."""
    if not any(op.name == LOAD for op in ops):
        return
    for index, loads in sorted(_early_uses(ops, blocks).items()):
        numbers = list(bits_set(loads))
        op = ops[index]
        op.args = [len(numbers), operations[op.name], *numbers, *op.args]
        op.name = USE


def _early_uses(ops: list[Op], blocks: list[Block]) -> dict[int, int]:
    """Operation -> loads whose registers it may read too early."""
    entry: list[Loaded] = [{} for _ in blocks]
    found: dict[int, int] = {}
    todo = list(reversed(range(len(blocks))))
    while todo:
        number = todo.pop()
        loaded = dict(entry[number])
        for index in range(blocks[number].start, blocks[number].end):
            early = _step(index, ops[index], loaded)
            if early:
                found[index] = found.get(index, 0) | early
        for successor in blocks[number].successors:
            if _join(entry[successor], loaded) and successor not in todo:
                todo.append(successor)
    return found


def _step(index: int, op: Op, loaded: Loaded) -> int:
    """The effect of one operation; the loads whose registers it uses."""
    if not loaded and op.name != LOAD:
        return 0
    if op.name == WAIT and op.guard is None:
        loaded.clear()
        return 0
    uses = op.uses()
    read = 0
    for use in uses:
        if use.reads:
            read |= loaded.get(use.value, 0)
    moves = op.name.partition(".")[0] in _MOVES
    written = 1 << index if op.name == LOAD else read if moves else 0
    for use in uses:
        if use.writes:
            kept = loaded.get(use.value, 0) if op.guard is not None else 0
            loaded.pop(use.value, None)
            if written | kept:
                loaded[use.value] = written | kept
    return 0 if moves else read


def _join(into: Loaded, other: Loaded) -> bool:
    """Adds what reaches a block from another; whether that is new."""
    changed = False
    for value, loads in other.items():
        if loads & ~into.get(value, 0):
            into[value] = into.get(value, 0) | loads
            changed = True
    return changed
