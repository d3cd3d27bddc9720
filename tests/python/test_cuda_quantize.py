"""Encoding, gathering and reordering on CUDA: the CPU's own bits. See test_cuda.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import vramkit
from numerics import accumulation_bound
from torch import nn
from vramkit import _native
from vramkit._stochastic import encode_rounded

needs_operators = pytest.mark.skipif(
    not _native.HAS_CUDA_OPERATORS, reason="built without CUDA, or beside a torch without it"
)
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS), reason="no GPU"
)
FORMATS = (
    *("fp8", "fp8_e5m2", "int8", "int8_dynamic", "int4", "int4_g96", "int4_g16", "nf4", "fp4"),
    *("test_table16", "test_table256"),
)
STOCHASTIC = ("fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int8_dynamic")
# Blocks that cross rows, short last groups, odd rows, rows longer than a block of threads keeps.
SHAPES = ((1, 1), (3, 7), (64, 384), (33, 1000), (257, 4096), (5, 9001))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _formats() -> None:
    generator = torch.Generator().manual_seed(3)
    for size, block in ((16, 32), (256, 512)):
        table = torch.rand(size, generator=generator) * 2 - 1
        vramkit.register_format(f"test_table{size}", table, block=block)


def quantize(x: torch.Tensor, name: str) -> list[torch.Tensor]:
    fmt = vramkit.get_format(name)
    parts: list[torch.Tensor] = torch.ops.vramkit.quantize(x, fmt.table_on(x.device), fmt.spec)
    return list(parts)


def weight(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols))
    x[0, : cols // 2] = 0.0  # groups of zeros
    if rows > 2:
        x[1] *= 1e-39  # subnormal numbers
        x[2, -1] = torch.inf
    return x.to(dtype)


def assert_same(on_gpu: Any, on_cpu: Any) -> None:
    for got, want in zip(on_gpu, on_cpu, strict=True):
        assert got.is_cuda
        assert torch.equal(got.cpu(), want)


# Without a GPU


@needs_operators
def test_operators_are_there_without_a_driver() -> None:
    for name in (
        *("quantize", "quantize_stochastic", "embedding", "_quantize_out", "_embedding_out"),
        *("_quantize_stochastic_out", "_quantize_bounds_out", "_dequantize_taps_out"),
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vramkit::{name}", "CUDA")


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_known_without_data(name: str) -> None:
    """What a CUDA tensor is encoded into has the shapes that the CPU's has: fake tensors say."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fmt = vramkit.get_format(name)
    for rows, cols in SHAPES[:4]:
        want = quantize(torch.zeros(rows, cols), name)
        with FakeTensorMode():
            fake = torch.empty(rows, cols, device="cuda")
            table = None if fmt.family != "codebook" else torch.empty(1 << fmt.bits, device="cuda")
            got = torch.ops.vramkit.quantize(fake, table, fmt.spec)
        assert [part.shape for part in got] == [part.shape for part in want]
        assert all(part.is_cuda for part in got)


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_encoding_has_the_cpus_bits(name: str, dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        x = weight(rows, cols, dtype)
        assert_same(quantize(x.cuda(), name), quantize(x, name))
        wide = torch.zeros(rows, cols + 3, dtype=dtype, device="cuda")
        wide[:, 3:] = x.cuda()
        assert_same(quantize(wide[:, 3:], name), quantize(x, name))


@needs_gpu
def test_nested_scales_but_for_the_mean() -> None:
    """The offset is torch's own mean on that device, whose order of additions differs."""
    x = torch.randn(257, 4096)
    codes, _, extra = quantize(x, "nf4_dq")
    on_gpu = [part.cpu() for part in quantize(x.cuda(), "nf4_dq")]
    assert torch.equal(on_gpu[0], codes)
    absmax = x.reshape(-1, 64).abs().amax(1).double()
    for part in (extra, on_gpu[2]):
        offset = float(part[-4:].view(torch.float32))
        bound = accumulation_bound(absmax.numel()) * float(absmax.mean())
        assert abs(offset - float(absmax.mean())) <= bound


@needs_gpu
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_has_the_cpus_bits(name: str) -> None:
    fmt = vramkit.get_format(name)
    for rows, cols in SHAPES:
        for dtype in DTYPES:
            x = weight(rows, cols, dtype)
            want = encode_rounded(x, fmt, rounding="stochastic", seed=2**63 + 5)
            got = encode_rounded(x.cuda(), fmt, rounding="stochastic", seed=2**63 + 5)
            assert_same((got.codes, got.scales), (want.codes, want.scales))


@needs_gpu
def test_bounds_have_the_cpus_bits() -> None:
    bounds = torch.rand(255).mul(2).sub(1).sort().values
    x = torch.randn(10_001)
    x[512:1024] = 0.0
    found = []
    for device in ("cpu", "cuda"):
        codes = torch.empty(10_001, dtype=torch.uint8, device=device)
        absmax = torch.empty(20, device=device)
        source = x.to(device)
        torch.ops.vramkit._quantize_bounds_out(source, bounds.to(device), 512, codes, absmax)
        found.append((codes, absmax))
    assert_same(found[1], found[0])


@needs_gpu
@pytest.mark.parametrize("name", [*FORMATS, "fp16", "nf4_dq"])
def test_embeddings_and_reordered_weights_have_the_cpus_bits(name: str) -> None:
    fmt = vramkit.get_format(name)
    x = torch.randn(64, 768)
    parts = vramkit._operators.encode(x, fmt)
    on_gpu = [None if part is None else part.cuda() for part in parts.arguments]
    indices = torch.randint(0, 64, (3, 50))
    for dtype in DTYPES:
        want = torch.ops.vramkit.embedding(indices, *parts.arguments, fmt.spec, [64, 768], dtype)
        got = torch.ops.vramkit.embedding(indices.cuda(), *on_gpu, fmt.spec, [64, 768], dtype)
        assert_same([got], [want])
        if not fmt.row_separable(768):
            continue
        taps = [torch.empty(64, 3, 256, dtype=dtype, device=d) for d in ("cpu", "cuda")]
        for out, stored in zip(taps, (parts.arguments, on_gpu), strict=True):
            torch.ops.vramkit._dequantize_taps_out(*stored, fmt.spec, 64, 768, 0, out)
        assert_same(taps[1:], taps[:1])


@needs_gpu
def test_an_index_out_of_range_stops_the_device_as_torchs_own() -> None:
    # In a process of its own: nothing runs on the device afterwards.
    code = (
        "import torch, vramkit\n"
        "layer = torch.nn.Embedding(8, 64).cuda()\n"
        "vramkit.convert(layer, 'int8')\n"
        "layer(torch.tensor([8], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@needs_gpu
@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "fp8", "test_table256"])
def test_encoding_on_another_stream_and_in_a_graph(name: str) -> None:
    x = torch.randn(128, 512)
    want = quantize(x, name)
    on_gpu = x.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = quantize(on_gpu, name)
    stream.synchronize()
    assert_same(got, want)
    graph = torch.cuda.CUDAGraph()
    on_gpu.zero_()
    with torch.cuda.graph(graph):
        got = quantize(on_gpu, name)
    on_gpu.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want)


@needs_gpu
@pytest.mark.parametrize("name", [*FORMATS, "bf16"])
def test_converting_a_model_on_the_gpu(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(40, 96), nn.Linear(96, 130), nn.Conv2d(4, 8, 3))
    on_gpu = nn.Sequential(nn.Embedding(40, 96), nn.Linear(96, 130), nn.Conv2d(4, 8, 3))
    on_gpu.load_state_dict(model.state_dict())
    on_gpu.cuda()
    vramkit.convert(model, name)
    vramkit.convert(on_gpu, name)
    want, got = model.state_dict(), on_gpu.state_dict()
    assert want.keys() == got.keys()
    for key in want:
        assert got[key].is_cuda, key
        assert torch.equal(got[key].cpu(), want[key]), key
    indices = torch.arange(40)
    assert torch.equal(on_gpu[0](indices.cuda()).cpu(), model[0](indices))
