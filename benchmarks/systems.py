"""The five systems: true scale from shapes, small scale measured by mode, and under a limit.

True scale: nothing is loaded; models are built on the meta device, converted there, and counted to
the byte. "GB" is 10^9 bytes. Claims are their guides' figures, which mean memory in use, weights
and all. Small scale: random weights, so that errors are plumbing figures; models with real weights,
and one that is trained here, follow. `low_vram`: a quarter of the weights at a time, each run in a
process of its own.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import vramkit
from vramkit.heartmula import HeartMuLaConfig
from vramkit.heartmula.model import cache_bytes
from vramkit.heartmula.profiles import codec_bytes, model_bytes, profile

from . import peers, real_layers, systems_qwen
from .runner import in_turn
from .small_systems import SYSTEMS, SmallSystem, bytes_of
from .system_models import (
    CHATTERBOX_MODES,
    MODES,
    Part,
    XPartDit,
    bytes_of_part,
    chatterbox_bytes,
    counted,
)
from .systems_low_vram import TIMES

# What is promised of the weights, in GB, with the room that scales take (4 bit: 4.13 a weight).
PROMISED = {
    ("X-Part transformer", "fp32"): 13.3,
    ("X-Part transformer", "bf16"): 6.64,
    ("X-Part transformer", "int8"): 3.34,
    ("X-Part transformer", "nf4_dq"): 1.75,
    ("HeartMuLa language model", "bf16"): 7.9,
    ("HeartMuLa language model", "int8"): 3.95,
    ("HeartMuLa language model", "nf4_dq"): 2.1,
    ("T3", "float32"): 2.2,
    ("T3", "float16"): 1.1,
    ("T3", "int8"): 0.6,
}
SONATA, HEADS = 108_500_000, 4_200_000  # published counts of P3-SAM's parameters
REST = 1_085_000_000 - SONATA  # of X-Part beside transformer and sonata: 4.4 B in all
CLAIMS = {
    "P3-SAM": {"fp32": "4-6", "bf16": "2-3", "fp8": "1-1.5"},
    "X-Part": {"fp32": "4-6", "bf16": "2-3", "fp8": "1-1.5"},
    "HeartMuLa": {"bf16": "6-7", "int8": "3-4"},
    # Theirs are GiB.
    "Chatterbox": {"float32": "1.86", "float16": "0.93", "int8": "0.47"},
}
# Of `low_vram`: what a process may take beside the limit, for a call's own memory and its own.
SLACK = 64 * 10**6
# Weights of the modes that store most of a model in 8 bits, of the plain float32 ones; the rest is
# what guides keep in float32 (sonata, codec, vocoder, modulation).
SMALLER = {"X-Part": ("int8", 0.30), "HeartMuLa": ("int8", 0.45), "Qwen-Image": ("fp8", 0.75),
           "Chatterbox": ("int8", 0.50)}  # fmt: skip


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """All parts; (data, promises missed)."""
    torch.set_num_threads(options.threads)
    missed: list[str] = []
    print("True scale")
    found: dict[str, Any] = {"true_scale": true_scale(missed)}
    chosen = [SYSTEMS[name] for name in options.systems or SYSTEMS]
    print("\nSmall scale, random weights: errors are plumbing figures, not quality")
    size = "test" if options.quick else "small"
    found["small_scale"] = {one.name: measured(one, size, missed) for one in chosen}
    print("\nReal weights")
    found["voice_encoder"] = voice_encoder(missed)
    if not options.quick and (not options.systems or "Qwen-Image" in options.systems):
        found["qwen_image_digits"] = systems_qwen.digits(missed, None)
    print(f"\nlow_vram: {TIMES} times the limit, on the host")
    size = "test" if options.quick else "large"
    found["low_vram"] = {one.name: low_vram(one, size, missed) for one in chosen}
    return found, missed


# --- true scale --------------------------------------------------------------------------------


def true_scale(missed: list[str]) -> dict[str, Any]:
    """Bytes by system, part and mode; the profiles of HeartMuLa."""
    found: dict[str, Any] = {}
    systems = {
        "P3-SAM": [
            Part("sonata", counted(SONATA), "fp32", "by its published count; stays fp32"),
            Part("heads", counted(HEADS), None, "by its published count"),
        ],
        "X-Part": [
            Part("X-Part transformer", XPartDit),
            Part("sonata of the conditioner", counted(SONATA), "fp32", "stays fp32"),
            Part("VAEs, conditioner, boxes", counted(REST), None, "by their published count"),
        ],
    }
    print(f"{'':28}" + "".join(f"{mode:>12}" for mode in MODES) + "   GB of weights")
    for system, parts in systems.items():
        rows = {part.name: {mode: bytes_of_part(part, mode) for mode in MODES} for part in parts}
        for part in parts:
            _print(part.name, rows[part.name], part.note)
        total = {mode: sum(row[mode] for row in rows.values()) for mode in MODES}
        _print(f"{system}, all", total, "")
        _claims(system)
        found[system] = {"parts": rows, "total": total, "claims_gb": CLAIMS[system]}
    found["HeartMuLa"] = _heartmula()
    try:
        found["Chatterbox"] = _chatterbox()
    except ImportError as error:
        print(f"Chatterbox: not counted ({error})")
    for (name, mode), gb in PROMISED.items():
        part = next((s["parts"][name] for s in found.values() if name in s["parts"]), {})
        if part.get(mode, 0) > gb * 1e9:
            missed.append(f"{name} in {mode}: {part[mode] / 1e9:.2f} GB, promised {gb}")
    found["Qwen-Image"] = systems_qwen.published(missed)
    return found


def _heartmula() -> dict[str, Any]:
    model = {mode: model_bytes(mode) for mode in MODES}
    codec = dict.fromkeys(MODES, codec_bytes())
    _print("HeartMuLa language model", model, "embeddings and audio_head too")
    _print("HeartMuLa codec", codec, "stays fp32")
    _claims("HeartMuLa")
    config = HeartMuLaConfig()
    caches = {
        f"{positions} positions, {bits} bits": cache_bytes(config, positions, bits=bits)
        for positions, bits in ((8192, 16), (500, 16), (500, 8), (3512, 16), (3512, 8))
    }
    for name, nbytes in caches.items():
        print(f"  cache of {name}: {nbytes / 1e9:.2f} GB")
    profiles = [profile(gb) for gb in (6, 8, 12)]
    for made in profiles:
        print(f"  {made}")
    return {
        "parts": {"HeartMuLa language model": model, "codec": codec},
        "claims_gb": CLAIMS["HeartMuLa"],
        "cache_bytes": caches,
        "profiles": [made.to_dict() for made in profiles],
    }


def _chatterbox() -> dict[str, Any]:
    rows = chatterbox_bytes()
    print(f"{'':28}" + "".join(f"{mode:>18}" for mode in CHATTERBOX_MODES))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{row[m] / 1e9:18.3f}" for m in CHATTERBOX_MODES))
    total = {mode: sum(row[mode] for row in rows.values()) for mode in CHATTERBOX_MODES}
    print(f"{'Chatterbox, all':28}" + "".join(f"{v / 1e9:18.3f}" for v in total.values()))
    cells = "".join(f"{CLAIMS['Chatterbox'].get(m, ''):>18}" for m in CHATTERBOX_MODES)
    print(f"{'  its guide, in use':28}{cells}")
    return {"parts": rows, "total": total, "claims_gb": CLAIMS["Chatterbox"]}


def _print(name: str, row: dict[str, int], note: str) -> None:
    print(f"{name:28}" + "".join(f"{row[m] / 1e9:12.2f}" for m in MODES) + f"   {note}")


def _claims(system: str) -> None:
    cells = "".join(f"{CLAIMS[system].get(mode, ''):>12}" for mode in MODES)
    print(f"{'  its guide, in use':28}{cells}")


# --- small scale -------------------------------------------------------------------------------


def measured(system: SmallSystem, size: str, missed: list[str]) -> list[dict[str, Any]]:
    """One row by mode: bytes, seconds beside the plain model's in turn, error to the plain one."""
    made = {mode: system.build(mode, system.sizes[size]) for mode in system.modes}
    plain = system.modes[0]
    expected = system.judged(made[plain])
    seconds = in_turn(
        {mode: (lambda one=one: system.call(one)) for mode, one in made.items()},
        repeats=3 if size == "test" else 7,
        slowest=8.0,
    )
    print(f"{system.name:28}{'MB':>8}{'seconds':>10}{'ratio':>8}{'rel. L2':>10}{'cosine':>11}")
    rows = []
    for mode, one in made.items():
        found = system.judged(one)
        row = {
            "mode": mode,
            "weights_bytes": bytes_of(one),
            "seconds": seconds[mode],
            "seconds_ratio": seconds[mode] / seconds[plain],
            "relative_l2": real_layers.relative(found, expected),
            "cosine": _cosine(found, expected),
            "weights": "random",
        }
        rows.append(row)
        print(
            f"  {mode:26}{row['weights_bytes'] / 1e6:8.1f}{row['seconds']:10.4f}"
            f"{row['seconds_ratio']:8.2f}{row['relative_l2']:10.5f}{row['cosine']:11.7f}"
        )
        if not torch.isfinite(found).all():
            missed.append(f"{system.name} in {mode}: the output is not finite")
    if size != "test" and system.name in SMALLER:
        mode, share = SMALLER[system.name]
        nbytes = next(row["weights_bytes"] for row in rows if row["mode"] == mode)
        if nbytes > share * rows[0]["weights_bytes"]:
            missed.append(f"{system.name} in {mode} takes more than {share:.0%} of {plain}")
    return rows


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)
    )


