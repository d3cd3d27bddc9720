"""Load on the Chatterbox server: many clients at once, every answer checked against its request.

A real server (formant engine) on the loopback. Each text is spoken once, alone; then clients ask
for texts of mixed lengths at random, as files and as events, and each answer's samples must be
those of its text. Some clients leave in the middle. A full queue (429) is no loss: the client
waits as it is told and asks again. The server's memory is read every second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

SPEECH = "/v1/audio/speech"
LONGEST = 600.0  # seconds of load at most
LENGTHS = (20, 60, 150, 400, 1200, 3000)  # characters
WEIGHTS = (10, 10, 8, 4, 1.5, 0.5)
TEXTS_OF_A_LENGTH = 3
LEAVING = 0.02  # share of the streams that are broken off
QUEUE = 40  # fewer than the clients, so that some are turned away

# What is promised.
GROWTH = 0.05  # of the server's memory, from the second fifth of the time to the last
WORDS = ("river", "train", "evening", "station", "water", "memory", "question", "window", "garden")


@dataclass
class Tally:
    """What came of the requests."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    audio_seconds: float = 0.0
    characters: int = 0
    rejected: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    mixed_up: int = 0
    memory_mb: list[float] = field(default_factory=list)


def _text(length: int, seed: int) -> str:
    chance = random.Random(f"{length} {seed}")
    words = [f"Text {seed} of {length}."]
    while sum(map(len, words)) + len(words) < length:
        words.append(chance.choice(WORDS) + ("." if chance.random() < 0.12 else ""))
    return " ".join(words)[:length]


