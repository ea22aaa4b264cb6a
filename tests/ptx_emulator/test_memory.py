"""Loads and stores in all spaces, conversions of addresses, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from aligned import aligned, poisoned
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_emulator.errors import EmulatorError

LANES = 32
rng = np.random.default_rng(20)


def random_bytes(count: int) -> np.ndarray:
    return aligned(rng.integers(0, 256, count, dtype=np.uint8))


def own_element(size: int) -> str:
    """%rd5 and %rd6 become the addresses of element %tid.x of the first two arrays."""
    return f"""
    mul.wide.u32 %rd7, %r1, {size};
    add.u64 %rd5, %rd1, %rd7;
    add.u64 %rd6, %rd2, %rd7;
    """


REGISTER = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd", 128: "%rq"}


def registers(bits: int, count: int) -> str:
    names = [f"{REGISTER[bits]}{n + 1 if bits == 128 else n + 20}" for n in range(count)]
    return names[0] if count == 1 else "{" + ", ".join(names) + "}"


# Kinds of memory that a copy passes through: how it is addressed, and what stores and loads there.
SHARED_ADDRESS = "mov.u32 %r5, smem; mad.lo.u32 %r5, %r1, {size}, %r5;"
PLACES = {
    "global": ("", None, None),
    "shared": (SHARED_ADDRESS, "shared", "%r5"),
    "shared-cta": (SHARED_ADDRESS, "shared::cta", "%r5"),
    "shared-cluster": (SHARED_ADDRESS, "shared::cluster", "%r5"),
    "shared-64": (SHARED_ADDRESS + "cvt.u64.u32 %rd9, %r5;", "shared", "%rd9"),
    "shared-generic": (SHARED_ADDRESS + "cvt.u64.u32 %rd8, %r5; cvta.shared.u64 %rd9, %rd8;", "", "%rd9"),
    "local": ("mov.u64 %rd9, frame;", "local", "%rd9"),
    "local-generic": ("mov.u64 %rd8, frame; cvta.local.u64 %rd9, %rd8;", "", "%rd9"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("bits", "count"),
    [(8, 1), (8, 4), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2), (128, 1)],
)
def test_copy(place: str, bits: int, count: int) -> None:
    prepare, space, address = PLACES[place]
    size = bits * count // 8
    source = random_bytes(LANES * size)
    result = poisoned(LANES * size, np.uint8)
    vector = f".v{count}" if count > 1 else ""
    held = registers(bits, count)
    body = ".local .align 16 .b8 frame[16];\n" + own_element(size) + prepare.format(size=size)
    body += f"ld.global{vector}.b{bits} {held}, [%rd5];\n"
    if address:
        word = f".{space}" if space else ""
        body += f"st{word}{vector}.b{bits} [{address}], {held};\n"
        body += "".join(
            f"mov.b{bits} {name}, 0;\n" for name in held.strip("{}").split(", ") if bits in (32, 64)
        )
        body += f"ld{word}{vector}.b{bits} {held}, [{address}];\n"
    body += f"st.global{vector}.b{bits} [%rd6], {held};\n"
    run_kernel(body, source, result, shared_bytes=LANES * size)
    np.testing.assert_array_equal(result, source)


@pytest.mark.parametrize(("vector", "bits"), [("v8", 32), ("v4", 64)])
def test_256_bits(vector: str, bits: int) -> None:
    source, result = random_bytes(LANES * 32), poisoned(LANES * 32, np.uint8)
    held = registers(bits, int(vector[1]))
    body = own_element(32) + f"ld.global.L2::evict_last.{vector}.b{bits} {held}, [%rd5];"
    body += f"st.global.{vector}.b{bits} [%rd6], {held};"
    run_kernel(body, source, result, target="sm_100a")
    np.testing.assert_array_equal(result, source)
    with pytest.raises(EmulatorError, match="needs sm_100"):
        run_kernel(body, source, result, target="sm_90a")


@pytest.mark.parametrize(("register", "width"), [("%rs", 16), ("%r", 32), ("%rd", 64)])
@pytest.mark.parametrize("type_name", ["u8", "s8", "b8", "u16", "s16", "u32", "s32"])
def test_extension(type_name: str, register: str, width: int) -> None:
    bits = int(type_name[1:])
    if bits > width:
        pytest.skip("the register is too narrow")
    unsigned = np.dtype(f"u{bits // 8}")
    values = aligned(rng.integers(0, 2**bits, LANES, dtype=unsigned))
    result = poisoned(LANES, f"u{width // 8}")
    body = own_element(bits // 8) + f"ld.global.{type_name} {register}20, [%rd5];"
    body += f"mul.wide.u32 %rd7, %r1, {width // 8}; add.u64 %rd6, %rd2, %rd7;"
    body += f"st.global.b{width} [%rd6], {register}20;"
    run_kernel(body, values, result)
    signed = values.view(f"i{bits // 8}") if type_name[0] == "s" else values
    np.testing.assert_array_equal(result, signed.astype(f"i{width // 8}").view(result.dtype))


@pytest.mark.parametrize(("register", "width"), [("%r", 32), ("%rd", 64)])
def test_store_takes_the_low_bits(register: str, width: int) -> None:
    values = aligned(rng.integers(0, 2**width, LANES, dtype=f"u{width // 8}"))
    result = poisoned(LANES, np.uint8)
    body = own_element(width // 8) + f"ld.global.b{width} {register}20, [%rd5];"
    body += f"cvt.u64.u32 %rd7, %r1; add.u64 %rd6, %rd2, %rd7; st.global.u8 [%rd6], {register}20;"
    run_kernel(body, values, result)
    np.testing.assert_array_equal(result, values.astype(np.uint8))


@pytest.mark.parametrize(
    "load",
    [
        "ld.global.nc.b32 %r20, [%rd5]",
        "ld.global.L1::no_allocate.L2::128B.b32 %r20, [%rd5]",
        "ld.global.L1::evict_first.L2::cache_hint.b32 %r20, [%rd5], %rd30",
        "ld.volatile.global.b32 %r20, [%rd5]",
        "ld.relaxed.gpu.global.b32 %r20, [%rd5]",
        "ld.acquire.sys.b32 %r20, [%rd5]",
        "ld.mmio.relaxed.sys.global.b32 %r20, [%rd5]",
        "ld.weak.global.cg.b32 %r20, [%rd5]",
        "ldu.global.b32 %r20, [%rd5]",
    ],
)
@pytest.mark.parametrize(
    "store",
    [
        "st.global.cs.b32 [%rd6], %r20",
        "st.release.gpu.global.b32 [%rd6], %r20",
        "st.relaxed.cluster.b32 [%rd6], %r20",
        "st.volatile.global.b32 [%rd6], %r20",
        "st.weak.global.wt.b32 [%rd6], %r20",
        "st.global.L2::cache_hint.b32 [%rd6], %r20, %rd30",
    ],
)
def test_modifiers(load: str, store: str) -> None:
    source, result = random_bytes(128), poisoned(128, np.uint8)
    policy = "createpolicy.fractional.L2::evict_first.b64 %rd30, 1.0;"
    run_kernel(own_element(4) + policy + load + ";" + store + ";", source, result)
    np.testing.assert_array_equal(result, source)


@pytest.mark.parametrize("name", ["ld.global.L3::evict.b32", "ld.shared::cluster.sc.b32", "ld.global.f16"])
def test_unknown_modifier(name: str) -> None:
    with pytest.raises(EmulatorError, match="not supported"):
        run_kernel(f"{name} %r20, [%rd1];", np.zeros(32, np.uint32))


def test_partial_warp_and_guard() -> None:
    source, result = random_bytes(128).view(np.uint32), poisoned(LANES, np.uint32)
    body = own_element(4) + "and.b32 %r4, %r1, 5; setp.eq.u32 %p1, %r4, 1; mov.b32 %r20, 7;"
    body += "@%p1 ld.global.b32 %r20, [%rd5]; @!%p1 st.global.b32 [%rd6], %r20;"
    body += "@%p1 st.global.b32 [%rd6+0], %r20;"
    run_kernel(body, source, result)
    chosen = np.arange(LANES) & 5 == 1
    np.testing.assert_array_equal(result, np.where(chosen, source, 7))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_generic_gather_and_scatter(seed: int) -> None:
    """Each lane reads and writes at a place of its own, in global, shared or local memory."""
    pick = np.random.default_rng(seed)
    tables = aligned(pick.integers(0, 2**32, (2, 64), dtype=np.uint32))
    index = aligned(pick.permutation(64)[:LANES].astype(np.uint32))
    space = aligned(pick.integers(0, 3, LANES, dtype=np.uint32))
    result, scattered = poisoned(LANES, np.uint32), poisoned(64, np.uint32)
    body = """
    .local .align 8 .b8 frame[8];
    add.u64 %rd10, %rd2, %rd0; ld.global.b32 %r10, [%rd10]; mul.wide.u32 %rd11, %r10, 4;
    add.u64 %rd12, %rd3, %rd0; ld.global.b32 %r12, [%rd12];
    setp.eq.u32 %p1, %r12, 1; setp.eq.u32 %p2, %r12, 2;
    add.u64 %rd13, %rd1, %rd0; mov.u32 %r13, smem; mad.lo.u32 %r13, %r1, 4, %r13;
    ld.global.b32 %r14, [%rd13+256]; st.shared.b32 [%r13], %r14;
    ld.global.b32 %r15, [%rd13+384]; st.shared.b32 [%r13+128], %r15; st.local.b32 [frame+4], %r1;
    bar.warp.sync 0xffffffff;
    add.u64 %rd14, %rd1, %rd11;
    mov.u64 %rd15, smem; add.u64 %rd15, %rd15, %rd11; cvta.shared.u64 %rd15, %rd15;
    cvta.local.u64 %rd16, frame; add.u64 %rd16, %rd16, 4;
    selp.b64 %rd17, %rd15, %rd14, %p1; selp.b64 %rd17, %rd16, %rd17, %p2;
    ld.b32 %r16, [%rd17]; add.u64 %rd18, %rd4, %rd0; st.global.b32 [%rd18], %r16;
    add.u64 %rd19, %rd5, %rd11; st.b32 [%rd19], %r1;
    """
    run_kernel(body, tables, index, space, result, scattered, shared_bytes=256)
    lane = np.arange(LANES, dtype=np.uint32)
    expected = np.choose(space, [tables[0, index], tables[1, index], lane])
    np.testing.assert_array_equal(result, expected)
    written = poisoned(64, np.uint32)
    written[index] = lane
    np.testing.assert_array_equal(scattered, written)


def test_discard_is_a_write() -> None:
    data = aligned(np.zeros(64, np.uint32))
    run_kernel("discard.global.L2 [%rd1+128], 128;", data)
    found = findings("discard.global.L2 [%rd1+64], 128; discard.global.L2 [%rd1+256], 128;", data)
    assert [kind for kind, _, _ in found] == ["misaligned", "out-of-bounds"]


def test_sink_and_negative_offset() -> None:
    source, result = random_bytes(LANES * 16 + 16), poisoned(LANES, np.uint32)
    body = "mul.wide.u32 %rd7, %r1, 16; add.u64 %rd5, %rd1, %rd7; add.u64 %rd6, %rd2, %rd0;"
    body += "ld.global.v4.b32 {_, _, %r20, _}, [%rd5+16]; st.global.b32 [%rd6+-0], %r20;"
    body += "ld.global.b32 %r21, [%rd5+-0]; add.u64 %rd8, %rd5, 16; ld.global.b32 %r22, [%rd8+-8];"
    run_kernel(body, source, result)
    np.testing.assert_array_equal(result, source.view(np.uint32)[4:].reshape(LANES, 4)[:, 2])


def test_variables() -> None:
    result = poisoned(LANES, np.uint32)
    module = """
    .const .align 4 .b8 table[128] = {"""
    module += ", ".join(str(n) for n in np.arange(LANES, dtype=np.uint32).view(np.uint8)) + "};\n"
    module += ".global .align 4 .b8 pool[256];"
    body = """
    mov.u64 %rd5, table; add.u64 %rd5, %rd5, %rd0; ld.const.b32 %r20, [%rd5];
    mov.u64 %rd8, pool; add.u64 %rd8, %rd8, %rd0; st.global.b32 [%rd8+128], %r20;
    cvta.const.u64 %rd9, %rd5; ld.b32 %r21, [%rd9]; ld.global.b32 %r22, [%rd8+128];
    add.u32 %r23, %r21, %r22; add.u64 %rd6, %rd1, %rd0; st.global.b32 [%rd6], %r23;
    """
    run_kernel(body, result, globals=module)
    np.testing.assert_array_equal(result, 2 * np.arange(LANES, dtype=np.uint32))


def test_parameters_by_address() -> None:
    result = poisoned(3, np.uint64)
    body = """
    mov.b64 %rd5, array1; ld.param.b64 %rd6, [%rd5]; cvta.param.u64 %rd7, %rd5; ld.b64 %rd8, [%rd7];
    ld.param.b32 %r5, [array1+4]; ld.param.v2.b32 {%r6, %r7}, [array1]; mov.b64 %rd9, {%r6, %r5};
    st.global.b64 [%rd1], %rd6; st.global.b64 [%rd1+8], %rd8; st.global.b64 [%rd1+16], %rd9;
    """
    run_kernel("setp.eq.u32 %p1, %r1, 0; @!%p1 bra DONE;" + body + "DONE:", result)
    assert set(result.tolist()) == {result.ctypes.data}


def test_local_memory_is_private() -> None:
    result = poisoned((2, LANES), np.uint32)
    body = """
    .local .align 4 .b8 frame[64];
    mov.u64 %rd5, frame; st.local.b32 [%rd5+60], %r1; cvta.local.u64 %rd6, %rd5;
    ld.b32 %r20, [%rd6+60]; add.u64 %rd7, %rd1, %rd0; st.global.b32 [%rd7], %r20;
    """
    run_kernel(body, result, block=(64, 1, 1))
    np.testing.assert_array_equal(result.ravel(), np.arange(64))


# ---------------------------------------------------------------------------------------------- addresses


def test_conversions_return() -> None:
    result = poisoned(4, np.uint64)
    body = """
    .local .b32 frame;
    mov.u64 %rd5, smem; cvta.shared.u64 %rd6, %rd5; cvta.to.shared.u64 %rd7, %rd6; sub.u64 %rd8, %rd7, %rd5;
    cvta.local.u64 %rd10, frame; cvta.to.local.u64 %rd11, %rd10; mov.u64 %rd12, frame;
    sub.u64 %rd13, %rd11, %rd12;
    cvta.global.u64 %rd14, %rd1; cvta.to.global.u64 %rd15, %rd14; sub.u64 %rd16, %rd15, %rd1;
    cvta.shared::cluster.u64 %rd17, %rd5; sub.u64 %rd18, %rd17, %rd6;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 st.global.v2.b64 [%rd1], {%rd8, %rd13};
    @%p1 st.global.v2.b64 [%rd1+16], {%rd16, %rd18};
    """
    run_kernel(body, result, shared_bytes=16)
    np.testing.assert_array_equal(result, 0)


def test_isspacep() -> None:
    spaces = ("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param")
    result = poisoned((5, len(spaces)), np.uint32)
    body = """
    .local .b32 frame;
    mov.u64 %rd5, smem; cvta.shared.u64 %rd10, %rd5; cvta.local.u64 %rd11, frame; mov.u64 %rd12, %rd1;
    cvta.param.u64 %rd13, array1; cvta.const.u64 %rd14, fixed; setp.eq.u32 %p1, %r1, 0;
    """
    for row, register in enumerate(("%rd12", "%rd10", "%rd11", "%rd13", "%rd14")):
        for column, space in enumerate(spaces):
            body += f"isspacep.{space} %p2, {register}; selp.b32 %r20, 1, 0, %p2;"
            body += f"@%p1 st.global.b32 [%rd1+{4 * (row * len(spaces) + column)}], %r20;\n"
    run_kernel(body, result, shared_bytes=16, globals=".const .b32 fixed = 5;")
    expected = np.zeros_like(result)
    expected[0, 0] = 1
    expected[1, 1:4] = 1
    expected[2, 4] = 1
    expected[3, [0, 6]] = 1  # parameters are in the global window
    expected[4, 5] = 1
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("generic", [False, True])
def test_distributed_shared_memory(generic: bool) -> None:
    result = poisoned((4, LANES), np.uint32)
    body = """
    mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, smem; shl.b32 %r4, %r1, 2; add.u32 %r3, %r3, %r4;
    mad.lo.u32 %r5, %r2, 1000, %r1; st.shared.b32 [%r3], %r5;
    barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
    add.u32 %r6, %r2, 1; and.b32 %r6, %r6, 3;
    """
    if generic:
        body += """
        cvt.u64.u32 %rd5, %r3; cvta.shared.u64 %rd6, %rd5; mapa.u64 %rd7, %rd6, %r6;
        ld.b32 %r8, [%rd7]; getctarank.u64 %r9, %rd7;
        """
    else:
        body += """
        mapa.shared::cluster.u32 %r7, %r3, %r6;
        ld.shared::cluster.b32 %r8, [%r7]; getctarank.shared::cluster.u32 %r9, %r7;
        """
    body += """
    mad.lo.u32 %r10, %r9, 100000, %r8; mad.lo.u32 %r11, %r2, 32, %r1;
    mul.wide.u32 %rd8, %r11, 4; add.u64 %rd9, %rd1, %rd8; st.global.b32 [%rd9], %r10;
    barrier.cluster.arrive; barrier.cluster.wait;
    """
    run_kernel(body, result, grid=(4, 1, 1), cluster=(4, 1, 1), shared_bytes=128)
    peer = (np.arange(4)[:, None] + 1) % 4
    np.testing.assert_array_equal(result, peer * 101000 + np.arange(LANES))


@pytest.mark.parametrize(
    "hint",
    [
        "prefetch.global.L1 [%rd1]",
        "prefetch.L2 [%rd1+64]",
        "prefetch.global.L2::evict_last [%rd1]",
        "prefetchu.L1 [%rd1]",
        "prefetch.tensormap [%rd1]",
        "applypriority.global.L2::evict_normal [%rd1], 128",
        "createpolicy.range.global.L2::evict_last.L2::evict_unchanged.b64 %rd5, [%rd1], 128, 256",
        "createpolicy.cvt.L2.b64 %rd5, %rd6",
        "createpolicy.fractional.L2::evict_last.b64 %rd5",
    ],
)
def test_hints_change_nothing(hint: str) -> None:
    data = random_bytes(256)
    before = data.copy()
    run_kernel("mov.u64 %rd6, 0;" + hint + ";", data)
    np.testing.assert_array_equal(data, before)


# ---------------------------------------------------------------------------------------------- refused


def findings(body: str, *arrays: np.ndarray, **options: object) -> list[tuple[str, int, str]]:
    result = run_kernel(body, *arrays, expect_reports=True, **options)  # type: ignore[arg-type]
    return [(str(report.kind), report.lane, report.message) for report in result.reports]


@pytest.mark.parametrize("operation", ["read", "write", "atomic"])
def test_global_out_of_bounds(operation: str) -> None:
    data = aligned(np.arange(30, dtype=np.uint32))
    result = poisoned(LANES, np.uint32)
    instruction = {
        "read": "ld.global.b32 %r20, [%rd5]; st.global.b32 [%rd6], %r20;",
        "write": "st.global.b32 [%rd5], 7;",
        "atomic": "atom.global.add.u32 %r20, [%rd5], 1; st.global.b32 [%rd6], %r20;",
    }[operation]
    (found,) = findings(own_element(4) + instruction, data, result)
    kind, lane, message = found
    assert kind == "out-of-bounds"
    assert lane == 30
    assert f"4-byte {operation} at {hex(data.ctypes.data + 120)}" in message
    assert f"starts 0 bytes past the end of array1 (120 bytes at {hex(data.ctypes.data)})" in message
    assert "lanes 30-31" in message
    if operation != "write":
        np.testing.assert_array_equal(result, [*range(30), 0xFFFFFFFF, 0xFFFFFFFF])


@pytest.mark.parametrize(
    ("offset", "words"),
    [(-4, "starts 4 bytes before"), (124, "ends 12 bytes past the end of"), (1 << 50, "starts")],
)
def test_global_out_of_bounds_words(offset: int, words: str) -> None:
    data = aligned(np.zeros(32, np.uint32))
    body = f"setp.eq.u32 %p1, %r1, 3; add.s64 %rd5, %rd1, {offset}; @%p1 ld.global.v4.b32 "
    ((kind, lane, message),) = findings(body + "{%r5, %r6, %r7, %r8}, [%rd5];", data)
    assert (kind, lane) == ("out-of-bounds", 3)
    assert words in message


def test_misaligned() -> None:
    data = aligned(np.zeros(64, np.uint32))
    body = "add.u64 %rd5, %rd1, %rd0; ld.global.v2.b32 {%r5, %r6}, [%rd5];"
    ((kind, lane, message),) = findings(body, data)
    assert (kind, lane) == ("misaligned", 1)
    assert "aligned to 8 bytes, it is 4 bytes off" in message


@pytest.mark.parametrize("space", ["shared", "shared::cluster", ""])
def test_past_shared(space: str) -> None:
    body = "mov.u64 %rd5, smem; add.u64 %rd5, %rd5, %rd0;"
    body += "" if space else "cvta.shared.u64 %rd5, %rd5;"
    body += f"st{'.' + space if space else ''}.b32 [%rd5+8], 1;"
    ((kind, lane, message),) = findings(body, shared_bytes=128)
    assert (kind, lane) == ("out-of-bounds", 30)
    assert "past the end of the shared memory of CTA rank 0 (128 bytes from 0x400" in message


def test_misaligned_shared() -> None:
    ((kind, _, _),) = findings("mov.u32 %r5, smem; ld.shared.b64 %rd5, [%r5+4];", shared_bytes=128)
    assert kind == "misaligned"


def test_other_cta_as_own() -> None:
    body = "mov.u32 %r5, smem; xor.b32 %r5, %r5, 0x1000000; st.shared::cta.b32 [%r5], 1;"
    found = findings(body, grid=(2, 1, 1), cluster=(2, 1, 1), shared_bytes=128)
    assert [kind for kind, _, _ in found] == ["out-of-bounds"]
    assert ".shared::cta memory of CTA rank" in found[0][2]


def test_no_such_cta() -> None:
    body = "mov.u32 %r5, smem; mapa.shared::cluster.u32 %r6, %r5, 2; add.u32 %r7, %r5, 0x5000000;"
    found = findings(
        body + "ld.shared::cluster.b32 %r8, [%r7];", grid=(2, 1, 1), cluster=(2, 1, 1), shared_bytes=4
    )
    messages = " ".join(message for _, _, message in found)
    assert "mapa to CTA rank 2" in messages
    assert "in CTA rank 5, the cluster has 2 CTAs" in messages


def test_generic_address_in_shared_instruction() -> None:
    body = "mov.u64 %rd5, smem; cvta.shared.u64 %rd6, %rd5; ld.shared.b32 %r5, [%rd6];"
    ((kind, _, message),) = findings(body, shared_bytes=128)
    assert kind == "out-of-bounds"
    assert "generic" in message


def test_past_local() -> None:
    body = ".local .align 8 .b8 frame[16]; mov.u64 %rd5, frame; st.local.b64 [%rd5+16], %rd5;"
    ((kind, _, message),) = findings(body)
    assert kind == "out-of-bounds"
    assert "local memory of a thread" in message


def test_constants_and_parameters_are_read_only() -> None:
    body = "mov.u64 %rd5, fixed; cvta.const.u64 %rd6, %rd5; st.b32 [%rd6], 1;"
    ((kind, _, message),) = findings(body, globals=".const .b32 fixed = 5;")
    assert kind == "out-of-bounds"
    assert "fixed, which is read-only" in message
    body = "mov.u64 %rd5, array1; st.global.b64 [%rd5], %rd5;"
    ((kind, _, message),) = findings(body, np.zeros(4, np.uint32))
    assert kind == "out-of-bounds"
    assert "kernel parameters, which is read-only" in message


def test_null_pointer_without_memory() -> None:
    ((kind, _, _),) = findings("mov.u64 %rd5, 0; ld.global.b32 %r5, [%rd5+8];")
    assert kind == "out-of-bounds"


# ---------------------------------------------------------------------------------------------- order, counts


def test_release_and_acquire_between_clusters() -> None:
    """A flag in global memory hands data from one cluster to another, by its order or by fences."""
    for publish, poll in (
        ("st.release.gpu.global.b32 [%rd2], 1;", "ld.acquire.gpu.global.b32 %r9, [%rd2];"),
        ("fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%rd2], 1;", "ld.relaxed.gpu.global.b32 %r9, [%rd2];"),
        ("fence.acq_rel.gpu; red.global.add.u32 [%rd2], 1;", "ld.volatile.global.b32 %r9, [%rd2];"),
        ("atom.release.gpu.exch.b32 %r9, [%rd2], 1;", "atom.acquire.gpu.global.add.u32 %r9, [%rd2], 0;"),
    ):
        data, flag, result = (aligned(np.zeros(n, np.uint32)) for n in (LANES, 1, LANES))
        body = f"""
        mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r1, 0;
        add.u64 %rd5, %rd1, %rd0; add.u64 %rd6, %rd3, %rd0;
        @!%p1 bra READER;
        add.u32 %r3, %r1, 5; st.global.b32 [%rd5], %r3; bar.sync 0;
        @%p2 bra SEND; bra DONE;
        SEND: {publish} bra DONE;
        READER: {poll} setp.eq.u32 %p3, %r9, 0; @%p3 bra READER;
        fence.acq_rel.gpu;
        ld.global.b32 %r10, [%rd5]; st.global.b32 [%rd6], %r10;
        DONE:
        """
        run_kernel(body, data, flag, result, grid=(2, 1, 1))
        np.testing.assert_array_equal(result, np.arange(LANES) + 5)


def test_relaxed_flag_without_fence_is_a_race() -> None:
    body = """
    mov.u32 %r2, %tid.x; shr.u32 %r2, %r2, 5; setp.eq.u32 %p1, %r2, 0; mov.u32 %r5, smem;
    @!%p1 bra READER;
    st.shared.b32 [%r5], 5; st.relaxed.cta.shared.b32 [%r5+4], 1; bra DONE;
    READER: ld.relaxed.cta.shared.b32 %r9, [%r5+4]; setp.ne.u32 %p3, %r9, 1; @%p3 bra READER;
    ld.shared.b32 %r10, [%r5];
    DONE:
    """
    body = "mov.u32 %r5, smem; setp.lt.u32 %p1, %r1, 1; @%p1 st.shared.b32 [%r5+4], 0; bar.sync 0;" + body
    kinds = [kind for kind, _, _ in findings(body, block=(64, 1, 1), shared_bytes=8)]
    assert kinds == ["race"]


@pytest.mark.parametrize(
    ("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)], ids=["unit", "two", "sector", "broadcast"]
)
def test_global_sectors(stride: int, sectors: int) -> None:
    data = aligned(np.zeros(8 * LANES, np.uint32))
    body = f"mul.wide.u32 %rd5, %r1, {4 * stride}; add.u64 %rd5, %rd1, %rd5; ld.global.b32 %r5, [%rd5];"
    (counts,) = run_kernel(body, data).counts
    assert total(counts, "global_load_sectors") == sectors
    assert total(counts, "global_load_bytes") == 128


@pytest.mark.parametrize(
    ("bits", "stride", "wavefronts", "conflicts"),
    [
        (32, 4, 1, 0),
        (32, 8, 2, 1),
        (32, 128, 32, 31),
        (32, 0, 1, 0),
        (8, 1, 1, 0),
        (64, 8, 2, 0),
        (64, 16, 4, 2),
        (128, 16, 4, 0),
        (128, 32, 8, 4),
        (128, 128, 32, 28),
    ],
)
def test_bank_conflicts(bits: int, stride: int, wavefronts: int, conflicts: int) -> None:
    register = registers(bits, 1)
    body = f"mov.u32 %r5, smem; mad.lo.u32 %r5, %r1, {stride}, %r5; ld.shared.b{bits} {register}, [%r5];"
    (counts,) = run_kernel(body, shared_bytes=4096, checks=False).counts
    assert total(counts, "shared_wavefronts") == wavefronts
    assert total(counts, "shared_bank_conflicts") == conflicts
    assert total(counts, "shared_load_bytes") == LANES * bits // 8


def total(counts: object, name: str) -> int:
    from ptx_emulator.counts import COUNT_NAMES

    return int(counts.counts.sum(axis=0)[COUNT_NAMES.index(name)])  # type: ignore[attr-defined]
