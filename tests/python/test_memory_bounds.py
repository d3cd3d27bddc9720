"""How much memory loading and converting take: measured in a process of its own, at its peak.

Checkpoints of 1.2 GB are made on the fly. The bound: above the level after imports, anonymous and
mapped pages together stay under the converted size + two of the largest tensors + 100 MB; file to
file, under two of the largest tensors + 100 MB. Tensors of 64 MiB have memory of their own; those
of 16 MiB lie in the heap, where what is freed has to be given back too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import RunPython
from vramkit import _core

# Rows and columns of each weight, and how many of them.
SHAPES = [(4096, 18), (2048, 72)]
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

size, count = map(int, sys.argv[1:3])
what, folder = sys.argv[3:]
source = folder + "/model.safetensors"
def factory():
    return nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
converted = 0
with Peak() as peak:
    if what == "load":
        model = vramkit.load(source, precision="nf4", factory=factory)
    elif what == "load_plain":
        model = vramkit.load(source, factory=factory)
    elif what == "limit":
        model = vramkit.load(source, vram_limit=f"{size * size * count} B", factory=factory)
    else:
        model = None
        vramkit.convert_checkpoint(source, folder + "/out", "nf4", factory=factory)
if model is not None:
    converted = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": peak.bytes, "converted": converted}))
"""


class Big:
    """A folder with a checkpoint of `count` float32 weights of `size` by `size`."""

    def __init__(self, folder: Path, size: int, count: int) -> None:
        self.folder, self.size, self.count = folder, size, count
        self.largest = size * size * 4
        self.converted = count * (self.largest // 8 + self.largest // 64)  # nf4
        weight = torch.randn(size, size) * 0.02
        specs = [(f"{i}.weight", "F32", [size, size]) for i in range(count)]
        with _core.SafetensorsWriter(folder / "model.safetensors", specs, {}) as writer:
            for name, _, _ in specs:
                writer.write(name, weight.data_ptr(), weight.nbytes)
            writer.commit()

    def peak(self, what: str, run_python: RunPython) -> tuple[int, int]:
        """(peak, size of the loaded model) of doing `what`, in bytes."""
        done = run_python(SCRIPT, self.size, self.count, what, self.folder)
        result = json.loads(done.stdout)
        print(what, self.size, {k: f"{v / 1e6:.0f} MB" for k, v in result.items()})
        return result["peak"], result["converted"]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Big]:
    folder = tmp_path_factory.mktemp("big")
    yield Big(folder, *request.param)
    shutil.rmtree(folder)


def test_loading(big: Big, run_python: RunPython) -> None:
    peak, converted = big.peak("load", run_python)
    assert converted == big.converted
    assert converted <= peak < converted + 2 * big.largest + SLACK


def test_loading_as_stored(big: Big, run_python: RunPython) -> None:
    peak, converted = big.peak("load_plain", run_python)
    assert converted == big.count * big.largest
    assert converted <= peak < converted + 2 * big.largest + SLACK


def test_file_to_file(big: Big, run_python: RunPython) -> None:
    peak, _ = big.peak("convert", run_python)
    # At least one tensor is in memory at a time: a smaller figure would mean a broken measurement.
    assert big.largest <= peak < 2 * big.largest + SLACK
    out = big.folder / "out" / "model.safetensors"
    assert out.stat().st_size == pytest.approx(big.converted, abs=1 << 16)


def test_loading_under_a_limit(tmp_path: Path, run_python: RunPython) -> None:
    """Two passes, and every format tried in the first: a smaller checkpoint keeps it short."""
    small = Big(tmp_path, 2048, 16)
    peak, converted = small.peak("limit", run_python)
    assert converted <= small.count * small.largest // 4
    assert converted <= peak < converted + 2 * small.largest + SLACK


def test_the_measurement_can_fail(run_python: RunPython) -> None:
    """It sees memory that is touched and freed again, and pages of a mapped file."""
    script = (
        SCRIPT.split("size, count =")[0]
        + """
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
    )
    touched, mapped = map(int, run_python(script).stdout.split())
    assert 195 * 10**6 < touched < 260 * 10**6
    assert 95 * 10**6 < mapped < 160 * 10**6
