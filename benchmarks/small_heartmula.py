"""HeartMuLa's own classes, small and with random weights: plumbing and bytes, never quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vramkit.heartmula import CodecConfig, HeartMuLaConfig, HeartMuLaGenPipeline, write_small
from vramkit.heartmula.model import FLAVORS, Flavor

TEXTS = {"lyrics": "la la la", "tags": "pop"}
FRAME_MS = 80


def write(folder: Path, dim: int, layers: int, *, seed: int = 0) -> Path:
    """A checkpoint whose music ends by its length alone, so that every call takes as many steps."""
    heads = dim // 64
    for name, depth in (("backbone", layers), ("decoder", 1)):
        FLAVORS[f"{name}-{dim}-{layers}"] = Flavor(depth, heads, heads // 2, dim, 4 * dim, 1024)
    config = HeartMuLaConfig(f"backbone-{dim}-{layers}", f"decoder-{dim}-{layers}", 260, 201, 4, 16)
    codec = CodecConfig(
        dim=32,
        codebook_size=128,
        codebook_dim=8,
        num_quantizers=4,
        attention_head_dim=32,
        num_attention_heads=max(2, dim // 128),
        in_channels=64,
        out_channels=16,
        num_layers=max(2, layers // 2),
        num_layers_2=1,
        sample_rate=600,
        factors=(3, 4),
        latent_hidden_dim=8,
        init_channel=max(4, dim // 32),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        write_small(folder, model=config, codec=codec, dtype=torch.float32)
    settings = folder / "gen_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"audio_eos_id": 10**6}))
    return folder


def load(folder: Path, **options: Any) -> HeartMuLaGenPipeline:
    """The pipeline, its language model in float32 unless `options` say otherwise."""
    return HeartMuLaGenPipeline.from_pretrained(folder, **{"dtype": torch.float32, **options})


def music(pipe: HeartMuLaGenPipeline, frames: int = 3) -> Tensor:
    """Sound of so many frames."""
    return pipe(TEXTS, max_audio_length_ms=frames * FRAME_MS, codec_steps=2, seed=1).wav


@torch.inference_mode()
def logits(pipe: HeartMuLaGenPipeline) -> Tensor:
    """What the backbone says of fixed tokens: no sampling, which would turn errors into others."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 200, (1, 24, 5), generator=generator)
    with pipe.parts.lease("mula") as mula:
        found: Tensor = mula(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return found.float()
