"""`call.c`, by which functions are called, against TVM-FFI's way to call the same function."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cute_kernels
import pytest
import torch
import tvm_ffi
from cute_kernels import CuteFunction
from cute_kernels.load import EXCHANGE_API, SKIP_EXCHANGE_API, load_library

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler on Linux"
)

STREAM, OTHER_STREAM = 0x1000, 0x2000  # the second device's is one further
CUDA = 2  # kDLCUDA
COLUMNS = 32  # of the bias
MANAGED, DESCRIBE, CURRENT_STREAM = 3, 5, 6  # 64-bit words of a DLPackExchangeAPI
API_WORDS = 7
CHANGED = ("must_refuse", "must_wait", "launch_status", "stream_status")  # of the stub, by tests


@dataclass(frozen=True)
class Config:
    """bias: whether there is one. tensor_scale: whether the scale is a tensor."""

    bias: bool
    tensor_scale: bool


def trace(config: Config, options: str) -> Any:
    import cutlass.cute as cute
    from arguments_traced import EveryKindOfArgument
    from cutlass import Float32, Int32
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    def vector(length: int) -> Any:
        return make_fake_tensor(Float32, (length,), (1,))

    # Without a hole in what the kernel is given of it, which would hold anything.
    x = make_fake_tensor(Float32, (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), cute.sym_int64()))
    bias = vector(COLUMNS) if config.bias else None
    scale = vector(1) if config.tensor_scale else Float32(1.0)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(EveryKindOfArgument(), x, bias, scale, Int32(1), stream, options=options)


FUNCTION = CuteFunction("every_kind", trace, sources=(HERE / "arguments_traced.py", Path(__file__)))


class Called:
    """A compiled function in a library with `call.c` and `call_stub.c`, called in both ways."""

    def __init__(self, config: Config, folder: Path) -> None:
        compiled = FUNCTION.compiled(config, "sm_90a")
        self.path = folder / "library.so"
        call = Path(cute_kernels.__file__).with_name("call.c")
        parts = [str(compiled.object_file), str(call), str(HERE / "call_stub.c")]
        parts += [str(tvm_ffi.libinfo.find_libtvm_ffi()), f"-I{tvm_ffi.libinfo.find_include_path()}"]
        names = ["-DFUNCTION=__tvm_ffi_every_kind", '-DNAME="every_kind"']
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-Wl,-Bsymbolic,-z,lazy"]
        subprocess.run([str(COMPILER), *flags, *names, *parts, "-o", str(self.path)], check=True)
        self.library = ctypes.CDLL(str(self.path))
        self.fast = load_library(self.path, "every_kind")
        self.ordinary = tvm_ffi.load_module(str(self.path))["every_kind"]
        sizes = parameter_sizes(compiled.ptx.read_text())
        self.num_bytes = sum(sizes)
        self["num_parameters"] = len(sizes)
        (ctypes.c_size_t * len(sizes)).in_dll(self.library, "sizes")[:] = sizes

    def __getitem__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value

    def __setitem__(self, name: str, value: int) -> None:
        pointer = name.startswith(("data_", "current_", "num_parameters"))
        (ctypes.c_size_t if pointer else ctypes.c_int).in_dll(self.library, name).value = value

    def launch(self, function: Any, *arguments: Any) -> tuple[bytes, int | None]:
        """Parameters and stream of the one launch that a call makes."""
        before = self["num_launches"]
        assert function(*arguments) is None
        assert self["num_launches"] == before + 1
        stream = ctypes.c_void_p.in_dll(self.library, "launched_on").value
        buffer = (ctypes.c_char * self.num_bytes).in_dll(self.library, "parameters")
        return buffer.raw, stream

    def check(self, *arguments: Any, described: bool = True) -> tuple[bytes, int | None]:
        """One launch by `call.c`, which must be as TVM-FFI's; `described` if not made by it."""
        before = self["num_managed"]
        fast = self.launch(self.fast, *arguments)
        assert (self["num_managed"] == before) == described
        assert fast == self.launch(self.ordinary, *arguments)
        assert self["num_managed"] > before
        return fast


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the one kernel in `ptx`."""
    declared = re.findall(r"^\s*\.param (?:\.align \d+ )?\.[bfsu](\d+) \w+(?:\[(\d+)\])?,?$", ptx, re.M)
    assert declared
    return [int(bits) // 8 * int(count or 1) for bits, count in declared]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[bool, bool], Called]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield {
            (bias, scale): Called(Config(bias, scale), tmp_path_factory.mktemp("library"))
            for bias, scale in ((True, True), (False, False))
        }


def exchange_api() -> int:
    """The address of torch's DLPackExchangeAPI."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(get(getattr(torch.Tensor, EXCHANGE_API), b"dlpack_exchange_api"))


