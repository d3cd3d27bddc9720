"""`vramkit qwen-image`: the table, the recommended mode, JSON and exit codes."""

from __future__ import annotations

import json

from click.testing import CliRunner
from vramkit.cli import EXIT_BUDGET, EXIT_ERROR, main
from vramkit.qwen_image import recommend


def run(*arguments: str) -> tuple[int, dict]:
    done = CliRunner().invoke(main, ["qwen-image", *arguments, "--json", "-"])
    return done.exit_code, json.loads(done.stdout)


def test_a_card_s_mode_and_the_bytes_of_all() -> None:
    code, data = run("--vram-gb", "12")
    assert code == 0
    assert data["recommended"] == recommend(12).to_dict()
    rows = {(row["mode"], row["modulation"]): row for row in data["modes"]}
    assert rows["original", None]["transformer_bytes"] == 40_860_802_176
    assert rows["fp8", None]["needed_bytes"] > 27 * 10**9
    assert rows["low_vram", None]["needed_bytes"] < data["usable_bytes"]
    assert run("--vram-gb", "11.7")[1]["usable_bytes"] == data["usable_bytes"]
    assert run("--vram-gb", "12", "--separate-lora")[1]["recommended"]["mode"] == "low_vram"


def test_a_mode_that_does_not_fit_and_what_is_wrong() -> None:
    code, data = run("--mode", "fp8", "--vram-gb", "16")
    assert code == EXIT_BUDGET
    assert data["needed_bytes"] > 16 * 2**30
    assert run("--mode", "fp8", "--vram-gb", "48")[0] == 0
    code, data = run("--mode", "fp9")
    assert code == EXIT_ERROR
    assert "low_vram_fused" in data["error"]
    assert run("--vram-gb", "much")[0] == EXIT_ERROR
    assert run("--vram-gb", "2")[0] == EXIT_BUDGET


def test_without_json_a_table() -> None:
    done = CliRunner().invoke(main, ["qwen-image", "--vram-gb", "80"])
    assert done.exit_code == 0
    assert "original: needs" in done.stdout
    assert "38.1 GiB" in done.stdout
