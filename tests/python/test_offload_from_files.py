"""Models as stored: loaded, mapped, and offloaded straight from a checkpoint.

What is offloaded so is never in memory whole, and its files stay as they are in any case.
"""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import vramkit
from conftest import RunPython
from odd_files import askew, assert_same_bits
from torch import Tensor, nn
from vramkit import _core
from vramkit.errors import FileChangedError
from vramkit.offload import homes
from vramkit.offload import store as stores
from vramkit.shards import SAFETENSORS_NAMES
from vramkit.tensor_files import ModelFiles

MB = 1 << 20

WIDTH = 256


class Chain(nn.Module):
    """Layers in a row, a buffer that is stored, and a parameter that only the root uses."""

    def __init__(self, count: int = 12, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
            for _ in range(count)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("offset", torch.full((width,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x * self.scale + self.offset


def built() -> tuple[Chain, Tensor]:
    torch.manual_seed(1)
    return Chain().eval(), torch.randn(3, WIDTH)


def written(model: nn.Module, how: str, folder: Path) -> Path:
    """A checkpoint of the model as several writers make it."""
    if how == "ours":
        return vramkit.save(model, folder / "ours")
    path = folder / f"{how}.safetensors"
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if how == "theirs":
        safetensors.torch.save_file(tensors, path)
    elif how == "askew":
        askew(tensors, path, 1)
    else:  # all of the first weights, then all of the second, in parts
        order = sorted(tensors, key=lambda name: name.split(".")[::-1])
        askew({name: tensors[name] for name in order}, path, 0)
    return path


def assert_same_model(model: nn.Module, expected: nn.Module) -> None:
    assert_same_bits(dict(model.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("precision", [None, "int8", "nf4_dq"])
@pytest.mark.parametrize("mapped", [False, True])
def test_models_as_stored(precision: str | None, mapped: bool, tmp_path: Path) -> None:
    model, x = built()
    if precision is not None:
        vramkit.convert(model, precision)
    path = written(model, "ours", tmp_path)
    before = (path / "model.safetensors").read_bytes()
    loaded = vramkit.load(path, factory=Chain, mapped=mapped)
    assert_same_model(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.zero_()
    assert (path / "model.safetensors").read_bytes() == before
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert getattr(other, "vramkit_files", None) is None
        assert_same_model(other, loaded)


def test_parameters_that_share_a_tensor_in_the_file_only(tmp_path: Path) -> None:
    """A file with one tensor for two names that the class does not tie."""

    class Two(nn.Module):
        base_model_prefix = "base"

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.base = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False)})

    safetensors.torch.save_file({"one.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    for mapped in (False, True):
        loaded = vramkit.load(tmp_path / "a.safetensors", factory=Two, mapped=mapped)
        with torch.no_grad():
            loaded.one.weight.zero_()
        assert torch.equal(loaded.base["one"].weight, torch.ones(4, 4))


# Offloading from a checkpoint.

LIMIT = "8 MB"  # of a model of 25 MB, in int8 6 MB


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    ("how", "precision"),
    [("ours", None), ("ours", "int8"), ("theirs", None), ("askew", None), ("scattered", None)],
)
def test_offloaded_from_where_it_is(
    how: str,
    precision: str | None,
    deferred: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(homes, "PART", 2 * MB)
    model, x = built()
    if precision is not None:
        vramkit.convert(model, precision)
    path = written(model, how, tmp_path)
    contents = {f: f.read_bytes() for f in tmp_path.rglob("*.safetensors")}
    cache = tmp_path / "cache"
    limit = LIMIT if precision is None else "2 MB"
    loaded = vramkit.load(path, factory=Chain, vram_limit=limit, offload=True, folder=cache,
                          inputs=None if deferred else (x,))  # fmt: skip
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(loaded(x), model(x))
    session = loaded.vramkit_session
    kind = "in place" if how in ("ours", "theirs") else "gathered"
    assert set(session.store.origins()) == {kind}
    assert [p.suffix for p in cache.rglob("*.blocks")] == []
    assert len(list(cache.rglob("blocks.safetensors"))) == (kind == "gathered")
    assert_same_model(loaded, model)
    stats = session.stats()
    assert stats.committed <= stats.limit
    assert stats.bytes_copied > stats.limit
    # Changes stay out of every file that others may read.
    with torch.no_grad():
        for one in (loaded, model):
            first = next(p for p in one.layers[2].parameters() if p.dtype.is_floating_point)
            first += 1
            one.scale *= 2
        assert torch.equal(loaded(x), model(x))
    assert set(session.store.origins()) == {kind, "own"}
    assert_same_model(loaded, model)
    session.engine.check()
    session.disable()
    assert "vramkit_files" not in loaded.__dict__
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert_same_model(loaded, model)
    for file, content in contents.items():
        assert file.read_bytes() == content


def test_scattered_blocks_are_gathered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "PART", 2 * MB)
    model, x = built()
    path = written(model, "scattered", tmp_path)
    stamps = []
    for _ in range(2):
        loaded = vramkit.load(path, factory=Chain, vram_limit=LIMIT, inputs=(x,), folder=tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
        (built_file,) = tmp_path.rglob("blocks.safetensors")
        stamps.append(built_file.stat().st_mtime_ns)
        loaded.vramkit_session.disable()
        del loaded
        gc.collect()
    assert stamps[0] == stamps[1]
    with pytest.raises(vramkit.BudgetError, match="the cache may hold 1000000 bytes"):
        vramkit.load(path, factory=Chain, vram_limit=LIMIT, inputs=(x,),
                     folder=tmp_path / "other", cache_limit="1 MB")  # fmt: skip


def test_training_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    model, x = built()
    path = written(model, "theirs", tmp_path)
    before = path.read_bytes()
    loaded = vramkit.load(path, factory=Chain, vram_limit=LIMIT, inputs=(x,), folder=tmp_path / "c")
    for one in (loaded, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(loaded(x), model(x))
    assert_same_model(loaded, model)
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    for one in (loaded, model):
        one.load_state_dict(state)
    assert torch.equal(loaded(x), model(x))
    assert path.read_bytes() == before
    assert list((tmp_path / "c").iterdir()) == []  # own files have no names


def test_what_was_changed_before_the_first_call(tmp_path: Path) -> None:
    """Also through `.data`, which no version counter sees; and a new module among mapped ones."""
    model, x = built()
    path = written(model, "theirs", tmp_path)
    loaded = vramkit.load(path, factory=Chain, vram_limit=LIMIT, offload=True, folder=tmp_path)
    for one in (loaded, model):
        one.layers[3][0].weight.data.mul_(3)
        torch.manual_seed(5)
        one.layers[5].append(nn.Linear(WIDTH, WIDTH))
        one.scale.data.add_(1)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    origins = loaded.vramkit_session.store.origins()
    assert "in place" in origins
    assert "in place and own" in origins
    assert_same_model(loaded, model)
    # Offloaded again without reading or writing what is already in files.
    store = loaded.vramkit_session.store
    blocks = loaded.vramkit_session.division.blocks
    again = stores.BlockStore(loaded, blocks, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert_same_model(loaded, model)
    assert len(again.plan(blocks)[0]) == len(store.plan(blocks)[0])


def test_what_is_refused(tmp_path: Path) -> None:
    model, x = built()
    plain = written(model, "theirs", tmp_path)
    ours = written(model, "ours", tmp_path)
    with pytest.raises(vramkit.BudgetError) as caught:
        vramkit.load(plain, factory=Chain, vram_limit="1 MB", inputs=(x,), folder=tmp_path)
    needed = caught.value.needed_bytes
    vramkit.load(plain, factory=Chain, vram_limit=f"{needed} B", inputs=(x,), folder=tmp_path)
    for arguments, match in [
        ({"path": ours, "precision": "nf4"}, "converted already"),
        ({"path": ours, "vram_limit": "1 GB", "offload": False}, "no formats to choose"),
        ({"path": plain, "precision": "nf4", "inputs": (x,)}, "convert_checkpoint"),
        ({"path": plain, "precision": "nf4", "mapped": True}, "stays as stored"),
        ({"path": plain, "vram_limit": "1 GB", "mapped": True}, "stays as stored"),
        ({"path": plain, "precision": "nf4", "vram_limit": "1 GB"}, "not both"),
    ]:
        with pytest.raises(ValueError, match=match):
            vramkit.load(factory=Chain, **arguments)  # type: ignore[arg-type]


def test_a_limit_that_is_too_small_leaves_a_mapped_model(tmp_path: Path) -> None:
    model, x = built()
    path = written(model, "theirs", tmp_path)
    loaded = vramkit.load(path, factory=Chain, mapped=True)
    loaded.layers[0][0].weight.data.add_(1)
    model.layers[0][0].weight.data.add_(1)
    for _ in range(2):
        with pytest.raises(vramkit.BudgetError):
            vramkit.enable_vram_management(loaded, "1 MB", 0, inputs=(x,), folder=tmp_path / "c")
        assert_same_model(loaded, model)
        files = ModelFiles.of(loaded)
        assert files.holds(loaded.layers[4][0].weight)  # still not in memory
        assert files.find(loaded.layers[0][0].weight) is None
        assert list((tmp_path / "c").iterdir()) == []
    vramkit.enable_vram_management(loaded, LIMIT, 0, inputs=(x,), folder=tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_full_disk(tmp_path: Path) -> None:
    """A file-size limit stands for it: own files and the cache's cannot be written."""
    model, x = built()
    scattered, plain = written(model, "askew", tmp_path), written(model, "theirs", tmp_path)
    loaded = vramkit.load(plain, factory=Chain, vram_limit=LIMIT, inputs=(x,), folder=tmp_path)
    with torch.no_grad():
        expected = loaded(x)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, old[1]))
        try:
            with pytest.raises(OSError, match="too large") as caught:
                vramkit.load(scattered, factory=Chain, vram_limit=LIMIT, inputs=(x,),
                             folder=tmp_path / "c")  # fmt: skip
            assert caught.value.errno == errno.EFBIG
            loaded.layers[0][0].weight.mul_(2)
            for _ in range(2):
                with pytest.raises(OSError, match="too large") as caught:
                    loaded(x)
                assert caught.value.errno == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        model.layers[0][0].weight.mul_(2)
        assert torch.equal(loaded(x), model(x))  # nothing was lost
        loaded.layers[0][0].weight.div_(2)
        assert torch.equal(loaded(x), expected)
    assert list(tmp_path.rglob("*.blocks")) == []
    assert list((tmp_path / "c").rglob("blocks.safetensors")) == []


def test_a_checkpoint_that_is_written_to_is_noticed(tmp_path: Path) -> None:
    model, x = built()
    path = written(model, "theirs", tmp_path)
    loaded = vramkit.load(path, factory=Chain, vram_limit=LIMIT, inputs=(x,), folder=tmp_path)
    with torch.no_grad():
        loaded(x)
        os.utime(path, ns=(1, 1))
        with pytest.raises(FileChangedError, match="stays as it is"):
            loaded(x)
        path.rename(tmp_path / "elsewhere")  # another name is no change
        os.utime(tmp_path / "elsewhere", ns=(1, 1))
    model2 = vramkit.load(tmp_path / "elsewhere", factory=Chain, vram_limit=LIMIT, inputs=(x,),
                          folder=tmp_path)  # fmt: skip
    (tmp_path / "elsewhere").unlink()
    with torch.no_grad():
        assert torch.equal(model2(x), model(x))


MEMORY = """
import json, sys, threading
import torch, vramkit, vramkit.checkpoint, vramkit.offload.manage, vramkit.breaks, vramkit.dry_run
from torch import nn

WIDTH, COUNT = 512, 24
def factory():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(),
                                         nn.Linear(4 * WIDTH, WIDTH)) for _ in range(COUNT)))
def status():
    lines = dict(l.split(":", 1) for l in open("/proc/self/status"))
    return sum(int(lines[key].split()[0]) << 10 for key in ("RssAnon", "RssFile"))

small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # all that is imported on the way
vramkit.enable_vram_management(small, "1 GB", 0, inputs=(torch.zeros(1, 8),), folder=sys.argv[2])
small(torch.zeros(1, 8))
small.vramkit_session.disable()
path, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
x = torch.ones(4, WIDTH)
base = peak = status()
stop = threading.Event()
def sample():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, status())
thread = threading.Thread(target=sample)
thread.start()
model = vramkit.load(path, factory=factory, vram_limit=f"{limit} B", inputs=(x,), folder=folder)
with torch.no_grad():
    for _ in range(2):
        y = model(x)
stop.set()
thread.join()
stats = model.vramkit_session.stats()
print(json.dumps({"above": peak - base, "copied": stats.bytes_copied,
                  "sum": y.double().sum().item(),
                  "bytes": sum(p.nbytes for p in model.parameters()),
                  "origins": sorted(set(model.vramkit_session.store.origins()))}))
"""


PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("scattered", [False, True])
def test_the_whole_model_is_never_in_memory(
    scattered: bool, tmp_path: Path, run_python: RunPython
) -> None:
    base = torch.randn(4 * 512 * 512) * 512**-0.5
    tensors = {}
    for layer in range(24):  # 201 MB
        for part, shape in (("0", (4 * 512, 512)), ("2", (512, 4 * 512))):
            tensors[f"{layer}.{part}.weight"] = base.roll(layer).view(shape)
            tensors[f"{layer}.{part}.bias"] = base[layer : layer + shape[0]]
    lead = 1 if scattered else 0  # at odd addresses nothing can be used where it lies
    names = ["lead", *tensors]
    tensors["lead"] = torch.zeros(lead, dtype=torch.uint8)
    specs = [(n, SAFETENSORS_NAMES[tensors[n].dtype], list(tensors[n].shape)) for n in names]
    path = tmp_path / "model.safetensors"
    with _core.SafetensorsWriter(path, specs, {}) as writer:
        for name in names:
            writer.write(name, tensors[name].data_ptr(), tensors[name].nbytes)
        writer.commit()
    limit = 36 * 10**6
    done = run_python(MEMORY, path, tmp_path / "cache", limit, env={"OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(done.stdout)
    x = torch.ones(4, 512)
    for layer in range(24):
        up, bias, down, last = (tensors[f"{layer}.{k}"] for k in PARTS)
        x = nn.functional.linear(torch.relu(nn.functional.linear(x, up, bias)), down, last)
    assert found["sum"] == x.double().sum().item()
    assert found["origins"] == (["gathered"] if scattered else ["in place"])
    assert found["bytes"] > 5 * limit
    assert found["copied"] > 5 * limit
    assert found["above"] < limit + 30 * 10**6
