"""Tensor copies (TMA) and tensor maps."""

from __future__ import annotations
