"""Offloaded models at their limits: memory, interrupts, faults of the disk, many lives.

What a limit promises is measured from outside, in a process of its own. Faults are real ones: a
file that is cut off, reads that fail with EIO, a disk that is full.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vramkit
from conftest import RunPython
from torch import Tensor, nn
from vramkit import _core, enable_vram_management
from vramkit.errors import FileChangedError
from vramkit.estimator import weight_bytes

SLACK = 64 * 10**6  # what the process itself may take beside the blocks and a call's own memory

# A model of three times the limit, whose weights come from a mapped file: offloaded, or resident
# to show that the measurement can fail. Peaks are anonymous and mapped pages above the level after
# imports, sampled by the kernel (or a thread), and while it runs no more than the limit and the
# slack can be had at all.
SCRIPT = """
import json, resource, sys, threading
import torch, vramkit
from safetensors.torch import load_file
from torch import nn

def status(*keys):
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.split(":")[0] in keys)

class Peak:
    def __enter__(self):
        self.most, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self
    def sample(self):
        while not self.stop.wait(0.001):
            self.most = max(self.most, status(*self.keys))
    def __init__(self, *keys):
        self.keys = keys
    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, status(*self.keys))

width, layers, rows, slack = map(int, sys.argv[1:5])
path, folder, offloads = sys.argv[5:]
torch.set_num_threads(1)
x = torch.full((rows, width), 0.01)
with torch.no_grad():
    tiny = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])  # what a first use brings in
    vramkit.enable_vram_management(tiny, "1 MB", 0, inputs=(x[:, :64],), folder=folder)
    tiny(x[:, :64])
    tiny.vramkit_session.disable()
base = {kind: status(kind) for kind in ("RssAnon", "RssFile")}
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
model.load_state_dict(load_file(path), assign=True)
nbytes = sum(p.nbytes for p in model.parameters())
limit = nbytes // 3
result = {"bytes": nbytes, "limit": limit}
with Peak("RssAnon") as making:
    if offloads == "yes":
        vramkit.enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=folder)
        session = model.vramkit_session
        room = status("VmData") + limit - session.engine.stats().committed + slack
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
result["making"] = making.most - base["RssAnon"]

def settled():
    import time
    moving = (vramkit._core.BlockStatus.requested, vramkit._core.BlockStatus.copying)
    engine = session.engine
    while any(engine.block_stats(i).state in moving for i in range(len(engine))):
        time.sleep(0.01)
    return engine.stats().bytes_copied

with Peak("RssAnon", "RssFile") as running, torch.no_grad():
    first = model(x)
    model(x)  # residents have come and the order is known: from here on it is steady
    if offloads == "yes":
        before = settled()
    outputs = [model(x) for _ in range(4)]
    if offloads == "yes":
        result["copied"] = settled() - before
        slots = {}
        for i in range(len(session.engine)):
            if not session.engine.block_stats(i).resident:
                slots.setdefault(session.engine.slot_of(i), []).append(session.store.sizes[i])
        assert all(len(shared) > 1 for shared in slots.values()), slots
        result["streamed"] = sum(sum(shared) for shared in slots.values())
        result["pass_bytes"] = session.stats().pass_bytes
        result["committed"] = session.stats().committed
