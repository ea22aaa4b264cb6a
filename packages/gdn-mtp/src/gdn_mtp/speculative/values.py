"""Checks of values: on the CPU always, on a GPU in debug mode outside graph capture, since they wait."""

from kernel_dispatch import ArgumentError, check_index_range
from torch import Tensor


def named_slots(name: str, indices: Tensor, pool_size: int) -> list[tuple[int, int]]:
    """(position, slot) of every index that is not negative; raises for one out of range, or named twice."""
    check_index_range(name, indices, pool_size)
    position_of: dict[int, int] = {}
    for position, slot in enumerate(indices.tolist()):
        if slot in position_of:
            first = position_of[slot]
            raise ArgumentError(name, f"slot {slot} is named at {first} and at {position}, expected it once")
        if slot >= 0:
            position_of[slot] = position
    return [(position, slot) for slot, position in position_of.items()]


def cursor_fault(
    slot: int, cursor: list[int], live: int, capacity: int, max_tokens: int
) -> tuple[str, str] | None:
    """Which tensor of a cache, "cursor" or "live", holds what cannot have come about in a slot, and what."""
    start, length, window, arrivals = cursor
    for field, value, largest in (
        ("start", start, capacity - 1),
        ("length", length, capacity - 2 * max_tokens),
        ("window", window, max_tokens),
        ("arrivals", arrivals, 0),
    ):
        if not 0 <= value <= largest:
            return "cursor", f"slot {slot}: cursor {field} = {value}, expected 0 to {largest}"
    if live < 0 or live >> length:
        return "live", f"slot {slot}: live = {live:#x}, expected bits below {length}"
    return None


def check_accepted(
    slots: list[tuple[int, int]],
    windows: list[int],
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
) -> None:
    """Raises where more is accepted than was verified; windows[i] belongs to the request of slots[i]."""
    counts = None if num_accepted is None else num_accepted.tolist()
    nodes = None if accepted_nodes is None else accepted_nodes.tolist()
    for (request, slot), window in zip(slots, windows, strict=True):
        verified = f"the last verify of slot {slot} had {window} tokens"
        if counts is not None and not 0 <= counts[request] <= window:
            raise ArgumentError("num_accepted", f"{counts[request]} at [{request}], {verified}")
        if nodes is None:
            continue
        last = -1
        for position, node in enumerate(nodes[request]):
            if node < 0:
                continue
            where = f"{node} at [{request}, {position}]"
            if node >= window:
                raise ArgumentError("accepted_nodes", f"{where}, {verified}")
            if node <= last:
                raise ArgumentError("accepted_nodes", f"{where} after {last}, expected a path from a root")
            last = node


def check_window(
    slots: list[tuple[int, int]], num_tokens: Tensor | None, parents: Tensor | None, T: int
) -> None:
    """Raises where a request has more tokens than there are, or a token a parent that is not before it."""
    counts = None if num_tokens is None else num_tokens.tolist()
    rows = None if parents is None else parents.tolist()
    for request, _ in slots:
        tokens = T if counts is None else counts[request]
        if not 0 <= tokens <= T:
            raise ArgumentError("num_tokens", f"{tokens} at [{request}], expected 0 to T = {T}")
        for node in range(tokens if rows is not None else 0):
            assert rows is not None
            parent = rows[request][node]
            if not -1 <= parent < node:
                expected = "-1" if node == 0 else f"-1 to {node - 1}"
                raise ArgumentError("parent_indices", f"{parent} at [{request}, {node}], expected {expected}")
