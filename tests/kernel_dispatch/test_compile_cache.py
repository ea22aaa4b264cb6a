"""The compile cache: keys, publishing, corruption, two processes, and the ban on compilation."""

from __future__ import annotations

import enum
import fnmatch
import json
import multiprocessing
import re
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_dispatch import (
    CompilationForbiddenError,
    CompileCache,
    CompileKey,
    canonical_json,
    compile_cache,
    forbid_compilation,
    record_lookups,
    source_hash,
    toolchain_versions,
)


@dataclass(frozen=True)
class Config:
    tile: tuple[int, ...] = (64, 128)
    dtype: torch.dtype = torch.bfloat16


class Layout(enum.IntEnum):
    ROW = 1


def make_key(**changes: object) -> CompileKey:
    fields: dict[str, object] = {
        "kernel": "verify",
        "config": Config(),
        "arch": "sm_90a",
        "options": ("-O3",),
        "toolchain": {"nvcc": "13.0"},
        "source_hash": "ab12",
    }
    return CompileKey(**{**fields, **changes})  # type: ignore[arg-type]


def build_cubin(directory: Path) -> None:
    (directory / "kernel.cubin").write_bytes(b"cubin" * 100)
    (directory / "meta").mkdir()
    (directory / "meta" / "info.json").write_text("{}")


def must_not_build(directory: Path) -> None:
    raise AssertionError("built although the entry is published")


def leftovers(cache: CompileCache) -> list[Path]:
    return list((cache.directory / "staging").iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "cache")


def test_the_directory_is_laid_out_as_documented(cache: CompileCache) -> None:
    assert compile_cache.__doc__ is not None
    documented = re.findall(r"^    <cache>/(\S+)", compile_cache.__doc__, re.MULTILINE)
    assert [path.partition("/")[0] for path in documented] == [
        "entries",
        "entries",
        "staging",
        "locks",
        "quarantine",
    ]
    key = make_key()
    (cache.get_or_build(key, build_cubin) / "kernel.cubin").write_bytes(b"changed")
    seen: set[str] = set()

    def build(directory: Path) -> None:
        build_cubin(directory)
        seen.update(path.relative_to(cache.directory).as_posix() for path in cache.directory.rglob("*"))

    with pytest.warns(RuntimeWarning, match="moved to"):
        cache.get_or_build(key, build)
    seen.update(path.relative_to(cache.directory).as_posix() for path in cache.directory.rglob("*"))
    for path in documented:
        pattern = path.rstrip("/").replace("<digest>", key.digest).replace("<random>", "*")
        assert any(fnmatch.fnmatchcase(name, pattern) for name in seen), path


# Canonical JSON.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner)
    ),
)


@given(json_values)
def test_canonical_json_loses_nothing_of_a_json_value(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(alphabet="abc"), st.integers(), min_size=2))
def test_canonical_json_ignores_the_order_of_a_mapping(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, torch.float16),
        (1, True),
        (1, 1.0),
        (1, "1"),
        (None, "None"),
        (Layout.ROW, 1),
        (Config(), {"tile": [64, 128], "dtype": torch.bfloat16}),
        (Config(), Config(tile=(64,))),
        ([[1], 2], [[1, 2]]),
    ],
    ids=str,
)
def test_canonical_json_tells_values_apart(left: object, right: object) -> None:
    assert canonical_json(left) != canonical_json(right)


@pytest.mark.parametrize(
    ("value", "error", "place"),
    [
        ({"tile": [1, {2}]}, TypeError, r"value\.tile\[1\] is a builtins\.set"),
        (Config(tile=(1, Path("x"))), TypeError, r"value\.tile\[1\] is a pathlib"),  # type: ignore[arg-type]
        ({"scale": float("nan")}, ValueError, r"value\.scale = nan"),
        ([float("inf")], ValueError, r"value\[0\] = inf"),
        ({1: 2}, TypeError, "the key 1 of type int"),
        ({"$dtype": "x"}, ValueError, "reserved"),
        (torch.zeros(1), TypeError, r"torch\.Tensor"),
        (Config, TypeError, r"builtins\.type"),
        (object(), TypeError, r"builtins\.object"),
    ],
)
def test_canonical_json_rejects_what_has_no_canonical_form(
    value: object, error: type[Exception], place: str
) -> None:
    with pytest.raises(error, match=place):
        canonical_json(value)


