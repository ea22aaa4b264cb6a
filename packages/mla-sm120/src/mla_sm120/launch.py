"""Launches: parameters packed as `cuda/params.h` lays them out, and calls of the driver, one or two a part.

The driver is called through cuda-bindings. The parameters of calls are kept, as the layers of a model, which
share a plan, make the same calls again at each step; so are the tensor maps of their caches.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from kernel_dispatch import ArgumentError
from mla_core import DecodeProblem
from mla_core.specs import DecodeTensors

from .config import (
    BOX_KEYS,
    COMBINE_ITEMS_PER_ROW,
    KV_LORA_RANK,
    QK_ROPE_HEAD_DIM,
    SMEM_BYTES,
    Division,
    block_threads,
    row_tiles_of,
)
from .load import checked

COMBINE_WARPS = 16  # of a block of the combine kernel
COMBINE_PARTIALS_PER_WARP = 4  # at least, where an item has several warps
CHUNK_ELEMENTS = 64
CHUNKS = (KV_LORA_RANK + QK_ROPE_HEAD_DIM) // CHUNK_ELEMENTS
TENSOR_MAP_BYTES = 128
CALLS_KEPT = MAPS_KEPT = 256  # of a plan: more than a model has layers
STRIDE_ALIGN_BYTES = 16  # of the address and the strides of what TMA reads
OUT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2}

# DecodeParams after the tensor map: pointers, strides in elements, scales, sizes and flags.
PARAMETERS = struct.Struct("<10Q9q2f10i")
PARAMETER_BYTES = 384


class MapKey(NamedTuple):
    """What a tensor map is encoded from; strides in elements."""

    address: int
    num_pages: int
    page_stride: int
    key_stride: int


class _Parameters:
    """The parameters of a call, and `address`: of the array of pointers to them that the driver takes."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(PARAMETER_BYTES)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.bytes))
        self.address = ctypes.addressof(self._pointers)


class _State:
    """What launches of one thread hand to the driver: parameters, and configurations on one stream.

    calls: parameters by all that they are made of, those of the latest CALLS_KEPT different calls.
    """

    def __init__(self, configs: list[tuple[Any, Any]]) -> None:
        self.calls: dict[tuple[Any, ...], _Parameters] = {}
        self.configs = configs
        self.stream: int | None = None
        self.launch = _driver().cuLaunchKernelEx


class _Threads(threading.local):
    """A state for each thread, in one attribute, for each read of a thread-local's takes time."""

    def __init__(self, make_configs: Callable[[], list[tuple[Any, Any]]]) -> None:
        self.own = _State(make_configs())


