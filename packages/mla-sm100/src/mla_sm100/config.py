"""What the kernel is compiled for, its layout of shared and tensor memory, and the names of its tactics."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_dispatch import Arch
from mla_core import DecodeProblem
from mla_core.problem import SHORT_DTYPES

KV_LORA_RANK, QK_ROPE_HEAD_DIM = 512, 64
PAGE_SIZES = (16, 32, 64, 128)
MAX_INT32 = 2**31 - 1  # of keys, and of their tiles times splits, at most MOST_FILLS for each SM
MAX_ROWS = 2**30 - 1  # of all requests: a grid has fewer than 2^31 CTAs, and a row may take two

CHUNK_ROWS = 64  # rows (of queries, keys or probabilities) that one chunk of shared memory holds
CHUNK_ROW_BYTES = 128  # of a row: the span of the widest swizzle
CHUNK_BYTES = CHUNK_ROWS * CHUNK_ROW_BYTES
SMEM_LIMIT_BYTES = 232448  # of a block, on every target
BARRIER_BYTES = 2048  # mbarriers, address of tensor memory, row exchange

SOFTMAX_WARPS = 4
MMA_WARP, LOAD_K_WARP, LOAD_V_WARP, LOAD_Q_WARP = 4, 5, 6, 7
THREADS = 256

ACC_O_COLS = 256  # tensor memory columns of the output accumulator
ACC_S_STAGES = 2
ACC_S_COLS = 64  # of one stage
TMEM_COLS = 512  # allocated: a power of two that holds acc_o and acc_s

STRIDE_ALIGN_BYTES = 16  # of addresses and strides of what is copied 16 bytes at a time

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}
# Probabilities are 2^(score - reference + shift): the reference is raised where a score exceeds it by more
# than the threshold, so the shift and the threshold together stay below what the format can hold.
RESCALE_THRESHOLD_LOG2 = {"bf16": 8.0, "fp16": 8.0, "e4m3": 4.0}
PROBABILITY_SHIFT_LOG2 = {"bf16": 0.0, "fp16": 0.0, "e4m3": 4.0}

WHOLE, PERSISTENT = "-whole", "-persistent"  # ends of the names of tactics, in this order
FILLS = {"-x2": 2, "-x4": 4}  # in the place of WHOLE: how often splits fill the device, where it is not once
MOST_FILLS = max(FILLS.values())


@dataclass(frozen=True)
class DecodeConfig:
    """Everything that changes the code of the kernel. Heads, query length, batch and strides are dynamic.

    dtype, out_dtype: "bf16", "fp16" or "e4m3"; dtype is that of query and cache.
    pair: two CTAs share a tile of 128 rows and 128 keys; otherwise one CTA has 64 rows and 64 keys, and
        its keys and values are the same bytes of shared memory.
    ragged: queries are [total_q, num_heads, 576] with cum_seq_lens_q.
    split: partial results go to the workspace, and a combine kernel follows.
    pdl: launched as programmatic dependents.
    """

    dtype: str
    out_dtype: str
    page_size: int
    pair: bool
    ragged: bool = False
    return_lse: bool = False
    softmax_scale_is_tensor: bool = False
    output_scale_is_tensor: bool = False
    split: bool = False
    pdl: bool = False

    @staticmethod
    def of(problem: DecodeProblem, *, pair: bool, split: bool, pdl: bool) -> DecodeConfig:
        """The configuration that a problem and a tactic need."""
        return DecodeConfig(
            dtype=SHORT_DTYPES[problem.q_dtype],
            out_dtype=SHORT_DTYPES[problem.out_dtype],
            page_size=problem.page_size,
            pair=pair,
            ragged=problem.ragged,
            return_lse=problem.return_lse,
            softmax_scale_is_tensor=problem.softmax_scale_is_tensor,
            output_scale_is_tensor=problem.output_scale_is_tensor,
            split=split,
            pdl=pdl,
        )

    @property
    def cluster_size(self) -> int:
        """CTAs that share a unit of work."""
        return 2 if self.pair else 1

    @property
    def tile_m(self) -> int:
        """(token, head) rows of a unit."""
        return CHUNK_ROWS * self.cluster_size

    @property
    def tile_n(self) -> int:
        """Keys of a tile."""
        return CHUNK_ROWS * self.cluster_size

    @property
    def thread_keys(self) -> int:
        """Scores of a tile that one softmax thread holds: half of a row."""
        return self.tile_n // 2

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of query and cache, and of a probability."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def chunk_elements(self) -> int:
        """Latent elements in a row of a chunk."""
        return CHUNK_ROW_BYTES // self.element_bytes

    @property
    def latent_chunks(self) -> int:
        """Chunks of the latent part of 64 keys or query rows; the rope part is one more, and comes first."""
        return KV_LORA_RANK // self.chunk_elements

    @property
    def chunks(self) -> int:
        """Chunks of 64 keys or query rows."""
        return 1 + self.latent_chunks

    @property
    def box_keys(self) -> int:
        """Keys of one TMA copy."""
        return min(self.page_size, CHUNK_ROWS)

    @property
    def k_tiles(self) -> int:
        """Tiles that the ring of keys holds; a power of two."""
        if self.pair:
            return 1 if self.element_bytes == 2 else 2
        return 2 if self.element_bytes == 2 else 4

    @property
    def k_stages_per_tile(self) -> int:
        """Parts of a tile with barriers of their own: chunks, or (alone) rope and the halves of latent."""
        return self.chunks if self.pair else 3

    @property
    def v_tiles(self) -> int:
        """Tiles that the ring of values holds; none where values are read from the ring of keys."""
        return self.k_tiles if self.pair else 0

    @property
    def v_stages_per_tile(self) -> int:
        """64 keys by 128 latent elements per stage: two halves of the keys, of each two of the output."""
        return 4 if self.pair else 0

    @property
    def v_stage_chunks(self) -> int:
        """Chunks of a stage of values."""
        return self.element_bytes

    @property
    def probability_bytes(self) -> int:
        """Of a row of probabilities: tile_n elements."""
        return self.tile_n * self.element_bytes

    @property
    def probability_row_bytes(self) -> int:
        """Of a row in a chunk of probabilities, which is the span of its swizzle."""
        return min(CHUNK_ROW_BYTES, self.probability_bytes)

    @property
    def probability_chunks(self) -> int:
        """Chunks of probabilities."""
        return self.probability_bytes // self.probability_row_bytes

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block: queries, probabilities, the rings, barriers."""
        ring = self.k_tiles * self.chunks + self.v_tiles * self.v_stages_per_tile * self.v_stage_chunks
        return (self.chunks + self.probability_chunks + ring) * CHUNK_BYTES + BARRIER_BYTES

    @property
    def rescale_threshold_log2(self) -> float:
        """By how much a score may exceed its row's reference before the row is rescaled."""
        return RESCALE_THRESHOLD_LOG2[self.dtype]

    @property
    def probability_shift_log2(self) -> float:
        """Power of two that probabilities are stored with."""
        return PROBABILITY_SHIFT_LOG2[self.dtype]


