"""Register fragments: products of split float32 and of bfloat16 values, vectors in memory, bulk copies."""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cutlass_dsl import select_

from .config import VECTOR_BYTES

NUMERIC = {
    "float32": cutlass.Float32,
    "bfloat16": BFloat16,
    "float16": cutlass.Float16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}

_TF32_MASK = 0xFFFFE000 - (1 << 32)  # sign, exponent and the ten mantissa bits that tf32 keeps, as int32
BF16_PARTS = 3  # bfloat16 values whose sum is a float32
_EVICT_FIRST = 0x12F0000000000000  # what createpolicy.fractional.L2::evict_first gives for all of an access
_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"


def select(condition, x, y):
    """x where `condition` holds, else y; both float32 or both int32."""
    return (Float32 if isinstance(x, Float32) else Int32)(select_(condition, x, y))


def opaque(x):
    """x, an int32, of which the compiler knows nothing: what is made of it is made anew, not held."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def split_tf32(x):
    """(high, low): high is exact in tf32, high + low = x; of low the tensor core drops at most two bits."""
    bits = x.bitcast(Int32) & Int32(_TF32_MASK)
    high = bits.bitcast(Float32)
    return high, x - high


def mma(acc: Sequence, a: Sequence, b: Sequence, instruction: str = _MMA) -> list:
    """acc + a b of one m16n8k8 step: acc 4, a 4, b 2 float32 registers in the instruction's layout."""
    return list(
        cute.arch.inline_ptx(
            instruction + " {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}},"
            " {{$r6}, {$r7}, {$r8}, {$r9}};",
            write_only_types=[Float32] * 4,
            read_only_args=[*a, *b, *acc],
        )
    )


def mma_bf16(acc: Sequence, a: Sequence, b: Sequence) -> list:
    """acc + a b of one m16n8k16 step of bfloat16: a 4, b 2 registers of two values each."""
    return mma(acc, a, b, _MMA_BF16)


def mma_split(acc: Sequence, a_parts: Sequence[Sequence], b_parts: Sequence[Sequence]) -> list:
    """acc + (sum of a_parts) (sum of b_parts), without the product of the two low parts."""
    for i, a in enumerate(a_parts):
        for j, b in enumerate(b_parts):
            if i + j < 2:
                acc = mma(acc, a, b)
    return list(acc)


def parts(values: Sequence, exact: bool) -> list[list]:
    """[values] where tf32 holds them exactly, else [high parts, low parts]."""
    if exact:
        return [list(values)]
    pairs = [split_tf32(x) for x in values]
    return [[high for high, _ in pairs], [low for _, low in pairs]]


