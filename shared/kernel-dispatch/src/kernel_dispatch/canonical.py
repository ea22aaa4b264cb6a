"""Canonical JSON: one text per value, the same in every process, for cache keys and tuning keys.

None, bool, int, str and finite float are themselves; lists and tuples are arrays; mappings with string keys
are objects; a `torch.dtype`, an enum member and a dataclass instance are objects with a key that begins with
"$". Anything else (a tensor, a set, a path, NaN, an object known only by its repr) is rejected: a key must
not depend on an address or on the order of a hash table, and must not leave a part of the value out.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping

import torch


def canonical_json(value: object) -> str:
    """The canonical JSON text of `value`: keys sorted, no spaces, ASCII only.

    Raises TypeError for a type without a canonical form and ValueError for a value without one (NaN, an
    infinity, a mapping key that begins with "$"); both name the place inside `value`, such as
    `value.tile[2]`.
    """
    return dump(canonical(value))


def dump(plain: object) -> str:
    """The canonical JSON text of what `canonical` returned."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of `text`, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(value: object, where: str = "value") -> object:
    """`value` rebuilt of what JSON has; raises as `canonical_json` does, naming the place `where`."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where} = {value} has no canonical form; expected a finite number")
        return value
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, enum.Enum):
        return {"$enum": f"{_type_name(value)}.{value.name}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"$dataclass": _type_name(value), "fields": canonical(fields, where)}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_checked_key(key, where): canonical(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where} is a {_type_name(value)}, which has no canonical form; expected None, bool, int, float, "
        "str, torch.dtype, an enum member, a dataclass, or lists, tuples and string-keyed mappings of these"
    )


def _checked_key(key: object, where: str) -> str:
    if type(key) is not str:
        raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; expected str")
    if key.startswith("$"):
        raise ValueError(f'{where} has the key {key!r}; keys that begin with "$" are reserved')
    return key


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
