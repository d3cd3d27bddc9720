"""Many clients at once: order, limits, crashes, clients that leave, shutdown, fuzzed requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from serving import SPEECH, GatedEngine, client, events, run, samples, server, settings
from vramkit.serve.admission import Admission, BusyError
from vramkit.serve.chatterbox import create_app
from vramkit.serve.engines import FormantEngine


async def until(condition: Any) -> None:
    """Wait until something holds; the test's own time limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.002)


# --- the queue by itself ------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    async def work() -> None:
        queue = Admission(2, 10, 30.0)
        order: list[int] = []

        async def one(i: int) -> None:
            await queue.enter()
            order.append(i)
            await asyncio.sleep(0)
            queue.leave()

        await asyncio.gather(*(one(i) for i in range(12)))
        assert order == list(range(12))
        assert (queue.running, queue.waiting) == (0, 0)

    run(work())


def test_full_late_and_closed() -> None:
    async def work() -> None:
        queue = Admission(1, 1, 0.05)
        await queue.enter()
        late = asyncio.create_task(queue.enter())
        await until(lambda: queue.waiting == 1)
        with pytest.raises(BusyError, match="1 are running and 1 are waiting") as full:
            await queue.enter()
        assert (full.value.status, full.value.retry_after) == (429, 1)
        with pytest.raises(BusyError, match="no turn") as found:
            await late
        assert found.value.status == 503
        assert (queue.running, queue.waiting) == (1, 0)
        queue.timeout_seconds = 30.0
        waiting = asyncio.create_task(queue.enter())
        await until(lambda: queue.waiting == 1)
        queue.close()
        for task in (waiting, asyncio.create_task(queue.enter())):
            with pytest.raises(BusyError, match="shutting down"):
                await task
        queue.leave()
        assert (queue.running, queue.waiting) == (0, 0)

    run(work())


def test_who_gives_up_takes_no_place() -> None:
    async def work() -> None:
        queue = Admission(1, 5, 30.0)
        await queue.enter()
        tasks = [asyncio.create_task(queue.enter()) for _ in range(3)]
        await until(lambda: queue.waiting == 3)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        queue.leave()
        tasks[1].cancel()  # in the very moment when its turn has come
        await asyncio.wait(tasks[:2])
        await tasks[2]
        assert (queue.running, queue.waiting) == (1, 0)
        queue.leave()
        assert queue.running == 0

    run(work())


# --- the server in this process -----------------------------------------------------------------


def test_429_and_503_under_load() -> None:
    async def work() -> None:
        async with client(GatedEngine, max_queue_size=2, queue_timeout_seconds=0.3) as api:
            engine = api.app.state.service.engine
            admission = api.app.state.service.admission
            body = {"input": "hello"}
            first = asyncio.create_task(api.post(SPEECH, json=body))
            await until(lambda: admission.running == 1)
            waiting = [asyncio.create_task(api.post(SPEECH, json=body)) for _ in range(2)]
            await until(lambda: admission.waiting == 2)
            refused = await api.post(SPEECH, json=body)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
            health = await api.get("/health")  # answers meanwhile
            assert health.status_code == 200
            for answer in await asyncio.gather(*waiting):
                assert answer.status_code == 503
                assert answer.json()["error"]["type"] == "service_unavailable"
                assert int(answer.headers["retry-after"]) >= 1
            engine.gate.set()
            assert (await first).status_code == 200
            assert (await api.post(SPEECH, json=body)).status_code == 200
            text = (await api.get("/metrics")).text
            assert 'vramkit_rejected_total{reason="queue_full"} 1.0' in text
            assert 'vramkit_rejected_total{reason="no_turn"} 2.0' in text

    run(work())


def test_a_crash_is_an_answer_and_the_next_request_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        async with client(GatedEngine, max_chunk_length=20) as api:
            api.app.state.service.engine.gate.set()
            crashed = await api.post(SPEECH, json={"input": "crash"})
            assert crashed.status_code == 500
            error = crashed.json()["error"]
            assert error["type"] == "server_error"
            assert "RuntimeError" in error["message"]
            assert "secret" not in crashed.text
            body = {"input": "This one is well. Then comes a crash.", "stream_format": "sse"}
            streamed = await api.post(SPEECH, json=body)
            kinds = [e["type"] for e in events(streamed.text)]
            assert kinds == ["speech.audio.info", "speech.audio.delta", "error"]
            good = await api.post(SPEECH, json={"input": "hello"})
            assert good.status_code == 200
            samples(good.content)
            info = (await api.get("/info")).json()["statistics"]
            assert (info["completed_requests"], info["error_requests"]) == (1, 2)
            assert info["running_requests"] == 0
            assert "vramkit_synthesis_failures_total 2.0" in (await api.get("/metrics")).text

    run(work())
    assert "secret detail" in caplog.text  # the log has what the answer does not tell


def test_out_of_memory_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("vramkit.serve.service.clean_up", lambda: done.append("memory"))

    class Full(FormantEngine):
        def speak(self, text: str, options: Any) -> bytes:
            raise MemoryError

    async def work() -> None:
        async with client(Full) as api:
            answer = await api.post(SPEECH, json={"input": "hello"})
            assert answer.status_code == 500
            await until(lambda: done)

    run(work())


