"""Command line: `vramkit demo | doctor | estimate | plan | convert | fit | compare | serve | …`.

Exit codes: 0 done; 1 an error that the text explains; 2 wrong usage; 3 a memory limit that
cannot be met (the text, and `needed_bytes` in the JSON, say the smallest that would do).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from . import __version__
from .cli_bench import bench
from .cli_common import (
    factory_option,
    inputs_option,
    json_option,
    module_or_path,
    parse_inputs,
    reported,
    size_option_value,
    skip_option,
)
from .cli_compare import compare
from .cli_heartmula import heartmula
from .cli_plan import convert, fit, plan, sensitivity
from .cli_qwen import qwen_image
from .cli_serve import serve
from .precision import PrecisionMode
from .sizes import format_size


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vramkit")
def main() -> None:
    """Run PyTorch models in less memory than they ask for, and measure what it cost.

    MODEL is a transformers checkpoint folder, a safetensors file with --factory, or an entry point
    package.module:function that returns a module.
    """
    # So that files in the making are removed when the process is asked to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@main.command()
@click.option("--vram-limit", help='Limit of the weights, "18 MB"; default: a quarter of fp32.')
@click.option(
    "--report", default="vramkit-report.html", show_default=True, type=click.Path(dir_okay=False)
)
@json_option
def demo(vram_limit: str | None, report: str, json_path: str | None) -> None:
    """Fit a real sentence-embedding model into a quarter of its memory and compare."""
    with reported(json_path) as output:
        from . import demo as demonstration
        from .report.html import write_report

        console = output.console
        console.print(f"[bold]{demonstration.MODEL}[/bold], 22.7 M parameters, offline")
        result = demonstration.run(vram_limit, progress=console.is_terminal)
        _print_demo(console, result)
        write_report(
            report,
            title=f"{demonstration.MODEL} within {format_size(result.limit_bytes)}",
            summary=result.to_dict(),
            estimate=result.estimate,
            plan=result.plan,
            comparison=result.comparison,
            left_out=result.conversion.left_out,
        )
        console.print(f"report: [bold]{report}[/bold]", highlight=False)
        output.finish(result.to_dict())


def _print_demo(console: Console, result: Any) -> None:
    table = Table(title=None)
    for column in ("", "fp32", "fitted", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = result.reference, result.measured
    rows = (
        ("weights", before.weights_bytes, after.weights_bytes),
        ("peak of one call", before.peak_bytes, after.peak_bytes),
    )
    for label, a, b in rows:
        table.add_row(label, format_size(a), format_size(b), f"{b / a:.3f}")
    table.add_row(
        "seconds for 16 sentences",
        f"{before.seconds:.4f}",
        f"{after.seconds:.4f}",
        f"{after.seconds / before.seconds:.2f}",
    )
    console.print(table)
    console.print(str(result.plan), highlight=False)
    peak = result.estimate.peak_bytes
    console.print(
        f"estimated peak {format_size(peak)}, measured {format_size(after.peak_bytes)} "
        f"({peak / after.peak_bytes - 1:+.1%})",
        highlight=False,
    )
    cost = result.comparison
    console.print(
        f"[bold]cost:[/bold] least cosine {cost.cosine:.5f}, relative L2 {cost.relative_l2:.4f}, "
        f"SQNR {cost.sqnr_db:.1f} dB; converted {result.conversion.coverage_bytes_fraction:.1%} "
        "of the bytes",
        highlight=False,
    )
    same = sum(m.reference == m.fitted for m in result.matches)
    console.print(
        f"nearest sentence: the same for {same} of {len(result.matches)} queries", highlight=False
    )
    for match in result.matches[:3]:
        console.print(
            f"  {match.sentence}\n    -> {match.fitted}  "
            f"({match.fitted_score:.3f}; fp32 {match.reference_score:.3f})",
            highlight=False,
        )


@main.command()
@click.option("--rates/--no-rates", default=True, help="Measure memory, disk and kernels (2 s).")
@json_option
def doctor(rates: bool, json_path: str | None) -> None:
    """Show what this machine and this build offer."""
    with reported(json_path) as output:
        from .doctor import examine

        found = examine(rates=rates)
        table = Table(show_header=False)
        for key, value in _flat(found):
            table.add_row(key, value)
        output.console.print(table)
        output.finish(found)


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{label} ")
        elif key.endswith("_bytes_per_second"):
            yield label.removesuffix("_bytes_per_second"), f"{value / 1e9:.2f} GB/s"
        elif key.endswith("_bytes") and value is not None:
            yield label.removesuffix("_bytes"), format_size(value)
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value)) or "none"
        else:
            yield label, "unknown" if value is None and key != "isa_forced" else str(value)


@main.command()
@click.argument("model")
@click.option("--precision", default="all", show_default=True, help='One, several ("a,b"), or all.')
@click.option("--target", default="cpu", show_default=True, help='"cpu", "cuda" or "cuda:8.9".')
@click.option("--generate", type=int, default=0, help="New tokens after the inputs.")
@click.option("--probe/--no-probe", default=True, help="Run unknown operators once, or use rules.")
@click.option(
    "--calibrated/--no-calibrated", default=True, help="Use what real runs of this call measured."
)
@click.option("--context", help='The CUDA context, "400 MB"; default: an allowance of 512 MiB.')
@click.option("--plan", "plan_path", type=click.Path(dir_okay=False), help="A saved plan.")
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw it (.svg, .png, .pdf).")
@click.option("--vram-limit", help="A line in the picture.")
@inputs_option
@factory_option
@skip_option
@json_option
def estimate(
    model: str,
    precision: str,
    target: str,
    generate: int,
    probe: bool,
    calibrated: bool,
    context: str | None,
    plan_path: str | None,
    picture: str | None,
    vram_limit: str | None,
    inputs: tuple[str, ...],
    factory: str | None,
    skip: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Predict bytes by precision before any weight is read."""
    with reported(json_path) as output:
        from .cli_estimate import print_estimates, write_pictures
        from .estimator import estimate as predict
        from .plans import Plan
        from .skeleton import build_skeleton

        source, build = module_or_path(model, factory)
        skeleton = (
            source
            if build is None and not isinstance(source, Path)
            else build_skeleton(source, build)
        )
        given = parse_inputs(inputs)
        options: dict[str, Any] = {
            "target": target,
            "generate": generate,
            "probe": probe,
            "calibrated": calibrated,
            "context": size_option_value(context),
        }
        if plan_path is not None:
            chosen = Plan.load(plan_path)
            made = [("plan", predict(skeleton, None, given, plan=chosen, **options))]
        else:
            made = [
                (name, predict(skeleton, name, given, skip=skip, **options))
                for name in _precisions(precision)
            ]
        print_estimates(output.console, made)
        if picture is not None:
            for file in write_pictures(picture, made, size_option_value(vram_limit)):
                output.console.print(f"picture: [bold]{file}[/bold]", highlight=False)
        output.finish({"model": model, "estimates": [found.to_dict() for _, found in made]})


def _precisions(text: str) -> list[str]:
    if text != "all":
        return [PrecisionMode.parse(part).value for part in text.split(",")]
    return [mode.value for mode in PrecisionMode]


for command in (plan, sensitivity, convert, fit, compare, bench, heartmula, serve, qwen_image):
    main.add_command(command)

if __name__ == "__main__":
    main()