def same_halves(x, y, half):
    """The low values of two registers of two 16-bit values each, in one register; the high for half 1."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Int32],
        read_only_args=[x, y, select(half == 0, Int32(0x5410), Int32(0x7632))],
    )


def split_bf16(x, y) -> list:
    """Registers of two bfloat16 values each, whose sums are the float32 x and y; the largest first."""
    result = []
    for _ in range(BF16_PARTS):
        words = [value.bitcast(Int32) for value in (x, y)]
        result.append(same_halves(*words, Int32(1)))
        x, y = (value - high_half(word) for value, word in zip((x, y), words, strict=True))
    return result


def load_vector(pointer, dtype) -> list:
    """The 16 bytes of shared memory at `pointer` as float32 values."""
    return load_values(pointer, dtype, VECTOR_BYTES * 8 // dtype.width)


def load_words(pointer, count: int = VECTOR_BYTES // 4) -> list:
    """As many int32 registers from `pointer` on, as one access of as many aligned bytes."""
    fragment = cute.make_rmem_tensor((count,), Int32)
    words = cute.make_tensor(cute.recast_ptr(pointer, dtype=Int32), cute.make_layout(fragment.shape))
    cute.autovec_copy(words, fragment)
    return [fragment[i] for i in range(count)]


def unpack(word, dtype) -> list:
    """The one float32 or two bfloat16 values in an int32, as float32."""
    if dtype.width == 32:
        return [word.bitcast(Float32)]
    return [(word << 16).bitcast(Float32), high_half(word)]


def high_half(word):
    """The bfloat16 value in the high half of an int32, as float32."""
    return (word & Int32(-(1 << 16))).bitcast(Float32)


def store_vector(pointer, values: Sequence, dtype) -> None:
    """Store float32 `values` at `pointer`, as so many aligned bytes of `dtype`, rounded to nearest even."""
    fragment = cute.make_rmem_tensor((len(values),), dtype)
    for i, value in enumerate(values):
        fragment[i] = value.to(dtype)
    cute.autovec_copy(fragment, cute.make_tensor(pointer, cute.make_layout(fragment.shape)))


def bulk_load(shared, source, num_bytes: int, mbar, evict_first: bool = False) -> None:
    """Start copying `num_bytes` of global memory at `source` to `shared`; they are counted on `mbar`."""
    hint, policy = _cache_hint(evict_first)
    cute.arch.inline_ptx(
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{hint}"
        f" [{{$r0}}], [{{$r1}}], {{$r2}}, [{{$r3}}]{', {$r4}' if policy else ''};",
        read_only_args=[shared, source, Int32(num_bytes), mbar, *policy],
    )


def read_index(indices, i):
    """indices[i] as int64 past L1, which a read before `griddepcontrol.wait` may have filled."""
    pointer = indices.iterator + i * indices.stride[0]
    return Int64(cute.arch.load(pointer, indices.element_type, cop="cg"))


def is_slot(slot, pool_size):
    """Whether a state index names a slot of the pool."""
    return (slot >= 0) & (slot < pool_size)


def read_l2(pointer, dtype):
    """The value at `pointer` past L1, for what other blocks or the previous grid may write meanwhile."""
    return dtype(cute.arch.load(pointer, dtype, sem="relaxed", scope="gpu"))


def read_l2_words(pointer) -> list:
    """`read_l2` of the four int32 at `pointer`, which is a multiple of 16 bytes, each read on its own."""
    return list(
        cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[Int32] * 4,
            read_only_args=[pointer],
        )
    )


def write_l2(pointer, value) -> None:
    """Write a value that other blocks read by `read_l2`."""
    cute.arch.store(pointer, value, sem="relaxed", scope="gpu")


def load_values(pointer, dtype, count: int) -> list:
    """`count` consecutive values at `pointer` as float32, as one access of as many aligned bytes."""
    if dtype is BFloat16 and count % 2 == 0:  # cheaper than conversions
        return [x for word in load_words(pointer, count // 2) for x in unpack(word, dtype)]
    fragment = cute.make_rmem_tensor((count,), dtype)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout((count,))), fragment)
    return [fragment[i].to(Float32) for i in range(count)]


def increment(counter, last: int):
    """Add one to the int32 at `counter`, from `last` back to 0; the old value. Orders no other access."""
    return cute.arch.inline_ptx(
        "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Int32],
        read_only_args=[counter, Int32(last)],
    )


def bulk_store(destination, shared, num_bytes: int, evict_first: bool = False) -> None:
    """Start copying `num_bytes` at `shared` to global memory, in the thread's current bulk group."""
    hint, policy = _cache_hint(evict_first)
    cute.arch.inline_ptx(
        f"cp.async.bulk.global.shared::cta.bulk_group{hint}"
        f" [{{$r0}}], [{{$r1}}], {{$r2}}{', {$r3}' if policy else ''};",
        read_only_args=[destination, shared, Int32(num_bytes), *policy],
    )


def _cache_hint(evict_first: bool) -> tuple[str, list[Int64]]:
    """Qualifier and operand of a bulk copy."""
    return (".L2::cache_hint", [Int64(_EVICT_FIRST)]) if evict_first else ("", [])


def load_shared(tensor, offset, count: int) -> list:
    """`load_values` at `offset`, a multiple of `count`, of a 1-D shared tensor."""
    return load_values(tensor.iterator + cute.assume(offset, divby=count), tensor.element_type, count)


def dot(x: Sequence, y: Sequence):
    """Sum of the products of two lists of registers."""
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = total + a * b
    return total
