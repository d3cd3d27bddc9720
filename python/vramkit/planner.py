"""Plans made: the format and place of every layer, chosen so that all fits and least is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .bnb_config import QuantizationConfig, resolve
from .convert import (
    Candidate,
    Precision,
    Progress,
    candidates,
    check_weight,
    format_in,
    progress_bar,
    reason_against,
    storage_format,
)
from .errors import VramkitError
from .estimator import estimate, model_dtype, weight_bytes
from .first_run import watch_first_run
from .formats import StorageFormat
from .placing import place_layers
from .plan_rules import Layer, Pin, Rules, Turns
from .plans import TIERS, Option, Plan, fingerprint
from .rates import Rates, measure_rates
from .sizes import parse_size
from .verification import target_of

if TYPE_CHECKING:
    from .calibration import Calibration
    from .running import Output
    from .sensitivity_table import Sensitivity

# Enough elements that a weight's error is known to well under a percent, whatever its size.
SAMPLE_ELEMENTS = 1 << 22
# What a plan chooses from by default, besides leaving a layer as it is.
DEFAULT_FORMATS = (
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "int4_g16",
    "int4_g32",
    "int4_g64",
    "int4",
    "nf4",
    "nf4_dq",
)


def weight_error(weight: torch.Tensor, fmt: StorageFormat) -> float:
    """||W - W'||^2 / ||W||^2 of storing `weight` in `fmt`, in float64 (0 for a zero weight).

    Of a large weight, evenly spaced rows of about `SAMPLE_ELEMENTS` elements stand for all. They
    are encoded and compared on the CPU, also those of a weight on a GPU: the codes are the same.
    """
    from ._operators import encode

    matrix = weight.detach().reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    rows, cols = matrix.shape
    wanted = max(1, SAMPLE_ELEMENTS // max(1, cols))
    if rows > wanted:
        matrix = matrix[torch.arange(wanted, device=matrix.device) * rows // wanted]
    # On the processor, whatever the weight's device: the bits are the same, the sample is small.
    matrix = matrix.to("cpu", torch.float32).contiguous()
    parts = encode(matrix, fmt)
    sums = torch.ops.vramkit._squared_error(
        matrix, parts.codes, parts.scales, parts.extra, fmt.table_on(matrix.device), None, fmt.spec
    )
    error, power = (float(v) for v in sums)
    return error / power if power else 0.0


@torch.no_grad()
def plan(
    model: nn.Module,
    vram_limit: int | float | str,
    *,
    vram_buffer: int | float | str = 0,
    inputs: Any = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    skip: Iterable[str] = (),
    batches: Iterable[Any] | None = None,
    output: Output | None = None,
    calibration: Calibration | None = None,
    progress: bool | Progress = False,
    sensitivity: Sensitivity | None = None,
    read_weight: Callable[[Candidate], torch.Tensor] | None = None,
    tiers: Iterable[str] = ("device",),
    host_limit: int | float | str | None = None,
    prefer: str = "quality",
    max_quality_loss: float | None = None,
    pin: Mapping[str, Pin] | None = None,
    rules: Mapping[str, Iterable[Precision | None]] | None = None,
    turns: Iterable[str] | Mapping[str, int] = (),
    activations: int | float | str | Mapping[str, int | float | str] | None = None,
    rates: Rates | bool | None = None,
    rows: int = 1,
    slots: int = 2,
    device: str | torch.device | None = None,
) -> Plan:
    """Choose the format, and if asked the place, of every layer: all fits and the least is lost.

    Args:
        model: The module to plan for; it is only read.
        vram_limit: The limit: a number of GiB, or text such as "6 GB" or "512 MiB".
        vram_buffer: Kept free within the limit.
        inputs: One call's inputs, for the estimate of the peak (see `estimate`).
        formats: What to choose from, besides leaving a layer as it is.
        skip: Layers to leave plain, as in `convert`.
        batches: Data like that of later use, to measure on: a layer then counts by the error of the
            model's output with this layer alone stored, as `vramkit.sensitivity` measures it by
            "output". A few passes for each layer; some hundred samples will do.
        output: What of the model's result is the output, as for `vramkit.compare`.
        calibration: A `Calibration` collected on this model, if `apply` will be given it: what is
            measured is then rounded by it.
        sensitivity: What `vramkit.sensitivity` found of this model, instead of batches.
        progress: True for a progress bar over the bytes analysed (with batches, after one over the
            layers measured).
        read_weight: Gives a layer's weight where the model has none in memory.
        tiers: Where layers may lie: "device", and streamed in every pass "host" and "disk".
        host_limit: Bounds what lies on the host; None: all that is asked for.
        prefer: "quality": the least sum of errors, then the least time. "balanced": the least
            loss / L + seconds / T, with L the loss of every layer at its smallest and T the seconds
            of the model as it is, all on the device. "speed": the same with loss / L / 100.
        max_quality_loss: The sum of errors may not exceed this.
        pin: By name or pattern, what is settled: a format, a place ("device", "host", "disk"),
            None (as it is), or (format, place).
        rules: By name or pattern, the formats to choose from there; None in them: as it is. The
            first that matches holds.
        turns: Submodules that take turns on the device, with the passes of each (1 if not said);
            every layer must be in one. The host (or the disk) holds those that wait.
        activations: Bytes of the call's own memory, for all or by turn; counts within the limit.
        rates: The time model's rates; True: `measure_rates`; None: that, where they are needed.
        rows: Rows of input that a layer sees in one pass (tokens, pixels), for its arithmetic.
        slots: Slots for streamed layers, each as large as the largest of its phase.
        device: Where the model will compute: "cpu", "cuda"; None: where it is.

    The sum over layers of the relative squared errors is minimized exactly: a multiple-choice
    knapsack, solved natively with byte-exact sizes (docs/planning.md). On a CPU the limit bounds
    the weights (and `activations`, if given); on CUDA, weights and the call's own memory together.

    Raises BudgetError, which says the smallest limit that would do, if nothing fits.
    """
    limit, buffer = parse_size(vram_limit), parse_size(vram_buffer)
    if max_quality_loss == float("inf"):
        max_quality_loss = None
    places = _places(tiers, prefer, max_quality_loss)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows is a number of rows from 1 on, got {rows!r}")
    found, left_out = candidates(model, skip)
    if sensitivity is not None:
        sensitivity.check_model(candidates(model)[0])
        formats = sensitivity.chosen(formats)
    chosen = [storage_format(f) for f in formats]
    original = sum(c.original_bytes for c in found)
    settled = Rules.of(found, chosen, pin or {}, rules or {}, places)
    parts = Turns.of(model, found, turns, activations)
    peak = activations is not None
    from .offload.device import SeparateDevice, device_for

    on = device_for(device)
    target = on.target() if isinstance(on, SeparateDevice) else target_of(model)
    if inputs is not None and not peak and target != "cpu":
        call = estimate(model, inputs=inputs, target=target)
        parts.add_activations(call.activations_bytes or 0)
        peak = True
    if batches is not None:
        if read_weight is not None:
            raise ValueError(
                "batches= needs the model's weights in memory; measure a checkpoint with "
                "vramkit.sensitivity(path, batches), and give sensitivity="
            )
        if sensitivity is not None:
            raise ValueError("give batches or sensitivity, not both")
        sensitivity = _measured(
            model, found, settled, batches, output, calibration, progress=progress
        )
    elif calibration is not None or output is not None:
        raise ValueError(
            "calibration= and output= say how to measure on batches=, which is missing"
        )
    cost: Cost = _weight_cost if sensitivity is None else sensitivity.costs()
    layers: list[Layer] = []
    with progress_bar(progress, original * len(chosen), "analyse") as advance:
        for candidate in found:
            weight = read_weight(candidate) if read_weight else candidate.weight
            check_weight(candidate.name, weight, storage_format("bf16"))
            options = _choices(candidate, weight, settled.analysed(candidate), cost, advance)
            del weight  # before the next one is read
            layers.append(settled.layer(candidate, options, parts.component_of(candidate.name)))
    simple = places == ("device",) and prefer == "quality" and len(parts.names) == 1
    if rates is True or (rates is None and not simple):
        if target != "cpu":
            raise ValueError(
                "rates are measured on processors only: give this device's with rates=Rates(...)"
            )
        names = {o.format for layer in layers for o in layer.options if o.format is not None}
        rates = measure_rates(tuple(sorted(names)), model_dtype(model), disk="disk" in places)
    elif rates is False:
        rates = None
    host = None if host_limit is None else parse_size(host_limit)
    pages = _page_bytes(limit, on.segment(original), len(found), slots, parts, places)
    answer = place_layers(
        layers,
        parts,
        limit - buffer - pages,
        buffer=buffer + pages,
        places=places,
        host_limit=host,
        prefer=prefer,
        max_loss=max_quality_loss,
        rates=rates,
        rows=rows,
        slots=slots,
        simple=simple,
    )
    made = Plan(
        entries=answer.entries,
        limit_bytes=limit,
        buffer_bytes=buffer,
        fixed_bytes=weight_bytes(model) - original,
        fingerprint=fingerprint(candidates(model)[0]),
        bound="peak" if peak else "weights",
        optimal=answer.optimal,
        gap=answer.gap,
        formats=[fmt.name for fmt in chosen],
        left_out=left_out,
        prefer=prefer,
        tiers=places,
        slots=slots,
        rows=rows,
        max_quality_loss=max_quality_loss,
        host_limit_bytes=host,
        host_bytes=answer.host_bytes,
        phases=answer.phases,
        rates=rates,
    )
    if inputs is not None:
        by_name: Mapping[str, Precision | None] = {e.name: e.format for e in made.entries}
        made.estimate = estimate(model, by_name, inputs, target=target)
    return made


def _places(tiers: Iterable[str], prefer: str, max_quality_loss: float | None) -> tuple[str, ...]:
    asked = (tiers,) if isinstance(tiers, str) else tuple(tiers)
    unknown = [tier for tier in asked if tier not in TIERS]
    if unknown or not asked:
        raise ValueError(f"tiers are some of {', '.join(TIERS)}, not {asked!r}")
    if prefer not in ("quality", "balanced", "speed"):
        raise ValueError(f"prefer is 'quality', 'balanced' or 'speed', not {prefer!r}")
    if max_quality_loss is not None and not max_quality_loss >= 0:  # NaN too
        raise ValueError(f"max_quality_loss must be 0 or more, got {max_quality_loss!r}")
    return tuple(tier for tier in TIERS if tier in asked)


# Below this limit a plan counts bytes alone: whole pages would be most of it.
_SMALL_LIMIT = 1 << 20


def _page_bytes(
    limit: int,
    large: int,
    layers: int,
    slots: int,
    parts: Turns,
    places: tuple[str, ...],
) -> int:
    """What slots, and residents of components that take turns, take beyond their bytes.

    `large` is what the engine takes of memory at once.
    """
    from .offload.places import PAGE

    turns = len(parts.names) > 1
    if limit < _SMALL_LIMIT or (places == ("device",) and not turns):
        return 0
    return large * (2 if turns else 1) + 2 * PAGE * slots + (2 * PAGE * layers if turns else 0)


# None: the layer cannot have the format.
Cost = Callable[[Candidate, torch.Tensor, StorageFormat], float | None]


def _weight_cost(candidate: Candidate, matrix: torch.Tensor, fmt: StorageFormat) -> float | None:
    return weight_error(matrix, fmt)


def _measured(
    model: nn.Module,
    found: Sequence[Candidate],
    settled: Rules,
    batches: Iterable[Any],
    output: Output | None,
    calibration: Calibration | None,
    *,
    progress: bool | Progress,
) -> Sensitivity:
    """What the layers cost by data, in the formats that rules and pins leave to each."""
    from .running import checked
    from .sensitivities import measure_sensitivity
    from .sensitivity_store import store_for

    return measure_sensitivity(
        model,
        found,
        {candidate.name: settled.analysed(candidate) for candidate in found},
        list(checked(batches)),
        method="output",
        output=output,
        calibration=calibration,
        progress=progress,
        store=store_for(True),
    )


def _choices(
    candidate: Candidate,
    weight: torch.Tensor,
    formats: Sequence[StorageFormat],
    cost: Cost,
    advance: Any,
) -> list[Option]:
    """Leaving the layer as it is, and every format that makes it smaller."""
    options = [Option(None, candidate.original_bytes, 0.0)]
    matrix = weight.reshape(candidate.matrix_shape)
    for asked in formats:
        if reason_against(candidate, asked) is not None:
            advance(candidate.original_bytes, candidate.name)
            continue
        fmt = format_in(candidate, asked)
        size = fmt.bytes(matrix.shape).total
        if size < candidate.original_bytes:
            try:
                check_weight(candidate.name, weight, fmt)
            except VramkitError:
                advance(candidate.original_bytes, candidate.name)
                continue  # this format cannot hold the weight; the others are still offered
            error = cost(candidate, matrix, fmt)
            if error is not None:
                options.append(Option(fmt.name, size, error))
        advance(candidate.original_bytes, candidate.name)
    return options


def fit(
    model: nn.Module,
    vram_limit: int | float | str,
    *,
    vram_buffer: int | float | str = 0,
    inputs: Any = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
    verify: bool = True,
    precision: Precision | QuantizationConfig | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> nn.Module:
    """Plan and convert in one step: `model`, changed in place so that it fits; see `plan`.

    On a GPU (`device`) what the plan does not stream is moved there.

    The plan stays readable as ``model.vramkit_plan``. With `verify` the first call without
    gradients is measured (it takes a little longer): ``print(model.vramkit_first_run)`` then shows
    what it took beside the estimate and the limit. A call that takes more than the limit, or over
    5 % off the estimate made for its shapes, is warned of. `options` are further ones of `plan`.

    With a `precision` (or transformers' `BitsAndBytesConfig`, or an object with its fields) that is
    the one format offered, in place of `formats`: layers stay plain as far as the limit lets them.
    """
    wanted, skip, request = resolve(precision, skip)
    if precision is not None:
        formats = (wanted,)
    made = plan(
        model,
        vram_limit,
        vram_buffer=vram_buffer,
        inputs=inputs,
        formats=formats,
        skip=skip,
        progress=progress,
        device=device,
        **options,
    )
    call = inputs if len(made.phases) < 2 else None
    made.apply(model, progress=progress, inputs=call, device=device)
    if request is not None:
        request.finish(model)
    object.__setattr__(model, "vramkit_plan", made)
    if verify:
        object.__setattr__(model, "vramkit_first_run", watch_first_run(model, made, inputs))
    return model
