"""Models of transformers, small and random: plumbing and bytes, through every way in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit import measure

transformers = pytest.importorskip("transformers")

SMALL = {"num_attention_heads": 4, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
TOKENS = {"input_ids": torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))}


def llama(**more: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **SMALL, **more)
    return transformers.LlamaForCausalLM(config), TOKENS


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=512
    )
    inputs = TOKENS | {"decoder_input_ids": TOKENS["input_ids"][:, :5]}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.ViTConfig(num_hidden_layers=2, image_size=32, patch_size=8, **sizes)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, vocab_size=512,
        max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(1, 80, 100),
        "decoder_input_ids": TOKENS["input_ids"][:1, :4],
    }
    return transformers.WhisperForConditionalGeneration(config), inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "t5, shared embeddings": t5,
    "vit, renamed weights": vit,
    "whisper, embeddings of its own class": whisper,
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_way_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    model.eval()
    model.save_pretrained(tmp_path / "plain")
    report = vramkit.convert(model, "int8")
    assert report.coverage_bytes_fraction > 0.85
    expected = output(model, inputs)

    vramkit.save(model, tmp_path / "saved")
    assert torch.equal(output(vramkit.load(tmp_path / "saved"), inputs), expected)
    streamed = vramkit.load(tmp_path / "plain", precision="int8")
    assert torch.equal(output(streamed, inputs), expected)
    vramkit.convert_checkpoint(tmp_path / "plain", tmp_path / "file", "int8")
    assert torch.equal(output(vramkit.load(tmp_path / "file"), inputs), expected)
    for folder in ("saved", "file"):
        size = (tmp_path / folder / "model.safetensors").stat().st_size
        assert size < report.bytes + 64 * 1024


@pytest.mark.parametrize("name", MODELS)
def test_estimates_agree_with_measurements(name: str) -> None:
    model, inputs = MODELS[name]()
    model.eval()
    for precision in (None, "nf4"):
        if precision:
            vramkit.convert(model, precision)
        predicted = vramkit.estimate(model, inputs=inputs)
        measured = measure.call(model, inputs)
        assert predicted.weights_bytes == measured.weights_bytes
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)


@pytest.mark.parametrize("name", ["llama, tied", "t5, shared embeddings"])
def test_tied_layers_stay_tied(name: str) -> None:
    model, _ = MODELS[name]()
    vramkit.convert(model, "int8")
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    assert first.codes is last.codes
    assert first.scales is last.scales


def test_a_layout_that_transformers_rebuilds_is_named(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2, **SMALL
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    from vramkit.shards import Checkpoint

    if any("block_sparse_moe" in name for name in Checkpoint(tmp_path).names()):
        with pytest.raises(vramkit.CheckpointError, match="from_pretrained"):
            vramkit.load(tmp_path, precision="int8")
    else:  # a transformers that stores what its class holds
        assert vramkit.load(tmp_path, precision="int8") is not None


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    llama()[0].save_pretrained(tmp_path)
    config = transformers.LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, **SMALL)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(vramkit.CheckpointError, match="another model"):
        vramkit.load(tmp_path)


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("size", [70, 48])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_resize_token_embeddings(
    precision: str, tied: bool, size: int, mean_resizing: bool
) -> None:
    from vramkit.interop.transformers import resize_token_embeddings

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    vramkit.convert(model, precision)
    ids = torch.tensor([[1, 2, 3]])
    keep = min(64, size)
    before, old = model(ids).logits, model.model.embed_tokens.dense_weight()
    if tied:
        codes = model.lm_head.codes
        with pytest.raises(vramkit.ReadOnlyWeightError, match="resize_token_embeddings"):
            model.resize_token_embeddings(size, mean_resizing=mean_resizing)
        assert model.lm_head.codes is codes
        assert model.model.embed_tokens.codes is codes
        assert torch.equal(model(ids).logits, before)
    else:  # transformers' own way gives a plain head of the same values
        own = copy.deepcopy(model)
        own.resize_token_embeddings(size, mean_resizing=mean_resizing)
        assert torch.equal(own.model.embed_tokens.weight[:keep], old[:keep])
        torch.testing.assert_close(own(ids).logits[..., :keep], before[..., :keep])
    resize_token_embeddings(model, size, mean_resizing=mean_resizing)
    assert model.config.vocab_size == size
    for layer in (model.model.embed_tokens, model.lm_head):
        assert layer.storage_format.name == precision
        assert layer.weight.shape == (size, 64)
    assert (model.lm_head.codes is model.model.embed_tokens.codes) is tied
    assert torch.equal(model.model.embed_tokens.weight[:keep], old[:keep])
    after = model(ids).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :keep], before[..., :keep])
