"""State spaces as numbers, as Space in memory.h."""

from __future__ import annotations

GENERIC, GLOBAL, SHARED, SHARED_CLUSTER, LOCAL, PARAM, CONST = range(7)

SHARED_SPACES = {"shared": SHARED, "shared::cta": SHARED, "shared::cluster": SHARED_CLUSTER}
