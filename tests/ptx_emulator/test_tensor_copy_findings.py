"""What tensor copies report: places, sizes and coordinates that a GPU refuses, missing fences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from copies import aligned, map_of, tensor_map_array
from harness import reports_of, run_kernel
from ptx_emulator import EmulationError
from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.tensor_map import DataType, Swizzle, TensorMap
from test_tensor_copy import ALONE, INIT, WAIT, coordinates, load, numbered, store

ISSUE = """
    @!%p20 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 256;
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%r21], [%rd2, {0, 0}], [%r20];
    ISSUED:
"""


@pytest.mark.parametrize(
    ("base", "shared_bytes", "kind"), [(1024 + 16, 4096, "misaligned"), (1024, 1024 + 128, "out-of-bounds")]
)
def test_a_destination_that_does_not_fit_is_reported(base: int, shared_bytes: int, kind: str):
    tensor = numbered((8, 32), np.uint32)
    arrays = (tensor, tensor_map_array(map_of(tensor, DataType.UINT32, (16, 4))))
    found = reports_of(
        INIT.format(base=base, count=1, sync=ALONE) + ISSUE + WAIT, *arrays, shared_bytes=shared_bytes
    )
    assert kind in found.replace("_", "-")


def test_a_tensor_map_over_more_than_the_tensor_is_reported():
    tensor = numbered((8, 32), np.uint32)
    beyond = TensorMap(DataType.UINT32, tensor.ctypes.data + 128 * 6, (32, 8), (128,), (16, 4))
    arrays = (tensor, tensor_map_array(beyond))
    found = reports_of(INIT.format(base=1024, count=1, sync=ALONE) + ISSUE + WAIT, *arrays, shared_bytes=4096)
    assert "out-of-bounds" in found.replace("_", "-")


@pytest.mark.parametrize("start", [(1, 0), (-2, 0), (6, 3)])
@pytest.mark.parametrize("direction", ["load", "store", "prefetch"])
def test_a_first_coordinate_that_is_no_multiple_of_16_bytes_is_reported(
    direction: str, start: tuple[int, int]
):
    tensor = numbered((8, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    wanted = (
        f"The first coordinate of a tensor copy, {start[0]}, is {4 * start[0]} bytes from the start of a row"
    )
    prefetch = f"cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd2, {coordinates(start)}];"
    copies: dict[str, Callable[[], Any]] = {
        "load": lambda: load(tensor, tensor_map, start),
        "store": lambda: store(tensor, tensor_map, start, bytes(256)),
        "prefetch": lambda: run_kernel(prefetch, tensor, tensor_map_array(tensor_map)),
    }
    with pytest.raises(EmulationError, match=wanted):
        copies[direction]()


@pytest.mark.parametrize("what", ["cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor"])
@pytest.mark.parametrize(("start", "dimension"), [((-4, 0), 0), ((0, -1), 1)])
def test_a_store_that_begins_before_the_tensor_is_reported(what: str, start: tuple[int, int], dimension: int):
    tensor = numbered((8, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4))
    operation = ".add" if "reduce" in what else ""
    with pytest.raises(
        EmulationError, match=f"Coordinate {dimension} of a tensor copy to global memory is -"
    ):
        store(tensor, tensor_map, start, bytes(256), what, operation)


def test_an_atom_that_hopper_does_not_have_is_reported():
    tensor = numbered((8, 32), np.uint32)
    tensor_map = map_of(tensor, DataType.UINT32, (16, 4), swizzle=Swizzle.B128_ATOM_32B)
    with pytest.raises(EmulationError, match="swizzle atom of more than 16 bytes needs sm_100"):
        store(tensor, tensor_map, (0, 0), bytes(512))
    with pytest.raises(UnsupportedInstruction, match="it needs sm_100f"):
        run_kernel("tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [%rd1], 1;", tensor)


def test_something_that_is_no_tensor_map_is_reported():
    tensor = numbered((8, 32), np.uint32)
    found = reports_of(
        INIT.format(base=1024, count=1, sync=ALONE) + ISSUE,
        tensor,
        aligned((128,), np.uint8),
        shared_bytes=4096,
    )
    assert "no tensor map" in found


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
def test_a_store_needs_a_proxy_fence(fence: str):
    tensor = numbered((8, 32), np.uint32)
    arrays = (tensor, tensor_map_array(map_of(tensor, DataType.UINT32, (16, 4))))
    found = reports_of(
        INIT.format(base=1024, count=1, sync=ALONE)
        + f"""
        shl.b32 %r30, %r1, 3; add.u32 %r30, %r30, %r21; st.shared.v2.u32 [%r30], {{%r1, %r1}};
        {fence}
        bar.sync 0;
        @!%p20 bra STORED;
        cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {{0, 0}}], [%r21];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        STORED:
        """,
        *arrays,
        shared_bytes=1280,
    )
    assert bool(found) == (not fence)
    assert fence or "race" in found
