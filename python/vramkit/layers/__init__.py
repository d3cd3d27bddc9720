"""Converted layers: subclasses of the layers they were, with weights in storage formats."""

from __future__ import annotations

from . import conv, readers, rnn  # noqa: F401  (register their kinds)
from .base import QuantizedLayer, find_kind, is_layer_weight, row_dimensions, swap, unswap
from .embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from .lazy import LazyWeight, writable
from .linear import QuantizedLinear

__all__ = [
    "LazyWeight",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedLayer",
    "QuantizedLinear",
    "find_kind",
    "is_layer_weight",
    "row_dimensions",
    "swap",
    "unswap",
    "writable",
]
