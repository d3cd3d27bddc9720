"""Chatterbox's shape, small and with random weights: plumbing and bytes, never quality.

A plain object with the published parts: a Llama that writes speech tokens (`t3`), convolutions and
attention that make sound of them (`s3gen`), an LSTM that knows voices (`ve`). And upstream's own
classes of two of them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TEXT, SPEECH, MELS = 64, 300, 40


class CondEnc(nn.Module):
    def __init__(self, speaker: int, width: int) -> None:
        super().__init__()
        self.spkr_enc = nn.Linear(speaker, width)

    def forward(self, cond: Conditions) -> Tensor:
        return self.spkr_enc(cond.speaker_emb)[:, None]


class Conditions:
    """As upstream's: a plain object of tensors."""

    def __init__(self, speaker_emb: Tensor) -> None:
        self.speaker_emb = speaker_emb


class T3(nn.Module):
    """Voice, text and the speech so far to the logits of the next speech token."""

    def __init__(self, width: int, layers: int, speaker: int) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.cond_enc = CondEnc(speaker, width)
        self.text_emb, self.speech_emb = nn.Embedding(TEXT, width), nn.Embedding(SPEECH, width)
        self.tfmr = LlamaModel(
            LlamaConfig(
                vocab_size=8,  # its own embedding is never called, as upstream's
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 64,
            )
        )
        self.speech_head = nn.Linear(width, SPEECH, bias=False)

    def forward(self, text: Tensor, speech: Tensor, cond: Conditions) -> Tensor:
        parts = (self.cond_enc(cond), self.text_emb(text), self.speech_emb(speech))
        hidden = self.tfmr(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state
        return self.speech_head(hidden[:, -1])


class VoiceEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.proj = nn.LSTM(MELS, width, 3, batch_first=True), nn.Linear(width, width)

    def forward(self, mels: Tensor) -> Tensor:
        return nn.functional.normalize(self.proj(self.lstm(mels)[1][0][-1]).relu(), dim=-1)


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)).relu()


class S3Gen(nn.Module):
    """Tokens, as probabilities, to samples."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(SPEECH, width, bias=False)
        self.blocks = nn.ModuleList(_Residual(width, 1 + i % 3) for i in range(layers))
        self.vocoder = nn.Conv1d(width, 120, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.to(self.embedding.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.vocoder(x.transpose(1, 2)).transpose(1, 2).flatten(1).tanh()


class SmallChatterbox:
    """A plain object, as upstream's; `generate` speaks a given line of tokens in a given voice."""

    def __init__(self, width: int = 128, layers: int = 4, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.ve = VoiceEncoder(width).eval()
            self.t3, self.s3gen = T3(width, layers, width).eval(), S3Gen(width, layers).eval()
        self.sr, self.device, self.conds = 24000, "cpu", None

    def generate(self, steps: int = 4) -> Tensor:
        """Samples [1, n], float32, of `steps` tokens' logits (which token follows is given)."""
        return self.s3gen(self.logits(steps).softmax(-1)).float()

    @torch.no_grad()
    def logits(self, steps: int = 4) -> Tensor:
        """What the token model says at each step: float32 [1, steps, tokens]."""
        generator = torch.Generator().manual_seed(3)
        mels = torch.rand(2, 80, MELS, generator=generator)
        text = torch.randint(0, TEXT, (1, 12), generator=generator)
        speech = torch.randint(0, SPEECH, (1, steps), generator=generator)
        cond = Conditions(self.ve(mels).mean(0, keepdim=True))
        made: list[Any] = [self.t3(text, speech[:, : i + 1], cond) for i in range(steps)]
        return torch.stack(made, 1).float()


@contextlib.contextmanager
def published_networks() -> Iterator[Any]:
    """Upstream's T3, T3Cond, T3Config, VoiceEncoder and `configs`, without its other imports.

    Its own `__init__` imports everything down to a watermark; the two networks need torch,
    transformers and einops alone. Raises ImportError where one of them is not installed.
    """
    spec = importlib.util.find_spec("chatterbox")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("chatterbox-tts is not installed: pip install --no-deps chatterbox-tts")
    if importlib.util.find_spec("einops") is None:
        raise ImportError("einops is not installed: pip install einops")
    folder = spec.submodule_search_locations[0]
    stand_ins = {}
    for name, path in (("chatterbox", folder), ("chatterbox.models", f"{folder}/models")):
        stand_ins[name] = types.ModuleType(name)
        stand_ins[name].__path__ = [path]
    if importlib.util.find_spec("librosa") is None:  # reads sounds: not part of the networks
        stand_ins["librosa"] = types.ModuleType("librosa")
        stand_ins["librosa"].__spec__ = importlib.machinery.ModuleSpec("librosa", None)
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules |= stand_ins
    try:
        from chatterbox.models.t3 import llama_configs, t3
        from chatterbox.models.t3.modules.cond_enc import T3Cond
        from chatterbox.models.voice_encoder.voice_encoder import VoiceEncoder as RealVoiceEncoder

        yield types.SimpleNamespace(
            T3=t3.T3,
            T3Cond=T3Cond,
            T3Config=t3.T3Config,
            VoiceEncoder=RealVoiceEncoder,
            configs=llama_configs,
        )
    finally:
        for name in [n for n in sys.modules if n.startswith("chatterbox.") or n in stand_ins]:
            del sys.modules[name]
        sys.modules |= before
