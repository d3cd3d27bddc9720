"""Lazy pipelines: first use, policy, freed bytes, delegation, threads, parts in turn, events."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import vramkit
from small_systems import PartFormerPipeline, partformer
from torch import nn
from vramkit.errors import BudgetError, PrecisionConfigError, StaleHandleError
from vramkit.lazy_partformer import LazyPartFormerPipeline
from vramkit.lazy_pipeline import LazyPipeline, parse_dtype
from vramkit.lazy_systems import LazyChatterbox, LazyP3SAM, LazyQwenImage
from vramkit.model_objects import find_modules, tensors_of

STEPS = {"num_inference_steps": 2}


def linear() -> nn.Module:
    return nn.Linear(64, 64)


def quiet(**options: Any) -> LazyPartFormerPipeline:
    return LazyPartFormerPipeline("somewhere", loader=partformer, verbose=False, **options)


def test_loads_at_first_use_and_frees_what_it_took() -> None:
    loads = Counter[str]()

    def load() -> nn.Module:
        loads["pipe"] += 1
        return linear()

    pipe = LazyPipeline(load, precision="int8")
    assert not pipe.is_loaded
    assert loads["pipe"] == 0
    y = pipe(torch.ones(2, 64))
    assert y.shape == (2, 64)
    assert pipe.is_loaded
    pipe(torch.ones(2, 64))
    assert loads["pipe"] == 1
    assert pipe.prepared().parts[0].precision == "int8"
    held = sum(pipe.loaded_parts().values())
    assert held == 64 * 64 + 4 * 64 + 2 * 64  # codes, scales, a bias in bfloat16
    del y  # whose graph would keep the codes
    assert pipe.unload() == held
    assert pipe.unload() == 0
    assert not pipe.is_loaded
    pipe(torch.ones(1, 64))
    assert loads["pipe"] == 2


def test_what_stays_referred_to_is_said() -> None:
    pipe = LazyPipeline(linear)
    with pipe.lease() as module:
        weight = module.weight
    del module
    with pytest.warns(RuntimeWarning, match=r"16\.0 KiB of 16\.2 KiB are still referred to"):
        assert pipe.unload() == 256
    assert weight.shape == (64, 64)


def test_handles_hold_no_memory_and_say_when_they_are_stale() -> None:
    pipe = quiet()
    vae, predictor = pipe.vae, pipe.bbox_predictor
    assert isinstance(vae, nn.Module)
    assert isinstance(pipe.load(), PartFormerPipeline)
    with pipe.lease() as loaded:
        gone = weakref.ref(loaded.bbox_predictor._auto_mask.model)
    del loaded
    freed = pipe.unload()
    gc.collect()
    assert gone() is None
    assert freed > 0
    for use in (lambda: vae.decode(torch.ones(1, 64)), lambda: predictor(torch.ones(4, 3))):
        with pytest.raises(StaleHandleError, match="pipeline"):
            use()
    assert pipe.scheduler == {"steps": 50}  # by the pipeline itself: it loads again


def test_delegation() -> None:
    pipe = quiet()
    obj, (bbox, gt_bbox, exploded) = pipe(mesh_path=None, seed=3, **STEPS)
    expected, rest = partformer()(seed=3, **STEPS)
    torch.testing.assert_close(obj, expected, rtol=0, atol=0)
    torch.testing.assert_close(bbox, rest[0], rtol=0, atol=0)
    assert gt_bbox.shape == bbox.shape
    assert exploded.shape == (1, 6, 64)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = pipe.nothing_like_it
    with pytest.raises(AttributeError, match="lease"):
        pipe.scheduler = {}
    with pipe.lease() as loaded:
        loaded.scheduler = {"steps": 3}
    assert pipe.scheduler == {"steps": 3}


def test_policies() -> None:
    once = LazyPipeline(linear, keep="call")
    once(torch.ones(64))
    assert not once.is_loaded
    once.requires_grad_(False)  # a method is a call too
    assert not once.is_loaded
    with once.lease():
        once(torch.ones(64))
        assert once.is_loaded  # in use
    timed = LazyPipeline(linear, keep=0.05)
    timed(torch.ones(64))
    assert timed.is_loaded
    deadline = time.monotonic() + 10
    while timed.is_loaded and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not timed.is_loaded
    for wrong in ("often", 0, -1.0, True):
        with pytest.raises(ValueError, match="keep is"):
            LazyPipeline(linear, keep=wrong)


def test_threads_load_once_and_calls_overlap() -> None:
    loads = Counter[str]()
    barrier = threading.Barrier(4)

    def load() -> nn.Module:
        loads["pipe"] += 1
        time.sleep(0.02)
        return linear()

    pipe = LazyPipeline(load)
    results: list[Any] = []

    def work() -> None:
        barrier.wait()
        for _ in range(5):
            results.append(pipe(torch.ones(64)).shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads["pipe"] == 1
    assert len(results) == 20


def test_parts_in_turn_under_one_budget() -> None:
    events: list[tuple[str, str]] = []
    most = 0

    def run(pipe: LazyPipeline, x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        for name in pipe.parts:
            x = getattr(pipe, name)(x)
            most = max(most, sum(pipe.loaded_parts().values()))
        return x

    size = 64 * 64 * 4 + 64 * 4
    pipe = LazyPipeline(
        {"text": linear, "model": linear, "vae": linear}, run=run, budget=f"{2 * size} B"
    )
    pipe.on(lambda event: events.append((event.kind, event.name)))
    pipe(torch.ones(64))
    assert most == 2 * size
    loaded = [name for kind, name in events if kind == "loaded"]
    assert loaded == ["text", "model", "vae"]
    assert ("evicted", "text") in events
    single = LazyPipeline({"a": linear, "b": linear}, run=run, resident=1)
    most = 0
    single(torch.ones(64))
    assert most == size
    assert list(single.loaded_parts()) == ["b"]
    small = LazyPipeline({"a": linear}, run=run, budget=f"{size - 1} B")
    with pytest.raises(BudgetError):
        small(torch.ones(64))
    assert not small.is_loaded
    with pytest.raises(AttributeError, match="the parts are: a, b"):
        _ = single.c
    with pytest.raises(TypeError, match="no run="):
        LazyPipeline({"a": linear})(torch.ones(64))
    with pytest.raises(ValueError, match="cannot be called 'unload'"):
        LazyPipeline({"unload": linear})


def test_a_failed_load_leaves_a_clean_state() -> None:
    ready = False

    def load() -> nn.Module:
        if not ready:
            raise OSError("disk on fire")
        return linear()

    pipe = LazyPipeline(load)
    seen: list[str] = []
    pipe.on("failed", lambda event: seen.append(str(event.error)))
    with pytest.raises(OSError, match="disk on fire"):
        pipe(torch.ones(64))
    assert not pipe.is_loaded
    assert seen == ["disk on fire"]
    ready = True
    assert pipe(torch.ones(64)).shape == (64,)


def test_progress_and_device_reach_loaders_that_take_them() -> None:
    steps: list[tuple[int, int, str]] = []

    def load(progress: Any, device: Any) -> nn.Module:
        progress(1, 2, "half")
        assert str(device) == "cpu"
        return linear()

    LazyPipeline(load, device="cpu", progress=lambda *step: steps.append(step)).load()
    assert steps == [(1, 2, "half")]


def test_to_sets_what_the_next_load_does() -> None:
    pipe = quiet(dtype="fp16")
    assert pipe.dtype is torch.float16
    pipe.load()
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert not pipe.is_loaded
    assert pipe.device == torch.device("cpu")
    pipe.load()
    assert pipe.to("bf16").is_loaded  # that is what it is
    with pytest.raises(ValueError, match="neither a device"):
        pipe.to("purple")
    assert pipe.is_loaded
    assert pipe.dtype is torch.bfloat16
    with pipe.lease() as loaded:
        kinds = Counter(p.dtype for m in find_modules(loaded) for p in m.parameters())
    assert set(kinds) == {torch.bfloat16, torch.float32}  # float32: the sonatas


@pytest.mark.parametrize("dtype", ["fp17", torch.int8, None, 16, "nonsense"])
def test_bad_dtype_is_an_error_before_anything_is_loaded(dtype: Any) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        LazyPartFormerPipeline("x", dtype=dtype)
    with pytest.raises(PrecisionConfigError):
        LazyPartFormerPipeline("x", dtype={"load_in_8bit": True, "load_in_4bit": True})
    with pytest.raises(ValueError, match="is not one of"):
        parse_dtype(dtype)


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16", "int8", "nf4"])
def test_partformer_in_every_precision(mode: str) -> None:
    """sonata stays float32 and computes so; the other weights change; results stay near."""
    pipe = quiet(dtype=mode)
    obj, _ = pipe(seed=5, **STEPS)
    expected, _ = partformer()(seed=5, **STEPS)
    error = (obj.float() - expected).norm() / expected.norm()
    assert error < {"fp32": 1e-6, "fp16": 0.01, "bf16": 0.05, "int8": 0.05, "nf4": 0.3}[mode]
    with pipe.lease() as loaded:
        assert loaded.bbox_predictor._auto_mask.model.sonata.stem.weight.dtype is torch.float32
        whole = sum(t.nbytes for t in tensors_of(loaded))
    plain = sum(t.nbytes for t in tensors_of(partformer()))
    least, most = {"fp32": (1, 1), "fp16": (0.5, 0.56), "bf16": (0.5, 0.56), "int8": (0.25, 0.36),
                   "nf4": (0.13, 0.26)}[mode]  # fmt: skip
    assert least <= whole / plain <= most


def test_precision_by_component() -> None:
    pipe = quiet(dtype={"model": "nf4", "vae": torch.float16, "": "bf16"})
    pipe(**STEPS)
    found = {part.path: (part.precision, part.dtype) for part in pipe.prepared().parts}
    assert found["model"] == ("nf4", "bfloat16")
    assert found["vae"] == ("fp16", "float16")
    assert found["conditioner"] == ("bf16", "bfloat16")
    assert found["bbox_predictor._auto_mask.model"] == ("bf16", "bfloat16")
    with pytest.raises(ValueError, match="no part is called 'decoder'"):
        quiet(dtype={"decoder": "fp16"}).load()


def test_mixed_precision_without_cuda_warns_and_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    pipe = quiet(dtype=torch.bfloat16, enable_mixed_precision=True)
    with pytest.warns(RuntimeWarning, match="without a CUDA device"):
        obj, _ = pipe(**STEPS)
    assert torch.isfinite(obj).all()


def test_verbose_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with LazyPartFormerPipeline("x", loader=partformer) as pipe:
        pipe.load()
    out = capsys.readouterr().out
    assert "loaded in" in out
    assert "freed" in out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LazyPartFormerPipeline("x", verbose=False), "Hunyuan3D-Part"),
        (lambda: LazyP3SAM("x"), "P3-SAM/demo"),
        (lambda: LazyQwenImage("x", pipeline_class="NoSuchPipeline"), "diffusers"),
        (lambda: LazyChatterbox("x"), "chatterbox-tts"),
    ],
)
def test_without_the_upstream_package(make: Any, words: str) -> None:
    pipe = make()
    with pytest.raises(ImportError, match=words):
        pipe.load()
    assert not pipe.is_loaded


def test_p3sam_by_the_documented_method() -> None:
    pipe = LazyP3SAM(loader=lambda: partformer().bbox_predictor._auto_mask, precision="bf16")
    boxes, labels = pipe.predict_aabb(torch.rand(20, 3), prompt_num=4)
    assert boxes.shape[1:] == (2, 3)
    assert labels.shape == (20,)
    assert pipe.prepared().islands == ["model.sonata"]


def test_configs_and_budget() -> None:
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["vae"]}
    pipe = quiet(dtype=fields)
    pipe(**STEPS)
    with pipe.lease() as loaded:
        assert isinstance(loaded.model.blocks[0].attn1.to_q, vramkit.QuantizedLayer)
