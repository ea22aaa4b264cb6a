"""What MLA decode executes on SM100, ours beside FlashInfer's as installed, counted on the emulator.

    python benchmarks/emulated_mla_cost.py --out benchmarks/results/emulated_mla_cost
    python benchmarks/emulated_mla_cost.py --cells q1-H128-s8192-bf16 --lines 20
    python benchmarks/emulated_mla_cost.py --document    # tables of docs/mla-sm100-cost.md from the results

No GPU is needed. Both kernels decode the same tensors, and every element of every result is held against
float64 before anything is counted; checks of the emulator for races and bounds are off. Two launches of each:
`split`, as planned for one request on 148 SMs, and `whole`, one cluster per tile of rows, which is what each
cluster of a large batch does. Instructions are those of the PTX, by warps. `mov` is given apart: most of them
only name registers, and the assembler removes them. A tile is 128 keys against 128 rows, or against the rows
there are where a request has fewer.

FlashInfer is left out, with a message, where `flashinfer-python` is not installed (`--no-deps` is enough).
The exit status is 1 if a result of ours is wrong.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _mla_cost_model as model
import torch
from _mla_cases import HEAD_DIM, LATENT, Call, Cell
from _mla_cost_model import PEER, instructions
from kernel_dispatch import Arch
from kernel_testing import environment
from mla_sm100.config import WHOLE, DecodeConfig
from mla_sm100.kernels import FUNCTION, PAIR, SINGLE, Division
from mla_sm100.launch import PARAMETERS, Launcher
from ptx_emulator import CuteFiles, Options, emulate
from ptx_emulator.counts import LaunchCounts

ARCH = "sm_100a"
PEER_FILE = Path(__file__).resolve().parents[1] / "tests" / "peers" / "flashinfer_mla.py"
NUM_SMS = model.B200.sms
SEQ_LEN, TILE = 8192, 128
CELLS = [
    Cell(dtype, 1, heads, SEQ_LEN, q_len)
    for heads, q_len in ((128, 1), (128, 4), (16, 1))
    for dtype in ("bf16", "fp8")
]
OURS = (PAIR, SINGLE)
SPLIT = "split"
REGIMES = (SPLIT, WHOLE.removeprefix("-"))
DISTRIBUTIONS = (
    *("mla-sm100", "mla-core", "cute-kernels", "ptx-emulator"),
    *("flashinfer-python", "nvidia-cutlass-dsl"),
)
NOT_INSTALLED = "flashinfer-python is not installed; pip install --no-deps flashinfer-python"
ROLES = {  # warps of a CTA by what they do; our softmax warps correct, too
    "ours": {"softmax": range(4), "mma": [4], "load": [5, 6, 7]},
    # mla_decode_fp16.py and mla_decode_fp8.py of FlashInfer 0.7.2, `__init__`; page table and idle warps
    # are load and other.
    "bf16": {"softmax": range(4), "correction": range(4, 8), "mma": [8], "load": [9, 10], "other": [11]},
    "fp8": {
        "softmax": [*range(4), *range(12, 16)],
        "correction": range(4, 8),
        "mma": [8, 11],
        "load": [9, 10],
    },
}


@dataclass
class Counted:
    """What one variant executed for a cell: `decode` by role, and `merge` of the splits if there are any.

    clusters: of the decode launch. query_bytes: of shared memory filled with queries.
    """

    cell: Cell
    variant: str
    regime: str
    clusters: int
    num_splits: int
    query_bytes: int
    decode: dict[str, dict[str, int]]
    merge: dict[str, int]
    hottest: list[str] = field(default_factory=list)

    @property
    def tiles(self) -> int:
        """Tiles of 128 keys by 128 rows, or by the rows there are."""
        return -(-self.cell.seq_len // TILE) * -(-self.cell.problem.rows // TILE)

    @property
    def key_bytes(self) -> int:
        """Of keys and values, filled into shared memory by TMA."""
        query_by_tma = self.query_bytes if self.variant == PEER else 0
        return self.total("tma_load_bytes") - query_by_tma

    def total(self, name: str) -> int:
        """A count of the decode kernel."""
        return sum(role[name] for role in self.decode.values())

    def instructions(self, *roles: str, moves: bool = True) -> int:
        """Of some roles of the decode kernel, or of all."""
        chosen = [row for role, row in self.decode.items() if not roles or role in roles]
        return sum(instructions(row, moves) for row in chosen)

    @property
    def all_instructions(self) -> int:
        """Of both kernels."""
        return self.instructions() + instructions(self.merge)

    def per_tile(self, *roles: str, moves: bool = True) -> float:
        """Instructions of some roles for each tile."""
        return self.instructions(*roles, moves=moves) / self.tiles

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "cell": str(self.cell),
            "variant": self.variant,
            "regime": self.regime,
            "clusters": self.clusters,
            "num_splits": self.num_splits,
            "tiles": self.tiles,
            "key_bytes": self.key_bytes,
            "query_bytes": self.query_bytes,
            "instructions": {"decode": self.instructions(), "merge": instructions(self.merge)},
            "instructions_without_moves": {
                "decode": self.instructions(moves=False),
                "merge": instructions(self.merge, moves=False),
            },
            "decode": self.decode,
            "merge": self.merge,
        }


@functools.cache
def flashinfer_mla() -> Any:
    """What the tests of published kernels decode with."""
    spec = importlib.util.spec_from_file_location("flashinfer_mla", PEER_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def our_function(config: DecodeConfig) -> Any:
    """Our kernels of one configuration on the emulator, from the compile cache."""
    compiled = FUNCTION.compiled(config, ARCH)
    files = CuteFiles(compiled.object_file, compiled.name, compiled.ptx.read_text(), PARAMETERS)
    return emulate(files, ARCH, options=Options(checks=False))


def call_of(cell: Cell, workspace_nbytes: int = 0) -> Call:
    """A call with the tensors that every variant of the cell decodes."""
    torch.manual_seed(0)
    return Call(cell, torch.device("cpu"), workspace_nbytes)


def run_ours(cell: Cell, tile: str, regime: str) -> Counted:
    """Decode with one of our tactics, check, count."""
    tactic = tile if regime == SPLIT else tile + WHOLE
    problem = cell.problem
    division = Division.of(problem, replace(Arch.from_name(ARCH), sm_count=NUM_SMS), tactic)
    config = division.config
    function = our_function(config)
    call = call_of(cell, division.splits.workspace_bytes)
    (query, kv_cache, block_tables, seq_lens), named = call.arguments
    Launcher(function, problem, division)(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        None,
        named["softmax_scale"],  # type: ignore[arg-type]
        1.0,
        call.out,
        call.lse,
        call.workspace,
    )
    call.check(cell, f"ours, {tactic}")
    rows = division.num_clusters * config.tile_m
    return counted(cell, tile, regime, function, ROLES["ours"], division.num_clusters, rows)


def run_flashinfer(cell: Cell, regime: str) -> Counted:
    """Decode with FlashInfer's kernel, check, count. On a GPU of two SMs it splits nothing."""
    flashinfer_mla().NUM_SMS = NUM_SMS if regime == SPLIT else 2
    call = call_of(cell)
    (query, kv_cache, block_tables, seq_lens), _ = call.arguments
    decode = flashinfer_mla().decode_call(
        query, kv_cache, block_tables, seq_lens, HEAD_DIM**-0.5, cell.seq_len, pdl=True
    )
    decode.job.run(Options(checks=False))
    function = decode.job.function
    call.out, call.lse = decode.out, decode.lse
    call.check(cell, PEER)
    grid = function.launches[0].grid
    clusters = grid[0] * grid[1] * grid[2] // 2
    made = counted(cell, PEER, regime, function, ROLES[cell.dtype], clusters, clusters * TILE)
    # Roles are named by the numbers of warps, which another version of FlashInfer may give otherwise.
    for name, role in (("exponentials", "softmax"), ("mma_flops", "mma"), ("tma_load_bytes", "load")):
        if made.decode[role][name] < 0.98 * made.total(name):
            raise SystemExit(f"FlashInfer's {role} warps are others than those that this file names")
    return made


