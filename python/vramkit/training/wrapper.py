"""A model in mixed precision: cast for real to infer, with float32 masters to train."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._operators import encode_again
from ..errors import PrecisionUnavailableError
from ..hardware import has_native_bf16
from ..layers.base import PART_NAMES, QuantizedLayer, part_name
from ..precision import PrecisionMode
from .activations import has_values
from .islands import Island, measured_islands, overflowing_weights, rule_islands
from .multi_tensor import cast_, is_dense, square_sum
from .optimizer import AdamW

_LINE = 64
_SUPPORTED = (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16, PrecisionMode.FP8)


class MixedPrecisionWrapper(nn.Module):
    """A model that computes in 16 bits where that is safe and in float32 where it is not.

    A model in evaluation mode is cast at once: its parameters become views of one block of memory
    of half the size, and the float32 ones are freed. A model in training mode keeps them as masters
    and computes under autocast; `cast_for_inference` ends that. ``masters="compensated"`` trains on
    16-bit weights with what rounding leaves in another 16 bits (`optimizer()` makes the AdamW that
    does so): half the masters' bytes.

    Modules that 16 bits would harm, the islands, stay in float32: normalizations, modules with a
    weight beyond float16's range, and with `calibration` those whose values would overflow or
    vanish. They get their inputs in float32 and give their outputs back in the model's dtype; with
    ``wide_islands`` an output that was measured to overflow stays in float32, and the modules that
    take it cast it themselves.

    A float16 forward pass with an infinity or NaN in its output, from finite inputs, is run again
    in bfloat16, which the model then keeps; a warning says so, and `fallbacks` lists it.

    The state_dict is the plain model's: same keys and shapes (FP8 weights are decoded into it, and
    encoded when it is loaded), and either loads the other's.

    Args:
        model: Changed in place; in float32.
        precision: "fp16", "bf16", "fp32", "fp8" (inference only: weights are stored in FP8, see
            `vramkit.convert`), or "auto": bf16 on a GPU that has it, fp16 on an older one, fp32
            on the CPU.
        calibration: Tuples of positional arguments, for the scan that finds islands.
        islands: Names of further modules to keep in float32.
        masters: "fp32" or "compensated"; how a model in training mode keeps small updates.
        wide_islands: Needs `calibration`.

    Raises ValueError for an unknown precision or a name that is no module's, TypeError for a model
    that is not in float32, PrecisionUnavailableError for bf16 on a GPU that only emulates it (the
    model is unchanged then), RuntimeError for `train()` after the parameters have been cast.

    >>> wrapped = MixedPrecisionWrapper(torch.nn.Linear(4, 2).eval(), "bf16")
    >>> wrapped(torch.ones(1, 4)).dtype, next(wrapped.parameters()).dtype
    (torch.bfloat16, torch.bfloat16)
    """

    def __init__(
        self,
        model: nn.Module,
        precision: PrecisionMode | str = "auto",
        *,
        calibration: Iterable[tuple[Any, ...]] | None = None,
        islands: Iterable[str] = (),
        masters: Literal["fp32", "compensated"] = "fp32",
        wide_islands: bool = False,
    ) -> None:
        mode = _mode(precision, _device_of(model))
        if wide_islands and calibration is None:
            raise ValueError("wide_islands goes by what calibration inputs show: give calibration")
        if masters not in ("fp32", "compensated"):
            raise ValueError(f"masters is 'fp32' or 'compensated', not {masters!r}")
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.dtype != torch.float32:
                raise TypeError(
                    f"{name} is {p.dtype}: masters and casts begin with a model in float32 "
                    "(model.float())"
                )
        if model.training and mode is PrecisionMode.FP8:
            raise ValueError(
                "fp8 stores weights for inference: call model.eval(), or train in bf16"
            )
        chosen = _islands(model, mode, calibration, islands)
        super().__init__()
        self.model = model
        self.precision = mode
        self.islands: list[Island] = chosen
        self.fallbacks: list[str] = []
        self.training = model.training
        self._masters = masters
        self._wide = wide_islands
        self._cast = False
        self._keys = list(model.state_dict())
        self._hooks: list[Any] = []
        self.register_load_state_dict_pre_hook(_with_prefix)
        if mode is PrecisionMode.FP32:
            return
        if not model.training or masters == "compensated":
            self._cast_parameters()
        else:
            self._hook(autocast=True)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, outside its islands."""
        return self.precision.torch_dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, in the model's dtype."""
        if self.precision is not PrecisionMode.FP16:
            return self._run(args, kwargs)
        kept = self._before()
        output = self._run(args, kwargs)
        if _finite(output) or not _finite((args, kwargs)):
            return output
        self._put_back(kept)
        self.to_bf16("a forward pass overflowed")
        return self._run(args, kwargs)

    def to_bf16(self, why: str) -> None:
        """Go on in bfloat16: the fall-back from float16, also for `AdaptiveGradScaler.on_switch`.

        Raises PrecisionUnavailableError, with nothing changed, on a GPU that only emulates it.
        """
        try:
            _check_device(PrecisionMode.BF16, _device_of(self.model))
        except PrecisionUnavailableError as error:
            raise PrecisionUnavailableError(
                f"{why} in float16, and there is no bfloat16 to go on in: {error}; keep what "
                "overflows in float32 (calibration=, islands=), or use fp32"
            ) from None
        self.precision = PrecisionMode.BF16
        self.fallbacks.append(why)
        warnings.warn(f"{why} in float16: going on in bfloat16", RuntimeWarning, stacklevel=3)
        if self._cast:
            self._cast_parameters()

    def cast_for_inference(self) -> MixedPrecisionWrapper:
        """Free the masters: parameters become 16 bits for good. Evaluation mode; returns self."""
        self.eval()
        if not self._cast and self.precision is not PrecisionMode.FP32:
            self._cast_parameters()
        return self

    def train(self, mode: bool = True) -> MixedPrecisionWrapper:
        """As nn.Module's; RuntimeError where there are no masters to train any more."""
        if mode and getattr(self, "_cast", False) and self._masters != "compensated":
            raise RuntimeError(
                "the float32 parameters were freed for inference: wrap a float32 model in training "
                "mode to train it"
            )
        super().train(mode)
        return self

    def optimizer(self, lr: float = 1e-3, **options: Any) -> AdamW:
        """An AdamW over the parameters as this wrapper keeps them (options as there)."""
        masters = "compensated" if self._cast else None
        groups: list[dict[str, Any]] = []
        for half in (True, False):
            chosen = [p for p in self.parameters() if (p.dtype != torch.float32) == half]
            if chosen:
                groups.append({"params": chosen, "masters": masters if half else None})
        return AdamW(groups, lr=lr, **options)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's: its keys, in its order; values in the dtype that they have here."""
        found = self.model.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        stored = [
            (f"{prefix}{name}.{key}" if name else f"{prefix}{key}", layer, key)
            for name, layer in self.model.named_modules()
            if isinstance(layer, QuantizedLayer)
            for key in layer.stored_names
        ]
        if stored:
            for path, layer, key in stored:
                for part in PART_NAMES:
                    found.pop(f"{path[: -len(key)]}{part_name(key, part)}", None)
                found[path] = layer.dense_weight(self.dtype, key)
            for key in self._keys:
                found[f"{prefix}{key}"] = found.pop(f"{prefix}{key}")
        return found

    def parameter_bytes(self) -> int:
        """Bytes of the parameters and buffers as they are now."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.precision is PrecisionMode.FP32:
            return self.model(*args, **kwargs)
        if not self._cast:
            with torch.autocast(_device_of(self.model).type, dtype=self.dtype):
                return self.model(*args, **kwargs)
        return self.model(*_cast_all(args, self.dtype), **_cast_all(kwargs, self.dtype))

    def _before(self) -> tuple[list[tuple[Tensor, Tensor]], list[Any]]:
        """What a pass that overflows would spoil: running statistics, the random states."""
        buffers = list(self.model.buffers()) if self.training else []
        device = _device_of(self.model)
        states = [torch.get_rng_state()] if self.training else []
        if self.training and device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return [(b, b.detach().clone()) for b in buffers], states

    def _put_back(self, kept: tuple[list[tuple[Tensor, Tensor]], list[Any]]) -> None:
        buffers, states = kept
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if states:
            torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], _device_of(self.model))

    @torch.no_grad()
    def _cast_parameters(self) -> None:
        if self.precision is PrecisionMode.FP8:
            from ..convert import convert

            convert(self.model, "fp8", skip=[island.name for island in self.islands])
        kept = tuple(f"{island.name}." for island in self.islands)
        tensors = [
            t
            for name, module in self.model.named_modules()
            if not f"{name}.".startswith(kept)
            for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if t.is_floating_point() and t.dtype != self.dtype
        ]
        _into_arena(tensors, self.dtype)
        self._cast = True
        self._hook(autocast=False)

    def _hook(self, autocast: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        kept = {island.name: island for island in self.islands}
        for name, module in self.model.named_modules():
            if name in kept:
                entered: list[Any] = []
                wide = self._wide and kept[name].overflows
                before, after = _island_hooks(self, entered, autocast, wide)
                self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(after, always_call=True))
            elif self._narrows(name, module) and self._wide and not autocast:
                self._hooks.append(module.register_forward_pre_hook(self._narrow, with_kwargs=True))

    def _narrows(self, name: str, module: nn.Module) -> bool:
        """Whether a module has parameters in 16 bits."""
        within = any(f"{name}.".startswith(f"{island.name}.") for island in self.islands)
        return not within and any(True for _ in module.parameters(recurse=False))

    def _narrow(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What an island left in float32, for a module in 16 bits; autocast does that itself."""
        return _cast_all(args, self.dtype), _cast_all(kwargs, self.dtype)


