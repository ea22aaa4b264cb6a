"""What launches hand to the driver, and what they refuse to: a driver that records, tensors of the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from kernel_dispatch import ArgumentError, as_arch
from kernel_testing.mla import Case, Inputs
from mla_core import DecodeProblem
from mla_core.specs import DecodeTensors
from mla_sm120 import config, launch
from mla_sm120.config import Division

pytest.importorskip("cuda.bindings.driver")

CPU_INDEX = -1  # of the plan: what get_device() says of tensors on the CPU
POINTERS = ("query", "out", "lse", "o_partial", "lse_partial", "block_tables", "seq_lens", "cum_seq_lens_q")
CASE = Case((300, 40), num_heads=16, q_len=2)


@dataclass
class Driver:
    """Records launches as (kernel, stream, parameters) and tensor maps by what they were encoded from."""

    stream: int = 0x100
    current_device: int = CPU_INDEX
    status: str = "CUDA_SUCCESS"
    context: int = 1  # of the calling thread, 0: none
    launched: list[tuple[int, int, bytes]] = field(default_factory=list)
    maps: list[launch.MapKey] = field(default_factory=list)

    @property
    def addresses(self) -> dict[str, int]:
        """Those in the last launch, by the name of what lies there; of the cache from its map."""
        parameters = self.launched[-1][2]
        values = launch.PARAMETERS.unpack_from(parameters, launch.TENSOR_MAP_BYTES)
        cache = int.from_bytes(parameters[:8], "little")
        return {"kv_cache": cache, **dict(zip(POINTERS, values, strict=False))}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    from ctypes import c_void_p, string_at

    from cuda.bindings import driver as bindings

    fake, SUCCESS = Driver(), bindings.CUresult.CUDA_SUCCESS

    def launch_kernel(config: Any, function: Any, pointers: int, extra: int) -> tuple[Any]:
        parameters = c_void_p.from_address(pointers).value
        assert parameters is not None
        fake.launched.append(
            (int(function), int(config.hStream), string_at(parameters, launch.PARAMETER_BYTES))
        )
        return (getattr(bindings.CUresult, fake.status),)

    def encode_map(key: launch.MapKey, problem: DecodeProblem) -> bytes:
        fake.maps.append(key)
        return key.address.to_bytes(8, "little") * (launch.TENSOR_MAP_BYTES // 8)

    monkeypatch.setattr(bindings, "cuLaunchKernelEx", launch_kernel)
    monkeypatch.setattr(bindings, "cuCtxGetCurrent", lambda: (SUCCESS, bindings.CUcontext(fake.context)))
    monkeypatch.setattr(launch, "encode_map", encode_map)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: fake.current_device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: fake.stream, raising=False)
    return fake


def launcher_of(inputs: Inputs, tactic: str = "m32") -> launch.Launcher:
    from cuda.bindings.driver import CUfunction

    problem = DecodeProblem(**inputs.sizes)
    division = Division.of(problem, as_arch("sm_90a"), tactic)
    return launch.Launcher(problem, division, CUfunction(1), CUfunction(2), CPU_INDEX, pdl=True)


def arguments_of(inputs: Inputs, launcher: launch.Launcher) -> DecodeTensors:
    workspace = torch.empty(max(1, launcher.division.partials.workspace_bytes), dtype=torch.uint8)
    scales = (inputs.case.scale, 1.0)
    outputs = (inputs.out, inputs.lse, workspace)
    return DecodeTensors(*inputs.positional, inputs.cum_seq_lens_q, *scales, *outputs)


def tensors_of(arguments: DecodeTensors) -> dict[str, torch.Tensor]:
    named = arguments._asdict().items()
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on another GPU."""

    def get_device(self) -> int:
        return 1

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


def test_parameters_follow_every_tensor(driver: Driver) -> None:
    inputs = Inputs(replace(CASE, q_lens=(2, 1)))
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    launcher(*arguments)
    assert [kernel for kernel, _, _ in driver.launched] == [1, 2]
    first = driver.launched[-1][2]
    launcher(*arguments)
    assert driver.launched[-1][2] == first
    for name, tensor in tensors_of(arguments).items():
        other = arguments._replace(**{name: tensor.clone()})
        launcher(*other)
        assert driver.launched[-1][2] != first, name
        found = driver.addresses
        assert found["o_partial"] == tensors_of(other)["workspace"].data_ptr()
        for where in found.keys() & tensors_of(other).keys():
            assert found[where] == tensors_of(other)[where].data_ptr(), f"{where} where {name} is new"
    launcher(*arguments)
    assert driver.launched[-1][2] == first


