"""Bulk asynchronous copies."""

from __future__ import annotations