# Keys.


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "decode"},
        {"config": Config(dtype=torch.float16)},
        {"arch": "sm_100a"},
        {"options": ("-O2",)},
        {"options": ()},
        {"toolchain": {"nvcc": "13.1"}},
        {"source_hash": "ab13"},
    ],
    ids=str,
)
def test_every_field_reaches_the_digest(changes: dict[str, object]) -> None:
    assert make_key(**changes).digest != make_key().digest
    assert make_key(**changes) != make_key()


def test_equal_keys_are_equal_and_hash_alike() -> None:
    assert make_key() == make_key()
    assert len({make_key(), make_key()}) == 1
    assert make_key().digest == make_key().digest


def test_a_config_changed_later_does_not_reach_the_key() -> None:
    config = {"tile": 64}
    key = make_key(config=config)
    before = key.digest
    config["tile"] = 128
    assert key.digest == before


def test_a_key_without_canonical_form_is_refused_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"value\.config\.fn is a"):
        make_key(config={"fn": lambda: None})


def test_describe_names_kernel_arch_and_config() -> None:
    text = make_key().describe()
    for part in ("verify", "sm_90a", "bfloat16", "-O3", make_key().digest[:12]):
        assert part in text
    assert "\n" not in text


def test_source_hash_follows_contents_and_names_but_not_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        (root / "sub").mkdir(parents=True)
        (root / "sub" / "kernel.cu").write_text("x")
    before = source_hash(first)
    assert before == source_hash(second)
    (first / "__pycache__").mkdir()
    (first / "__pycache__" / "k.pyc").write_bytes(b"1")
    assert source_hash(first) == before
    (first / "sub" / "kernel.cu").write_text("y")
    assert source_hash(first) != before
    (second / "sub" / "kernel.cu").rename(second / "sub" / "renamed.cu")
    assert source_hash(second) not in (before, source_hash(first))
    assert source_hash(first, second) != source_hash(second, first)


def test_source_hash_of_a_package_covers_its_modules_and_is_read_each_time(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "kernel.py").write_text("x = 1")
    package = types.ModuleType("package")
    package.__file__ = str(tmp_path / "__init__.py")
    module = types.ModuleType("package.kernel")
    module.__file__ = str(tmp_path / "kernel.py")
    before = source_hash(package), source_hash(module)
    (tmp_path / "kernel.py").write_text("x = 2")
    assert source_hash(package) != before[0]
    assert source_hash(module) != before[1]


def test_source_hash_names_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        source_hash(tmp_path / "absent")
    with pytest.raises(ValueError, match="built_in has no source file"):
        source_hash(types.ModuleType("built_in"))


def test_toolchain_versions() -> None:
    assert toolchain_versions("torch", "filelock") == {
        "torch": version("torch"),
        "filelock": version("filelock"),
    }
    with pytest.raises(PackageNotFoundError, match="no-such-toolchain"):
        toolchain_versions("no-such-toolchain")


# Building and finding.


def test_builds_once_and_returns_what_the_builder_wrote(cache: CompileCache) -> None:
    path = cache.get_or_build(make_key(), build_cubin)
    assert sorted(p.name for p in path.iterdir()) == ["kernel.cubin", "meta"]
    assert (path / "kernel.cubin").read_bytes() == b"cubin" * 100
    assert cache.get_or_build(make_key(), must_not_build) == path
    assert CompileCache(cache.directory).get_or_build(make_key(), must_not_build) == path
    assert leftovers(cache) == []