def can_implement(problem: DecodeProblem, arch: Arch) -> str | None:
    """Why the kernels do not run the problem, or None."""
    ranks = (problem.kv_lora_rank, problem.qk_rope_head_dim)
    if ranks != (KV_LORA_RANK, QK_ROPE_HEAD_DIM):
        return f"kv_lora_rank + qk_rope_head_dim = {ranks[0]} + {ranks[1]}, the kernels have 512 + 64"
    if problem.page_size not in PAGE_SIZES:
        return f"page_size = {problem.page_size}, the kernels take {', '.join(map(str, PAGE_SIZES))}"
    if problem.batch * problem.rows > MAX_ROWS:
        return (
            f"batch * q_len * num_heads = {problem.batch * problem.rows}, the kernels take up to {MAX_ROWS}"
        )
    most_keys = min(MAX_INT32 // (MOST_FILLS * arch.sm_count), MAX_INT32 // CHUNK_ROWS - 2) * CHUNK_ROWS
    if problem.max_seq_len > most_keys:
        return f"max_seq_len = {problem.max_seq_len}, the kernels count up to {most_keys} keys"
    if arch.sm_count < 2:
        return f"{arch.sm_count} SM, a pair of CTAs needs two"
    if arch.smem_optin_bytes < SMEM_LIMIT_BYTES:
        return (
            f"{arch.smem_optin_bytes} bytes of shared memory per block, the kernels use up to "
            f"{SMEM_LIMIT_BYTES}"
        )
    return None
