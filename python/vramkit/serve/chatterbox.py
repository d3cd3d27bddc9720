"""The Chatterbox TTS server: `vramkit serve chatterbox`, `uvicorn vramkit.serve.chatterbox:app`.

Endpoints and shapes are those of the documented API (docs/serve.md). `app` is made when it is
first asked for, from the environment and .env; `create_app` makes one from given settings.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from .. import __version__
from .admission import BusyError
from .engines import DEFAULT_VOICE, Engine, RequestError, SpeechOptions, UnknownVoiceError
from .formant_tts import TextError
from .limits import BodyLimit, CountAnswers, error_body
from .schemas import (
    ConfigResponse,
    ErrorResponse,
    HealthResponse,
    InfoResponse,
    MemoryResponse,
    SpeechRequest,
    VoicesResponse,
)
from .service import ClientGoneError, SpeechService, SynthesisError
from .settings import ChatterboxSettings, read_settings
from .sound import BITS, wav

logger = logging.getLogger("vramkit.serve")

API_NAME = "Chatterbox TTS API"
API_VERSION = "v1"
DESCRIPTION = "Text to speech with Chatterbox's documented interface, served by vramkit"
TOKENS_PER_SECOND = 25  # of Chatterbox's speech tokens

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in (
        (400, "The text is too long, or cannot be spoken"),
        (404, "No such voice"),
        (413, "The body is too large"),
        (422, "A field is missing or out of its range"),
        (429, "The queue is full"),
        (500, "The speech engine failed"),
        (503, "No turn came in time, or the server is shutting down"),
    )
}
_SPEECH: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A WAV file (mono, 16 bit), or events that hold its samples",
        "content": {
            "audio/wav": {"schema": {"type": "string", "format": "binary"}},
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "data": {"type": "string", "contentMediaType": "application/json"}
                    },
                    "required": ["data"],
                }
            },
        },
    },
    **_ERRORS,
}
_FIELDS: dict[int | str, dict[str, Any]] = {422: _ERRORS[422]}

# The page loads nothing from anywhere but this server.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; img-src data:"
}

router = APIRouter()


def _service(request: Request) -> SpeechService:
    service: SpeechService = request.app.state.service
    return service


class _Stream(StreamingResponse):
    """Calls `leave` when it is over, however it ends, and even if it never began."""

    def __init__(self, content: AsyncIterator[bytes], leave: Callable[[], None], **kwargs: Any):
        super().__init__(content, **kwargs)
        self._content = content
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._content):  # type: ignore[type-var]
                await super().__call__(scope, receive, send)
        finally:
            self._leave()


@router.post("/v1/audio/speech", response_class=Response, responses=_SPEECH)
@router.post("/audio/speech", response_class=Response, responses=_SPEECH, include_in_schema=False)
@router.post("/tts", response_class=Response, responses=_SPEECH, include_in_schema=False)
async def speech(body: SpeechRequest, request: Request) -> Response:
    """Speak a text: a WAV file, or with `stream_format` "sse" events as pieces are ready."""
    service = _service(request)
    settings = service.settings
    text = body.input.strip()
    options = SpeechOptions(
        body.voice,
        settings.exaggeration if body.exaggeration is None else body.exaggeration,
        settings.cfg_weight if body.cfg_weight is None else body.cfg_weight,
        settings.temperature if body.temperature is None else body.temperature,
        body.speed,
    )
    service.check(text, options)
    headers = {"x-engine": service.engine.name}
    await service.admission.enter()
    pieces = service.speak(text, options, request.is_disconnected)
    if body.stream_format == "sse":
        events = _events(service, pieces, len(text))
        return _Stream(
            events,
            service.admission.leave,
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache"},
        )
    try:
        async with aclosing(pieces):  # type: ignore[type-var]
            data = b"".join([piece async for piece in pieces])
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it
    finally:
        service.admission.leave()
    return Response(wav(data, service.engine.sample_rate), media_type="audio/wav", headers=headers)


def _event(kind: str, **fields: Any) -> bytes:
    return f"data: {json.dumps({'type': kind, **fields})}\n\n".encode()


async def _events(
    service: SpeechService, pieces: AsyncIterator[bytes], characters: int
) -> AsyncIterator[bytes]:
    """OpenAI's events: samples in base64, then what was used; an error ends the stream."""
    rate = service.engine.sample_rate
    yield _event(
        "speech.audio.info",
        sample_rate=rate,
        channels=1,
        bits_per_sample=BITS,
        engine=service.engine.name,
    )
    made = 0
    try:
        async with aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                made += len(piece)
                yield _event("speech.audio.delta", audio=base64.b64encode(piece).decode("ascii"))
    except ClientGoneError:
        return
    except SynthesisError as error:
        # The status has gone out as 200: the stream itself says what happened.
        yield _event("error", **error_body(str(error), "server_error"))
        return
    tokens = math.ceil(made / (BITS // 8) / rate * TOKENS_PER_SECOND)
    usage = {"input_tokens": characters, "output_tokens": tokens}
    yield _event("speech.audio.done", usage={**usage, "total_tokens": characters + tokens})


def _model(service: SpeechService) -> dict[str, Any]:
    engine, report = service.engine, service.engine.report
    return {
        "name": "chatterbox" if engine.name == "chatterbox" else "vramkit formant synthesizer",
        "engine": engine.name,
        "description": engine.description,
        "sample_rate": engine.sample_rate,
        **report.to_dict(),
    }


@router.get("/health", response_model=HealthResponse)
async def health(request: Request) -> dict[str, Any]:
    """Whether the model is loaded; it answers while others speak."""
    service = _service(request)
    settings = service.settings
    return {
        "status": "shutting_down" if service.admission.closed else "healthy",
        "model_loaded": True,
        "engine": service.engine.name,
        "device": service.engine.report.device,
        "config": {
            "max_chunk_length": settings.max_chunk_length,
            "max_total_length": settings.max_total_length,
            "default_exaggeration": settings.exaggeration,
            "default_cfg_weight": settings.cfg_weight,
            "default_temperature": settings.temperature,
        },
        "memory_info": service.memory()[0],
    }


@router.get("/memory", response_model=MemoryResponse, responses=_FIELDS)
async def memory(
    request: Request, cleanup: bool = False, force_cuda_clear: bool = False
) -> dict[str, Any]:
    """What the process holds; with `cleanup`, after giving back what it does not need."""
    service = _service(request)
    cleared = False
    if cleanup or force_cuda_clear:
        cleared = await asyncio.to_thread(
            service.tidy, memory=cleanup, clear_cache=cleanup or force_cuda_clear
        )
    info, found = service.memory()
    return {
        "memory_info": info,
        "request_counter": service.request_counter,
        "cleanup_performed": cleanup,
        "cuda_cache_cleared": cleared,
        "alerts": found,
    }


@router.get("/config", response_model=ConfigResponse)
async def config(request: Request) -> dict[str, Any]:
    """The settings, and what they led to."""
    service = _service(request)
    settings, report = service.settings, service.engine.report
    return {
        "quantization": report.quantization,
        "dtype": report.dtype,
        "effective_dtype": report.effective_dtype,
        "device": report.device,
        "server": {
            "host": settings.host,
            "port": settings.port,
            "cors_origins": settings.origins,
            "max_concurrent_requests": service.admission.limit,
            "max_queue_size": settings.max_queue_size,
            "queue_timeout_seconds": settings.queue_timeout_seconds,
            "max_request_bytes": settings.max_request_bytes,
        },
        "model": _model(service),
        "defaults": {
            "voice": DEFAULT_VOICE,
            "exaggeration": settings.exaggeration,
            "cfg_weight": settings.cfg_weight,
            "temperature": settings.temperature,
            "max_chunk_length": settings.max_chunk_length,
            "max_total_length": settings.max_total_length,
        },
        "memory_management": {
            "memory_cleanup_interval": settings.memory_cleanup_interval,
            "cuda_cache_clear_interval": settings.cuda_cache_clear_interval,
            "enable_memory_monitoring": settings.enable_memory_monitoring,
            "memory_alert_percent": settings.memory_alert_percent,
        },
    }


@router.get("/info", response_model=InfoResponse)
async def info(request: Request) -> dict[str, Any]:
    """Everything about the server in one answer."""
    service = _service(request)
    busy = service.admission
    return {
        "api_name": API_NAME,
        "version": __version__,
        "api_version": API_VERSION,
        "description": DESCRIPTION,
        "status": "shutting_down" if busy.closed else "healthy",
        "model": _model(service),
        "statistics": service.statistics.to_dict(running=busy.running, waiting=busy.waiting),
        "memory_info": service.memory()[0],
        "uptime": service.uptime,
    }


@router.get("/voices", response_model=VoicesResponse)
async def voices(request: Request) -> dict[str, Any]:
    """The voices that requests may name."""
    found = [voice._asdict() for voice in _service(request).engine.voices()]
    return {"voices": found, "count": len(found), "default_voice": DEFAULT_VOICE}


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Counters and gauges for Prometheus."""
    service = _service(request)
    service.memory()
    # As bytes with the type in a header: a charset must not be put behind it a second time.
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """A page to type a text, hear it, and see the memory."""
    text = (files(__package__) / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers=_PAGE_HEADERS)


def _error(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(message, kind), status, headers)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Every error in the documented shape, with the status that belongs to it."""
    if isinstance(error, BusyError):
        reason = "queue_full" if error.status == 429 else "no_turn"
        _service(request).metrics.rejected.labels(reason).inc()
        kind = "rate_limit_error" if error.status == 429 else "service_unavailable"
        return _error(error.status, str(error), kind, {"retry-after": str(error.retry_after)})
    if isinstance(error, UnknownVoiceError):
        return _error(404, str(error), "not_found_error")
    if isinstance(error, (RequestError, TextError)):
        return _error(400, str(error), "invalid_request_error")
    if isinstance(error, RequestValidationError):
        parts = [
            f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()
        ]
        return _error(422, "; ".join(parts), "invalid_request_error")
    if isinstance(error, StarletteHTTPException):
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind, dict(error.headers or {}))
    if isinstance(error, SynthesisError):
        return _error(500, str(error), "server_error")
    return _error(500, f"internal error ({type(error).__name__})", "server_error")


def create_app(settings: ChatterboxSettings | None = None, engine: Engine | None = None) -> FastAPI:
    """The server. Settings default to those of the environment; the engine is loaded at start-up.

    Raises SettingsError for settings out of their range.
    """
    chosen = settings if settings is not None else read_settings()
    service = SpeechService(chosen, engine)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    made = FastAPI(title=API_NAME, version=__version__, description=DESCRIPTION, lifespan=lifespan)
    made.state.service = service
    made.include_router(router)
    for kind in (
        BusyError, RequestError, TextError, SynthesisError, RequestValidationError,
        StarletteHTTPException, HTTPException, Exception,
    ):  # fmt: skip
        made.add_exception_handler(kind, _answer_error)
    made.add_middleware(BodyLimit, limit=chosen.max_request_bytes, metrics=service.metrics)
    made.add_middleware(CountAnswers, metrics=service.metrics)
    made.add_middleware(CORSMiddleware, allow_origins=chosen.origins, allow_methods=["*"],
                        allow_headers=["*"])  # fmt: skip
    return made


if TYPE_CHECKING:
    app: FastAPI


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()["app"] = create_app()
    return made
