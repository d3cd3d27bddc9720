"""`vramkit heartmula`: the flags and files of HeartMuLa's optimization script."""

from __future__ import annotations

import click


@click.command()
@click.option("--model_path", "--model-path", required=True, help="The folder of the checkpoints.")
@click.option("--version", default="3B", show_default=True, type=click.Choice(["3B", "7B"]))
@click.option("--device", help="Default: cuda where there is one.")
@click.option("--benchmark", is_flag=True, help="Make music, and time it.")
@click.option("--output_path", "--output-path", default=".", show_default=True)
@click.option("--precision", help="In place of LLM.int8: int8, fp8, nf4_dq, ...")
@click.option("--seconds", default=10.0, show_default=True, help="Of music, for --benchmark.")
@click.option("--json", "json_path", metavar="PATH|-", help="Write the result as JSON.")
def heartmula(
    model_path: str,
    version: str,
    device: str | None,
    benchmark: bool,
    output_path: str,
    precision: str | None,
    seconds: float,
    json_path: str | None,
) -> None:
    """Quantize HeartMuLa's language model to files, and benchmark it."""
    from .cli import reported
    from .optimize_fp8 import lines, run

    with reported(json_path) as output:
        found = run(model_path, version, device, benchmark, output_path, precision, seconds)
        for line in lines(found):
            output.console.print(line, highlight=False)
        output.finish(found)
