"""Attention whose softmax and sums are float32 whatever its inputs are, without an N x N matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixedPrecisionAttention(nn.Module):
    """Multi-head self-attention that keeps its scores in float32.

    Projections run in the input's dtype (or autocast's). Between them, scores, softmax and the
    weighted sum are computed in float32 accumulation: on CUDA by torch's fused kernels, which
    accumulate so for 16-bit inputs; elsewhere on inputs cast to float32. Queries go in pieces, so
    that no matrix of all positions by all positions is ever in memory.

    Args:
        channels: Features; a multiple of `heads`.
        heads: Number of heads.

    Raises ValueError where `heads` does not divide `channels`.

    >>> MixedPrecisionAttention(32, 4)(torch.zeros(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    """

    query_rows = 1024
    """Queries per piece where torch's kernel would make the whole matrix."""

    def __init__(self, channels: int, heads: int = 16) -> None:
        super().__init__()
        if channels <= 0 or heads <= 0 or channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, positions, channels] to the same; `mask` as in scaled_dot_product_attention."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        out = fp32_attention(q, k, v, mask, rows=self.query_rows)
        joined: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return joined


def fp32_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, rows: int = 1024
) -> Tensor:
    """scaled_dot_product_attention with float32 softmax and accumulation, in q's dtype.

    Args:
        q: [batch, heads, queries, features]; `k` and `v` likewise.
        mask: Added to the scores, or booleans; broadcast to [batch, heads, queries, keys].
        rows: Queries in a piece.

    Raises ValueError for a mask of more than four dimensions.
    """
    if mask is not None and mask.dim() > 4:
        raise ValueError(f"a mask has at most four dimensions, not {mask.dim()}")
    dtype = q.dtype
    if mask is not None and mask.dim() != 4:
        # torch's fused kernel on the CPU takes masks of two or four dimensions.
        mask = mask[(None,) * (4 - mask.dim())]
    if q.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # fused: float32 inside
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.float(), v.float()
        pieces = []
        for first in range(0, q.shape[-2], rows):
            piece = q[..., first : first + rows, :].float()
            part = mask
            if mask is not None and mask.shape[-2] != 1:
                part = mask[..., first : first + rows, :]
            pieces.append(F.scaled_dot_product_attention(piece, k, v, attn_mask=part))
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)
    return out.to(dtype)