def on_cuda(called: Called) -> Iterator[Called]:
    called.library.change_api(ctypes.c_void_p(exchange_api()))
    called["current_stream"] = STREAM
    try:
        yield called
    finally:
        called.library.restore_api()
        for name in ("data_on_cpu", "data_on_second_device", *CHANGED):
            called[name] = 0


@pytest.fixture
def tensors_only(functions: dict[tuple[bool, bool], Called]) -> Iterator[Called]:
    """Called with x, bias, a tensor as scale, count; CPU tensors are presented as CUDA ones."""
    yield from on_cuda(functions[True, True])


@pytest.fixture
def numbers(functions: dict[tuple[bool, bool], Called]) -> Iterator[Called]:
    """Called with x, None, a number as scale, count; CPU tensors are presented as CUDA ones."""
    yield from on_cuda(functions[False, False])


def strided_tensors() -> dict[str, torch.Tensor]:
    return {
        "contiguous": torch.zeros(3, 32),
        "transposed": torch.zeros(32, 3).t(),
        "every second": torch.zeros(6, 64)[1::2, ::2],
        "expanded": torch.zeros(32).expand(5, 32),
        "one row": torch.zeros(4, 32)[1:2],
        "one column": torch.zeros(4, 7)[:, :1],
        "parameter": torch.nn.Parameter(torch.zeros(3, 32)),
        "requires grad": torch.zeros(3, 32, requires_grad=True),
        "inference": torch.inference_mode()(torch.zeros)(3, 32),
    }


@pytest.mark.parametrize("kind", strided_tensors())
def test_tensors_reach_the_kernel_as_by_tvm_ffi(tensors_only: Called, kind: str) -> None:
    x = strided_tensors()[kind]
    bias, scale = torch.zeros(COLUMNS + 3)[3:], torch.ones(1)
    parameters, stream = tensors_only.check(x, bias, scale, 3)
    for tensor in (x, bias, scale):
        assert tensor.data_ptr().to_bytes(8, "little") in parameters
    assert stream == STREAM


@pytest.mark.parametrize("scale", [0.25, -1.0, float("inf"), 3, -4])
@pytest.mark.parametrize("count", [0, -1, 2**31 - 1])
def test_none_and_numbers_reach_the_kernel_as_by_tvm_ffi(numbers: Called, scale: float, count: int) -> None:
    parameters, _ = numbers.check(torch.zeros(3, 32), None, scale, count)
    assert count.to_bytes(4, "little", signed=True) in parameters


class Subclass(torch.Tensor):
    pass


class Number(int):
    pass


@pytest.mark.parametrize("count", [True, Number(7)], ids=["bool", "int subclass"])
def test_numbers_of_other_types_go_through_tvm_ffi(numbers: Called, count: int) -> None:
    numbers.check(torch.zeros(3, 32), None, 0.5, count, described=False)


def test_other_tensors_go_through_tvm_ffi(tensors_only: Called) -> None:
    x, bias, scale = torch.zeros(3, 32), torch.zeros(32), torch.ones(1)
    tensors_only.check(x.as_subclass(Subclass), bias, scale, 1, described=False)
    # A tensor of TVM-FFI keeps the device that it was made with.
    tensors_only.check(x, tvm_ffi.from_dlpack(bias), scale, 1, described=False)