class Launcher:
    """Launches one problem on one device; takes what every launcher of `mla_core.decode.v1` takes.

    first_request: of the call whose tensors it is given; it launches as many from there on as `problem` has.
    """

    def __init__(
        self,
        problem: DecodeProblem,
        division: Division,
        decode: Any,
        combine: Any,
        device_index: int,
        pdl: bool,
        first_request: int = 0,
    ) -> None:
        self.problem = problem
        self.division = division
        self._decode = decode
        self._combine = combine
        self._device_index = device_index
        self._pdl = pdl
        self._requests = slice(first_request, first_request + problem.batch)
        self._out_type = OUT_TYPES[problem.out_dtype]
        self._encode_map = lru_cache(MAPS_KEPT)(partial(encode_map, problem=problem))
        self._threads = _Threads(self._make_configs)

    def __call__(
        self,
        query: torch.Tensor,  # [batch, q_len, num_heads, 576], or ragged [total_q, num_heads, 576]
        kv_cache: torch.Tensor,  # [num_pages, page_size, 576]
        block_tables: torch.Tensor,  # [batch, max_pages] int32
        seq_lens: torch.Tensor,  # [batch] int32
        cum_seq_lens_q: torch.Tensor | None,  # [batch + 1] int32
        softmax_scale: float | torch.Tensor,
        output_scale: float | torch.Tensor,
        out: torch.Tensor,  # [..., num_heads, 512]
        lse: torch.Tensor | None,  # [..., num_heads] float32
        workspace: torch.Tensor | None,
    ) -> None:
        """Write `out` and, where given, `lse`, on the current stream of the device."""
        index = self._device_index
        current = torch._C._cuda_getDevice()
        if query.get_device() != index or current != index:
            raise ArgumentError(
                "query",
                f"on {query.device} with cuda:{current} current, expected both to be cuda:{index}, which the "
                f"plan is for",
            )
        state = self._threads.own
        # All that the parameters are made of. stride() takes 0.1 us, stride(0) 0.9.
        call = (
            query.data_ptr(),
            query.stride(),
            kv_cache.data_ptr(),
            kv_cache.numel(),  # changes with shape[0], which takes longer to read
            kv_cache.stride(),
            block_tables.data_ptr(),
            block_tables.stride(),
            seq_lens.data_ptr(),
            None if cum_seq_lens_q is None else cum_seq_lens_q.data_ptr(),
            softmax_scale if type(softmax_scale) is float else _scale_key(softmax_scale),
            output_scale if type(output_scale) is float else _scale_key(output_scale),
            out.data_ptr(),
            out.stride(),
            None if lse is None else (lse.data_ptr(), lse.stride()),
            None if workspace is None else workspace.data_ptr(),
        )
        parameters = state.calls.get(call)
        if parameters is None:
            arguments = DecodeTensors(
                query,
                kv_cache,
                block_tables,
                seq_lens,
                cum_seq_lens_q,
                softmax_scale,
                output_scale,
                out,
                lse,
                workspace,
            )
            if not state.calls:  # the thread's first
                enter_context(index)
            parameters = self._parameters(arguments)
            if len(state.calls) == CALLS_KEPT:
                del state.calls[next(iter(state.calls))]
            state.calls[call] = parameters
        stream = torch._C._cuda_getCurrentRawStream(index)
        if stream != state.stream:
            state.stream = None  # until all are on it
            for config, _ in state.configs:
                config.hStream = stream
            state.stream = stream
        for config, function in state.configs:
            (status,) = state.launch(config, function, parameters.address, 0)
            if status:
                raise RuntimeError(f"mla-sm120: launch failed, {status.name}")

    def _parameters(self, given: DecodeTensors) -> _Parameters:
        """The tensor map and what `_pack` adds, of tensors that have to be on the plan's device."""
        for name, value in zip(DecodeTensors._fields, given, strict=True):
            if isinstance(value, torch.Tensor) and value.get_device() != self._device_index:
                raise ArgumentError(
                    name, f"on {value.device}, expected cuda:{self._device_index}, which the plan is for"
                )
        cache = given.kv_cache
        page_stride, key_stride, _ = cache.stride()
        if cache.shape[0] == 1:  # it means nothing, and may be what no tensor map takes
            page_stride = self.problem.page_size * key_stride
        key = MapKey(cache.data_ptr(), cache.shape[0], page_stride, key_stride)
        parameters = _Parameters()
        ctypes.memmove(parameters.bytes, self._encode_map(key), TENSOR_MAP_BYTES)
        self._pack(parameters.bytes, given)
        return parameters

    def _pack(self, into: Any, given: DecodeTensors) -> None:
        problem, division = self.problem, self.division
        given = _of_requests(given, self._requests)
        query, out, lse = given.query, given.out, given.lse
        assert out is not None
        # A ragged query has no dimension of requests.
        ragged = given.cum_seq_lens_q is not None
        query_stride = (0, *query.stride()) if ragged else query.stride()
        out_stride = (0, *out.stride()) if ragged else out.stride()
        lse_stride: tuple[int, ...] = (0, 0)
        if lse is not None:
            lse_stride = (0, lse.stride()[0]) if ragged else lse.stride()[:2]
        query_address, out_address = query.data_ptr(), out.data_ptr()
        query_units = STRIDE_ALIGN_BYTES // query.element_size()
        query_aligned = query_address % STRIDE_ALIGN_BYTES == 0 and not any(
            s % query_units for s in query_stride[:3]
        )
        out_aligned = out_address % (2 * out.element_size()) == 0 and not any(s % 2 for s in out_stride[:3])
        o_partial = 0
        if division.num_partials > 1:
            assert given.workspace is not None
            o_partial = given.workspace.data_ptr()
        PARAMETERS.pack_into(
            into,
            TENSOR_MAP_BYTES,
            query_address,
            out_address,
            _address(lse),
            o_partial,
            o_partial + division.partials.o_partial_bytes if o_partial else 0,
            _address(given.block_tables),
            _address(given.seq_lens),
            _address(given.cum_seq_lens_q),
            _address(given.softmax_scale),
            _address(given.output_scale),
            *query_stride[:3],
            *out_stride[:3],
            *lse_stride,
            given.block_tables.stride()[0],
            0.0 if isinstance(given.softmax_scale, torch.Tensor) else given.softmax_scale,
            0.0 if isinstance(given.output_scale, torch.Tensor) else given.output_scale,
            problem.batch,
            problem.q_len,
            problem.num_heads,
            problem.page_size.bit_length() - 1,
            division.num_splits,
            self._out_type,
            query_aligned,
            out_aligned,
            division.num_partials,
            division.splits.key_tiles,
        )

    def _make_configs(self) -> list[tuple[Any, Any]]:
        problem, division = self.problem, self.division
        grid = (row_tiles_of(problem, division.tile_rows), division.num_splits, problem.batch)
        block = (block_threads(division.tile_rows), 1, 1)
        configs = [(self._config(grid, block, SMEM_BYTES, division.cluster_size), self._decode)]
        if division.num_partials > 1:
            configs.append((self._config(*combine_sizes(problem, division.num_partials), 0), self._combine))
        return configs

    def _config(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], smem_bytes: int, cluster_size: int = 1
    ) -> Any:
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = smem_bytes
        attributes = []
        if self._pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster_size > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = 1, cluster_size, 1
            attributes.append(attribute)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        return config


