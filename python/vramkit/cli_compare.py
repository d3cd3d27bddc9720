"""`vramkit compare A B`: two models, two sounds or two images, and what the second one lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from .cli_common import Output, entry_point, is_entry_point, parse_inputs, reported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .media_quality import ImageComparison, SoundComparison
    from .quality import Comparison
    from .weight_comparison import WeightComparison


@click.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module of models that do not say what they are, to run them.",
)
@click.option(
    "--inputs",
    multiple=True,
    metavar="[NAME=]2x128[:int64]",
    help="Shape of one input: also run both models, on random values; repeat for each.",
)
@click.option(
    "--batch",
    "batch_paths",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A safetensors file with the inputs of one call, by name: run both; repeat for more.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random inputs.")
@click.option("--per-layer", is_flag=True, help="Of models that are run: errors by layer too.")
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Of models: how many tensors to print.",
)
@click.option(
    "--max-lag",
    type=float,
    default=1.0,
    show_default=True,
    help="Of sounds: seconds of delay that alignment looks for.",
)
@click.option("--report", type=click.Path(dir_okay=False), help="Write an HTML page.")
@click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout."
)
def compare(
    first: str,
    second: str,
    factory: str | None,
    inputs: tuple[str, ...],
    batch_paths: tuple[str, ...],
    seed: int,
    per_layer: bool,
    worst: int,
    max_lag: float,
    report: str | None,
    json_path: str | None,
) -> None:
    """Compare B with the reference A: two models, two WAV files, or two images.

    Models are checkpoint folders, safetensors files or entry points package.module:function; their
    weights are compared tensor by tensor. With --inputs or --batch both are run, one after the
    other, and their outputs are compared too.
    """
    with reported(json_path) as output:
        from .media_files import kind_of

        kinds = kind_of(first), kind_of(second)
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{first} is {_a(kinds[0])} and {second} is {_a(kinds[1])}: give two of a kind"
            )
        models_only = factory or inputs or batch_paths or per_layer
        if kinds[0] != "model" and models_only:
            raise click.UsageError(
                f"--factory, --inputs, --batch and --per-layer are for models, not {kinds[0]}s"
            )
        if inputs and batch_paths:
            raise click.UsageError("give --inputs or --batch, not both")
        labels = first, second
        if kinds[0] == "sound":
            found = _sounds(output, labels, max_lag, report)
        elif kinds[0] == "image":
            found = _images(output, labels, report)
        else:
            batches = _Batches(inputs, batch_paths, seed)
            found = _models(output, labels, factory, batches, per_layer, worst, report)
        if report is not None:
            output.console.print(f"report: [bold]{report}[/bold]", highlight=False)
        output.finish({"reference": first, "other": second, **found})


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _page(path: str, labels: tuple[str, str], sections: list[tuple[str, str]], lead: str) -> None:
    from .report.html import page, write_text
    from .report.media import STYLE

    title = f"{Path(labels[1]).name} against {Path(labels[0]).name}"
    write_text(path, page(title, sections, lead=lead, style=STYLE))


def _print_rows(output: Output, rows: list[tuple[str, ...]], heads: tuple[str, ...]) -> None:
    table = Table()
    for column, head in enumerate(heads):
        table.add_column(head, justify="right" if column else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    output.console.print(table)


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "same" if value == float("inf") else f"{value:.2f} dB"


# --- sounds and images ---------------------------------------------------------------------------


def _sounds(
    output: Output, labels: tuple[str, str], max_lag: float, report: str | None
) -> dict[str, Any]:
    from .media_files import read_wav
    from .media_quality import compare_sounds

    a, b = read_wav(labels[0]), read_wav(labels[1])
    if a.sample_rate != b.sample_rate:
        raise ValueError(
            f"the sample rates differ: {labels[0]} has {a.sample_rate} Hz, {labels[1]} "
            f"{b.sample_rate} Hz; bring both to one rate first (ffmpeg -i FILE -ar "
            f"{a.sample_rate} OUT.wav)"
        )
    found = compare_sounds(a.samples, b.samples, a.sample_rate, max_lag=max_lag)
    rows = _sound_rows(found)
    heads = ("", "as they are", "aligned")
    _print_rows(output, rows, heads)
    output.console.print(_sound_notes(found), highlight=False)
    if report is not None:
        from .report.html import table
        from .report.media import sound_pair

        beside = sound_pair(a.samples, b.samples, a.sample_rate, labels)
        sections = [("Figures", table(heads, rows)), ("Beside each other", beside)]
        _page(report, labels, sections, _sound_notes(found))
    return found.to_dict()


def _sound_rows(found: SoundComparison) -> list[tuple[str, ...]]:
    def distance(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} dB"

    return [
        ("SNR", _decibels(found.snr_db), _decibels(found.aligned_snr_db)),
        (
            "log-spectral distance",
            distance(found.log_spectral_distance_db),
            distance(found.aligned_log_spectral_distance_db),
        ),
        (
            "samples",
            f"{found.reference_samples} and {found.samples}",
            str(found.aligned_samples),
        ),
    ]


def _sound_notes(found: SoundComparison) -> str:
    lag = found.lag_samples
    late = "no delay" if not lag else f"{abs(lag)} samples {'later' if lag > 0 else 'earlier'}"
    return (
        f"{found.sample_rate} Hz, {found.channels} channel{'s' if found.channels > 1 else ''}; "
        f"levels {found.reference_level_db:.1f} and {found.level_db:.1f} dB; {late} "
        f"({lag / found.sample_rate:+.4f} s), correlation {found.correlation:.4f}"
    )


def _images(output: Output, labels: tuple[str, str], report: str | None) -> dict[str, Any]:
    from .media_files import read_image, same_channels
    from .media_quality import compare_images

    a, b = same_channels(read_image(labels[0]), read_image(labels[1]))
    found = compare_images(a, b)
    rows = _image_rows(found)
    _print_rows(output, rows, ("", f"{found.width} x {found.height}"))
    if report is not None:
        from .report.html import table
        from .report.media import image_pair

        plain: tuple[Tensor, Tensor] = (_unit(a), _unit(b))
        beside = image_pair(*plain, labels)
        sections = [("Figures", table(("", "value"), rows)), ("Beside each other", beside)]
        _page(report, labels, sections, str(found))
    return found.to_dict()


def _unit(image: Tensor) -> Tensor:
    import torch

    return image.float() / (65535 if image.dtype == torch.uint16 else 255)


def _image_rows(found: ImageComparison) -> list[tuple[str, ...]]:
    return [
        ("PSNR", _decibels(found.psnr_db)),
        ("SSIM", f"{found.ssim:.6f}"),
        ("relative L2", f"{found.relative_l2:.4g}"),
        ("largest difference", f"{found.max_error:.4g}"),
        ("pixels that differ", f"{found.different_fraction:.2%}"),
    ]


# --- models --------------------------------------------------------------------------------------


class _Batches:
    """The inputs that both models are run on: from files, or random ones of given shapes."""

    def __init__(self, inputs: tuple[str, ...], paths: tuple[str, ...], seed: int) -> None:
        self.shapes, self.paths, self.seed = parse_inputs(inputs), paths, seed
        self.notes: list[str] = []
        self._made: list[Any] | None = None

    def __bool__(self) -> bool:
        return self.shapes is not None or bool(self.paths)

    def of(self, model: nn.Module) -> list[Any]:
        """The batches; random ones are made for the first model that asks."""
        if self._made is None:
            if self.paths:
                from .tensor_files import load_file

                self._made = [load_file(path) for path in self.paths]
            else:
                self._made = [self._random(model)]
        return self._made

    def _random(self, model: nn.Module) -> Any:
        """Normal values; masks are ones, tokens are below the vocabulary's size."""
        import torch

        from .estimator import call_arguments, model_dtype

        args, kwargs = call_arguments(self.shapes, model_dtype(model))
        generator = torch.Generator().manual_seed(self.seed)

        def fill(value: Tensor, name: str) -> Tensor:
            if value.is_floating_point():
                made = torch.randn(value.shape, generator=generator).to(value.dtype)
                self.notes.append(f"{name or 'an input'}: random normal values")
            elif "mask" in name:
                made = torch.ones(value.shape, dtype=value.dtype)
                self.notes.append(f"{name}: ones")
            else:
                below = _vocabulary(model) if name in ("", "input_ids", "input") else 1
                made = torch.randint(below, value.shape, generator=generator).to(value.dtype)
                what = f"random integers below {below}" if below > 1 else "zeros"
                self.notes.append(f"{name or 'an input'}: {what}")
            return made

        if kwargs:
            return {name: fill(value, name) for name, value in kwargs.items()}
        return tuple(fill(value, "") for value in args)