def test_other_keys_have_other_directories(cache: CompileCache) -> None:
    assert cache.get_or_build(make_key(), build_cubin) != cache.get_or_build(
        make_key(arch="sm_121a"), build_cubin
    )


def test_a_builder_that_raises_leaves_nothing(cache: CompileCache) -> None:
    def fail(directory: Path) -> None:
        (directory / "half.cubin").write_bytes(b"x")
        raise OSError(28, "disk full in the compiler")

    with pytest.raises(OSError, match="disk full in the compiler"):
        cache.get_or_build(make_key(), fail)
    assert leftovers(cache) == []
    assert not (cache.directory / "entries").exists()
    cache.get_or_build(make_key(), build_cubin)


def test_a_builder_that_writes_nothing_is_an_error(cache: CompileCache) -> None:
    with pytest.raises(RuntimeError, match="wrote no file for verify for sm_90a"):
        cache.get_or_build(make_key(), lambda directory: None)
    assert leftovers(cache) == []


def test_the_remains_of_a_killed_build_do_not_reach_the_entry(cache: CompileCache) -> None:
    stale = cache.directory / "staging" / make_key().digest / "files"
    stale.mkdir(parents=True)
    (stale / "stale.o").write_bytes(b"x")
    path = cache.get_or_build(make_key(), build_cubin)
    assert not (path / "stale.o").exists()


def truncate(files: Path) -> None:
    (files / "kernel.cubin").write_bytes(b"cub")


def empty(files: Path) -> None:
    (files / "kernel.cubin").write_bytes(b"")


def flip(files: Path) -> None:
    (files / "kernel.cubin").write_bytes(b"cubiN" * 100)


def remove(files: Path) -> None:
    (files / "meta" / "info.json").unlink()


def remove_manifest(files: Path) -> None:
    (files.parent / "manifest.json").unlink()


def truncate_manifest(files: Path) -> None:
    (files.parent / "manifest.json").write_text('{"files": {"ker')


def foreign_manifest(files: Path) -> None:
    (files.parent / "manifest.json").write_text("[]")


def replace_by_directory(files: Path) -> None:
    (files / "kernel.cubin").unlink()
    (files / "kernel.cubin").mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        flip,
        remove,
        remove_manifest,
        truncate_manifest,
        foreign_manifest,
        replace_by_directory,
    ],
)
def test_a_corrupt_entry_is_quarantined_with_a_warning_and_rebuilt(
    cache: CompileCache, damage: object
) -> None:
    path = cache.get_or_build(make_key(), build_cubin)
    damage(path)  # type: ignore[operator]
    with pytest.warns(RuntimeWarning, match=r"is (damaged|incomplete), .*; moved to .*quarantine"):
        assert cache.get_or_build(make_key(), build_cubin) == path
    assert (path / "kernel.cubin").read_bytes() == b"cubin" * 100
    (kept,) = (cache.directory / "quarantine").iterdir()
    assert kept.name.startswith(make_key().digest)
    cache.get_or_build(make_key(), must_not_build)


def test_each_corruption_is_kept(cache: CompileCache) -> None:
    for _ in range(2):
        flip(cache.get_or_build(make_key(), build_cubin))
        with pytest.warns(RuntimeWarning, match="damaged"):
            cache.get_or_build(make_key(), build_cubin)
    assert len(list((cache.directory / "quarantine").iterdir())) == 2


def test_files_added_to_an_entry_do_not_spoil_it(cache: CompileCache) -> None:
    path = cache.get_or_build(make_key(), build_cubin)
    (path / "kernel.pyc").write_bytes(b"x")
    assert cache.get_or_build(make_key(), must_not_build) == path


# Where the cache is.


