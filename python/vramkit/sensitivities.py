"""`vramkit.sensitivity`: what each format would cost each layer, by weights, layers, the output."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .candidates import Candidate
from .convert import (
    Precision,
    Progress,
    candidates,
    check_weight,
    format_in,
    progress_bar,
    reason_against,
    storage_format,
)
from .errors import CheckpointError, NonFiniteWeightError
from .formats import StorageFormat
from .planner import DEFAULT_FORMATS, weight_error
from .plans import fingerprint
from .running import Output, checked
from .sensitivity_store import Store, digest_of, store_for
from .sensitivity_table import METHODS, LayerSensitivity, Sensitivity

if TYPE_CHECKING:
    from .calibration import Calibration

Source = nn.Module | str | os.PathLike[str]


@torch.no_grad()
def sensitivity(
    model_or_checkpoint: Source,
    batches: Iterable[Any] | None = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    *,
    method: str = "auto",
    output: Output | None = None,
    calibration: Calibration | None = None,
    skip: Iterable[str] = (),
    factory: Callable[[], nn.Module] | None = None,
    progress: bool | Progress = False,
    cache: bool | str | os.PathLike[str] | None = True,
) -> Sensitivity:
    """Predict, for each layer and format, the error that storing it would add to the output.

    Args:
        model_or_checkpoint: A module (only read), a checkpoint folder, or a safetensors file with
            `factory`. A checkpoint is streamed by "weights" and "layer" (the parameters of one
            module at a time in memory) and loaded whole by the other methods.
        batches: Data like that of later use, as for `vramkit.compare`. None: "weights".
        formats: What to measure.
        method: "weights": ||W - W'||^2 / ||W||^2 of each weight, without data. "layer":
            ||f(x; W') - f(x; W)||^2 / ||f(x; W)||^2 of each layer's output on its own inputs, all
            formats in one pass of the model. "output": the error of the model's output with the
            layer in the coarsest format of each group (integers of 4 bits, of 8, and grids of
            floats), times what "layer" says of a format against that one: a loss linear in the
            layers' errors (Malinovskii et al. 2024, arXiv 2411.17525). "each": the error of the
            model's output for every layer and format. "auto": "weights" without batches, "layer"
            for a checkpoint, "output" for a module.
        output: What of the model's result is the output, as for `vramkit.compare`.
        calibration: A `Calibration` of this model: weights are rounded by it.
        skip: Layers to leave out.
        factory: Builds the module of a checkpoint without config.json.
        progress: True for a progress bar, or a function of (done, of how many, layer name).
        cache: Where figures are kept as they are measured, by the content of all they depend on,
            so that an interrupted call goes on: True for the user's cache folder, a folder, or
            None for nowhere.

    Raises ValueError for no batches, unknown formats or methods, CalibrationError where outputs are
    not finite or a weight is computed in the forward pass, CheckpointError for an unsound
    checkpoint. The model is left as it was.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
    >>> found = vramkit.sensitivity(model, formats=["int8", "int4"], cache=None)
    >>> found.layer("0").errors["int8"] < found.layer("0").errors["int4"]
    True
    """
    start = time.perf_counter()
    chosen = [storage_format(f) for f in _list_of(formats)]
    given = None if batches is None else list(checked(batches))
    by = _method(method, model_or_checkpoint, given, output, calibration)
    store = store_for(cache)
    model, read = _opened(model_or_checkpoint, factory, whole=by in ("output", "each"))
    found, _ = candidates(model, skip)
    made = measure_sensitivity(
        model,
        found,
        {c.name: chosen for c in found},
        given,
        method=by,
        output=output,
        calibration=calibration,
        progress=progress,
        store=store,
        read=read,
    )
    made.fingerprint = fingerprint(candidates(model)[0])
    made.formats = list(dict.fromkeys(fmt.name for fmt in chosen))
    made.seconds = time.perf_counter() - start
    return made


def _list_of(formats: Iterable[Precision]) -> list[Precision]:
    if isinstance(formats, (str, StorageFormat)):
        raise TypeError(f"formats is a list of formats, not one; write [{formats!r}]")
    asked = list(formats)
    if not asked:
        raise ValueError("no formats to measure")
    return asked


def _method(
    method: str,
    source: Source,
    batches: list[Any] | None,
    output: Output | None,
    calibration: Calibration | None,
) -> str:
    if method == "auto":
        if batches is None:
            method = "weights"
        else:
            method = "output" if isinstance(source, nn.Module) else "layer"
    if method not in METHODS:
        raise ValueError(f"method is auto, {', '.join(METHODS)}; got {method!r}")
    if method == "weights" and batches is not None:
        raise ValueError('method "weights" takes no data; leave batches out')
    if method != "weights" and batches is None:
        raise ValueError(f"method {method!r} measures on batches=, which is missing")
    if output is not None and method not in ("output", "each"):
        raise ValueError(f"output= says what to measure; method {method!r} never looks at it")
    if calibration is not None and method == "weights":
        raise ValueError("calibration= says how to round what is measured on batches=")
    return method


def _opened(
    source: Source, factory: Callable[[], nn.Module] | None, whole: bool
) -> tuple[nn.Module, Callable[[Candidate | str], Tensor] | None]:
    """The module, and how to read its weights where they stay in the checkpoint."""
    if isinstance(source, nn.Module):
        if factory is not None:
            raise ValueError("factory= builds the module of a checkpoint; this is a module")
        return source, None
    from .checkpoint import _FreedMemory, _read_weight, load
    from .shards import Checkpoint
    from .skeleton import MANIFEST, build_skeleton, match_names, set_tensor

    if (Path(source) / MANIFEST).is_file():
        raise CheckpointError(f"{source} is converted already; measure its source")
    if whole:
        return load(source, factory=factory), None
    model = build_skeleton(source, factory)
    checkpoint = Checkpoint(source)
    places = match_names(model, checkpoint)
    for name, _ in list(model.named_buffers()):
        if name in places:
            set_tensor(model, name, checkpoint.read(places[name]))
    freed = _FreedMemory()

    def read(what: Candidate | str) -> Tensor:
        freed.count(freed.EVERY)  # what was read before
        if isinstance(what, str):
            return checkpoint.read(places[what])
        return _read_weight(what, checkpoint, places)[0]

    return model, read


def measure_sensitivity(
    model: nn.Module,
    found: Sequence[Candidate],
    formats: Mapping[str, Sequence[StorageFormat]],
    batches: list[Any] | None,
    *,
    method: str,
    output: Output | None = None,
    calibration: Calibration | None = None,
    progress: bool | Progress = False,
    store: Store | None = None,
    read: Callable[[Candidate | str], Tensor] | None = None,
) -> Sensitivity:
    """As `sensitivity`, of these layers in these formats of each."""
    offered = {c.name: _offered(c, formats[c.name]) for c in found}
    count = 1 if batches is None else len(batches)
    steps = {"weights": 1, "layer": count, "output": count + 1, "each": 1}[method]
    unreached: list[str] = []
    with progress_bar(progress, len(found) * steps, "sensitivity", unit="layer") as advance:
        if method == "weights":
            errors = _by_weights(found, offered, store, read, advance)
        elif method == "each":
            from .output_errors import OutputErrors

            assert batches is not None
            outputs = OutputErrors(model, batches, output, calibration, store)
            errors = {}
            for candidate in found:
                weight, name = candidate.weight, candidate.name
                held = [f for f in offered[name] if _holds(name, weight, f)]
                errors[name] = {f.name: outputs.of(candidate, f) for f in held}
                advance(1, name)
        else:
            errors, unreached = _by_data(
                model, found, offered, batches or [], method, output, calibration, store, read,
                advance,
            )  # fmt: skip
    layers = [
        LayerSensitivity(
            c.name,
            c.kind,
            tuple(c.shape),
            {f: e for f, e in errors[c.name].items() if math.isfinite(e)},
        )
        for c in found
    ]
    made = Sensitivity(method, [], layers, "", batches=0 if batches is None else len(batches))
    made.unreached = unreached
    if store is not None:
        made.measured, made.reused, made.notes = store.measured, store.found, store.notes
    else:
        made.measured = sum(len(layer.errors) for layer in layers)
    return made


def _offered(candidate: Candidate, formats: Sequence[StorageFormat]) -> list[StorageFormat]:
    """The formats that make the layer smaller, as it would be stored."""
    offered: dict[str, StorageFormat] = {}
    for asked in formats:
        if reason_against(candidate, asked) is None:
            fmt = format_in(candidate, asked)
            if fmt.bytes(candidate.matrix_shape).total < candidate.original_bytes:
                offered[fmt.name] = fmt
    return list(offered.values())


def _holds(name: str, weight: Tensor, fmt: StorageFormat) -> bool:
    """Whether `fmt` can hold the weight; NonFiniteWeightError where none can."""
    try:
        check_weight(name, weight, fmt)
    except NonFiniteWeightError:
        check_weight(name, weight, storage_format("bf16"))
        return False
    return True


def _by_weights(
    found: Sequence[Candidate],
    offered: Mapping[str, Sequence[StorageFormat]],
    store: Store | None,
    read: Callable[[Candidate | str], Tensor] | None,
    advance: Callable[[int, str], None],
) -> dict[str, dict[str, float]]:
    from . import __version__

    errors: dict[str, dict[str, float]] = {}
    for candidate in found:
        name, shape = candidate.name, candidate.matrix_shape
        weight = read(candidate) if read is not None else candidate.weight
        matrix = weight.detach().reshape(shape)
        content = digest_of(matrix) if store is not None else ""
        errors[name] = {}
        for fmt in offered[name]:
            if not _holds(name, weight, fmt):
                continue
            key = digest_of("weights", __version__, content, fmt)
            known = store.get(key, 1) if store is not None else None
            if known is None:
                known = [weight_error(matrix, fmt)]
                if store is not None:
                    store.put(key, known)
            errors[name][fmt.name] = known[0]
        del weight, matrix  # before the next one is read
        advance(1, name)
    return errors


def _by_data(
    model: nn.Module,
    found: Sequence[Candidate],
    offered: Mapping[str, Sequence[StorageFormat]],
    batches: list[Any],
    method: str,
    output: Output | None,
    calibration: Calibration | None,
    store: Store | None,
    read: Callable[[Candidate | str], Tensor] | None,
    advance: Callable[[int, str], None],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    from .layer_errors import layer_errors, warn_unreached
    from .output_errors import OutputErrors

    outputs = None
    if method == "output":  # first, for it finds fault with the batches at once
        outputs = OutputErrors(model, batches, output, calibration, store)
    local = layer_errors(
        model, found, offered, batches,
        calibration=calibration, store=store, read=read, advance=advance,
    )  # fmt: skip
    if outputs is None:
        warn_unreached(local.unreached)
        missing = [c for c in found if c.name in local.unreached]
        stand_in = _by_weights(missing, offered, store, read, lambda n, name: None)
        return local.errors | stand_in, local.unreached
    errors = {}
    for candidate in found:
        name = candidate.name
        errors[name] = _scaled(
            candidate, offered[name], local.errors[name], outputs, name in local.unreached
        )
        advance(1, name)
    return errors, local.unreached


def group_of(fmt: StorageFormat) -> tuple[str, int]:
    """What errs alike: integers of as many bits, or grids of floats (FP8, NF4, 16 bit)."""
    return ("affine", fmt.bits) if fmt.family == "affine" else ("float", 0)


def _scaled(
    candidate: Candidate,
    offered: Sequence[StorageFormat],
    local: Mapping[str, float],
    outputs: Any,
    unreached: bool,
) -> dict[str, float]:
    """The output's error measured once for each group of formats, and scaled within it."""
    groups: dict[tuple[str, int], list[StorageFormat]] = {}
    for fmt in offered:
        if unreached or fmt.name in local:
            groups.setdefault(group_of(fmt), []).append(fmt)
    errors: dict[str, float] = {}
    for members in groups.values():
        if unreached:
            errors |= {fmt.name: 0.0 for fmt in members}
            continue
        finite = [fmt for fmt in members if math.isfinite(local[fmt.name])]
        if not finite:
            continue
        coarsest = max(finite, key=lambda fmt: local[fmt.name])
        whole, part = outputs.of(candidate, coarsest), local[coarsest.name]
        for fmt in finite:
            errors[fmt.name] = whole * (local[fmt.name] / part) if part else 0.0
    return {fmt.name: errors[fmt.name] for fmt in offered if fmt.name in errors}