class Launchers:
    """Launches the parts of a call, one after the other; takes what a `Launcher` takes."""

    def __init__(self, parts: Sequence[Launcher]) -> None:
        self.parts = tuple(parts)

    def __call__(self, *arguments: Any) -> None:
        """Write `out` and, where given, `lse`, on the current stream of the device."""
        for launch in self.parts:
            launch(*arguments)


def _of_requests(given: DecodeTensors, requests: slice) -> DecodeTensors:
    """Views of what these requests have; offsets into a ragged query stay what they are."""
    if given.seq_lens.numel() == requests.stop - requests.start:  # all there are
        return given
    found = given._replace(block_tables=given.block_tables[requests], seq_lens=given.seq_lens[requests])
    if given.cum_seq_lens_q is not None:
        offsets = slice(requests.start, requests.stop + 1)
        return found._replace(cum_seq_lens_q=given.cum_seq_lens_q[offsets])
    assert given.out is not None
    lse = None if given.lse is None else given.lse[requests]
    return found._replace(query=given.query[requests], out=given.out[requests], lse=lse)


def _address(given: float | torch.Tensor | None) -> int:
    """Where a tensor lies; 0 for what is no tensor."""
    return given.data_ptr() if isinstance(given, torch.Tensor) else 0


def _scale_key(scale: float | torch.Tensor) -> Any:
    # An address in a tuple, which no float is equal to.
    return (scale.data_ptr(),) if isinstance(scale, torch.Tensor) else float(scale)


def combine_sizes(
    problem: DecodeProblem, num_partials: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block of the combine kernel; an item is a row and a quarter of its columns."""
    warps = 1
    while warps < COMBINE_WARPS and warps * COMBINE_PARTIALS_PER_WARP < num_partials:
        warps *= 2
    items = COMBINE_WARPS // warps
    total = problem.batch * problem.rows * COMBINE_ITEMS_PER_ROW
    return (-(-total // items), 1, 1), (32, warps, items)


def combine_name(problem: DecodeProblem, num_partials: int, sm_count: int) -> str:
    """The combine kernel for a grid: where no SM gets a second block, the one that takes a whole SM."""
    (blocks, _, _), _ = combine_sizes(problem, num_partials)
    return "mla_combine" if blocks <= sm_count else "mla_combine_many"


def map_shape(
    key: MapKey, page_size: int, element_bytes: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Dimensions, strides in bytes (but the first) and box of a cache's tensor map.

    Columns are cut into chunks of 64, so that a box arrives as [9 chunks, 16 keys, 64 columns].
    """
    dims = (CHUNK_ELEMENTS, page_size, CHUNKS, key.num_pages)
    strides = (key.key_stride, CHUNK_ELEMENTS, key.page_stride)
    return dims, tuple(stride * element_bytes for stride in strides), (CHUNK_ELEMENTS, BOX_KEYS, CHUNKS, 1)


def encode_map(key: MapKey, problem: DecodeProblem) -> bytes:
    """The tensor map of a cache. Raises ArgumentError naming kv_cache where TMA cannot read it."""
    driver = _driver()
    element_bytes = problem.kv_dtype.itemsize
    dims, strides, box = map_shape(key, problem.page_size, element_bytes)
    for what, value in (("its address", key.address), *(("a stride in bytes", stride) for stride in strides)):
        if value % STRIDE_ALIGN_BYTES:
            raise ArgumentError(
                "kv_cache",
                f"{what} is {value}, expected a multiple of {STRIDE_ALIGN_BYTES} for this provider",
            )
    types = driver.CUtensorMapDataType
    # By the bytes of a chunk, as in `cuda/config.h`.
    swizzles = {
        64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
    }
    number = driver.cuuint32_t
    size = driver.cuuint64_t
    status, tensor_map = driver.cuTensorMapEncodeTiled(
        types.CU_TENSOR_MAP_DATA_TYPE_UINT8 if element_bytes == 1 else types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        len(dims),
        key.address,
        [size(dim) for dim in dims],
        [size(stride) for stride in strides],
        [number(extent) for extent in box],
        [number(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles[CHUNK_ELEMENTS * element_bytes],
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status:
        raise ArgumentError("kv_cache", f"no tensor map for shape {dims}, strides {strides}: {status.name}")
    return ctypes.string_at(int(tensor_map.getPtr()), TENSOR_MAP_BYTES)


def enter_context(device_index: int) -> None:
    """Give this thread the device's primary context, the one that PyTorch uses, if it has none.

    The CUDA runtime does so at a thread's first call that needs it; the driver never does, and refuses tensor
    maps and launches. Raises RuntimeError.
    """
    driver = _driver()
    if int(checked(driver.cuCtxGetCurrent())):
        return
    device = checked(driver.cuDeviceGet(device_index))
    context = checked(driver.cuDevicePrimaryCtxRetain(device))
    checked(driver.cuCtxSetCurrent(context))
    checked(driver.cuDevicePrimaryCtxRelease(device))  # PyTorch holds it, or its tensors would not be


def _driver() -> Any:
    from cuda.bindings import driver

    return driver
