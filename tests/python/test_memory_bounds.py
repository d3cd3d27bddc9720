"""How much memory loading and converting take: measured in a process of its own, at its peak.

A checkpoint of 1.2 GB is made on the fly. The bound: above the level after imports, anonymous and
mapped pages together stay under the converted size + two of the largest tensors + 100 MB; file to
file, under two of the largest tensors + 100 MB.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import RunPython
from vramkit import _core

LARGEST = 4096 * 4096 * 4
COUNT = 18
SLACK = 100 * 10**6

SCRIPT = """
import json, sys, threading, time
import torch, vramkit, vramkit.checkpoint, vramkit.planner
from torch import nn

def status(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))

class Peak:
    # The kernel's own high-water mark where it lets us reset it, else samples of a thread.
    def __enter__(self):
        self.base = status("VmRSS:")
        self.samples, self.stop = self.base, threading.Event()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.kernel = status("VmHWM:") < self.base + (8 << 20)
        except OSError:
            self.kernel = False
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self
    def sample(self):
        while not self.stop.wait(0.001):
            self.samples = max(self.samples, status("VmRSS:"))
    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        peak = status("VmHWM:") if self.kernel else self.samples
        self.bytes = max(peak, self.samples) - self.base

count, (what, folder) = int(sys.argv[1]), sys.argv[2:]
source = folder + "/model.safetensors"
def factory():
    return nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(count))
converted = 0
with Peak() as peak:
    if what == "load":
        model = vramkit.load(source, precision="nf4", factory=factory)
    elif what == "load_plain":
        model = vramkit.load(source, factory=factory)
    elif what == "limit":
        model = vramkit.load(source, vram_limit="200 MB", factory=factory)
    else:
        model = None
        vramkit.convert_checkpoint(source, folder + "/out", "nf4", factory=factory)
if model is not None:
    converted = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": peak.bytes, "converted": converted}))
"""


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    weight = torch.randn(4096, 4096) * 0.02
    specs = [(f"{i}.weight", "F32", [4096, 4096]) for i in range(COUNT)]
    with _core.SafetensorsWriter(folder / "model.safetensors", specs, {}) as writer:
        for name, _, _ in specs:
            writer.write(name, weight.data_ptr(), weight.nbytes)
        writer.commit()
    return folder


def peak_of(what: str, folder: Path, run_python: RunPython) -> tuple[int, int]:
    result = json.loads(run_python(SCRIPT, COUNT, what, folder).stdout)
    print(what, {k: f"{v / 1e6:.0f} MB" for k, v in result.items()})
    return result["peak"], result["converted"]


def test_loading(big_checkpoint: Path, run_python: RunPython) -> None:
    peak, converted = peak_of("load", big_checkpoint, run_python)
    assert converted == COUNT * (LARGEST // 8 + LARGEST // 64)
    assert converted <= peak < converted + 2 * LARGEST + SLACK


def test_loading_as_stored(big_checkpoint: Path, run_python: RunPython) -> None:
    peak, converted = peak_of("load_plain", big_checkpoint, run_python)
    assert converted == COUNT * LARGEST
    assert converted <= peak < converted + 2 * LARGEST + SLACK


def test_file_to_file(big_checkpoint: Path, run_python: RunPython) -> None:
    peak, _ = peak_of("convert", big_checkpoint, run_python)
    # At least one tensor is in memory at a time: a smaller figure would mean a broken measurement.
    assert LARGEST <= peak < 2 * LARGEST + SLACK
    out = big_checkpoint / "out" / "model.safetensors"
    assert out.stat().st_size == pytest.approx(COUNT * (LARGEST // 8 + LARGEST // 64), abs=1 << 16)


def test_the_measurement_can_fail(run_python: RunPython) -> None:
    """It sees memory that is touched and freed again, and pages of a mapped file."""
    script = SCRIPT.split("count, (what")[0] + """
import mmap, tempfile
with Peak() as peak:
    x = torch.ones(50_000_000)
    del x
with tempfile.TemporaryFile() as file:
    file.write(bytes(100_000_000))
    file.flush()
    with Peak() as mapped:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        total = sum(view[i] for i in range(0, len(view), 4096))
print(peak.bytes, mapped.bytes)
"""
    touched, mapped = map(int, run_python(script).stdout.split())
    assert 195 * 10**6 < touched < 260 * 10**6
    assert 95 * 10**6 < mapped < 160 * 10**6
