"""What requests hold and answers look like; FastAPI makes the OpenAPI document of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .engines import DEFAULT_VOICE


class SpeechRequest(BaseModel):
    """The body of POST /v1/audio/speech. Unknown fields (`model`, for one) are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    # The server's own limit, MAX_TOTAL_LENGTH, is checked where the setting is known.
    input: Annotated[str, Field(min_length=1, max_length=100_000)]
    voice: Annotated[str, Field(min_length=1, max_length=200)] = DEFAULT_VOICE
    response_format: Literal["wav"] = "wav"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    exaggeration: Annotated[float, Field(ge=0.25, le=2.0)] | None = None
    cfg_weight: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    temperature: Annotated[float, Field(ge=0.05, le=5.0)] | None = None

    @field_validator("input")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the text is empty")
        return value


class ErrorDetail(BaseModel):
    """What was wrong, and of which kind it is."""

    message: str
    type: str


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class MemoryInfo(BaseModel):
    """The process's memory, in MiB."""

    cpu_memory_mb: float
    cpu_memory_percent: float
    gpu_memory_allocated_mb: float
    gpu_memory_reserved_mb: float
    gpu_memory_max_allocated_mb: float


class MemoryResponse(BaseModel):
    """The answer of GET /memory."""

    memory_info: MemoryInfo
    request_counter: int
    cleanup_performed: bool
    cuda_cache_cleared: bool
    alerts: list[str]


class HealthResponse(BaseModel):
    """The answer of GET /health."""

    status: Literal["healthy", "shutting_down"]
    model_loaded: bool
    engine: str
    device: str
    config: dict[str, Any]
    memory_info: MemoryInfo


class ConfigResponse(BaseModel):
    """The answer of GET /config. `dtype` is the setting, `effective_dtype` what runs."""

    quantization: Literal["int8", "none"]
    dtype: str
    effective_dtype: str
    device: str
    server: dict[str, Any]
    model: dict[str, Any]
    defaults: dict[str, Any]
    memory_management: dict[str, Any]


class InfoResponse(BaseModel):
    """The answer of GET /info."""

    api_name: str
    version: str
    api_version: str
    description: str
    status: str
    model: dict[str, Any]
    statistics: dict[str, Any]
    memory_info: MemoryInfo
    uptime: float


class Voice(BaseModel):
    """A voice that requests may name."""

    name: str
    source: str


class VoicesResponse(BaseModel):
    """The answer of GET /voices."""

    voices: list[Voice]
    count: int
    default_voice: str
