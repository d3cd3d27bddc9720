"""LoRA on plain and converted layers: beside the weight (scaled, stacked, swapped), or fused.

Unfused, a layer's hook adds scale * B (A x) to its output, so that the weight stays as stored, in
any format and wherever it is offloaded to. Fused, W + sum of scale * B A is computed in float32 and
rounded once, to the layer's dtype or storage format. What was
there before is kept, so unfusing is exact.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._operators import encode
from ..convert import Precision, check_weight, matches, storage_format
from ..formats import StorageFormat
from ..layers import QuantizedLayer, swap
from ..layers.base import PART_NAMES
from .backups import Backups
from .lora_files import LoraPair, read_lora

# Under this name a layer holds its branches; the transformer, under the other, its stack.
BRANCHES, STACK = "vramkit_lora", "vramkit_loras"
Source = str | os.PathLike[str] | Mapping[str, Tensor]


class LoraBranch(nn.Module):
    """One adapter at one layer: adds scale * (alpha / rank) * B (A x)."""

    def __init__(self, pair: LoraPair, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(pair.A.detach().to(device), requires_grad=False)
        self.lora_B = nn.Parameter(pair.B.detach().to(device), requires_grad=False)
        self.alpha_over_rank = pair.scale
        self.scale = 1.0

    @property
    def factor(self) -> float:
        """What B A is multiplied by: 0 for an adapter that is switched off."""
        return self.scale * self.alpha_over_rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        low = functional.linear(x, self.lora_A.to(x.dtype))
        return functional.linear(low, self.lora_B.to(x.dtype)) * self.factor

    def delta(self) -> Tensor:
        """factor * B A in float32, [out, in]."""
        return (self.lora_B.float() @ self.lora_A.float()).mul_(self.factor)


def _add_branches(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    # Not a closure: copies and pickles of the model must find their own branches.
    branches: Any = getattr(layer, BRANCHES)
    for branch in branches.values():
        if branch.factor != 0.0:
            output = output + branch(inputs[0])
    return output


@dataclass
class Adapter:
    """One LoRA: its name, the layers it is on, its scale (before alpha / rank), and whether it is
    fused into the weights or switched off."""

    name: str
    layers: list[str]
    scale: float = 1.0
    active: bool = True
    fused: bool = False


class LoraStack:
    """The LoRA adapters of one model.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> keys = {"0.lora_A.weight": torch.ones(2, 8), "0.lora_B.weight": torch.ones(8, 2)}
    >>> loras = vramkit.qwen_image.LoraStack.of(model)
    >>> loras.load(keys, name="style", scale=0.5).layers
    ['0']
    >>> loras.clear()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.adapters: dict[str, Adapter] = {}
        self._backups: Backups | None = None
        self._away: dict[str, nn.ModuleDict] = {}  # branches of layers that are fused

    @classmethod
    def of(cls, model: nn.Module) -> LoraStack:
        """The model's stack, made at the first call."""
        found = model.__dict__.get(STACK)
        if found is None:
            found = cls(model)
            model.__dict__[STACK] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraStack:
        """A copied model has its own branches. What is fused is part of its weights for good."""
        made = LoraStack(memo.get(id(self._model), self._model))
        memo[id(self)] = made
        if self._backups is None:
            made.adapters = {
                name: Adapter(a.name, list(a.layers), a.scale, a.active)
                for name, a in self.adapters.items()
            }
        return made

    def load(
        self,
        source: Source,
        name: str | None = None,
        scale: float = 1.0,
        *,
        alpha: float | None = None,
        skip_unmatched: bool = False,
    ) -> Adapter:
        """Put a LoRA beside the weights.

        Args:
            source: A file, PEFT's folder, or tensors by name, as for `read_lora`.
            name: By which it is scaled, swapped and unloaded; None: the file's, or "lora".
            scale: Multiplies alpha / rank.
            alpha: As for `read_lora`.
            skip_unmatched: Whether keys that this model has no layer for are left out (they are
                warned of), rather than an error. If none matches, it is an error in any case.

        Raises ValueError, with the model as it was, for names that are taken, keys without a
        layer, layers that are not Linear, and shapes that do not fit.
        """
        pairs = read_lora(source, alpha=alpha)
        name = name or self._free_name(source)
        if name in self.adapters:
            raise ValueError(f"a LoRA named {name!r} is loaded already; unload it first")
        if not name.isidentifier():
            raise ValueError(f"the name of a LoRA is an identifier such as 'style', not {name!r}")
        modules = dict(self._model.named_modules())
        unmatched = [layer for layer in pairs if layer not in modules]
        if len(unmatched) == len(pairs):
            raise ValueError(
                f"no layer of {type(self._model).__name__} is named as the LoRA's keys say, "
                f"{unmatched[0]!r} for one; it belongs to another model, or its prefix is not "
                "known here"
            )
        if unmatched and not skip_unmatched:
            raise ValueError(
                f"{len(unmatched)} of the LoRA's {len(pairs)} layers are not in this model, "
                f"{unmatched[0]!r} for one; skip_unmatched=True loads the others"
            )
        if unmatched:
            text = f"LoRA {name!r}: {len(unmatched)} layers are not in this model and left out"
            warnings.warn(f"{text}, {unmatched[0]!r} for one", stacklevel=2)
        chosen = {layer: pair for layer, pair in pairs.items() if layer in modules}
        for layer, pair in chosen.items():
            _check_fits(layer, modules[layer], pair)
        fused = sorted(set(chosen) & set(self._away))
        if fused:
            raise ValueError(f"a LoRA is fused into {fused[0]!r}: unfuse before another is loaded")
        made = Adapter(name, list(chosen), _number(scale))
        for layer, pair in chosen.items():
            self._attach(modules[layer], name, LoraBranch(pair, _device_of(modules[layer])))
        self.adapters[name] = made
        self._rescale(made)
        return made

    def scale(self, name: str, scale: float) -> None:
        """Another scale for an unfused adapter."""
        adapter = self._unfused(name)
        adapter.scale = _number(scale)
        self._rescale(adapter)

    def use(self, *names: str) -> None:
        """These adapters and no others; without names, none. Nothing is loaded or let go."""
        for name in (*names, *self.adapters):
            self._unfused(name)
        for adapter in self.adapters.values():
            adapter.active = adapter.name in names
            self._rescale(adapter)

    def unload(self, name: str) -> None:
        """Let go of one unfused adapter."""
        adapter = self._unfused(name)
        for layer in adapter.layers:
            module = self._model.get_submodule(layer)
            branches: Any = getattr(module, BRANCHES)
            del branches[name]
            if not branches:
                self._detach(module)
        del self.adapters[name]

    def clear(self) -> None:
        """Unfuse what is fused, and let go of all: the model is bit for bit what it was."""
        if self._backups is not None:
            self.unfuse()
        for name in list(self.adapters):
            self.unload(name)

    @property
    def fused(self) -> bool:
        """Whether adapters are fused now."""
        return self._backups is not None

    @property
    def backup_bytes(self) -> int:
        """What the kept bits of fused layers take, in memory or on a disk."""
        return 0 if self._backups is None else self._backups.bytes

    @torch.no_grad()
    def fuse(self, *, backup_folder: str | os.PathLike[str] | None = None) -> list[str]:
        """Add all active adapters to the weights, in float32, and round once; the layers' names.

        Converted layers are decoded, added to and encoded again: their base has been rounded
        before, so fuse before converting where possible (`fuse_into`). The bits before are kept in
        memory, or in a file in `backup_folder`. After an error or an interrupt all is as before.
        """
        layers = self._to_fuse()
        converted = [n for n in layers if isinstance(self._model.get_submodule(n), QuantizedLayer)]
        if converted:
            text = f"LoRA is fused into {len(converted)} converted layers: W + BA is rounded again"
            warnings.warn(f"{text}; fusing before converting rounds once", stacklevel=2)
        backups = Backups(backup_folder)
        try:
            for name in layers:
                layer: Any = self._model.get_submodule(name)
                fused = _fused_weight(layer)
                _check_finite(name, layer, fused)
                backups.keep(name, _stored_tensors(layer))
                _put(layer, fused)
        except BaseException:
            self._put_back(backups)
            raise
        self._take_away(layers, backups)
        return layers

    @torch.no_grad()
    def fuse_into(
        self,
        precision: Precision | Mapping[str, Precision],
        *,
        skip: Sequence[str] = (),
        backup_folder: str | os.PathLike[str] | None = None,
    ) -> list[str]:
        """Fuse into plain layers and store the float32 sums at once: rounded once, not twice.

        `precision` is one for all layers but those that match `skip` (as in `vramkit.convert`), or
        one by layer; others are fused and stay plain. `unfuse` gives what `vramkit.convert` makes
        of the weights without LoRA, bit for bit. One layer is in memory twice at a time. Raises
        ValueError where a layer is converted already.
        """
        layers = self._to_fuse()
        formats = {name: _format_of(name, precision, skip) for name in layers}
        for name, fmt in formats.items():
            layer: Any = self._model.get_submodule(name)
            if isinstance(layer, QuantizedLayer):
                raise ValueError(f"{name!r} is converted already: fuse() adds to what is stored")
            fused = _fused_weight(layer)
            _check_finite(name, layer, fused)
            if fmt is not None:
                check_weight(name, fused, fmt)
                check_weight(name, layer.weight, fmt)
        backups = Backups(backup_folder)
        for name, fmt in formats.items():
            layer = self._model.get_submodule(name)
            fused, dtype = _fused_weight(layer), layer.weight.dtype
            if fmt is None:
                backups.keep(name, _stored_tensors(layer))
                _put(layer, fused)
                continue
            plain = encode(layer.weight.detach(), fmt)
            kept = (getattr(plain, part) for part in PART_NAMES)
            backups.keep(name, [part for part in kept if part is not None])
            del plain
            swap(layer, encode(fused, fmt), dtype)
        self._take_away(layers, backups)
        return layers

    @torch.no_grad()
    def unfuse(self) -> None:
        """The weights bit for bit as they were before; the adapters are beside them again."""
        if self._backups is None:
            raise ValueError("no LoRA is fused")
        self._put_back(self._backups)
        self._backups = None
        for name, branches in self._away.items():
            module = self._model.get_submodule(name)
            module.add_module(BRANCHES, branches)
            module.register_forward_hook(_add_branches)
        self._away = {}
        for adapter in self.adapters.values():
            adapter.fused = False

    # How it is done

    def _to_fuse(self) -> list[str]:
        if self._backups is not None:
            raise ValueError("LoRA is fused already: unfuse first")
        active = [a for a in self.adapters.values() if a.active and a.scale != 0.0]
        if not active:
            raise ValueError("no active LoRA to fuse")
        return list(dict.fromkeys(layer for adapter in active for layer in adapter.layers))

    def _take_away(self, layers: Sequence[str], backups: Backups) -> None:
        self._backups = backups
        for name in layers:
            module = self._model.get_submodule(name)
            branches: Any = getattr(module, BRANCHES)
            self._detach(module)
            self._away[name] = branches
        for adapter in self.adapters.values():
            adapter.fused = adapter.active and adapter.scale != 0.0

    def _put_back(self, backups: Backups) -> None:
        for name in backups:
            places, kept = _stored_tensors(self._model.get_submodule(name)), backups.shapes(name)
            if [(p.dtype, p.shape) for p in places] != kept:
                raise ValueError(
                    f"{name!r} has been converted or restored since LoRA was fused: its weight "
                    "from before cannot be put back"
                )
        for name in backups:
            places = _stored_tensors(self._model.get_submodule(name))
            for place, tensor in zip(places, backups.read(name), strict=True):
                place.copy_(tensor)
        backups.close()

    def _attach(self, module: nn.Module, adapter: str, branch: LoraBranch) -> None:
        if getattr(module, BRANCHES, None) is None:
            module.add_module(BRANCHES, nn.ModuleDict())
            module.register_forward_hook(_add_branches)
        branches: Any = getattr(module, BRANCHES)
        branches[adapter] = branch

    def _detach(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if hook is _add_branches:
                del module._forward_hooks[key]
        del module._modules[BRANCHES]

    def _rescale(self, adapter: Adapter) -> None:
        for layer in adapter.layers:
            branches: Any = getattr(self._model.get_submodule(layer), BRANCHES)
            branches[adapter.name].scale = adapter.scale if adapter.active else 0.0

    def _unfused(self, name: str) -> Adapter:
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"no LoRA named {name!r} is loaded; loaded are: {known}")
        if self._backups is not None:
            raise ValueError("LoRA is fused: unfuse first")
        return self.adapters[name]

    def _free_name(self, source: Source) -> str:
        stem = "lora"
        if not isinstance(source, Mapping):
            stem = os.path.splitext(os.path.basename(os.fspath(source).rstrip("/")))[0]
            stem = "".join(c if c.isalnum() else "_" for c in stem)
            stem = stem if stem.isidentifier() else f"lora_{stem}"
        name, number = stem, 2
        while name in self.adapters:
            name, number = f"{stem}_{number}", number + 1
        return name


