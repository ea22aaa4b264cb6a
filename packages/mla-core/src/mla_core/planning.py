"""Split-KV planning: over how many blocks the keys of a request are spread, and what partial results need.

One unit of work is a row tile (tile_m of the q_len * num_heads rows of a request) against the keys of a
split; it occupies one cluster. Split s of S takes the key tiles [s * T // S, (s + 1) * T // S) of T, so that
the splits cover every tile once and differ by one tile at most. With more than one split each writes a
normalised partial output and its log-sum-exp in float32, and a combine kernel merges them.

S is the plan's `num_splits` for every request, or a request's own: with `tiles_per_split`, a request of T
tiles is spread over S = max(1, min(num_splits, ceil(T / tiles_per_split))), and the units of its splits from
S on have nothing to do. A short request among long ones is then not cut into more pieces than keep pace with
the longest request, which is less to combine.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernel_dispatch import ArgumentError

from .problem import DecodeProblem, check_bool, check_index, check_positive, check_problem

FLOAT32_BYTES = 4
SECTION_ALIGN_BYTES = 256  # of each section of a workspace: the alignment of a CUDA allocation


def num_key_tiles(seq_len: int, tile_n: int) -> int:
    """Tiles of tile_n keys that hold seq_len keys."""
    check_index("seq_len", seq_len)
    check_positive("tile_n", tile_n)
    return -(-seq_len // tile_n)


def split_key_tiles(key_tiles: int, num_splits: int, split_idx: int) -> range:
    """Key tiles of split split_idx of num_splits; some are empty where there are more splits than tiles."""
    check_index("key_tiles", key_tiles)
    check_positive("num_splits", num_splits)
    check_index("split_idx", split_idx, below=num_splits)
    return range(split_idx * key_tiles // num_splits, (split_idx + 1) * key_tiles // num_splits)


@dataclass(frozen=True)
class SplitPlan:
    """A number of splits for one problem and tile shape.

    rows: (query token, head) rows of all requests.
    key_tiles: tiles of tile_n keys of the longest sequence the problem allows.
    num_splits: of any request, at most; 1 to key_tiles.
    tiles_per_split: the most key tiles of a split, for requests whose tiles fit num_splits such splits; a
        request has no more splits than that takes. 0: every request has num_splits, some of them empty where
        it has fewer tiles.
    """

    rows: int
    kv_lora_rank: int
    tile_n: int
    key_tiles: int
    num_splits: int
    tiles_per_split: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "kv_lora_rank", "tile_n", "key_tiles", "num_splits"):
            check_positive(name, getattr(self, name))
        check_index("tiles_per_split", self.tiles_per_split)
        if self.num_splits > self.key_tiles:
            raise ArgumentError(
                "num_splits", f"{self.num_splits}, expected at most {self.key_tiles} key tiles"
            )

    def splits_of(self, seq_len: int) -> int:
        """Splits that the keys of a request of seq_len keys are spread over."""
        if self.tiles_per_split == 0:
            return self.num_splits
        wanted = -(-num_key_tiles(seq_len, self.tile_n) // self.tiles_per_split)
        return max(1, min(self.num_splits, wanted))

    def keys(self, split_idx: int, seq_len: int) -> range:
        """Keys of split split_idx for a request of seq_len keys; empty where the request has too few."""
        check_index("split_idx", split_idx, below=self.num_splits)
        splits = self.splits_of(seq_len)
        if split_idx >= splits:
            return range(0)
        tiles = split_key_tiles(num_key_tiles(seq_len, self.tile_n), splits, split_idx)
        return range(min(tiles.start * self.tile_n, seq_len), min(tiles.stop * self.tile_n, seq_len))

    @property
    def o_partial_bytes(self) -> int:
        """float32 [num_splits, rows, kv_lora_rank], rounded up to a section; none where nothing is split."""
        return self._section_bytes(self.kv_lora_rank)

    @property
    def lse_partial_bytes(self) -> int:
        """float32 [num_splits, rows], rounded up to a section; none where nothing is split."""
        return self._section_bytes(1)

    @property
    def workspace_bytes(self) -> int:
        """o_partial followed by lse_partial."""
        return self.o_partial_bytes + self.lse_partial_bytes

    def _section_bytes(self, elements_per_row: int) -> int:
        if self.num_splits == 1:
            return 0
        nbytes = self.num_splits * self.rows * elements_per_row * FLOAT32_BYTES
        return -(-nbytes // SECTION_ALIGN_BYTES) * SECTION_ALIGN_BYTES


def plan_splits(
    problem: DecodeProblem,
    *,
    sm_count: int,
    tile_m: int,
    tile_n: int,
    cluster_size: int = 1,
    min_split_keys: int = 1,
    per_request: bool = False,
) -> SplitPlan:
    """Choose the number of splits that fills the device once.

    The clusters that are resident at a time, sm_count // cluster_size, are shared among the row tiles of all
    requests. Of the split counts with the same longest split the smallest is taken: it takes as long and
    leaves less to combine. The result never grows with the batch or the rows and never shrinks with sm_count.

    tile_m: rows per tile. tile_n: keys per tile. cluster_size: blocks that share a unit, each on its own SM.
    min_split_keys: keys, rounded up to tiles, that the longest split of the longest sequence has at least:
        what makes up for what a split costs whatever its length.
    per_request: whether the kernel computes each request's own number of splits. Where lengths vary, it then
        has as few as leave no split longer than those of the longest sequence; where `problem.is_var_seq` is
        false, each request is spread as far as its tiles go.
    """
    check_problem(problem)
    check_bool("per_request", per_request)
    for name, value in (
        ("sm_count", sm_count),
        ("tile_m", tile_m),
        ("tile_n", tile_n),
        ("cluster_size", cluster_size),
        ("min_split_keys", min_split_keys),
    ):
        check_positive(name, value)
    if cluster_size > sm_count:
        raise ArgumentError("cluster_size", f"{cluster_size}, expected at most sm_count = {sm_count}")
    row_tiles = problem.batch * -(-problem.rows // tile_m)
    key_tiles = num_key_tiles(problem.max_seq_len, tile_n)
    filling = max(1, min(key_tiles, sm_count // cluster_size // row_tiles))
    longest_split = max(-(-key_tiles // filling), -(-min_split_keys // tile_n))
    num_splits = -(-key_tiles // longest_split)
    tiles_per_split = 0
    if per_request:
        tiles_per_split = -(-key_tiles // num_splits) if problem.is_var_seq else 1
    return SplitPlan(
        rows=problem.batch * problem.rows,
        kv_lora_rank=problem.kv_lora_rank,
        tile_n=tile_n,
        key_tiles=key_tiles,
        num_splits=num_splits,
        tiles_per_split=tiles_per_split,
    )
