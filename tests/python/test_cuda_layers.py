"""Layers on CUDA as far as no GPU is needed: the route that a GPU takes, on CPU tensors; shapes,
dtypes and devices by fake CUDA tensors. On a GPU, against the CPU.

REQUIRE_GPU=1 turns the skips into failures (test_cuda.py).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import vramkit
from numerics import UNIT, accumulation_bound, assert_within
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from vramkit import _convolution, _native
from vramkit._operators import StoredParts, encode

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS), reason="no GPU"
)
needs_cuda_torch = pytest.mark.skipif(
    not _native.HAS_CUDA_OPERATORS, reason="built without CUDA, or beside a torch without it"
)

CONVS = {
    "plain": (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 9)),
    "strided, dilated, grouped": (
        nn.Conv2d(8, 12, 3, 2, dilation=2, groups=4, padding=2),
        (1, 8, 12, 11),
    ),
    "depthwise": (nn.Conv2d(8, 8, 5, padding="same", groups=8, bias=False), (2, 8, 9, 9)),
    "1-D": (nn.Conv1d(4, 6, 4), (3, 4, 17)),
    "3-D": (nn.Conv3d(4, 6, (1, 3, 3)), (1, 4, 3, 6, 6)),
    "transposed": (nn.ConvTranspose2d(6, 10, 3, 2, 1, output_padding=1), (2, 6, 5, 7)),
    "transposed, grouped": (nn.ConvTranspose1d(8, 12, 4, 2, groups=4), (1, 8, 9)),
}


def arguments(layer: Any, x: Tensor, parts: StoredParts) -> tuple[Any, ...]:
    """Those of vramkit::conv; "same" is resolved as the layer does."""
    padding = layer.padding
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    return (
        x, *parts.arguments, bias, parts.fmt.spec, list(parts.shape), list(layer.stride),
        list(padding), list(layer.dilation), layer.transposed, list(layer.output_padding),
        layer.groups,
    )  # fmt: skip


def exact(layer: Any, x: Tensor, weight: Tensor, *, magnitudes: bool = False) -> Tensor:
    """The convolution in float64; of magnitudes, for error bounds."""
    wide = copy.deepcopy(layer).double()
    values = [weight.double(), x.double(), wide.bias]
    if magnitudes:
        values = [None if v is None else v.abs() for v in values]
    with torch.no_grad():
        wide.weight = nn.Parameter(values[0])
        wide.bias = None if values[2] is None else nn.Parameter(values[2].detach())
        made: Tensor = wide(values[1])
    return made


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fmt", ["nf4", "bf16"])
@pytest.mark.parametrize("name", CONVS)
def test_the_route_of_gpus_convolves(
    name: str, fmt: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, shape = CONVS[name]
    x = torch.randn(shape)
    if layout == "channels_last":
        kind = _convolution._LAST.get(x.dim())
        if kind is None:
            return
        x = x.contiguous(memory_format=kind)
    parts = encode(layer.weight, vramkit.get_format(fmt))
    dense = parts.dense(torch.float32)
    expected = exact(layer, x, dense)
    length = math.prod(dense.shape[1:]) + 2
    # One more addition for each slice.
    bound = accumulation_bound(length + dense.shape[0]) * exact(layer, x, dense, magnitudes=True)
    bound = bound + UNIT[torch.float32] * expected.abs()
    row = math.prod(dense.shape[1:]) * 4
    for limit in (_convolution.SLICE_BYTES, 3 * row, row):
        monkeypatch.setattr(_convolution, "SLICE_BYTES", limit)
        made = _convolution._conv_by_torch(*arguments(layer, x, parts))
        assert_within(made, expected, bound)
        assert _convolution._layout(made) == _convolution._layout(x)


def test_slices_bound_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(32, 64, 3, padding=1)
    parts = encode(layer.weight, vramkit.get_format("int8"))
    row = 32 * 9 * 4
    monkeypatch.setattr(_convolution, "SLICE_BYTES", 10 * row)
    sizes: list[int] = []
    decoded = _convolution._decoded

    def watch(*args: Any) -> Tensor:
        made = decoded(*args)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(_convolution, "_decoded", watch)
    _convolution._conv_by_torch(*arguments(layer, torch.randn(1, 32, 8, 8), parts))
    assert sum(sizes) == 64 * row
    assert max(sizes) == 10 * row


class Everything(nn.Module):
    """One of each kind of layer, on indices and features."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.linear = nn.Linear(64, 96)
        self.conv = nn.Conv1d(96, 64, 3, padding=1)
        self.up = nn.ConvTranspose1d(64, 64, 2, 2)
        self.lstm = nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRUCell(128, 64)
        self.head = nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.gelu(self.linear(self.words(ids))).transpose(1, 2)
        x = self.up(functional.silu(self.conv(x))).transpose(1, 2)
        out, _ = self.lstm(x)
        made: Tensor = self.head(self.gru(out[:, -1]))
        return made


