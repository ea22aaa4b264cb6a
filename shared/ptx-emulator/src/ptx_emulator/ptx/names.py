"""Names of C++ functions as a person writes them."""

from __future__ import annotations

import re

_LENGTH = re.compile(r"\d+")


def readable(symbol: str) -> str | None:
    """The qualified name in a mangled C++ symbol: `gemm::kernel` for `_ZN4gemm6kernelIfEEvPT_`.

    Template arguments and parameters are left out. None for what is not a mangled function of this kind.
    """
    if not symbol.startswith("_Z"):
        return None
    rest = symbol[2:].removeprefix("L")
    nested = rest.startswith("N")
    rest = rest[1:].lstrip("rVK") if nested else rest
    parts: list[str] = []
    while (length := _LENGTH.match(rest)) is not None:
        start = length.end()
        end = start + int(length.group())
        part = rest[start:end]
        parts.append("(anonymous namespace)" if part.startswith("_GLOBAL__N_") else part)
        rest = rest[end:]
        if not nested:
            break
    return "::".join(parts) or None


def matching(names: list[str], wanted: str) -> list[str]:
    """The symbols that a name may mean: the symbol itself, else C++ names that are or end with it."""
    if wanted in names:
        return [wanted]
    found = []
    for name in names:
        qualified = readable(name)
        if qualified is not None and (qualified == wanted or qualified.endswith("::" + wanted)):
            found.append(name)
    return found
