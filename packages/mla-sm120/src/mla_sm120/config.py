"""What the kernels take, and how a problem is divided: tile, splits, names of tactics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_dispatch import Arch
from mla_core import DecodeProblem, plan_splits
from mla_core.planning import SplitPlan

KV_LORA_RANK, QK_ROPE_HEAD_DIM = 512, 64
BOX_KEYS = 16  # of one TMA copy
TILE_KEYS = 32
TILE_ROWS = (16, 32, 64)
SMEM_BYTES = 101376  # the most dynamic shared memory of a block on compute capability 12.x
COMBINE_ITEMS_PER_ROW = 4  # of the combine kernel: a row and a quarter of its columns
MAX_GRID_X, MAX_GRID_YZ = 2**31 - 1, 65535

DTYPE_UNITS = {
    torch.bfloat16: "decode_bf16",
    torch.float16: "decode_fp16",
    torch.float8_e4m3fn: "decode_e4m3",
}

WHOLE = "-whole"  # end of the name of a tactic that does not split the keys of a request


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
    """

    tile_rows: int
    splits: SplitPlan

    @property
    def num_splits(self) -> int:
        """Blocks that share the keys of a request."""
        return self.splits.num_splits

    @staticmethod
    def of(problem: DecodeProblem, arch: Arch, tactic: str) -> Division:
        """The division that a tactic names."""
        tile_rows = int(tactic.removesuffix(WHOLE).removeprefix("m"))
        # With one SM to fill, nothing is split.
        sm_count = 1 if tactic.endswith(WHOLE) else arch.sm_count
        splits = plan_splits(problem, sm_count=sm_count, tile_m=tile_rows, tile_n=TILE_KEYS)
        return Division(tile_rows, splits)


def preferred_tile(problem: DecodeProblem) -> int:
    """The smallest tile that holds the rows of a request, or the largest there is."""
    return next((tile for tile in TILE_ROWS if problem.rows <= tile), TILE_ROWS[-1])


def tactics(problem: DecodeProblem) -> list[str]:
    """Names of the tactics, the heuristic's choice first."""
    preferred = preferred_tile(problem)
    tiles = sorted(TILE_ROWS, key=lambda tile: tile != preferred)
    return [f"m{tile}" for tile in tiles] + [f"m{tile}{WHOLE}" for tile in tiles]
