"""PTX text to tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ptx_emulator.errors import PtxSyntaxError

_TOKEN = re.compile(
    r"""
      (?P<blank>[ \t\r]+)
    | (?P<newline>\n)
    | (?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
                |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?)
    | (?P<word>[.%$A-Za-z_](?:::|[\w$.%])*)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<mark>[{}\[\]();:,@!|+<>=*-])
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is number, word, string or mark."""

    kind: str
    text: str
    line: int


def tokens(text: str) -> Iterator[Token]:
    """The tokens of a PTX text, without blanks and comments.

    Raises:
        PtxSyntaxError: a character that begins no token.
    """
    line, position = 1, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PtxSyntaxError(f"PTX line {line}: {text[position : position + 20]!r} begins no token")
        kind = match.lastgroup
        assert kind is not None
        if kind == "newline":
            line += 1
        elif kind == "comment":
            line += match.group().count("\n")
        elif kind != "blank":
            yield Token(kind, match.group(), line)
        position = match.end()
