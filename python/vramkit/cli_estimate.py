"""What `vramkit estimate` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from .estimator import MemoryEstimate


def print_estimates(console: Console, made: Sequence[tuple[str, MemoryEstimate]]) -> None:
    """One estimate in full; several side by side, with the notes that they share."""
    if len(made) == 1:
        console.print(str(made[0][1]), highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(_side_by_side(made))
        lines = dict.fromkeys(note for _, found in made for note in found.notes)
        words = dict.fromkeys(found.interval_from for _, found in made if found.trace is not None)
        for line in (*(f"interval: {w}" for w in words), *(f"note: {note}" for note in lines)):
            console.print(line, highlight=False, markup=False, style="dim", soft_wrap=True)
    if any(found.trace is None for _, found in made):
        console.print("give --inputs for activations and the peak", style="dim")


def _side_by_side(made: Sequence[tuple[str, MemoryEstimate]]) -> Table:
    cuda = any(found.target.startswith("cuda") for _, found in made)
    table = Table()
    heads = ["precision", "weights", "activations", "peak", "at least", "at most", "load"]
    heads += ["reserved", "device"] * cuda
    for column in heads:
        table.add_column(column, justify="left" if column == "precision" else "right")
    for name, found in made:
        sizes = [found.weights_bytes, found.activations_bytes, found.peak_bytes]
        cells = [_size(n) for n in sizes] + [_size(n) for n in found.interval_bytes or (None, None)]
        cells.append(_size(found.load_peak_bytes))
        if cuda:
            cells += [_size(found.reserved_bytes), _size(found.account.device_bytes)]
        table.add_row(name, *cells)
    return table


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_size(nbytes)


def write_pictures(
    path: str, made: Sequence[tuple[str, MemoryEstimate]], limit: float | str | None
) -> list[Path]:
    """Each estimate's picture; several get their precision's name before the ending."""
    target = Path(path)
    written = []
    for name, found in made:
        file = (
            target if len(made) == 1 else target.with_name(f"{target.stem}-{name}{target.suffix}")
        )
        found.plot(limit).savefig(file)
        written.append(file)
    return written