def counted(
    cell: Cell,
    variant: str,
    regime: str,
    function: Any,
    roles: Mapping[str, Sequence[int]],
    clusters: int,
    query_rows: int,
) -> Counted:
    """The counts of the decode launch by role, and those of the launch that merges splits."""
    decode, *merge = function.result.counts
    merged = merge[0].to_dict()["total"] if merge else {}
    splits = clusters // -(-cell.problem.rows // (TILE if variant != SINGLE else TILE // 2))
    query_bytes = query_rows * HEAD_DIM * cell.problem.q_dtype.itemsize
    made = Counted(cell, variant, regime, clusters, splits, query_bytes, decode.by_role(roles), merged)
    made.hottest = source_lines(decode, function, made.tiles)
    return made


def source_lines(counts: LaunchCounts, function: Any, tiles: int) -> list[str]:
    """Source lines by the instructions executed for them, most first, with the warps that did."""
    locations = function.module.kernel(counts.kernel).program.locations
    found: Counter[str] = Counter()
    warps: dict[str, set[int]] = defaultdict(set)
    for column, line in enumerate(counts.lines):
        by_warp = counts.executed[:, column]
        place = place_of(locations.get(int(line)))
        found[place] += int(by_warp.sum())
        warps[place] |= {int(warp) for warp in by_warp.nonzero()[0]}
    return [
        f"{times / tiles:9.1f} per tile, warps {','.join(map(str, sorted(warps[place])))}: {place}"
        for place, times in found.most_common()
    ]