result["running"] = running.most - sum(base.values())
assert all(torch.equal(first, one) for one in outputs)
result["sum"] = first.double().sum().item()
print(json.dumps(result))
"""
WIDTH, LAYERS, ROWS = 1536, 32, 16
ACTIVATIONS = 4 * ROWS * WIDTH * 4  # of a call: a few of these are alive at once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 MB of weights in one file."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("limits")
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH) * WIDTH**-0.5
    save_file({f"{i}.weight": weight.roll(i, 0) for i in range(LAYERS)}, folder / "model")
    yield folder / "model"
    shutil.rmtree(folder)


def test_the_limit_holds(checkpoint: Path, tmp_path: Path, run_python: RunPython) -> None:
    found = {}
    for offloads in ("yes", "no"):
        done = run_python(
            SCRIPT, WIDTH, LAYERS, ROWS, SLACK + ACTIVATIONS, checkpoint, tmp_path, offloads
        )
        found[offloads] = json.loads(done.stdout)
        print({k: f"{v / 1e6:.1f} MB" for k, v in found[offloads].items()})
    bound = found["yes"]["limit"] + ACTIVATIONS + SLACK
    assert found["yes"]["running"] <= bound < found["no"]["running"]
    # A smaller figure would mean that nothing was measured.
    assert found["yes"]["running"] > found["yes"]["committed"] * 0.9
    # Blocks are written one at a time, and nothing of the model is copied to memory for it.
    assert found["yes"]["making"] <= bound
    assert found["yes"]["committed"] <= found["yes"]["limit"]
    assert found["yes"]["copied"] == 4 * found["yes"]["streamed"]
    assert found["yes"]["pass_bytes"] == found["yes"]["streamed"]
    assert found["yes"]["sum"] == found["no"]["sum"]


class Layers(nn.Module):
    """Some layers, of which some work on each other's weights."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.attention(x, x, x)[0]
        return out


def made(folder: Path, width: int = 64, layers: int = 10) -> tuple[nn.Module, Tensor, Tensor]:
    """An offloaded model with room for two slots, an input, and its output when resident."""
    torch.manual_seed(0)
    model, x = Layers(width, layers).eval(), torch.randn(2, 5, width)
    with torch.no_grad():
        expected = model(x)
    offload(model, x, folder)
    return model, x, expected


def offload(model: nn.Module, x: Tensor, folder: Path) -> None:
    with pytest.raises(vramkit.BudgetError) as caught:
        enable_vram_management(model, "1 B", 0, inputs=(x,), folder=folder)
    limit = 2 * caught.value.needed_bytes
    assert limit < weight_bytes(model)
    enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=folder)


def descriptors() -> list[str]:
    """Files that this process has open, by name.

    Not pipes and sockets, of which the package makes none: torch's compiler keeps some, and closes
    them when it has been idle for a while.
    """
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(name for name in found if name.startswith("/"))


def threads() -> set[str]:
    """Our threads in this process, the engine's and Python's: they bear our name.

    Torch and its compiler start and end threads of their own when they like.
    """
    found = {f"{t.name} {t.native_id}" for t in threading.enumerate() if "vramkit" in t.name}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
            name = Path(f"/proc/self/task/{thread}/comm").read_text().strip()
            if name.startswith("vramkit"):
                found.add(f"{name} {thread}")
    return found


def held(folder: Path) -> dict[str, Counter[str]]:
    """What this process holds of the system."""
    gc.collect()
    return {
        "files": Counter(p.name for p in folder.iterdir()),
        "descriptors": Counter(descriptors()),
        "threads": Counter(threads()),
    }


def left(folder: Path, before: dict[str, Counter[str]]) -> dict[str, list[str]]:
    """What has come since; what others let go meanwhile is no loss."""
    found = {kind: sorted((now - before[kind]).elements()) for kind, now in held(folder).items()}
    return {kind: names for kind, names in found.items() if names}


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """No file, no descriptor and no thread is left behind."""
    model, x, _ = made(folder)  # what a first use keeps for good
    with torch.no_grad():
        model(x)
    model.vramkit_session.disable()
    del model
    before = held(folder)
    yield
    assert left(folder, before) == {}


def test_many_lives_in_flat_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]), torch.randn(2, 256)
    limit = f"{weight_bytes(model) * 3 // 4} B"

    def life() -> None:
        enable_vram_management(model, limit, 0, inputs=(x,), folder=tmp_path)
        assert torch.equal(model(x), expected)
        model.vramkit_session.disable()

    def resident_pages() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with torch.no_grad():
        expected = model(x)
        for _ in range(20):
            life()
        before, memory = held(tmp_path), resident_pages()
        for _ in range(200):
            life()
    assert left(tmp_path, before) == {}
    # Of a model of 1 MB: what one life in twenty left behind would show.
    assert resident_pages() - memory < 8 * 10**6


