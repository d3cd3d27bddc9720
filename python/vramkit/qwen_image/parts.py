"""The components of a Qwen-Image pipeline by what they do: diffusers' names and DiffSynth's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# diffusers says `transformer`, DiffSynth `dit`; the others have one name.
_TRANSFORMERS = ("transformer", "dit")


@dataclass(frozen=True)
class Parts:
    """What of a pipeline has weights.

    Attributes:
        transformer: The denoising model, and `name`, the attribute that holds it.
        text_encoder: None where prompts come as embeddings.
        vae: None where latents are the result.
        others: Further modules (DiffSynth's ControlNets and image encoders), by name.
    """

    name: str
    transformer: nn.Module
    text_encoder: nn.Module | None
    vae: nn.Module | None
    others: dict[str, nn.Module]

    @property
    def diffsynth(self) -> bool:
        """Whether the pipeline has DiffSynth's interface."""
        return self.name == "dit"

    @property
    def components(self) -> dict[str, nn.Module]:
        """All with parameters, by the pipeline's names, in the order of a call."""
        named = {
            "text_encoder": self.text_encoder,
            **self.others,
            self.name: self.transformer,
            "vae": self.vae,
        }
        return {
            name: module
            for name, module in named.items()
            if module is not None and next(module.parameters(), None) is not None
        }


def parts_of(pipeline: Any) -> Parts:
    """The parts of diffusers' or DiffSynth's pipeline, or of anything with their attributes.

    Raises TypeError for an object without a transformer.
    """
    for name in _TRANSFORMERS:
        transformer = getattr(pipeline, name, None)
        if isinstance(transformer, nn.Module):
            break
    else:
        raise TypeError(
            f"{type(pipeline).__name__} has neither a transformer (diffusers) nor a dit "
            "(DiffSynth) that is a module: give a Qwen-Image pipeline"
        )
    held = dict(getattr(pipeline, "components", None) or {})
    if isinstance(pipeline, nn.Module):
        held |= dict(pipeline.named_children())
    known = {name, "text_encoder", "vae"}
    others = {n: m for n, m in held.items() if isinstance(m, nn.Module) and n not in known}
    return Parts(
        name,
        transformer,
        _module(pipeline, "text_encoder"),
        _module(pipeline, "vae"),
        others,
    )


def _module(pipeline: Any, name: str) -> nn.Module | None:
    found = getattr(pipeline, name, None)
    return found if isinstance(found, nn.Module) else None


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks; empty where it has none by that name."""
    found = getattr(transformer, "transformer_blocks", None)
    return list(found) if isinstance(found, (nn.ModuleList, nn.Sequential)) else []


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    from ..estimator import weight_bytes

    return weight_bytes(module)
