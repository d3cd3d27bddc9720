"""Converted layers: subclasses of the layers they were, with their weight in a storage format."""

from __future__ import annotations

from .base import LazyWeight, QuantizedLayer, find_kind, swap, unswap, writable
from .embedding import QuantizedEmbedding
from .linear import QuantizedLinear

__all__ = [
    "LazyWeight",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "find_kind",
    "swap",
    "unswap",
    "writable",
]
