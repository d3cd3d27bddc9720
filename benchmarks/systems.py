"""The systems at their true scale: bytes by mode from shapes, beside what their guides claim.

Nothing is loaded: models are built on the meta device, converted there, and counted to the byte.
"GB" is 10^9 bytes. Claims are their guides' figures, which mean memory in use, weights and all.
"""

from __future__ import annotations

from typing import Any

from vramkit.heartmula import HeartMuLaConfig
from vramkit.heartmula.model import cache_bytes
from vramkit.heartmula.profiles import codec_bytes, model_bytes, profile

from .system_models import MODES, Part, XPartDit, bytes_of, counted

# What is promised of the weights, in GB, with the room that scales take (4 bit: 4.13 a weight).
PROMISED = {
    ("X-Part transformer", "fp32"): 13.3,
    ("X-Part transformer", "bf16"): 6.64,
    ("X-Part transformer", "int8"): 3.34,
    ("X-Part transformer", "nf4_dq"): 1.75,
    ("HeartMuLa language model", "bf16"): 7.9,
    ("HeartMuLa language model", "int8"): 3.95,
    ("HeartMuLa language model", "nf4_dq"): 2.1,
}
SONATA, HEADS = 108_500_000, 4_200_000  # published counts of P3-SAM's parameters
REST = 1_085_000_000 - SONATA  # of X-Part beside transformer and sonata: 4.4 B in all
CLAIMS = {
    "P3-SAM": {"fp32": "4-6", "bf16": "2-3", "fp8": "1-1.5"},
    "X-Part": {"fp32": "4-6", "bf16": "2-3", "fp8": "1-1.5"},
    "HeartMuLa": {"bf16": "6-7", "int8": "3-4"},
}


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Bytes by system, part and mode; the profiles of HeartMuLa; promises that were missed."""
    found: dict[str, Any] = {}
    missed: list[str] = []
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
        rows = {part.name: {mode: bytes_of(part, mode) for mode in MODES} for part in parts}
        for part in parts:
            _print(part.name, rows[part.name], part.note)
        total = {mode: sum(row[mode] for row in rows.values()) for mode in MODES}
        _print(f"{system}, all", total, "")
        _claims(system)
        found[system] = {"parts": rows, "total": total, "claims": CLAIMS[system]}
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
    found["HeartMuLa"] = {
        "parts": {"HeartMuLa language model": model, "codec": codec},
        "claims": CLAIMS["HeartMuLa"],
        "cache_bytes": caches,
        "profiles": [made.to_dict() for made in profiles],
    }
    for (name, mode), gb in PROMISED.items():
        part = next(s["parts"][name] for s in found.values() if name in s["parts"])
        if part[mode] > gb * 1e9:
            missed.append(f"{name} in {mode}: {part[mode] / 1e9:.2f} GB, promised {gb}")
    return found, missed


def _print(name: str, row: dict[str, int], note: str) -> None:
    print(f"{name:28}" + "".join(f"{row[m] / 1e9:12.2f}" for m in MODES) + f"   {note}")


def _claims(system: str) -> None:
    cells = "".join(f"{CLAIMS[system].get(mode, ''):>12}" for mode in MODES)
    print(f"{'  its guide, in use':28}{cells}")
