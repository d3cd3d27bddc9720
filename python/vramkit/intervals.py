"""How far a predicted peak may be off: by what no probe told of the operators of a call.

Calls of which every operator was probed were exact in all 54 cases of the frozen zoo that are one
call (benchmarks/results/estimate.json, `cases`) and for all 35 models of tests/python/zoo.py. Where
rules answer in place of probes, the interval begins at what operators return, without anything
inside them, and ends where each such operator holds as much more as the rules missed for the worst
of the layers of its kind (`rules` in the same file, by `benchmarks/estimate_rules.py`). All
of it was measured on one processor with AVX-512.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The least of rule / probe by kind of operator, rounded down to 0.1 %: single layers, of which the
# rules miss this much at worst. For "other" and for "half" (float16 and bfloat16) no layer missed
# anything; one of the zoo's models in bfloat16 misses 0.7 % as a whole, hence these. Tests hold
# them to the results.
LEAST = {
    "convolution": 0.085,
    "recurrent": 0.511,
    "resizing": 0.444,
    "other": 0.99,
    "half": 0.98,
}
# Fused layers whose workspaces in half precision the rules miss by a factor of ten and more.
NO_RULE_IN_HALF = frozenset({
    "aten::_transformer_encoder_layer_fwd",
    "aten::_native_multi_head_attention",
})  # fmt: skip
# The most of predicted / measured of generation loops, rounded up: `generate` is not our loop.
GENERATION = 1.002
_WORDS = {
    "convolution": "convolutions",
    "recurrent": "recurrent layers",
    "resizing": "resizing",
    "other": "products and other operators",
    "half": "products and other operators in half precision",
}


@dataclass(frozen=True)
class Unprobed:
    """What no probe told of a call.

    Attributes:
        kinds: Kinds of operators that a rule answered for.
        unknown: Operators of which nothing is known: those of others, and failed probes.
        least_bytes: The call's peak if nothing is inside the operators of those kinds.
        most_bytes: The same if each is as far above its rule as `LEAST` says.
    """

    kinds: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    least_bytes: int = 0
    most_bytes: int = 0


def kind_of(operator: str, half: bool = False) -> str:
    """Which bounds hold for an operator that a rule answers for; `half`: in half precision.

    >>> kind_of("aten::convolution"), kind_of("aten::lstm.input"), kind_of("aten::addmm")
    ('convolution', 'recurrent', 'other')
    """
    name = operator.partition("::")[2] or operator
    if "conv" in name:
        return "convolution"
    if "upsample" in name:
        return "resizing"
    if any(part in name for part in ("rnn", "lstm", "gru")):
        return "recurrent"
    return "half" if half else "other"


def widened(sizes: Sequence[int], kind: str) -> tuple[int, ...]:
    """An operator's signed sizes, with as much more at their highest point as the rules missed.

    >>> widened((100, -100), "recurrent")
    (100, 96, -96, -100)
    """
    live = most = place = 0
    for index, size in enumerate(sizes):
        live += size
        if live > most:
            most, place = live, index
    extra = math.ceil(most * (1 / LEAST[kind] - 1))
    if not extra:
        return tuple(sizes)
    return (*sizes[: place + 1], extra, -extra, *sizes[place + 1 :])


def interval_of(
    predicted: int, unprobed: Unprobed, target: str, generated: bool
) -> tuple[tuple[int, int] | None, str]:
    """((low, high) or None, where it comes from) of a predicted peak of a call in bytes."""
    if target != "cpu":
        return None, "none: nothing was measured on CUDA, and cuDNN's workspaces are not known"
    if unprobed.unknown:
        names = ", ".join(unprobed.unknown[:3])
        return None, f"none: what {names} allocates inside is not known"
    low = high = predicted
    words = "every operator was probed"
    if unprobed.kinds:
        low, high = min(unprobed.least_bytes, low), max(unprobed.most_bytes, high)
        names = ", ".join(_WORDS[kind] for kind in sorted(unprobed.kinds))
        words = f"not probed: {names}; from nothing inside them to the worst that rules missed"
    if generated:
        low = int(low / GENERATION)
        words += "; a generation loop, which was up to 0.2 % less than predicted"
    return (low, high), words
