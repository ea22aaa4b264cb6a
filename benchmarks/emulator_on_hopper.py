"""Runs on a GPU what the emulator's tests ran on the emulator, and compares the memory they leave.

    python benchmarks/emulator_on_hopper.py record cases/ [TESTS]   # anywhere: runs tests, keeps the kernels
    python benchmarks/emulator_on_hopper.py replay cases/ --out result.json   # on a GPU: numpy and a driver

`replay` lets the driver compile each kernel's PTX, launches it on the same inputs and compares every byte.
Floats of kernels with approximate instructions or matrix products may differ as far as `Bound` says; how much
of it they need is in the result. Kernels for another architecture are counted, not run. Tensor maps of a few
hundred parameter sets are compared with those of `cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Units in the last place of a number, as numbers of the type that numpy has: bfloat16 as float32.
ULPS = {"float16": 1.0, "float32": 1.0, "float64": 1.0, "bfloat16": 2.0**16}


@dataclass(frozen=True)
class Bound:
    """How far a result of the GPU may be from the emulator's, which is the exact one, rounded.

    Of each element, `relative` to it, `absolute`, in units in its last place; or, where a kernel adds up many
    terms, relative to the `largest` element of the array, by type.
    """

    text: str
    relative: float = 0.0
    absolute: float = 0.0
    ulps: float = 0.0
    largest: dict[str, float] = field(default_factory=dict)

    def allowed(self, values: np.ndarray, dtype: str) -> np.ndarray:
        """The largest differences, with one unit in the last place because both are rounded."""
        magnitude = np.abs(values)
        if self.largest:
            return np.full(values.shape, max(magnitude.max(initial=0.0), 1e-30) * self.largest[dtype])
        unit = np.spacing(magnitude.astype("float32" if dtype == "bfloat16" else dtype)) * ULPS[dtype]
        return self.relative * magnitude + self.absolute + (self.ulps + 1) * unit.astype(np.float64)


# What the PTX ISA promises of approximate instructions; where it promises nothing, what was seen on an H200.
APPROXIMATE = [
    (r"\bex2\.approx(\.ftz)?\.f32", Bound("ex2.approx.f32: 2 ulp", ulps=2)),
    (r"\bex2\.approx\.f16", Bound("ex2.approx.f16: 2^-9.9 relative", relative=2**-9.9)),
    (r"\bex2\.approx\.ftz\.bf16", Bound("ex2.approx.ftz.bf16: 2^-7 relative", relative=2**-7)),
    (
        r"\blg2\.approx",
        Bound("lg2.approx: 2^-22 absolute in (0.5, 2), else relative", relative=2**-22, absolute=2**-22),
    ),
    (
        r"\b(sin|cos)\.approx",
        Bound("sin.approx, cos.approx: 2^-14.7 absolute up to 100 pi", absolute=2**-14.7),
    ),
    (r"\btanh\.approx\.f32", Bound("tanh.approx.f32: 2^-11 relative", relative=2**-11)),
    (r"\btanh\.approx\.f16", Bound("tanh.approx.f16: 2^-10.987 absolute", absolute=2**-10.987)),
    (r"\btanh\.approx\.bf16", Bound("tanh.approx.bf16: 2^-8 absolute", absolute=2**-8)),
    (r"\brsqrt\.approx(\.ftz)?\.f32", Bound("rsqrt.approx.f32: 2^-22.9 relative", relative=2**-22.9)),
    (r"\bsqrt\.approx", Bound("sqrt.approx.f32: 2^-23 relative", relative=2**-23)),
    (r"\brcp\.approx(\.ftz)?\.f32", Bound("rcp.approx.f32: 1 ulp", ulps=1)),
    (r"\bdiv\.(approx|full)", Bound("div.approx.f32, div.full.f32: 2 ulp", ulps=2)),
    (
        r"\br(cp|sqrt)\.approx\.ftz\.f64",
        Bound("rcp and rsqrt.approx.ftz.f64: one unit of the 20-bit mantissa (seen)", relative=2**-20),
    ),
    (r"\brsqrt\.approx\.f64", Bound("rsqrt.approx.f64: 1 ulp (seen)", ulps=1)),
]
# Matrix products: terms are cut off relative to the largest one, of fp8 at 13 bits, before they are added up.
# PTX gives no bound for them, nor for several instructions together; "(seen)": chosen from what an H200 gave.
MATRIX = re.compile(r"\bmma\.sync|\bwgmma\.mma")
MATRIX_BOUND = Bound(
    "matrix products: 2^-21 of the largest element, with f16 sums 2^-10 (seen)",
    largest={"float32": 2**-21, "float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-50},
)
FP8 = re.compile(r"\.e[45]m[23]\.e[45]m[23]\b")
FP8_BOUND = Bound(
    "fp8 matrix products: 2^-12 of the largest element, with f16 sums 2^-10 (seen)",
    largest={"float32": 2**-12, "float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-50},
)
UNORDERED = re.compile(r"\b(red|atom)\.\S*add\S*f(16|32|64)")
SEVERAL_BOUND = Bound(
    "several of these, or sums in any order: 2^-16 of the largest element, of 16-bit types its last place"
    " (seen)",
    largest={"float32": 2**-16, "float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-45},
)
DEADLINE_S = 10.0  # for one kernel
CHUNK = 40  # kernels in one process
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NOT_READY = 600


class CudaError(Exception):
    """A driver call failed."""


def address_bytes(address: int) -> np.ndarray:
    """An address as it lies in memory."""
    return np.frombuffer(address.to_bytes(8, "little"), dtype=np.uint8)


def bound_of(ptx: str) -> Bound | None:
    """What a kernel's results are held to; None if they must be equal."""
    found = [bound for pattern, bound in APPROXIMATE for _ in re.finditer(pattern, ptx)]
    matrix = bool(MATRIX.search(ptx))
    if len(found) + matrix > 1 or UNORDERED.search(ptx):
        return SEVERAL_BOUND
    if matrix:
        return FP8_BOUND if FP8.search(ptx) else MATRIX_BOUND
    return found[0] if found else None


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint32),
    ]


