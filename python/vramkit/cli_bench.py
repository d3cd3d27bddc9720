"""`vramkit bench lsd`: the streaming video model by size and precision, and the report."""

from __future__ import annotations

from typing import Any

import click

from .cli_common import reported

_SIZES = ("tiny", "small", "lightweight", "medium", "heavy")
_PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "auto")


def _listed(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    if not names:
        raise ValueError(f"name at least one {what}: {', '.join(known)}")
    return names


@click.group()
def bench() -> None:
    """Measure a system of this package on this machine."""


@bench.command()
@click.option(
    "--sizes",
    default="lightweight",
    show_default=True,
    help=f"Separated by commas: {', '.join(_SIZES)}.",
)
@click.option(
    "--precisions",
    default="fp32,bf16,int8",
    show_default=True,
    help=f"Separated by commas: {', '.join(_PRECISIONS)}.",
)
@click.option("--device", help='"cpu", "cuda", "cuda:1"; default: CUDA if there is any.')
@click.option("--frames", type=click.IntRange(1), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True)
@click.option("--estimate/--no-estimate", default=True, help="Predict the memory too.")
@click.option(
    "--true-scale",
    is_flag=True,
    help="Also predict the medium model on an RTX 3090, beside the documented figures.",
)
@click.option(
    "--report", type=click.Path(file_okay=False), help="A folder for JSON, Markdown and HTML."
)
@click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout."
)
def lsd(
    sizes: str,
    precisions: str,
    device: str | None,
    frames: int,
    repeats: int,
    warmup: int,
    estimate: bool,
    true_scale: bool,
    report: str | None,
    json_path: str | None,
) -> None:
    """Generate video in every precision and size; medians, peaks, and the error against fp32.

    Weights are random. What does not fit is a row that says so.
    """

    with reported(json_path) as output:
        from rich.table import Table

        from .training.report import _HEADS, _cells, _finite, generate_week1_report
        from .training.suite import true_scale as predict
        from .training.suite import week1_final_benchmark

        results = week1_final_benchmark(
            _listed(sizes, _SIZES, "size"),
            _listed(precisions, _PRECISIONS, "precision"),
            device=device,
            num_timesteps=frames,
            repeats=repeats,
            warmup=warmup,
            estimated=estimate,
        )
        made = generate_week1_report(results, report, scale=predict() if true_scale else ())
        table: Any = Table()
        for number, head in enumerate(_HEADS):
            table.add_column(head, justify="left" if number in (0, 1, len(_HEADS) - 1) else "right")
        for row in made.rows:
            table.add_row(*_cells(row))
        output.console.print(table)
        for scale in made.scale:
            output.console.print(scale.mode, scale.peak_bytes, scale.explanation, highlight=False)
        if report is not None:
            output.console.print(f"report: [bold]{report}/week1.html[/bold]", highlight=False)
        output.finish(_finite(made.to_dict()))
