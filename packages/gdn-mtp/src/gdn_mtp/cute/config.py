"""What a specialisation of the gated delta rule kernels is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem

WARP_LANES = 32
VECTOR_BYTES = 16
L2_LINE_BYTES = 128
MMA_ROWS = 16
PART_ROWS = 8
PART_SKEW_BYTES = 64  # between the two parts of a tile in shared memory: 16 of the 32 banks
CHUNK_TOKENS = 8
TOKEN_VALUES = 128  # of k and q that a thread holds before it stages them, at most
SMEM_RESERVED_BYTES = 1024  # of every block, by the driver
SMEM_ALIGNMENT = 128  # of what a block takes
MBARRIER_BYTES = 8
GATE_COLUMNS = 8
GATE_STRIDE = 12  # floats from one token's to the next, which avoids bank conflicts
LOWEST_LOG_DECAY = -104.0  # that kernels work with: exp of it is 0 in float32
MATRIX_FLOATS = CHUNK_TOKENS * CHUNK_TOKENS
MATRICES_PER_CHUNK = 2
TRIGGER_SUFFIX = {"late": "", "early": "e", "start": "s"}


@dataclass(frozen=True)
class Tactic:
    """How thread blocks divide a head's state: each warp owns `tiles_per_warp` tiles of 16 rows (V index).

    row_copies: a tile moves as 16 copies of one row instead of one copy; the rows may then lie apart.
    trigger: when a dependent grid may start, as far as a block of this one is concerned: at its "start",
    "early", once it has its state in registers, or "late", as its last stores are issued. The sooner, the
    more overlaps, but then its blocks crowd multiprocessors that have few of this grid.
    evict_first: states pass through L2 as what is to leave it first.
    ahead: of the blocks that fill the GPU while the previous grid ends, the last so many per multiprocessor
    prefetch their states then; None: all do. So do all blocks of a small grid, and all that come later.
    max_blocks_per_sm: at most so many blocks share a multiprocessor; None: all that fit.
    """

    warps: int
    tiles_per_warp: int
    row_copies: bool = False
    trigger: str = "late"
    evict_first: bool = False
    ahead: int | None = None
    max_blocks_per_sm: int | None = None

    @property
    def name(self) -> str:
        """`w4t1`, with the suffixes `r` for row copies, `e` or `s` for the trigger, `f` for evict first, `a1`
        for one block ahead and `b2` for two blocks at most, both per multiprocessor.
        """
        suffixes = "r" * self.row_copies + TRIGGER_SUFFIX[self.trigger]
        suffixes += "f" * self.evict_first
        numbers = {"a": self.ahead, "b": self.max_blocks_per_sm}
        suffixes += "".join(f"{letter}{x}" for letter, x in numbers.items() if x is not None)
        return f"w{self.warps}t{self.tiles_per_warp}{suffixes}"

    @property
    def rows(self) -> int:
        """Rows of the state per thread block."""
        return self.warps * self.tiles_per_warp * MMA_ROWS

    @property
    def threads(self) -> int:
        return self.warps * WARP_LANES


def taken_smem_bytes(smem_bytes: int) -> int:
    """What a block that asks for so much shared memory takes of a multiprocessor's."""
    return -(-smem_bytes // SMEM_ALIGNMENT) * SMEM_ALIGNMENT + SMEM_RESERVED_BYTES


class Footprint:
    """What a block of a kernel takes of a multiprocessor."""

    state_dtype: str
    smem_optin_bytes: int

    @property
    def state_bytes(self) -> int:
        """Bytes of a state element."""
        return 4 if self.state_dtype == "float32" else 2

    @property
    def vector_elements(self) -> int:
        """State elements per 16-byte access."""
        return VECTOR_BYTES // self.state_bytes

    @property
    def rows_may_lie_apart(self) -> bool:
        """Whether the rows of a state need not be contiguous."""
        raise NotImplementedError

    @property
    def smem_bytes(self) -> int:
        """Shared memory that a block asks for."""
        raise NotImplementedError

    @property
    def warps_per_sm(self) -> int:
        """Warps that the registers of an SM are divided among."""
        raise NotImplementedError

    @property
    def warps(self) -> int:
        """Warps of a block."""
        raise NotImplementedError

    @property
    def smem_per_sm_bytes(self) -> int:
        """Shared memory of a multiprocessor: what one block may ask for, and what the driver keeps of it."""
        return self.smem_optin_bytes + SMEM_RESERVED_BYTES

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit into a multiprocessor at once."""
        return self.fitting_blocks(self.smem_bytes)

    def fitting_blocks(self, smem_bytes: int) -> int:
        """Blocks that fit into a multiprocessor at once if each asks for so much shared memory."""
        return max(1, min(self.warps_per_sm // self.warps, self.blocks_by_smem(smem_bytes)))

    def blocks_by_smem(self, smem_bytes: int) -> int:
        """Blocks whose shared memory fits, so much each, whatever registers they take."""
        return self.smem_per_sm_bytes // taken_smem_bytes(smem_bytes)

    @property
    def smem_carveout_percent(self) -> int:
        """Share of the L1 memory to reserve as shared memory."""
        wanted = self.blocks_per_sm * taken_smem_bytes(self.smem_bytes)
        return min(100, -(-100 * wanted // self.smem_per_sm_bytes))


class TokenTiles(Footprint):
    """Sizes of a kernel whose warps own tiles of 16 state rows and which takes its tokens in chunks."""

    T: int
    K: int
    V: int
    io_dtype: str
    tactic: Tactic

    @property
    def warps(self) -> int:
        return self.tactic.warps

    @property
    def rows_may_lie_apart(self) -> bool:
        return self.tactic.row_copies

    @property
    def used_smem_bytes(self) -> int:
        """Shared memory that a block uses."""
        raise NotImplementedError

    @property
    def smem_bytes(self) -> int:
        """Shared memory that a block asks for: more than it uses where the tactic allows no more blocks."""
        cap = self.tactic.max_blocks_per_sm
        if cap is None:
            return self.used_smem_bytes
        too_small = self.smem_per_sm_bytes // (cap + 1) - SMEM_RESERVED_BYTES
        return max(self.used_smem_bytes, (too_small // SMEM_ALIGNMENT + 1) * SMEM_ALIGNMENT)

    @property
    def blocks_per_head(self) -> int:
        """Thread blocks that share the state of a value head."""
        return self.V // self.tactic.rows

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(first token, tokens) of each chunk."""
        return tuple((t, min(CHUNK_TOKENS, self.T - t)) for t in range(0, self.T, CHUNK_TOKENS))

    @property
    def early_chunks(self) -> int:
        """Chunks whose v is loaded before the state is; the others load it when it is due."""
        return len(self.chunks)

    @property
    def token_groups(self) -> tuple[range, ...]:
        """A warp's tokens, numbered, in the groups whose k and q its registers hold at once."""
        count = -(-self.T // self.tactic.warps)
        step = TOKEN_VALUES // (2 * self.K // WARP_LANES)
        return tuple(range(first, min(first + step, count)) for first in range(0, count, step))

    @property
    def has_registers(self) -> bool:
        """Whether the registers of a thread are enough for the compiler to spill none."""
        return True

    @property
    def is_twin(self) -> bool:
        """Whether fewer blocks fit than a limit of the tactic is about, so that it does what another does."""
        return False

    @property
    def row_bytes(self) -> int:
        return self.K * self.state_bytes

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile: 16 rows of the state."""
        return MMA_ROWS * self.row_bytes

    @property
    def part_stride(self) -> int:
        """State elements from one part of a tile to the next in shared memory."""
        return PART_ROWS * self.K + PART_SKEW_BYTES // self.state_bytes

    @property
    def buffer_bytes(self) -> int:
        """Shared memory of a tile."""
        return MMA_ROWS // PART_ROWS * self.part_stride * self.state_bytes

    @property
    def buffers_per_warp(self) -> int:
        """Tile buffers of a warp."""
        raise NotImplementedError

    @property
    def tiles_bytes(self) -> int:
        """Shared memory of all tiles; what separates parts does not follow the last."""
        return self.warps * self.buffers_per_warp * self.buffer_bytes - PART_SKEW_BYTES

    @property
    def token_stride(self) -> int:
        """Elements from one token's k or q to the next in shared memory; the slack takes `token_skew`."""
        return self.K + (16 if self.bf16_tokens else 32)

    @property
    def bf16_products(self) -> bool:
        """Whether states as they are in memory meet keys and queries as they are given, all in bfloat16."""
        return self.state_dtype == self.io_dtype == "bfloat16"

    @property
    def bf16_tokens(self) -> bool:
        """Whether k and q stay in bfloat16, as they are given, and meet other keys in products of it."""
        return self.bf16_products

    @property
    def token_dtype(self) -> str:
        """Of k and q in shared memory."""
        return "bfloat16" if self.bf16_tokens else "float32"

    @property
    def token_bytes(self) -> int:
        """Shared memory of k and q of all tokens."""
        return 2 * self.T * self.token_stride * (2 if self.bf16_tokens else 4)

    def token_skew(self, x: int) -> int:
        """Offset in elements of chunk token x (also a traced integer) that avoids bank conflicts.

        k is read as rows x and x + 1 side by side, in 16-byte vectors, which the skew of a token spreads over
        the 32 banks; in 8-byte ones, of bfloat16 tokens beside float32 states, four rows do without.
        """
        if self.bf16_tokens:
            return 16 * (x & 1) if self.bf16_products else 0
        if self.vector_elements == 4:
            return (8 * (x // 2) + 16 * (x % 2)) % 32
        return 16 * (x // 4) + 4 * ((x // 2) % 2) + 4 * (x % 2)


@dataclass(frozen=True)
class Config(Footprint):
    """What changes the code of either kernel, dtypes by their torch names (`bfloat16`).

    pdl, smem_optin_bytes: of the architecture, whether it has programmatic dependent launch and the most
    shared memory of a block.
    """

    T: int
    K: int
    V: int
    io_dtype: str
    gate_dtype: str
    dt_bias_dtype: str
    out_dtype: str
    state_dtype: str
    state_layout: str
    index_dtype: str | None
    use_qk_l2norm: bool
    update_state: bool
    intermediate: str
    separate_write_indices: bool
    tensor_scale: bool
    pdl: bool
    smem_optin_bytes: int


def fields_of(config: type[Any], problem: object, arch: Arch, **values: Any) -> dict[str, Any]:
    """The fields of a configuration: `values`, the architecture's, the problem's; dtypes by their names."""
    values |= {"pdl": arch.supports_pdl, "smem_optin_bytes": arch.smem_optin_bytes}
    taken = {
        field.name: values[field.name] if field.name in values else getattr(problem, field.name)
        for field in fields(config)
    }
    return {name: _torch_name(x) if isinstance(x, torch.dtype) else x for name, x in taken.items()}


def _torch_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class KernelConfig(TokenTiles, Config):
    """A specialisation of the V-major kernel."""

    tactic: Tactic

    @classmethod
    def of(cls, problem: GatedDeltaRuleProblem, tactic: Tactic, arch: Arch) -> KernelConfig:
        return cls(**fields_of(cls, problem, arch, tactic=tactic))

    @property
    def stores_every_state(self) -> bool:
        return self.intermediate != "none"

    @property
    def bf16_products(self) -> bool:
        return self.T > 1 and super().bf16_products  # a single token is plain arithmetic, in float32

    @property
    def prefetch(self) -> bool:
        """Whether to bring the state to L2 before the previous grid ends; not while stores keep L2 busy."""
        return self.tactic.trigger != "late" or not self.stores_every_state

    @property
    def buffers_per_warp(self) -> int:
        """Tile buffers of a warp: one per tile, and one to alternate with where every state is stored."""
        return self.tactic.tiles_per_warp + (1 if self.stores_every_state else 0)

    @property
    def pairs_stride(self) -> int:
        """Floats from one pair of tokens to the next in `Shared.pairs`; the slack avoids bank conflicts."""
        return 2 * self.K + 8

    @property
    def pairs_floats(self) -> int:
        """Size of `Shared.pairs`, which the state needs to advance by a chunk at once."""
        return 0 if self.T == 1 or self.stores_every_state else -(-self.T // 2) * self.pairs_stride

    @property
    def used_smem_bytes(self) -> int:
        """What a block uses of its shared memory: tile buffers, k and q, pairs, matrices, gates, barriers."""
        floats = self.T * GATE_STRIDE + self.pairs_floats
        floats += len(self.chunks) * MATRICES_PER_CHUNK * MATRIX_FLOATS
        barriers = MBARRIER_BYTES * self.warps * self.tactic.tiles_per_warp
        return self.tiles_bytes + self.token_bytes + 4 * floats + barriers

    @property
    def is_twin(self) -> bool:
        cap, ahead = self.tactic.max_blocks_per_sm, self.tactic.ahead
        idle_cap = cap is not None and self.fitting_blocks(self.used_smem_bytes) <= cap
        return idle_cap or (ahead is not None and ahead >= self.blocks_per_sm)

    @property
    def early_chunks(self) -> int:
        return 1 if self.saves_registers else super().early_chunks

    @property
    def saves_registers(self) -> bool:
        """Whether registers are so scarce that nothing is held before it is due.

        For every chunk and every stored token the place where a warp works is then one that the compiler
        knows nothing of; else it makes addresses early and holds them. It is told to save, too.
        """
        return self.stores_every_state and self.K > 128 and len(self.chunks) > 1

    @property
    def has_registers(self) -> bool:
        """Whether no register spills: of a second tile, what is made early would."""
        return not (self.saves_registers and self.tactic.tiles_per_warp > 1)

    @property
    def warps_per_sm(self) -> int:
        """128, 168 or 255 registers per thread, enough for the compiler to spill none."""
        if self.K > 128:
            return 8
        if len(self.chunks) > 1:
            return 12 if self.bf16_products and not self.stores_every_state else 8
        if self.bf16_products:
            return 16
        many = self.io_dtype == "float32" and self.tactic.tiles_per_warp > 1
        return 12 if self.stores_every_state or many else 16
