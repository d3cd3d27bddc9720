"""Every snippet of the guide to Qwen-Image's quantization, on a tiny model and on an aligned one.

docs/migration/qwen_image.md has them side by side with the guide's, and says why where they differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_models import image_of, lora_keys, pipeline, transformer
from torch import nn
from vramkit import qwen_image
from vramkit.layers import QuantizedLayer
from vramkit.qwen_image import ModelConfig, QwenImage, from_pretrained
from vramkit.qwen_image.pictures import relative_l2

pytest.importorskip("diffusers")

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "aligned": {"layers": 3, "heads": 4, "head_dim": 64, "text": 64},
}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SIZES[request.param]


@pytest.fixture
def pipe(size: dict[str, Any]) -> QwenImage:
    return QwenImage(pipeline(transformer(**size)), "fp8")


def image(pipe: Any, size: dict[str, Any], **arguments: Any) -> torch.Tensor:
    return image_of(pipe, size.get("text", 16), **arguments)


def stored(model: nn.Module) -> set[str]:
    return {m.format_names for m in model.modules() if isinstance(m, QuantizedLayer)}


def test_custom_vram_limits(pipe: QwenImage, size: dict[str, Any]) -> None:
    before = image(pipe, size)
    # The guide's own lines.
    pipe.enable_vram_management(
        vram_limit=10.0,  # 10GB limit
        vram_buffer=1.5,  # 1.5GB safety buffer
    )
    found = pipe.vramkit_management
    assert (found.limit_bytes, found.buffer_bytes) == (10 * 2**30, 3 * 2**29)
    assert torch.equal(image(pipe, size), before)
    assert pipe.vramkit_session.device_bytes <= 8.5 * 2**30
    pipe.disable_vram_management()


def test_mixed_precision(size: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    made = pipeline(transformer(**size).to(torch.bfloat16), text_encoder=None)
    made.vae.to(torch.bfloat16)
    made.transformer.save_pretrained(tmp_path / "transformer")
    made.vae.save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    configs = [
        # The guide's own lines; the text encoder's needs 16.6 GB of Qwen2.5-VL's files.
        ModelConfig("transformer/*.safetensors", offload_dtype=torch.float8_e4m3fn),
        ModelConfig("vae/*.safetensors", offload_dtype=torch.bfloat16),
    ]
    pipe = from_pretrained(configs, torch_dtype=torch.bfloat16)
    pipe.pipeline.set_progress_bar_config(disable=True)
    assert stored(pipe.transformer) == {"fp8"}
    assert stored(pipe.vae) == set()  # bfloat16 stored and computed: plain layers
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    made = image(pipe, size, dtype=torch.bfloat16)
    assert made.shape == (1, 3, 32, 32)
    assert made.isfinite().all()


def test_the_text_encoder_s_line(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    small = Qwen2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(small).eval().float()
    model.save_pretrained(tmp_path / "text_encoder")
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("text_encoder/*.safetensors", offload_dtype=torch.bfloat16)
    loaded = qwen_image.load_model(config, torch_dtype=torch.float32)
    assert stored(loaded) == {"bf16"}
    tokens = torch.arange(8)[None]
    rounded = Qwen2ForCausalLM(small).eval()
    state = {
        name: value.bfloat16().float() if value.dim() > 1 else value
        for name, value in model.state_dict().items()
    }
    rounded.load_state_dict(state)
    with torch.inference_mode():
        expected, found = rounded(tokens).logits, loaded(tokens).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_fp8_attention_in_the_call(pipe: QwenImage, size: dict[str, Any]) -> None:
    attention: Any = pytest.importorskip("vramkit.attention")
    exact = image(pipe, size)
    with pytest.warns(RuntimeWarning, match="FP8 attention needs"):
        found = image(pipe, size, enable_fp8_attention=True)
    assert torch.equal(found, exact)  # no matrix units for it here
    assert attention.fp8_attention_of(pipe.transformer)
    assert torch.equal(image(pipe, size), exact)
    assert not attention.fp8_attention_of(pipe.transformer)
    rounded = image(
        pipe,
        size,
        enable_fp8_attention={"backend": "emulate", "least_length": 1, "error_bound": 1.0},
    )
    assert not torch.equal(rounded, exact)
    assert relative_l2(exact, rounded) < 0.2
    assert torch.equal(image(pipe, size), exact)


def test_the_four_files_are_the_four_modes(size: dict[str, Any]) -> None:
    keys = lora_keys(transformer(**size), ["transformer_blocks.0.attn.to_v"], "down")
    images = {}
    for mode in ("fp8", "fp8_fused", "low_vram", "low_vram_fused"):
        limit = 6 if mode.startswith("low_vram") else None
        pipe = QwenImage(pipeline(transformer(**size)), mode, lora=keys, vram_limit=limit)
        images[mode] = image(pipe, size)
        pipe.disable_vram_management()
    assert torch.equal(images["fp8"], images["low_vram"])
    assert torch.equal(images["fp8_fused"], images["low_vram_fused"])


def test_gpus_of_the_guide() -> None:
    cards = {"RTX 3060": 12, "RTX 3070": 8, "RTX 4080": 16, "RTX 4090": 24, "A100": 80}
    found = {name: str(qwen_image.recommend(gb).mode) for name, gb in cards.items()}
    assert found == {
        "RTX 3060": "low_vram_fused",
        "RTX 3070": "low_vram_fused",
        "RTX 4080": "low_vram_fused",  # the guide: FP8, which takes 20 GB and more
        "RTX 4090": "fp8_fused",
        "A100": "original",
    }
