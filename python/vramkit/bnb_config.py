"""transformers' `BitsAndBytesConfig`, or any object with its fields, as a request to `convert`.

Every field is honoured, or refused by its name; none is ignored. bitsandbytes and transformers are
not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import nn

from .errors import PrecisionConfigError
from .formats import StorageFormat, get_format, register_format

if TYPE_CHECKING:
    from .convert import Precision

_COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULTS: dict[str, Any] = {
    "load_in_8bit": False,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": None,
    "bnb_4bit_quant_storage": torch.uint8,
}
# What transformers writes beside them, which says nothing about the precision.
_LABELS = {"quant_method", "_load_in_8bit", "_load_in_4bit"}


@runtime_checkable
class QuantizationConfig(Protocol):
    """What an object must have to be taken as a `BitsAndBytesConfig`; others have defaults."""

    @property
    def load_in_8bit(self) -> bool:
        """Whether 8 bits are asked for: LLM.int8."""

    @property
    def load_in_4bit(self) -> bool:
        """Whether 4 bits are asked for: nf4 or fp4."""


@dataclass(frozen=True)
class Request:
    """What a config asks for.

    Attributes:
        fmt: How weights are stored.
        skip: Layers to leave plain.
        compute_dtype: What 4-bit Linears compute in, whatever comes in; None: as it comes.
        offload: Whether what lies on the CPU, of a model that is not all there, stays float32.
    """

    fmt: StorageFormat
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    offload: bool = False

    def on_cpu(self, model: nn.Module) -> list[str]:
        """Names of the modules that stay plain because they were placed on the CPU."""
        if not self.offload or len({p.device.type for p in model.parameters()}) < 2:
            return []
        return [
            name
            for name, module in model.named_modules()
            if name and any(p.device.type == "cpu" for p in module.parameters(recurse=False))
        ]

    def finish(self, model: nn.Module, plain: Iterable[str] = ()) -> None:
        """After conversion: set what Linears compute in, and cast what stays on the CPU."""
        from .layers.linear import QuantizedLinear

        for name in plain:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
        if self.compute_dtype is None:
            return
        for module in model.modules():
            if isinstance(module, QuantizedLinear) and module.storage_format is self.fmt:
                module.computes_in = self.compute_dtype


def is_config(value: Any) -> TypeGuard[QuantizationConfig | Mapping[str, Any]]:
    """Whether `value` is a config rather than a precision: it has the fields."""
    if isinstance(value, Mapping):
        return "load_in_8bit" in value or "load_in_4bit" in value
    if isinstance(value, (str, StorageFormat, type)):
        return False
    return hasattr(value, "load_in_8bit") or hasattr(value, "load_in_4bit")


def resolve(
    precision: Precision | QuantizationConfig | Mapping[str, Any] | None, skip: Iterable[str] = ()
) -> tuple[Any, tuple[str, ...], Request | None]:
    """(precision as `convert` knows it, all that is to be left plain, what else was asked for)."""
    if not is_config(precision):
        return precision, tuple(skip), None
    request = read_config(precision)
    return request.fmt, (*skip, *request.skip), request


def read_config(config: QuantizationConfig | Mapping[str, Any]) -> Request:
    """What a config asks for; PrecisionConfigError names the field that cannot be honoured.

    >>> read_config({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).fmt.name
    'nf4'
    """
    if isinstance(config, Mapping):
        given = {**_DEFAULTS, **{k: v for k, v in config.items() if k not in _LABELS}}
        unknown = sorted(set(given) - set(_DEFAULTS))
        if unknown:
            raise _refused(unknown[0], given[unknown[0]], f"the fields are: {', '.join(_DEFAULTS)}")
    else:
        given = {name: getattr(config, name, value) for name, value in _DEFAULTS.items()}
        for name in vars(config) if hasattr(config, "__dict__") else ():
            if name.startswith(("llm_int8_", "bnb_")) and name not in _DEFAULTS:
                raise _refused(name, getattr(config, name), "vramkit does not know this field")
    for name in _DEFAULTS:
        if isinstance(_DEFAULTS[name], bool) and not isinstance(given[name], bool):
            raise _refused(name, given[name], "it is True or False")
    if given["load_in_8bit"] and given["load_in_4bit"]:
        raise PrecisionConfigError("load_in_8bit and load_in_4bit are both set: choose one of them")
    if not (given["load_in_8bit"] or given["load_in_4bit"]):
        raise PrecisionConfigError(
            "neither load_in_8bit nor load_in_4bit is set, so that there is nothing to convert: "
            "set one, or give a precision such as 'bf16'"
        )
    if given["llm_int8_has_fp16_weight"]:
        raise _refused(
            "llm_int8_has_fp16_weight",
            True,
            "it keeps the 16-bit weights too and saves nothing; train adapters on the converted "
            "model, or leave it in 16 bit",
        )
    skip, offload = _skip(given), given["llm_int8_enable_fp32_cpu_offload"]
    if given["load_in_8bit"]:
        return Request(_eight_bits(given["llm_int8_threshold"]), skip, None, offload)
    return Request(_four_bits(given), skip, _compute_dtype(given), offload)


def _refused(name: str, value: Any, why: str) -> PrecisionConfigError:
    return PrecisionConfigError(f"{name}={value!r} cannot be honoured: {why}")


def _skip(given: Mapping[str, Any]) -> tuple[str, ...]:
    names = given["llm_int8_skip_modules"]
    if names is None:
        return ()
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise _refused("llm_int8_skip_modules", names, "it is a list of modules' names")
    return tuple(names)


def _eight_bits(threshold: Any) -> StorageFormat:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise _refused("llm_int8_threshold", threshold, "it is a number")
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise _refused("llm_int8_threshold", threshold, "it is finite and not negative")
    # Zero means no outliers for bitsandbytes: every column is rounded.
    if threshold == 0:
        return get_format("int8_dynamic")
    return get_format("llm_int8").with_threshold(float(threshold))


def _four_bits(given: Mapping[str, Any]) -> StorageFormat:
    name, nested = given["bnb_4bit_quant_type"], given["bnb_4bit_use_double_quant"]
    if name not in ("nf4", "fp4"):
        raise _refused("bnb_4bit_quant_type", name, "it is 'nf4' or 'fp4'")
    storage = _dtype("bnb_4bit_quant_storage", given["bnb_4bit_quant_storage"])
    if storage is not torch.uint8:
        raise _refused(
            "bnb_4bit_quant_storage", storage, "codes are uint8 parameters, which FSDP shards too"
        )
    if not nested:
        return get_format(name)
    if name == "nf4":
        return get_format("nf4_dq")
    return register_format("fp4_dq", list(get_format("fp4").native.table), nested=True)


def _compute_dtype(given: Mapping[str, Any]) -> torch.dtype:
    dtype = _dtype("bnb_4bit_compute_dtype", given["bnb_4bit_compute_dtype"] or torch.float32)
    if dtype not in _COMPUTE:
        raise _refused("bnb_4bit_compute_dtype", dtype, "it is float32, bfloat16 or float16")
    return dtype


def _dtype(name: str, value: Any) -> torch.dtype:
    found = value
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise _refused(name, value, "it is a torch dtype or its name")
    return found