def outcome(function: Any, *arguments: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as raised:
        function(*arguments)
    message, _, _frames = str(raised.value).partition("\nException raised from")
    return type(raised.value), message


WRONG = {
    "shape": ((torch.zeros(3, 32), torch.zeros(31), torch.ones(1), 1), ValueError),
    "rank": ((torch.zeros(3, 32, 1), torch.zeros(32), torch.ones(1), 1), ValueError),
    "stride": ((torch.zeros(3, 32), torch.zeros(64)[::2], torch.ones(1), 1), ValueError),
    "dtype": ((torch.zeros(3, 32), torch.zeros(32).half(), torch.ones(1), 1), ValueError),
    "none": ((torch.zeros(3, 32), None, torch.ones(1), 1), TypeError),
    "number for a tensor": ((torch.zeros(3, 32), 1.0, torch.ones(1), 1), TypeError),
    "tensor for a number": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1), torch.ones(1)), TypeError),
    "float for an int": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1), 1.5), TypeError),
    "str": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1), "1"), TypeError),
    "int beyond 64 bits": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1), 2**64), TypeError),
    "too few": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1)), TypeError),
    "too many": ((torch.zeros(3, 32), torch.zeros(32), torch.ones(1), 1, 1), TypeError),
    "more than are described": ((torch.zeros(3, 32),) + (1,) * 10_000, TypeError),
    "none at all": ((), TypeError),
    "meta": ((torch.zeros(3, 32, device="meta"), torch.zeros(32), torch.ones(1), 1), RuntimeError),
    "sparse": ((torch.zeros(3, 32).to_sparse(), torch.zeros(32), torch.ones(1), 1), RuntimeError),
    "no tensor of torch": ((object(), torch.zeros(32), torch.ones(1), 1), TypeError),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_as_by_tvm_ffi(tensors_only: Called, case: str) -> None:
    arguments, error = WRONG[case]
    before = tensors_only["num_launches"]
    fast = outcome(tensors_only.fast, *arguments)
    assert fast == outcome(tensors_only.ordinary, *arguments)
    assert issubclass(fast[0], error)
    assert tensors_only["num_launches"] == before
    # No error is left over.
    tensors_only.check(torch.zeros(3, 32), torch.zeros(32), torch.ones(1), 1)


@pytest.mark.parametrize("place", ["data_on_cpu", "data_on_second_device"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_tensors_of_another_device_raise_as_by_tvm_ffi(tensors_only: Called, place: str, index: int) -> None:
    tensors = (torch.zeros(3, 32), torch.zeros(32), torch.ones(1))
    arguments = (*tensors, 1)
    tensors_only[place] = tensors[index].data_ptr()
    before = tensors_only["num_managed"]
    fast = outcome(tensors_only.fast, *arguments)
    assert tensors_only["num_managed"] == before
    assert fast == outcome(tensors_only.ordinary, *arguments)
    assert issubclass(fast[0], ValueError)
    assert "device" in fast[1]


def test_a_failing_launch_raises_as_by_tvm_ffi_and_is_not_repeated(numbers: Called) -> None:
    arguments = (torch.zeros(3, 32), None, 0.5, 1)
    numbers["launch_status"] = 1
    before = numbers["num_launches"]
    fast = outcome(numbers.fast, *arguments)
    assert numbers["num_launches"] == before + 1
    assert fast == outcome(numbers.ordinary, *arguments)
    assert fast == (RuntimeError, "a failing launch")


def env_stream(device: int = 0) -> int | None:
    get = ctypes.CDLL(str(tvm_ffi.libinfo.find_libtvm_ffi())).TVMFFIEnvGetStream
    get.restype = ctypes.c_void_p
    return get(CUDA, device)


def test_launches_are_on_the_current_stream_of_the_tensors_device(numbers: Called) -> None:
    x = torch.zeros(3, 32)
    before = env_stream()
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), OTHER_STREAM):
        queries = numbers["num_stream_queries"]
        assert numbers.launch(numbers.fast, x, None, 1.0, 1)[1] == STREAM
        assert numbers["num_stream_queries"] == queries + 1
        assert env_stream() == OTHER_STREAM
        numbers["current_stream"] = OTHER_STREAM
        assert numbers.launch(numbers.fast, x, None, 1.0, 1)[1] == OTHER_STREAM
        assert env_stream() == OTHER_STREAM
        numbers["launch_status"] = 1
        numbers["current_stream"] = STREAM
        outcome(numbers.fast, x, None, 1.0, 1)
        assert env_stream() == OTHER_STREAM
        numbers["launch_status"] = 0
        numbers["data_on_second_device"] = x.data_ptr()
        assert numbers.launch(numbers.fast, x, None, 1.0, 1)[1] == STREAM + 1
    assert env_stream() == before


@pytest.mark.parametrize("failure", ["must_refuse", "stream_status"])
def test_without_a_description_or_stream_it_goes_through_tvm_ffi(numbers: Called, failure: str) -> None:
    numbers[failure] = 1
    numbers.check(torch.zeros(3, 32), None, 1.0, 1, described=False)