def on_fake_cuda(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give a converted model of the meta device fake CUDA tensors."""
    with mode:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


@needs_cuda_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["nf4", "fp8", "int4", "int8", "bf16"])
def test_shapes_dtypes_and_devices_on_cuda(fmt: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = Everything().to(dtype)
    vramkit.convert(model, fmt)
    mode = FakeTensorMode()
    on_fake_cuda(model, mode)
    # Whether cuDNN takes a recurrent layer is asked of the driver.
    with mode, torch.backends.cudnn.flags(enabled=False):
        assert all(p.is_cuda for p in model.parameters())
        out = model(torch.zeros(3, 7, dtype=torch.int64, device="cuda"))
    assert out.device.type == "cuda"
    assert out.dtype == dtype
    assert tuple(out.shape) == (3, 50)
    assert model.linear.weight.is_cuda
    assert model.linear.weight.dtype == dtype


@needs_cuda_torch
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (6, 7, 9)])
def test_convolutions_keep_their_layout_on_cuda(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(6, 10, 3, padding=1)
    vramkit.convert(layer, "int8")
    mode = FakeTensorMode()
    on_fake_cuda(layer, mode)
    with mode:
        x = torch.empty(shape, device="cuda", dtype=torch.float16)
        if len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        out = layer(x)
    assert out.dtype == torch.float16
    assert out.is_cuda
    if len(shape) == 4:
        assert out.is_contiguous(memory_format=torch.channels_last)


@needs_cuda_torch
def test_autocast_decides_the_dtype_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        layer = nn.Linear(64, 32)
    vramkit.convert(layer, "nf4")
    mode = FakeTensorMode()
    on_fake_cuda(layer, mode)
    # torch.autocast itself is off without a driver.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: {"cuda": torch.float16}[kind])
    with mode:
        assert layer(torch.empty(2, 64, device="cuda")).dtype == torch.float16


@needs_cuda_torch
def test_operators_for_convolutions_are_there_without_a_driver() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vramkit::conv", "CUDA")


def test_a_model_moves_and_its_kernels_are_named() -> None:
    model = Everything()
    vramkit.convert(model, "int8")
    moved = copy.deepcopy(model).to("meta")
    kernels = {info.name: info for info in vramkit.describe(moved)}
    found = torch._C._dispatch_has_kernel_for_dispatch_key("vramkit::conv", "CUDA")
    assert kernels["conv"].kernel == ("meta decode + torch" if found else "none for meta")
    assert kernels["conv"].compute_dtype == "the input's"
    assert {info.name for info in vramkit.describe(model)} == set(kernels)


@needs_gpu
def test_ties_hold_through_a_move() -> None:
    model = Everything()
    model.tied = nn.Linear(64, 50, bias=False)
    model.tied.weight = model.words.weight
    vramkit.convert(model, "int8")
    for device in ("cuda", "cpu"):
        model.to(device)
        assert model.tied.codes is model.words.codes
        assert model.tied.codes.device.type == device


def test_loading_onto_a_device(tmp_path: Path) -> None:
    model = Everything()
    vramkit.convert(model, "nf4")
    vramkit.save(model, tmp_path / "nf4")
    here = vramkit.load(tmp_path / "nf4", factory=Everything, device="cpu")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(here(ids), model(ids))
    away = vramkit.load(tmp_path / "nf4", factory=Everything, device="meta")
    assert all(p.is_meta for p in away.parameters())
    file = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(Everything().state_dict(), file)
    converted = vramkit.load(file, factory=Everything, precision="int8", device="cpu")
    assert converted.linear.format_names == "int8"
    offloaded = vramkit.load(tmp_path / "nf4", factory=Everything, device="cpu", inputs=(ids,))
    assert torch.equal(offloaded(ids), model(ids))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loading_onto_a_device_that_is_not_there(tmp_path: Path) -> None:
    vramkit.save(nn.Linear(64, 64), tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|nvidia"):
        vramkit.load(tmp_path, factory=lambda: nn.Linear(64, 64), device="cuda")


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    layer, shape = copy.deepcopy(CONVS[name][0]).to(dtype), CONVS[name][1]
    vramkit.convert(layer, "int8")
    dense = layer.dense_weight(dtype)
    x = torch.randn(shape, dtype=dtype)
    plain = copy.deepcopy(CONVS[name][0]).to(dtype)
    expected = exact(plain, x, dense)
    unit = UNIT[dtype]
    magnitude = exact(plain, x, dense, magnitudes=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        made = layer.cuda()(x.cuda()).cpu()
    length = math.prod(dense.shape[1:]) + dense.shape[0]
    bound = (accumulation_bound(length) + 2 * unit) * magnitude + unit * expected.abs()
    assert_within(made, expected, bound)


@needs_gpu
def test_a_converted_model_moves_there_and_back() -> None:
    model = Everything()
    vramkit.convert(model, "int8")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.cuda()
    assert all("none" not in info.kernel for info in vramkit.describe(model))
    model.cpu()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@needs_gpu
def test_recurrent_layers_on_a_gpu_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    layer = nn.LSTM(64, 32, 2, bidirectional=True, proj_size=16)
    vramkit.convert(layer, "int8")
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        expected, _ = layer(x)
        biases = [p.clone() for n, p in layer.named_parameters() if n.startswith("bias")]
        with torch.backends.cudnn.flags(allow_tf32=False):
            made, _ = layer.cuda()(x.cuda())
    kept = [p.cpu() for n, p in layer.named_parameters() if n.startswith("bias")]
    assert all(torch.equal(a, b) for a, b in zip(biases, kept, strict=True))
    assert float((made.cpu() - expected).abs().max()) < 1e-5  # a few float32 roundings of |h| < 1
    assert not any("contiguous chunk" in str(w.message) for w in recwarn)


# Out of memory


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("linear", "vramkit._operators.new_tensor"),
        ("dequantize", "vramkit._operators.new_tensor"),
        ("conv", "vramkit._convolution.torch.empty"),
    ],
)
def test_running_out_of_memory_keeps_torchs_type_and_the_layer(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vramkit.offload.pressure import bytes_asked_for, is_out_of_memory

    layer = nn.Conv1d(8, 8, 3) if kind == "conv" else nn.Linear(128, 256)
    x = torch.randn(1, 8, 20) if kind == "conv" else torch.randn(300, 128)
    vramkit.convert(layer, "nf4")

    def run() -> Tensor:
        if kind == "dequantize":
            return layer.dense_weight()
        if kind == "conv":
            return _convolution._conv_by_torch(*arguments(layer, x, layer.parts))
        made: Tensor = torch.ops.vramkit.linear(
            x, *layer.parts.arguments, layer.bias, layer.parts.fmt.spec, 256
        )
        return made

    before = run()
    with monkeypatch.context() as patch:
        patch.setattr(place, no_memory)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
            run()
    assert is_out_of_memory(caught.value)
    assert bytes_asked_for(caught.value) == 20 << 20
    assert torch.equal(run(), before)


def test_the_engines_lack_of_device_memory_is_torchs_too() -> None:
    from vramkit.errors import DeviceMemoryError, VramkitError
    from vramkit.offload.pressure import is_out_of_memory

    error = DeviceMemoryError("no memory", 4096)
    assert isinstance(error, torch.OutOfMemoryError)
    assert isinstance(error, MemoryError)
    assert isinstance(error, VramkitError)
    assert is_out_of_memory(error)
    assert error.requested_bytes == 4096
    # As it is raised again with more to say.
    assert type(error)("more").requested_bytes == 0