def _island_hooks(
    wrapper: MixedPrecisionWrapper, entered: list[Any], autocast: bool, wide: bool
) -> Any:
    """Casts before and after an island (not after a `wide` one); inside, autocast is off."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if autocast:
            off = torch.autocast(_device_of(module).type, enabled=False)
            off.__enter__()
            entered.append(off)
        return _cast_all(args, torch.float32), _cast_all(kwargs, torch.float32)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if autocast and entered:
            entered.pop().__exit__(None, None, None)
        return output if wide else _cast_all(output, wrapper.dtype)

    return before, after


def _device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _mode(precision: PrecisionMode | str, device: torch.device) -> PrecisionMode:
    if isinstance(precision, str) and precision.strip().lower() == "auto":
        if device.type != "cuda":
            return PrecisionMode.FP32
        return PrecisionMode.BF16 if has_native_bf16(device) else PrecisionMode.FP16
    mode = PrecisionMode.parse(precision)
    if mode not in _SUPPORTED:
        names = ", ".join(m.value for m in _SUPPORTED)
        raise ValueError(f"mixed precision is auto, {names}; not {mode.value}")
    _check_device(mode, device)
    return mode


def _check_device(mode: PrecisionMode, device: torch.device) -> None:
    """Raise PrecisionUnavailableError where a device lacks a precision's 16-bit type.

    FP8 is storage here and needs no matrix units, but what it is decoded to is bfloat16.
    """
    if mode.torch_dtype is not torch.bfloat16 or device.type != "cuda":
        return
    if not has_native_bf16(device):
        raise PrecisionUnavailableError(
            f"{device} computes in bfloat16 by emulation only (it begins with compute capability "
            f"8.0), which {mode.value} needs: use fp16, or fp32"
        )


def _islands(
    model: nn.Module,
    mode: PrecisionMode,
    calibration: Iterable[tuple[Any, ...]] | None,
    further: Iterable[str],
) -> list[Island]:
    if mode is PrecisionMode.FP32:
        return []
    names = {name for name, _ in model.named_modules()}
    unknown = sorted(set(further) - names)
    if unknown:
        raise ValueError(f"no modules of these names to keep in float32: {unknown}")
    found = rule_islands(model)
    found += overflowing_weights(model, mode.torch_dtype)
    found += [Island(name, "asked for") for name in further]
    if calibration is not None:
        found += measured_islands(model, calibration, mode.torch_dtype)
    return list({island.name: island for island in reversed(found)}.values())[::-1]


def _into_arena(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Make tensors views of one block of memory, in another dtype; what shares memory still does.

    One after another: what a tensor leaves is free before the next one is cast.
    """
    places: dict[torch.device, dict[tuple[Any, ...], list[Tensor]]] = {}
    for t in {id(t): t for t in tensors}.values():
        # Without memory (shapes alone, or no element) no two share any.
        key = (t.data_ptr() or id(t), t.shape, t.stride())
        places.setdefault(t.device, {}).setdefault(key, []).append(t)
    for device, groups in places.items():
        total = sum(-(-same[0].numel() // _LINE) * _LINE for same in groups.values())
        arena = torch.empty(total, dtype=dtype, device=device)
        start = 0
        for same in groups.values():
            t = same[0]
            stride = t.stride() if is_dense(t) else t.contiguous().stride()
            piece = arena.as_strided(t.shape, stride, start)
            start += -(-t.numel() // _LINE) * _LINE
            cast_([t.detach()], [piece])
            for one in same:
                one.data = piece


def _cast_all(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cast_all(v, dtype) for v in value)
    if type(value) is dict:
        return {k: _cast_all(v, dtype) for k, v in value.items()}
    return value


def _finite(value: Any) -> bool:
    """Whether all floating-point tensors in a value are; fake ones, of an estimate, count as so."""
    found = [t for t in _floating(value) if has_values(t)]
    return math.isfinite(square_sum(found))


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _floating(one)


def _with_prefix(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keys of the plain model, where the wrapper is a part of another module too."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)
    for name, layer in module.model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        path = f"{prefix}model.{name}." if name else f"{prefix}model."
        for key in layer.stored_names:
            value = state_dict.get(path + key)
            # Of another shape it stays, and the error names it as it does for a plain layer.
            if value is None or tuple(value.shape) != layer.stored_parameter(key).shape:
                continue
            parts = encode_again(value, layer.parts_of(key))
            del state_dict[path + key]
            for part in PART_NAMES:
                if getattr(parts, part) is not None:
                    state_dict[path + part_name(key, part)] = getattr(parts, part)
