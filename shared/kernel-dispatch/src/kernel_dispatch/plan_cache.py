"""A cache of plans, so that a functional call pays for validation and resolution once per kind of argument.

The operation package makes the key: a tuple of everything its plan depends on. Tensors it hands to the cache,
which compares how they look in C++. Shapes that change as requests come and go belong into the key as well,
for plans of one key are tried one after the other. What neither shows, the cache sees to itself: a plan is
dropped when the tuner has learnt something, and when providers come or go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch._C._dynamo.guards import TensorGuards

from .errors import ArgumentError
from .tuning import generation

PlanT = TypeVar("PlanT")
_Entry = tuple[int, Callable[..., bool], PlanT]  # the tuner's generation at `put`, do tensors fit, the plan
ALIKE_LIMIT = 16  # plans under one key, which are compared one after the other

_caches_lock = threading.Lock()
_caches: WeakSet[PlanCache[Any]] = WeakSet()


class PlanCache(Generic[PlanT]):
    """At most `maxsize` plans; the oldest leaves first. Safe to use from several threads.

    A plan is found by an equal key and by tensors that look like those it was put with: the same number, and
    one by one the same type, shape, strides, dtype, device, `requires_grad` and dispatch keys. Under one key
    there are at most ALIKE_LIMIT plans.

    `get` takes no lock: it is one dictionary look-up and a comparison. A plan that one thread makes while
    another is tuning may miss the tuner's news until the next change; it is valid all the same.
    """

    def __init__(self, maxsize: int = 1024) -> None:
        if maxsize < 1:
            raise ArgumentError("maxsize", f"{maxsize}, expected at least 1")
        self._maxsize = maxsize
        self._lock = threading.Lock()
        # Under the number of tensors and the key
        self._entries: dict[tuple[int, Hashable], tuple[_Entry[PlanT], ...]] = {}
        self._size = 0
        with _caches_lock:
            _caches.add(self)

    def get(self, key: Hashable, tensors: Sequence[torch.Tensor] = ()) -> PlanT | None:
        """The plan put under `key` with such `tensors`, or None: never put, or out of date."""
        for made_at, fits, plan in self._entries.get((len(tensors), key), ()):
            if made_at == generation() and fits(*tensors):
                return plan
        return None

    def put(self, key: Hashable, plan: PlanT, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Keeps `plan` under `key` for such `tensors`, in place of any earlier plan for them."""
        entry = (generation(), _same_looks(tensors), plan)
        place = (len(tensors), key)
        with self._lock:
            alike = self._entries.pop(place, ())
            others = [other for other in alike if other[0] == generation() and not other[1](*tensors)]
            self._entries[place] = (*others[1 - ALIKE_LIMIT :], entry)
            self._size += len(self._entries[place]) - len(alike)
            while self._size > self._maxsize:
                self._drop_one()

    def _drop_one(self) -> None:
        """Drops the oldest plan under the key that was put to longest ago."""
        oldest = next(iter(self._entries))
        rest = self._entries[oldest][1:]
        if rest:
            self._entries[oldest] = rest
        else:
            del self._entries[oldest]
        self._size -= 1

    def clear(self) -> None:
        """Drops every plan."""
        with self._lock:
            self._entries.clear()
            self._size = 0

    def __len__(self) -> int:
        return self._size


def _same_looks(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function that says whether its arguments, as many, look like `tensors`; it keeps no tensor alive."""
    if not tensors:
        return lambda: True
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check


def clear_plans() -> None:
    """Drops the plans of every PlanCache in the process."""
    with _caches_lock:
        caches = list(_caches)
    for plans in caches:
        plans.clear()
