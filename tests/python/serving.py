"""Helpers of the server's tests: an app in this process, a server in its own, WAV files read."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from vramkit.serve.chatterbox import create_app
from vramkit.serve.engines import FormantEngine
from vramkit.serve.settings import ChatterboxSettings

SPEECH = "/v1/audio/speech"


def settings(**values: Any) -> ChatterboxSettings:
    """Settings that no .env file of this machine reaches."""
    return ChatterboxSettings(_env_file=None, engine="formant", **values)


class GatedEngine(FormantEngine):
    """Speaks once its gate is open; text that holds "crash" raises."""

    parallel = True

    def __init__(self, chosen: ChatterboxSettings) -> None:
        super().__init__(chosen)
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def speak(self, text: str, options: Any) -> bytes:
        self.entered.release()
        assert self.gate.wait(30)
        if "crash" in text:
            raise RuntimeError("secret detail")
        return super().speak(text, options)


@asynccontextmanager
async def client(engine: Any = None, **values: Any) -> Any:
    """An httpx client of an app in this process, started and stopped."""
    chosen = settings(**values)
    app = create_app(chosen, engine(chosen) if isinstance(engine, type) else engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://test",
            timeout=60,
        ) as made,
    ):
        made.app = app
        yield made


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a test's coroutine."""
    return asyncio.run(asyncio.wait_for(work, 60))


def samples(data: bytes) -> np.ndarray:
    """Samples of a WAV file, which must be mono, 16 bit and 24 kHz, with a true header."""
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        frames = file.readframes(file.getnframes())
    assert len(data) == 44 + len(frames)
    return np.frombuffer(frames, "<i2")


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; every line is one."""
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]


def event_samples(found: list[dict[str, Any]]) -> np.ndarray:
    deltas = [e["audio"] for e in found if e["type"] == "speech.audio.delta"]
    return np.frombuffer(b"".join(map(base64.b64decode, deltas)), "<i2")


@contextmanager
def server(folder: Path, *command: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """(process, address) of `python -m command`, once it listens on a free port of the loopback."""
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", "0"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ENGINE": "formant", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r"running on (http://\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
