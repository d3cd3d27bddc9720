"""Command line: `vramkit demo | doctor | estimate | sensitivity | plan | convert | fit | bench |
serve`.

Exit codes: 0 done; 1 an error that the text explains; 2 wrong usage; 3 a memory limit that
cannot be met (the text, and `needed_bytes` in the JSON, say the smallest that would do).
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from . import __version__
from .cli_bench import bench
from .cli_heartmula import heartmula
from .cli_qwen import qwen_image
from .cli_serve import serve
from .errors import BudgetError, VramkitError
from .precision import PrecisionMode
from .sizes import format_size

EXIT_ERROR, EXIT_BUDGET = 1, 3

_json_option = click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout."
)
_factory_option = click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module, where MODEL is a safetensors file or a folder without config.json.",
)
_inputs_option = click.option(
    "--inputs",
    "inputs",
    multiple=True,
    metavar="[NAME=]2x128[:int64]",
    help="Shape of one input of a call; repeat for each. Without NAME: positional.",
)
_limit_option = click.option("--vram-limit", required=True, help='"6 GB", "512 MiB", or GiB.')
_buffer_option = click.option("--vram-buffer", default="0 B", show_default=True)
_skip_option = click.option("--skip", multiple=True, help="A layer to leave plain (name or glob).")


class Output:
    """Where a command's result goes: tables to the terminal, JSON to where the user said."""

    def __init__(self, json_path: str | None) -> None:
        self.json_path = json_path
        self.console = Console(stderr=json_path == "-")

    def finish(self, data: dict[str, Any]) -> None:
        """Write the JSON, if it was asked for."""
        if self.json_path == "-":
            click.echo(json.dumps(data, indent=2))
        elif self.json_path:
            Path(self.json_path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _reported(json_path: str | None) -> Iterator[Output]:
    """Turns the library's errors into a sentence and an exit code."""
    output = Output(json_path)
    try:
        yield output
    except BudgetError as error:
        output.console.print(f"[red]does not fit:[/red] {error}", highlight=False)
        output.finish({"error": str(error), "needed_bytes": error.needed_bytes})
        sys.exit(EXIT_BUDGET)
    except (VramkitError, ValueError, TypeError, OSError, ImportError) as error:
        output.console.print(f"[red]error:[/red] {error}", highlight=False)
        output.finish({"error": str(error)})
        sys.exit(EXIT_ERROR)


def parse_inputs(texts: tuple[str, ...]) -> Any:
    """`["input_ids=2x128", "x=1x3x64x64:float16"]` as the inputs of `vramkit.estimate`."""
    if not texts:
        return None
    named: dict[str, Any] = {}
    positional: list[Any] = []
    for text in texts:
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        if match is None:
            raise ValueError(
                f"cannot read the input {text!r}; write NAME=2x128 or NAME=2x128:int64"
            )
        name, shape_text, dtype = match.groups()
        shape: Any = tuple(int(n) for n in shape_text.split("x"))
        value = (dtype, shape) if dtype else shape
        if name:
            named[name] = value
        else:
            positional.append(value)
    if named and positional:
        raise ValueError("name all inputs or none")
    return named or tuple(positional)


def entry_point(text: str) -> Callable[[], Any]:
    """The function that `package.module:function` names."""
    module_name, _, function = text.partition(":")
    if not module_name or not function:
        raise ValueError(f"expected package.module:function, got {text!r}")
    sys.path.insert(0, "")  # modules in the folder one works in, as `python -m` finds them
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {text!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ValueError(f"{text!r} is not a function that returns a module")
    return found  # type: ignore[no-any-return]


def _is_entry_point(model: str) -> bool:
    return not Path(model).exists() and re.fullmatch(r"[\w.]+:\w+", model) is not None


def _module_or_path(model: str, factory: str | None) -> tuple[Any, Callable[[], Any] | None]:
    """(module, None) for an entry point, (path, factory) for a checkpoint."""
    if _is_entry_point(model):
        return entry_point(model)(), None
    if not Path(model).exists():
        raise FileNotFoundError(
            f"no model at {model!r}: give a checkpoint folder, a safetensors file with --factory, "
            "or package.module:function"
        )
    if Path(model).is_file() and factory is None:
        raise ValueError(f"{model} holds weights only: say what model they are with --factory")
    return Path(model), entry_point(factory) if factory else None


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
@_json_option
def demo(vram_limit: str | None, report: str, json_path: str | None) -> None:
    """Fit a real sentence-embedding model into a quarter of its memory and compare."""
    with _reported(json_path) as output:
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
@_json_option
def doctor(rates: bool, json_path: str | None) -> None:
    """Show what this machine and this build offer."""
    with _reported(json_path) as output:
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
@_inputs_option
@_factory_option
@_skip_option
@_json_option
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
    with _reported(json_path) as output:
        from .cli_estimate import print_estimates, write_pictures
        from .estimator import estimate as predict
        from .plans import Plan
        from .skeleton import build_skeleton

        source, build = _module_or_path(model, factory)
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
            "context": _size(context),
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
            for file in write_pictures(picture, made, _size(vram_limit)):
                output.console.print(f"picture: [bold]{file}[/bold]", highlight=False)
        output.finish({"model": model, "estimates": [found.to_dict() for _, found in made]})


def _precisions(text: str) -> list[str]:
    if text != "all":
        return [PrecisionMode.parse(part).value for part in text.split(",")]
    return [mode.value for mode in PrecisionMode]


def _make_plan(
    source: Any,
    build: Callable[[], Any] | None,
    vram_limit: str,
    vram_buffer: str,
    inputs: tuple[str, ...],
    skip: tuple[str, ...],
    progress: bool,
    **further: Any,
) -> Any:
    from .checkpoint import plan_checkpoint
    from .planner import plan as choose

    limit = _size(vram_limit)
    options = {
        "vram_buffer": _size(vram_buffer),
        "inputs": parse_inputs(inputs),
        "skip": skip,
        "progress": progress,
        **further,
    }
    if isinstance(source, Path):
        return plan_checkpoint(source, limit, factory=build, **options)
    return choose(source, limit, **options)


@main.command()
@click.argument("model")
@_limit_option
@_buffer_option
@_inputs_option
@_factory_option
@_skip_option
@click.option("--save", "save_path", type=click.Path(dir_okay=False), help="Write the plan here.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice(["device", "host", "disk"]),
    help="Where layers may lie; repeat for each. Default: the device alone.",
)
@click.option("--host-limit", help="Limit of what lies on the host, as --vram-limit.")
@click.option(
    "--prefer",
    type=click.Choice(["quality", "balanced", "speed"]),
    default="quality",
    show_default=True,
)
@click.option("--max-quality-loss", type=float, help="Limit of the sum of the layers' errors.")
@click.option(
    "--sensitivity",
    "sensitivity_path",
    type=click.Path(exists=True, dir_okay=False),
    help="Costs of the formats, from `sensitivity --save`.",
)
@click.option("--rows", type=int, default=1, show_default=True, help="Tokens in one pass.")
@click.option(
    "--rates/--no-rates", default=True, help="Measure rates for seconds (a second or two)."
)
@click.option("--layers/--no-layers", default=True, help="Print every layer.")
@_json_option
def plan(
    model: str,
    vram_limit: str,
    vram_buffer: str,
    inputs: tuple[str, ...],
    factory: str | None,
    skip: tuple[str, ...],
    save_path: str | None,
    tiers: tuple[str, ...],
    host_limit: str | None,
    prefer: str,
    max_quality_loss: float | None,
    sensitivity_path: str | None,
    rows: int,
    rates: bool,
    layers: bool,
    json_path: str | None,
) -> None:
    """Choose the format and place of every layer so that MODEL fits and loses least."""
    with _reported(json_path) as output:
        from .sensitivity_table import Sensitivity

        source, build = _module_or_path(model, factory)
        made = _make_plan(
            source,
            build,
            vram_limit,
            vram_buffer,
            inputs,
            skip,
            output.console.is_terminal,
            sensitivity=Sensitivity.load(sensitivity_path) if sensitivity_path else None,
            tiers=tiers or ("device",),
            host_limit=_size(host_limit),
            prefer=prefer,
            max_quality_loss=max_quality_loss,
            rows=rows,
            rates=True if rates else None,
        )
        _print_plan(output.console, made, layers)
        if save_path:
            made.save(save_path)
        output.finish({**made.to_dict(), "table": made.table().to_dict()})


@main.command()
@click.argument("model")
@click.option(
    "--batch",
    "batch_paths",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A safetensors file with the inputs of one call, by name; repeat for more.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "weights", "layer", "output", "each"]),
    default="auto",
    show_default=True,
)
@click.option("--format", "formats", multiple=True, help="A format to measure; repeat for more.")
@_factory_option
@_skip_option
@click.option("--save", "save_path", type=click.Path(dir_okay=False), help="Write it here.")
@click.option("--cache/--no-cache", default=True, help="Keep and use what was measured.")
@_json_option
def sensitivity(
    model: str,
    batch_paths: tuple[str, ...],
    method: str,
    formats: tuple[str, ...],
    factory: str | None,
    skip: tuple[str, ...],
    save_path: str | None,
    cache: bool,
    json_path: str | None,
) -> None:
    """Predict what each format would cost each layer, by weights or by data."""
    with _reported(json_path) as output:
        from .planner import DEFAULT_FORMATS
        from .sensitivities import sensitivity as measure
        from .shards import Checkpoint

        source, build = _module_or_path(model, factory)
        files = [Checkpoint(path) for path in batch_paths]
        made = measure(
            source,
            [{name: file.read(name) for name in file.names()} for file in files] or None,
            formats or DEFAULT_FORMATS,
            method=method,
            skip=skip,
            factory=build,
            progress=output.console.is_terminal,
            cache=cache,
        )
        output.console.print(str(made), highlight=False, soft_wrap=True)
        for note in made.notes:
            output.console.print(note, style="dim", highlight=False)
        if save_path:
            made.save(save_path)
        output.finish(made.to_dict())


