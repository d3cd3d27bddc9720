"""Models offloaded to a GPU, and the same session on a device that is like one (stand_in.py)."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vramkit
from stand_in import (
    BLOCKS,
    MIB,
    SPECIES,
    WIDTH,
    Model,
    StandIn,
    needs_gpu,
    offloaded,
    on,
    result,
)
from torch import Tensor, nn
from vramkit import _core, enable_vram_management
from vramkit.errors import VramkitError
from vramkit.estimator import weight_bytes
from vramkit.offload import device as devices
from vramkit.offload.device import CudaDevice, SeparateDevice, device_for
from zoo import ZOO


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, None) for name in SPECIES), ("llama", "nf4"), ("t5", "int8")]
)
def test_the_same_bits(
    name: str, precision: str | None, where: SeparateDevice, tmp_path: Path
) -> None:
    if importlib.util.find_spec(ZOO[name].package) is None:
        pytest.skip(f"{ZOO[name].package} is not installed")
    model, inputs = ZOO[name].build()
    model.eval()
    if precision is not None:
        vramkit.convert(model, precision)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = result(on(model, where), inputs, where.torch)
    session = offloaded(model, inputs, where, tmp_path)
    for _ in range(3):
        assert torch.equal(result(model, inputs), expected)
    stats = session.engine.stats()
    assert stats.bytes_by_path["memory"] == stats.bytes_copied > 0
    assert stats.committed <= stats.limit
    session.engine.check()
    after = model.state_dict()
    assert all(torch.equal(after[k].cpu(), v) for k, v in state.items())
    session.disable()
    assert all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(result(on(model, where), inputs, where.torch), expected)
    assert not any("forward" in m.__dict__ or "_hf_hook" in m.__dict__ for m in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_are_windows(fake: StandIn, tmp_path: Path) -> None:
    fake.windows = True
    model, x = Model(), torch.randn(3, WIDTH)
    model.blocks[3].requires_grad_(False)
    resident = copy.deepcopy(model)
    session = offloaded(model, (x,), fake, tmp_path)
    for _ in range(2):
        assert torch.equal(result(model, (x,)), result(resident, (x,)))
    found = []
    for one in (model, resident):
        one.requires_grad_(False)
        given = x.clone().requires_grad_()
        one(given).square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)
    model.blocks[2].register_forward_hook(lambda m, args, out: m.up.weight)
    with torch.no_grad():
        kept = model.blocks[2](x)
    assert session._arena is None
    model(x)
    assert torch.equal(kept, resident.blocks[2].up.weight)
    session.capture((x,))


def test_where_things_are(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    seen: list[torch.device] = []
    model.blocks[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].device))
    inner = model.blocks[2].up.forward
    model.blocks[2].up.forward = lambda x: (
        seen.append(model.blocks[2].up.weight.device),
        inner(x),
    )[1]
    session = offloaded(model, (x,), where, tmp_path)
    streamed = [n for block in session.division.blocks for n in block.parameters]
    assert set(session.store.origins()) == {"memory"}
    assert "bias" not in streamed
    for name, parameter in model.named_parameters():
        expected = torch.device("cpu") if name in streamed else where.torch
        assert parameter.device == expected, name
    assert model.offset.device == where.torch
    assert model._hf_hook.execution_device == where.torch
    with torch.no_grad():
        out = model(x)
    assert out.device == where.torch
    assert seen[-1] == where.torch
    copied = copy.deepcopy(model)
    assert copied._hf_hook.execution_device is None
    assert copied.vramkit_session is None
    session.disable()
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))


def test_weights_that_are_changed(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), where, tmp_path)
    result(model, (x,))
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m.blocks[1].up.weight.mul_(0.5),
        lambda m: m.blocks[2].up.weight.data.mul_(0.5),  # as PEFT merges: no version counter
        lambda m: m.blocks[3].down.weight.detach().numpy().fill(0.125),
        lambda m: setattr(m.blocks[0].up, "weight", nn.Parameter(torch.ones(2 * WIDTH, WIDTH))),
        lambda m: m.load_state_dict({k: v * 0.75 for k, v in m.state_dict().items()}),
        lambda m: m.bias.mul_(2),
    ]
    for change in changes:
        with torch.no_grad():
            plain = copy.deepcopy(model).cpu()
            change(plain)
            change(model)
        for _ in range(2):
            assert torch.equal(result(model, (x,)), result(on(plain, where), (x,), where.torch))
    assert set(session.store.origins()) == {"memory"}
    session.disable()
    assert torch.equal(
        result(on(model, where), (x,), where.torch), result(on(plain, where), (x,), where.torch)
    )


def test_what_comes_later_moves_too(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), where, tmp_path, share=1.0)
    result(model, (x,))
    before = session.fixed_bytes
    adapter = nn.Linear(WIDTH, WIDTH, bias=False)
    model.blocks[1].register_module("adapter", adapter)
    hook = model.blocks[1].register_forward_hook(lambda m, args, out: out + m.adapter(args[0]))
    plain = copy.deepcopy(model).cpu()
    assert torch.equal(result(model, (x,)), result(on(plain, where), (x,), where.torch))
    assert session.fixed_bytes == before + 4 * WIDTH * WIDTH
    assert adapter.weight.device == where.torch
    hook.remove()
    session.disable()
    assert adapter.weight.device.type == "cpu"


def test_gradients_pass_through_what_is_streamed(where: SeparateDevice, tmp_path: Path) -> None:
    model = Model()
    for block in model.blocks:
        block.requires_grad_(False)
    resident = on(model, where)
    x = torch.randn(3, WIDTH)
    offloaded(model, (x,), where, tmp_path)
    found = []
    for one in (model, resident):
        given = x.to(where.torch).requires_grad_()
        one(given).square().sum().backward()
        found.append((given.grad, one.bias.grad))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    model.vramkit_session.disable()
    assert model.bias.grad is not None
    assert model.bias.grad.device.type == "cpu"


def test_gradients_of_what_is_streamed_are_refused(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(on(model, where), (x,), where.torch)
    session = offloaded(model, (x,), where, tmp_path)
    out = model(x)  # who forgets no_grad() loses nothing
    assert torch.equal(out.detach().cpu(), expected)
    with pytest.raises(VramkitError, match="streamed to a GPU has no gradient"):
        out.sum().backward()
    assert torch.equal(result(model, (x,)), expected)
    session.disable()
    model(x).sum().backward()
    assert model.blocks[0].up.weight.grad is not None


def test_inputs_are_moved_and_numbers_are_not(fake: StandIn) -> None:
    x, number = torch.randn(2, 3), torch.tensor(3)

    class Elsewhere(StandIn):
        torch = torch.device("meta")

        def moved(self, tensor: Tensor) -> Tensor:
            return tensor.to("meta")

    found = Elsewhere().take(((x, [number]), {"a": {"b": x}, "c": "text"}))
    assert found[0][0].device.type == "meta"
    assert found[0][1][0] is number
    assert found[1]["a"]["b"].device.type == "meta"
    assert found[1]["c"] == "text"
    assert fake.take((x,))[0] is x


def test_components_of_a_pipeline_take_turns(where: SeparateDevice, tmp_path: Path) -> None:
    class Pipe:
        def __init__(self) -> None:
            self.first, self.second, self.small = Model(), Model(), nn.Linear(WIDTH, WIDTH)

        def run(self, x: Tensor) -> Tensor:
            return self.small(self.second(self.first(x)))

    pipe, x = Pipe(), torch.randn(3, WIDTH)
    plain = copy.deepcopy(pipe)
    for name in ("first", "second", "small"):
        setattr(plain, name, getattr(plain, name).to(where.torch))
    with torch.no_grad():
        expected = plain.run(x.to(where.torch)).cpu()
    least = sum(weight_bytes(m) for m in (pipe.first, pipe.small))
    slack = 3 * where.segment(0) * BLOCKS + 3 * MIB
    enable_vram_management(
        pipe, f"{least + slack} B", 0, folder=tmp_path, skip=["small"], device=where
    )
    session = pipe.vramkit_session
    assert pipe.small.weight.device == where.torch
    assert pipe.second._hf_hook.execution_device == where.torch
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(pipe.run(x).cpu(), expected)
        for name in ("first", "second"):
            assert session.sessions[name].buffer_bytes > 0
        if isinstance(where, StandIn):
            mine = session.sessions["second"]
            whole = session.turns.room + session.turns.buffer
            assert fake_share(where) == whole - mine.engine.stats().limit
    session.disable()
    assert pipe.small.weight.device.type == "cpu"
    assert not any("_hf_hook" in m.__dict__ for m in (pipe.first, pipe.second, pipe.small))
    assert all(p.device.type == "cpu" for p in pipe.first.parameters())
    if isinstance(where, StandIn):
        assert where.part == 1.0


def fake_share(where: StandIn) -> int:
    return where.bytes - where.tensors


def test_a_plan_is_carried_out(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    rates = vramkit.Rates({"plain32": (1e9, 1e9)}, 1e9, 1e9)
    made = vramkit.plan(
        model,
        f"{weight_bytes(model) // 2 + where.segment(0) * 3} B",
        formats=(),
        tiers=("device", "host"),
        rates=rates,
        activations="0 B",
        device=where,
    )
    assert made.streams
    expected = result(on(model, where), (x,), where.torch)
    made.apply(model, inputs=(x,), folder=tmp_path, device=where)
    session = model.vramkit_session
    assert set(session.store.origins()) == {"memory"}
    for _ in range(2):
        assert torch.equal(result(model, (x,)), expected)
    session.disable()


def test_a_checkpoint_is_loaded_for_it(where: SeparateDevice, tmp_path: Path) -> None:
    import safetensors.torch

    model, x = Model(), torch.randn(3, WIDTH)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    expected = result(on(model, where), (x,), where.torch)
    loaded = vramkit.load(
        path,
        factory=Model,
        vram_limit=f"{weight_bytes(model) + where.segment(0) * 8 + 40 * MIB} B",
        offload=True,
        inputs=(x,),
        folder=tmp_path / "blocks",
        device=where,
    )
    assert set(loaded.vramkit_session.store.origins()) == {"memory"}
    path.write_bytes(b"")  # nothing is read from there any more
    assert torch.equal(result(loaded, (x,)), expected)
    loaded.vramkit_session.disable()
    assert torch.equal(result(on(loaded, where), (x,), where.torch), expected)


def test_the_first_call_divides(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(on(model, where), (x,), where.torch)
    limit = weight_bytes(model) + where.segment(0) * 8 + 40 * MIB
    enable_vram_management(model, f"{limit} B", 0, folder=tmp_path, device=where)
    assert torch.equal(result(model, (x,)), expected)
    assert torch.equal(result(model, (x,), where.torch), expected)
    model.vramkit_session.disable()


def test_reports(where: SeparateDevice, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), where, tmp_path)
    session.record()
    result(model, (x,))
    found = session.stats(measure=True)
    assert found.link_rate is not None
    assert found.disk_rate is None  # no block is on a disk
    assert found.limit == session.room
    assert session.device_bytes == session.fixed_bytes + found.committed
    assert {moment.kind for moment in session.timeline()} >= {"copy", "use"}


# Refusals


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device= is"), ("meta", "not to 'meta'"), ("cuda:77", "cuda:77|built with CUDA")],
)
def test_devices_that_are_none(device: str, words: str, tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(ValueError, match=words):
        enable_vram_management(model, 1, 0, folder=tmp_path, device=device)
    assert not hasattr(model, "vramkit_session")
    assert device_for("cpu") is devices.HOST


def test_a_model_that_is_elsewhere(fake: StandIn, tmp_path: Path) -> None:
    model = Model().to("meta")
    with pytest.raises(ValueError, match="the model is on meta"):
        enable_vram_management(model, 1, 0, folder=tmp_path, device=fake)


def test_buffers_are_pinned_for_gpus_only() -> None:
    with pytest.raises(ValueError, match="for a GPU"):
        _core.PinnedBuffer(bytearray(4096), "cpu")
    with pytest.raises(BufferError):
        _core.PinnedBuffer(b"read-only", "cuda:0")
    with pytest.raises((ValueError, VramkitError), match=r"CUDA|cuda"):
        _core.PinnedBuffer(bytearray(4096), f"cuda:{_core.cuda_devices()[0] + 7}")


# On a GPU alone


@needs_gpu
def test_steady_passes_wait_for_nothing_and_stay_in_the_limit(tmp_path: Path) -> None:
    where = device_for("cuda")
    assert isinstance(where, CudaDevice)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(24)])
    x = torch.randn(64, 2048, device="cuda")
    before = where.allocated()
    limit = 256 * MIB
    enable_vram_management(model, f"{limit} B", "32 MB", inputs=(x,), device="cuda")
    session = model.vramkit_session
    with torch.no_grad():
        for _ in range(3):
            model(x)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_reserved() - before + session.engine.stats().committed <= limit
    session.disable()


@needs_gpu
def test_a_model_that_was_on_the_gpu_goes_back_there(tmp_path: Path) -> None:
    model, x = Model().cuda(), torch.randn(3, WIDTH, device="cuda")
    expected = result(model, (x,))
    session = offloaded(model, (x,), "cuda", tmp_path)
    assert torch.equal(result(model, (x,)), expected)
    session.disable()
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(result(model, (x,)), expected)
