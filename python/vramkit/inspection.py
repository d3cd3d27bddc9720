"""What really runs: format, compute dtype, kernel and bytes of every layer with parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import _core
from ._operators import fused_rows
from .layers import QuantizedLayer
from .layers.conv import QuantizedConv
from .sizes import format_size


@dataclass(frozen=True)
class LayerInfo:
    """One layer: its stored format (or dtype), what computes it, and its bytes."""

    name: str
    kind: str
    format: str
    compute_dtype: str
    kernel: str
    bytes: int


class ModelInfo(list[LayerInfo]):
    """The layers of a model, in the order of `named_modules`; prints as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"layers": [asdict(layer) for layer in self]}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (i.name, i.kind, i.format, i.compute_dtype, i.kernel, format_size(i.bytes))
            for i in self
        ]

    def __str__(self) -> str:
        rows = [("layer", "kind", "format", "compute", "kernel", "bytes"), *self._rows()]
        widths = [max(len(row[k]) for row in rows) for k in range(6)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _repr_html_(self) -> str:
        from .report.html import table

        return table(("layer", "kind", "format", "compute", "kernel", "bytes"), self._rows(), "")


def describe(model: nn.Module) -> ModelInfo:
    """Format, compute dtype, kernel and bytes of every layer of `model` that has parameters.

    Shared parameters count at their first layer.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> _ = vramkit.convert(model, "nf4")
    >>> vramkit.describe(model)[0].format
    'nf4'
    """
    found = ModelInfo()
    seen: set[int] = set()
    for name, module in model.named_modules():
        fresh = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        if not fresh:
            continue
        seen.update(id(p) for p in fresh)
        size = sum(p.numel() * p.element_size() for p in fresh)
        if isinstance(module, QuantizedLayer):
            kind = module._base.__name__
            fmt, kernel = module.format_names, _kernel(module)
            compute = _compute(module)
        else:
            kind, kernel = type(module).__name__, "torch"
            fmt = compute = str(fresh[0].dtype).removeprefix("torch.")
        found.append(LayerInfo(name, kind, fmt, compute, kernel, size))
    return found


def _compute(layer: QuantizedLayer) -> str:
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return str(layer.compute_dtype).removeprefix("torch.")
    if layer.storage_format.activations:
        return "int8; the input's outside"
    if layer.parts.codes.device.type != "cpu":
        return "the input's"
    # Products follow the input; no CPU multiplies float16 at full rate.
    return "the input's; float16 in float32"


def _kernel(layer: QuantizedLayer) -> str:
    device = layer.parts.codes.device
    if device.type != "cpu":
        return _device_kernel(layer, device)
    isa = _core.active_isa()
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return f"{isa} row gather"
    if layer.storage_format.activations == "int8_dynamic":
        return f"{isa} int8 rows x int8"
    if layer.storage_format.activations == "llm_int8":
        return f"{isa} int8 rows x int8, columns from {layer.storage_format.threshold:g} in float32"
    if not isinstance(layer, (nn.Linear, nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        return f"{isa} decode + torch"
    if not layer.storage_format.row_separable(layer.weight_shape[-1]):
        return f"{isa} decode + torch"
    rows = fused_rows(layer.compute_dtype)
    rest = "torch" if layer.storage_format.storage_dtype == torch.bfloat16 else "panels + torch"
    return f"{isa} fused to {rows} rows, then {rest}"


def _device_kernel(layer: QuantizedLayer, device: torch.device) -> str:
    """The same away from the processor, by the operators that this build has there."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        operator, kernel = "embedding", "row gather"
    elif isinstance(layer, (nn.Linear, nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        fmt = layer.storage_format
        operator, kernel = "linear", "fused to some rows, then decode + torch"
        if fmt.activations == "int8_dynamic":
            operator, kernel = "linear_int8", "int8 rows x int8"
        elif fmt.activations:
            operator = "linear_int8"
            kernel = f"int8 rows x int8, columns from {fmt.threshold:g} in float32"
    elif layer.storage_format.activations:
        operator, kernel = "recurrent_int8", "int8 rows x int8"
    elif isinstance(layer, QuantizedConv):
        operator, kernel = "conv", "decode + torch"
    else:
        operator, kernel = "dequantize", "decode + torch"
    if device.type not in ("cuda", "meta") or not has(f"vramkit::{operator}", "CUDA"):
        return f"none for {device.type}"
    return f"{device.type} {kernel}"
