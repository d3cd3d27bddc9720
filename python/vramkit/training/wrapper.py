"""A model in mixed precision: cast for real to infer, with float32 masters to train."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..precision import PrecisionMode
from .islands import Island, measured_islands, rule_islands
from .multi_tensor import cast_, is_dense
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

    Modules that 16 bits would harm, the islands, stay in float32: normalizations, and with
    `calibration` those whose values would overflow or vanish. They get their inputs in float32 and
    give their outputs back in the model's dtype.

    A float16 forward pass with an infinity or NaN in its output, from finite inputs, is run again
    in bfloat16, which the model then keeps; a warning says so, and `fallbacks` lists it.

    The state_dict is the plain model's: same keys, and either loads the other's.

    Args:
        model: Changed in place; in float32.
        precision: "fp16", "bf16", "fp32", "fp8" (inference only: weights are stored in FP8, see
            `vramkit.convert`), or "auto": what the model's device is best at.
        calibration: Tuples of positional arguments, for the scan that finds islands.
        islands: Names of further modules to keep in float32.
        masters: "fp32" or "compensated"; how a model in training mode keeps small updates.

    Raises ValueError for an unknown precision or a name that is no module's, TypeError for a model
    that is not in float32, RuntimeError for `train()` after the parameters have been cast.

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
    ) -> None:
        mode = _mode(precision)
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
        self._cast = False
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
        """Go on in bfloat16: the fall-back from float16, also for `AdaptiveGradScaler.on_switch`."""
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
        """The plain model's."""
        return self.model.state_dict(*args, **kwargs)

    def parameter_bytes(self) -> int:
        """Bytes of the parameters and buffers as they are now."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.precision is PrecisionMode.FP32:
            return self.model(*args, **kwargs)
        if not self._cast:
            device = next(self.model.parameters()).device
            with torch.autocast(device.type, dtype=self.dtype):
                return self.model(*args, **kwargs)
        return self.model(*_cast_all(args, self.dtype), **_cast_all(kwargs, self.dtype))

    def _before(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What a pass that overflows would spoil: running statistics, the random state."""
        buffers = list(self.model.buffers()) if self.training else []
        return [(b, b.detach().clone()) for b in buffers], torch.get_rng_state()

    def _put_back(self, kept: tuple[list[tuple[Tensor, Tensor]], Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in kept[0]:
                buffer.copy_(value)
        torch.set_rng_state(kept[1])

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
        kept = {island.name for island in self.islands}
        for name, module in self.model.named_modules():
            if name in kept:
                entered: list[Any] = []
                before, after = _island_hooks(self, entered, autocast)
                self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(after, always_call=True))


def _island_hooks(wrapper: MixedPrecisionWrapper, entered: list[Any], autocast: bool) -> Any:
    """Casts before and after an island; under autocast, that is off inside."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if autocast:
            device = next(module.parameters()).device
            off = torch.autocast(device.type, enabled=False)
            off.__enter__()
            entered.append(off)
        return _cast_all(args, torch.float32), _cast_all(kwargs, torch.float32)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if autocast and entered:
            entered.pop().__exit__(None, None, None)
        return _cast_all(output, wrapper.dtype)

    return before, after


def _mode(precision: PrecisionMode | str) -> PrecisionMode:
    if isinstance(precision, str) and precision.strip().lower() == "auto":
        from ..hardware import get_optimal_precision

        return get_optimal_precision()
    mode = PrecisionMode.parse(precision)
    if mode not in _SUPPORTED:
        names = ", ".join(m.value for m in _SUPPORTED)
        raise ValueError(f"mixed precision is auto, {names}; not {mode.value}")
    return mode


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
    found += [Island(name, "asked for") for name in further]
    if calibration is not None:
        found += measured_islands(model, calibration, mode.torch_dtype)
    return list({island.name: island for island in reversed(found)}.values())[::-1]


def _into_arena(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Make tensors views of one block of memory, in another dtype; what shares memory still does."""
    tensors = list({id(t): t for t in tensors}.values())
    places: dict[tuple[Any, ...], Tensor] = {}
    end, starts = 0, {}
    for t in tensors:
        key = (t.device, t.data_ptr(), t.shape, t.stride())
        if key in starts:
            continue
        starts[key] = end
        end += -(-t.numel() // _LINE) * _LINE
    if not tensors:
        return
    arena = torch.empty(end, dtype=dtype, device=tensors[0].device)
    for t in tensors:
        key = (t.device, t.data_ptr(), t.shape, t.stride())
        if key not in places:
            piece = arena[starts[key] : starts[key] + t.numel()]
            stride = t.stride() if is_dense(t) else t.contiguous().stride()
            places[key] = piece.as_strided(t.shape, stride, piece.storage_offset())
            cast_([t.detach()], [places[key]])
    for t in tensors:
        t.data = places[(t.device, t.data_ptr(), t.shape, t.stride())]


def _cast_all(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cast_all(v, dtype) for v in value)
    if type(value) is dict:
        return {k: _cast_all(v, dtype) for k, v in value.items()}
    return value


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t.detach()).all()) for t in _floating(value))


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
