"""Loading whole files at once: the bits of safetensors' own reader, and what may go wrong."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
import vramkit
from conftest import RunPython
from odd_files import askew, assert_same_bits, bits
from torch import Tensor, nn
from vramkit import _core
from vramkit.errors import FileChangedError
from vramkit.shards import SAFETENSORS_DTYPES, Checkpoint

MB = 1 << 20


def every_kind() -> dict[str, Tensor]:
    """All dtypes, in sizes around those of pieces and pages; scalars and empty tensors."""
    found = {}
    for name, dtype in SAFETENSORS_DTYPES.items():
        for count in (0, 1, 1023, 70_001):
            data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
            if dtype == torch.bool:
                data %= 2
            found[f"{name}.{count}"] = data.view(dtype)
        found[f"{name}.scalar"] = found[f"{name}.1"].reshape(())
        found[f"{name}.empty"] = found[f"{name}.0"].reshape(3, 0, 2)
        found[f"{name}.matrix"] = found[f"{name}.1023"].reshape(33, 31)
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("mapped", [False, True])
def test_every_kind_of_tensor(mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(every_kind(), path)
    found = vramkit.load_file(path, mapped=mapped)
    assert_same_bits(found, safetensors.torch.load_file(path))
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())
    before = path.read_bytes()
    for tensor in found.values():  # ours to write to, and only ours
        tensor.zero_()
        assert not bits(tensor).any()
    assert path.read_bytes() == before


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("lead", [0, 1, 2, 5])
def test_elements_at_odd_addresses(lead: int, mapped: bool, tmp_path: Path) -> None:
    tensors = every_kind()
    path = askew(tensors, tmp_path / "a.safetensors", lead)
    found = vramkit.load_file(path, mapped=mapped)
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())
    del found["lead"]
    assert_same_bits(found, tensors)
    target = {name: torch.zeros_like(t) for name, t in tensors.items()}
    target["lead"] = torch.empty(lead, dtype=torch.uint8)
    vramkit.load_file(path, into=target)
    del target["lead"]
    assert_same_bits(target, tensors)


def test_shards_and_several_pieces(tmp_path: Path) -> None:
    """Files larger than a piece, whose ends are in the middle of a page, cached and not."""
    tensors = {f"layer.{i}": torch.randn(1025, 1027 + i) for i in range(6)}
    weight_map = {}
    for shard in range(2):
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == shard}
        file = f"model-{shard}.safetensors"
        safetensors.torch.save_file(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for cold in (False, True):
        for file in set(weight_map.values()) if cold else []:
            descriptor = os.open(tmp_path / file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        for mapped in (False, True):
            assert_same_bits(vramkit.load_file(tmp_path, mapped=mapped), tensors)
        target = {name: torch.zeros_like(t) for name, t in tensors.items()}
        assert vramkit.load_file(tmp_path, into=target)["layer.0"] is target["layer.0"]
        assert_same_bits(target, tensors)


def test_an_empty_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "a.safetensors")
    for mapped in (False, True):
        assert vramkit.load_file(tmp_path / "a.safetensors", mapped=mapped) == {}


def resident() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if "VmRSS" in line) * 1024


def test_a_tensors_memory_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{i}": torch.randn(4 * MB) for i in range(8)}, path)
    found = vramkit.load_file(path)
    before = resident()
    kept = found.pop("3")
    view = found.pop("5")[100:200]
    found.clear()
    gc.collect()
    assert before - resident() > 80 * MB  # of 96, less the large pages that two tensors share
    expected = safetensors.torch.load_file(path)
    assert torch.equal(kept, expected["3"])
    assert torch.equal(view, expected["5"][100:200])


def test_progress_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"one": torch.randn(3 * MB), "two": torch.randn(5 * MB)}
    safetensors.torch.save_file(tensors, path)
    seen: list[tuple[int, int, str]] = []
    vramkit.load_file(path, progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == sorted({step[0] for step in seen})
    assert seen[-1] == (32 * MB, 32 * MB, "two")
    vramkit.load_file(path, progress=True)
    assert "B/s" in capsys.readouterr().err


def test_into_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4, 4), "b": torch.ones(2)}, path)
    target = {"a": torch.zeros(4, 4), "b": torch.zeros(2)}
    for bad, match in [
        ({"a": target["a"]}, "no tensor 'b'"),
        (target | {"b": torch.zeros(3)}, r"\[3\], the file has torch.float32 \[2\]"),
        (target | {"b": torch.zeros(2, dtype=torch.int32)}, "int32"),
        (target | {"b": torch.zeros(4)[::2]}, "contiguous"),
        (target | {"b": torch.zeros(2, device="meta")}, "on the CPU"),
    ]:
        with pytest.raises(ValueError, match=match):
            vramkit.load_file(path, into=bad)
    assert not target["a"].any()
    with pytest.raises(ValueError, match="not both"):
        vramkit.load_file(path, into=target, mapped=True)
    weight = torch.ones(2, requires_grad=True)
    out = (weight * weight).sum()
    vramkit.load_file(path, into=target | {"b": weight.detach()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_files_that_are_not_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(MB)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(vramkit.CheckpointError):
        vramkit.load_file(path)
    path.write_bytes(whole)
    checkpoint = Checkpoint(path)
    (tmp_path / "other").write_bytes(whole)
    (tmp_path / "other").rename(path)
    with pytest.raises(FileChangedError, match="replaced"):
        checkpoint.sources()
    checkpoint = Checkpoint(path)
    files = checkpoint.sources()
    with path.open("r+b") as file:
        file.truncate(2 * MB)
    room = torch.zeros(4 * MB, dtype=torch.uint8)
    source, offset, nbytes = checkpoint.place("a")
    with pytest.raises(FileChangedError, match="load the model again"):
        _core.read_runs(files, [(source, offset, nbytes, room.data_ptr())])
    unknown = tmp_path / "f4.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    unknown.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    for mapped in (False, True):
        with pytest.raises(vramkit.CheckpointError, match="torch has no type"):
            vramkit.load_file(unknown, mapped=mapped)


def test_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(4 * MB)}, path)

    def stop(done: int, total: int, name: str) -> None:
        signal.raise_signal(signal.SIGINT)

    count = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        vramkit.load_file(path, progress=stop)
    assert threading.active_count() == count
    model = nn.Linear(2048, 2048, bias=False)
    vramkit.save(model, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        vramkit.load(
            tmp_path / "model", factory=lambda: nn.Linear(2048, 2048, bias=False), progress=stop
        )
    with pytest.raises(ZeroDivisionError):
        vramkit.load_file(path, progress=lambda *step: 1 // 0)


def test_no_memory(tmp_path: Path, run_python: RunPython) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(16 * MB)}, path)
    script = """
import resource, sys, torch, vramkit
vramkit.load_file(sys.argv[2])
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (40 << 20), -1))
try:
    vramkit.load_file(sys.argv[1])
except MemoryError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
print(vramkit.load_file(sys.argv[1])["a"].shape)
"""
    small = tmp_path / "b.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(8)}, small)
    out = run_python(script, path, small).stdout
    assert "refused: the system has no memory for 69" in out
    assert "torch.Size([16777216])" in out
