"""PEFT's LoRA layers over converted layers: merge encodes again, unmerge gives the codes back.

Imported only by functions of `peft.py`, because it imports PEFT.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .._operators import StoredParts, encode
from ..layers import QuantizedLayer, writable


class MergeLossWarning(UserWarning):
    """A merge into codes of few bits, which rounds what the adapter learned."""


class _Backup:
    """What a layer held before its first merge: codes, scales and extra, compute dtype, bias."""

    def __init__(self, layer: QuantizedLayer) -> None:
        parts = layer.parts
        self.parts = StoredParts(parts.fmt, parts.shape, parts.codes, parts.scales, parts.extra)
        self.compute_dtype = layer.compute_dtype
        bias: Any = getattr(layer, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach().clone()

    def give_back(self, layer: QuantizedLayer) -> None:
        device = layer.codes.device
        kept = self.parts
        extra = None if kept.extra is None else kept.extra.to(device)
        parts = StoredParts(
            kept.fmt, kept.shape, kept.codes.to(device), kept.scales.to(device), extra
        )
        layer._adopt("weight", parts, self.compute_dtype)
        if self.bias is not None:
            bias: Any = layer.bias
            bias.data.copy_(self.bias)


class _Converted:
    """Mixin before a LoRA layer of PEFT whose base layer is converted."""

    _backup: _Backup | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the decoded weight in float32 and encode the sum.

        The codes from before are kept for `unmerge`. Several adapters are added before one
        encoding, those merged earlier included, so that nothing is rounded twice.
        """
        me: Any = self
        names = check_adapters_to_merge(me, adapter_names)
        names = [name for name in names or [] if name in _adapters(me)]
        if not names:
            return
        layer = me.get_base_layer()
        fmt = layer.storage_format
        warnings.warn(
            f"merging an adapter into a weight in {fmt.name} rounds the sum to {fmt.bits} bits: "
            "the merged model answers a little differently. unmerge() is exact; to lose nothing, "
            "keep the adapter unmerged or vramkit.restore() the model first",
            MergeLossWarning,
            stacklevel=2,
        )
        before = self._backup or _Backup(layer)
        now = _Backup(layer)
        try:
            if any(name in me.lora_variant for name in [*names, *me.merged_adapters]):
                with writable():  # its own arithmetic, encoded again after each write
                    super().merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
            else:
                self._merge_plain(layer, before, names, safe_merge)
        except BaseException:
            now.give_back(layer)
            raise
        self._backup = before

    @torch.no_grad()
    def _merge_plain(
        self, layer: QuantizedLayer, before: _Backup, names: list[str], safe_merge: bool
    ) -> None:
        me: Any = self
        device = layer.codes.device
        dense = before.parts.dense(torch.float32).to(device)
        bias: Any = getattr(layer, "bias", None)
        shift = None if bias is None else torch.zeros_like(bias)
        for name in [*me.merged_adapters, *names]:
            dense += me.get_delta_weight(name).to(device, torch.float32)
            if me.lora_bias.get(name):
                if shift is None:
                    raise RuntimeError(
                        "an adapter with lora_bias=True cannot be merged: this layer has no bias"
                    )
                shift += me.lora_B[name].bias * me.scaling[name]
        if not torch.isfinite(dense).all():
            # Codes cannot hold such a weight, so this is an error without safe_merge too.
            raise ValueError(f"the adapters {names} are broken: the merged weight is not finite")
        parts = encode(dense, layer.storage_format)
        layer._adopt("weight", parts, before.compute_dtype)
        if shift is not None and before.bias is not None:
            bias.data.copy_(before.bias.to(bias.device) + shift)
        me.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the layer the very codes, scales and bias that it had before the first merge."""
        me: Any = self
        if not me.merged or self._backup is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._backup.give_back(me.get_base_layer())
        me.merged_adapters.clear()
        self._backup = None


def _adapters(layer: Any) -> set[str]:
    """Names of the adapters of a LoRA layer; an Embedding's are in attributes of their own."""
    return set(layer.lora_A) | set(layer.lora_embedding_A)


class ConvertedLinear(_Converted, lora.Linear):  # type: ignore[misc]
    """LoRA on a converted Linear."""


class ConvertedEmbedding(_Converted, lora.Embedding):  # type: ignore[misc]
    """LoRA on a converted Embedding."""


class ConvertedConv1d(_Converted, lora.Conv1d):  # type: ignore[misc]
    """LoRA on a converted Conv1d."""


class ConvertedConv2d(_Converted, lora.Conv2d):  # type: ignore[misc]
    """LoRA on a converted Conv2d."""


class ConvertedConv3d(_Converted, lora.Conv3d):  # type: ignore[misc]
    """LoRA on a converted Conv3d."""


_CLASSES = {
    made.__mro__[2]: made
    for made in (
        ConvertedLinear,
        ConvertedEmbedding,
        ConvertedConv1d,
        ConvertedConv2d,
        ConvertedConv3d,
    )
}


def upgrade(module: nn.Module | None) -> bool:
    """Make a LoRA layer of PEFT over a converted layer one of ours, in place; True if it was."""
    made = _CLASSES.get(type(module))
    if made is None:
        return False
    adapter: Any = module
    if not isinstance(adapter.get_base_layer(), QuantizedLayer):
        return False
    adapter.__class__ = made
    return True