class Gpu:
    """The driver's device 0, through libcuda."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._modules: dict[str, ctypes.c_void_p] = {}
        self._call("cuInit", 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._cuda, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()}")

    def _function(self, ptx: str, name: str) -> ctypes.c_void_p:
        if ptx not in self._modules:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self._modules[ptx] = function
        return self._modules[ptx]

    def run(self, header: dict[str, Any], arrays: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
        """Launches a kernel on copies of the arrays; returns what it left in them, and where they were."""
        pointers = []
        for array in arrays:
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 16)))
            pointers.append(pointer)
        try:
            return self._run(header, arrays, pointers), [pointer.value for pointer in pointers]
        finally:
            for pointer in pointers:
                self._call("cuMemFree_v2", pointer)

    def _run(
        self, header: dict[str, Any], arrays: list[np.ndarray], pointers: list[ctypes.c_uint64]
    ) -> list[np.ndarray]:
        arrays = [a.copy() for a in arrays]
        params = np.frombuffer(bytearray.fromhex(header["params"]), dtype=np.uint8)
        for raw, references in zip(
            [params, *arrays], [header["params_addresses"], *header["addresses"]], strict=True
        ):
            for at, target, offset in references:
                raw[at : at + 8] = address_bytes(pointers[target].value + offset)
        for array, pointer in zip(arrays, pointers, strict=True):
            self._call(
                "cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            )
        function = self._function(header["ptx"], header["kernel"])
        shared = header["shared_bytes"]
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        attribute = LaunchAttribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint32 * 16)(*header["cluster"]))
        config = LaunchConfig(
            (ctypes.c_uint32 * 3)(*header["grid"]),
            (ctypes.c_uint32 * 3)(*header["block"]),
            shared,
            None,
            ctypes.pointer(attribute),
            1 if header["cluster"] != [1, 1, 1] else 0,
        )
        size = ctypes.c_size_t(params.nbytes)
        extra = (ctypes.c_void_p * 5)(
            1, params.ctypes.data, 2, ctypes.addressof(size), 0
        )  # buffer, size, end
        self._call("cuLaunchKernelEx", ctypes.byref(config), function, None, extra)
        self._wait()
        for array, pointer in zip(arrays, pointers, strict=True):
            self._call(
                "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), pointer, ctypes.c_size_t(array.nbytes)
            )
        return arrays

    def _wait(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while self._cuda.cuStreamQuery(None) == _NOT_READY:
            if time.monotonic() > end:
                raise CudaError("the kernel does not end")
        self._call("cuCtxSynchronize")


def _as_floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(dtype).astype(np.float64)


def share_of_bound(expected: np.ndarray, got: np.ndarray, dtype: str, bound: Bound) -> float:
    """The largest difference of two arrays as a share of what is allowed there.

    Infinite if NaNs or infinities are not in the same places, or if the numbers are no floats.
    """
    if dtype not in ULPS:
        return float("inf")
    a, b = _as_floats(expected, dtype), _as_floats(got, dtype)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return float("inf")
    return float((np.abs(a[finite] - b[finite]) / bound.allowed(a[finite], dtype)).max(initial=0.0))


def compare(path: Path, gpu: Gpu) -> dict[str, Any]:
    """Runs one kept kernel and says how the memory it leaves compares."""
    with np.load(path) as content:
        header = json.loads(str(content["header"]))
        count = len(header["dtypes"])
        before = [content[f"before{k}"] for k in range(count)]
        after = [content[f"after{k}"].copy() for k in range(count)]
    bound = bound_of(header["ptx"])
    result = {"case": path.stem, "test": header["test"], "bound": bound.text if bound else ""}
    got, pointers = gpu.run(header, before)
    for expected, references in zip(after, header["addresses_after"], strict=True):
        for at, target, offset in references:
            expected[at : at + 8] = address_bytes(pointers[target] + offset)
    equal, share = True, 0.0
    for expected, actual, dtype in zip(after, got, header["dtypes"], strict=True):
        if not np.array_equal(expected, actual):
            equal = False
            share = max(share, share_of_bound(expected, actual, dtype, bound) if bound else float("inf"))
    outcome = "equal" if equal else "within bound" if share <= 1 else "different"
    return {**result, "outcome": outcome, "share": share}


def replay_chunk(paths: list[Path]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Results of some kernels, and those that are left: after a fault the process has to end."""
    gpu = Gpu()
    results: list[dict[str, Any]] = []
    for k, path in enumerate(paths):
        try:
            results.append(compare(path, gpu))
        except CudaError as error:
            with np.load(path) as content:
                header = json.loads(str(content["header"]))
            results.append(
                {"case": path.stem, "test": header["test"], "outcome": "failed", "why": str(error)}
            )
            if "cuModuleLoadData" not in str(error):
                return results, paths[k + 1 :]
    return results, []


