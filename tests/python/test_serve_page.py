"""The document's own commands against a real server, and its page in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from serving import server

# The guide's commands as they stand there; only the port differs (docs/migration/chatterbox.md).
MONITORING = """
# Check model information (includes quantization status)
curl http://localhost:4123/config

# Monitor memory usage
curl http://localhost:4123/memory

# Get detailed model info
curl http://localhost:4123/info
"""
SPEAKING = """
curl -X POST http://localhost:4123/v1/audio/speech \\
  -H "Content-Type: application/json" \\
  -d '{"input": "Test speech quality"}' \\
  --output test_int8.wav
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as the guide starts it: a line in .env, then uvicorn."""
    folder = tmp_path_factory.mktemp("server")
    (folder / ".env").write_text("USE_INT8_QUANTIZATION=true\n")
    with server(folder, "uvicorn", "vramkit.serve.chatterbox:app") as (_, found):
        yield found


def curl(command: str, address: str, folder: Path) -> httpx.Response:
    """Does what a curl command of the guide does."""
    words = iter(shlex.split(command.replace("\\\n", " "))[1:])
    asked: dict[str, Any] = {"method": "GET", "headers": {}}
    output = None
    for word in words:
        if word == "-X":
            asked["method"] = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            asked["headers"][name] = value
        elif word == "-d":
            asked["content"] = next(words)
        elif word == "--output":
            output = folder / next(words)
        else:
            asked["url"] = word.replace("http://localhost:4123", address)
    answer = httpx.request(**asked, timeout=30)
    if output is not None:
        output.write_bytes(answer.content)
    return answer


def commands(text: str) -> list[str]:
    return re.findall(r"^curl (?:.*\\\n)*.*$", text, flags=re.MULTILINE)


def test_the_guides_monitoring(address: str, tmp_path: Path) -> None:
    config, memory, info = (curl(c, address, tmp_path).json() for c in commands(MONITORING))
    assert {"quantization": "int8", "dtype": "auto"}.items() <= config.items()
    assert config["device"] in ("cpu", "cuda", "mps")
    assert memory["memory_info"]["cpu_memory_mb"] > 0
    assert info["model"]["quantization"] == "int8"


def test_the_guides_speech_and_comparing_the_files(address: str, tmp_path: Path) -> None:
    import wave

    from vramkit.serve.formant_tts import FormantTTS

    (command,) = commands(SPEAKING)
    assert curl(command, address, tmp_path).status_code == 200
    with wave.open(str(tmp_path / "test_int8.wav")) as file:
        int8 = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    plain = FormantTTS().generate("Test speech quality")[0].numpy()
    # Another melody and pace by a few per cent, the same loudness: not the same file.
    assert abs(len(int8) / len(plain) - 1) < 0.02
    assert abs(int8.std() / plain.std() - 1) < 0.1
    assert len(int8) != len(plain) or not np.allclose(int8, plain, atol=1e-3)


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        found = shutil.which(name)
        if found is not None:
            return found
    message = "no Chromium on PATH (apt-get install chromium)"
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(message + " (REQUIRE_BROWSER=1)")
    pytest.skip(message)


def visit(url: str, folder: Path) -> str:
    """The document as it stands once the page's scripts have run."""
    command = [
        _browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
        "--autoplay-policy=no-user-gesture-required", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_speaks(address: str, tmp_path: Path) -> None:
    text = "Hello from the page. It has two sentences, and a question: is it heard?"
    page = visit(f"{address}/?text={quote(text)}", tmp_path)
    found = re.search(r'data-result="([^"]*)"', page)
    assert found is not None, page[-2000:]
    result = json.loads(html.unescape(found[1]))
    body = {"input": text}
    true = httpx.post(f"{address}/v1/audio/speech", json=body, timeout=30).content
    assert result["bytes"] == len(true) - 44
    assert result["seconds"] == pytest.approx((len(true) - 44) / 48000)
    assert re.search(r'<audio id="audio"[^>]* src="blob:http://127', page)
    assert re.search(r"CPU \d+ MiB", page)
    assert "formant synthesizer" in page
    assert "quantization int8" in page
    assert page.count("<option") == 6


def test_the_page_shows_an_error(address: str, tmp_path: Path) -> None:
    page = visit(f"{address}/?text={quote('...')}", tmp_path)
    assert re.search(r'<p id="error" role="alert">the formant engine speaks English only', page)
