"""What formats cost four more real models: error of the output, and the task's own figure.

A language model (all Linears), a voice encoder (LSTM), a speller (GRU and its cell) and a depthwise
classifier (Conv2d), by format, beside the peers that have such a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import Tensor, nn

from . import peers, real_layers, real_models

FORMATS = ("bf16", "fp8", "int8", "int4", "nf4", "nf4_dq")
Change = Callable[[nn.Module], nn.Module]
Measure = Callable[[nn.Module], dict[str, float]]


def run() -> dict[str, Any]:
    """{model: {variant: {relative_l2, and the task's figure}}}; missing weights are said."""
    found: dict[str, Any] = {}
    for label, rows in (
        ("SmolLM2-135M", _language_model),
        ("Resemblyzer", _voice_encoder),
        ("g2p-en", _speller),
        ("EfficientNet-lite0", _classifier),
    ):
        print(f"\n{label}")
        try:
            found[label] = rows()
        except (ImportError, OSError) as error:
            print(f"not measured: {error}")
    return found


def _ours(name: str, **options: Any) -> Change:
    def change(model: nn.Module) -> nn.Module:
        vramkit.convert(model, name, **options)
        return model

    return change


def _dynamic(*kinds: type[nn.Module]) -> Change:
    """torch's dynamic INT8: a scale per tensor, activations quantized as they come."""
    return lambda model: peers.torch_dynamic(model, frozenset(kinds))


def _torchao(name: str) -> Change:
    def change(model: nn.Module) -> nn.Module:
        from torchao import quantization

        def wanted(module: nn.Module, path: str) -> bool:
            return isinstance(module, nn.Linear) and "lm_head" not in path

        quantization.quantize_(model, getattr(quantization, name)(), filter_fn=wanted)
        return model

    return change


def _quanto(name: str) -> Change:
    return lambda model: peers.quanto(model, name, exclude="*lm_head")


def _table(model: nn.Module, variants: dict[str, Change], measure: Measure) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, change in variants.items():
        try:
            with torch.inference_mode(False), torch.no_grad():
                rows[name] = measure(change(copy.deepcopy(model)))
        except Exception as error:
            if " " not in name:  # one of ours
                raise
            # A peer that is absent, or does not run under this torch.
            text = str(error).strip().split("\n")[0][:90]
            rows[name] = {"not_measured": f"{type(error).__name__}: {text}"}
        shown = "".join(
            f"  {key} {value:.5f}" if isinstance(value, float) else f"  {key}: {value}"
            for key, value in rows[name].items()
        )
        print(f"{name:28}{shown}", flush=True)
    return rows


def _plain(model: nn.Module) -> nn.Module:
    return model


def _language_model() -> dict[str, Any]:
    """Perplexity of the first 1,024 tokens of the GPL-3; relative L2 of the logits there."""
    model, tokenizer = real_models.load_smollm()
    tokens = real_models.judge_tokens(tokenizer)
    with torch.no_grad():
        reference = model(tokens[None]).logits[0]

    def measure(changed: nn.Module) -> dict[str, float]:
        logits = changed(tokens[None]).logits[0].float()
        loss = nn.functional.cross_entropy(logits[:-1], tokens[1:])
        return {
            "relative_l2": real_layers.relative(logits, reference),
            "perplexity": float(loss.exp()),
        }

    def but_the_head(change: Change) -> Change:
        """The head is the embedding, which none of the variants touches."""

        def apply(changed: nn.Module) -> nn.Module:
            head: Any = changed.lm_head
            changed.lm_head = nn.Identity()
            made = change(changed)  # some return a copy
            made.lm_head = head
            return made

        return apply

    skipped = {"skip": ["lm_head", "embed_tokens"]}
    variants = {"float32": _plain} | {name: _ours(name, **skipped) for name in FORMATS}
    variants |= {
        "bitsandbytes nf4": but_the_head(lambda m: peers.bitsandbytes_4bit(m, "nf4", packed=False)),
        "bitsandbytes int8": but_the_head(peers.bitsandbytes_8bit),
        "quanto qint8": _quanto("qint8"),
        "quanto qfloat8": _quanto("qfloat8"),
        "quanto qint4": _quanto("qint4"),
        "torchao int8": _torchao("Int8WeightOnlyConfig"),
        "torchao float8": _torchao("Float8WeightOnlyConfig"),
        "torch quantize_dynamic": but_the_head(_dynamic(nn.Linear)),
    }
    return _table(model, variants, measure)


def _voice_encoder() -> dict[str, Any]:
    """Least cosine with float32's embeddings; utterances whose most alike one stays the same."""
    model = real_layers.VoiceEncoder()
    mels = real_layers.speech()
    with torch.no_grad():
        reference = model.utterances(mels)
    nearest = real_layers.nearest(reference)

    def measure(changed: nn.Module) -> dict[str, float]:
        assert isinstance(changed, real_layers.VoiceEncoder)
        made = changed.utterances(mels)
        return {
            "relative_l2": real_layers.relative(made, reference),
            "cosine": float((made * reference).sum(-1).min()),
            "same_nearest": float((real_layers.nearest(made) == nearest).float().mean()),
        }

    variants = {"float32": _plain} | {name: _ours(name) for name in FORMATS}
    variants["torch quantize_dynamic"] = _dynamic(nn.LSTM, nn.Linear)
    return _table(model, variants, measure)


def _speller() -> dict[str, Any]:
    """Words spelled as float32 spells them; relative L2 of each word's first logits."""
    model = real_layers.Speller()
    words = real_layers.WORDS
    with torch.no_grad():
        expected = [model.spell(word) for word in words]

    def measure(changed: nn.Module) -> dict[str, float]:
        assert isinstance(changed, real_layers.Speller)
        made = [changed.spell(word) for word in words]
        first, reference = (torch.cat([logits for _, logits in each]) for each in (made, expected))
        same = sum(a[0] == b[0] for a, b in zip(made, expected, strict=True))
        return {
            "relative_l2": real_layers.relative(first, reference),
            "same_words": same / len(words),
        }

    variants = {"float32": _plain} | {name: _ours(name) for name in FORMATS}
    variants["torch quantize_dynamic"] = _dynamic(nn.GRU, nn.GRUCell, nn.Linear)
    return _table(model, variants, measure)


def _classifier() -> dict[str, Any]:
    """Crops whose first class is float32's; relative L2 of the logits."""
    model, images = real_layers.classifier(), real_layers.photographs()
    with torch.no_grad():
        reference: Tensor = model(images)

    def measure(changed: nn.Module) -> dict[str, float]:
        logits = changed(images)
        same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
        return {
            "relative_l2": real_layers.relative(logits, reference),
            "same_class": float(same),
        }

    variants = {"float32": _plain} | {name: _ours(name) for name in FORMATS}
    variants |= {f"quanto {n}": _quanto(n) for n in ("qint8", "qfloat8", "qint4")}
    return _table(model, variants, measure)
