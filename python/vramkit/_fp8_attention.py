"""The arithmetic of FP8 attention: softmax(scale Q K^T + mask) V with both products in e4m3.

Each head of Q, K and V is rounded to e4m3 with one scale. Before that the mean over the keys is
taken from K, which adds the same number to all scores of a query and so changes nothing but what
the rounding loses (SageAttention, Zhang et al. 2024, section 3.2). A block of queries at a time:
scores in float32, exp(score - row maximum) in float32, rounded to e4m3 with the scale 1/448, and
multiplied with V in e4m3, sums in float32. The weights are normalized by the sum of what they were
rounded to; that sum is one more column of the same product.

No matrix of queries by keys is ever whole: a block's scores stay within `BLOCK_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of the float32 scores of a block of queries.
BLOCK_BYTES = 32 << 20
_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
_MULTIPLE = 16  # torch._scaled_mm takes inner and outer sizes in multiples of it

# (a codes [m, k], b codes [n, k], the product of their scales) -> a b^T in float32.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one scaled_dot_product_attention, [batch, heads, length, width] each.

    `mask` is bool (True takes part) or added to the scores, and broadcasts to [batch, heads,
    queries, keys]. Heads of keys and values may be fewer, each for a run of the queries' heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def group(self) -> int:
        """Heads of the query for each head of keys and values."""
        return self.query.shape[1] // max(1, self.key.shape[1])

    def mask_of(self, batch: int, head: int) -> Tensor | None:
        """The mask of one head, [queries, keys], a view."""
        if self.mask is None:
            return None
        whole = (*self.query.shape[:3], self.key.shape[2])
        return self.mask.expand(whole)[batch, head]


def scaled_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """By torch's product of FP8 codes: tensor cores on CUDA, a slow kernel on a CPU."""
    one = torch.ones((), dtype=torch.float32, device=a.device)
    made: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
    )
    return made


