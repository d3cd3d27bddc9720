"""Every endpoint of the Chatterbox server: the documented shapes, errors, streaming, intervals."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import vramkit
from serving import SPEECH, GatedEngine, client, event_samples, events, run, samples, settings
from vramkit.serve import memory
from vramkit.serve.chatterbox import create_app
from vramkit.serve.engines import ChatterboxEngine, FormantEngine, RequestError, SpeechOptions

MEMORY = {
    "cpu_memory_mb", "cpu_memory_percent", "gpu_memory_allocated_mb", "gpu_memory_reserved_mb",
    "gpu_memory_max_allocated_mb",
}  # fmt: skip


def error_of(answer: httpx.Response) -> dict[str, str]:
    """The error, which must have the documented shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type"}
    return body["error"]


def test_speech_and_its_aliases() -> None:
    async def work() -> None:
        async with client() as api:
            first = None
            for path in (SPEECH, "/audio/speech", "/tts"):
                answer = await api.post(path, json={"input": "Test speech quality"})
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "audio/wav"
                assert answer.headers["x-engine"] == "formant"
                sound = samples(answer.content)
                assert 0.5 < len(sound) / 24000 < 5
                assert np.abs(sound).max() > 1000
                first = answer.content if first is None else first
                assert answer.content == first
            body = {"input": "Test speech quality", "voice": "nova", "exaggeration": 2.0,
                    "cfg_weight": 0.0, "temperature": 0.05, "speed": 1.5, "model": "tts-1",
                    "response_format": "wav", "stream_format": "audio"}  # fmt: skip
            other = await api.post(SPEECH, json=body)
            assert other.status_code == 200
            assert other.content != first

    run(work())


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 422, "input"),
    ({"input": ""}, 422, "at least 1 character"),
    ({"input": " \n"}, 422, "empty"),
    ({"input": 5}, 422, "string"),
    ({"input": "a" * 3001}, 400, "3001 characters, more than the 3000"),
    ({"input": "\u4f60\u597d"}, 400, "English only"),
    ({"input": "a", "voice": "nobody"}, 404, "alloy, echo"),
    ({"input": "a", "exaggeration": 0.2}, 422, "exaggeration"),
    ({"input": "a", "cfg_weight": 1.01}, 422, "cfg_weight"),
    ({"input": "a", "temperature": 5.1}, 422, "temperature"),
    ({"input": "a", "speed": 9}, 422, "speed"),
    ({"input": "a", "response_format": "mp3"}, 422, "wav"),
    ({"input": "a", "stream_format": "raw"}, 422, "sse"),
]
NO_REQUESTS = [
    (b"{", 422), (b"\xff", 400), (b'{"input": "\\ud800"}', 422), (b'{"input": NaN}', 422),
    (b'{"input": "a", "speed": NaN}', 422), (b"[" * 50_000, 400), (b"null", 422),
]  # fmt: skip


def test_requests_that_are_refused() -> None:
    async def work() -> None:
        async with client() as api:
            for body, status, text in REFUSED:
                answer = await api.post(SPEECH, json=body)
                assert answer.status_code == status, body
                assert text in error_of(answer)["message"]
            for content, status in NO_REQUESTS:
                kind = {"content-type": "application/json"}
                answer = await api.post(SPEECH, content=content, headers=kind)
                assert answer.status_code == status, content[:40]
                error_of(answer)
            assert (await api.get("/info")).json()["statistics"]["total_requests"] == 0

    run(work())


def test_other_paths_and_methods() -> None:
    async def work() -> None:
        async with client() as api:
            assert error_of(await api.get("/nothing"))["type"] == "not_found_error"
            answer = await api.get(SPEECH)
            assert answer.status_code == 405
            error_of(answer)
            error_of(await api.get("/memory", params={"cleanup": "perhaps"}))

    run(work())


