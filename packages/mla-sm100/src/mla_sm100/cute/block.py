"""What the roles of a block share: its place, its barriers, and where its operands are in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass._mlir.dialects import nvvm

from mla_sm100.config import ACC_S_STAGES, CHUNK_BYTES, DecodeConfig

WARP_LANES = 32
VECTOR_BYTES = 16  # of the widest access
LEADER = 0  # the CTA of a pair that issues MMAs


def stages(config: DecodeConfig) -> dict[str, int]:
    """Barriers of a block, how many of each. A full and an empty one per stage; a phase is one use of it."""
    k_stages = config.k_tiles * config.k_stages_per_tile
    v_stages = config.v_tiles * config.v_stages_per_tile
    return {
        "q_full": 1,
        "q_empty": 1,
        "k_full": k_stages,
        "k_empty": k_stages,
        "v_full": v_stages,
        "v_empty": v_stages,
        "v_tail": config.v_tiles,
        "s_full": ACC_S_STAGES,
        "s_empty": ACC_S_STAGES,
        "p_full": 1,
        "pv_done": 1,
    }


@dataclass(frozen=True)
class Barriers:
    """Pointers to the barriers of `stages`.

    v_tail: values have arrived in this CTA that v_full does not wait for; none but where the sequence ends
        inside a page of the tile.
    pv_done: acc_o holds the tile, and its probabilities have been read.
    """

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    v_tail: Any
    s_full: Any
    s_empty: Any
    p_full: Any
    pv_done: Any

    @staticmethod
    def allocate(smem: Any, config: DecodeConfig) -> Barriers:
        """Barriers in a block's shared memory, not yet initialised."""
        counts = stages(config)
        pointer = smem.allocate_array(Int64, sum(counts.values()))
        pointers = {}
        for name, count in counts.items():
            pointers[name] = pointer
            pointer = pointer + count
        return Barriers(**pointers)


@dataclass(frozen=True)
class Block:
    """A block's place and memory. Chunks lie in the order queries, probabilities, keys, values.

    rank: of the CTA in its cluster. chunks: the first byte of shared memory for operands.
    """

    config: DecodeConfig
    rank: Int32
    cluster: Int32
    barriers: Barriers
    chunks: Any

    @property
    def p_chunk(self) -> int:
        """Index of the first chunk of probabilities."""
        return self.config.chunks

    @property
    def k_chunk(self) -> int:
        """Index of the first chunk of the ring of keys."""
        return self.p_chunk + self.config.probability_chunks

    @property
    def v_chunk(self) -> int:
        """Index of the first chunk of the ring of values."""
        return self.k_chunk + self.config.k_tiles * self.config.chunks

    def address(self, chunk: Any) -> Int32:
        """Shared memory address of a chunk."""
        return self.chunks.toint() + chunk * CHUNK_BYTES

    def arrive_at_leader(self, mbar: Any) -> None:
        """Arrive at a barrier of the leader, with what this thread has written; by one thread."""
        if self.config.pair:
            cute.arch.mbarrier_arrive(mbar, LEADER, scope=nvvm.MemScopeKind.CLUSTER)
        else:
            cute.arch.mbarrier_arrive(mbar)


def ring_slot(tile: Int32, tiles: int) -> Int32:
    """Slot of the `tile`-th tile of a launch in a ring of `tiles`, a power of two."""
    return tile & (tiles - 1)


def ring_phase(tile: Int32, tiles: int) -> Int32:
    """Parity of the phase in which the `tile`-th tile fills its slot; it is emptied in the same."""
    return (tile >> (tiles.bit_length() - 1)) & 1


def swizzled(row: Any, byte: Any, row_bytes: int) -> Any:
    """Offset in a chunk of 16-byte aligned `byte` of `row`, in the swizzle that spans `row_bytes`."""
    pattern = row & 7 if row_bytes == 128 else (row >> 1) & 3
    return row * row_bytes + (byte ^ (pattern << 4))


def zeros() -> Any:
    """The words of 16 bytes."""
    words = cute.make_rmem_tensor((VECTOR_BYTES // 4,), Int32)
    words.fill(0)
    return words


def store_vector(pointer: Any, words: Any) -> None:
    """Store 16 bytes to shared memory."""
    aligned = cute.make_ptr(Int32, pointer.toint(), cute.AddressSpace.smem, assumed_align=VECTOR_BYTES)
    cute.autovec_copy(words, cute.make_tensor(aligned, cute.make_layout((VECTOR_BYTES // 4,))))
