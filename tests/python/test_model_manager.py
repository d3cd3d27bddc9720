"""The model manager: loading, eviction, handles, settings, events, threads, sizes."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
import vramkit
import vramkit.measure
from numerics import PROBED_PEAK
from safetensors.torch import save_file
from torch import nn
from vramkit import BudgetError, PrecisionMode, StaleHandleError, _core
from vramkit.estimator import model_dtype
from vramkit.model_manager import VRAMEfficientModelManager
from vramkit.model_objects import find_modules
from vramkit.sizes import format_size

BYTES = 4 * (64 * 64 + 64)  # of linear(), in fp32


def linear() -> nn.Linear:
    return nn.Linear(64, 64)


class Counting:
    """A loader that counts its calls and knows whether what it made is still alive."""

    def __init__(self, make=linear, seconds=0.0):
        self.make, self.seconds, self.calls, self.alive = make, seconds, 0, []

    def __call__(self):
        self.calls += 1
        time.sleep(self.seconds)
        model = self.make()
        self.alive.append(weakref.ref(model))
        return model


@pytest.fixture
def manager():
    made = VRAMEfficientModelManager()
    yield made
    made.unload_all_models()


def test_loads_once_and_evicts_the_other(manager):
    a, b = Counting(), Counting()
    manager.register("a", a)
    manager.register("b", b)
    assert a.calls == 0
    assert manager.get_current_model_type() is None
    first = manager.get("a")
    assert manager.get("a") is first
    assert a.calls == 1
    assert manager.get_current_model_type() == "a"
    manager.get("b")
    assert a.alive[0]() is None, "the handle kept the model"
    assert manager.get_current_model_type() == "b"
    assert manager.loaded_models() == {"b": BYTES}
    with pytest.raises(StaleHandleError, match="get\\('a'\\)"):
        first(torch.ones(64))
    again = manager.get("a")
    assert a.calls == 2
    with pytest.raises(StaleHandleError):
        _ = first.weight  # an old handle does not come back to life
    assert again.weight.shape == (64, 64)


def test_unload_returns_the_bytes_really_freed(manager):
    manager.register("a", linear)
    handle = manager.get("a")
    assert manager.unload_all_models() == BYTES
    assert manager.unload_all_models() == 0
    assert "unloaded" in repr(handle)
    kept = manager.get("a").weight  # a tensor that is taken out keeps its memory
    assert manager.unload("a") == 4 * 64
    assert kept.shape == (64, 64)


def test_lru_within_a_budget():
    manager = VRAMEfficientModelManager(budget=f"{2 * BYTES} B", max_resident=8)
    loaders = {name: Counting() for name in "abc"}
    for name, loader in loaders.items():
        manager.register(name, loader)
    manager.get("a")
    manager.get("b")
    manager.get("a")  # now b is the older
    manager.get("c")
    assert set(manager.loaded_models()) == {"a", "c"}
    assert sum(manager.loaded_models().values()) <= 2 * BYTES
    assert loaders["a"].calls == 1


def test_too_large_for_the_budget_is_refused_and_leaves_nothing():
    manager = VRAMEfficientModelManager(budget="1000 B")
    loader = Counting()
    manager.register("a", loader)
    with pytest.raises(BudgetError, match="'a'") as caught:
        manager.get("a")
    assert caught.value.needed_bytes == BYTES
    assert manager.loaded_models() == {}
    gc.collect()
    assert loader.alive[0]() is None
    with pytest.raises(BudgetError):
        manager.get("a")
    assert loader.calls == 1, "its size is known now: it need not be loaded to be refused"


def test_checkpoint_says_the_size_before_the_load(tmp_path):
    save_file(linear().state_dict(), tmp_path / "model.safetensors")
    manager = VRAMEfficientModelManager(budget=f"{BYTES - 1} B")
    loader = Counting()
    manager.register("a", loader, checkpoint=tmp_path)
    with pytest.raises(BudgetError):
        manager.get("a")
    assert loader.calls == 0
    manager.set_precision_mode("fp16")
    assert manager.get("a").weight.dtype == torch.float16


def test_handle_delegates(manager):
    manager.register("a", lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    handle = manager.get("a")
    assert isinstance(handle, nn.Module)
    assert isinstance(handle, nn.Sequential)
    assert len(handle) == 3
    assert handle
    assert isinstance(handle[0], nn.Linear)
    assert [type(layer).__name__ for layer in handle] == ["ModelHandle"] * 3
    assert handle.eval() is handle
    assert handle.training is False
    handle.note = 7
    assert handle.note == 7
    del handle.note
    with pytest.raises(AttributeError):
        _ = handle.note
    assert "forward" in dir(handle)
    x = torch.ones(1, 8)
    with manager.lease("a") as model:
        assert torch.equal(handle(x), model(x))
        assert torch.equal(handle.forward(x), model(x))
    assert sum(p.numel() for p in handle.parameters()) == 46
    with pytest.raises(TypeError, match="lease"):
        copy.deepcopy(handle)
    with pytest.raises(IndexError):
        handle[9]


def test_child_handles_and_methods_keep_nothing_alive(manager):
    loader = Counting(lambda: nn.Sequential(nn.Linear(8, 4)))
    manager.register("a", loader)
    child = manager.get("a")[0]
    method = manager.get("a").forward
    evaluated = manager.get("a").eval()
    assert manager.unload_all_models() == 4 * 36
    assert loader.alive[0]() is None
    for use in (lambda: child.weight, lambda: method(torch.ones(1, 8)), lambda: evaluated.training):
        with pytest.raises(StaleHandleError):
            use()
    assert "[0]" in repr(child)


def test_handle_outlives_its_manager():
    manager = VRAMEfficientModelManager()
    manager.register("a", linear)
    handle = manager.get("a")
    del manager
    gc.collect()
    with pytest.raises(StaleHandleError, match="manager"):
        handle(torch.ones(64))


def test_unknown_and_bad_registrations(manager):
    with pytest.raises(ValueError, match=r"register\('p3sam'"):
        manager.get_p3sam_model()
    with pytest.raises(ValueError, match=r"register\('partformer'"):
        manager.get_partformer_pipeline()
    with pytest.raises(TypeError, match="callable"):
        manager.register("a", 3)
    with pytest.raises(ValueError, match="text"):
        manager.register("", linear)
    with pytest.raises(ValueError, match="fp32, fp16"):
        manager.register("a", linear, "fp17")
    manager.register("p3sam", linear)
    assert manager.get_p3sam_model().weight.shape == (64, 64)
    with pytest.raises(ValueError, match="unload"):
        manager.register("p3sam", linear)
    manager.unload("p3sam")
    manager.register("p3sam", lambda: nn.Linear(2, 2))
    assert manager.get("p3sam").weight.shape == (2, 2)
    assert manager.names() == ["p3sam"]


@pytest.mark.parametrize("where", ["loader", "None", "conversion"])
def test_failed_load_leaves_a_clean_state(manager, where):
    state = {"broken": True}
    made = []

    def load():
        if where == "loader" and state["broken"]:
            raise OSError("no such weights")
        if where == "None" and state["broken"]:
            return None
        model = linear()
        if where == "conversion" and state["broken"]:
            nn.init.constant_(model.weight, float("nan"))
        made.append(weakref.ref(model))
        return model

    manager.register("a", load)
    if where == "conversion":
        manager.set_precision_mode("nf4")
    seen = []
    manager.on("failed", seen.append)
    expected = {"loader": OSError, "None": TypeError, "conversion": vramkit.NonFiniteWeightError}
    with pytest.raises(expected[where]):
        manager.get("a")
    assert [type(event.error) for event in seen] == [expected[where]]
    seen.clear()
    gc.collect()
    assert all(ref() is None for ref in made)
    assert manager.loaded_models() == {}
    assert manager.get_current_model_type() is None
    state["broken"] = False
    manager.set_precision_mode("fp32")
    assert manager.get("a").weight.dtype == torch.float32


def test_concurrent_requests_load_once(manager):
    loader = Counting(seconds=0.1)
    manager.register("a", loader)
    handles, barrier = [], threading.Barrier(6)

    def ask():
        barrier.wait()
        handles.append(manager.get("a"))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loader.calls == 1
    assert len({id(handle) for handle in handles}) == 1


def test_eviction_waits_for_a_call(manager):
    inside, go_on = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            inside.set()
            assert go_on.wait(10)
            return super().forward(x)

    manager.register("slow", lambda: Slow(64, 64))
    manager.register("b", linear)
    handle, outputs = manager.get("slow"), []
    caller = threading.Thread(target=lambda: outputs.append(handle(torch.ones(64))))
    caller.start()
    assert inside.wait(10)
    with pytest.raises(TimeoutError):
        manager.get("b", timeout=0.05)
    with pytest.raises(TimeoutError):
        manager.unload("slow", timeout=0.05)
    assert manager.loaded_models() == {"slow": BYTES}
    go_on.set()
    manager.get("b")
    caller.join()
    assert outputs[0].shape == (64,)


def test_a_wait_for_oneself_is_refused(manager):
    manager.register("a", linear)
    manager.register("b", linear)
    manager.register("nested", lambda: nn.Sequential(manager.get("b")))
    with manager.lease("a"), pytest.raises(RuntimeError, match="'b'"):
        manager.get("b")
    with manager.lease("a"), pytest.raises(RuntimeError, match="'a'"):
        manager.unload("a")
    with pytest.raises(RuntimeError, match="max_resident"):
        manager.get("nested")
    assert manager.get("b").weight.shape == (64, 64)


def test_loader_may_ask_for_another_model():
    manager = VRAMEfficientModelManager("fp16", max_resident=2)
    manager.register("b", linear, "fp32")

    class Pipeline:
        def __init__(self):
            self.own, self.other = linear(), manager.get("b")

    manager.register("pipe", Pipeline)
    pipe = manager.get("pipe")
    assert pipe.own.weight.dtype == torch.float16
    assert pipe.other.weight.dtype == torch.float32, "the other model is not the pipeline's"
    assert manager.loaded_models() == {"b": BYTES, "pipe": BYTES // 2}


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("fp32", torch.float32), ("FP16", torch.float16), (PrecisionMode.BF16, torch.bfloat16)],
)
def test_precision_is_applied(mode, dtype):
    manager = VRAMEfficientModelManager(mode)
    manager.register("a", linear)
    assert manager.get("a").weight.dtype == dtype
    assert manager.torch_dtype == dtype


def test_quantized_precision_and_back(manager):
    manager.register("a", linear, "nf4")
    handle = manager.get("a")
    assert isinstance(handle, vramkit.QuantizedLayer)
    assert handle.storage_format.name == "nf4"
    nf4 = manager.loaded_models()["a"]
    assert nf4 < BYTES / 4
    manager.set_precision_mode("fp32", component="a")
    plain = manager.get("a")
    assert not isinstance(plain, vramkit.QuantizedLayer)
    assert plain.weight.dtype == torch.float32


def test_set_precision_mode_applies_at_the_next_load(manager):
    loader = Counting()
    manager.register("a", loader)
    manager.register("own", linear, "bf16")
    handle = manager.get("a")
    manager.set_precision_mode("FP32")
    assert manager.get("a") is handle
    manager.set_precision_mode("fp16")
    assert handle.weight.dtype == torch.float32, "what is in memory stays what it is"
    assert manager.get("a").weight.dtype == torch.float16
    assert loader.calls == 2
    assert manager.get("own").weight.dtype == torch.bfloat16, "its own mode is kept"
    with pytest.raises(ValueError, match="fp32, fp16"):
        manager.set_precision_mode("fp17")
    with pytest.raises(ValueError, match="registered: a, own"):
        manager.set_precision_mode("fp16", component="nobody")
    assert manager.precision_mode is PrecisionMode.FP16
    assert manager.get_precision_mode("own") is PrecisionMode.BF16


def test_configuration_file(tmp_path):
    path = tmp_path / "precision_config.json"
    manager = VRAMEfficientModelManager(config_path=path)
    manager.register("a", linear)
    manager.set_precision_mode("fp32")
    assert not path.exists(), "a mode that is set already changes nothing"
    manager.set_precision_mode("bf16")
    manager.set_precision_mode("fp16", component="a")
    assert json.loads(path.read_text()) == {"precision_mode": "bf16", "components": {"a": "fp16"}}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = VRAMEfficientModelManager(config_path=path)
    other.register("a", linear)
    assert other.precision_mode is PrecisionMode.BF16
    assert other.get("a").weight.dtype == torch.float16
    for text in (
        "{",
        "[]",
        '{"precision_mode": "fp17"}',
        '{"components": {}}',
        '{"precision_mode": "fp16", "components": []}',
        '{"precision_mode": 3}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="precision_config"):
            VRAMEfficientModelManager(config_path=path)


def test_configuration_that_cannot_be_written_changes_nothing(tmp_path):
    manager = VRAMEfficientModelManager(config_path=tmp_path / "missing" / "config.json")
    manager.register("a", linear)
    with pytest.raises(OSError, match="missing"):
        manager.set_precision_mode("fp16")
    with pytest.raises(OSError, match="missing"):
        manager.set_precision_mode("fp16", component="a")
    assert manager.precision_mode is PrecisionMode.FP32
    assert manager.get_precision_mode("a") is PrecisionMode.FP32


def test_events(manager):
    seen = []
    stop = manager.on(seen.append)
    only = []
    manager.on("evicted", only.append)
    manager.register("a", linear)
    manager.register("b", linear)
    manager.get("a")
    manager.get("b")
    assert [(event.kind, event.name) for event in seen] == [
        ("loading", "a"), ("loaded", "a"),
        ("evicting", "a"), ("evicted", "a"), ("loading", "b"), ("loaded", "b"),
    ]  # fmt: skip
    assert [(event.kind, event.bytes) for event in only] == [("evicted", BYTES)]
    assert seen[1].bytes == BYTES
    assert seen[1].precision is PrecisionMode.FP32
    stop()
    stop()
    manager.unload_all_models()
    assert len(seen) == 6
    with pytest.raises(ValueError, match="loading, loaded"):
        manager.on("landed", seen.append)
    with pytest.raises(TypeError, match="callable"):
        manager.on("loaded", 3)


def test_an_observer_that_raises_stops_nothing(manager):
    def fail(event):
        raise KeyError(event.kind)

    manager.on(fail)
    manager.register("a", linear)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.get("a")
        assert manager.unload_all_models() == BYTES
    said = [str(warning.message) for warning in caught]
    assert [text.split("'")[1] for text in said] == ["loading", "loaded", "evicting", "evicted"]


def test_observers_may_use_the_manager(manager):
    names = []
    manager.on("loaded", lambda event: names.append(manager.get_current_model_type()))
    manager.register("a", linear)
    manager.get("a")
    assert names == ["a"]


def test_estimate_needs_no_load(manager, tmp_path):
    save_file({**linear().state_dict(), "ids": torch.arange(10)}, tmp_path / "w.safetensors")
    manager.register("p3sam", linear, checkpoint=tmp_path / "w.safetensors")
    manager.register("unknown", linear)
    estimate = manager.get_memory_usage_estimate()
    assert estimate["current_precision"] == "fp32"
    assert "header" in estimate["p3sam_estimate"]
    assert "unknown" in estimate["partformer_estimate"]
    assert "activations" in estimate["note"]
    assert estimate["components"]["p3sam"]["weights_bytes"] == BYTES + 80
    assert estimate["components"]["unknown"]["weights_bytes"] is None
    manager.set_precision_mode("bf16")
    estimate = manager.get_memory_usage_estimate()
    assert estimate["components"]["p3sam"]["weights_bytes"] == BYTES // 2 + 80
    manager.set_precision_mode("nf4")
    p3sam = manager.get_memory_usage_estimate()["components"]["p3sam"]
    assert p3sam["weights_bytes"] is None
    assert "config.json" in p3sam["source"]
    assert json.loads(json.dumps(estimate)) == estimate


def test_estimate_is_what_is_measured(manager):
    manager.register("a", lambda: nn.Sequential(nn.Embedding(512, 64), nn.LayerNorm(64), linear()))
    manager.get("a")

    def weights():
        return manager.get_memory_usage_estimate()["components"]["a"]

    assert weights()["loaded"]
    for mode in ("fp32", "bf16", "nf4", "int8"):
        manager.set_precision_mode(mode)
        if manager.get_precision_mode("a") in ("nf4", "int8"):
            with manager.lease("a", precision="fp32"):
                before = weights()["weights_bytes"]
        else:
            before = weights()["weights_bytes"]
        manager.get("a")
        assert manager.loaded_models()["a"] == before, mode
        assert weights()["weights_bytes"] == before


def test_estimate_from_what_the_loader_declares(manager):
    def load():
        return linear()

    load.shapes = {"weight": (64, 64), "bias": (64,)}
    manager.register("a", load)
    found = manager.get_memory_usage_estimate()["components"]["a"]
    assert found["weights_bytes"] == BYTES
    assert "declares" in found["source"]


def test_estimate_of_a_missing_checkpoint_says_so(manager, tmp_path):
    manager.register("a", linear, checkpoint=tmp_path / "gone")
    found = manager.get_memory_usage_estimate()["components"]["a"]
    assert found["weights_bytes"] is None
    assert "gone" in found["source"]


def test_estimate_of_a_call_where_its_inputs_are_known(manager):
    """The documented keys stay; what the peak is made of comes beside them."""

    def build():
        return nn.Sequential(linear(), nn.GELU(), linear()).eval()

    manager.register("p3sam", build, inputs=(16, 64))
    found = manager.get_memory_usage_estimate()
    assert found["components"]["p3sam"]["peak_bytes"] is None
    assert "not loaded yet" in found["components"]["p3sam"]["call_source"]
    assert found["note"].startswith("weights only")
    for mode in ("fp32", "nf4", "bf16"):
        manager.set_precision_mode(mode)
        manager.get("p3sam")
        found = manager.get_memory_usage_estimate()
        assert list(found)[:4] == [
            "current_precision", "p3sam_estimate", "partformer_estimate", "note",
        ]  # fmt: skip
        p3sam = found["components"]["p3sam"]
        with manager.lease("p3sam") as model:
            x = torch.randn(16, 64, dtype=model_dtype(model))
            real = vramkit.measure.call(model, x, repeats=1)
        assert p3sam["weights_bytes"] == real.weights_bytes
        assert p3sam["peak_bytes"] == pytest.approx(real.peak_bytes, rel=PROBED_PEAK)
        assert p3sam["interval_bytes"] == [p3sam["peak_bytes"]] * 2
        assert "at the peak of a call" in found["p3sam_estimate"]
        assert found["p3sam_estimate"].startswith(format_size(real.weights_bytes))
        assert json.loads(json.dumps(found)) == found


def test_estimate_of_a_call_says_why_it_cannot(manager):
    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    manager.register("pipeline", lambda: Wrapper(linear()), inputs=(16, 64))
    manager.register("deciding", lambda: nn.Sequential(linear(), Deciding()), inputs=(16, 64))
    manager.register("wrong", linear, inputs=(16, 65))
    manager.register("silent", linear)
    reasons = {
        "pipeline": "several modules",
        "deciding": "decides by the values",
        "wrong": "cannot be traced",
        "silent": "no example inputs",
    }
    for name, reason in reasons.items():
        manager.get(name)
        found = manager.get_memory_usage_estimate()["components"][name]
        assert found["peak_bytes"] is None
        assert reason in found["call_source"]
        assert found["weights_bytes"]


def test_estimate_of_a_call_from_a_checkpoints_folder(manager, minilm_path):
    shapes = {"input_ids": (2, 8), "attention_mask": (2, 8)}

    def load():
        raise AssertionError("nothing is to be loaded")

    load.checkpoint, load.inputs = minilm_path, shapes
    manager.register("p3sam", load, "int8")
    found = manager.get_memory_usage_estimate()["components"]["p3sam"]
    model = vramkit.load(minilm_path).bfloat16()  # what the manager computes in
    vramkit.convert(model, "int8")
    expected = vramkit.estimate(model, None, shapes)
    assert found["peak_bytes"] == expected.peak_bytes
    assert found["interval_bytes"] == list(expected.interval_bytes)
    assert found["weights_bytes"] == expected.weights_bytes


class Wrapper:
    def __init__(self, module):
        self.inner = {"net": [module]}


class HidesAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(4, 4)
        self.hidden = [Wrapper(nn.Linear(4, 4))]


class Pipeline:
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.first = self.model[0]
        self.predictor = HidesAModule()
        self.scheduler, self.name, self.me = object(), "pipe", self


def test_pipelines_are_converted_throughout():
    manager = VRAMEfficientModelManager("bf16")
    manager.register("partformer", Pipeline)
    pipe = manager.get_partformer_pipeline()
    assert pipe.name == "pipe"
    assert pipe.model[1].weight.dtype == torch.bfloat16
    with manager.lease("partformer") as real:
        assert isinstance(real, Pipeline)
        hidden = real.predictor.hidden[0].inner["net"][0]
        assert hidden.weight.dtype == torch.bfloat16, "torch's .to() does not reach it"
        assert [type(m) for m in find_modules(real)] == [nn.Sequential, HidesAModule, nn.Linear]
        del real, hidden
    assert manager.loaded_models() == {"partformer": 2 * 4 * 20}


def test_device_moves_after_conversion():
    manager = VRAMEfficientModelManager("fp16", device="meta")
    manager.register("a", linear)
    handle = manager.get("a")
    assert handle.weight.device.type == "meta"
    assert handle.weight.dtype == torch.float16


def test_threads_on_a_budget_keep_every_promise():
    manager = VRAMEfficientModelManager(budget=f"{2 * BYTES} B", max_resident=3)
    for name in "abcd":
        manager.register(name, linear)
    x, errors, calls = torch.ones(64), [], []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(25):
                name = "abcd"[int(torch.randint(4, (1,), generator=generator))]
                with contextlib.suppress(StaleHandleError):
                    calls.append(manager.get(name)(x).shape)
                assert sum(manager.loaded_models().values()) <= 3 * BYTES
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert calls
    manager._ledger.check()
    manager.unload_all_models()
    assert manager._ledger.total_bytes() == 0


def test_lazy_global_and_light_import():
    code = (
        "import sys, torch, vramkit\n"
        "import vramkit.model_manager as mm\n"
        "assert 'model_manager' not in vars(mm)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert mm.model_manager is mm.model_manager\n"
        "from vramkit.model_manager import model_manager\n"
        "assert model_manager is mm.model_manager\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert vramkit.VRAMEfficientModelManager is mm.VRAMEfficientModelManager\n"
        "try: mm.nothing\n"
        "except AttributeError: print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_ledger_from_python():
    ledger = _core.Ledger(100, 2)
    ledger.add(1, 60)
    ledger.add(2, 60)
    assert ledger.begin_load(1).action == _core.AdmissionAction.load
    assert ledger.finish_load(1, 60).kept
    generation = ledger.entry(1).generation
    assert ledger.acquire(1, generation)
    result = []
    other = threading.Thread(target=lambda: result.append(ledger.begin_load(2, 0.05)))
    other.start()
    other.join()
    assert result[0].action == _core.AdmissionAction.timed_out
    ledger.release(1)
    assert ledger.begin_load(2).victims == [1]
    assert ledger.state(1) == _core.LedgerState.evicting
    assert ledger.finish_evict(1) == 60
    with pytest.raises(ValueError, match="loading"):
        ledger.remove(2)
    assert ledger.total_bytes() == 60
    assert ledger.budget == 100
    assert "loading" in repr(ledger.entry(2))
    with pytest.raises(BudgetError) as caught:
        ledger.set_limits(50, 1)
    assert caught.value.needed_bytes == 60


def test_ctrl_c_ends_a_wait():
    code = (
        "import os, signal, threading, time, torch\n"
        "from vramkit import _core\n"
        # A shell starts its background jobs with SIGINT ignored, and their children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "ledger = _core.Ledger()\n"
        "ledger.add(1); ledger.add(2)\n"
        "ledger.begin_load(1); ledger.finish_load(1, 1)\n"
        "thread = threading.Thread(target=lambda: ledger.acquire(1, 1)); thread.start()\n"
        "thread.join()\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try: ledger.begin_load(2)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.strip() == "interrupted", done.stderr