# --- real weights ------------------------------------------------------------------------------


def voice_encoder(missed: list[str]) -> list[dict[str, Any]]:
    """Chatterbox's voice encoder with Resemblyzer's weights, on synthesized speech, by mode."""
    try:
        model, mels = real_layers.VoiceEncoder(), real_layers.speech()
    except (ImportError, OSError) as error:
        print(f"voice encoder: not measured ({error})")
        return []
    made: dict[str, torch.nn.Module] = {"float32": model}
    for name in ("bf16", "fp8", "int8", "int8_dynamic", "llm_int8"):
        made[name] = copy.deepcopy(model)
        vramkit.convert(made[name], name)
    kinds = frozenset({torch.nn.LSTM, torch.nn.Linear})
    made["torch quantize_dynamic"] = peers.torch_dynamic(copy.deepcopy(model), kinds)
    with torch.inference_mode():
        embeddings = {name: one.utterances(mels) for name, one in made.items()}

        def call(one: torch.nn.Module) -> Any:
            with torch.inference_mode():
                return one.utterances(mels[:4])

        seconds = in_turn({n: (lambda one=one: call(one)) for n, one in made.items()}, repeats=7)
    reference = embeddings["float32"]
    print(f"{'Voice encoder, Resemblyzer':28}{'MB':>8}{'seconds':>10}{'ratio':>8}{'rel. L2':>10}"
          f"{'least cosine':>14}")  # fmt: skip
    rows = []
    for name, found in embeddings.items():
        row = {
            "mode": name,
            "weights_bytes": _packed_bytes(made[name]),
            "seconds": seconds[name],
            "seconds_ratio": seconds[name] / seconds["float32"],
            "relative_l2": real_layers.relative(found, reference),
            "least_cosine": float((found * reference).sum(-1).min()),
            "weights": "Resemblyzer 0.1.4",
        }
        rows.append(row)
        size = "" if row["weights_bytes"] is None else f"{row['weights_bytes'] / 1e6:.2f}"
        print(
            f"  {name:26}{size:>8}{row['seconds']:10.4f}{row['seconds_ratio']:8.2f}"
            f"{row['relative_l2']:10.4f}{row['least_cosine']:14.4f}"
        )
    errors = {row["mode"]: row["relative_l2"] for row in rows}
    if errors["int8_dynamic"] > errors["torch quantize_dynamic"]:
        missed.append("the voice encoder in int8_dynamic errs more than with torch's function")
    return rows


