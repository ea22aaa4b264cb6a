"""Keeps what the tests run on the emulator, so that `benchmarks/emulator_on_hopper.py` can run it on a GPU.

With `PTX_EMULATOR_RECORD=<folder>` every queue of one launch that ends without findings leaves one file: the
PTX, the launch, the memory before and after, and where addresses are in both (parameters, tensor maps).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from ptx_emulator.machine import Machine, Result

VARIABLE = "PTX_EMULATOR_RECORD"
TYPES: dict[int, str] = {}  # data type of the array at an address, for those that say it
# Tests whose kernels have no one right result, and why. They are not kept.
NOT_RECORDED = {
    "test_checks_can_be_off": "reads what another warp writes, with nothing between them",
    "test_allowed_findings_are_kept_apart": "reads past the end of its array",
    "test_spans_are_named_by_what_says_most": "the lanes of a warp store to one address, any of them may win",
    "test_explore_finds_a_schedule_and_its_seed_repeats_it": "its result depends on the order of the warps",
}
# What kernels read that is another number in every run, or on every machine.
CHANGES_FROM_RUN_TO_RUN = ("clock", "globaltimer", "smid", "gridid", "nanosleep", "activemask", "%warpid")
_MAX_BYTES = 4 << 20  # of memory in one file

Reference = tuple[int, int, int]  # byte offset of an address, array it points into, byte offset there


def install() -> None:
    """Makes every `Machine` keep what it runs, if the variable is set."""
    if os.environ.get(VARIABLE) is None:
        return
    enqueue, synchronize = Machine.enqueue, Machine.synchronize
    launches: dict[int, list[dict[str, Any]]] = {}

    @wraps(enqueue)
    def keep_launch(self: Machine, *args: Any, **kwargs: Any) -> None:
        enqueue(self, *args, **kwargs)
        given = signature(enqueue).bind(self, *args, **kwargs)
        given.apply_defaults()
        launch = {k: given.arguments[k] for k in ("grid", "block", "cluster", "shared_bytes", "params")}
        launch |= {"kernel": given.arguments["kernel"].program.name, "target": self.device}
        launches.setdefault(id(self), []).append(launch)

    @wraps(synchronize)
    def keep_run(self: Machine, *args: Any, **kwargs: Any) -> Result:
        queue = launches.pop(id(self), [])
        module = self._keep[-1] if self._keep else None
        arrays = _arrays(self, set(module.variables) if module else set())
        before = [array.copy() for array in arrays]
        result = synchronize(self, *args, **kwargs)
        if len(queue) == 1 and module and not result.reports and sum(a.nbytes for a in arrays) <= _MAX_BYTES:
            _keep(module.text, queue[0], arrays, before)
        return result

    Machine.enqueue = keep_launch  # type: ignore[method-assign]
    Machine.synchronize = keep_run  # type: ignore[method-assign]


def _arrays(machine: Machine, variables: set[str]) -> list[np.ndarray]:
    """The memory of a machine besides its modules' variables, as bytes, not copies."""
    return [
        np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(base))
        for base, (name, num_bytes, _) in machine._ranges.items()
        if name not in variables
    ]


def _keep(ptx: str, launch: dict[str, Any], arrays: list[np.ndarray], before: list[np.ndarray]) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
    if test.split("::")[-1].split("[")[0] in NOT_RECORDED or any(
        word in ptx for word in CHANGES_FROM_RUN_TO_RUN
    ):
        return
    params = np.frombuffer(launch["params"], dtype=np.uint8)
    header = {
        **launch,
        "test": test,
        "ptx": ptx,
        "params": launch["params"].hex(),
        "params_addresses": _addresses(params, arrays),
        "addresses": [_addresses(array, arrays) for array in before],
        "addresses_after": [_addresses(array, arrays) for array in arrays],
        "dtypes": [TYPES.get(array.ctypes.data, "bytes") for array in arrays],
    }
    content = {f"before{k}": array for k, array in enumerate(before)}
    content |= {f"after{k}": array for k, array in enumerate(arrays)}
    key = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(content):
        key.update(content[name].tobytes())
    folder = Path(os.environ[VARIABLE])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{key.hexdigest()[:24]}.npz", header=json.dumps(header), **content)


def _addresses(raw: np.ndarray, arrays: list[np.ndarray]) -> list[Reference]:
    """Every aligned 8-byte word that is the address of a place in one of the arrays."""
    words = np.frombuffer(raw.tobytes()[: raw.size // 8 * 8], dtype=np.uint64)
    found = []
    for n, target in enumerate(arrays):
        start, end = target.ctypes.data, target.ctypes.data + target.nbytes
        for at in np.flatnonzero((words >= start) & (words < end)):
            found.append((int(at) * 8, n, int(words[at]) - start))
    return found
