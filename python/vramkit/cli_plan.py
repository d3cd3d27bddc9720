"""`vramkit plan | sensitivity | convert | fit`: choosing formats and writing what was chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .cli_common import (
    Output,
    buffer_option,
    entry_point,
    factory_option,
    inputs_option,
    is_entry_point,
    json_option,
    limit_option,
    module_or_path,
    parse_inputs,
    reported,
    size_option_value,
    skip_option,
)
from .sizes import format_size


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

    limit = size_option_value(vram_limit)
    options = {
        "vram_buffer": size_option_value(vram_buffer),
        "inputs": parse_inputs(inputs),
        "skip": skip,
        "progress": progress,
        **further,
    }
    if isinstance(source, Path):
        return plan_checkpoint(source, limit, factory=build, **options)
    return choose(source, limit, **options)


@click.command()
@click.argument("model")
@limit_option
@buffer_option
@inputs_option
@factory_option
@skip_option
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
@json_option
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
    with reported(json_path) as output:
        from .sensitivity_table import Sensitivity

        source, build = module_or_path(model, factory)
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
            host_limit=size_option_value(host_limit),
            prefer=prefer,
            max_quality_loss=max_quality_loss,
            rows=rows,
            rates=True if rates else None,
        )
        _print_plan(output.console, made, layers)
        if save_path:
            made.save(save_path)
        output.finish({**made.to_dict(), "table": made.table().to_dict()})


@click.command()
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
@factory_option
@skip_option
@click.option("--save", "save_path", type=click.Path(dir_okay=False), help="Write it here.")
@click.option("--cache/--no-cache", default=True, help="Keep and use what was measured.")
@json_option
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
    with reported(json_path) as output:
        from .planner import DEFAULT_FORMATS
        from .sensitivities import sensitivity as measure
        from .shards import Checkpoint

        source, build = module_or_path(model, factory)
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


@click.command()
@click.argument("model")
@click.argument("target", type=click.Path(file_okay=False))
@click.option("--precision", help="The precision of every layer that can be converted.")
@click.option(
    "--plan", "plan_path", type=click.Path(exists=True), help="A plan from `plan --save`."
)
@factory_option
@skip_option
@json_option
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
    with reported(json_path) as output:
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

    source, build = module_or_path(model, factory)
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


@click.command()
@click.argument("model")
@click.argument("target", type=click.Path(file_okay=False))
@limit_option
@buffer_option
@inputs_option
@factory_option
@skip_option
@click.option("--verify/--no-verify", default=True, help="With --inputs: run the result once.")
@json_option
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
    with reported(json_path) as output:
        source, build = module_or_path(model, factory)
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

            written = load(target, factory=entry_point(model) if is_entry_point(model) else build)
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