def _vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows: its input embedding's rows, or the largest embedding's."""
    from torch import nn

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=2)


def _models(
    output: Output,
    labels: tuple[str, str],
    factory: str | None,
    batches: _Batches,
    per_layer: bool,
    worst: int,
    report: str | None,
) -> dict[str, Any]:
    from .weight_comparison import compare_weights

    if per_layer and not batches:
        raise click.UsageError("--per-layer runs the models: give --inputs or --batch")
    build = entry_point(factory) if factory else None
    for label in labels:
        if batches and build is None and Path(label).is_file():
            raise ValueError(f"{label} holds weights only: say what model they are with --factory")
    sources = [entry_point(label)() if is_entry_point(label) else label for label in labels]
    weights = compare_weights(sources[0], sources[1])
    _print_weights(output, weights, worst)
    data: dict[str, Any] = weights.to_dict() | {"kind": "model"}
    outputs = None
    if batches:
        outputs = _run(sources, build, batches, per_layer)
        output.console.print(f"[bold]outputs:[/bold] {outputs}", highlight=False)
        for note in batches.notes:
            output.console.print(note, style="dim", highlight=False)
        data["outputs"] = outputs.to_dict() | {"inputs": batches.notes}
    if report is not None:
        _page(report, labels, _model_sections(weights, outputs), str(weights))
    return data


def _run(
    sources: list[Any],
    build: Callable[[], nn.Module] | None,
    batches: _Batches,
    per_layer: bool,
) -> Comparison:
    """The second model's outputs against the first one's; one of them is in memory at a time."""
    from .checkpoint import load
    from .quality import compare as compare_outputs
    from .quality import record

    def module(source: Any) -> Any:
        return (load(source, factory=build) if isinstance(source, str) else source).eval()

    reference = module(sources[0])
    kept = record(reference, batches.of(reference), per_layer=per_layer)
    del reference
    model = module(sources[1])
    return compare_outputs(kept, model, batches.of(model), per_layer=per_layer)


_HEADS = ("tensor", "shape", "A", "B", "bytes of A", "bytes of B", "relative L2", "cosine")


def _weight_rows(tensors: list[Any]) -> list[tuple[str, ...]]:
    from .sizes import format_size

    return [
        (
            t.name,
            "x".join(map(str, t.shape)),
            t.formats[0],
            t.formats[1],
            format_size(t.bytes[0]),
            format_size(t.bytes[1]),
            f"{t.relative_l2:.4g}",
            f"{t.cosine:.6f}",
        )
        for t in tensors
    ]


def _print_weights(output: Output, weights: WeightComparison, worst: int) -> None:
    shown = weights.worst(worst)
    if shown:
        _print_rows(output, _weight_rows(shown), _HEADS)
    else:
        output.console.print("every tensor that both have is the same", highlight=False)
    output.console.print(f"[bold]weights:[/bold] {weights}", highlight=False)
    for name, reason in weights.left_out[:worst]:
        output.console.print(f"  {name}: {reason}", style="dim", highlight=False, markup=False)


def _model_sections(weights: WeightComparison, outputs: Comparison | None) -> list[tuple[str, str]]:
    from .report.html import _error_section, table

    def wide(content: str) -> str:
        return f'<div class="wide">{content}</div>'

    sections = [("Tensors that differ most", wide(table(_HEADS, _weight_rows(weights.worst(20)))))]
    if outputs is not None:
        sections.append(("Outputs", _error_section(outputs)))
    sections.append(("All tensors", wide(table(_HEADS, _weight_rows(weights.tensors)))))
    if weights.left_out:
        sections.append(("Left out", wide(table(("tensor", "reason"), weights.left_out))))
    return sections
