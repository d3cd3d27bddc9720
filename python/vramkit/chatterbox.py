"""Chatterbox TTS in less memory: 8-bit token model and voice encoder, a vocoder that stays high.

`ChatterboxTTS` is a plain object with `.t3` (a Llama of 0.53 B that writes speech tokens),
`.s3gen` (flow matching and vocoder, 0.26 B), `.ve` (an LSTM) and `.conds`. Nothing here imports
the package `chatterbox-tts` except `load`; any object with these parts will do.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .convert import ConversionReport, convert
from .layers import QuantizedLayer
from .model_objects import tensors_of
from .precision import PrecisionMode

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPONENTS = ("t3", "s3gen", "ve")
QUANTIZED = ("t3", "ve")  # the vocoder is sensitive: its errors are heard
LAYERS = (nn.Linear, nn.LSTM, nn.GRU)


@dataclass(frozen=True)
class ComponentReport:
    """One component: its format ("int8_dynamic" or a dtype), bytes, and bytes as float32."""

    name: str
    format: str
    bytes: int
    float32_bytes: int


@dataclass
class ChatterboxReport:
    """What a Chatterbox object holds after `prepare`, by component.

    `quantization` is "int8" or "none", `dtype` what was asked for, `effective_dtype` the dtype
    that the token model's plain tensors have and its arithmetic between the layers uses.
    """

    quantization: str
    dtype: str
    effective_dtype: str
    device: str
    components: list[ComponentReport] = field(default_factory=list)
    conversions: dict[str, ConversionReport] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all weights and buffers."""
        return sum(c.bytes for c in self.components)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; keys named `*_bytes` are bytes."""
        return {
            "quantization": self.quantization,
            "dtype": self.dtype,
            "effective_dtype": self.effective_dtype,
            "device": self.device,
            "weights_bytes": self.bytes,
            "components": {
                c.name: {
                    "format": c.format,
                    "weights_bytes": c.bytes,
                    "float32_bytes": c.float32_bytes,
                }
                for c in self.components
            },
        }


def resolve_device(device: str) -> str:
    """ "auto" as CUDA, else MPS, else the CPU; any other device as it is, if it is there.

    Raises ValueError for a device that this machine has not, or that torch does not know.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps"
        ) from error
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (kind.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not found.get(kind.type, False):
        raise ValueError(
            f"the device {device!r} is not there: use auto, or one that this machine has"
        )
    return device


def effective_dtype(dtype: str, device: str, *, int8: bool = False) -> torch.dtype:
    """The dtype of the token model: "auto" is float16 on CUDA, float32 on MPS and the CPU.

    With `int8` what stays plain is float32, whatever `dtype` says. Raises ValueError for a name
    that is none of auto, float32, float16, bfloat16.

    >>> effective_dtype("auto", "cpu"), effective_dtype("auto", "cuda:0")
    (torch.float32, torch.float16)
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    if int8:
        return torch.float32
    if dtype == "auto":
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return DTYPES[dtype]


def _layers(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[str]:
    for name, layer in module.named_modules():
        if isinstance(layer, kinds) and not isinstance(layer, QuantizedLayer):
            yield name


def quantize_dynamic(
    tts: Any,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    components: Iterable[str] = QUANTIZED,
) -> dict[str, ConversionReport]:
    """Store Linear, LSTM and GRU layers in 8 bits, in place, and multiply in int8.

    Weights are quantized now, by rows; activations in each call, by rows (docs/int8.md). It works
    on the modules that a plain object holds, on the CPU and on CUDA. Embeddings, norms, positions
    and every component that is not named stay as they are.

    Args:
        tts: A `ChatterboxTTS`, or any object with such attributes. One that is None is passed over.
        layers: Classes of the layers to convert.
        components: Names of the attributes to convert layers of.

    Returns a report for each component. Raises AttributeError where a component is missing,
    TypeError where it is no module, NonFiniteWeightError for NaN or infinity; then nothing of
    that component has changed.
    """
    modules = {name: _component(tts, name) for name in components}
    reports = {}
    for name, module in modules.items():
        if module is None:
            continue
        if isinstance(module, layers):
            chosen: Any = PrecisionMode.INT8_DYNAMIC
        else:
            chosen = dict.fromkeys(_layers(module, layers), PrecisionMode.INT8_DYNAMIC)
        reports[name] = convert(module, chosen) if chosen else ConversionReport()
    return reports


def _component(tts: Any, name: str) -> nn.Module | None:
    if not hasattr(tts, name):
        raise AttributeError(
            f"{type(tts).__name__} has no {name!r}: expected an object like ChatterboxTTS, with "
            f"{', '.join(COMPONENTS)}"
        )
    module = getattr(tts, name)
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"{type(tts).__name__}.{name} is a {type(module).__name__}, not a module")
    return module


def prepare(
    tts: Any,
    *,
    int8: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    s3gen_dtype: str = "float32",
) -> ChatterboxReport:
    """Bring a loaded Chatterbox to a precision and a device, in place.

    Args:
        tts: A `ChatterboxTTS`, or any object with its attributes.
        int8: Quantize Linear, LSTM and GRU of the token model and the voice encoder; `dtype` is
            then ignored, as the server's documentation says, except that its name must be valid.
        dtype: Of the token model, if not `int8`: auto, float32, float16 or bfloat16.
        device: Where to move it once it is small; None leaves it where it is.
        s3gen_dtype: Of the vocoder. Upstream's own code runs it in float32.

    The voice encoder stays float32 unless `int8`. Names are checked before anything changes.
    """
    modules = {name: _component(tts, name) for name in COMPONENTS}
    place = resolve_device(device) if device is not None else _device_of(tts)
    chosen = effective_dtype(dtype, place, int8=int8)
    if s3gen_dtype not in DTYPES:
        raise ValueError(f"unknown dtype {s3gen_dtype!r} of s3gen: use {', '.join(DTYPES)}")
    original = {name: _float32_bytes(module) for name, module in modules.items()}
    report = ChatterboxReport("int8" if int8 else "none", dtype, _dtype_name(chosen), place)
    if int8:
        report.conversions = quantize_dynamic(tts)
    dtypes = {"t3": chosen, "s3gen": DTYPES[s3gen_dtype], "ve": torch.float32}
    for name, module in modules.items():
        if module is None:
            continue
        module.to(dtype=dtypes[name])
        if device is not None:
            module.to(device=place)
        label = _dtype_name(dtypes[name])
        if name in report.conversions:
            label = PrecisionMode.INT8_DYNAMIC.value
        report.components.append(ComponentReport(name, label, _bytes(module), original[name]))
    _cast_conditions(modules["t3"])
    if device is not None:
        tts.device = place
        if getattr(tts, "conds", None) is not None:
            tts.conds = tts.conds.to(place)
    return report


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_of(tts: Any) -> str:
    tensor = next(tensors_of(tts), None)
    return str(tensor.device) if tensor is not None else "cpu"


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))


def _float32_bytes(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(t.numel() * (4 if t.is_floating_point() else t.itemsize) for t in tensors_of(module))


def _cast_conditions(t3: nn.Module | None) -> None:
    """Speaker, emotion and prompt embeddings come as float32: cast them to the token model's dtype.

    Upstream makes them anew in each call (`emotion_adv`), so that a cast in advance would be lost.
    """
    encoder = getattr(t3, "cond_enc", None)
    if not isinstance(encoder, nn.Module) or _cast in encoder._forward_pre_hooks.values():
        return
    encoder.register_forward_pre_hook(_cast)


def _cast(encoder: nn.Module, args: tuple[Any, ...]) -> None:
    # Of a converted encoder the biases are what still has a floating-point dtype.
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    for condition in args:
        for key, value in vars(condition).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(condition, key, value.to(dtype))


def load(
    path: str | Path | None = None,
    *,
    int8: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    s3gen_dtype: str = "float32",
) -> tuple[Any, ChatterboxReport]:
    """Chatterbox from a folder (or by its own download), converted on the CPU, then moved.

    The device never holds more than the converted bytes. Needs the package `chatterbox-tts`;
    ImportError says so. Returns the `ChatterboxTTS` and what it holds.
    """
    place = resolve_device(device)
    effective_dtype(dtype, place, int8=int8)
    try:
        upstream = importlib.import_module("chatterbox.tts").ChatterboxTTS
    except ImportError as error:
        raise ImportError(
            f"chatterbox-tts cannot be imported ({error}): pip install chatterbox-tts, or use the "
            "formant engine (ENGINE=formant)"
        ) from error
    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(f"no folder with Chatterbox's weights at {path}")
    if path is None:
        tts = upstream.from_pretrained("cpu")
    else:
        tts = upstream.from_local(path, "cpu")
    return tts, prepare(tts, int8=int8, dtype=dtype, device=place, s3gen_dtype=s3gen_dtype)