def _packed_bytes(module: torch.nn.Module) -> int | None:
    """None for torch's, which keeps weights in objects of its own."""
    if any("quantized" in type(m).__module__ for m in module.modules()):
        return None
    return bytes_of(module)


# --- under a limit -----------------------------------------------------------------------------


def low_vram(system: SmallSystem, size: str, missed: list[str]) -> dict[str, Any]:
    """Offloaded and resident, each in a process of its own."""
    result = {}
    for offloads in ("yes", "no"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.systems_low_vram", system.name, size, offloads],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        if done.returncode:
            raise RuntimeError(f"{system.name}: {done.stderr[-2000:]}")
        result[offloads] = json.loads(done.stdout.splitlines()[-1])
    found, resident = result["yes"], result["no"]
    found["mode"] = system.streamed
    found["resident_peak_bytes"] = resident["peak_bytes"]
    peak = max(found["peak_bytes"], found["first_peak_bytes"])
    mb = {k: v / 1e6 for k, v in found.items() if k.endswith("_bytes")}
    print(
        f"{system.name:12}{system.streamed:10}weights {mb['weights_bytes']:.1f} MB, limit "
        f"{mb['limit_bytes']:.1f}, peak {peak / 1e6:.1f} (resident {mb['resident_peak_bytes']:.1f})"
        f", copied a call {mb['copied_bytes']:.1f}, time {found['seconds_ratio']:.2f} of resident, "
        f"{'the same bits' if found['bit_equal'] else 'OTHER BITS'}"
    )
    if not found["bit_equal"]:
        missed.append(f"{system.name}: low_vram gives other bits than resident")
    if peak > found["limit_bytes"] + SLACK:
        missed.append(f"{system.name}: low_vram takes {peak / 1e6:.0f} MB")
    if size != "test" and peak >= resident["peak_bytes"]:
        missed.append(f"{system.name}: low_vram takes as much as resident")
    return found
