"""The state behind the endpoints: engine, queue, counters, cleaning up at intervals.

Everything here is used from one event loop, except that the engine speaks on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import VramkitError
from .admission import Admission
from .engines import Engine, RequestError, SpeechOptions, make_engine
from .memory import alerts, clean_up, clear_device_cache, memory_info
from .metrics import Metrics
from .settings import ChatterboxSettings
from .sound import BITS
from .text_chunks import split_text

logger = logging.getLogger("vramkit.serve")

# Whether the client has gone away.
Gone = Callable[[], Awaitable[bool]]


class SynthesisError(VramkitError, RuntimeError):
    """The engine failed at a text; the log has the cause. The next request is not affected."""


class ClientGoneError(VramkitError, ConnectionError):
    """The client went away before its speech was done."""


@dataclass
class Statistics:
    """Counts since the start."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    abandoned: int = 0
    seconds: float = 0.0
    characters: int = 0
    audio_seconds: float = 0.0

    def to_dict(self, *, running: int, waiting: int) -> dict[str, Any]:
        """The counts and what follows from them, by the documented names."""
        done = max(1, self.completed)
        return {
            "total_requests": self.total,
            "completed_requests": self.completed,
            "error_requests": self.failed,
            "abandoned_requests": self.abandoned,
            "success_rate": 100.0 * self.completed / self.total if self.total else 100.0,
            "average_duration_seconds": self.seconds / done,
            "average_text_length": self.characters / done,
            "audio_seconds": self.audio_seconds,
            "is_processing": running > 0,
            "running_requests": running,
            "waiting_requests": waiting,
        }


class SpeechService:
    """One engine and those who want it to speak."""

    def __init__(self, settings: ChatterboxSettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self._engine = engine
        self.metrics = Metrics()
        self.statistics = Statistics()
        self.request_counter = 0
        self.started = time.monotonic()
        self._tidying: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the engine. Raises what loading raises."""
        if self._engine is None:
            self._engine = await asyncio.to_thread(make_engine, self.settings)
        engine, settings = self._engine, self.settings
        logger.warning("speech engine: %s. %s", engine.name, engine.description)
        at_once = settings.max_concurrent_requests if engine.parallel else 1
        if at_once < settings.max_concurrent_requests:
            logger.warning("%s runs one request at a time; the others wait", engine.name)
        self.admission = Admission(at_once, settings.max_queue_size, settings.queue_timeout_seconds)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="speech")
        self.metrics.weights.set(engine.report.bytes)
        self.metrics.running.set_function(lambda: self.admission.running)
        self.metrics.waiting.set_function(lambda: self.admission.waiting)

    async def stop(self) -> None:
        """Turn away who waits, let what runs end, and give the model's memory back."""
        self.admission.close()
        await asyncio.to_thread(self._threads.shutdown, True, cancel_futures=True)
        if self._tidying:
            await asyncio.wait(self._tidying)
        self.engine.close()
        await asyncio.to_thread(self.tidy, clear_cache=True)

    @property
    def engine(self) -> Engine:
        """The loaded engine."""
        if self._engine is None:
            raise RuntimeError("the service has not been started")
        return self._engine

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def memory(self) -> tuple[dict[str, float], list[str]]:
        """What the process holds, and alerts if they are wanted."""
        info = memory_info()
        for kind in ("cpu_memory", "gpu_memory_allocated", "gpu_memory_reserved"):
            label = kind.replace("_memory", "")
            self.metrics.memory.labels(label).set(info[f"{kind}_mb"] * (1 << 20))
        if not self.settings.enable_memory_monitoring:
            return info, []
        return info, alerts(info, self.settings.memory_alert_percent)

    def check(self, text: str, options: SpeechOptions) -> None:
        """Raises RequestError or TextError for a request that cannot be fulfilled."""
        most = self.settings.max_total_length
        if len(text) > most:
            raise RequestError(f"the text has {len(text)} characters, more than the {most} allowed")
        self.engine.check(text, options)

    async def speak(self, text: str, options: SpeechOptions, gone: Gone) -> AsyncIterator[bytes]:
        """Samples, piece by piece. The caller has passed `admission.enter` and leaves afterwards.

        Raises SynthesisError, and ClientGoneError between two pieces once nobody listens.
        """
        loop = asyncio.get_running_loop()
        begin = time.monotonic()
        made = 0
        self.statistics.total += 1
        outcome = "abandoned"
        try:
            for piece in split_text(text, self.settings.max_chunk_length):
                if await gone():
                    raise ClientGoneError("the client went away")
                try:
                    data = await loop.run_in_executor(
                        self._threads, self.engine.speak, piece, options
                    )
                except Exception as error:
                    outcome = "failed"
                    self._failed(error)
                    raise SynthesisError(
                        f"the speech engine failed ({type(error).__name__}); the server's log says "
                        "more, and other requests are not affected"
                    ) from error
                made += len(data)
                yield data
            outcome = "completed"
        finally:
            self._done(outcome, len(text), made, time.monotonic() - begin)

    def _failed(self, error: Exception) -> None:
        logger.error("synthesis failed", exc_info=error)
        self.metrics.failures.inc()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self._tidy_soon(clear_cache=True)

    def _done(self, outcome: str, characters: int, made: int, seconds: float) -> None:
        found = self.statistics
        setattr(found, outcome, getattr(found, outcome) + 1)
        if outcome == "completed":
            spoken = made / (BITS // 8) / self.engine.sample_rate
            found.seconds += seconds
            found.characters += characters
            found.audio_seconds += spoken
            self.metrics.seconds.observe(seconds)
            self.metrics.audio_seconds.inc(spoken)
            self.metrics.characters.inc(characters)
        self.request_counter += 1
        memory = self.request_counter % self.settings.memory_cleanup_interval == 0
        cache = self.request_counter % self.settings.cuda_cache_clear_interval == 0
        if (memory or cache) and not self.admission.closed:
            self._tidy_soon(memory=memory, clear_cache=cache)

    def tidy(self, *, memory: bool = True, clear_cache: bool = False) -> bool:
        """Collect garbage, empty the device's cache; whether there was a cache to empty."""
        if memory:
            clean_up()
            self.metrics.cleanups.labels("memory").inc()
        cleared = clear_cache and clear_device_cache()
        if cleared:
            self.metrics.cleanups.labels("device_cache").inc()
        return cleared

    def _tidy_soon(self, *, memory: bool = True, clear_cache: bool = False) -> None:
        """On a thread, so that no answer waits for it."""

        async def work() -> None:
            with contextlib.suppress(RuntimeError):  # the interpreter is going down
                await asyncio.to_thread(self.tidy, memory=memory, clear_cache=clear_cache)

        task = asyncio.create_task(work())
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)