def test_the_environment_variable_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert CompileCache().get_or_build(make_key(), build_cubin).is_relative_to(tmp_path / "elsewhere")
    monkeypatch.delenv("KERNEL_DISPATCH_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert CompileCache().directory == tmp_path / "home" / ".cache" / "kernel-dispatch"


def test_an_unwritable_cache_names_the_variable_and_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CompileCache(tmp_path / "file" / "cache")
    with pytest.raises(OSError, match="set KERNEL_DISPATCH_CACHE_DIR to a writable directory") as caught:
        cache.get_or_build(make_key(), must_not_build)
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_a_published_entry_is_found_without_writing(
    cache: CompileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.get_or_build(make_key(), build_cubin)
    monkeypatch.setattr(CompileCache, "_locked", lambda self, name: pytest.fail("took the lock"))
    assert cache.get_or_build(make_key(), must_not_build) == path


# Forbidding and recording.


def test_forbidden_compilation_names_the_key_and_builds_nothing(cache: CompileCache) -> None:
    with forbid_compilation(), forbid_compilation():
        pass
    cache.get_or_build(make_key(), build_cubin)
    other = make_key(arch="sm_121a")
    with forbid_compilation():
        cache.get_or_build(make_key(), must_not_build)
        with forbid_compilation(), pytest.raises(CompilationForbiddenError, match="verify for sm_121a"):
            cache.get_or_build(other, must_not_build)
        with pytest.raises(CompilationForbiddenError) as caught:
            cache.get_or_build(other, must_not_build)
    assert other.describe() in str(caught.value)
    cache.get_or_build(other, build_cubin)


def test_forbidden_compilation_leaves_a_corrupt_entry_for_later(cache: CompileCache) -> None:
    remove(cache.get_or_build(make_key(), build_cubin))
    message = r"cache entry is incomplete, .*info\.json is missing or no file: verify for sm_90a"
    with forbid_compilation(), pytest.raises(CompilationForbiddenError, match=message):
        cache.get_or_build(make_key(), must_not_build)
    with pytest.warns(RuntimeWarning, match="moved to"):
        cache.get_or_build(make_key(), build_cubin)


def test_forbidden_compilation_holds_in_other_threads(cache: CompileCache) -> None:
    with ThreadPoolExecutor(1) as pool, forbid_compilation():
        future = pool.submit(cache.get_or_build, make_key(), must_not_build)
        assert isinstance(future.exception(), CompilationForbiddenError)


def test_lookups_are_recorded_inside_the_block_only(cache: CompileCache) -> None:
    cache.get_or_build(make_key(arch="sm_80"), build_cubin)
    with record_lookups() as outer:
        cache.get_or_build(make_key(), build_cubin)
        with record_lookups() as inner:
            cache.get_or_build(make_key(), must_not_build)
    cache.get_or_build(make_key(), must_not_build)
    assert [(lookup.key, lookup.built) for lookup in outer] == [(make_key(), True), (make_key(), False)]
    assert inner == outer[1:]
    assert all(lookup.seconds > 0 for lookup in outer)


# Two processes.


def build_in_process(directory: str, log: str, barrier: object) -> None:
    def build(target: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)  # long enough that an unlocked second process would build as well
        build_cubin(target)

    barrier.wait()  # type: ignore[attr-defined]
    path = CompileCache(Path(directory)).get_or_build(make_key(), build)
    assert (path / "kernel.cubin").read_bytes() == b"cubin" * 100


def test_processes_that_need_the_same_key_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    log = tmp_path / "log"
    processes = [
        context.Process(target=build_in_process, args=(str(tmp_path / "cache"), str(log), barrier))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_a_build_killed_half_way_does_not_block_the_next(cache: CompileCache) -> None:
    def build_and_hang(target: Path) -> None:
        (target / "half.cubin").write_bytes(b"x")
        started.set()
        while True:
            started.wait(60)

    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=cache.get_or_build, args=(make_key(), build_and_hang))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join(60)
    path = cache.get_or_build(make_key(), build_cubin)
    assert sorted(p.name for p in path.iterdir()) == ["kernel.cubin", "meta"]
