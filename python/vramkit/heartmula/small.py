"""A small random checkpoint in the published layout: for tests, not for music."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..shards import WEIGHTS
from .codec import CodecConfig, HeartCodec
from .model import HeartMuLa, HeartMuLaConfig

MODEL = HeartMuLaConfig("small", "small-decoder", 260, 101, 4, 16)
CODEC = CodecConfig(
    dim=16,
    codebook_size=64,
    codebook_dim=8,
    num_quantizers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    in_channels=32,
    out_channels=8,
    num_layers=2,
    num_layers_2=1,
    sample_rate=600,
    factors=(3, 4),
    latent_hidden_dim=4,
    init_channel=4,
)
TOKENS = {"text_bos_id": 256, "text_eos_id": 257, "audio_eos_id": 65, "empty_id": 0}


def write_small(
    folder: str | os.PathLike[str],
    version: str = "3B",
    *,
    model: HeartMuLaConfig = MODEL,
    codec: CodecConfig = CODEC,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write HeartMuLa-oss-<version>, HeartCodec-oss, tokenizer.json and gen_config.json.

    Weights are random; the seed is torch's. Needs safetensors and tokenizers.
    """
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    target = Path(folder)
    parts = (
        (f"HeartMuLa-oss-{version}", HeartMuLa(model).to(dtype), model),
        ("HeartCodec-oss", HeartCodec(codec), codec),
    )
    for name, module, config in parts:
        place = target / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(state, place / WEIGHTS, metadata={"format": "pt"})
    letters = {chr(code): code for code in range(256)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "gen_config.json").write_text(json.dumps(TOKENS, indent=1) + "\n")
    return target
