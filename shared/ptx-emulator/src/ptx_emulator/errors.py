"""What the emulator raises."""

from __future__ import annotations


class EmulatorError(Exception):
    """Anything the emulator refuses or finds."""


class PtxSyntaxError(EmulatorError):
    """The PTX text cannot be parsed; the message has the line."""


class UnsupportedInstruction(EmulatorError):
    """An instruction, or a form of it, that the emulator does not know. It never guesses."""

    def __init__(self, name: str, line: int, function: str, why: str = "") -> None:
        super().__init__(
            f"PTX line {line} of {function}: {name} is not supported" + (f": {why}" if why else "")
        )
        self.name = name
        self.line = line


class BuildError(EmulatorError):
    """The runtime could not be compiled."""
