"""nn.Embedding and nn.EmbeddingBag with their weight in a storage format."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import QuantizedLayer, register_kind


class _Rows(QuantizedLayer):
    """Rows of the stored weight by index."""

    num_embeddings: int
    embedding_dim: int

    def _rows(self, indices: Tensor) -> Tensor:
        if indices.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"an embedding's indices are int32 or int64, got {indices.dtype}")
        fmt = self.storage_format
        out: Tensor = torch.ops.vramkit.embedding(
            indices,
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


class QuantizedEmbedding(_Rows, nn.Embedding):
    """Rows of the weight by index; only the rows asked for are decoded.

    indices: any shape, int32 or int64; the result is [*indices.shape, embedding_dim] in the
    compute dtype. An index out of range raises IndexError on a CPU; on CUDA it stops the device, as
    torch's own embedding does, because looking first would make the host wait.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The rows at `input`."""
        return self._rows(input)


class QuantizedEmbeddingBag(_Rows, nn.EmbeddingBag):
    """Sums, means or maxima of bags of rows; only the rows asked for are decoded.

    Arguments and options are nn.EmbeddingBag's; the result is [bags, embedding_dim] in the compute
    dtype. Gradients flow to per_sample_weights.
    """

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """One row for each bag of indices."""
        if input.dim() not in (1, 2):
            raise ValueError(f"input has to be a 1-D or 2-D tensor, got {input.dim()}-D")
        flat = input.reshape(-1)
        rows = self._rows(flat)
        # The bags' own table: the gathered rows in turn, and one more for the padding index.
        places = torch.arange(flat.shape[0], device=flat.device)
        padding = None
        if self.padding_idx is not None:
            padding = flat.shape[0]
            rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
            places = torch.where(flat == self.padding_idx, padding, places)
        return functional.embedding_bag(
            places.reshape(input.shape),
            rows,
            None if offsets is None else offsets.to(places.dtype),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


register_kind(nn.Embedding, QuantizedEmbedding)
register_kind(nn.EmbeddingBag, QuantizedEmbeddingBag)