def test_other_threads_run_while_a_launch_waits(numbers: Called) -> None:
    """It waits while a device's queue is full, perhaps for what another thread launches elsewhere."""
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            numbers.fast(torch.zeros(3, 32), None, 1.0, 1)
        except RuntimeError as error:
            errors.append(error)

    numbers["is_waiting"], numbers["must_wait"] = 0, 1
    thread = threading.Thread(target=launch)
    thread.start()
    while not numbers["is_waiting"] and thread.is_alive():
        pass
    numbers["must_wait"] = 0
    thread.join()
    assert not errors


@pytest.mark.parametrize("way", ["described", "ordinary", "wrong", "failing"])
def test_calls_leave_no_references_and_no_memory(numbers: Called, way: str) -> None:
    x = torch.zeros(3, 32)
    count: Any = {"ordinary": Number(10**6), "wrong": 1.5}.get(way, 10**6)
    scale = 0.123
    numbers["launch_status"] = way == "failing"
    kept = (x, None, count, scale, torch.Tensor, numbers.fast, *numbers.fast.__self__)

    def call(times: int) -> None:
        for _ in range(times):
            try:
                numbers.fast(x, None, scale, count)
            except (RuntimeError, TypeError):
                assert way in ("wrong", "failing")

    def memory() -> tuple[list[int], int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return [sys.getrefcount(each) for each in kept], pages

    call(1000)
    references, pages = memory()
    call(10_000)
    references_after, pages_after = memory()
    # Immortal or not, None and the types may gain and lose a few by what else runs.
    assert all(abs(after - before) < 100 for before, after in zip(references, references_after, strict=True))
    assert references_after[0] == references[0]
    assert pages_after - pages < 40  # 16 bytes a call


def test_a_function_outlives_what_it_was_loaded_by(functions: dict[tuple[bool, bool], Called]) -> None:
    called = functions[False, False]
    again = load_library(called.path, "every_kind")
    assert isinstance(again, types.BuiltinFunctionType)
    assert again.__name__ == "every_kind"
    assert again.__self__[0] is not called.fast.__self__[0]
    del again
    gc.collect()
    for each in on_cuda(called):
        each.check(torch.zeros(3, 32), None, 1.0, 1)


def changed_api(word: int, value: int) -> Any:
    """A capsule of torch's API with one of its words changed, and what must live as long."""
    words = (ctypes.c_uint64 * API_WORDS).from_buffer_copy(ctypes.string_at(exchange_api(), 8 * API_WORDS))
    words[word] = value
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(words), b"dlpack_exchange_api", None), words


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, 2), (DESCRIBE, 0), (CURRENT_STREAM, 0), (None, 0)],
    ids=["major version", "no description", "no stream", "no capsule"],
)
def test_another_exchange_api_is_left_to_tvm_ffi(
    numbers: Called, monkeypatch: pytest.MonkeyPatch, word: int | None, value: int
) -> None:
    capsule, words = ("no capsule", None) if word is None else changed_api(word, value)
    monkeypatch.setattr(torch.Tensor, EXCHANGE_API, capsule)
    assert isinstance(load_library(numbers.path, "every_kind"), tvm_ffi.Function)
    monkeypatch.delattr(torch.Tensor, EXCHANGE_API)
    assert isinstance(load_library(numbers.path, "every_kind"), tvm_ffi.Function)
    monkeypatch.undo()
    numbers.check(torch.zeros(3, 32), None, 1.0, 1)
    del words


def test_tvm_ffi_can_be_told_not_to_use_the_exchange_api(
    numbers: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SKIP_EXCHANGE_API, "1")
    assert isinstance(load_library(numbers.path, "every_kind"), tvm_ffi.Function)


def test_another_layout_of_objects_is_left_to_tvm_ffi(numbers: Called) -> None:
    bind = ctypes.PyDLL(str(numbers.path)).cute_kernels_bind
    bind.argtypes, bind.restype = (ctypes.py_object, ctypes.py_object), ctypes.py_object
    kept = list(numbers.fast.__self__)
    assert isinstance(bind(tuple(kept), getattr(torch.Tensor, EXCHANGE_API)), types.BuiltinFunctionType)
    kept[3] = int  # which the word at a type's place would be, were it elsewhere
    assert bind(tuple(kept), getattr(torch.Tensor, EXCHANGE_API)) is kept[0]
