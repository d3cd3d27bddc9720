"""`vramkit qwen-image`: which mode fits a card, and what each takes."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table


@click.command("qwen-image")
@click.option(
    "--vram-gb",
    metavar="GB",
    help="A card's memory: 12 for one sold as such, 11.7 for what its driver reports.",
)
@click.option("--mode", help="Only this mode: what it needs, and whether it fits.")
@click.option("--separate-lora", is_flag=True, help="LoRA stays beside the weights.")
@click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout."
)
def qwen_image(
    vram_gb: str | None, mode: str | None, separate_lora: bool, json_path: str | None
) -> None:
    """Modes of the published Qwen-Image: bytes of weights, and which fits a card."""
    from .cli import _reported

    with _reported(json_path) as output:
        rows = mode_rows()
        if mode is not None:
            from .qwen_image import Mode

            wanted = Mode.parse(mode).value
            rows = [row for row in rows if row["mode"] == wanted]
        size = None if vram_gb is None else card_size(vram_gb)
        data: dict[str, Any] = {"modes": rows}
        output.console.print(_table(rows, size))
        if size is not None:
            from .errors import BudgetError
            from .qwen_image import recommend
            from .recommendation import usable_bytes
            from .sizes import format_size

            usable = usable_bytes(size)
            data["usable_bytes"] = usable
            if mode is None:
                found = recommend(size, separate_lora=separate_lora)
                output.console.print(str(found), highlight=False)
                data["recommended"] = found.to_dict()
            else:
                least = min(row["needed_bytes"] for row in rows)
                if least > usable:
                    raise BudgetError(
                        f"{mode} needs {format_size(least)} ({least} B), the card offers "
                        f"{format_size(usable)}",
                        least,
                    )
        output.finish(data)


def card_size(text: str) -> float:
    """`12` is a card's nominal size, `11.7` what its driver reports."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--vram-gb is a number of GiB, not {text!r}") from None


def mode_rows() -> list[dict[str, Any]]:
    """What each mode of the published model takes, exact; `needed_bytes` with the allowance."""
    from .qwen_image.modes import Mode, needed_bytes
    from .qwen_image.sizes import published_bytes
    from .recommendation import RESERVE_GB
    from .sizes import GIB

    options: list[tuple[Mode, str | None, str | None]] = [
        (Mode.ORIGINAL, None, None),
        (Mode.FP8, "fp8", None),
        (Mode.FP8, "fp8", "int8"),
        (Mode.FP8_FUSED, "fp8", None),
        (Mode.LOW_VRAM, "fp8", None),
        (Mode.LOW_VRAM, "fp8", "int8"),
        (Mode.LOW_VRAM_FUSED, "fp8", None),
    ]
    rows = []
    for mode, precision, modulation in options:
        sizes = published_bytes(precision, modulation=modulation)
        rows.append(
            {
                "mode": mode.value,
                "modulation": modulation,
                "transformer_bytes": sizes.transformer,
                "text_encoder_bytes": sizes.text_encoder,
                "vae_bytes": sizes.vae,
                "together_bytes": sizes.together,
                "needed_bytes": needed_bytes(mode, sizes) + round(RESERVE_GB * GIB),
            }
        )
    return rows


def _table(rows: list[dict[str, Any]], size: float | None) -> Table:
    from .recommendation import usable_bytes
    from .sizes import format_size

    table = Table()
    heads = ["mode", "modulation", "transformer", "text encoder", "all weights", "needs at least"]
    if size is not None:
        heads.append("fits")
    for head in heads:
        table.add_column(head, justify="left" if head in ("mode", "modulation") else "right")
    for row in rows:
        cells = [row["mode"], row["modulation"] or "16 bit"]
        names = ("transformer_bytes", "text_encoder_bytes", "together_bytes", "needed_bytes")
        cells += [format_size(row[name]) for name in names]
        if size is not None:
            cells.append("yes" if row["needed_bytes"] <= usable_bytes(size) else "no")
        table.add_row(*cells)
    return table