def encode_by_driver(cuda: ctypes.CDLL, arguments: dict[str, Any]) -> str | None:
    """What `cuTensorMapEncodeTiled` makes of the arguments, in hexadecimal; None if it refuses them."""
    rank = len(arguments["dims"])
    memory = (ctypes.c_uint8 * 192)()
    start = -ctypes.addressof(memory) % 64
    status = cuda.cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        arguments["data_type"],
        rank,
        ctypes.c_void_p(arguments["address"]),
        (ctypes.c_uint64 * rank)(*arguments["dims"]),
        (ctypes.c_uint64 * max(1, rank - 1))(*arguments["strides"]),
        (ctypes.c_uint32 * rank)(*arguments["box"]),
        (ctypes.c_uint32 * rank)(*arguments["element_strides"]),
        arguments["interleave"],
        arguments["swizzle"],
        arguments["l2_promotion"],
        arguments["oob_fill"],
    )
    return None if status else bytes(memory[start : start + 128]).hex()


def replay_maps(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares tensor maps; only the first 64 bytes mean something."""
    Gpu()
    cuda = ctypes.CDLL("libcuda.so.1")
    outcomes: Counter[str] = Counter()
    different = []
    for arguments in sets:
        ours, theirs = arguments["ours"], encode_by_driver(cuda, arguments)
        if ours is None or theirs is None:
            outcome = "both refuse" if ours is theirs else "only one refuses"
        else:
            outcome = "equal" if ours[:128] == theirs[:128] else "different"
        outcomes[outcome] += 1
        if outcome in ("only one refuses", "different"):
            different.append({**arguments, "driver": theirs})
    return {"sets": len(sets), "outcomes": dict(outcomes), "different": different}


def tensor_map_sets(count: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Random arguments of `cuTensorMapEncodeTiled`, some of them not valid, and what we make of them."""
    from ptx_emulator.tensor_map import encode_tiled

    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(count):
        rank = int(rng.integers(1, 6))
        data_type = int(rng.integers(0, 13))
        item = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)[data_type]
        swizzle = int(rng.choice([0, 0, 1, 2, 3, 3]))
        row = int(rng.choice([16, 32, 48, 64, 128])) if rng.random() < 0.9 else item
        dims = [int(rng.integers(1, 5000)) for _ in range(rank)]
        strides = [int(rng.integers(1, 1 << int(rng.integers(4, 34)))) * 16 for _ in range(rank - 1)]
        if strides and rng.random() < 0.05:
            strides[0] += 8
        arguments = {
            "data_type": data_type,
            "address": 0x7F0000000000
            + int(rng.integers(0, 1 << 30)) * 16
            + (8 if rng.random() < 0.03 else 0),
            "dims": dims,
            "strides": strides,
            "box": [max(1, row // item), *(int(rng.integers(1, 257)) for _ in range(rank - 1))],
            "element_strides": [int(rng.integers(1, 9)) if rng.random() < 0.2 else 1 for _ in range(rank)],
            "interleave": int(rng.choice([0, 0, 0, 0, 1, 2])) if rank >= 3 else 0,
            "swizzle": swizzle,
            "l2_promotion": int(rng.integers(0, 4)),
            "oob_fill": int(rng.random() < 0.2),
        }
        try:
            ours: str | None = encode_tiled(**arguments).hex()
        except ValueError:
            ours = None
        sets.append({**arguments, "ours": ours})
    return sets


def device_and_driver() -> dict[str, str]:
    """What nvidia-smi says of the first device."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(("device", "driver"), done.stdout.strip().split(", "), strict=True))


def targets_of(path: Path) -> str:
    """The architecture a kept kernel was made for."""
    with np.load(path) as content:
        return str(json.loads(str(content["header"]))["target"])


def replay(folder: Path, out: Path, jobs: int) -> int:
    """Runs all kept kernels for sm_90 and older on device 0; the exit status is 1 if one differs."""
    paths = sorted(folder.glob("*.npz"))
    here = [p for p in paths if int(re.sub(r"\D", "", targets_of(p))) <= 90]
    pending = [here[k : k + CHUNK] for k in range(0, len(here), CHUNK)]
    results: list[dict[str, Any]] = []
    while pending:
        with ProcessPoolExecutor(jobs, max_tasks_per_child=1) as pool:
            done = [pool.submit(replay_chunk, chunk) for chunk in pending]
            pending = []
            for future in as_completed(done):
                some, left = future.result()
                results += some
                if left:
                    pending.append(left)
    recorded = folder / "recorded.json"
    summary = {
        "command": "python benchmarks/emulator_on_hopper.py replay cases/",
        **(json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}),
        **device_and_driver(),
        "cases": len(results),
        "not_run_other_architecture": len(paths) - len(here),
        "outcomes": dict(Counter(r["outcome"] for r in results)),
        "tests": len({r["test"] for r in results}),
        "not_equal": _by_test(r for r in results if r["outcome"] in ("different", "failed")),
        "by_test": _counts_by_test(results),
        "within_bound": _by_test(r for r in results if r["outcome"] == "within bound"),
    }
    maps = folder / "tensor_maps.json"
    if maps.exists():
        summary["tensor_maps"] = replay_maps(json.loads(maps.read_text(encoding="utf-8")))
    out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in summary.items() if k in ("cases", "outcomes", "tests")}))
    if "tensor_maps" in summary:
        print("tensor maps:", summary["tensor_maps"]["outcomes"])
    for r in summary["not_equal"][:20]:
        print(r)
    return 1 if summary["not_equal"] else 0


def _counts_by_test(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many kernels of each test function had which outcome; a file holds a group of instructions."""
    counts: dict[str, Counter[str]] = {}
    for r in results:
        counts.setdefault(_function(r["test"]), Counter())[r["outcome"]] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}


def _function(test: str) -> str:
    """`test_float.py::test_sums` of a test's name with its folder and parameters."""
    return test.rsplit("/", 1)[-1].split("[")[0]


def _by_test(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one test and outcome together, with the largest share of the bound that one needs."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in results:
        test = _function(r["test"])
        key = (test, r["outcome"], r.get("why", ""), r.get("bound", ""))
        group = groups.setdefault(key, {"test": test, "cases": 0})
        group |= {k: r[k] for k in ("outcome", "why", "bound") if r.get(k)}
        group["cases"] += 1
        if r["outcome"] == "within bound":
            group["share_of_bound"] = max(group.get("share_of_bound", 0.0), round(r["share"], 3))
    return [groups[key] for key in sorted(groups)]


def record(folder: Path, tests: list[Path]) -> int:
    """Runs the emulator's tests, and others that use it, and keeps every kernel they run."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = json.dumps(tensor_map_sets())
    (folder / "tensor_maps.json").write_text(maps, encoding="utf-8")
    environment = {**os.environ, "PTX_EMULATOR_RECORD": str(folder.resolve())}
    ours = Path(__file__).resolve().parent.parent / "tests" / "ptx_emulator"
    sys.path.insert(0, str(ours))
    from emulator_recording import NOT_RECORDED

    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ours, capture_output=True, check=False)
    recorded = {"commit": head.stdout.decode().strip(), "not_recorded": NOT_RECORDED}
    (folder / "recorded.json").write_text(json.dumps(recorded), encoding="utf-8")
    return max(
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(path)], env=environment, check=False
        ).returncode
        for path in (ours, *tests)
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "replay"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", type=Path, nargs="*", help="tests to record besides the emulator's own")
    parser.add_argument("--out", type=Path, default=Path("emulator_on_hopper.json"))
    parser.add_argument("--jobs", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.action == "record":
        return record(arguments.folder, arguments.tests)
    return replay(arguments.folder, arguments.out, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
