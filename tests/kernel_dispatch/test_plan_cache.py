"""The plan cache: what it keeps, when it forgets, and that threads may share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_dispatch import (
    ArgumentError,
    PlanCache,
    Provider,
    clear_plans,
    registered,
    reload_providers,
    tensor_key,
)
from kernel_dispatch.tuning import invalidate_plans


def test_get_returns_what_was_put() -> None:
    plans: PlanCache[str] = PlanCache()
    key = (tensor_key(torch.zeros(2, 3)), True)
    assert plans.get(key) is None
    plans.put(key, "first")
    plans.put(key, "second")
    assert plans.get((tensor_key(torch.ones(2, 3)), True)) == "second"
    assert len(plans) == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(3, 2).T,
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3, 1),
    ],
    ids=["shape", "stride", "dtype", "device", "rank"],
)
def test_tensor_key_tells_tensors_apart(other: torch.Tensor) -> None:
    assert tensor_key(other) != tensor_key(torch.zeros(2, 3))


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
