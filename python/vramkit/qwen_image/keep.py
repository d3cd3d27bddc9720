"""Which layers of the transformer stay in 16 bit: a default, and a measurement to check it with.

Layers of a kind are judged together: what FP8 in them alone adds to the error of the output, for
each byte that it saves. The default list holds what conditions every token (modulation, the
time-step's and the text's embedders) and what stands at the ends (input and output projections).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import nn

from ..convert import Precision, matches, storage_format
from ..sizes import format_size

# Patterns as `vramkit.convert` takes them in `skip`.
MODULATION = ("*.img_mod.*", "*.txt_mod.*")
EMBEDDERS = ("time_text_embed", "txt_in")
PROJECTIONS = ("img_in", "norm_out", "proj_out")
KEEP = (*MODULATION, *EMBEDDERS, *PROJECTIONS)

_BLOCK = re.compile(r"(?:^|\.)transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class KindError:
    """One kind of layers: the error that the format adds in them, and the bytes that it saves.

    `error` sums squared errors of the output relative to its square; `ratio` is the error per byte
    over that of the median kind. `keep`: whether it is left in 16 bit.
    """

    name: str
    layers: int
    saved_bytes: int
    error: float
    ratio: float
    keep: bool


@dataclass
class KeepReport:
    """What a measurement says of the layers to keep in 16 bit.

    Attributes:
        kinds: All but the blocks' numbers: modulation, attention, MLPs, embedders, projections.
        blocks: By number, without what is kept of their kind already.
        keep: The patterns to pass on (`keep=` of `QwenImage`).
        times: A kind or a block at an end is kept where its ratio is at least this.
    """

    format: str
    times: float
    kinds: list[KindError]
    blocks: list[KindError]
    keep: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "format": self.format,
            "times": self.times,
            "kinds": [vars(kind) for kind in self.kinds],
            "blocks": [vars(block) for block in self.blocks],
            "keep": self.keep,
        }

    def __str__(self) -> str:
        lines = [f"{self.format}: error of the output per byte saved, over the median kind's"]
        for row in (*self.kinds, *self.blocks):
            kept = "kept in 16 bit" if row.keep else ""
            lines.append(
                f"  {row.name:<22} {row.layers:>4} layers {format_size(row.saved_bytes):>10} "
                f"error {row.error:.2e}  {row.ratio:>7.2f}  {kept}".rstrip()
            )
        return "\n".join(lines)


# Patterns of the kinds, the first that matches counts.
_KINDS = {
    "image modulation": "*.img_mod.*",
    "text modulation": "*.txt_mod.*",
    "time step embedder": "time_text_embed",
    "text embedder": "txt_in",
    "input projection": "img_in",
    "last modulation": "norm_out",
    "output projection": "proj_out",
    "attention": "*.attn.*",
    "image MLP": "*.img_mlp.*",
    "text MLP": "*.txt_mlp.*",
}


def kind_of(name: str) -> str:
    """The kind of a layer of the transformer, "other" where none is known."""
    return next((kind for kind, pattern in _KINDS.items() if matches(name, [pattern])), "other")


def measure_keep(
    transformer: nn.Module,
    batches: Iterable[Any],
    precision: Precision = "fp8",
    *,
    times: float = 4.0,
    always: Sequence[str] = EMBEDDERS + PROJECTIONS,
    cache: bool | str | None = True,
) -> KeepReport:
    """Measure which layers lose most to a format, and choose those to keep in 16 bit.

    Args:
        transformer: The plain model, trained; on random weights the answer means nothing.
        batches: Calls of it (dicts of keyword arguments), of several time steps and prompts.
        precision: The format of the others.
        times: Kept are kinds whose error per byte saved is at least so many times the median
            kind's, and blocks, from the first inwards and from the last inwards, as far as theirs
            is so many times the median block's.
        always: Patterns that are kept whatever is measured: small, and the model's ends.
        cache: As for `vramkit.sensitivity`, which does the measuring.

    Raises ValueError for no batches and for a format without a figure in any layer.
    """
    from ..sensitivities import sensitivity

    fmt = storage_format(precision)
    found = sensitivity(
        transformer, batches, [fmt], method="each", output=first_output, cache=cache
    )
    rows = []
    for layer in found.layers:
        if fmt.name in layer.errors:
            module = transformer.get_submodule(layer.name)
            weight: Any = module.weight
            saved = weight.nbytes - fmt.bytes(layer.shape).total
            rows.append((layer.name, max(0, saved), layer.errors[fmt.name]))
    if not rows:
        raise ValueError(f"{fmt.name} has no figure in any layer of this model")
    kinds = _judge([(kind_of(name), saved, error) for name, saved, error in rows], times)
    chosen = {row.name for row in kinds if row.keep}
    kept = [_KINDS[name] for name in chosen if name in _KINDS] + list(always)
    inner = [
        (int(match.group(1)), saved, error)
        for name, saved, error in rows
        if (match := _BLOCK.search(name)) and not matches(name, kept)
    ]
    numbered = _judge([(f"block {n}", saved, error) for n, saved, error in inner], times)
    blocks = _only_ends(numbered)
    kept += [f"transformer_blocks.{row.name.split()[1]}" for row in blocks if row.keep]
    kinds = [
        KindError(k.name, k.layers, k.saved_bytes, k.error, k.ratio, _KINDS.get(k.name) in kept)
        for k in kinds
    ]
    return KeepReport(fmt.name, times, kinds, blocks, list(dict.fromkeys(kept)))


def first_output(result: Any) -> Any:
    """The prediction of a transformer's result: its `sample`, or the first of a tuple."""
    sample = getattr(result, "sample", None)
    if sample is not None:
        return sample
    return result[0] if isinstance(result, (tuple, list)) else result


def _judge(rows: Sequence[tuple[str, int, float]], times: float) -> list[KindError]:
    sums: dict[str, list[Any]] = {}
    for name, saved, error in rows:
        entry = sums.setdefault(name, [0, 0, 0.0])
        entry[0] += 1
        entry[1] += saved
        entry[2] += error
    rates = {name: error / max(saved, 1) for name, (_, saved, error) in sums.items()}
    middle = median(rates.values()) if rates else 0.0
    made = []
    for name, (count, saved, error) in sums.items():
        ratio = rates[name] / middle if middle else 1.0
        made.append(KindError(name, int(count), int(saved), error, ratio, ratio >= times))
    return made


def _only_ends(blocks: list[KindError]) -> list[KindError]:
    """Blocks in the middle are not kept: from each end inwards, up to the first that need not."""
    wanted = [row.keep for row in blocks]
    ends = set()
    for order in (range(len(blocks)), range(len(blocks) - 1, -1, -1)):
        for at in order:
            if not wanted[at]:
                break
            ends.add(at)
    return [
        KindError(b.name, b.layers, b.saved_bytes, b.error, b.ratio, at in ends)
        for at, b in enumerate(blocks)
    ]
