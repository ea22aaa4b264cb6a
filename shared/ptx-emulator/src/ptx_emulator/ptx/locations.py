"""Source places of a PTX text: `.loc`, with the files, the functions and the inlining it refers to."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from ptx_emulator.ptx.module import Location
from ptx_emulator.ptx.names import readable

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_INLINE_ASM = re.compile(r"// (begin|end) inline asm")
_STRING = re.compile(r"^(\$\w+):\s*\n((?:\s*\.b8\s+[\d,\s]+\n)+)", re.MULTILINE)


class Locations:
    """What `.loc` says. Its files and strings may stand behind the functions that refer to them."""

    def __init__(self, text: str) -> None:
        self._files: dict[int, str] = {int(number): name for number, name in _FILE.findall(text)}
        self._asm: list[tuple[int, str]] = []  # lines where inline assembly begins and ends
        if "inline asm" in text:
            found = ((n, _INLINE_ASM.search(line)) for n, line in enumerate(text.split("\n"), 1))
            self._asm = [(n, match[1]) for n, match in found if match]
        self._functions: dict[str, str] = {}
        if "inlined_at" in text:
            for label, data in _STRING.findall(text):
                content = bytes(int(byte) for byte in re.findall(r"\d+", data.replace(".b8", "")))
                name = content.split(b"\0")[0].decode("utf-8", "replace")
                self._functions[label] = readable(name) or name
        self._inlined: dict[tuple[str, ...], Location] = {}  # file, line, column -> the latest
        self._known: dict[tuple[str, ...], Location] = {}

    def is_in_inline_asm(self, line: int) -> bool:
        """Whether a PTX line belongs to inline assembly; its place is the one before it.

        At its labels and branches LLVM writes a `.loc` of the source line plus the line of the assembly.
        """
        before = bisect_right(self._asm, (line, "end"))
        return before > 0 and self._asm[before - 1][1] == "begin"

    def at(self, words: Sequence[str]) -> Location | None:
        """The place of `.loc`; None for line 0, which stands for no place.

        Args:
            words: `1 6 3`, perhaps with `, function_name LABEL, inlined_at 1 15 5` behind.
        """
        place = tuple(words[:3])
        if int(place[1]) == 0:
            return None
        if "inlined_at" not in words:
            self._inlined.pop(place, None)
            return self._plain(place)
        start = words.index("inlined_at") + 1
        caller_place = tuple(words[start : start + 3])
        # Where the caller was inlined itself, an earlier `.loc` of its place says so.
        caller = self._inlined.get(caller_place) or self._plain(caller_place)
        label = words[words.index("function_name") + 1] if "function_name" in words else ""
        function = self._functions.get(label, "")
        location = Location(self._file(place[0]), int(place[1]), function, caller)
        self._inlined[place] = location
        return location

    def _plain(self, place: tuple[str, ...]) -> Location:
        known = self._known.get(place)
        if known is None:
            known = self._known[place] = Location(self._file(place[0]), int(place[1]))
        return known

    def _file(self, number: str) -> str:
        return self._files.get(int(number), f"file {number}")
