"""The autotuner's JSON file: versioned, merged under a lock, replaced atomically.

    {
      "format": 1,
      "entries": {
        "<key digest>": {"key": {...}, "provider": "...", "tactic": "...", "median_us": 1.0}
      }
    }

`key` spells out what the digest was taken of (operation, arch, versions, problem) for whoever reads the file.
Entries that other environments wrote stay in the file; their digests simply never match here.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from ._callers import warn_caller
from .errors import ArgumentError, ArgumentTypeError

FORMAT = 1
MAX_KEY_DEPTH = 64  # of objects and lists; a problem's own key has about five
_CORRUPT = "corrupt"  # what `_parse` says of a file to be moved aside


def check_file(name: str, path: object) -> None:
    """Raises ArgumentTypeError or ArgumentError naming the argument unless `path` may be that of a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(name, f"{type(path).__name__}, expected a path")
    if Path(path).expanduser().is_dir():
        raise ArgumentError(name, f"{path} is a directory, expected a file")


@dataclass(frozen=True)
class Choice:
    """The fastest candidate of one bucket, with its median time in microseconds.

    key: the JSON object that the entry's digest was taken of.
    """

    key: Mapping[str, object]
    provider: str
    tactic: str
    median_us: float


class TuningStore:
    """A tuning file at `path` (symbolic links are resolved). Neither the file nor its directory need exist.

    A lock file `<path>.lock` beside it is created for writing and left there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    def read(self) -> dict[str, Choice]:
        """The file's entries by key digest; none if it does not exist.

        A corrupt file (not JSON, or format 1 with malformed entries) is moved aside to
        `<path>.corrupt-<random>` where the directory can be written, a foreign one (another format) is left
        untouched; both give a RuntimeWarning and no entries. Reading a good file takes no lock and writes
        nothing.
        """
        entries, problem = _parse(self.path)
        if problem == _CORRUPT:
            try:
                with self._lock():
                    entries, problem = self._read_locked()
            except OSError as error:
                warn_caller(
                    f"tuning file {self.path} is corrupt and stays: {error}; starting without its entries"
                )
        elif problem is not None:
            self._warn_foreign(problem)
        return entries

    def merge(self, entries: Mapping[str, Choice]) -> None:
        """Adds `entries` to those in the file now, in place of those of the same key.

        A corrupt file is moved aside first, as in `read`. A foreign file is not written: a RuntimeWarning
        says so. Raises OSError where the directory cannot be written.
        """
        with self._lock():
            present, problem = self._read_locked()
            if problem in (None, _CORRUPT):
                self._replace({**present, **entries})

    def check_writable(self) -> None:
        """Raises OSError now where `merge` would later, before time is spent on profiling."""
        with self._lock():
            pass

    def _lock(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock")

    def _read_locked(self) -> tuple[dict[str, Choice], str | None]:
        entries, problem = _parse(self.path)
        if problem == _CORRUPT:
            aside = self.path.with_name(f"{self.path.name}.corrupt-{uuid.uuid4().hex[:8]}")
            os.replace(self.path, aside)
            warn_caller(f"tuning file {self.path} is corrupt; moved to {aside}, starting without its entries")
        elif problem is not None:
            self._warn_foreign(problem)
        return entries, problem

    def _warn_foreign(self, problem: str) -> None:
        warn_caller(f"tuning file {self.path} {problem}, expected {FORMAT}; it is neither used nor written")

    def _replace(self, entries: Mapping[str, Choice]) -> None:
        """Under the lock: writes a sibling and renames it over the file; a reader never sees half a file."""
        document = {"format": FORMAT, "entries": {name: asdict(choice) for name, choice in entries.items()}}
        sibling = self.path.with_name(f".{self.path.name}.new")
        sibling.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        os.replace(sibling, self.path)


def _parse(path: Path) -> tuple[dict[str, Choice], str | None]:
    """The entries and None, or no entries and what is wrong: `_CORRUPT`, or how the format differs."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, None
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested beyond what a parser takes
        return {}, _CORRUPT
    if not isinstance(document, dict) or "format" not in document:
        return {}, "is JSON without a format number"
    if type(document["format"]) is not int or document["format"] != FORMAT:  # JSON's true equals 1
        return {}, f"has format {document['format']!r}"
    try:
        return {name: _choice(entry) for name, entry in document["entries"].items()}, None
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}, _CORRUPT


def _choice(entry: Mapping[str, object]) -> Choice:
    """An entry as read; raises where it is malformed."""
    key, provider, tactic, median_us = (entry[name] for name in ("key", "provider", "tactic", "median_us"))
    if not isinstance(key, dict) or not isinstance(provider, str) or not isinstance(tactic, str):
        raise TypeError("key, provider or tactic has the wrong type")
    if _depth_exceeds(key, MAX_KEY_DEPTH):
        raise ValueError("key is nested too deeply to be written again")
    if not isinstance(median_us, int | float) or not math.isfinite(median_us) or median_us < 0:
        raise ValueError("median_us is no time")
    return Choice(key, provider, tactic, float(median_us))


def _depth_exceeds(value: object, limit: int) -> bool:
    """Whether objects and lists nest deeper than `limit`; takes any depth, level by level."""
    level: list[object] = [value]
    for _ in range(limit):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)
