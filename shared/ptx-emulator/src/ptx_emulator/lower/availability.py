"""Which targets have which instructions, as the "Target ISA Notes" of the PTX ISA say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from ptx_emulator.ptx.module import Instruction
from ptx_emulator.targets import FAMILIES, split_target


@dataclass(frozen=True)
class Needs:
    """What a target must be: `since` a number, or with a suffix: of `families`, or exactly one of `only`."""

    since: int = 0
    families: tuple[int, ...] = ()
    only: tuple[str, ...] = ()

    def met_by(self, target: str) -> bool:
        number, suffix = split_target(target)
        if self.only:
            return f"{number}{suffix}" in self.only
        if self.families:
            return bool(suffix) and FAMILIES.get(number) in self.families
        return number >= self.since

    def __str__(self) -> str:
        if self.only:
            return " or ".join(f"sm_{name}" for name in self.only)
        if self.families:
            return " or ".join(f"sm_{n}a" if n == 90 else f"sm_{n}f, sm_{n}a" for n in self.families)
        return f"sm_{self.since}"


_ADA = Needs(since=89)
_HOPPER = Needs(since=90)
_BLACKWELL = Needs(since=100)
_WGMMA = Needs(families=(90,))
_TCGEN05 = Needs(families=(100, 110))
_ALL_SPECIFIC = Needs(families=(90, 100, 110, 120))
_BLACKWELL_SPECIFIC = Needs(families=(100, 110, 120))

# First words of instructions; other words that they have, or with "!" do not have, "#4" for four operands;
# what they then need. Words are separated by dots, alternatives by bars. All rows that match count.
_ROWS: tuple[tuple[str, str, Needs], ...] = (
    ("elect griddepcontrol barrier.cluster mapa getctarank", "", _HOPPER),
    ("setmaxnreg", "", _ALL_SPECIFIC),
    ("clusterlaunchcontrol", "", _BLACKWELL),
    ("clusterlaunchcontrol", "multicast::cluster::all", _BLACKWELL_SPECIFIC),
    ("mbarrier.try_wait mbarrier.expect_tx mbarrier.complete_tx", "", _HOPPER),
    ("mbarrier", "expect_tx|relaxed", _HOPPER),
    ("mbarrier.arrive mbarrier.arrive_drop", "#3.!noComplete", _HOPPER),
    ("fence.mbarrier_init fence.proxy.async fence.proxy.async::generic", "", _HOPPER),
    ("fence.proxy.tensormap::generic", "", _HOPPER),
    ("cp.async.bulk cp.reduce.async.bulk st.async red.async tensormap.cp_fenceproxy", "", _HOPPER),
    ("cp.async.bulk", "cp_mask", _BLACKWELL),
    ("cp.async.bulk", "tile::gather4|tile::scatter4|cta_group::1|cta_group::2", _TCGEN05),
    ("prefetch", "tensormap", _HOPPER),
    ("tensormap.replace", "", _ALL_SPECIFIC),
    ("tensormap.replace", "swizzle_atomicity", _BLACKWELL_SPECIFIC),
    ("wgmma", "", _WGMMA),
    ("tcgen05", "", _TCGEN05),
    ("tcgen05.mma", "kind::i8", Needs(only=("100a", "101a", "110a"))),
    ("tcgen05.ld", "red", Needs(only=("101a", "101f", "103a", "103f", "110a", "110f"))),
    ("tcgen05.shift", "", Needs(only=("100a", "101a", "103a", "110a"))),
    ("stmatrix", "", _HOPPER),
    ("ldmatrix stmatrix", "b8|b8x16", _BLACKWELL_SPECIFIC),
    ("mma", "e4m3|e5m2", _ADA),
    ("mma", "kind::f8f6f4", Needs(families=(120,))),
    ("redux", "f32", Needs(families=(100,))),
    ("atom red", "v2|v4|v8|b128|bf16|bf16x2", _HOPPER),
    ("ld st", "v8", _BLACKWELL),
    ("ld st", "v4.b64|v4.u64|v4.s64|v4.f64", _BLACKWELL),
    ("add sub mul", "bf16|bf16x2", _HOPPER),
    ("add min max", "u16x2|s16x2", _HOPPER),
    ("add sub mul fma", "f32x2", _BLACKWELL),
    ("add sub fma", "f32.f16|f32.bf16", _BLACKWELL),
    ("min max", "relu", _HOPPER),
    ("min max", "xorsign", Needs(since=86)),
    ("min max", "f32.#4", _BLACKWELL),
    ("fma", "oob", _HOPPER),
    ("ex2 tanh set setp", "bf16|bf16x2", _HOPPER),
    ("cvt", "bf16.!f32|tf32.rn|tf32.rz", _HOPPER),
    ("cvt", "e4m3x2|e5m2x2", _ADA),
    ("cvt", "e2m1x2|e2m3x2|e3m2x2|ue8m0x2", _BLACKWELL_SPECIFIC),
    ("cvt", "rs", Needs(only=("100a", "103a"))),
)
_ANYWHERE = {"shared::cluster": _HOPPER, "cluster": _HOPPER}  # words of any instruction
_SPECIAL_REGISTERS = re.compile(r"cluster|nclusterid|aggr_smem_size|is_explicit_cluster")


def missing(instruction: Instruction, target: str) -> Needs | None:
    """What a target lacks for an instruction; None if it has it."""
    return _missing(instruction.opcode, instruction.modifiers, len(instruction.operands), target)


@cache
def _missing(opcode: str, modifiers: tuple[str, ...], num_operands: int, target: str) -> Needs | None:
    words = (opcode, *modifiers)
    known = {*words, f"#{num_operands}"}
    needed = [_ANYWHERE[word] for word in modifiers if word in _ANYWHERE]
    for firsts, alternatives, needs in _ROWS:
        starts = (tuple(first.split(".")) for first in firsts.split())
        if any(words[: len(start)] == start for start in starts) and _has(known, alternatives):
            needed.append(needs)
    return next((needs for needs in needed if not needs.met_by(target)), None)


def _has(words: set[str], alternatives: str) -> bool:
    return not alternatives or any(
        all((word[1:] not in words) if word[0] == "!" else (word in words) for word in every.split("."))
        for every in alternatives.split("|")
    )


@cache
def missing_register(name: str, target: str) -> Needs | None:
    """What a target lacks for a special register (`cluster_ctarank`); None if it has it."""
    return _HOPPER if _SPECIAL_REGISTERS.search(name) and not _HOPPER.met_by(target) else None
