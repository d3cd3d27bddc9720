"""`HeartMuLaGenPipeline`: lyrics and tags to music, by the published interface."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bnb_config import is_config, read_config
from ..convert import Progress
from ..lazy_pipeline import LazyPipeline, parse_dtype
from .codec import FRAMES_PER_SECOND, HeartCodec
from .loading import codec_factory, load_model, model_factory
from .model import HeartMuLa
from .sound import save_sound

_PARTS = ("mula", "codec")
_FRAME_MS = 1000 / FRAMES_PER_SECOND


@dataclass(frozen=True)
class MusicOutput:
    """What a call returns: `wav` is float32 [channels, samples].

    `frames` are the tokens, int64 [codebooks, frames]; `cache_bytes` what keys and values took.
    """

    wav: Tensor
    sample_rate: int
    frames: Tensor
    cache_bytes: int
    path: Path | None = None

    @property
    def seconds(self) -> float:
        """The sound's real length."""
        return self.wav.shape[-1] / self.sample_rate


@dataclass(frozen=True)
class _GenConfig:
    text_bos_id: int = 128000
    text_eos_id: int = 128001
    audio_eos_id: int = 8193
    empty_id: int = 0


class HeartMuLaGenPipeline:
    """Lyrics and tags to music. Made by `from_pretrained`; called with a dict.

    `mula` and `codec` are handles to the models (loaded when they are used, with `lazy_load`).
    """

    def __init__(
        self, parts: LazyPipeline, tokenizer: Any, config: _GenConfig, kv_cache_bits: int
    ) -> None:
        self._parts, self._tokenizer, self._config = parts, tokenizer, config
        self._bits = kv_cache_bits

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: str | os.PathLike[str],
        device: Any = "cpu",
        dtype: Any = torch.bfloat16,
        version: str = "3B",
        lazy_load: bool = False,
        bnb_config: Any = None,
        *,
        precision: Any = None,
        kv_cache_bits: int = 16,
        progress: bool | Progress = False,
    ) -> HeartMuLaGenPipeline:
        """Load the pipeline from a folder in the published layout.

        Args:
            pretrained_path: Holds HeartMuLa-oss-<version>, HeartCodec-oss, tokenizer.json and
                gen_config.json.
            device: For both models, or {"mula": …, "codec": …}.
            dtype: Of the language model's plain tensors, or {"mula": …, "codec": …}. One dtype
                alone leaves the codec in float32: its convolutions are sensitive.
            version: "3B" or "7B": which folder.
            lazy_load: Load each model when it is used, one at a time.
            bnb_config: Transformers' `BitsAndBytesConfig`, or any object with its fields, for the
                language model. With llm_int8_enable_fp32_cpu_offload the codec, the part that stays
                float32, stays on the CPU, unless `device` says where it goes.
            precision: In place of it: a precision, for the language model, or by part.
            kv_cache_bits: 16 (the model's dtype) or 8, of keys and values.
            progress: Of loading, as for `vramkit.load`.

        Weights are converted one by one as they are read. Raises FileNotFoundError that names what
        is missing, ValueError for a bad dtype, precision or device, PrecisionConfigError for a
        config that cannot be honoured.
        """
        folder = Path(pretrained_path)
        config = _checked(folder, version)
        if bnb_config is not None and precision is not None:
            raise ValueError("give bnb_config or precision, not both")
        wanted = _by_part(precision, None) if precision is not None else {"mula": bnb_config}
        offload = is_config(bnb_config) and read_config(bnb_config).offload
        devices = _by_part(device, "cpu")
        if offload and not isinstance(device, Mapping):
            devices["codec"] = "cpu"
        dtypes = {"mula": torch.bfloat16, "codec": torch.float32}
        given = dtype if isinstance(dtype, Mapping) else {"mula": dtype}
        for part, value in _by_part(given, None).items():
            if value is not None:
                dtypes[part] = _plain_dtype(value)
        if kv_cache_bits not in (8, 16):
            raise ValueError(f"kv_cache_bits is 16 or 8, not {kv_cache_bits!r}")
        places = {part: torch.device(where) for part, where in devices.items()}
        mula_folder, codec_folder = folder / f"HeartMuLa-oss-{version}", folder / "HeartCodec-oss"

        def load_mula() -> HeartMuLa:
            part = ("mula", model_factory(mula_folder))
            return load_model(
                mula_folder, part[1], wanted.get("mula"), dtypes["mula"], places["mula"], progress
            )

        def load_codec() -> HeartCodec:
            chosen = wanted.get("codec")
            factory = codec_factory(codec_folder)
            return load_model(
                codec_folder, factory, chosen, dtypes["codec"], places["codec"], progress
            )

        parts = LazyPipeline(
            {"mula": load_mula, "codec": load_codec}, resident=1 if lazy_load else 2, islands=()
        )
        if not lazy_load:
            for part in _PARTS:
                parts.load(part)
        tokenizer = _tokenizer(folder / "tokenizer.json")
        return cls(parts, tokenizer, config, kv_cache_bits)

    @property
    def mula(self) -> Any:
        """The language model."""
        return self._parts.load("mula")

    @property
    def codec(self) -> Any:
        """The codec."""
        return self._parts.load("codec")

    @property
    def parts(self) -> LazyPipeline:
        """The lazy pipeline underneath: what is loaded, events, leases."""
        return self._parts

    def unload(self) -> int:
        """Unload both models; returns the bytes really freed. The next call loads again."""
        return self._parts.unload()

    def __call__(
        self,
        inputs: Mapping[str, str],
        *,
        max_audio_length_ms: int = 120_000,
        save_path: str | os.PathLike[str] | None = None,
        topk: int = 50,
        temperature: float = 1.0,
        cfg_scale: float = 1.5,
        seed: int | None = None,
        codec_steps: int = 10,
    ) -> MusicOutput:
        """Make music.

        Args:
            inputs: {"lyrics": text, "tags": text}, or paths of text files.
            max_audio_length_ms: At most so long; the model may end it sooner.
            save_path: Where the sound is written, .wav or .mp3; None: nowhere.
            topk, temperature: Of the sampling.
            cfg_scale: Guidance; 1.0: none, and half the work and cache.
            seed: For the same music again; None: torch's own.
            codec_steps: Euler steps of the codec's flow.

        The cache has the positions of this prompt and length, no more. Raises ValueError for
        missing or empty texts, a length below one frame, or more positions than the model has.
        """
        prompt, mask, muq = self._prompt(inputs)
        count = int(max_audio_length_ms / _FRAME_MS)
        if count < 1:
            raise ValueError(
                f"max_audio_length_ms is {max_audio_length_ms}, less than a frame of "
                f"{_FRAME_MS:g} ms"
            )
        generator = torch.Generator()
        generator.manual_seed(torch.seed() if seed is None else seed)
        with self._parts.lease("mula") as mula:
            frames, took = self._frames(
                mula, prompt, mask, muq, count, generator, topk, temperature, cfg_scale
            )
        with self._parts.lease("codec") as codec:
            wav = codec.detokenize(frames, steps=codec_steps, generator=generator)
            rate = codec.config.sample_rate
        path = None if save_path is None else save_sound(Path(save_path), wav, rate)
        return MusicOutput(wav, rate, frames, took, path)

    def _prompt(self, inputs: Mapping[str, str]) -> tuple[Tensor, Tensor, int]:
        """(tokens [positions, books + 1], mask, the position of the music's embedding)."""
        texts = {key: _text(inputs, key).lower() for key in ("tags", "lyrics")}
        tags = texts["tags"]
        tags = tags if tags.startswith("<tag>") else f"<tag>{tags}"
        tags = tags if tags.endswith("</tag>") else f"{tags}</tag>"
        first, second = self._ids(tags), self._ids(texts["lyrics"])
        with self._parts.lease("mula") as mula:
            books = mula.config.audio_num_codebooks
        tokens = torch.zeros(len(first) + 1 + len(second), books + 1, dtype=torch.long)
        tokens[: len(first), -1] = torch.tensor(first)
        tokens[len(first) + 1 :, -1] = torch.tensor(second)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, -1] = True
        return tokens, mask, len(first)

    def _ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text).ids)
        begin, end = self._config.text_bos_id, self._config.text_eos_id
        ids = ids if ids[:1] == [begin] else [begin, *ids]
        return ids if ids[-1] == end else [*ids, end]

    def _frames(
        self,
        mula: HeartMuLa,
        prompt: Tensor,
        mask: Tensor,
        muq: int,
        count: int,
        generator: torch.Generator,
        topk: int,
        temperature: float,
        cfg_scale: float,
    ) -> tuple[Tensor, int]:
        """(tokens [books, frames], bytes of the cache)."""
        batch = 1 if cfg_scale == 1.0 else 2
        device = mula.device
        caches = mula.make_caches(batch, len(prompt) + count, self._bits)
        options: dict[str, Any] = {
            "temperature": temperature,
            "topk": topk,
            "cfg_scale": cfg_scale,
            "generator": generator,
        }
        tokens = prompt.to(device).expand(batch, -1, -1)
        shown = mask.to(device).expand(batch, -1, -1)
        segment = (torch.zeros(batch, mula.config.muq_dim, device=device), muq)
        found: list[Tensor] = []
        for _ in range(count):
            made = mula.frame(tokens, shown, caches, segment=segment, **options)
            if bool((made[0] >= self._config.audio_eos_id).any()) and found:
                break
            found.append(made[0].cpu())
            tokens = made.new_full((batch, 1, made.shape[1] + 1), self._config.empty_id)
            tokens[:, 0, :-1] = made
            shown = torch.ones_like(tokens, dtype=torch.bool)
            shown[..., -1] = False
            segment = None  # type: ignore[assignment]
        return torch.stack(found, 1), caches.nbytes


