"""One tcgen05.mma with its operands placed by `matrix_layouts`, and the result that numpy expects."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from harness import run_kernel
from matrix_layouts import NUMPY_TYPES, OPERANDS, Placement, copy_image, encode, place
from ptx_emulator.machine import Result

KIND_OF = {
    "f16": "f16",
    "bf16": "f16",
    "tf32": "tf32",
    "e4m3": "f8f6f4",
    "e5m2": "f8f6f4",
    "e2m3": "f8f6f4",
    "e3m2": "f8f6f4",
    "e2m1": "f8f6f4",
    "u8": "i8",
    "s8": "i8",
}
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32}
CODES = {
    "f16": 0,
    "bf16": 1,
    "tf32": 2,
    "e4m3": 0,
    "e5m2": 1,
    "e2m3": 3,
    "e3m2": 4,
    "e2m1": 5,
    "u8": 0,
    "s8": 1,
}
D_CODES = {"f16": 0, "f32": 1, "s32": 2}
LANES = 128


def random_values(element: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Values that the element type holds exactly, as float64."""
    if element in ("u8", "s8"):
        info = np.iinfo(NUMPY_TYPES[element])
        return rng.integers(info.min, info.max + 1, size=shape).astype(np.float64)
    if element == "tf32":
        values = rng.normal(size=shape).astype(np.float32)
        return (values.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    return rng.normal(size=shape).astype(NUMPY_TYPES[element]).astype(np.float64)


@dataclass(frozen=True)
class Problem:
    """D[m, n] = A[m, k] * B[n, k] (+ D)."""

    a: str = "f16"
    b: str = "f16"
    d: str = "f32"
    m: int = 128
    n: int = 32
    group: int = 1
    a_mode: str = "128B"
    b_mode: str = "128B"
    a_mn_major: bool = False
    b_mn_major: bool = False
    a_in_tmem: bool = False
    gap: int = 0
    accumulate: bool = True
    negate_a: bool = False
    negate_b: bool = False
    saturate: bool = False
    d_lane: int = 0
    a_lane: int = 0
    scale: int | None = None
    disabled: tuple[int, ...] = ()
    seed: int = 0
    modifiers: str = ""
    options: dict[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return KIND_OF[self.a]

    @property
    def k(self) -> int:
        return DEPTH[self.kind]

    @property
    def columns(self) -> int:
        return self.n // 2 if self.group == 2 and self.m == 128 else self.n

    @property
    def descriptor(self) -> int:
        return (
            (8 if self.saturate else 0)
            | D_CODES[self.d] << 4
            | CODES[self.a] << 7
            | CODES[self.b] << 10
            | self.negate_a << 13
            | self.negate_b << 14
            | self.a_mn_major << 15
            | self.b_mn_major << 16
            | (self.n // 8) << 17
            | (self.m // 16) << 24
        )

    def d_places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CTA, lane and column of every element [m, n] of D."""
        row, column = np.meshgrid(np.arange(self.m), np.arange(self.n), indexing="ij")
        if self.group == 1 and self.m == 64:
            return 0 * row, row % 16 + 32 * (row // 16) + self.d_lane, column
        if self.group == 1:
            return 0 * row, row, column
        if self.m == 256:
            return row // 128, row % 128, column
        return row // 64, row % 64 + 64 * (column // (self.n // 2)), column % (self.n // 2)

    def a_words(self, values: np.ndarray) -> np.ndarray:
        """A in tensor memory: [CTA, lane, 8 columns]."""
        words = np.zeros((self.group, LANES, 8), dtype=np.uint32)
        rows = encode(values, self.a).reshape(self.m, 32).copy().view(np.uint32)
        for row in range(self.m):
            if self.group == 1 and self.m == 64:
                words[0, row % 16 + 32 * (row // 16) + self.a_lane] = rows[row]
            elif self.group == 2 and self.m == 128:  # twice, for both halves of N
                words[row // 64, row % 64] = words[row // 64, row % 64 + 64] = rows[row]
            else:
                words[row // 128, row % 128] = rows[row]
        return words


@dataclass
class Outcome:
    expected: np.ndarray
    bound: np.ndarray
    actual: np.ndarray
    untouched_before: np.ndarray
    untouched_after: np.ndarray
    result: Result


def accumulator_bits(values: np.ndarray, d: str) -> np.ndarray:
    if d == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    if d == "s32":
        return values.astype(np.int64).astype(np.int32).view(np.uint32)  # values from 2^31 up wrap around
    return values.astype(np.float32).view(np.uint32)


def accumulator_values(bits: np.ndarray, d: str) -> np.ndarray:
    if d == "f16":
        return (bits & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
    return bits.view(np.int32 if d == "s32" else np.float32).astype(np.float64)


def body(problem: Problem, a: Placement | None, b: Placement, image_bytes: int) -> str:
    b_start = OPERANDS + (0 if a is None else -(-len(a.data) // 1024) * 1024)
    columns, group = problem.columns, problem.group
    if a is None:
        a_operand = f"[%atmem+{problem.a_lane << 16}]"
        a_setup = "add.u32 %atmem, %base, 256;"
    else:
        a_operand = "%ad"
        a_setup = f"add.u64 %ad, %start, {a.tcgen05_descriptor(OPERANDS)};"
    disabled = "".join(f", {{{', '.join(str(w) for w in problem.disabled)}}}" if problem.disabled else "")
    scale = "" if problem.scale is None else f", {problem.scale}"
    sync = "bar.sync 0;" if group == 1 else "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    commit = (
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%mbar];"
        if group == 1
        else "mov.b16 %rs1, 3; "
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 "
        "[%mbar], %rs1;"
    )
    return f"""
    .reg .b32 %base, %mbar, %atmem, %addr, %rank, %n;
    .reg .b64 %ad, %bd, %from, %start, %step;
    .reg .pred %first, %more, %done, %issue, %enable;
    mov.b32 %mbar, smem;
    mov.u32 %rank, %cluster_ctarank;
    setp.lt.u32 %first, %r1, 32;
    @%first tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [smem+16], 512;
    setp.eq.u32 %issue, %r1, 0;
    @%issue mbarrier.init.shared::cta.b64 [%mbar], 1;
    @%issue fence.mbarrier_init.release.cluster;
    // shared memory: image[rank]
    mul.wide.u32 %from, %rank, {image_bytes};
    add.u64 %from, %from, %rd1;
    {copy_image("%from", image_bytes)}
    ld.shared.b32 %base, [smem+16];
    // tensor memory: D from array 2 [cta][column][lane], A from array 3
    mad.lo.u32 %r7, %rank, {columns * LANES * 4}, 0;
    cvt.u64.u32 %from, %r7;
    add.u64 %from, %from, %rd2;
    add.u64 %from, %from, %rd0;
    mov.u32 %n, 0;
    fill:
    ld.global.b32 %r2, [%from];
    add.u32 %addr, %base, %n;
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%addr], {{%r2}};
    add.u64 %from, %from, {LANES * 4};
    add.u32 %n, %n, 1;
    setp.lt.u32 %more, %n, {columns};
    @%more bra fill;
    mad.lo.u32 %r7, %rank, {LANES * 32}, 0;
    cvt.u64.u32 %from, %r7;
    add.u64 %from, %from, %rd3;
    mad.wide.u32 %from, %r1, 32, %from;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%from];
    ld.global.v4.b32 {{%r24, %r25, %r26, %r27}}, [%from+16];
    add.u32 %addr, %base, 256;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%addr], {{%r20, %r21, %r22, %r23, %r24, %r25, %r26, %r27}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync;
    {sync}
    tcgen05.fence::after_thread_sync;
    shr.u32 %r7, %mbar, 4; and.b32 %r7, %r7, 0x3fff; cvt.u64.u32 %start, %r7;
    {a_setup}
    add.u64 %bd, %start, {b.tcgen05_descriptor(b_start)};
    mov.b32 %r8, {problem.descriptor};
    setp.ne.u32 %enable, {int(problem.accumulate)}, 0;
    setp.ne.or.u32 %done, %rank, 0, !%issue;
    @%done bra wait;
    add.u32 %addr, %base, {problem.d_lane << 16};
    tcgen05.mma.cta_group::{group}.kind::{problem.kind}{problem.modifiers}
        [%addr], {a_operand}, %bd, %r8{disabled}, %enable{scale};
    {commit}
    wait:
    mbarrier.try_wait.parity.shared::cta.b64 %done, [%mbar], 0;
    @!%done bra wait;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    mad.lo.u32 %r7, %rank, {columns * LANES * 4}, 0;
    cvt.u64.u32 %from, %r7;
    add.u64 %from, %from, %rd2;
    add.u64 %from, %from, %rd0;
    mov.u32 %n, 0;
    read:
    add.u32 %addr, %base, %n;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%addr];
    tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%from], %r2;
    add.u64 %from, %from, {LANES * 4};
    add.u32 %n, %n, 1;
    setp.lt.u32 %more, %n, {columns};
    @%more bra read;
    bar.sync 0;
    @%first tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;
    @%first tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %base, 512;
    """


def solve(problem: Problem, **options: object) -> Outcome:
    """Runs the instruction on random operands."""
    rng = np.random.default_rng(problem.seed)
    p = problem
    a_values = random_values(p.a, (p.m, p.k), rng)
    b_values = random_values(p.b, (p.n, p.k), rng)
    d_values = rng.normal(size=(p.m, p.n)) * (1e9 if p.d == "s32" else 1)
    d_values = accumulator_values(accumulator_bits(d_values, p.d), p.d)

    def parts(values: np.ndarray, element: str, mode: str, mn_major: bool) -> list[Placement]:
        step = len(values) // p.group
        return [
            place(values[g * step : (g + 1) * step], element, mode, mn_major, gap=p.gap)
            for g in range(p.group)
        ]

    a_parts = None if p.a_in_tmem else parts(a_values, p.a, p.a_mode, p.a_mn_major)
    b_parts = parts(b_values, p.b, p.b_mode, p.b_mn_major)
    a_bytes = 0 if a_parts is None else -(-len(a_parts[0].data) // 1024) * 1024
    image_bytes = -(-(a_bytes + len(b_parts[0].data)) // 2048) * 2048
    image = np.zeros((p.group, image_bytes), dtype=np.uint8)
    for g in range(p.group):
        if a_parts is not None:
            image[g, : len(a_parts[g].data)] = a_parts[g].data
        image[g, a_bytes : a_bytes + len(b_parts[g].data)] = b_parts[g].data

    cta, lane, column = p.d_places()
    tensor_memory = np.full((p.group, p.columns, LANES), 0x7FC12345, dtype=np.uint32)
    tensor_memory[cta, column, lane] = accumulator_bits(d_values, p.d)
    before = tensor_memory.copy()
    a_words = p.a_words(a_values) if p.a_in_tmem else np.zeros((p.group, LANES, 8), dtype=np.uint32)
    text = body(p, None if a_parts is None else a_parts[0], b_parts[0], image_bytes)
    result = run_kernel(
        text,
        image,
        tensor_memory,
        a_words,
        grid=(p.group, 1, 1),
        cluster=(p.group, 1, 1),
        block=(128, 1, 1),
        target="sm_100a",
        shared_bytes=OPERANDS + image_bytes,
        **options,
    )
    product = a_values @ b_values.T * (-1 if p.negate_a != p.negate_b else 1)
    kept = d_values * 2.0 ** -(p.scale or 0) if p.accumulate else 0 * d_values
    expected = product + kept
    if p.d == "s32":
        limits = np.iinfo(np.int32)
        expected = (
            np.clip(expected, limits.min, limits.max)
            if p.saturate
            else expected.astype(np.int64).astype(np.int32).astype(np.float64)
        )
    magnitude = np.abs(a_values) @ np.abs(b_values).T + np.abs(kept)
    bound = magnitude * (p.k + 1) * 2.0**-24
    if p.d == "f16":
        bound += np.abs(expected) * 2.0**-11 + 2.0**-24
    if p.d == "s32":
        bound *= 0
    actual = accumulator_values(tensor_memory[cta, column, lane].astype(np.uint32), p.d)
    mask = np.ones(tensor_memory.shape, dtype=bool)
    mask[cta, column, lane] = False
    if p.disabled:
        bits = np.array(p.disabled, dtype=np.uint32)
        off = (bits[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(p.group, LANES)
        keep = off[cta, lane]
        expected = np.where(keep, d_values, expected)
        bound = np.where(keep, 0, bound)
    return Outcome(expected, bound, actual, before[mask], tensor_memory[mask], result)


def check(problem: Problem, **options: object) -> None:
    outcome = solve(problem, **options)
    error = np.abs(outcome.actual - outcome.expected)
    worst = np.unravel_index(np.argmax(error - outcome.bound), error.shape)
    assert (error <= outcome.bound).all(), (
        f"{(error > outcome.bound).sum()} of {error.size} elements of D are wrong, such as {worst}: "
        f"{outcome.actual[worst]} for {outcome.expected[worst]}"
    )
    np.testing.assert_array_equal(outcome.untouched_before, outcome.untouched_after)
