"""Compiled kernels on disk: one published directory per key, built once and checked whenever it is used.

    <cache>/entries/<digest>/files/          what the builder wrote
    <cache>/entries/<digest>/manifest.json   the key, and the SHA-256 of each file
    <cache>/staging/<digest>/                a build in progress; renamed to the entry when it is complete
    <cache>/locks/<digest>.lock              held during a build, so that two processes build a key once
    <cache>/quarantine/<digest>-<random>/    an entry that failed its check; kept to look at, delete at will

The cache is the directory in the environment variable KERNEL_DISPATCH_CACHE_DIR, else
~/.cache/kernel-dispatch. A cache in which every needed key is already published may be read-only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from .canonical import canonical_json, digest
from .errors import CompilationForbiddenError

CACHE_DIR_VARIABLE = "KERNEL_DISPATCH_CACHE_DIR"

_state_lock = threading.Lock()
_forbidden_depth = 0
_recorders: list[list[Lookup]] = []


@dataclass(frozen=True)
class CompileKey:
    """Everything that the compiled code depends on; two keys are equal when their canonical JSON is.

    kernel: the kernel's name; it and the digest appear in messages.
    config: every value read while the kernel is traced, in a dataclass or mapping; `canonical_json` says what
        it may hold.
    arch: the architecture's name with its suffix, such as "sm_90a". A kernel that reads more of the device
        while it is traced (the SM count, say) puts that into `config`.
    options: the compiler's options, in order.
    toolchain: versions of the compilers and kernel languages, see `toolchain_versions`.
    source_hash: see `source_hash`.

    Raises TypeError or ValueError, naming the place, where a value has no canonical form. Later changes to a
    mutable `config` do not reach the key.
    """

    kernel: str
    config: object = field(compare=False)
    arch: str
    options: tuple[str, ...]
    toolchain: Mapping[str, str] = field(compare=False)
    source_hash: str
    canonical: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = ("kernel", "config", "arch", "options", "toolchain", "source_hash")
        object.__setattr__(self, "canonical", canonical_json({name: getattr(self, name) for name in names}))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits; the entry's directory name."""
        return digest(self.canonical)

    def describe(self) -> str:
        """One line for messages: kernel, arch, digest, and the whole key as JSON."""
        return f"{self.kernel} for {self.arch} (digest {self.digest[:12]}, key {self.canonical})"


@dataclass(frozen=True)
class Lookup:
    """One call of `CompileCache.get_or_build`.

    built: whether it compiled; otherwise the entry was there. seconds: wall time, waiting included.
    """

    key: CompileKey
    built: bool
    seconds: float


