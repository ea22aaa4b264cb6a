"""The kernels as `kernel_dispatch` sees them: tactics, how each divides a problem, how one is prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cute_kernels import CuteFunction
from kernel_dispatch import Arch
from mla_core import DecodeProblem, SplitPlan, plan_splits

from .config import FILLS, PERSISTENT, WHOLE, DecodeConfig
from .launch import Launcher

PAIR, SINGLE = "pair", "single"
SPLITS = ("", *FILLS, WHOLE)
TACTICS = tuple(tile + split + end for tile in (PAIR, SINGLE) for split in SPLITS for end in ("", PERSISTENT))

# Fewer keys per split would cost more in queries, partial results and merging than they save.
MIN_SPLIT_KEYS = 128

# (rows of a request, at most; tile): a single CTA where its 64 rows are enough.
NO_LIMIT = float("inf")
TILES: tuple[tuple[float, str], ...] = ((64, SINGLE), (NO_LIMIT, PAIR))


def _trace(config: DecodeConfig, options: str) -> Any:
    from .cute.trace import trace

    return trace(config, options)


_HERE = Path(__file__).parent
FUNCTION = CuteFunction(
    "mla_decode",
    _trace,
    sources=(_HERE / "cute", _HERE / "config.py"),
    options=("--generate-line-info",),  # for profilers, and for what the emulator finds; no effect on code
)


@dataclass(frozen=True)
class Division:
    """What a tactic makes of a problem: code, splits of the keys, clusters.

    num_clusters: of the grid; fewer than there are units where each works on several.
    """

    config: DecodeConfig
    splits: SplitPlan
    num_clusters: int

    @staticmethod
    def of(problem: DecodeProblem, arch: Arch, tactic: str) -> Division:
        """The division that a tactic names."""
        if tactic not in TACTICS:
            raise ValueError(f"tactic {tactic!r}, expected one of {', '.join(TACTICS)}")
        pair = tactic.startswith(PAIR)
        shape = DecodeConfig.of(problem, pair=pair, split=False, pdl=False)
        cluster = shape.cluster_size
        fills = next((times for name, times in FILLS.items() if name in tactic), 1)
        # One cluster is filled without a split.
        to_fill = cluster if WHOLE in tactic else fills * arch.sm_count
        splits = plan_splits(
            problem,
            sm_count=to_fill,
            tile_m=shape.tile_m,
            tile_n=shape.tile_n,
            cluster_size=cluster,
            min_split_keys=MIN_SPLIT_KEYS,
            per_request=True,
        )
        split = splits.num_splits > 1
        wants_pdl = arch.supports_pdl if problem.enable_pdl is None else problem.enable_pdl
        config = DecodeConfig.of(problem, pair=pair, split=split, pdl=split and wants_pdl)
        units = num_units(problem, config, splits.num_splits)
        resident = arch.sm_count // cluster
        return Division(config, splits, min(units, resident) if PERSISTENT in tactic else units)


def num_units(problem: DecodeProblem, config: DecodeConfig, num_splits: int) -> int:
    """Units of work: row tiles of all requests, each against the keys of every split."""
    return problem.batch * num_splits * -(-problem.rows // config.tile_m)


class DecodeKernels:
    """The kernels behind the provider `sm100`."""

    def workspace_nbytes(self, problem: DecodeProblem, arch: Arch, tactic: str | None = None) -> int:
        """Partial results of a tactic; without one, of the tactic that needs the most."""
        names = TACTICS if tactic is None else (tactic,)
        return max(Division.of(problem, arch, name).splits.workspace_bytes for name in names)

    def tactics(self, problem: DecodeProblem, arch: Arch) -> Sequence[str]:
        """All tactics that divide the problem each in its own way, the heuristic's choice first.

        The tile follows the rows of a request. Where all sequences are as long and there are more units than
        fit the device at once, clusters stay and take one after the other; otherwise the hardware starts a
        cluster wherever one has ended, which evens out what varies.
        """
        tile = next(name for limit, name in TILES if problem.rows <= limit)
        division = Division.of(problem, arch, tile)
        resident = arch.sm_count // division.config.cluster_size
        stays = not problem.is_var_seq and division.num_clusters > resident
        preferred = tile + PERSISTENT if stays else tile
        ranked = sorted(TACTICS, key=lambda name: (name != preferred, not name.startswith(tile)))
        different: dict[Division, str] = {}
        for name in ranked:
            different.setdefault(Division.of(problem, arch, name), name)
        return list(different.values())

    def prepare(
        self, problem: DecodeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of a tactic, compiled first if it is not in the compile cache; needs no GPU."""
        division = Division.of(problem, arch, tactic)
        # The instructions of tensor memory exist for a target with a suffix only.
        return Launcher(FUNCTION.load(division.config, arch.target), problem, division)


KERNELS = DecodeKernels()
