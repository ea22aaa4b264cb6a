"""Keeps what the tests run on the emulator, so that `benchmarks/emulator_on_hopper.py` can run it on a GPU.

With `PTX_EMULATOR_RECORD=<folder>` every kernel that the harness runs without findings leaves one file: the
PTX, the launch, the arrays before and after, and where the arrays hold addresses of arrays (tensor maps do).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VARIABLE = "PTX_EMULATOR_RECORD"
_MAX_BYTES = 1 << 20  # of arrays in one file
_CHANGES_FROM_RUN_TO_RUN = ("clock", "globaltimer", "smid", "gridid", "nanosleep", "activemask")


class Recording:
    """One launch that is to be kept; made before the run, finished after it. `arrays` are bytes."""

    def __init__(self, ptx: str, arrays: Sequence[np.ndarray], launch: dict[str, object]) -> None:
        self.folder = os.environ.get(VARIABLE)
        small = sum(a.nbytes for a in arrays) <= _MAX_BYTES
        self.wanted = (
            bool(self.folder) and small and not any(word in ptx for word in _CHANGES_FROM_RUN_TO_RUN)
        )
        self.ptx, self.launch, self.arrays = ptx, launch, arrays
        self.before = [a.copy() for a in arrays] if self.wanted else []

    def finish(self) -> None:
        """Writes the file, if it is wanted and not there yet."""
        if not self.wanted:
            return
        assert self.folder is not None
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
        content: dict[str, np.ndarray] = {}
        for k, (before, after) in enumerate(zip(self.before, self.arrays, strict=True)):
            content[f"before{k}"] = before
            content[f"after{k}"] = after
        header = {"test": test, "ptx": self.ptx, "addresses": self._addresses(), **self.launch}
        key = hashlib.sha256(json.dumps(header).encode())
        for name in sorted(content):
            key.update(content[name].tobytes())
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{key.hexdigest()[:24]}.npz", header=json.dumps(header), **content)

    def _addresses(self) -> list[tuple[int, int, int, int]]:
        """(array, byte offset, array pointed to, byte offset in it) of every word that is an address."""
        found = []
        for k, before in enumerate(self.before):
            words = before[: before.size // 8 * 8].view(np.uint64)
            for n, target in enumerate(self.arrays):
                start, end = target.ctypes.data, target.ctypes.data + target.nbytes
                for at in np.flatnonzero((words >= start) & (words < end)):
                    found.append((k, int(at) * 8, n, int(words[at]) - start))
        return found
