"""Small Qwen-Image pipelines with random weights: plumbing and bytes, never quality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def transformer(
    layers: int = 2, heads: int = 3, head_dim: int = 16, text: int = 16, *, seed: int = 0
) -> nn.Module:
    """The tiny one of diffusers' own tests by default; heads of 64 make an aligned one."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    half = head_dim // 4
    model: nn.Module = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=False,
        axes_dims_rope=(head_dim - 2 * half, half, half),
    )
    return model.eval()


def vae() -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    model: nn.Module = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return model.eval()


def pipeline(model: nn.Module | None = None, *, edit: bool = False, **parts: Any) -> Any:
    """Text to image, or editing; without a text encoder, so prompts come as embeddings."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImagePipeline,
    )

    given: dict[str, Any] = {
        "transformer": transformer() if model is None else model,
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
        **parts,
    }
    made: Any
    made = QwenImageEditPipeline(processor=None, **given) if edit else QwenImagePipeline(**given)
    made.set_progress_bar_config(disable=True)
    return made


def embeddings(
    width: int = 16, length: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "prompt_embeds": torch.randn(1, length, width, generator=generator).to(dtype),
        "prompt_embeds_mask": torch.ones(1, length, dtype=torch.long),
    }


def image_of(
    pipe: Any, text: int = 16, *, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Tensor:
    """[1, 3, 32, 32] in two steps from fixed noise."""
    asked = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **arguments}
    asked.setdefault("true_cfg_scale", 1.0)
    with torch.inference_mode():
        found: Tensor = pipe(
            generator=torch.Generator().manual_seed(0), **embeddings(text, dtype=dtype), **asked
        ).images
    return found


def lora_keys(
    model: nn.Module, layers: list[str], style: str = "AB", prefix: str = "", rank: int = 4
) -> dict[str, Tensor]:
    """A LoRA's tensors for some layers, in one of the ways that files name them."""
    generator = torch.Generator().manual_seed(9)
    halves = {
        "AB": (".lora_A.weight", ".lora_B.weight"),
        "default": (".lora_A.default.weight", ".lora_B.default.weight"),
        "down": (".lora_down.weight", ".lora_up.weight"),
    }[style]
    found = {}
    for name in layers:
        layer: Any = model.get_submodule(name)
        rows, columns = layer.out_features, layer.in_features
        found[prefix + name + halves[0]] = 0.2 * torch.randn(rank, columns, generator=generator)
        found[prefix + name + halves[1]] = 0.2 * torch.randn(rows, rank, generator=generator).div(2)
        if style == "down":
            found[prefix + name + ".alpha"] = torch.tensor(rank / 2)
    return found


class SmallDiffSynth(nn.Module):
    """DiffSynth's interface around the same models: `dit`, `load_models_to_device`, `tiled=`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.dit, self.text_encoder, self.vae = model, None, vae()
        self.device, self.torch_dtype = "cpu", torch.float32
        self.vram_management_enabled = False
        self.seen: dict[str, Any] = {}

    def load_models_to_device(self, names: list[str]) -> None:
        self.seen["loaded"] = names

    @torch.no_grad()
    def __call__(
        self,
        prompt: Tensor,
        height: int = 32,
        width: int = 32,
        seed: int | None = None,
        num_inference_steps: int = 2,
        tiled: bool = False,
    ) -> Tensor:
        self.seen["tiled"] = tiled
        generator = torch.Generator().manual_seed(seed or 0)
        tokens = (height // 8) * (width // 8)
        latents = torch.randn(1, tokens, 16, generator=generator)
        self.load_models_to_device(["dit"])
        for step in range(num_inference_steps):
            time = torch.full((1,), 1 - step / num_inference_steps)
            change = self.dit(
                hidden_states=latents,
                timestep=time,
                encoder_hidden_states=prompt,
                encoder_hidden_states_mask=None,
                img_shapes=[[(1, height // 8, width // 8)]],
                return_dict=False,
            )[0]
            latents = latents - change / num_inference_steps
        return latents
