"""Basic blocks of a lowered kernel, and where the lanes of a branch meet again."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from ptx_emulator.lower.context import Op, Target
from ptx_emulator.lower.control import MEETS

NEVER = 0xFFFFFFFF  # the lanes of a branch do not meet before they exit
_ENDS_BLOCK = ("branch", "branch.indexed", "exit", "trap", "assertfail")
_LEAVES = ("exit", "trap", "assertfail")


@dataclass
class Block:
    """Operations `start` to `end - 1`; control enters at the first and leaves at the last."""

    start: int
    end: int
    successors: list[int] = field(default_factory=list)  # blocks


def resolve_targets(ops: list[Op], labels: dict[str, int]) -> None:
    """Replaces labels by indices of operations."""
    for op in ops:
        if op.name in ("branch", "branch.indexed"):
            op.args = [labels[a.label] if isinstance(a, Target) else a for a in op.args]


def branch_targets(op: Op) -> list[int]:
    """Indices of the operations a branch may go to, besides the one that follows it."""
    if op.name == "branch":
        return [a for a in op.args[:1] if isinstance(a, int)]
    if op.name == "branch.indexed":
        return [a for a in op.args[2:] if isinstance(a, int)]
    return []


def blocks_of(ops: list[Op]) -> list[Block]:
    """The basic blocks, in order."""
    starts = {0}
    for index, op in enumerate(ops):
        if op.name in _ENDS_BLOCK:
            starts.update((index + 1, *branch_targets(op)))
    bounds = [*sorted(s for s in starts if s < len(ops)), len(ops)]
    blocks = [Block(start, end) for start, end in pairwise(bounds)]
    number = {block.start: n for n, block in enumerate(blocks)}
    for block in blocks:
        last = ops[block.end - 1]
        successors = [number[t] for t in branch_targets(last)]
        always_leaves = last.name in _LEAVES or last.name in ("branch", "branch.indexed")
        if (not always_leaves or last.guard is not None) and block.end in number:
            successors.append(number[block.end])
        block.successors = list(dict.fromkeys(successors))
    return blocks


def fill_meeting_points(ops: list[Op], blocks: list[Block]) -> None:
    """Gives every branch the index of its immediate post-dominator, `NEVER` if that is the exit."""
    parents = _post_dominators(blocks)
    for n, block in enumerate(blocks):
        last = ops[block.end - 1]
        if last.name in ("branch", "branch.indexed"):
            meets = parents[n]
            start = blocks[meets].start if meets is not None and meets < len(blocks) else NEVER
            last.args = [start if a == MEETS and k == 1 else a for k, a in enumerate(last.args)]


def _post_dominators(blocks: list[Block]) -> list[int | None]:
    """Immediate post-dominators, by block.

    Cooper, Harvey, Kennedy: "A Simple, Fast Dominance Algorithm", on the reversed graph. The exit is block
    `len(blocks)`; None for blocks from which no exit is reached.
    """
    leave = len(blocks)
    successors = [block.successors or [leave] for block in blocks]
    predecessors: list[list[int]] = [[] for _ in range(leave + 1)]
    for n, following in enumerate(successors):
        for s in following:
            predecessors[s].append(n)
    order = _reverse_post_order(leave, predecessors)
    position = {n: k for k, n in enumerate(order)}
    parent: list[int | None] = [None] * (leave + 1)
    parent[leave] = leave
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            known = [s for s in successors[n] if parent[s] is not None]
            best = known[0]
            for other in known[1:]:
                best = _meet(best, other, parent, position)
            if parent[n] != best:
                parent[n] = best
                changed = True
    return parent[:leave]


def _reverse_post_order(root: int, following: list[list[int]]) -> list[int]:
    seen, order = {root}, []
    stack = [(root, iter(following[root]))]
    while stack:
        node, children = stack[-1]
        child = next((c for c in children if c not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(following[child])))
    return order[::-1]


def _meet(a: int, b: int, parent: list[int | None], position: dict[int, int]) -> int:
    while a != b:
        if position[a] > position[b]:
            up = parent[a]
            assert up is not None
            a = up
        else:
            up = parent[b]
            assert up is not None
            b = up
    return a