def test_bodies_that_are_too_large() -> None:
    async def work() -> None:
        async with client(max_request_bytes=2000) as api:
            body = json.dumps({"input": "hello"}).encode()
            assert (await api.post(SPEECH, content=body, headers=kind)).status_code == 200
            declared = await api.post(SPEECH, content=body + b" " * 2000, headers=kind)

            async def parts() -> Any:
                for _ in range(50):
                    yield b" " * 100

            chunked = await api.post(SPEECH, content=parts(), headers=kind)
            for answer in (declared, chunked):
                assert answer.status_code == 413
                assert "2000 bytes" in error_of(answer)["message"]
            assert 'rejected_total{reason="too_large"} 2.0' in (await api.get("/metrics")).text

    kind = {"content-type": "application/json"}
    run(work())


def test_events_hold_what_the_file_holds() -> None:
    text = "One sentence stands here. A second one follows it, and is longer. Three! " * 3

    async def work() -> None:
        async with client(max_chunk_length=60) as api:
            whole = await api.post(SPEECH, json={"input": text})
            answer = await api.post(SPEECH, json={"input": text, "stream_format": "sse"})
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            found = events(answer.text)
            kinds = [e["type"] for e in found]
            assert kinds[0] == "speech.audio.info"
            assert kinds[-1] == "speech.audio.done"
            assert set(kinds[1:-1]) == {"speech.audio.delta"}
            assert len(kinds) > 6
            assert found[0] == {"type": "speech.audio.info", "sample_rate": 24000, "channels": 1,
                                "bits_per_sample": 16, "engine": "formant"}  # fmt: skip
            made = event_samples(found)
            assert np.array_equal(made, samples(whole.content))
            usage = found[-1]["usage"]
            assert usage["input_tokens"] == len(text.strip())
            assert usage["output_tokens"] == -(-len(made) * 25 // 24000)
            assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    run(work())


def test_long_text_is_spoken_in_pieces() -> None:
    asked = []

    class Watched(FormantEngine):
        def speak(self, text: str, options: SpeechOptions) -> bytes:
            asked.append(text)
            return super().speak(text, options)

    async def work() -> None:
        async with client(Watched, max_chunk_length=50) as api:
            text = "A sentence of this length fits into one. ... " + "And another one. " * 6
            assert (await api.post(SPEECH, json={"input": text})).status_code == 200
            assert all(len(piece) <= 50 for piece in asked)
            assert "".join(asked).replace(" ", "") == text.replace(" ", "")

    run(work())


def test_config_memory_health_info_voices() -> None:
    async def work() -> None:
        async with client(model_dtype="auto", use_int8_quantization=True, port=4321) as api:
            config = (await api.get("/config")).json()
            assert config["quantization"] == "int8"
            assert config["dtype"] == "auto"
            assert config["effective_dtype"] == "float32"
            assert config["device"] == config["model"]["device"]
            assert config["server"]["port"] == 4321
            assert config["defaults"]["exaggeration"] == 0.5
            assert config["memory_management"]["memory_cleanup_interval"] == 5
            assert config["memory_management"]["cuda_cache_clear_interval"] == 3
            assert config["model"]["components"]["t3"]["format"] == "int8_dynamic"

            found = (await api.get("/memory")).json()
            assert set(found) == {"memory_info", "request_counter", "cleanup_performed",
                                  "cuda_cache_cleared", "alerts"}  # fmt: skip
            assert set(found["memory_info"]) == MEMORY
            assert found["memory_info"]["cpu_memory_mb"] > 50
            assert 0 < found["memory_info"]["cpu_memory_percent"] <= 100
            assert (found["cleanup_performed"], found["request_counter"]) == (False, 0)

            health = (await api.get("/health")).json()
            assert health["status"] == "healthy"
            assert health["model_loaded"] is True

            await api.post(SPEECH, json={"input": "hello"})
            info = (await api.get("/info")).json()
            assert set(info) == {"api_name", "version", "api_version", "description", "status",
                                 "model", "statistics", "memory_info", "uptime"}  # fmt: skip
            assert info["version"] == vramkit.__version__
            assert info["model"]["engine"] == "formant"
            assert "not a neural voice" in info["model"]["description"]
            assert {"quantization", "dtype", "device"} <= set(info["model"])
            assert info["statistics"]["total_requests"] == 1
            assert info["statistics"]["success_rate"] == 100.0
            assert set(info["memory_info"]) == MEMORY
            assert info["uptime"] > 0

            voices = (await api.get("/voices")).json()
            assert voices["count"] == len(voices["voices"]) == 6
            assert voices["default_voice"] in {v["name"] for v in voices["voices"]}

    run(work())


def test_quantization_reaches_the_sound() -> None:
    async def work() -> None:
        made = {}
        for int8 in (False, True):
            async with client(use_int8_quantization=int8) as api:
                config = (await api.get("/config")).json()
                assert config["quantization"] == ("int8" if int8 else "none")
                answer = await api.post(SPEECH, json={"input": "Test speech quality"})
                made[int8] = samples(answer.content).astype(float)
        assert not np.array_equal(made[True], made[False])
        assert abs(len(made[True]) - len(made[False])) < 0.02 * len(made[False])

    run(work())


def test_metrics() -> None:
    async def work() -> None:
        async with client() as api:
            await api.post(SPEECH, json={"input": "hello"})
            await api.post(SPEECH, json={})
            await api.get("/no/such/path")
            answer = await api.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            lines = answer.text.splitlines()
            assert f'vramkit_requests_total{{path="{SPEECH}",status="200"}} 1.0' in lines
            assert f'vramkit_requests_total{{path="{SPEECH}",status="422"}} 1.0' in lines
            assert 'vramkit_requests_total{path="other",status="404"} 1.0' in lines
            assert "vramkit_characters_total 5.0" in lines
            assert "vramkit_synthesis_seconds_count 1.0" in lines
            assert "vramkit_running 0.0" in lines
            value = next(float(x.split()[1]) for x in lines if 'bytes{kind="cpu"}' in x)
            assert value > 50e6

    run(work())


def test_memory_is_given_back_at_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr("vramkit.serve.service.clean_up", lambda: done.append("memory"))
    monkeypatch.setattr(
        "vramkit.serve.service.clear_device_cache", lambda: done.append("cache") or True
    )

    async def work() -> None:
        async with client(memory_cleanup_interval=3, cuda_cache_clear_interval=2) as api:
            seen = []
            for _ in range(6):
                await api.post(SPEECH, json={"input": "a"})
                while api.app.state.service._tidying:
                    await asyncio.sleep(0.005)
                seen.append(sorted(done))
                done.clear()
            assert seen == [[], ["cache"], ["memory"], ["cache"], [], ["cache", "memory"]]
            assert (await api.get("/memory")).json()["request_counter"] == 6
            assert not done
            found = (await api.get("/memory", params={"cleanup": True})).json()
            assert found["cleanup_performed"] is True
            assert found["cuda_cache_cleared"] is True
            assert sorted(done) == ["cache", "memory"]
            done.clear()
            found = (await api.get("/memory?force_cuda_clear=true")).json()
            assert (found["cleanup_performed"], found["cuda_cache_cleared"]) == (False, True)
            assert done == ["cache"]
            text = (await api.get("/metrics")).text
            assert 'vramkit_cleanups_total{kind="memory"} 3.0' in text

    run(work())


def test_alerts() -> None:
    full = {"cpu_memory_percent": 91.0, "gpu_memory_reserved_mb": 0.0}
    assert "91 %" in memory.alerts(full, 90.0)[0]
    assert memory.alerts(full, 92.0) == []

    async def work(monitoring: bool) -> Any:
        async with client(memory_alert_percent=1e-6, enable_memory_monitoring=monitoring) as api:
            return (await api.get("/memory")).json()["alerts"]

    assert len(run(work(True))) == 1
    assert run(work(False)) == []


def test_the_browsers_other_pages_may_call() -> None:
    async def work(origins: str) -> Any:
        async with client(cors_origins=origins) as api:
            asked = {"origin": "http://a.test", "access-control-request-method": "POST"}
            answer = await api.options(SPEECH, headers=asked)
            return answer.headers.get("access-control-allow-origin")

    assert run(work("*")) == "*"
    assert run(work("http://a.test, http://b.test")) == "http://a.test"
    assert run(work("http://b.test")) is None


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def work() -> None:
        async with client() as api:
            answer = await api.get("/")
            assert answer.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            for outside in ("http://", "https://", "src=", "@import", "url("):
                assert outside not in answer.text

    run(work())


# --- Chatterbox's own engine, on an object of its shape -----------------------------------------


class Imitation:
    """Acts as upstream does: a voice stays until another one is prepared; calls must not mix."""

    sr = 24000

    def __init__(self) -> None:
        self.t3, self.s3gen, self.ve = (torch.nn.Linear(8, 8) for _ in range(3))
        self.device = "cpu"
        self.conds: Any = torch.tensor([1.0])
        self.prepared: list[str] = []
        self.busy = threading.Lock()

    def prepare_conditionals(self, path: str, exaggeration: float) -> None:
        self.prepared.append(path)
        self.conds = torch.tensor([2.0])

    def generate(
        self, text: str, exaggeration: float, cfg_weight: float, temperature: float
    ) -> Any:
        assert self.busy.acquire(blocking=False), "two calls at once"
        try:
            return torch.full((1, 100 * len(text)), float(self.conds) / 4)
        finally:
            self.busy.release()


def test_chatterbox_keeps_its_voices_apart(tmp_path: Any) -> None:
    (tmp_path / "mine.wav").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    chosen = settings(voice_library_dir=tmp_path, use_int8_quantization=True)
    tts = Imitation()
    engine = ChatterboxEngine(chosen, tts)

    async def work() -> None:
        async with client(engine, max_concurrent_requests=4) as api:

            async def ask(voice: str) -> int:
                answer = await api.post(SPEECH, json={"input": "hello", "voice": voice})
                assert answer.status_code == 200, answer.text
                made = samples(answer.content)
                assert len(made) == 500
                return round(made.mean() / 32767 * 4)

            names = ["alloy", "mine", "nova", "mine", "mine", "alloy"] * 2
            found = await asyncio.gather(*map(ask, names))
            assert found == [2 if name == "mine" else 1 for name in names]
            assert tts.prepared == [str(tmp_path / "mine.wav")]
            listed = (await api.get("/voices")).json()["voices"]
            assert {"name": "mine", "source": "mine.wav"} in listed
            assert {"name": "alloy", "source": "built-in"} in listed
            assert len(listed) == 7
            config = (await api.get("/config")).json()
            assert config["server"]["max_concurrent_requests"] == 1
            assert config["model"]["engine"] == "chatterbox"
            fast = await api.post(SPEECH, json={"input": "hello", "speed": 1.5})
            assert fast.status_code == 400
            assert "speed" in error_of(fast)["message"]

    run(work())


def test_chatterbox_without_a_built_in_voice() -> None:
    tts = Imitation()
    tts.conds = None
    engine = ChatterboxEngine(settings(), tts)
    with pytest.raises(RequestError, match="VOICE_LIBRARY_DIR"):
        engine.check("hello", SpeechOptions())


def test_openapi_names_every_answer() -> None:
    document = create_app(settings()).openapi()
    assert set(document["paths"]) == {
        SPEECH, "/health", "/memory", "/config", "/info", "/voices"
    }  # fmt: skip
    assert set(document["paths"][SPEECH]["post"]["responses"]) == {
        "200", "400", "404", "413", "422", "429", "500", "503"
    }  # fmt: skip


def test_gated_engine_is_one(tmp_path: Any) -> None:
    """The helper of the load tests speaks as the real one does."""
    engine = GatedEngine(settings())
    engine.gate.set()
    options = SpeechOptions()
    assert engine.speak("hello", options) == FormantEngine(settings()).speak("hello", options)