@pytest.mark.parametrize("ragged", [False, True])
def test_parts_of_a_call_begin_at_their_requests(driver: Driver, ragged: bool) -> None:
    from cuda.bindings.driver import CUfunction

    inputs = Inputs(Case((300, 40, 5), num_heads=16, q_len=2, q_lens=(2, 1, 2) if ragged else None))
    problem = DecodeProblem(**inputs.sizes)
    parts = config.parts(problem, replace(as_arch("sm_90a"), sm_count=2), "m32-tail")
    launchers = [
        launch.Launcher(
            part.problem, part.division, CUfunction(1), CUfunction(2), CPU_INDEX, True, part.first
        )
        for part in parts
    ]
    arguments = arguments_of(inputs, launchers[-1])
    launch.Launchers(launchers)(*arguments)
    assert [kernel for kernel, _, _ in driver.launched] == [1, 1, 2]  # the second part has splits
    tensors = tensors_of(arguments)
    both = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    expected = {"seq_lens": tensors["seq_lens"][2:], "block_tables": tensors["block_tables"][2:]}
    if ragged:
        expected["cum_seq_lens_q"] = tensors["cum_seq_lens_q"][2:]
    else:
        expected |= {name: tensors[name][2:] for name in ("query", "out", "lse")}
    found = driver.addresses
    for name, address in both.items():
        if name in found:
            assert found[name] == (expected[name].data_ptr() if name in expected else address), name
    del driver.launched[1:]
    assert all(driver.addresses[name] == both[name] for name in driver.addresses.keys() & both.keys())


@pytest.mark.parametrize("scale", ["softmax_scale", "output_scale"])
def test_parameters_follow_scales(driver: Driver, scale: str) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    seen = set()
    on_device = torch.tensor([0.5])
    for value in (0.25, 0.5, on_device, on_device.clone(), float(on_device.data_ptr())):
        launcher(*arguments._replace(**{scale: value}))
        seen.add(driver.launched[-1][2])
    assert len(seen) == 5


