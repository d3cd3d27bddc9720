"""What speaks: Chatterbox where its package is installed, else the formant synthesizer.

An engine takes one piece of text at a time and gives 16-bit samples. The choice is the setting
ENGINE; "auto" looks for the package `chatterbox-tts` and says what it chose. An engine that was
chosen and cannot be loaded is an error, never replaced by the other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..chatterbox import ChatterboxReport, load, prepare, resolve_device
from ..errors import VramkitError
from .formant_tts import VOICES, FormantTTS, TextError
from .letters import words_of
from .settings import ChatterboxSettings, SettingsError
from .sound import pcm16

DEFAULT_VOICE = "alloy"
_SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a")
_KEPT_VOICES = 8  # whose conditionals stay in memory


class RequestError(VramkitError, ValueError):
    """A request that this engine cannot fulfil as it is; the text says why."""


class UnknownVoiceError(RequestError):
    """A voice that is not in the library."""


class SpeechOptions(NamedTuple):
    """How to speak; ranges are checked where requests are read."""

    voice: str = DEFAULT_VOICE
    exaggeration: float = 0.5
    cfg_weight: float = 0.5
    temperature: float = 0.8
    speed: float = 1.0


class VoiceInfo(NamedTuple):
    """A voice that requests may name."""

    name: str
    source: str  # "preset", "built-in" or a file's name


class FormantEngine:
    """The synthesizer of `formant_tts`; any number of threads may call it at once."""

    name = "formant"
    description = (
        "Rule-based formant synthesizer of vramkit, not a neural voice: it stands in where "
        "chatterbox-tts is not installed. Its token model is a small untrained LSTM for prosody."
    )
    parallel = True

    def __init__(self, settings: ChatterboxSettings) -> None:
        if settings.voice_library_dir is not None:
            raise SettingsError(
                "VOICE_LIBRARY_DIR is set, but the formant engine cannot imitate voices: unset it, "
                "or install chatterbox-tts and set ENGINE=chatterbox"
            )
        self.tts = FormantTTS()
        self.report: ChatterboxReport = prepare(
            self.tts,
            int8=settings.use_int8_quantization,
            dtype=settings.model_dtype,
            device=_device(settings),
            s3gen_dtype=settings.s3gen_dtype,
        )
        self.sample_rate = self.tts.sr

    def voices(self) -> list[VoiceInfo]:
        """The presets."""
        return [VoiceInfo(name, "preset") for name in VOICES]

    def check(self, text: str, options: SpeechOptions) -> None:
        """Raises UnknownVoiceError or TextError for what `speak` could not do."""
        _check_voice(options.voice, self.voices())
        if next(words_of(text), None) is None:
            raise TextError(
                "the formant engine speaks English only: the text holds no letter, digit or sign "
                "that it could speak"
            )

    def speak(self, text: str, options: SpeechOptions) -> bytes:
        """Samples for one piece of a text; a piece of signs alone is a short silence."""
        try:
            return pcm16(self.tts.generate(text, **options._asdict()))
        except TextError:
            return bytes(2 * (self.sample_rate // 10))

    def close(self) -> None:
        """Give the weights back."""
        del self.tts


class ChatterboxEngine:
    """Chatterbox itself. It keeps state in a call, so that one request runs at a time."""

    name = "chatterbox"
    description = "Chatterbox TTS by Resemble AI, its token model in the precision that is shown."
    parallel = False

    def __init__(self, settings: ChatterboxSettings, tts: Any = None) -> None:
        options: dict[str, Any] = {
            "int8": settings.use_int8_quantization,
            "dtype": settings.model_dtype,
            "device": _device(settings),
            "s3gen_dtype": settings.s3gen_dtype,
        }
        self.report: ChatterboxReport
        if tts is None:
            tts, self.report = load(settings.model_path, **options)
        else:
            self.report = prepare(tts, **options)
        self.tts = tts
        self.sample_rate = int(tts.sr)
        self._lock = threading.Lock()
        self._built_in = getattr(tts, "conds", None)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._library = _library(settings.voice_library_dir)

    def voices(self) -> list[VoiceInfo]:
        """The built-in voice, by every name that OpenAI's clients send, and the library's."""
        library = [VoiceInfo(name, path.name) for name, path in self._library.items()]
        built_in = [VoiceInfo(name, "built-in") for name in VOICES if name not in self._library]
        return [*built_in, *library]

    def check(self, text: str, options: SpeechOptions) -> None:
        """Raises UnknownVoiceError or RequestError for what `speak` could not do."""
        _check_voice(options.voice, self.voices())
        if options.speed != 1.0:
            raise RequestError(
                "Chatterbox cannot change its speed: leave `speed` at 1 (`cfg_weight` changes the "
                "pace)"
            )
        if self._built_in is None and options.voice not in self._library:
            raise RequestError(
                "this Chatterbox has no built-in voice: put a sound file into VOICE_LIBRARY_DIR "
                "and name it as `voice`"
            )

    def speak(self, text: str, options: SpeechOptions) -> bytes:
        """Samples for one piece of a text."""
        with self._lock:
            # A voice stays set until the next one is: each call says which it wants.
            self.tts.conds = self._conditions(options)
            made = self.tts.generate(
                text,
                exaggeration=options.exaggeration,
                cfg_weight=options.cfg_weight,
                temperature=options.temperature,
            )
        return pcm16(torch.as_tensor(made))

    def _conditions(self, options: SpeechOptions) -> Any:
        path = self._library.get(options.voice)
        if path is None:
            return self._built_in
        if options.voice not in self._kept:
            self.tts.prepare_conditionals(str(path), exaggeration=options.exaggeration)
            self._kept[options.voice] = self.tts.conds
            if len(self._kept) > _KEPT_VOICES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(options.voice)
        return self._kept[options.voice]

    def close(self) -> None:
        """Give the weights back."""
        self._kept.clear()
        del self.tts, self._built_in


Engine = FormantEngine | ChatterboxEngine


def _device(settings: ChatterboxSettings) -> str:
    try:
        return resolve_device(settings.device)
    except ValueError as error:
        raise SettingsError(f"DEVICE={settings.device!r}: {error}") from error


def _check_voice(voice: str, known: list[VoiceInfo]) -> None:
    names = [info.name for info in known]
    if voice not in names:
        raise UnknownVoiceError(f"unknown voice {voice!r}; the voices are: {', '.join(names)}")


def _library(folder: Path | None) -> dict[str, Path]:
    """Sound files of a folder by their names without the ending."""
    if folder is None:
        return {}
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in _SOUNDS)
    return {path.stem: path for path in found}


def chatterbox_version() -> str | None:
    """The installed version of chatterbox-tts, None without it. Imports nothing."""
    try:
        return version("chatterbox-tts")
    except PackageNotFoundError:
        return None


def make_engine(settings: ChatterboxSettings) -> Engine:
    """The engine that the settings ask for, loaded.

    Raises SettingsError for settings that it cannot follow, ImportError where the package that
    ENGINE=chatterbox needs is missing.
    """
    chosen = settings.engine
    if chosen == "auto":
        wanted = settings.model_path is not None or chatterbox_version() is not None
        chosen = "chatterbox" if wanted else "formant"
    return ChatterboxEngine(settings) if chosen == "chatterbox" else FormantEngine(settings)