def emulated_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The same numbers from decoded codes, in float32, on any device."""
    return (a.float() @ b.float().t()).mul_(scale)


def attend(call: Call, product: Product) -> Tensor:
    """The attention's output, [batch, heads, queries, width of values], in the query's dtype."""
    query, key, value = call.query, call.key, call.value
    batch, heads, rows, _ = query.shape
    out = query.new_empty((batch, heads, rows, value.shape[-1]))
    for b in range(batch):
        for shared in range(key.shape[1]):
            keys, values = _Keys(key[b, shared]), _Values(value[b, shared])
            for head in range(shared * call.group, (shared + 1) * call.group):
                mask = call.mask_of(b, head)
                _attend_head(query[b, head], keys, values, mask, call, product, out[b, head])
    return out


class _Keys:
    """One head of keys in e4m3, [keys, width], both padded with zeros."""

    def __init__(self, key: Tensor) -> None:
        wide = key.float()
        self.count = key.shape[0]
        self.codes, self.scale = _rounded(_padded(wide - wide.mean(0, keepdim=True)))


class _Values:
    """One head of values in e4m3, [width, keys], with a row of ones for the sum of weights."""

    def __init__(self, value: Tensor) -> None:
        self.width = value.shape[1]
        codes, self.scale = _rounded(value.float().t())
        ones = torch.ones((1, value.shape[0]), device=value.device).to(_E4M3)
        whole = torch.cat((codes.view(torch.uint8), ones.view(torch.uint8)))
        self.codes = _padded(whole).view(_E4M3)


def _attend_head(
    query: Tensor,
    keys: _Keys,
    values: _Values,
    mask: Tensor | None,
    call: Call,
    product: Product,
    out: Tensor,
) -> None:
    rows, count = query.shape[0], keys.count
    codes, scale = _rounded(_padded(query.float(), rows_too=False))
    scale = scale * keys.scale * call.scale
    one = torch.ones((), dtype=torch.float32, device=query.device)
    step = block_rows(keys.codes.shape[0])
    for first in range(0, rows, step):
        last = min(rows, first + step)
        # Of causal attention, keys after the block's last query take no part.
        live = min(count, last) if call.causal else count
        padded = _up(live)
        scores = product(codes[first:last], keys.codes[:padded], scale)
        if mask is not None:
            part = mask[first:last, :live]
            if part.dtype == torch.bool:
                scores[:, :live].masked_fill_(~part, -math.inf)
            else:
                scores[:, :live] += part
        if call.causal:
            at = torch.arange(first, last, device=query.device)[:, None]
            scores.masked_fill_(torch.arange(padded, device=query.device) > at, -math.inf)
        scores[:, live:] = -math.inf
        top = scores.amax(1, keepdim=True)
        top = torch.where(top == -math.inf, 0.0, top)  # a query that sees no key
        weights = scores.sub_(top).exp_().mul_(_LARGEST).to(_E4M3)
        made = product(weights, values.codes[:, :padded].contiguous(), one)
        total = made[:, values.width : values.width + 1]
        # Weights are zero or at least 2^-9, the least e4m3: the clamp is for no key at all.
        part = made[:, : values.width].div_(total.clamp(min=2.0**-9)).mul_(values.scale)
        out[first:last] = part


def block_rows(keys: int) -> int:
    """Queries of which the scores for `keys` keys stay within `BLOCK_BYTES`; at least 16."""
    return max(_MULTIPLE, BLOCK_BYTES // (4 * max(1, keys)) // _MULTIPLE * _MULTIPLE)


def _up(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE


def _padded(matrix: Tensor, *, rows_too: bool = True) -> Tensor:
    """`matrix` with zeros up to multiples of 16."""
    rows, cols = matrix.shape
    below = _up(rows) - rows if rows_too else 0
    right = _up(cols) - cols
    if not below and not right:
        return matrix.contiguous()
    return torch.nn.functional.pad(matrix, (0, right, 0, below))


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and the scale that brings the largest magnitude to e4m3's."""
    largest = matrix.abs().amax()
    scale = torch.where(largest == 0, 1.0, largest / _LARGEST)
    return (matrix / scale).clamp_(-_LARGEST, _LARGEST).to(_E4M3), scale


def sampled_error(call: Call, made: Tensor, heads: int, rows: int) -> float:
    """Largest relative L2 error of `made` over up to `heads` heads, `rows` rows of each.

    Against exact attention in float64 on the same inputs. Heads and rows are evenly spaced, from
    the first to the last. Infinite where the exact output is zero and `made` is not.
    """
    batch, count, length, _ = call.query.shape
    worst = torch.zeros((), dtype=torch.float64, device=made.device)
    at = _spread(length, rows, made.device)
    for index in _spread(batch * count, heads, torch.device("cpu")).tolist():
        b, head = divmod(index, count)
        shared = head // call.group
        q, k = call.query[b, head][at].double(), call.key[b, shared].double()
        scores = q @ k.t() * call.scale
        mask = call.mask_of(b, head)
        if mask is not None:
            part = mask[at]
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, -math.inf)
            else:
                scores += part
        if call.causal:
            later = torch.arange(k.shape[0], device=made.device) > at[:, None]
            scores.masked_fill_(later, -math.inf)
        weights = torch.softmax(scores, -1)
        weights = torch.where(scores.amax(1, keepdim=True) == -math.inf, 0.0, weights)
        exact = weights @ call.value[b, shared].double()
        error = torch.linalg.vector_norm(made[b, head][at].double() - exact)
        power = torch.linalg.vector_norm(exact)
        ratio = torch.where(power == 0, torch.where(error == 0, 0.0, math.inf), error / power)
        worst = torch.maximum(worst, ratio)
    return float(worst)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Up to `most` of `count` indices, evenly spaced, the ends among them."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.arange(most, device=device) * (count - 1) // max(1, most - 1)