def test_a_view_of_the_same_memory_is_told_apart(driver: Driver) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    pages = len(inputs.kv_cache)
    for cache in (inputs.kv_cache, inputs.kv_cache[:-1], inputs.kv_cache[::2], inputs.kv_cache[:, ::2]):
        launcher(*arguments._replace(kv_cache=cache))
    strides = [(key.num_pages, key.page_stride, key.key_stride) for key in driver.maps]
    assert strides == [
        (pages, 64 * 576, 576),
        (pages - 1, 64 * 576, 576),
        (-(-pages // 2), 2 * 64 * 576, 576),
        (pages, 64 * 576, 2 * 576),
    ]


def test_parameters_of_layers_in_turn_are_packed_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CALLS_KEPT", 4)
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    layers = [
        arguments._replace(query=inputs.query.clone(), kv_cache=inputs.kv_cache.clone()) for _ in "12345"
    ]
    calls = launcher._threads.own.calls

    def run(layer: DecodeTensors) -> launch._Parameters:
        launcher(*layer)
        assert driver.addresses["query"] == layer.query.data_ptr()
        assert driver.addresses["kv_cache"] == layer.kv_cache.data_ptr()
        return next(reversed(calls.values()))

    packed = [run(layer) for layer in layers[:4]]
    for layer in layers[:4]:
        run(layer)
    assert list(calls.values()) == packed
    fifth = run(layers[4])  # in place of the first
    assert list(calls.values()) == [*packed[1:], fifth]
    run(layers[0])


def test_the_maps_of_caches_in_turn_are_encoded_once(driver: Driver) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    caches = [inputs.kv_cache.clone() for _ in range(3)]  # of layers of a model
    for cache in caches * 2:
        launcher(*arguments._replace(kv_cache=cache))
        assert driver.addresses["kv_cache"] == cache.data_ptr()
    assert [key.address for key in driver.maps] == [cache.data_ptr() for cache in caches]


def test_every_kernel_of_a_launch_is_on_the_current_stream(driver: Driver) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    arguments = arguments_of(inputs, launcher)
    streams = [0x100, 0x100, 0x200, 0, 0x100]
    for driver.stream in streams:
        launcher(*arguments)
    assert [(kernel, stream) for kernel, stream, _ in driver.launched] == [
        (kernel, stream) for stream in streams for kernel in (1, 2)
    ]


def test_threads_do_not_share_what_they_hand_over(driver: Driver) -> None:
    inputs, other = Inputs(CASE), Inputs(CASE)
    launcher = launcher_of(inputs)
    mine, its = arguments_of(inputs, launcher), arguments_of(other, launcher)
    launcher(*mine)
    first = driver.launched[-1]
    thread = threading.Thread(target=launcher, args=its)
    thread.start()
    thread.join()
    assert driver.launched[-1] != first
    (parameters,) = launcher._threads.own.calls.values()
    assert parameters.bytes.raw == first[2]
    launcher(*mine)
    assert driver.launched[-1] == first
    assert len(driver.maps) == 2


def test_the_current_device_has_to_be_that_of_the_plan(driver: Driver) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    driver.current_device = 3
    with pytest.raises(ArgumentError, match="query: on cpu with cuda:3 current, expected both"):
        launcher(*arguments_of(inputs, launcher))
    assert not driver.launched


def on_the_device(value: Any) -> Any:
    return torch.tensor([value]) if isinstance(value, float) else value


@pytest.mark.parametrize("name", DecodeTensors._fields)
def test_a_tensor_of_another_device_is_named(driver: Driver, name: str) -> None:
    inputs = Inputs(replace(CASE, q_lens=(2, 1)))
    launcher = launcher_of(inputs)
    arguments = DecodeTensors(*map(on_the_device, arguments_of(inputs, launcher)))
    wrong = getattr(arguments, name).clone().as_subclass(Elsewhere)

    def refused(call: Callable[[], None]) -> None:
        with pytest.raises(ArgumentError, match=rf"^{name}: on cuda:1.* expected .*cuda:-1"):
            call()

    refused(lambda: launcher(*arguments._replace(**{name: wrong})))
    assert not driver.launched
    launcher(*arguments)
    first = driver.launched[-1]
    refused(lambda: launcher(*arguments._replace(**{name: wrong})))
    assert driver.launched[-1] is first
    launcher(*arguments)
    assert driver.launched[-1] == first


def test_a_launch_that_fails_says_what_the_driver_said(driver: Driver) -> None:
    inputs = Inputs(CASE)
    launcher = launcher_of(inputs)
    driver.status = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(RuntimeError, match="launch failed, CUDA_ERROR_ILLEGAL_ADDRESS"):
        launcher(*arguments_of(inputs, launcher))
    assert len(driver.launched) == 1


def test_a_thread_without_a_context_gets_the_devices(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver as bindings

    inputs, calls = Inputs(CASE), []
    launcher = launcher_of(inputs)

    def answer(name: str, *values: object) -> Callable[..., tuple[Any, ...]]:
        def called(*arguments: object) -> tuple[Any, ...]:
            calls.append((name, *arguments))
            assert not driver.maps  # which the driver refuses without a context, as it does launches
            driver.context = int(name == "cuCtxSetCurrent" or driver.context)
            return bindings.CUresult.CUDA_SUCCESS, *values

        return called

    for name, *values in (
        ("cuDeviceGet", "device"),
        ("cuDevicePrimaryCtxRetain", "context"),
        ("cuCtxSetCurrent",),
        ("cuDevicePrimaryCtxRelease",),
    ):
        monkeypatch.setattr(bindings, name, answer(name, *values))
    driver.context = 0
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(launcher, *arguments_of(inputs, launcher)).result()
    assert calls == [
        ("cuDeviceGet", CPU_INDEX),
        ("cuDevicePrimaryCtxRetain", "device"),
        ("cuCtxSetCurrent", "context"),
        ("cuDevicePrimaryCtxRelease", "device"),
    ]
    assert len(driver.maps) == 1
    assert [kernel for kernel, _, _ in driver.launched] == [1, 2] * 2
    driver.context, driver.maps = 0, []
    refused = (bindings.CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE,)
    monkeypatch.setattr(bindings, "cuCtxSetCurrent", lambda context: refused)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="CUDA_ERROR_DEVICE_UNAVAILABLE"):
        pool.submit(launcher, *arguments_of(inputs, launcher)).result()


def test_the_stride_of_one_page_means_nothing(driver: Driver) -> None:
    inputs = Inputs(replace(CASE, lengths=(40,)))
    page = torch.zeros(1, inputs.case.page_size, 576, dtype=torch.bfloat16)
    launcher = launcher_of(inputs)
    for stride in (7, page.stride(0)):
        cache = page.as_strided(page.shape, (stride, 576, 1))
        launcher(*arguments_of(inputs, launcher)._replace(kv_cache=cache))
    assert {key.page_stride for key in driver.maps} == {page.stride(0)}
