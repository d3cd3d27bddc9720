"""Models offloaded to a GPU, and the same session on a device that is like one without being one.

The stand-in has what a session asks of a device apart from the host: blocks in pinned memory, a
share of torch's allocator, graphs. Its memory is the host's, so that all of it runs here. On a
machine with a GPU the tests that do not look inside the stand-in run there too; where one is meant
to be, REQUIRE_GPU=1 turns skips into failures.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit import _core, _native, enable_vram_management
from vramkit.errors import BudgetError, FileChangedError, VramkitError
from vramkit.estimator import weight_bytes
from vramkit.offload import device as devices
from vramkit.offload.device import CudaDevice, SeparateDevice, device_for
from vramkit.offload.pressure import Pressure
from vramkit.offload.session import OffloadSession
from zoo import ZOO

WIDTH, BLOCKS = 48, 12
MIB = 1 << 20
SPECIES = [
    "llama, tied", "t5", "convnext", "gru speller with a cell",
    "transformer encoder and decoder, fused in_proj",
]  # fmt: skip

has_gpu = torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS
if os.environ.get("REQUIRE_GPU") == "1":
    assert has_gpu, "REQUIRE_GPU=1, and there is no GPU, or this package is without CUDA"
needs_gpu = pytest.mark.skipif(not has_gpu, reason="no GPU")


class StandIn(SeparateDevice):
    """A device apart whose memory is the host's; torch's allocator on it is what is told here."""

    name = "stand-in"
    windows = False

    def __init__(self) -> None:
        super().__init__()
        self.part, self.tensors, self.cached, self.room = 1.0, 0, 0, 1 << 40
        self.events: list[str] = []
        self.pinned = 0
        self.free = 1 << 30
        self.graphs = 0

    def whole(self, engine: Any) -> Tensor | None:
        return None if self.windows else super().whole(engine)

    def pin(self, mapping: mmap.mmap) -> object:
        self.pinned += len(mapping)
        return object()

    def host_room(self) -> int:
        return self.room

    def free_bytes(self) -> int:
        return self.free

    def segment(self, moved: int) -> int:
        return 4096

    def target(self) -> str:
        return "cuda:9.0"

    def out_of_memory(self, text: str) -> BaseException:
        return torch.OutOfMemoryError(text)

    def allocated(self) -> int:
        return self.tensors

    def reserved(self) -> int:
        return self.tensors + self.cached

    def total(self) -> int:
        return 1 << 40

    def fraction(self) -> float:
        return self.part

    def set_fraction(self, fraction: float) -> None:
        self.part = fraction

    def empty_cache(self) -> None:
        self.events.append("empty")
        self.cached = 0

    def moved(self, tensor: Tensor) -> Tensor:
        self.events.append("moved")
        return tensor.clone()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        made = function()
        self.graphs += 1

        def replay() -> None:
            self.events.append("replayed")
            for old, new in zip(leaves(made), leaves(function()), strict=True):
                old.copy_(new)

        return made, replay

    @property
    def bytes(self) -> int:
        """What torch's allocator may take."""
        return round(self.part * self.total())


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=needs_gpu)])
def where(request: pytest.FixtureRequest) -> SeparateDevice:
    """A device apart: the stand-in, or a GPU."""
    if request.param == "cuda":
        found = device_for("cuda")
        assert isinstance(found, CudaDevice)
        return found
    return StandIn()


@pytest.fixture
def fake() -> StandIn:
    return StandIn()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Blocks, a buffer, and a parameter that the model itself uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for block in self.blocks:
            x = block(x) * times
        return x + self.bias + self.offset


def on(model: nn.Module, where: SeparateDevice) -> nn.Module:
    """A resident copy there."""
    return copy.deepcopy(model).to(where.torch)


def result(model: nn.Module, inputs: Any, to: torch.device | None = None) -> Tensor:
    if to is not None:
        inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(to), inputs)
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return leaves(dict(out) if isinstance(out, dict) else out)[0].cpu()


def offloaded(
    model: nn.Module, inputs: Any, where: Any, folder: Path, share: float = 0.4, **options: Any
) -> OffloadSession:
    """Within the least limit and a share of what all of it would take beside a call."""
    with pytest.raises(BudgetError) as caught:
        enable_vram_management(
            model, "1 B", 0, inputs=inputs, folder=folder, device=where, **options
        )
    limit = caught.value.needed_bytes + int(weight_bytes(model) * share)
    enable_vram_management(
        model, f"{limit} B", 0, inputs=inputs, folder=folder, device=where, **options
    )
    found = model.vramkit_session
    assert isinstance(found, OffloadSession)
    return found


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