def _number(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale != scale:
        raise ValueError(f"the scale of a LoRA is a number, not {scale!r}")
    if abs(scale) == float("inf"):
        raise ValueError("the scale of a LoRA must be finite")
    return float(scale)


def _check_fits(name: str, module: nn.Module, pair: LoraPair) -> None:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"the LoRA changes {name!r}, which is a {type(module).__name__}; only Linear layers"
        )
    wanted = (module.out_features, module.in_features)
    got = (int(pair.B.shape[0]), int(pair.A.shape[1]))
    if wanted != got:
        raise ValueError(
            f"the LoRA is for a layer {name!r} of {got[1]} to {got[0]} features; this model's has "
            f"{wanted[1]} to {wanted[0]}"
        )


def _format_of(
    name: str, precision: Precision | Mapping[str, Precision], skip: Sequence[str]
) -> StorageFormat | None:
    if isinstance(precision, Mapping):
        return storage_format(precision[name]) if name in precision else None
    return None if matches(name, skip) else storage_format(precision)


def _device_of(module: nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _fused_weight(layer: Any) -> Tensor:
    """W + sum of factor * B A, float32."""
    if isinstance(layer, QuantizedLayer):
        total = layer.dense_weight(torch.float32)
    else:
        total = layer.weight.detach().to(torch.float32, copy=True)
    for branch in getattr(layer, BRANCHES).values():
        if branch.factor != 0.0:
            a, b = branch.lora_A.float(), branch.lora_B.float()
            total.addmm_(b, a, alpha=branch.factor)
    return total


def _check_finite(name: str, layer: Any, fused: Tensor) -> None:
    fmt = layer.storage_format if isinstance(layer, QuantizedLayer) else None
    if fmt is not None:
        check_weight(name, fused, fmt)
        return
    largest = float(fused.abs().max())
    if not largest <= torch.finfo(layer.weight.dtype).max:
        raise ValueError(
            f"W + BA of {name!r} reaches {largest}, more than {layer.weight.dtype} holds"
        )


def _stored_tensors(layer: Any) -> list[Tensor]:
    """What holds a layer's weight: the plain tensor, or codes, scales and extra."""
    if not isinstance(layer, QuantizedLayer):
        return [layer.weight]
    parts = (getattr(layer, part) for part in PART_NAMES)
    return [part for part in parts if part is not None]


def _put(layer: Any, weight: Tensor) -> None:
    """Write a new weight where the old one is, so that whoever offloads it sees the write."""
    if not isinstance(layer, QuantizedLayer):
        layer.weight.copy_(weight)
        return
    made = encode(weight, layer.storage_format)
    for part in PART_NAMES:
        value = getattr(made, part)
        if value is not None:
            getattr(layer, part).copy_(value)
