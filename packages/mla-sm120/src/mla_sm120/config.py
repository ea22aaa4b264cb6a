"""What the kernels take, and how a problem is divided: tile, splits, names of tactics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from kernel_dispatch import Arch
from mla_core import DecodeProblem, plan_splits
from mla_core.planning import SplitPlan

KV_LORA_RANK, QK_ROPE_HEAD_DIM = 512, 64
FLOAT32_BYTES = 4
BOX_KEYS = 16  # of one TMA copy
TILE_KEYS = 32
TILE_ROWS = (16, 32, 64)
SMEM_BYTES = 101376  # the most dynamic shared memory of a block on compute capability 12.x
COMBINE_ITEMS_PER_ROW = 4  # of the combine kernel: a row and a quarter of its columns
MAX_GRID_X, MAX_GRID_YZ = 2**31 - 1, 65535
MAX_SEQ_LEN = 2**31 - 2048  # kernels count keys, up to 64 boxes beyond the last, in 32 bits

DTYPE_UNITS = {
    torch.bfloat16: "decode_bf16",
    torch.float16: "decode_fp16",
    torch.float8_e4m3fn: "decode_e4m3",
}

WHOLE = "-whole"  # end of the name of a tactic that does not split the keys of a request
TAIL = "-tail"  # of one that divides requests that are left after whole waves as a call of their own
CLUSTER = "-c"  # and a size: of one whose blocks merge their results in clusters of as many
CLUSTER_SIZES = (1, 2, 4, 8)  # that tactics name: blocks that merge their results in shared memory


# (keys of a split, splits of a request) from which on a cluster has so many blocks, the first row that fits.
# With few keys the barriers of a cluster cost more than partial results; two splits in a cluster need no
# combine kernel. us on an H100, bf16, by blocks of a cluster 1 / 2 / 4, in
# benchmarks/results/mla_sm120-h100-tactics:
#   128 heads, B = 32, 4,096 keys, 2 splits: 118.7 / 111.4; B = 1, 65,536 keys, 64 splits: 69.4 / 66.5 / 69.6
#   128 heads, B = 4, 8,192 keys, 16 splits: 42.9 / 41.8 / 48.2
#   64 heads, B = 32, 8,192 keys, 4 splits: 128.9 / 131.2
#   B = 1, 65,536 keys, 128 splits, 64 heads: 51.2 / 50.2 / 48.7; 32: 40.7 / 40.4 / 39.6
#   B = 1, 65,536 keys, 128 splits, 16 heads: 36.3 / 37.0 / 36.3
#   B = 1, 8,192 keys, 128 splits, 16 heads: 12.9 / 13.6 / 12.6
CLUSTER_KEYS = 256
CLUSTERS = ((CLUSTER_KEYS, 96, 4), (CLUSTER_KEYS, 16, 2), (0, 3, 1), (CLUSTER_KEYS, 2, 2), (0, 0, 1))


# What a call takes, in us (`Division.cost_us`, `parts`). Fitted to 1,350 times of calls on an H100 and an
# H200, bf16 and e4m3; benchmarks/results/mla_sm120-splits-h100 and -h200 have later ones, and what is
# expected of them. No SM120 GPU was measured.
KEY_TILE_US = {16: 0.75, 32: 1.0, 64: 1.45}  # a block's for 32 keys, by its rows, where memory is no bound
SM90_E4M3_KEY_TILE_US = {16: 0.75, 32: 1.2, 64: 2.0}  # with conversions; that of 32 rows is a guess
REST_US = {16: 4.0, 32: 7.0, 64: 13.0}  # a block's, for all but its keys
MERGE_US = 4.5  # of combining partial results, beside what memory takes for half of their bytes
LAUNCH_US = 4.0  # of a further part of a call
MEMORY_FRACTION = 0.9  # of the peak bandwidth that keys reach
# FLOP per us of an SM with bf16; e4m3 has twice as many. GeForce RTX 5090, NVIDIA RTX Blackwell whitepaper:
# 209.5 TFLOP/s, summed in fp32, of 170 SMs. GB10, huggingface/kernels#283: a matmul of 92 TFLOP/s, of 48 SMs.
MMA_FLOP_PER_US = {"sm_120": 1.23e6, "sm_121": 1.92e6}
MORE_PARTIALS = 8  # numbers of partial results considered, from what fills the GPU once
MAX_PARTIAL_BYTES = 96 << 20  # of more than that; a workspace of 128 MiB, as FlashInfer advises, holds them


def objection(problem: DecodeProblem, arch: Arch) -> str | None:
    """Why the kernels do not run the problem, or None."""
    ranks = (problem.kv_lora_rank, problem.qk_rope_head_dim)
    if ranks != (KV_LORA_RANK, QK_ROPE_HEAD_DIM):
        return f"kv_lora_rank + qk_rope_head_dim = {ranks[0]} + {ranks[1]}, the kernels have 512 + 64"
    if problem.page_size < BOX_KEYS or problem.page_size.bit_count() > 1:
        return f"page_size = {problem.page_size}, the kernels take powers of two from {BOX_KEYS} on"
    if arch.smem_optin_bytes < SMEM_BYTES:
        return f"{arch.smem_optin_bytes} bytes of shared memory per block, the kernels use up to {SMEM_BYTES}"
    if problem.batch > MAX_GRID_YZ:
        return f"batch = {problem.batch}, a grid has at most {MAX_GRID_YZ}"
    if problem.max_seq_len > MAX_SEQ_LEN:
        return f"max_seq_len = {problem.max_seq_len}, the kernels count up to {MAX_SEQ_LEN} keys"
    items = problem.batch * problem.rows * COMBINE_ITEMS_PER_ROW
    if items > MAX_GRID_X:
        return (
            f"batch * q_len * num_heads * {COMBINE_ITEMS_PER_ROW} = {items}, a grid has at most {MAX_GRID_X}"
        )
    return None


def block_threads(tile_rows: int) -> int:
    """128 for each group of rows, of which a tile of 16 has one and others have two.

    128 more take softmaxes and copy keys.
    """
    return 256 if tile_rows == 16 else 384


@dataclass(frozen=True)
class Division:
    """How the work of a problem is divided among blocks.

    tile_rows: (token, head) rows of a block. splits: over how many blocks the keys of a request are spread.
    cluster_size: blocks that merge their results before they store them; num_splits is a multiple of it.
    """

    tile_rows: int
    splits: SplitPlan
    cluster_size: int

    @property
    def num_splits(self) -> int:
        """Blocks that share the keys of a request."""
        return self.splits.num_splits

    @property
    def kernel_name(self) -> str:
        """The kernel of the tile that merges in clusters, or the one that does not."""
        return f"mla_{'merge' if self.cluster_size > 1 else 'decode'}_m{self.tile_rows}"

    @property
    def partials(self) -> SplitPlan:
        """What is stored for each request, a result of every cluster: the sizes of the workspace."""
        return replace(self.splits, num_splits=self.num_partials)

    @property
    def num_partials(self) -> int:
        """Results that are stored for each request; one is the output itself."""
        return self.num_splits // self.cluster_size

    @staticmethod
    def of(problem: DecodeProblem, arch: Arch, tactic: str) -> Division:
        """How a tactic other than one of `-tail` divides a call, or a part of one."""
        tile_rows, end = tile_and_end(tactic)
        if end == WHOLE:
            return Division(tile_rows, _whole(problem, tile_rows), 1)
        if end:
            return Division.in_clusters_of(int(end.removeprefix(CLUSTER)), problem, arch, tile_rows)
        alone = Division.in_clusters_of(1, problem, arch, tile_rows)
        keys = problem.max_seq_len // alone.num_splits
        size = next(size for few, splits, size in CLUSTERS if keys >= few and alone.num_splits >= splits)
        if size > 1:
            return Division.in_clusters_of(size, problem, arch, tile_rows)
        # Two splits in a cluster do without partial results, for which rows may be too many.
        choices = [alone, *_without_partials(problem, tile_rows)[1:]]
        return min(choices, key=lambda division: division.cost_us(problem, arch))

    @staticmethod
    def in_clusters_of(cluster_size: int, problem: DecodeProblem, arch: Arch, tile_rows: int) -> Division:
        """Clusters of a size, or smaller ones if keys are few.

        As many as are resident at a time, as far as there are keys for them; with the preferred tile the
        number from there on that `cost_us` finds the fastest. Of numbers with the same longest split the
        smallest, which leaves less to combine.
        """
        whole = _whole(problem, tile_rows)
        key_tiles = whole.key_tiles
        resident = resident_clusters(arch, cluster_size)
        while cluster_size > key_tiles:
            cluster_size //= 2
        row_tiles = problem.batch * row_tiles_of(problem, tile_rows)
        filling = max(1, min(resident // row_tiles, key_tiles // cluster_size))
        affordable = MAX_PARTIAL_BYTES // (whole.rows * KV_LORA_RANK * FLOAT32_BYTES)
        more = MORE_PARTIALS if tile_rows == preferred_tile(problem) else 1
        most = max(filling, min(filling + more - 1, key_tiles // cluster_size, affordable))

        def divided(partials: int) -> Division:
            return Division(tile_rows, replace(whole, num_splits=partials * cluster_size), cluster_size)

        partials = min(range(filling, most + 1), key=lambda count: divided(count).cost_us(problem, arch))
        longest_split = -(-key_tiles // (partials * cluster_size))
        return divided(-(-key_tiles // (longest_split * cluster_size)))

    def cost_us(self, problem: DecodeProblem, arch: Arch) -> float:
        """What the call is expected to take, in us.

        Blocks run in waves. One takes as long as memory takes for the keys of its blocks, or as long as a
        block does that has its SM to itself, whichever is longer, and the rest of a block. Row tiles of a
        request read its keys from memory once.
        """
        row_tiles = row_tiles_of(problem, self.tile_rows)
        blocks = problem.batch * row_tiles * self.num_splits
        resident = resident_clusters(arch, self.cluster_size) * self.cluster_size
        key_tiles = -(-self.splits.key_tiles // self.num_splits)
        bytes_per_us = arch.memory_gb_s * 1e3 * MEMORY_FRACTION
        tile_bytes = TILE_KEYS * (KV_LORA_RANK + QK_ROPE_HEAD_DIM) * problem.kv_dtype.itemsize
        memory_us = tile_bytes / row_tiles / bytes_per_us
        block_us = key_tile_us(problem, arch, self.tile_rows)

        def wave_us(of: int) -> float:
            # The longer of the two, or where they are alike a little more.
            tile_us = math.pow(block_us**6 + (of * memory_us) ** 6, 1 / 6)
            return key_tiles * tile_us + REST_US[self.tile_rows]

        full_waves, left = divmod(blocks, resident)
        us = full_waves * wave_us(resident) + (wave_us(left) if left else 0.0)
        if self.num_partials > 1:
            us += MERGE_US + self.partials.o_partial_bytes / 2 / bytes_per_us
        return us


class Part(NamedTuple):
    """Requests of a call that launches of their own take.

    first: the first of them. problem: the call's, with their number. division: of their work.
    """

    first: int
    problem: DecodeProblem
    division: Division


def parts(problem: DecodeProblem, arch: Arch, tactic: str) -> list[Part]:
    """The launches of a tactic, which follow each other.

    With `-tail` as many requests as fill the GPU once or several times come first, each whole or in the two
    splits of a cluster, and those that are left are divided as a call of their own; where there are not both,
    it is one call. A tile's name alone is the one or the other, whichever is expected to be faster.
    """
    tile_rows, end = tile_and_end(tactic)
    one_call = [Part(0, problem, Division.of(problem, arch, tactic.removesuffix(TAIL)))]
    cuts = _ways_to_cut(problem, arch, tile_rows) if end in ("", TAIL) else []
    choices = cuts if cuts and end == TAIL else [one_call, *cuts]
    return min(choices, key=partial(cost_us, arch=arch))


def _ways_to_cut(problem: DecodeProblem, arch: Arch, tile_rows: int) -> list[list[Part]]:
    """One for each way to have no partial results, if the requests that come first then fill whole waves."""
    found = []
    for division in _without_partials(problem, tile_rows):
        wave = arch.sm_count // (row_tiles_of(problem, tile_rows) * division.num_splits)
        left = problem.batch % wave if wave else 0
        if left not in (0, problem.batch):
            first, rest = replace(problem, batch=problem.batch - left), replace(problem, batch=left)
            splits = replace(_whole(first, tile_rows), num_splits=division.num_splits)
            found.append(
                [
                    Part(0, first, replace(division, splits=splits)),
                    Part(first.batch, rest, Division.of(rest, arch, f"m{tile_rows}")),
                ]
            )
    return found


def cost_us(parts_of_one: Sequence[Part], arch: Arch) -> float:
    """What the launches of one call are expected to take, in us."""
    launches = LAUNCH_US * (len(parts_of_one) - 1)
    return launches + sum(part.division.cost_us(part.problem, arch) for part in parts_of_one)


def _whole(problem: DecodeProblem, tile_rows: int) -> SplitPlan:
    """The plan that does not split the keys of a request."""
    return plan_splits(problem, sm_count=1, tile_m=tile_rows, tile_n=TILE_KEYS)


def _without_partials(problem: DecodeProblem, tile_rows: int) -> list[Division]:
    """Requests whole, and if keys are many enough in the two splits of a cluster."""
    whole = _whole(problem, tile_rows)
    sizes = (1, 2) if problem.max_seq_len >= 2 * CLUSTER_KEYS else (1,)
    return [Division(tile_rows, replace(whole, num_splits=size), size) for size in sizes]


def row_tiles_of(problem: DecodeProblem, tile_rows: int) -> int:
    """Tiles that hold the rows of a request."""
    return -(-problem.rows // tile_rows)


def key_tile_us(problem: DecodeProblem, arch: Arch, tile_rows: int) -> float:
    """What a block takes for 32 keys where memory is no bound."""
    itemsize = problem.q_dtype.itemsize
    if arch.base == "sm_90":
        return (SM90_E4M3_KEY_TILE_US if itemsize == 1 else KEY_TILE_US)[tile_rows]
    flop = 2 * tile_rows * TILE_KEYS * (KV_LORA_RANK + QK_ROPE_HEAD_DIM + KV_LORA_RANK)
    return max(KEY_TILE_US[tile_rows], flop * itemsize / 2 / MMA_FLOP_PER_US[arch.base])


def resident_clusters(arch: Arch, cluster_size: int) -> int:
    """Clusters that an idle GPU holds at a time, a block on every SM.

    Clusters of two fill all SMs, larger ones leave some of a GPC over: of 132 SMs of an H100 30 clusters of
    four and 15 of eight take 120, by cuOccupancyMaxActiveClusters, 2026-11-21.
    """
    usable = arch.sm_count if cluster_size <= 2 else arch.sm_count * 10 // 11
    return max(1, usable // cluster_size)


def preferred_tile(problem: DecodeProblem) -> int:
    """The smallest tile that holds the rows of a request, or the largest there is."""
    return next((tile for tile in TILE_ROWS if problem.rows <= tile), TILE_ROWS[-1])


def tactics(problem: DecodeProblem) -> list[str]:
    """Names of the tactics, the heuristic's choice first: tiles, sizes of clusters, `-whole`, `-tail`."""
    preferred = preferred_tile(problem)
    tiles = sorted(TILE_ROWS, key=lambda tile: tile != preferred)
    ends = ["", *(f"{CLUSTER}{size}" for size in CLUSTER_SIZES), WHOLE, TAIL]
    return [f"m{tile}{end}" for end in ends for tile in tiles]


def tile_and_end(tactic: str) -> tuple[int, str]:
    """Rows of a tile, and the rest of a tactic's name: nothing, `-whole`, `-tail`, or `-c` and a size."""
    tile, hyphen, end = tactic.partition("-")
    return int(tile.removeprefix("m")), hyphen + end