class _Server:
    """A server process on a free port of the loopback."""

    def __enter__(self) -> _Server:
        self.folder = tempfile.TemporaryDirectory()
        log = Path(self.folder.name) / "log"
        command = [sys.executable, "-m", "vramkit.cli", "serve", "chatterbox"]
        more = {"MAX_CONCURRENT_REQUESTS": "2", "MAX_QUEUE_SIZE": str(QUEUE),
                "USE_INT8_QUANTIZATION": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0", "--engine", "formant"],
                cwd=self.folder.name,
                env={**os.environ, **more},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while (found := re.search(r"running on (http://\S+)", log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the server did not start: {log.read_text()}")
            time.sleep(0.1)
        self.address = found[1]
        return self

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def _digest(samples: bytes) -> str:
    return hashlib.sha256(samples).hexdigest()


async def _stream(api: httpx.AsyncClient, body: dict[str, Any], leave: bool) -> tuple[int, Any]:
    """(status, samples, seconds to the first of them); samples None where the client left."""
    begin = time.perf_counter()
    parts: list[bytes] = []
    first = 0.0
    async with api.stream("POST", SPEECH, json={**body, "stream_format": "sse"}) as answer:
        if answer.status_code != 200:
            return answer.status_code, (float(answer.headers.get("retry-after", 1)),)
        kind = None
        async for line in answer.aiter_lines():
            if not line:
                continue
            event = json.loads(line.removeprefix("data: "))
            kind = event["type"]
            if kind == "speech.audio.delta":
                parts.append(base64.b64decode(event["audio"]))
                first = first or time.perf_counter() - begin
                if leave:
                    return 200, (None, first)
        if kind != "speech.audio.done":
            raise RuntimeError(f"the stream ended with {kind}")
    return 200, (b"".join(parts), first)


async def _client(
    api: httpx.AsyncClient, number: int, end: float, texts: dict[str, str], tally: Tally
) -> None:
    chance = random.Random(number)
    by_length = {n: [t for t in texts if len(t) == n] for n in LENGTHS}
    while time.monotonic() < end:
        text = chance.choice(by_length[chance.choices(LENGTHS, WEIGHTS)[0]])
        stream = chance.random() < 0.4
        leave = stream and chance.random() < LEAVING
        begin = time.perf_counter()
        try:
            if stream:
                status, rest = await _stream(api, {"input": text}, leave)
            else:
                answer = await api.post(SPEECH, json={"input": text})
                status = answer.status_code
                wait = float(answer.headers.get("retry-after", 1))
                rest = (answer.content[44:], None) if status == 200 else (wait,)
        except (httpx.HTTPError, RuntimeError) as error:
            tally.lost.append(f"{type(error).__name__}: {error}")
            continue
        if status == 429:
            tally.rejected += 1
            await asyncio.sleep(min(rest[0], 2.0) * chance.random())
            continue
        if status != 200:
            tally.lost.append(f"status {status}")
            continue
        samples, first = rest
        if samples is None:
            tally.left += 1
            continue
        if _digest(samples) != texts[text]:
            tally.mixed_up += 1
        tally.seconds.append(time.perf_counter() - begin)
        if first is not None:
            tally.first_seconds.append(first)
        tally.audio_seconds += len(samples) / 2 / 24000
        tally.characters += len(text)


async def _load(address: str, clients: int, seconds: float) -> tuple[Tally, dict[str, Any]]:
    tally = Tally()
    limits = httpx.Limits(max_connections=clients + 2, max_keepalive_connections=clients + 2)
    async with httpx.AsyncClient(base_url=address, timeout=180, limits=limits) as api:
        texts = {}
        for length in LENGTHS:
            for seed in range(TEXTS_OF_A_LENGTH):
                text = _text(length, seed)
                texts[text] = _digest((await api.post(SPEECH, json={"input": text})).content[44:])
        if len(set(texts.values())) != len(LENGTHS) * TEXTS_OF_A_LENGTH:
            raise RuntimeError("two texts sound alike: mixed-up answers would not be seen")
        end = time.monotonic() + seconds

        async def watch() -> None:
            while time.monotonic() < end:
                found = (await api.get("/memory")).json()["memory_info"]
                tally.memory_mb.append(found["cpu_memory_mb"])
                await asyncio.sleep(min(1.0, seconds / 30))

        await asyncio.gather(watch(), *(_client(api, i, end, texts, tally) for i in range(clients)))
        info = (await api.get("/info")).json()
    return tally, info


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The load, and what was promised and missed."""
    seconds = min(options.seconds, LONGEST)
    with _Server() as server:
        tally, info = asyncio.run(_load(server.address, options.clients, seconds))
        code = server.stop()
    fifth = max(1, len(tally.memory_mb) // 5)
    before, after = median(tally.memory_mb[fifth : 2 * fifth]), median(tally.memory_mb[-fifth:])
    cuts = quantiles(tally.seconds, n=100) if len(tally.seconds) > 1 else [0.0] * 99
    result = {
        "clients": options.clients,
        "load_seconds": seconds,
        "answered": len(tally.seconds),
        "requests_per_second": len(tally.seconds) / seconds,
        "audio_seconds_per_second": tally.audio_seconds / seconds,
        "characters": tally.characters,
        "turned_away_429": tally.rejected,
        "left_by_clients": tally.left,
        "lost": len(tally.lost),
        "mixed_up": tally.mixed_up,
        "latency_seconds": {"median": cuts[49], "p95": cuts[94], "largest": max(tally.seconds)},
        "first_samples_seconds_median": median(tally.first_seconds or [0.0]),
        "memory_mb": {"early": before, "late": after, "largest": max(tally.memory_mb)},
        "server_statistics": info["statistics"],
        "exit_code": code,
    }
    for key, value in result.items():
        print(f"{key:32}{value}")
    for line in dict.fromkeys(tally.lost):
        print(f"lost: {line}")
    missed = []
    if tally.lost:
        missed.append(f"{len(tally.lost)} requests lost")
    if tally.mixed_up:
        missed.append(f"{tally.mixed_up} answers belong to other requests")
    if after > before * (1 + GROWTH):
        missed.append(f"memory grew from {before:.0f} to {after:.0f} MiB")
    if info["statistics"]["error_requests"]:
        missed.append(f"{info['statistics']['error_requests']} syntheses failed")
    if code != 0:
        missed.append(f"the server ended with {code}")
    return result, missed
