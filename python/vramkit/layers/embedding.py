"""nn.Embedding with its weight in a storage format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import QuantizedLayer, register_kind


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Rows of the weight by index; only the rows asked for are decoded.

    indices: any shape, int32 or int64; the result is [*indices.shape, embedding_dim] in the
    compute dtype. An index out of range raises IndexError.
    """

    num_embeddings: int
    embedding_dim: int

    def forward(self, input: Tensor) -> Tensor:
        """The rows at `input`."""
        if input.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"an embedding's indices are int32 or int64, got {input.dtype}")
        fmt = self.storage_format
        out: Tensor = torch.ops.vramkit.embedding(
            input,
            self.codes,
            self.scales,
            self.extra,
            fmt.table_on(self.codes.device),
            fmt.spec,
            list(self.weight_shape),
            self.compute_dtype,
        )
        return out

    def _resized(self) -> None:
        self.num_embeddings, self.embedding_dim = self.weight_shape


register_kind(nn.Embedding, QuantizedEmbedding)
