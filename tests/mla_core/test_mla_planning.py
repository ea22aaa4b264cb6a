"""Split-KV planning, against its invariants over all small values."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_dispatch import ArgumentError
from mla_core import DecodeProblem, SplitPlan, num_key_tiles, plan_splits, split_key_tiles

PROBLEM = DecodeProblem(batch=1, num_heads=16, page_size=64, max_seq_len=8192)
sizes = st.integers(1, 400)


def test_splits_cover_every_key_tile_once_and_evenly() -> None:
    for tiles, splits in itertools.product(range(33), range(1, 40)):
        ranges = [split_key_tiles(tiles, splits, index) for index in range(splits)]
        assert [tile for part in ranges for tile in part] == list(range(tiles))
        lengths = [len(part) for part in ranges]
        assert max(lengths) - min(lengths) <= 1
        assert all(lengths) == (splits <= tiles)


def test_splits_cover_every_key_of_every_length_once() -> None:
    for tile_n, key_tiles in itertools.product((1, 3, 4), (1, 2, 5)):
        for num_splits, seq_len in itertools.product(range(1, key_tiles + 1), range(tile_n * key_tiles + 1)):
            plan = SplitPlan(
                rows=1, kv_lora_rank=1, tile_n=tile_n, key_tiles=key_tiles, num_splits=num_splits
            )
            keys = [plan.keys(index, seq_len) for index in range(num_splits)]
            assert [key for part in keys for key in part] == list(range(seq_len))
            assert all(part.start % tile_n == 0 for part in keys if part)


def test_each_request_has_as_few_splits_as_its_tiles_take() -> None:
    for tiles_per_split, num_splits, tiles in itertools.product((1, 2, 3, 7), (1, 2, 5), range(36)):
        plan = SplitPlan(
            rows=1,
            kv_lora_rank=1,
            tile_n=4,
            key_tiles=35,
            num_splits=num_splits,
            tiles_per_split=tiles_per_split,
        )
        for seq_len in {4 * tiles, max(0, 4 * tiles - 3)}:
            splits = plan.splits_of(seq_len)
            assert 1 <= splits <= num_splits
            keys = [plan.keys(index, seq_len) for index in range(num_splits)]
            assert [key for part in keys for key in part] == list(range(seq_len))
            assert not any(keys[splits:])
            if tiles:
                assert all(keys[:splits])
            longest = max(-(-len(part) // 4) for part in keys)
            if tiles <= tiles_per_split * num_splits:
                assert longest <= tiles_per_split
                assert splits == 1 or -(-tiles // (splits - 1)) > tiles_per_split
            else:
                assert splits == num_splits


def test_splits_per_request_follow_the_longest_sequence() -> None:
    tiles = {"sm_count": 132, "tile_m": 16, "tile_n": 64}
    problem = replace(PROBLEM, batch=12)
    same = plan_splits(problem, **tiles)
    assert (same.num_splits, same.tiles_per_split) == (11, 0)  # 128 tiles, 12 and 11 per split
    assert same.splits_of(1) == same.splits_of(8192) == 11
    own = plan_splits(problem, **tiles, per_request=True)
    assert own == replace(same, tiles_per_split=12)
    assert [own.splits_of(length) for length in (0, 1, 768, 769, 1537, 8191, 8192)] == [1, 1, 1, 2, 3, 11, 11]
    fixed = plan_splits(replace(problem, is_var_seq=False), **tiles, per_request=True)
    assert fixed == replace(same, tiles_per_split=1)
    assert [fixed.splits_of(length) for length in (0, 64, 65, 8192)] == [1, 1, 2, 11]


def test_every_small_plan_keeps_the_bounds() -> None:
    counts = (1, 2, 3, 5, 8)
    for batch, heads, q_len, seq_len, sm_count, cluster in itertools.product(
        counts, (1, 16, 128), (1, 4), (1, 64, 65, 640), (1, 4, 13, 132), (1, 2, 4)
    ):
        if cluster > sm_count:
            continue
        problem = DecodeProblem(batch=batch, num_heads=heads, q_len=q_len, page_size=64, max_seq_len=seq_len)
        plan = plan_splits(problem, sm_count=sm_count, tile_m=64, tile_n=64, cluster_size=cluster)
        own = plan_splits(
            problem, sm_count=sm_count, tile_m=64, tile_n=64, cluster_size=cluster, per_request=True
        )
        assert own == replace(plan, tiles_per_split=own.tiles_per_split)
        assert own.splits_of(seq_len) == plan.num_splits  # the longest request is spread as before
        assert [own.keys(i, seq_len) for i in range(plan.num_splits)] == [
            plan.keys(i, seq_len) for i in range(plan.num_splits)
        ]
        assert 1 <= plan.num_splits <= plan.key_tiles == num_key_tiles(seq_len, 64)
        units = batch * -(-q_len * heads // 64)
        resident = sm_count // cluster
        assert plan.num_splits == 1 or plan.num_splits * units <= resident
        # One more split would overfill the device or leave the longest split as long.
        longest = -(-plan.key_tiles // plan.num_splits)
        filling = min(plan.key_tiles, resident // units)
        assert filling <= plan.num_splits or -(-plan.key_tiles // filling) == longest


@given(sizes, sizes, sizes, st.integers(1, 100_000))
def test_splits_never_grow_with_work_nor_shrink_with_the_device(
    batch: int, sm_count: int, more: int, seq_len: int
) -> None:
    problem = replace(PROBLEM, batch=batch, max_seq_len=seq_len, max_pages=-(-seq_len // 64))

    def splits(problem: DecodeProblem, sm_count: int) -> int:
        return plan_splits(problem, sm_count=sm_count, tile_m=16, tile_n=64).num_splits

    base = splits(problem, sm_count)
    assert splits(replace(problem, batch=batch + more), sm_count) <= base
    assert splits(replace(problem, q_len=1 + more), sm_count) <= base
    assert splits(problem, sm_count + more) >= base


@given(sizes, sizes, sizes, st.integers(1, 512))
def test_workspace_holds_the_partial_results(rows: int, key_tiles: int, num_splits: int, rank: int) -> None:
    if num_splits > key_tiles:
        return
    plan = SplitPlan(rows=rows, kv_lora_rank=rank, tile_n=64, key_tiles=key_tiles, num_splits=num_splits)
    assert plan.workspace_bytes == plan.o_partial_bytes + plan.lse_partial_bytes
    if num_splits == 1:
        assert plan.workspace_bytes == 0
        return
    for nbytes, elements in ((plan.o_partial_bytes, rows * rank), (plan.lse_partial_bytes, rows)):
        assert nbytes % 256 == 0
        assert 0 <= nbytes - 4 * num_splits * elements < 256


def test_a_full_device_does_not_split_and_an_empty_one_splits_to_fill_it() -> None:
    tiles = {"tile_m": 64, "tile_n": 64}
    assert plan_splits(PROBLEM, sm_count=132, **tiles).num_splits == 128  # all 128 tiles, one each
    assert (
        plan_splits(PROBLEM, sm_count=132, cluster_size=2, **tiles).num_splits == 64
    )  # 66 would be no faster
    assert plan_splits(replace(PROBLEM, batch=132), sm_count=132, **tiles).num_splits == 1
    assert plan_splits(replace(PROBLEM, batch=67), sm_count=132, **tiles).num_splits == 1


def test_a_split_has_at_least_as_many_keys_as_it_is_told() -> None:
    for least, keys in itertools.product((1, 64, 65, 128, 1000, 9000), (1, 64, 129, 500, 8192)):
        problem = replace(PROBLEM, max_seq_len=keys, max_pages=None)
        plan = plan_splits(problem, sm_count=148, tile_m=16, tile_n=64, min_split_keys=least)
        splits = [split_key_tiles(plan.key_tiles, plan.num_splits, at) for at in range(plan.num_splits)]
        assert max(len(split) for split in splits) * 64 >= min(least, keys)
        assert plan.num_splits == 1 or plan.num_splits <= -(-keys // least)


@pytest.mark.parametrize("name", ["sm_count", "tile_m", "tile_n", "cluster_size", "min_split_keys"])
def test_plan_splits_names_a_bad_argument(name: str) -> None:
    good = {"sm_count": 132, "tile_m": 64, "tile_n": 64, "cluster_size": 2, "min_split_keys": 64}
    for value in (0, -1, 1.5, True, None):
        with pytest.raises(ArgumentError) as error:
            plan_splits(PROBLEM, **{**good, name: value})
        assert error.value.argument == name
    with pytest.raises(ArgumentError, match="per_request: 1, expected a bool"):
        plan_splits(PROBLEM, **good, per_request=1)
    with pytest.raises(ArgumentError, match="problem: str, expected a DecodeProblem"):
        plan_splits("x", **good)
    with pytest.raises(ArgumentError, match="cluster_size: 3, expected at most sm_count = 2"):
        plan_splits(PROBLEM, **{**good, "sm_count": 2, "cluster_size": 3})


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (num_key_tiles, (5, 0), "tile_n"),
        (num_key_tiles, (5, True), "tile_n"),
        (num_key_tiles, (-1, 4), "seq_len"),
        (num_key_tiles, (5.0, 4), "seq_len"),
        (split_key_tiles, (5, 0, 0), "num_splits"),
        (split_key_tiles, (5, 2, 2), "split_idx"),
        (split_key_tiles, (5, 2, 7), "split_idx"),
        (split_key_tiles, (5, 2, -1), "split_idx"),
        (split_key_tiles, (-5, 2, 0), "key_tiles"),
        (split_key_tiles, ("5", 2, 0), "key_tiles"),
    ],
)
def test_tiles_and_splits_name_a_bad_argument(
    function: Callable[..., object], arguments: tuple[object, ...], name: str
) -> None:
    with pytest.raises(ArgumentError) as error:
        function(*arguments)
    assert error.value.argument == name


@pytest.mark.parametrize("name", ["rows", "kv_lora_rank", "tile_n", "key_tiles", "num_splits"])
def test_split_plan_names_a_bad_argument(name: str) -> None:
    good = {"rows": 2, "kv_lora_rank": 512, "tile_n": 64, "key_tiles": 4, "num_splits": 4}
    for value in (0, 1.5):
        with pytest.raises(ArgumentError) as error:
            SplitPlan(**{**good, name: value})
        assert error.value.argument == name
    for value in (-1, 1.5, True):
        with pytest.raises(ArgumentError) as error:
            SplitPlan(**good, tiles_per_split=value)
        assert error.value.argument == "tiles_per_split"
    for index in (-1, 4):
        with pytest.raises(ArgumentError) as error:
            SplitPlan(**good, tiles_per_split=4).keys(index, 100)
        assert error.value.argument == "split_idx"
    with pytest.raises(ArgumentError, match="num_splits: 5, expected at most 4 key tiles"):
        SplitPlan(**{**good, "num_splits": 5})
