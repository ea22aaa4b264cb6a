"""What the emulator has to know of a GPU: limits, and how many CTAs it can hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptx_emulator.errors import EmulatorError


@dataclass(frozen=True)
class Target:
    """A compute capability. `max_shared_bytes` is the opt-in limit of one CTA, `num_sms` that of the largest
    product with it."""

    name: str
    sm: int
    max_shared_bytes: int
    num_sms: int

    @property
    def shared_base(self) -> int:
        """The address where a CTA's own shared memory begins; ptxas lays it out so, behind reserved bytes."""
        return 1024 if self.sm >= 90 else 0


_TARGETS = {
    80: Target("sm_80", 80, 166912, 108),
    86: Target("sm_86", 86, 101376, 84),
    87: Target("sm_87", 87, 166912, 16),
    89: Target("sm_89", 89, 101376, 142),
    90: Target("sm_90", 90, 232448, 132),
    100: Target("sm_100", 100, 232448, 148),
    101: Target("sm_101", 101, 232448, 20),
    103: Target("sm_103", 103, 232448, 148),
    110: Target("sm_110", 110, 232448, 20),
    120: Target("sm_120", 120, 101376, 188),
    121: Target("sm_121", 121, 101376, 48),
}


# A target with a suffix shares the features of a family with the newer members of it; sm_101 became sm_110.
FAMILIES = {90: 90, 100: 100, 103: 100, 101: 110, 110: 110, 120: 120, 121: 120}


def split_target(name: str) -> tuple[int, str]:
    """Number and suffix: (100, "a") for `sm_100a`.

    Raises:
        EmulatorError: what is not the name of an architecture.
    """
    match = re.fullmatch(r"(?:sm|compute)_(\d+)([af]?)", name)
    if match is None:
        raise EmulatorError(f"device: {name!r} is not the name of an architecture, such as sm_90a")
    return int(match[1]), match[2]


def target(name: str) -> Target:
    """The target of an architecture's name, such as `sm_100a` or `sm_120f`.

    Raises:
        EmulatorError: an architecture that the emulator does not know.
    """
    found = _TARGETS.get(split_target(name)[0])
    if found is None:
        known = ", ".join(t.name for t in _TARGETS.values())
        raise EmulatorError(f"device: {name!r} is not a target of the emulator, which has {known}")
    return found


def check_runs_on(ptx_target: str, device: str) -> None:
    """Refuses PTX of a `.target` on a device: older ones, and others where the target has a suffix.

    Raises:
        EmulatorError: it does not run there.
    """
    (number, suffix), (chip, _) = split_target(ptx_target), split_target(device)
    renamed = FAMILIES.get(chip) == FAMILIES.get(number) == 110
    if suffix == "a" and chip != number and not renamed:
        why = "whose PTX runs on that architecture only"
    elif suffix == "f" and (FAMILIES.get(chip) != FAMILIES.get(number) or chip < number):
        why = "whose PTX runs on that and the newer members of its family"
    elif chip < number:
        why = "which is newer"
    else:
        return
    raise EmulatorError(f"device: the PTX cannot run on {device}, it is for {ptx_target}, {why}")