def _size(text: str | None) -> Any:
    return float(text) if text is not None and re.fullmatch(r"[0-9.]+", text) else text


def _print_modes(console: Console, made: Any) -> None:
    found = made.table()
    headers, rows = found.cells()
    table = Table(title="what is possible")
    for header in headers:
        table.add_column(header, justify="left" if header == "mode" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if made.rates is not None:
        console.print(f"rates measured in {made.rates.measuring_seconds:.1f} s", style="dim")


def _print_plan(console: Console, made: Any, layers: bool) -> None:
    _print_modes(console, made)
    if not layers:
        console.print(str(made), highlight=False)
        return
    table = Table()
    for column in ("layer", "kind", "format", "place", "before", "after", "error"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for e in made.entries:
        sizes = (format_size(e.original_bytes), format_size(e.bytes))
        table.add_row(e.name, e.kind, e.format or "plain", e.tier, *sizes, f"{e.error:.1e}")
    console.print(table)
    console.print(str(made), highlight=False)


@main.command()
@click.argument("model")
@click.argument("target", type=click.Path(file_okay=False))
@click.option("--precision", help="The precision of every layer that can be converted.")
@click.option(
    "--plan", "plan_path", type=click.Path(exists=True), help="A plan from `plan --save`."
)
@_factory_option
@_skip_option
@_json_option
def convert(
    model: str,
    target: str,
    precision: str | None,
    plan_path: str | None,
    factory: str | None,
    skip: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Convert MODEL to the folder TARGET, one tensor in memory at a time."""
    with _reported(json_path) as output:
        from .plans import Plan

        if (precision is None) == (plan_path is None):
            raise click.UsageError("give --precision or --plan")
        chosen: Any = precision
        if plan_path is not None:
            chosen = {e.name: e.format for e in Plan.load(plan_path).entries}
        data = _convert_to(model, target, chosen, factory, skip, output)
        output.finish(data)


def _convert_to(
    model: str,
    target: str,
    chosen: Any,
    factory: str | None,
    skip: tuple[str, ...],
    output: Output,
) -> dict[str, Any]:
    from .checkpoint import convert_checkpoint, save
    from .convert import convert as convert_model

    source, build = _module_or_path(model, factory)
    progress = output.console.is_terminal
    if isinstance(source, Path):
        data = convert_checkpoint(
            source, target, chosen, factory=build, skip=skip, progress=progress
        )
    else:
        report = convert_model(source, chosen, skip=skip, progress=progress)
        save(source, target, progress=progress)
        data = {"original_bytes": report.original_bytes, "converted_bytes": report.bytes}
    before, after = data["original_bytes"], data["converted_bytes"]
    output.console.print(
        f"{format_size(before)} -> {format_size(after)} in {target}", highlight=False
    )
    return {"model": model, "target": str(target), **data}


@main.command()
@click.argument("model")
@click.argument("target", type=click.Path(file_okay=False))
@_limit_option
@_buffer_option
@_inputs_option
@_factory_option
@_skip_option
@click.option("--verify/--no-verify", default=True, help="With --inputs: run the result once.")
@_json_option
def fit(
    model: str,
    target: str,
    vram_limit: str,
    vram_buffer: str,
    inputs: tuple[str, ...],
    factory: str | None,
    skip: tuple[str, ...],
    verify: bool,
    json_path: str | None,
) -> None:
    """Plan MODEL within a limit and write the converted model to the folder TARGET.

    With --inputs the result is run once, on zeros, and what that took is shown beside the estimate.
    """
    with _reported(json_path) as output:
        source, build = _module_or_path(model, factory)
        made = _make_plan(
            source, build, vram_limit, vram_buffer, inputs, skip, output.console.is_terminal
        )
        output.console.print(str(made), highlight=False)
        chosen = {e.name: e.format for e in made.entries}
        data = _convert_to(model, target, chosen, factory, (), output)
        made.save(Path(target) / "plan.json")
        data["plan"] = made.to_dict()
        if verify and inputs:
            from .checkpoint import load

            written = load(target, factory=entry_point(model) if _is_entry_point(model) else build)
            data["first_run"] = _verified(output.console, written, made, parse_inputs(inputs))
        output.finish(data)


def _verified(console: Console, model: Any, made: Any, inputs: Any) -> dict[str, Any]:
    """One call on zeros (masks are ones), measured beside the plan's estimate."""
    import torch

    from .estimator import call_arguments, model_dtype
    from .first_run import watch_first_run

    args, kwargs = call_arguments(inputs, model_dtype(model))
    found = watch_first_run(model, made, inputs)
    with torch.inference_mode():
        named = {k: torch.full_like(v, "mask" in k, device="cpu") for k, v in kwargs.items()}
        model.eval()(*(torch.zeros_like(v, device="cpu") for v in args), **named)
    console.print(str(found), highlight=False)
    return found.to_dict()


reported = _reported  # for commands in files of their own
main.add_command(bench)
main.add_command(heartmula)
main.add_command(serve)
main.add_command(qwen_image)

if __name__ == "__main__":
    main()
