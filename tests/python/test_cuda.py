"""CUDA from Python: what must hold without a GPU, and on one the CPU's own bits.

On a machine that is meant to have a GPU, REQUIRE_GPU=1 turns skips into failures.
"""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
import vramkit
from vramkit import _core, _native
from vramkit.errors import VramkitError

PAGE = 4096
SEGMENT = 2 << 20
FORMATS = ("fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int4", "int4_g16", "nf4", "nf4_dq", "fp4")
SHAPES = ((1, 1), (3, 7), (64, 384), (33, 1000), (257, 4096))

if os.environ.get("REQUIRE_GPU") == "1":
    assert torch.cuda.is_available(), "REQUIRE_GPU=1, and torch sees none"
    assert _native.HAS_CUDA_OPERATORS, "REQUIRE_GPU=1, and the package was built without CUDA"
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS), reason="no GPU"
)
# Of cases that every device must pass, wherever they stand.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
needs_operators = pytest.mark.skipif(
    not _native.HAS_CUDA_OPERATORS, reason="built without CUDA, or beside a torch without it"
)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).cpu()


# Without a GPU


@needs_operators
def test_operators_are_there_without_a_driver() -> None:
    for name in ("_dequantize_out", "_quantize_out", "dequantize"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vramkit::{name}", "CUDA")


def test_devices_are_counted_or_the_reason_is_said() -> None:
    count, reason = _core.cuda_devices()
    assert (count > 0) == (reason == "")
    if not _core.built_with_cuda():
        assert "without CUDA" in reason


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    block = _core.BlockSpec("a", 8, [])
    with pytest.raises(ValueError, match="a device is"):
        _core.Engine([], [block], limit=1 << 22, device=device)
    with pytest.raises(ValueError, match="a device is"):
        _core.HostStore(8, device=device)


def test_a_device_that_is_not_there_is_an_error() -> None:
    count, _ = _core.cuda_devices()
    with pytest.raises((ValueError, VramkitError), match=r"CUDA|cuda"):
        _core.Engine([], [_core.BlockSpec("a", 8, [])], limit=1 << 26, device=f"cuda:{count + 7}")


def test_views_are_dlpack_and_keep_the_engine() -> None:
    data = torch.arange(PAGE, dtype=torch.int32).view(torch.uint8)
    nbytes = data.numel()
    source = _core.MemorySource(data.data_ptr(), nbytes, data)
    block = _core.BlockSpec("a", nbytes, [_core.Extent(0, 0, 0, nbytes)])
    engine = _core.Engine([source], [block], limit=1 << 22, granularity=PAGE)
    assert engine.device == "cpu"
    assert engine.contiguous
    assert engine.device_memory() is None
    with pytest.raises(ValueError, match="does not count"):
        engine.relieve(_core.PressureGauge(1, 2), 1 << 22)
    whole = torch.from_dlpack(engine.view())
    assert whole.dtype == torch.uint8
    assert whole.data_ptr() == engine.base
    address = engine.acquire(0)
    window = torch.from_dlpack(engine.window(address, nbytes))
    assert window.data_ptr() == address
    del engine
    assert torch.equal(window, data)


def test_a_capsule_that_nobody_takes_gives_back_what_it_holds() -> None:
    data = torch.zeros(PAGE, dtype=torch.uint8)
    gone = weakref.ref(data)
    source = _core.MemorySource(data.data_ptr(), PAGE, data)
    engine = _core.Engine([source], [_core.BlockSpec("a", PAGE, [])], limit=1 << 22)
    capsule = engine.view().__dlpack__(stream=None, max_version=(1, 0))
    del data, source, engine
    gc.collect()
    assert gone() is not None
    del capsule
    gc.collect()
    assert gone() is None


# On a GPU


def quantized(name: str, rows: int, cols: int) -> tuple[list[object], list[int]]:
    fmt = vramkit.get_format(name)
    weight = torch.randn(rows, cols)
    table = fmt.table_on(weight.device)
    codes, scales, extra = torch.ops.vramkit.quantize(weight, table, fmt.spec)
    return [codes, scales, extra, table], fmt.spec


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_has_the_cpus_bits(name: str, dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        parts, spec = quantized(name, rows, cols)
        on_gpu = [part if part is None else part.cuda() for part in parts]
        want = torch.ops.vramkit.dequantize(*parts, spec, [rows, cols], dtype)
        got = torch.ops.vramkit.dequantize(*on_gpu, spec, [rows, cols], dtype)
        assert got.is_cuda
        assert torch.equal(bits(got), bits(want)), (rows, cols)
        if rows > 3 and cols % 64 == 0:
            some = torch.ops.vramkit.dequantize_rows(*on_gpu, spec, rows, cols, 2, rows - 3, dtype)
            assert torch.equal(bits(some), bits(want[2 : rows - 1]))


@needs_gpu
def test_decoding_from_any_address() -> None:
    for name in FORMATS:
        parts, spec = quantized(name, 16, 384)
        want = torch.ops.vramkit.dequantize(*parts, spec, [16, 384], torch.bfloat16)
        moved = []
        for part in parts[:3]:
            room = torch.empty(part.numel() + 3, dtype=torch.uint8, device="cuda")
            room[3:].copy_(part.reshape(-1))
            moved.append(room[3:])
        table = None if parts[3] is None else parts[3].cuda()
        got = torch.ops.vramkit.dequantize(*moved, table, spec, [16, 384], torch.bfloat16)
        assert torch.equal(bits(got), bits(want)), name


@needs_gpu
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_casts_have_the_cpus_bits(name: str) -> None:
    spec = vramkit.get_format(name).spec
    patterns = torch.randint(-(2**31), 2**31, (300, 333), dtype=torch.int32).view(torch.float32)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    for x in (patterns, halves.view(torch.float16), halves.view(torch.bfloat16)):
        want = torch.ops.vramkit.quantize(x, None, spec)[0]
        assert torch.equal(torch.ops.vramkit.quantize(x.cuda(), None, spec)[0].cpu(), want)


@needs_gpu
def test_decoding_on_another_stream_and_in_a_graph() -> None:
    parts, spec = quantized("nf4", 128, 512)
    on_gpu = [part.cuda() for part in parts]
    want = torch.ops.vramkit.dequantize(*parts, spec, [128, 512], torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = torch.ops.vramkit.dequantize(*on_gpu, spec, [128, 512], torch.bfloat16)
    stream.synchronize()
    assert torch.equal(bits(got), bits(want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.vramkit.dequantize(*on_gpu, spec, [128, 512], torch.bfloat16)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bits(captured), bits(want))


def blocks(path: Path, count: int, nbytes: int, pinned: bool) -> tuple[list[object], list[object]]:
    data = torch.randint(0, 256, (count, nbytes), dtype=torch.uint8)
    specs = [
        _core.BlockSpec(f"block{i}", nbytes, [_core.Extent(0, i * nbytes, 0, nbytes)])
        for i in range(count)
    ]
    if pinned:
        store = _core.HostStore(data.numel(), device="cuda:0")
        torch.frombuffer(store, dtype=torch.uint8).copy_(data.reshape(-1))
        return [store.source()], [data, specs]
    path.write_bytes(data.numpy().tobytes())
    return [_core.FileSource(str(path))], [data, specs]


@needs_gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_an_engine_on_a_gpu(tmp_path: Path, pinned: bool) -> None:
    count, nbytes = 12, 3 << 20
    sources, (data, specs) = blocks(tmp_path / "blocks", count, nbytes, pinned)
    limit = 24 << 20
    engine = _core.Engine(
        sources, specs, limit=limit, granularity=SEGMENT, device="cuda:0", poison=True
    )
    assert engine.device == "cuda:0"
    free, total = engine.device_memory()
    assert 0 < free < total
    stream = torch.cuda.Stream()
    whole = torch.from_dlpack(engine.view()) if engine.contiguous else None
    found = []
    with torch.cuda.stream(stream):
        for _ in range(3):
            for block in range(count):
                address = engine.acquire(block, stream.cuda_stream)
                if whole is None:
                    seen = torch.from_dlpack(engine.window(address, nbytes))
                else:
                    seen = whole[address - engine.base :][:nbytes]
                found.append(seen.clone())
                engine.release(block, stream.cuda_stream)
    stream.synchronize()
    for index, seen in enumerate(found):
        assert torch.equal(seen.cpu(), data[index % count]), index
    stats = engine.stats()
    assert stats.committed <= limit
    assert stats.displaced == 0
    engine.check()
    with pytest.raises(ValueError, match="no buffer"):
        memoryview(engine.view())
    engine.close()


@needs_gpu
def test_too_large_a_limit_is_a_memory_error(tmp_path: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    block = _core.BlockSpec("huge", total + (64 << 20), [], _core.Residence.streamed)
    with pytest.raises(MemoryError, match="bytes"):
        _core.Engine([], [block], limit=total * 2, device="cuda:0")
    assert torch.ones(8, device="cuda").sum().item() == 8
