"""The systems' lazy wrappers alike: use after unload, failed loads, freed bytes, threads."""

from __future__ import annotations

import gc
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import nn
from vramkit.errors import BudgetError, CheckpointError, StaleHandleError
from vramkit.heartmula import write_small
from vramkit.lazy_pipeline import LazyPipeline
from vramkit.lazy_systems import LazyChatterbox, LazyHeartMuLa, LazyP3SAM, LazyQwenImage
from vramkit.model_objects import tensors_of

from benchmarks.small_hunyuan3d import AutoMask, P3Sam
from benchmarks.small_qwen import embeddings, pipeline

SONG = {"lyrics": "[verse]\nla la la", "tags": "pop,happy"}
SHORT: dict[str, Any] = {"max_audio_length_ms": 160, "seed": 3, "codec_steps": 1, "cfg_scale": 1.0}


class ChatterboxTTS:
    """A plain object with upstream's parts and method."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.t3, self.s3gen = nn.Linear(64, 64), nn.Conv1d(1, 64, 3, padding=1)
        self.ve, self.sr = nn.LSTM(8, 16), 24000

    @classmethod
    def from_local(cls, path: str, device: str) -> ChatterboxTTS:
        assert Path(path).name == "weights"
        assert device == "cpu"
        return cls()

    def generate(self, text: str) -> torch.Tensor:
        tokens = torch.tensor([float(ord(c)) / 128 for c in text[:64].ljust(64)])
        return self.s3gen(self.t3(tokens)[None]).sum(0)


@dataclass
class System:
    """One wrapper: how to make it, use it, and which attribute is a module.

    `broken` makes the next loads fail until the function that it returns is called.
    """

    make: Callable[..., LazyPipeline]
    use: Callable[[Any], torch.Tensor]
    part: str
    broken: Callable[[], Callable[[], None]]
    error: type[Exception]
    words: str


def _chatterbox(patch: pytest.MonkeyPatch, folder: Path) -> System:
    module: Any = types.ModuleType("chatterbox.tts")
    module.ChatterboxTTS = ChatterboxTTS
    patch.setitem(sys.modules, "chatterbox", types.ModuleType("chatterbox"))
    patch.setitem(sys.modules, "chatterbox.tts", module)

    def broken() -> Callable[[], None]:
        del module.ChatterboxTTS
        return lambda: setattr(module, "ChatterboxTTS", ChatterboxTTS)

    return System(
        lambda **options: LazyChatterbox(str(folder / "weights"), **options),
        lambda pipe: pipe.generate("text"),
        "t3", broken, ImportError, "chatterbox-tts",
    )  # fmt: skip


class Switch:
    """Something that fails from a call on, until what the call returned is called."""

    on = False

    def __call__(self) -> Callable[[], None]:
        self.on = True

        def repair() -> None:
            self.on = False

        return repair


def _p3sam(patch: pytest.MonkeyPatch, folder: Path) -> System:
    module: Any = types.ModuleType("auto_mask")
    broken = Switch()

    def make(ckpt_path: str | None, point_num: int = 0) -> AutoMask:
        assert (ckpt_path, point_num) == ("weights.pt", 24)
        if broken.on:
            raise RuntimeError("the checkpoint is damaged")
        torch.manual_seed(0)
        return AutoMask(P3Sam())

    module.AutoMask = make
    patch.setitem(sys.modules, "auto_mask", module)

    cloud = torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
    return System(
        lambda **options: LazyP3SAM("weights.pt", auto_mask={"point_num": 24}, **options),
        lambda pipe: pipe.predict_aabb(cloud, prompt_num=4)[1],
        "model", broken, RuntimeError, "damaged",
    )  # fmt: skip


def _heartmula(patch: pytest.MonkeyPatch, folder: Path) -> System:
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    place = write_small(folder / "ckpt")
    weights = place / "HeartCodec-oss" / "model.safetensors"

    def broken() -> Callable[[], None]:
        moved = weights.rename(weights.with_name("elsewhere"))
        return lambda: (moved.rename(weights), None)[1]

    return System(
        lambda **options: LazyHeartMuLa(str(place), **options),
        lambda pipe: pipe(SONG, **SHORT).wav,
        "mula", broken, CheckpointError, "holds no safetensors file",
    )  # fmt: skip


def _qwen_image(patch: pytest.MonkeyPatch, folder: Path) -> System:
    diffusers = pytest.importorskip("diffusers")
    broken = Switch()

    def from_pretrained(path: str, torch_dtype: torch.dtype) -> Any:
        assert (path, torch_dtype) == ("somewhere", torch.float32)
        if broken.on:
            raise OSError("no such repository")
        return pipeline()

    patch.setattr(diffusers.QwenImagePipeline, "from_pretrained", from_pretrained)

    turn = threading.Lock()  # diffusers' schedulers count their steps: one call at a time

    def use(pipe: Any) -> torch.Tensor:
        with turn:
            found = pipe(
                **embeddings(), height=32, width=32, num_inference_steps=1, output_type="latent",
                generator=torch.Generator().manual_seed(0), true_cfg_scale=1.0,
            )  # fmt: skip
        return found.images

    return System(
        lambda **options: LazyQwenImage("somewhere", torch_dtype="float32", **options),
        use, "transformer", broken, OSError, "no such repository",
    )  # fmt: skip


SYSTEMS = {
    "chatterbox": _chatterbox,
    "p3sam": _p3sam,
    "heartmula": _heartmula,
    "qwen_image": _qwen_image,
}


@pytest.fixture(params=list(SYSTEMS))
def system(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> System:
    return SYSTEMS[request.param](monkeypatch, tmp_path)


@torch.no_grad()
def test_use_after_unload_and_freed_bytes(system: System) -> None:
    pipe = system.make()
    assert not pipe.is_loaded
    first = system.use(pipe)
    part = getattr(pipe, system.part)
    next(iter(part.parameters()))
    with pipe.lease() as loaded:
        parts = list(tensors_of(loaded))
        gone = [weakref.ref(tensor) for tensor in parts]
        held = sum(tensor.nbytes for tensor in parts)
        del loaded, parts
    assert sum(pipe.loaded_parts().values()) == held > 0
    assert pipe.unload() == held
    gc.collect()
    alive = [ref for ref in gone if ref() is not None]
    assert not alive
    assert not pipe.is_loaded
    with pytest.raises(StaleHandleError):
        list(part.parameters())
    assert not pipe.is_loaded  # a stale handle loads nothing
    assert torch.equal(system.use(pipe), first)
    assert pipe.is_loaded
    pipe.unload()
    with pytest.raises(StaleHandleError):  # nor does loading bring an old handle back
        list(part.parameters())


@torch.no_grad()
def test_a_failed_load_leaves_it_loadable(system: System) -> None:
    pipe = system.make()
    events: list[str] = []
    pipe.on(lambda event: events.append(event.kind))
    repair = system.broken()
    for _ in range(2):
        with pytest.raises(system.error, match=system.words):
            system.use(pipe)
        assert not pipe.is_loaded
        assert pipe.loaded_parts() == {}
    assert events == ["loading", "failed"] * 2
    assert pipe.unload() == 0
    repair()
    made = system.use(pipe)
    assert torch.isfinite(made.float()).all()
    assert events[4:] == ["loading", "loaded"]


@torch.no_grad()
def test_threads_use_and_unload(system: System) -> None:
    """Results are those of one thread, whatever is unloaded meanwhile; in the end all is free."""
    pipe = system.make()
    expected = system.use(pipe)
    pipe.unload()
    kinds = Counter[str]()
    pipe.on(lambda event: kinds.update([event.kind]))
    barrier = threading.Barrier(4)
    results: list[torch.Tensor] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            barrier.wait(30)
            for _ in range(3):
                if number == 0:
                    pipe.unload()
                else:
                    with torch.no_grad():
                        results.append(system.use(pipe))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert len(results) == 9
    assert all(torch.equal(result, expected) for result in results)
    assert kinds["failed"] == 0
    assert kinds["loaded"] == kinds["loading"] <= 4  # at first, and after each unload at most
    pipe.unload()
    assert kinds["evicted"] == kinds["loaded"]
    assert not pipe.is_loaded


def test_heartmula_by_precision_device_and_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system = _heartmula(monkeypatch, tmp_path)
    pipe = system.make(precision="int8", device="cpu")
    with pipe.lease() as loaded:
        assert isinstance(loaded.mula, vramkit.QuantizedLayer)  # its head is its own parameter
        assert not any(isinstance(m, vramkit.QuantizedLayer) for m in loaded.codec.modules())
        with pytest.raises(RuntimeError, match="belong to the lazy pipeline"):
            loaded.unload()
    del loaded
    eight = sum(pipe.loaded_parts().values())
    assert {part.path.rpartition(".")[2] for part in pipe.prepared().parts} == {"mula", "codec"}
    assert pipe.to("bf16") is pipe
    assert not pipe.is_loaded
    pipe.load()
    assert sum(pipe.loaded_parts().values()) > eight
    assert pipe.unload() > eight
    small = system.make(budget="10 kB")
    with pytest.raises(BudgetError):
        small.load()
    assert not small.is_loaded
    both = system.make(precision="int8", bnb_config={"load_in_8bit": True})
    with pytest.raises(ValueError, match="not both"):
        both.load()
    by_part = system.make(precision={"codec": "bf16"})
    with by_part.lease() as loaded:
        assert loaded.codec.dtype is torch.bfloat16
    once = system.make(keep="call")
    with torch.no_grad():
        system.use(once)
    assert not once.is_loaded
