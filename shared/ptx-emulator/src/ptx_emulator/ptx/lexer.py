"""PTX text to tokens."""

from __future__ import annotations

import re

from ptx_emulator.errors import PtxSyntaxError

_MARKS = "{}[]();:,@!|+<>=*-"
_TOKEN = re.compile(
    r"""
      //.*
    | 0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b | 0[xX][0-9a-fA-F]+U? | 0[bB][01]+U?
    | \d+\.\d*(?:[eE][+-]?\d+)? | \d+U?
    | [.%$A-Za-z_](?:::|[\w$.%])*
    | "(?:[^"\\]|\\.)*"
    | \S
    """,
    re.VERBOSE,
)
_BLOCK_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def tokens(text: str) -> tuple[list[str], list[int]]:
    """The tokens of a PTX text, without blanks and comments, and the line of each.

    The first character says what a token is: a digit begins a number, a quote a string, one of `.%$_` or a
    letter a word; anything else is a mark.

    Raises:
        PtxSyntaxError: a character that begins no token.
    """
    if "/*" in text:
        text = _BLOCK_COMMENT.sub(lambda comment: " " + "\n" * comment.group().count("\n"), text)
    found: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        of_line = _TOKEN.findall(line)
        if of_line and of_line[-1].startswith("//"):
            del of_line[-1]
        found += of_line
        lines += [number] * len(of_line)
    for token in set(found):
        if len(token) == 1 and not (token.isalnum() or token in _MARKS or token in ".%$_"):
            line_number = lines[found.index(token)]
            raise PtxSyntaxError(f"PTX line {line_number}: {token!r} begins no token")
    return found, lines