def test_a_client_that_leaves_frees_its_place() -> None:
    """Its text has a hundred pieces; all but the first few are never spoken."""
    asked = []

    class Slow(FormantEngine):
        def speak(self, text: str, options: Any) -> bytes:
            asked.append(text)
            time.sleep(0.01)
            return bytes(2)

    async def leave(app: Any, stream: str) -> None:
        body = json.dumps(
            {"input": "Twenty letters here. " * 100, "stream_format": stream}
        ).encode()
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            while len(asked) < 3:  # then it is gone
                await asyncio.sleep(0.002)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "path": SPEECH, "raw_path": SPEECH.encode(), "query_string": b"", "scheme": "http",
            "http_version": "1.1", "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)

    async def work() -> None:
        async with client(Slow, max_chunk_length=20) as api:
            for stream in ("audio", "sse"):
                asked.clear()
                await leave(api.app, stream)
                await asyncio.sleep(0.05)
                assert 3 <= len(asked) < 20, stream
                assert api.app.state.service.admission.running == 0
            found = (await api.get("/info")).json()["statistics"]
            assert (found["abandoned_requests"], found["completed_requests"]) == (2, 0)

    run(work())


def test_many_at_once_get_their_own_answers() -> None:
    texts = [f"Number {i}. " * (1 + i % 2) for i in range(8)]

    async def work() -> None:
        async with client(max_concurrent_requests=3, max_chunk_length=30) as api:

            async def ask(text: str) -> str:
                answer = await api.post(SPEECH, json={"input": text})
                assert answer.status_code == 200
                return hashlib.sha256(answer.content).hexdigest()

            alone = [await ask(text) for text in texts]
            assert len(set(alone)) == len(texts)
            order = [*range(8), *reversed(range(8))]
            found = await asyncio.gather(*(ask(texts[i]) for i in order))
            assert found == [alone[i] for i in order]

    run(work())


def test_stopping_lets_what_runs_end() -> None:
    async def work() -> None:
        chosen = settings(max_queue_size=5)
        engine = GatedEngine(chosen)
        app = create_app(chosen, engine)
        context = app.router.lifespan_context(app)
        await context.__aenter__()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as api:
            running = asyncio.create_task(api.post(SPEECH, json={"input": "hello"}))
            await until(lambda: app.state.service.admission.running == 1)
            waiting = asyncio.create_task(api.post(SPEECH, json={"input": "hello"}))
            await until(lambda: app.state.service.admission.waiting == 1)
            stop = asyncio.create_task(context.__aexit__(None, None, None))
            assert (await waiting).status_code == 503
            assert (await api.post(SPEECH, json={"input": "hello"})).status_code == 503
            assert not stop.done()
            engine.gate.set()
            assert (await running).status_code == 200
            await stop
            assert not hasattr(engine, "tts")  # its weights are free

    run(work())


# --- a server of its own ------------------------------------------------------------------------


def _accepted(metrics: str) -> float:
    """How many speech requests have been answered, are running or wait."""
    lines = (
        r"^vramkit_(?:running|waiting|"
        r'requests_total\{path="/v1/audio/speech",status="\d+"\}) (\S+)$'
    )
    return sum(map(float, re.findall(lines, metrics, re.MULTILINE)))


def test_a_signal_ends_it_gracefully(tmp_path: Path) -> None:
    """What was accepted is answered in full, then the process ends by itself with code 0."""
    text = "This is a sentence of some length, to be spoken while the signal comes. " * 5
    with (
        server(tmp_path, "vramkit.cli", "serve", "chatterbox") as (process, address),
        httpx.Client(base_url=address, timeout=60) as api,
        ThreadPoolExecutor(4) as threads,
    ):
        assert api.get("/health").json()["status"] == "healthy"
        started = threading.Barrier(4)

        def ask(_: int) -> httpx.Response:
            started.wait(10)
            return httpx.post(f"{address}{SPEECH}", json={"input": text}, timeout=60)

        asked = [threads.submit(ask, i) for i in range(4)]
        while (seen := _accepted(api.get("/metrics").text)) < 4:
            assert process.poll() is None, seen
        assert not all(a.done() for a in asked)
        process.send_signal(signal.SIGTERM)
        answers = [a.result() for a in asked]
        assert process.wait(60) == 0
    assert [a.status_code for a in answers] == [200] * 4
    assert len({hashlib.sha256(a.content).hexdigest() for a in answers}) == 1
    assert len(samples(answers[0].content)) > 24000 * 10


# --- fuzzed requests ----------------------------------------------------------------------------


def test_fuzzed_requests_are_never_errors_of_the_server() -> None:
    """Requests made from the OpenAPI document, right and wrong: documented answers, no 5xx."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    class Quick(FormantEngine):
        """Says a letter for each piece, so that the time goes into requests."""

        def speak(self, text: str, options: Any) -> bytes:
            return super().speak("a", options)

    chosen = settings()
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(chosen, Quick(chosen)))
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():

        @limits(max_examples=15, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=result.ok().as_strategy())
        def fuzz(case: Any) -> None:
            answer = case.call()
            seen.setdefault(case.path, set()).add(answer.status_code)
            case.validate_response(
                answer,
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        fuzz()
    assert set(seen) == set(schema.raw_schema["paths"])
    assert 200 in seen[SPEECH]
