"""Other libraries' Linear layers, as their users make them: a model in, the model converted out."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Maker = Callable[[nn.Module], nn.Module]


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Swap every Linear of `model` for what `make` makes of it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def bitsandbytes_4bit(model: nn.Module, kind: str, packed: bool = True) -> nn.Module:
    """Linear4bit; in eval mode it repacks its weight for AVX-512 at the first call."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=False,
            quant_type=kind,
        )
        made.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=False, quant_type=kind
        )
        made.bias = linear.bias
        return made.to("cpu").train(not packed)

    return replace_linears(model, make)


def bitsandbytes_8bit(model: nn.Module) -> nn.Module:
    """Linear8bitLt with the usual outlier threshold."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=6.0,
        )
        made.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
        made.bias = linear.bias
        return made.to("cpu")

    return replace_linears(model, make)


def torch_dynamic(
    model: nn.Module, kinds: frozenset[type[nn.Module]] = frozenset({nn.Linear})
) -> nn.Module:
    """torch's own dynamic INT8: deprecated there, and still what people use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not hasattr(torch.ao.quantization, "quantize_dynamic"):
            raise ImportError("this torch no longer has quantize_dynamic")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(
            model, set(kinds), dtype=torch.qint8
        )
    return made


def quanto(model: nn.Module, kind: str, exclude: str | None = None) -> nn.Module:
    """optimum-quanto, weights only."""
    import optimum.quanto

    optimum.quanto.quantize(model, weights=getattr(optimum.quanto, kind), exclude=exclude)
    optimum.quanto.freeze(model)
    return model


def torchao(model: nn.Module, kind: str) -> nn.Module:
    """torchao's weight-only formats."""
    import torchao.quantization as quantization

    configs = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, getattr(quantization, configs[kind])())
    return model


class _Int8Pack(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.float().abs().amax(1) / 127
        codes = (weight.float() / scales[:, None]).round().clamp(-127, 127)
        self.codes, self.scales = codes.to(torch.int8), scales.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scales)


class _Int4Pack(nn.Module):
    def __init__(self, linear: nn.Linear, group: int = 128) -> None:
        super().__init__()
        weight = linear.weight.detach()
        blocks = weight.float().reshape(weight.shape[0], -1, group)
        low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
        scales = (high - low) / 15
        codes = ((blocks - low) / scales).round().clamp(0, 15).to(torch.int32)
        self.codes = torch._convert_weight_to_int4pack_for_cpu(codes.reshape(weight.shape), 1)
        both = torch.cat([scales, low + 8 * scales], 2).to(weight.dtype)
        self.scales, self.group = both.transpose(0, 1).contiguous(), group

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)


MAKERS: dict[str, Maker] = {
    "bitsandbytes nf4": lambda m: bitsandbytes_4bit(m, "nf4"),
    "bitsandbytes nf4, not repacked": lambda m: bitsandbytes_4bit(m, "nf4", packed=False),
    "quanto qint8": lambda m: quanto(m, "qint8"),
    "quanto qint4": lambda m: quanto(m, "qint4"),
    "quanto qfloat8": lambda m: quanto(m, "qfloat8"),
    "torchao int8": lambda m: torchao(m, "int8"),
    "torchao float8": lambda m: torchao(m, "float8"),
    "torch int8pack": lambda m: replace_linears(m, _Int8Pack),
    "torch int4pack": lambda m: replace_linears(m, _Int4Pack),
}
