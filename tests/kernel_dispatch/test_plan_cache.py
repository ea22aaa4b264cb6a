"""The plan cache: what it keeps, when it forgets, and that threads may share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from weakref import ref

import pytest
import torch
from kernel_dispatch import (
    ArgumentError,
    PlanCache,
    Provider,
    clear_plans,
    registered,
    reload_providers,
)
from kernel_dispatch.plan_cache import ALIKE_LIMIT
from kernel_dispatch.tuning import invalidate_plans


def test_get_returns_what_was_put() -> None:
    plans: PlanCache[str] = PlanCache()
    assert plans.get(("key", True)) is None
    plans.put(("key", True), "first")
    plans.put(("key", True), "second")
    assert plans.get(("key", True)) == "second"
    assert len(plans) == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(3, 2).T,
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3, 1),
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.zeros(2, 3, requires_grad=True),
        None,
        3,
    ],
    ids=["shape", "stride", "dtype", "device", "rank", "type", "requires_grad", "None", "number"],
)
def test_tensors_beside_the_key_are_told_apart_by_their_looks(other: torch.Tensor) -> None:
    plans: PlanCache[str] = PlanCache()
    first = torch.zeros(2, 3)
    plans.put("key", "plan", [first, first])
    assert plans.get("key", [torch.ones(2, 3), torch.ones(2, 3)]) == "plan"
    assert plans.get("key", [first, other]) is None
    assert plans.get("key", [first]) is None
    assert plans.get("key") is None
    assert plans.get("other", [first, first]) is None


def test_plans_under_one_key_replace_each_other_only_for_equal_looks() -> None:
    plans: PlanCache[int] = PlanCache()
    tensors = [torch.zeros(size) for size in range(ALIKE_LIMIT + 1)]
    for _ in range(2):
        for size in range(ALIKE_LIMIT):
            plans.put("key", size, [tensors[size]])
    assert [plans.get("key", [tensor]) for tensor in tensors] == [*range(ALIKE_LIMIT), None]
    plans.put("key", ALIKE_LIMIT, [tensors[-1]])
    assert [plans.get("key", [tensor]) for tensor in tensors] == [None, *range(1, ALIKE_LIMIT + 1)]
    assert len(plans) == ALIKE_LIMIT


def test_the_size_counts_plans_under_one_key() -> None:
    plans: PlanCache[int] = PlanCache(maxsize=2)
    tensors = [torch.zeros(size) for size in range(3)]
    for size, tensor in enumerate(tensors):
        plans.put("key", size, [tensor])
    assert [plans.get("key", [tensor]) for tensor in tensors] == [None, 1, 2]
    assert len(plans) == 2


def test_a_plan_keeps_no_tensor_alive() -> None:
    plans: PlanCache[str] = PlanCache()
    tensor = torch.zeros(2)
    alive = ref(tensor)
    plans.put("key", "plan", [tensor])
    del tensor
    assert alive() is None


def test_oldest_plan_leaves_first() -> None:
    plans: PlanCache[int] = PlanCache(maxsize=2)
    for number in range(3):
        plans.put(number, number)
    assert [plans.get(number) for number in range(3)] == [None, 1, 2]
    plans.put(1, -1)
    plans.put(3, 3)
    assert [plans.get(number) for number in range(4)] == [None, -1, None, 3]


@pytest.mark.parametrize("maxsize", [0, -1])
def test_maxsize_must_be_positive(maxsize: int) -> None:
    with pytest.raises(ArgumentError, match=f"^maxsize: {maxsize}, expected at least 1$"):
        PlanCache(maxsize)


def test_news_of_the_tuner_make_plans_stale() -> None:
    plans: PlanCache[str] = PlanCache()
    plans.put("key", "old")
    invalidate_plans()
    assert plans.get("key") is None
    plans.put("key", "new")
    assert plans.get("key") == "new"


def test_clear_plans_reaches_every_cache() -> None:
    caches: list[PlanCache[str]] = [PlanCache(), PlanCache()]
    for plans in caches:
        plans.put("key", "plan")
    clear_plans()
    assert [len(plans) for plans in caches] == [0, 0]


def test_plans_do_not_outlive_their_providers() -> None:
    plans: PlanCache[str] = PlanCache()
    provider = Provider("mine", ("any",), lambda problem, arch: None, lambda: pytest.fail("not loaded"), 1)
    plans.put("key", "without mine")
    with registered("kernel_dispatch.test_plans", provider):
        assert plans.get("key") is None
        plans.put("key", "with mine")
    assert plans.get("key") is None
    plans.put("key", "plan")
    reload_providers()
    assert plans.get("key") is None


def test_threads_share_a_cache() -> None:
    plans: PlanCache[int] = PlanCache(maxsize=8)

    def work(seed: int) -> bool:
        for step in range(2000):
            key = (seed * 31 + step * 7) % 16
            plans.put(key, key)
            found = plans.get((key + 1) % 16)
            if found not in (None, (key + 1) % 16):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(plans) == 8