def test_unnamed_files(tmp_path: Path) -> None:
    before = held(tmp_path)
    with open(tmp_path, "wb", opener=_core.open_unnamed_file) as file:
        file.write(b"abc")
        file.flush()
        assert list(tmp_path.iterdir()) == []
        assert not os.get_inheritable(file.fileno())
        assert Path(f"/proc/self/fd/{file.fileno()}").read_bytes() == b"abc"
    assert left(tmp_path, before) == {}
    with pytest.raises(FileNotFoundError, match="missing"):
        _core.open_unnamed_file(str(tmp_path / "missing"))
    assert left(tmp_path, before) == {}


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """So that it is gone when the process is, and nobody puts another in its place."""
    before = held(tmp_path)
    model, x, expected = made(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    come = left(tmp_path, before)  # what the tests of leaks look for is there while the model lives
    assert len(come["descriptors"]) >= 1
    assert {name.split()[0] for name in come["threads"]} == {"vramkit-copy"}


@pytest.mark.parametrize("fault", ["cut off", "written to"])
def test_a_file_that_changes(fault: str, tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        model, x, expected = made(tmp_path)
        other, _, _ = made(tmp_path)
        session = model.vramkit_session
        with torch.no_grad():
            assert torch.equal(model(x), expected)
            if fault == "cut off":
                os.truncate(session.store.path, 4096)
            else:
                with open(session.store.path, "r+b") as file:
                    file.write(b"else")
            for _ in range(3):
                with pytest.raises(FileChangedError):
                    model(x)
            with pytest.raises(FileChangedError, match="load the model again"):
                session.disable()
            assert model.vramkit_session is session
            model.layers[0].weight.data = torch.zeros(64, 64)  # cannot be written to such a file
            with pytest.raises(FileChangedError):
                model(x)
            session.engine.check()
            assert torch.equal(other(x), expected)
        other.vramkit_session.disable()
        assert torch.equal(other(x).detach(), other(x).detach())
        del model, session, other


def test_reads_that_fail(tmp_path: Path) -> None:
    """EIO, as often as it comes, is raised; once it is over the model runs as ever."""
    with nothing_left(tmp_path):
        model, x, expected = made(tmp_path, 128)
        file = os.stat(model.vramkit_session.store.path)
        descriptors = [int(fd) for fd in os.listdir("/proc/self/fd") if _is(int(fd), file)]
        saved = {fd: os.dup(fd) for fd in descriptors}
        broken = os.open("/proc/self/mem", os.O_RDONLY)  # reading at 0, where nothing lies: EIO
        with torch.no_grad():
            assert torch.equal(model(x), expected)
            for fd in descriptors:
                os.dup2(broken, fd)
            try:
                for _ in range(3):
                    with pytest.raises(OSError, match=r"reading .* failed") as caught:
                        model(x)
                    assert caught.value.errno == errno.EIO
            finally:
                for fd, copy in saved.items():
                    os.dup2(copy, fd)
                    os.close(copy)
                os.close(broken)
            for _ in range(3):
                assert torch.equal(model(x), expected)
        assert model.vramkit_session.stats().failed >= 3
        model.vramkit_session.engine.check()
        model.vramkit_session.disable()
        del model, caught


def _is(descriptor: int, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file)
    except OSError:
        return False  # that of the listing itself, closed by now


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    """EFBIG at the first writing leaves a plain model; at a later one, a model that tries again."""
    with nothing_left(tmp_path):
        torch.manual_seed(0)
        model, x = Layers(64, 10).eval(), torch.randn(2, 5, 64)
        with torch.no_grad():
            expected = model(x)
            with file_size_limit(65536), pytest.raises(OSError) as caught:  # noqa: PT011
                enable_vram_management(model, "100 KB", 0, inputs=(x,), folder=tmp_path)
            assert caught.value.errno == errno.EFBIG
            assert not any("forward" in m.__dict__ for m in model.modules())
            assert torch.equal(model(x), expected)

            offload(model, x, tmp_path)
            assert torch.equal(model(x), expected)
            for layer in (model.layers[1], model.attention.out_proj):
                layer.weight.mul_(2)
            with file_size_limit(0):
                for _ in range(2):
                    with pytest.raises(OSError) as caught:  # noqa: PT011
                        model(x)
                    assert caught.value.errno == errno.EFBIG
            found = model(x)
            model.vramkit_session.disable()
            assert torch.equal(found, model(x))
            assert not torch.equal(found, expected)
        del model, caught  # whose traceback has all of it


FULL = """
import errno, os, sys, torch, vramkit
from torch import nn
folder = sys.argv[1]
torch.manual_seed(0)
model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)]), torch.randn(3, 256)
expected = model(x)
try:
    vramkit.enable_vram_management(model, "1 MB", 0, inputs=(x,), folder=folder)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
else:
    raise AssertionError("a disk of 1 MB took 3 MB")
assert torch.equal(model(x), expected)
assert os.listdir(folder) == [] and os.statvfs(folder).f_bavail == os.statvfs(folder).f_blocks
print("full")
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A file system of 1 MB, in a name space of mounts of its own."""
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if tried.returncode:
        pytest.skip(f"no mounts in a name space here: {tried.stderr.decode().strip()}")
    command = f'{mount} && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "full\n", done.stderr


class Rang(BaseException):
    """What the signal's handler raises, as Ctrl-C raises KeyboardInterrupt."""


def test_signals_at_any_moment(tmp_path: Path) -> None:
    """Wherever a call is broken off, the next one gives the right bits, and nothing is left."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")

    def ring(*_: object) -> None:
        raise Rang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with nothing_left(tmp_path):
            model, x, expected = made(tmp_path)
            # What is raised within a collection is kept by who reports it, with all of the frames.
            gc.disable()
            broken_off = 0
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                start = time.perf_counter()
                model(x)
                whole = time.perf_counter() - start
                delays = torch.rand(240, generator=generator) * 1.2 * whole + 1e-6
                for turn, delay in enumerate(delays.tolist()):
                    if turn % 16 == 0:  # weights that count as changed: their block is written
                        model.layers[turn // 16 % 10].weight.mul_(1)
                    try:
                        signal.setitimer(signal.ITIMER_REAL, delay)
                        found = model(x)
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        assert torch.equal(found, expected)
                    except Rang:
                        broken_off += 1
                    if broken_off % 10 == 0:
                        assert torch.equal(model(x), expected)
            assert broken_off > 20  # how many depends on how loaded the machine is
            state = {k: v.clone() for k, v in model.state_dict().items()}
            assert torch.equal(model(x).detach(), model(x).detach())
            model.vramkit_session.engine.check()
            model.vramkit_session.disable()
            after = model.state_dict()
            assert all(torch.equal(after[k], v) for k, v in state.items())
            del model, state, after
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


INTERRUPT = """
import os, signal, sys, threading, time, torch, vramkit
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model, x = nn.Sequential(*[nn.Linear(1536, 1536) for _ in range(12)]), torch.randn(1, 1536)
with torch.no_grad():
    expected = model(x)
    vramkit.enable_vram_management(model, "25 MB", 0, inputs=(x,), folder=sys.argv[1])
    session = model.vramkit_session
    waiting = threading.Event()
    interrupted = 0
    for turn in range(4):
        handle = os.open(session.store.path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        def press():
            before = session.engine.stats()
            while session.engine.stats().waits <= before.waits + turn % 3:
                time.sleep(0.0001)
            os.kill(os.getpid(), signal.SIGINT)  # while somebody waits for a block
        pressing = threading.Thread(target=press)
        pressing.start()
        try:
            while True:
                model(x)
                for block in range(len(session.engine)):
                    session.engine.invalidate(block)
        except KeyboardInterrupt:
            interrupted += 1
        pressing.join()
        assert torch.equal(model(x), expected)
        session.engine.check()
    session.disable()
    assert torch.equal(model(x), expected)
print(interrupted)
"""


def test_interrupt_during_a_transfer(tmp_path: Path, run_python: RunPython) -> None:
    assert run_python(INTERRUPT, tmp_path).stdout == "4\n"
    assert list(tmp_path.iterdir()) == []