class CompileCache:
    """A compile cache in `directory`, or where `default_cache_directory` says."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory if directory is not None else default_cache_directory()

    def get_or_build(self, key: CompileKey, build: Callable[[Path], None]) -> Path:
        """The directory published for `key`, after `build(empty_directory)` has filled one if there was none.

        Treat the returned directory as read-only. `build` runs in this thread under the key's lock: other
        processes and threads that ask for the key wait and then find it. What `build` raises propagates and
        leaves nothing behind. An entry that fails its check (a missing, truncated or changed file) is moved
        to quarantine/ with a RuntimeWarning and built again.

        Raises CompilationForbiddenError inside `forbid_compilation()` where a build is needed, RuntimeError
        where `build` writes no file, and OSError naming the environment variable where the cache cannot be
        written.
        """
        start = time.perf_counter()
        entry = self.directory / "entries" / key.digest
        built = False
        defect = _defect(entry)
        if defect is not None:
            if _forbidden_depth:
                raise CompilationForbiddenError(
                    f"compilation is forbidden here, and this cache entry is {defect}: {key.describe()}"
                )
            with self._locked(key.digest):
                built = self._build_if_needed(entry, key, build)
        lookup = Lookup(key, built, time.perf_counter() - start)
        with _state_lock:
            for recorder in _recorders:
                recorder.append(lookup)
        return entry / "files"

    def _build_if_needed(self, entry: Path, key: CompileKey, build: Callable[[Path], None]) -> bool:
        """Under the key's lock: quarantine a corrupt entry, build a missing one; whether it built."""
        defect = _defect(entry)
        if defect is None:
            return False  # another process built it while this one waited for the lock
        if entry.exists():
            self._quarantine(entry, defect)
        staging = self.directory / "staging" / key.digest
        with self._write_errors():
            shutil.rmtree(staging, ignore_errors=True)  # left by a build that was killed
            (staging / "files").mkdir(parents=True)
        try:
            build(staging / "files")
            with self._write_errors():
                _write_manifest(staging, key)
                entry.parent.mkdir(parents=True, exist_ok=True)
                staging.rename(entry)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return True

    def _quarantine(self, entry: Path, defect: str) -> None:
        with self._write_errors():
            target = self.directory / "quarantine" / f"{entry.name}-{uuid.uuid4().hex[:8]}"
            target.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(target)
        warnings.warn(
            f"compile cache entry {entry} is {defect}; moved to {target}",
            RuntimeWarning,
            stacklevel=4,
        )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = FileLock(self.directory / "locks" / f"{name}.lock")
        with self._write_errors():
            (self.directory / "locks").mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Adds to an OSError what the user can do about it."""
        try:
            yield
        except OSError as error:
            why = f"the compile cache cannot be written ({error.strerror or error})"
            remedy = f"set {CACHE_DIR_VARIABLE} to a writable directory"
            raise OSError(error.errno, f"{why}; {remedy}", str(self.directory)) from error


def default_cache_directory() -> Path:
    """The directory in KERNEL_DISPATCH_CACHE_DIR, read now, else ~/.cache/kernel-dispatch."""
    configured = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "kernel-dispatch"


def source_hash(*modules_or_paths: ModuleType | Path) -> str:
    """SHA-256 over the present contents of source files, 64 hexadecimal digits.

    A package or a directory stands for every file below it except bytecode; a module for its one file. Names
    enter relative to the argument, so that the place of installation does not matter; the order of the
    arguments does. Raises ValueError for a module without a file and FileNotFoundError for a missing path.
    """
    total = hashlib.sha256()
    for source in modules_or_paths:
        root = _module_path(source) if isinstance(source, ModuleType) else source
        if not root.exists():
            raise FileNotFoundError(f"source_hash: {root} does not exist")
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in files:
            if "__pycache__" not in path.parts:
                name = path.name if path == root else path.relative_to(root).as_posix()
                total.update(f"{name}\0{_file_digest(path)}\n".encode())
        total.update(b"\n")  # so that a file cannot move from one argument to the next unnoticed
    return total.hexdigest()


def toolchain_versions(*distributions: str) -> dict[str, str]:
    """The installed version of each Python distribution, read now.

    Raises PackageNotFoundError naming one that is missing.
    """
    return {name: importlib.metadata.version(name) for name in distributions}


@contextmanager
def forbid_compilation() -> Iterator[None]:
    """Makes every build in the process, in any thread, raise CompilationForbiddenError until the block ends.

    For a serving loop after warm-up. What is already published in the cache can still be loaded.
    """
    global _forbidden_depth
    with _state_lock:
        _forbidden_depth += 1
    try:
        yield
    finally:
        with _state_lock:
            _forbidden_depth -= 1


@contextmanager
def record_lookups() -> Iterator[list[Lookup]]:
    """Yields a list that receives every cache lookup of the process, in any thread, until the block ends."""
    lookups: list[Lookup] = []
    with _state_lock:
        _recorders.append(lookups)
    try:
        yield lookups
    finally:
        with _state_lock:
            _recorders[:] = [recorder for recorder in _recorders if recorder is not lookups]


def _module_path(module: ModuleType) -> Path:
    file = getattr(module, "__file__", None)  # built-in modules lack it, namespace packages have None
    if file is None:
        raise ValueError(f"source_hash: module {module.__name__} has no source file")
    path = Path(file)
    return path.parent if path.name == "__init__.py" else path


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_manifest(staging: Path, key: CompileKey) -> None:
    """Writes staging/manifest.json: the key, and the SHA-256 of each file by its name below staging/files."""
    root = staging / "files"
    hashes = {p.relative_to(root).as_posix(): _file_digest(p) for p in sorted(root.rglob("*")) if p.is_file()}
    if not hashes:
        raise RuntimeError(f"the builder wrote no file for {key.describe()}")
    manifest = {"key": json.loads(key.canonical), "files": hashes}
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _defect(entry: Path) -> str | None:
    """What is wrong with the entry ("absent" where there is none), or None; other read errors propagate."""
    if not entry.exists():
        return "absent"
    try:
        hashes = json.loads((entry / "manifest.json").read_bytes())["files"]
        for name, expected in hashes.items():
            if _file_digest(entry / "files" / name) != expected:
                return f"damaged, {name} does not match its recorded SHA-256"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"incomplete, {error.filename} is missing or no file"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"damaged, its manifest cannot be read: {error!r}"
    return None
