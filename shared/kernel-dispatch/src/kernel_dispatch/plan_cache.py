"""A cache of plans, so that a functional call pays for validation and resolution once per kind of argument.

The operation package makes the key: a tuple of everything its plan depends on (`tensor_key` of each tensor,
flags). What the key cannot see, the cache does itself: a plan is dropped when the tuner has learnt something,
and when providers come or go.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

from .errors import ArgumentError
from .tuning import generation

PlanT = TypeVar("PlanT")

_caches_lock = threading.Lock()
_caches: WeakSet[PlanCache[Any]] = WeakSet()


class PlanCache(Generic[PlanT]):
    """At most `maxsize` plans by key; the plan added first leaves first. Safe to use from several threads.

    `get` takes no lock: it is one dictionary look-up and one comparison. A plan that one thread makes while
    another is tuning may miss the tuner's news until the next change; it is valid all the same.
    """

    def __init__(self, maxsize: int = 1024) -> None:
        if maxsize < 1:
            raise ArgumentError("maxsize", f"{maxsize}, expected at least 1")
        self._maxsize = maxsize
        self._lock = threading.Lock()
        self._plans: dict[Hashable, tuple[int, PlanT]] = {}  # the tuner's generation beside each plan
        with _caches_lock:
            _caches.add(self)

    def get(self, key: Hashable) -> PlanT | None:
        """The plan put under `key`, or None where there is none or the tuner has learnt something since."""
        entry = self._plans.get(key)
        if entry is None or entry[0] != generation():
            return None
        return entry[1]

    def put(self, key: Hashable, plan: PlanT) -> None:
        """Keeps `plan` under `key`, in place of any earlier plan there."""
        with self._lock:
            self._plans.pop(key, None)
            while len(self._plans) >= self._maxsize:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = (generation(), plan)

    def clear(self) -> None:
        """Drops every plan."""
        with self._lock:
            self._plans.clear()

    def __len__(self) -> int:
        return len(self._plans)


def clear_plans() -> None:
    """Drops the plans of every PlanCache in the process."""
    with _caches_lock:
        caches = list(_caches)
    for plans in caches:
        plans.clear()


def tensor_key(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Shape, strides, dtype and device: what a plan may depend on, short of the data and its address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
