"""The tuning file: format, merging, corrupt and foreign files, several processes."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_dispatch import ArgumentError, ArgumentTypeError, autotune, load_tuning
from kernel_dispatch.tuning_store import Choice, TuningStore


def choice(name: str = "x", median_us: float = 1.5) -> Choice:
    return Choice({"problem": name}, "cute", f"tile-{name}", median_us)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tune.json"


def test_a_missing_file_has_no_entries_and_is_not_created_by_reading(path: Path) -> None:
    assert TuningStore(path).read() == {}
    assert list(path.parent.iterdir()) == []


def test_the_file_is_versioned_json_that_spells_out_its_keys(path: Path) -> None:
    TuningStore(path).merge({"k": choice()})
    assert json.loads(path.read_text()) == {
        "format": 1,
        "entries": {"k": {"key": {"problem": "x"}, "provider": "cute", "tactic": "tile-x", "median_us": 1.5}},
    }


entries = st.dictionaries(
    st.text(max_size=8),
    st.builds(
        Choice,
        st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
        st.text(max_size=5),
        st.text(max_size=5),
        st.floats(min_value=0, max_value=1e12),
    ),
    max_size=5,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(entries, max_size=4))
def test_merging_keeps_everything_and_the_later_entry_of_a_key(
    tmp_path_factory: pytest.TempPathFactory, parts: list[dict[str, Choice]]
) -> None:
    path = tmp_path_factory.mktemp("merge") / "tune.json"
    expected: dict[str, Choice] = {}
    for part in parts:
        TuningStore(path).merge(part)
        expected.update(part)
    assert TuningStore(path).read() == expected


def test_a_store_keeps_what_another_wrote_after_it_was_opened(path: Path) -> None:
    first, second = TuningStore(path), TuningStore(path)
    assert first.read() == second.read() == {}
    first.merge({"a": choice("a")})
    second.merge({"b": choice("b")})
    assert set(first.read()) == {"a", "b"}


CORRUPT = {
    "empty": b"",
    "truncated": b'{"format": 1, "entries": {"k": {"prov',
    "not-utf8": b"\xff\xfe\x00",
    "no-entries": b'{"format": 1}',
    "entries-list": b'{"format": 1, "entries": []}',
    "entry-not-object": b'{"format": 1, "entries": {"k": 3}}',
    "no-time": b'{"format": 1, "entries": {"k": {"key": {}, "provider": "x", "tactic": "y"}}}',
    "nan-time": b'{"format": 1, "entries": {"k": {"key":{}, "provider":"x", "tactic":"y", "median_us":NaN}}}',
    "nested": b"[" * 100_000,
    "nested-key": (
        b'{"format": 1, "entries": {"k": {"key": {"a": %s}, "provider": "x", "tactic": "y", "median_us": 1}}}'
        % (b"[" * 400 + b"]" * 400)
    ),
    "tactic-type": b'{"format": 1, "entries": {"k": {"key":{}, "provider":"x", "tactic":3, "median_us":1}}}',
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
@pytest.mark.parametrize("action", ["read", "merge"])
def test_a_corrupt_file_is_moved_aside_with_a_warning(path: Path, content: bytes, action: str) -> None:
    path.write_bytes(content)
    store = TuningStore(path)
    act: dict[str, Callable[[], object]] = {
        "read": store.read,
        "merge": lambda: store.merge({"k": choice()}),
    }
    with pytest.warns(RuntimeWarning, match=rf"{path} is corrupt; moved to {path}\.corrupt-"):
        assert not act[action]()
    (aside,) = path.parent.glob("tune.json.corrupt-*")
    assert aside.read_bytes() == content
    assert path.exists() == (action == "merge")
    TuningStore(path).merge({"n": choice("n")})
    assert set(TuningStore(path).read()) == ({"n"} if action == "read" else {"k", "n"})


def test_a_corrupt_file_that_cannot_be_moved_stays_with_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"{")
    monkeypatch.setattr(TuningStore, "_lock", refuse)
    with pytest.warns(RuntimeWarning, match=f"{path} is corrupt and stays: .*read-only"):
        assert TuningStore(path).read() == {}
    assert path.read_bytes() == b"{"


def refuse(store: TuningStore) -> None:
    raise PermissionError("read-only")


FOREIGN = {
    "newer": (b'{"format": 2, "entries": {}}', "has format 2"),
    "named": (b'{"format": "flashinfer"}', "has format 'flashinfer'"),
    "no-format": (b'{"metadata": {}}', "without a format number"),
    "list": (b"[1, 2]", "without a format number"),
    "bool-format": (b'{"format": true, "entries": {}}', "has format True"),
}


@pytest.mark.parametrize(("content", "reason"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_left_untouched_with_a_warning(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=f"{reason}, expected 1; it is neither used nor written"):
        assert TuningStore(path).read() == {}
    with pytest.warns(RuntimeWarning, match="neither used nor written"):
        TuningStore(path).merge({"k": choice()})
    assert path.read_bytes() == content
    assert list(path.parent.glob("*corrupt*")) == []


def test_a_link_keeps_pointing_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "tune.json", tmp_path / "link.json"
    TuningStore(target).merge({"a": choice("a")})
    link.symlink_to(target)
    TuningStore(link).merge({"b": choice("b")})
    assert link.is_symlink()
    assert set(TuningStore(target).read()) == {"a", "b"}


def test_an_unwritable_place_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TuningStore(tmp_path / "file" / "tune.json").check_writable()


def merge_many(path: str, writer: int, count: int, barrier: object) -> None:
    store = TuningStore(path)
    barrier.wait()  # type: ignore[attr-defined]
    for i in range(count):
        store.merge({f"{writer}-{i}": choice(f"{writer}-{i}")})


def test_processes_that_merge_at_once_lose_nothing_and_readers_see_whole_files(path: Path) -> None:
    writers, count = 3, 40
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(writers)
    processes = [
        context.Process(target=merge_many, args=(str(path), writer, count, barrier))
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    sizes = [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a half-written file would be reported as corrupt
        while any(process.is_alive() for process in processes):
            sizes.append(len(TuningStore(path).read()))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * writers
    assert sizes == sorted(sizes)
    expected = {f"{writer}-{i}" for writer in range(writers) for i in range(count)}
    assert set(TuningStore(path).read()) == expected


def test_threads_that_merge_at_once_lose_nothing(path: Path) -> None:
    barrier = threading.Barrier(4)
    threads = [
        threading.Thread(target=merge_many, args=(str(path), writer, 10, barrier)) for writer in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(TuningStore(path).read()) == 40


@pytest.mark.parametrize(("given", "error"), [(5, ArgumentTypeError), (".", ArgumentError)])
def test_what_is_no_file_is_named(given: object, error: type[ArgumentError]) -> None:
    with pytest.raises(error, match=r"^cache: "), autotune(cache=given):
        pass
    with pytest.raises(error, match=r"^path: "):
        load_tuning(given)