def test_torchs_share_is_capped_and_given_back(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    # Of what torch has, the model's bias and buffer are a part: the stand-in's memory is theirs.
    fake.tensors, fake.part = 5000 + 2 * 4 * WIDTH, 0.5
    session = offloaded(model, (x,), fake, tmp_path)
    limit = session.limit_bytes
    assert session.buffer_bytes > 0  # a call's own memory is part of it
    assert fake.bytes == 5000 + limit - session.engine.stats().limit
    fake.tensors = 9000  # what is in the share is not counted twice
    session.resize(f"{limit + 4096 * 4} B")
    assert fake.bytes == 5000 + limit + 4096 * 4 - session.engine.stats().limit
    other = Model()
    second = offloaded(other, (x,), fake, tmp_path)
    both = sum(s.limit_bytes - s.engine.stats().limit for s in (session, second))
    assert fake.bytes == 5000 + both
    second.disable()
    fake.cached = fake.bytes + 1
    session.resize(f"{limit} B")
    assert fake.cached == 0
    session.disable()
    assert fake.part == 0.5
    with pytest.raises(BudgetError):
        enable_vram_management(model, "1 B", 0, inputs=(x,), folder=tmp_path, device=fake)
    assert fake.part == 0.5
    session = offloaded(model, (x,), fake, tmp_path)
    assert fake.part < 0.5
    del model, session
    gc.collect()
    assert fake.part == 0.5


def test_a_failed_start_leaves_all_as_it_was(
    fake: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    before = [(id(t), t.data_ptr()) for t in model.parameters()]
    limit = weight_bytes(model) + MIB

    def fails(mapping: mmap.mmap) -> object:
        raise MemoryError("no memory could be pinned")

    monkeypatch.setattr(fake, "pin", fails)
    with pytest.raises(MemoryError, match="pinned"):
        enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=tmp_path, device=fake)
    assert before == [(id(t), t.data_ptr()) for t in model.parameters()]
    monkeypatch.undo()

    def breaks(fraction: float) -> None:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(fake, "set_fraction", breaks)
    with pytest.raises(RuntimeError, match="fell off"):
        enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=tmp_path, device=fake)
    monkeypatch.undo()
    assert torch.equal(result(model, (x,)), expected)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_what_the_host_has_no_room_for_stays_in_a_file(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    fake.room = weight_bytes(model) // 2
    session = offloaded(model, (x,), fake, tmp_path, share=0)
    assert set(session.store.origins()) == {"memory", "own"}
    assert fake.pinned <= 2 * (fake.room + 4096 * BLOCKS)  # twice: the first limit did not do
    for _ in range(2):
        assert torch.equal(result(model, (x,)), expected)
    paths = session.engine.stats().bytes_by_path
    assert paths["memory"] > 0
    assert paths["memory"] < sum(paths.values())
    with torch.no_grad():
        model.blocks[5].up.weight.zero_()
        model.blocks[0].up.weight.zero_()
    assert torch.equal(result(model, (x,)), result(copy.deepcopy(model), (x,)))
    assert set(session.store.origins()) == {"memory", "own"}


class Hungry(Model):
    """Takes more than torch's share, as often as it is told."""

    hungry = 0

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_pre_hook(lambda m, args: None)
        inner = self.blocks[3].down.forward

        def forward(x: Tensor) -> Tensor:
            if Hungry.hungry > 0:
                Hungry.hungry -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 KiB.")
            return inner(x)

        self.blocks[3].down.forward = forward


def test_an_allocation_that_fails_takes_residents(fake: StandIn, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Hungry(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path, share=0.6)
    result(model, (x,))
    before, cap = session.stats(), fake.bytes
    assert before.residents > 0
    Hungry.hungry = 1
    fake.events.clear()
    assert torch.equal(result(model, (x,)), expected)
    given = before.limit - session.stats().limit
    assert given > 0
    assert fake.bytes == cap + given  # what was given up is what the allocation may take
    assert "empty" in fake.events
    assert [e.kind for e in session.pressure_events] == ["retried"]
    Hungry.hungry = 1000
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"allocation of .*\(32768 B\) failed"):
            result(model, (x,))
    finally:
        Hungry.hungry = 0
    assert torch.equal(result(model, (x,)), expected)
    session.disable()
    assert fake.part == 1.0


def test_others_take_the_devices_memory(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path, share=0.6)
    result(model, (x,))
    before, cap = session.stats(), fake.bytes
    session.pressure = Pressure(session, low=30_000, high=60_000, seconds=0)
    fake.free = 1000
    assert torch.equal(result(model, (x,)), expected)
    assert session.stats().limit < before.limit
    assert fake.bytes == cap  # it is for others, not for torch
    fake.free = 1 << 30
    for _ in range(4):
        assert torch.equal(result(model, (x,)), expected)
    assert [e.kind for e in session.pressure_events] == ["given_up", "regrown"]
    assert session.stats().limit == before.limit


def test_an_engine_without_memory_empties_torchs_cache_once(
    fake: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path)
    real, failures = session.engine.acquire, 1

    class Engine:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def __len__(self) -> int:
            return len(engine)

        def acquire(self, block: int, stream: int) -> int:
            nonlocal failures
            if failures:
                failures -= 1
                raise MemoryError("stand-in: no memory: taking a segment of 4096 bytes failed")
            return real(block, stream)

    engine = session.engine
    monkeypatch.setattr(session, "engine", Engine())
    fake.events.clear()
    assert torch.equal(result(model, (x,)), expected)
    assert fake.events.count("empty") == 1
    failures = 2
    with pytest.raises(torch.OutOfMemoryError, match="segment of 4096 bytes"):
        result(model, (x,))
    assert torch.equal(result(model, (x,)), expected)


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


# Graphs


def test_graphs_of_blocks(where: SeparateDevice, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Model(), torch.randn(3, WIDTH)
    resident = on(model, where)
    session = offloaded(model, (x,), where, tmp_path)
    found = session.capture((x,))
    assert set(found.values()) == {"captured"}
    for seed in range(3):
        torch.manual_seed(seed)
        y = torch.randn(3, WIDTH)
        kept = result(model, (y,))
        assert torch.equal(kept, result(resident, (y,), where.torch))
    other = torch.randn(5, WIDTH)  # no graph is of this shape
    assert torch.equal(result(model, (other,)), result(resident, (other,), where.torch))
    model.blocks[1].scale = resident.blocks[1].scale = 2.0  # nor of this
    assert torch.equal(result(model, (y,)), result(resident, (y,), where.torch))
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2)
        resident.blocks[0].up.weight.mul_(2)
    assert torch.equal(result(model, (y,)), result(resident, (y,), where.torch))
    assert session.graphs is None


def test_graphs_are_replayed_where_they_fit(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path)
    modules = len(session.capture((x,)))
    assert fake.graphs == modules
    fake.events.clear()
    first = result(model, (x,))
    assert fake.events.count("replayed") == modules
    with torch.no_grad():
        kept = model.blocks[0](x)
        saved = kept.clone()
        model.blocks[0](torch.randn(3, WIDTH))
    assert torch.equal(kept, saved)  # a result is the caller's
    fake.events.clear()
    result(model, (torch.randn(2, WIDTH),))
    out = model(x)  # with gradients
    assert fake.events.count("replayed") == 0
    assert torch.equal(out.detach(), first)
    model.train()
    assert fake.events.count("replayed") == 0
    session.resize(f"{session.limit_bytes + 4096} B")
    assert torch.equal(result(model, (x,)), first)


def test_calls_that_are_no_graphs_say_why(fake: StandIn, tmp_path: Path) -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen = 0

    class Odd(Block):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            return super().forward(x)

    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    class Mixed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1], self.blocks[2] = Odd(), Counting()

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            cache = Cache()
            for block in self.blocks:
                x = block(x, cache) if isinstance(block, Odd) else block(x)
            return x + self.bias

    model, x = Mixed(), torch.randn(3, WIDTH)
    plain = copy.deepcopy(model)
    session = offloaded(model, (x,), fake, tmp_path)
    found = session.capture((x,))
    assert "object of type Cache" in found["blocks.1"]
    assert "changes what it is given" in found["blocks.2"]
    assert found["blocks.0"] == "captured"
    assert torch.equal(result(model, (x,)), result(plain, (x,)))
    assert model.blocks[2].count.item() == 5


def test_a_plan_that_is_not_steady_is_refused(fake: StandIn, tmp_path: Path) -> None:
    class Fickle(Model):
        calls = 0

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            Fickle.calls += 1
            blocks = list(self.blocks)
            for block in blocks if Fickle.calls % 2 else reversed(blocks):
                x = block(x)
            return x + self.bias

    model, x = Fickle(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path, share=0)
    with pytest.raises(VramkitError, match="in different places, or in another order"):
        session.capture((x,))
    assert session.graphs is None
    assert fake.graphs == 0


def test_graphs_are_for_gpus(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    enable_vram_management(model, weight_bytes(model) / 2**30, 0, inputs=(x,), folder=tmp_path)
    with pytest.raises(ValueError, match="offloaded to a GPU"):
        model.vramkit_session.capture((x,))


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


def test_memory_that_somebody_writes_to_is_an_error(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path)
    memory = session.store._homes[0].memory
    assert memory is not None
    os.pwrite(memory.descriptor, b"x", 0)
    with pytest.raises(FileChangedError):
        session.disable()


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