def _checked(folder: Path, version: str) -> _GenConfig:
    """The generation's configuration, once everything is known to be there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: it should hold HeartMuLa's checkpoints")
    known = sorted(p.name.removeprefix("HeartMuLa-oss-") for p in folder.glob("HeartMuLa-oss-*"))
    if version not in known:
        raise FileNotFoundError(
            f"no version {version!r}: {folder} has no folder HeartMuLa-oss-{version} "
            f"(versions there: {', '.join(known) or 'none'})"
        )
    for name in ("HeartCodec-oss", "tokenizer.json", "gen_config.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}")
    data = json.loads((folder / "gen_config.json").read_text(encoding="utf-8"))
    return _GenConfig(**{k: v for k, v in data.items() if k in _GenConfig.__dataclass_fields__})


def _tokenizer(path: Path) -> Any:
    from ..lazy_systems import upstream

    return upstream("tokenizers", "Tokenizer", "tokenizers (pip install tokenizers)").from_file(
        str(path)
    )


def _by_part(value: Any, default: Any) -> dict[str, Any]:
    """A value for both parts, or those of a dict, whose names are checked."""
    if not isinstance(value, Mapping) or is_config(value):
        return dict.fromkeys(_PARTS, value) if default is not None else {"mula": value}
    unknown = sorted(set(value) - set(_PARTS))
    if unknown:
        raise ValueError(f"no part {unknown[0]!r}; the parts are: {', '.join(_PARTS)}")
    return {**({} if default is None else dict.fromkeys(_PARTS, default)), **value}


def _plain_dtype(value: Any) -> torch.dtype:
    mode = parse_dtype(value)
    if mode.value not in ("fp32", "fp16", "bf16"):
        raise ValueError(f"dtype is float32, float16 or bfloat16, not {value!r}: use precision=")
    return mode.torch_dtype


def _text(inputs: Mapping[str, str], key: str) -> str:
    text = inputs.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key!r} is text that is not empty, or a text file's path; got {text!r}")
    if len(text) < 4096 and "\n" not in text and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    return text