def place_of(location: Any) -> str:
    """The innermost place that is in a kernel's own package, not in the DSL's library."""
    while location is not None and "cutlass" in location.file and location.inlined_at is not None:
        location = location.inlined_at
    return "no place" if location is None else f"{Path(location.file).name}:{location.line}"


def measure(cell: Cell, with_peer: bool) -> tuple[list[Counted], dict[str, str]]:
    """All variants of a cell, and why one is missing."""
    found, failed = [], {}
    for regime in REGIMES:
        for variant in (*OURS, *([PEER] if with_peer else [])):
            try:
                if variant == PEER:
                    found.append(run_flashinfer(cell, regime))
                else:
                    found.append(run_ours(cell, variant, regime))
            except AssertionError as error:
                failed[f"{variant} {regime}"] = str(error).splitlines()[0]
    return found, failed


def minimum_flops(cell: Cell, tile_m: int) -> int:
    """Of both products, with rows filled up to whole tiles of an MMA."""
    rows = -(-cell.problem.rows // tile_m) * tile_m
    return 2 * rows * cell.seq_len * (HEAD_DIM + LATENT)


def minimum_key_bytes(cell: Cell, variant: str) -> int:
    """What has to reach shared memory, per tile of rows.

    One CTA reads the values from its keys: 576 elements of each key. Of a pair each CTA needs 64 of 128 keys
    whole for the scores, and for the output the half of the latent elements, of all 128 keys, that its half
    of the output is made from. An MMA of two CTAs takes both operands from the same addresses in either, so
    that where these overlap the bytes cannot be shared: 576 + 512 elements of each key.
    """
    elements = HEAD_DIM if variant == SINGLE else HEAD_DIM + LATENT
    row_tiles = -(-cell.problem.rows // tile_rows(variant))
    return row_tiles * cell.seq_len * elements * cell.problem.q_dtype.itemsize


def tile_rows(variant: str) -> int:
    """Rows of a tile of the variant."""
    return TILE // 2 if variant == SINGLE else TILE


def table(found: Sequence[Counted]) -> str:
    """A row for each figure, a column for each variant."""
    own = ("softmax", "correction")
    figures: list[tuple[str, Callable[[Counted], str]]] = [
        ("clusters x splits", lambda c: f"{c.clusters} x {c.num_splits}"),
        ("instructions, decode", lambda c: f"{c.instructions():,}"),
        ("instructions, merge", lambda c: f"{instructions(c.merge):,}"),
        ("instructions, both", lambda c: f"{c.all_instructions:,}"),
        ("per tile: all", lambda c: f"{c.per_tile():,.0f}"),
        ("  without mov", lambda c: f"{c.per_tile(moves=False):,.0f}"),
        ("  softmax + correction", lambda c: f"{c.per_tile(*own):,.0f}"),
        ("    without mov", lambda c: f"{c.per_tile(*own, moves=False):,.0f}"),
        ("  mma", lambda c: f"{c.per_tile('mma'):,.0f}"),
        ("  load", lambda c: f"{c.per_tile('load'):,.0f}"),
        ("  barrier waits", lambda c: f"{c.total('barrier_waits') / c.tiles:,.1f}"),
        ("exponentials", lambda c: f"{c.total('exponentials') + c.merge.get('exponentials', 0):,}"),
        ("MMA FLOP / minimum", lambda c: f"{c.total('mma_flops') / minimum_flops(c.cell, 1):.3f}"),
        ("  of its tile", lambda c: f"{flops_ratio(c):.3f}"),
        ("key bytes by TMA / minimum", lambda c: f"{key_ratio(c):.3f}"),
        ("MB: keys by TMA", lambda c: f"{c.key_bytes / 1e6:,.2f}"),
        ("  queries", lambda c: f"{c.query_bytes / 1e6:,.2f}"),
        ("  TMEM loads", lambda c: f"{c.total('tmem_load_bytes') / 1e6:,.2f}"),
        ("  TMEM stores", lambda c: f"{c.total('tmem_store_bytes') / 1e6:,.2f}"),
        ("  shared loads", lambda c: f"{c.total('shared_load_bytes') / 1e6:,.2f}"),
        ("  shared stores", lambda c: f"{shared_stores(c) / 1e6:,.2f}"),
        ("  global stores", lambda c: f"{c.total('global_store_bytes') / 1e6:,.2f}"),
        ("  global loads of merge", lambda c: f"{c.merge.get('global_load_bytes', 0) / 1e6:,.2f}"),
    ]
    rows = [["", *(f"{c.variant} {c.regime}" for c in found)]]
    rows += [[name, *(show(c) for c in found)] for name, show in figures]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def flops_ratio(c: Counted) -> float:
    """Executed over necessary MMA work, rows filled up."""
    return c.total("mma_flops") / minimum_flops(c.cell, tile_rows(c.variant))


def key_ratio(c: Counted) -> float:
    """Bytes of keys and values that TMA brought over those that it has to."""
    return c.key_bytes / minimum_key_bytes(c.cell, c.variant)


def shared_stores(c: Counted) -> int:
    """Bytes stored by instructions; those that queries take where TMA does not bring them are left out."""
    return c.total("shared_store_bytes") - (0 if c.variant == PEER else c.query_bytes)


def goals(found: Iterable[Counted]) -> list[tuple[str, bool]]:
    """What the kernel is to reach, and whether it does."""
    by_name = {(c.cell, c.variant, c.regime): c for c in found}
    lines = []
    for (cell, variant, regime), c in by_name.items():
        if variant == PEER:
            continue
        name = f"{cell} {variant} {regime}"
        lines.append(
            (f"{name}: MMA work at the minimum of its tile ({flops_ratio(c):.3f})", flops_ratio(c) == 1.0)
        )
        lines.append(
            (f"{name}: TMA bytes at the minimum of its tile ({key_ratio(c):.3f})", key_ratio(c) == 1.0)
        )
        peer = by_name.get((cell, PEER, regime))
        heuristic = SINGLE if cell.problem.rows <= TILE // 2 else PAIR
        if peer is None or variant != heuristic:
            continue
        ours, theirs = (x.per_tile("softmax", "correction") for x in (c, peer))
        text = f"{name}: softmax and correction per tile {ours:,.0f}, FlashInfer's {theirs:,.0f}"
        lines.append((text, ours <= theirs))
        ours, theirs = c.all_instructions, peer.all_instructions
        limit = 1 / 3 if cell.num_heads == 16 else 1.0
        text = f"{name}: instructions in all {ours / theirs:.3f} of FlashInfer's, to be at most {limit:.3f}"
        lines.append((text, ours <= limit * theirs))
    return lines


def parse_cell(text: str) -> Cell:
    """A cell from its name; what the name leaves out has its default."""
    sizes = {name: int(value) for name, value in re.findall(r"\b(B|q|H|p|s)(\d+)", text)}
    dtype = text.rsplit("-", 1)[-1]
    if dtype not in ("bf16", "fp8") or "H" not in sizes:
        raise SystemExit(f"--cells: {text!r}, expected for instance q1-H128-s8192-bf16")
    seq_len, q_len, page_size = sizes.get("s", SEQ_LEN), sizes.get("q", 1), sizes.get("p", 64)
    return Cell(dtype, sizes.get("B", 1), sizes["H"], seq_len, q_len, page_size)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cells", nargs="+", help="problems such as q1-H128-s8192-bf16")
    parser.add_argument("--lines", type=int, default=0, help="print so many source lines that cost the most")
    parser.add_argument("--no-flashinfer", action="store_true", help="count ours only")
    parser.add_argument("--out", type=Path, help="folder for results.json and report.txt")
    parser.add_argument("--document", action="store_true", help="write the document's tables, run nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, and keep the results."""
    options = parse_arguments(arguments)
    if options.document:
        model.update_document()
        return 0
    with_peer = not options.no_flashinfer and flashinfer_mla().installed()
    record = environment(*DISTRIBUTIONS)
    report = [f"{name}: {value}" for name, value in record.items()]
    if not with_peer:
        report.append(
            "FlashInfer is left out: " + (NOT_INSTALLED if not options.no_flashinfer else "asked for")
        )
    print("\n".join(report), flush=True)
    everything: list[Counted] = []
    failures: dict[str, str] = {}
    begin = time.monotonic()
    for cell in map(parse_cell, options.cells) if options.cells else CELLS:
        found, failed = measure(cell, with_peer)
        everything += found
        failures |= {f"{cell} {name}": why for name, why in failed.items()}
        text = [f"\n{cell}", table(found), *(f"WRONG {name}: {why}" for name, why in failed.items())]
        for c in found if options.lines else []:
            text += [f"{cell} {c.variant} {c.regime}", *c.hottest[: options.lines]]
        print("\n".join(text), flush=True)
        report += text
    reached = [f"{'reached' if done else 'MISSED '}  {text}" for text, done in goals(everything)]
    end = ["", *reached, f"{time.monotonic() - begin:.0f} s"]
    print("\n".join(end))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": record,
            "goals": dict(goals(everything)),
            "failed": failures,
            "cells": [c.record() for c in everything],
        }
        (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.out / "report.txt").write_text("\n".join([*report, *end]) + "\n", encoding="utf-8")
    return int(any(PEER not in name for name in failures))


if __name__ == "__main__":
    sys.exit(main())
