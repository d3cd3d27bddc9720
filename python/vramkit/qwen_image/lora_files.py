"""LoRA files read: three ways of naming, one form.

A pair of matrices A [rank, in] and B [out, rank] changes a layer's weight by (alpha / rank) B A
(Hu et al. 2021, arXiv 2106.09685). Files name A and B `lora_A` and `lora_B` (with an adapter's name
in between or not) or `lora_down` and `lora_up`; the layer's name may have a prefix; alpha is a
tensor of its own, or in the file's metadata, or absent, which means alpha = rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "dit.", "model.")
_HALVES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_METADATA = "lora_adapter_metadata"  # where diffusers keeps alpha
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoraPair:
    """One layer's change: A [rank, in], B [out, rank], and what scales B A."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor], *, alpha: float | None = None
) -> dict[str, LoraPair]:
    """The pairs of a LoRA file (or of its tensors) by the layer's name as the file has it.

    Args:
        source: A safetensors file, a folder that PEFT wrote, or the tensors by name.
        alpha: Where neither the file nor its metadata says one; None: the rank, so a scale of 1.

    Names come without the prefixes `diffusion_model.`, `transformer.`, `dit.`, `model.` and
    `base_model.model.`. Raises FileNotFoundError, CheckpointError for an unsound file, ValueError
    for tensors that are no LoRA, halves without the other, wrong shapes, and what is not finite.
    """
    tensors, said = _opened(source)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        layer, what = _split(key)
        if what == "alpha":
            alphas[layer] = _number(key, tensor)
        elif what:
            found = halves.setdefault(layer, {})
            if what in found:
                raise ValueError(
                    f"two tensors of the LoRA are {what} of the layer {layer!r} once prefixes are "
                    "taken off; the file holds several adapters: give them apart"
                )
            found[what] = tensor
        else:
            raise ValueError(
                f"{key!r} is no part of a LoRA known here (lora_A and lora_B, lora_down and "
                "lora_up, alpha); DoRA, LoKr and others change weights in other ways"
            )
    if not halves:
        raise ValueError("no LoRA in it: no key has lora_A and lora_B, or lora_down and lora_up")
    lost = sorted(set(alphas) - set(halves))
    if lost:
        raise ValueError(f"an alpha without matrices: {lost[0]!r}")
    return {
        layer: _pair(layer, found, alphas.get(layer, said.get(layer, said.get("", alpha))))
        for layer, found in halves.items()
    }


def _opened(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    if isinstance(source, Mapping):
        return source, {}
    from ..tensor_files import load_file

    path = Path(source)
    said: dict[str, float] = {}
    if path.is_dir():
        config = path / "adapter_config.json"
        if config.is_file():
            said = _alphas(json.loads(config.read_text(encoding="utf-8")))
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{path} holds {len(found)} safetensors files; name the one with the LoRA"
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {path}")
    tensors = load_file(path)
    said = said or _from_metadata(path)
    return tensors, said


def _from_metadata(path: Path) -> dict[str, float]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    text = header.get("__metadata__", {}).get(_METADATA)
    if not text:
        return {}
    told = json.loads(text)
    plain = {
        next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), key): value
        for key, value in told.items()
    }
    return _alphas(plain)


def _alphas(config: Mapping[str, Any]) -> dict[str, float]:
    """Alphas by layer of PEFT's configuration; "" has that of all others."""
    if config.get("use_dora"):
        raise ValueError("this adapter is DoRA, which scales the weight's columns too: not read")
    if config.get("use_rslora"):
        raise ValueError("this adapter divides alpha by the root of its rank (rsLoRA): not read")
    found = {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
    if config.get("lora_alpha") is not None:
        found[""] = float(config["lora_alpha"])
    return found


def _split(key: str) -> tuple[str, str]:
    """(layer, "A" | "B" | "alpha" | "") of a tensor's name."""
    parts = key.split(".")
    if parts[-1] == "alpha":
        return _without_prefix(".".join(parts[:-1])), "alpha"
    for at, part in enumerate(parts):
        if part in _HALVES and parts[-1] == "weight" and len(parts) - at in (2, 3):
            return _without_prefix(".".join(parts[:at])), _HALVES[part]
        if part in _HALVES and at == len(parts) - 1:  # PEFT's raw parameters
            return _without_prefix(".".join(parts[:at])), _HALVES[part]
    return key, ""


def _without_prefix(name: str) -> str:
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, changed = name.removeprefix(prefix), True
    return name


def _number(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{key!r} must be one number, has shape {list(tensor.shape)}")
    value = float(tensor)
    if not math.isfinite(value):
        raise ValueError(f"{key!r} is {value}")
    return value


def _pair(layer: str, found: Mapping[str, Tensor], alpha: float | None) -> LoraPair:
    lost = {"A", "B"} - set(found)
    if lost:
        name = "lora_A (lora_down)" if "A" in lost else "lora_B (lora_up)"
        raise ValueError(f"the LoRA has no {name} for the layer {layer!r}")
    a, b = found["A"], found["B"]
    for name, half in (("A", a), ("B", b)):
        if half.dtype not in _FLOATS:
            raise ValueError(f"{name} of {layer!r} is {half.dtype}; expected floating point")
        if half.device.type != "meta" and not bool(torch.isfinite(half).all()):
            raise ValueError(f"{name} of {layer!r} holds NaN or infinity")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise ValueError(
            f"A of {layer!r} has shape {list(a.shape)} and B {list(b.shape)}; expected "
            "[rank, in] and [out, rank]"
        )
    scale = 1.0 if alpha is None else alpha / a.shape[0]
    return LoraPair(a, b, scale)
