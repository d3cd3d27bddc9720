"""The server's settings: environment variables, also from a .env file, checked at start-up.

Names and defaults are those of the Chatterbox TTS API, and below them a few of our own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import VramkitError

DtypeName = Literal["float32", "float16", "bfloat16"]
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class SettingsError(VramkitError, ValueError):
    """A setting of the server that is missing its range or is no such value."""


class ChatterboxSettings(BaseSettings):
    """Every setting, by the name of its environment variable in lower case."""

    # `str_strip_whitespace`: a space behind a value in a .env file means nothing.
    model_config = SettingsConfigDict(
        env_file_encoding="utf-8",
        extra="ignore",
        env_ignore_empty=True,
        str_strip_whitespace=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    host: str = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65535)] = 4123
    device: str = "auto"
    model_dtype: Literal["auto"] | DtypeName = "auto"
    use_int8_quantization: bool = False
    max_chunk_length: Annotated[int, Field(ge=20, le=3000)] = 280
    max_total_length: Annotated[int, Field(ge=1, le=100_000)] = 3000
    memory_cleanup_interval: Annotated[int, Field(ge=1)] = 5
    cuda_cache_clear_interval: Annotated[int, Field(ge=1)] = 3
    enable_memory_monitoring: bool = True
    exaggeration: Annotated[float, Field(ge=0.25, le=2.0)] = 0.5
    cfg_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    temperature: Annotated[float, Field(ge=0.05, le=5.0)] = 0.8
    cors_origins: str = "*"

    # Not part of the documented interface.
    engine: Literal["auto", "chatterbox", "formant"] = "auto"
    model_path: Path | None = None
    s3gen_dtype: DtypeName = "float32"
    voice_library_dir: Path | None = None
    max_concurrent_requests: Annotated[int, Field(ge=1, le=64)] = 1
    max_queue_size: Annotated[int, Field(ge=0, le=10_000)] = 64
    queue_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    shutdown_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    memory_alert_percent: Annotated[float, Field(gt=0, le=100)] = 85.0

    @field_validator("device", "model_dtype", "s3gen_dtype", "engine", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if _DEVICE.fullmatch(value) is None:
            raise ValueError("use auto, cpu, cuda, cuda:N or mps")
        return value

    @field_validator("model_path", "voice_library_dir")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("there is no such folder")
        return value

    @property
    def origins(self) -> list[str]:
        """The origins that a browser's page may call from."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


def read_settings(
    env_file: str | os.PathLike[str] | None = ".env", **given: Any
) -> ChatterboxSettings:
    """Settings as `given`, else from the environment, the file, defaults; others are ignored.

    Raises SettingsError, which names each variable, what it held and what it may hold.
    """
    path = Path(env_file) if env_file is not None else None
    if path is not None and not path.is_file():
        if str(path) != ".env":
            raise SettingsError(f"there is no file {path} with settings")
        path = None
    try:
        return ChatterboxSettings(_env_file=path, **given)  # type: ignore[call-arg]
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in e['loc'][:1]).upper()}={e['input']!r}: {e['msg']}"
            for e in error.errors()
        ]
        raise SettingsError("settings that cannot be used: " + "; ".join(lines)) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file in UTF-8: {error}") from error
