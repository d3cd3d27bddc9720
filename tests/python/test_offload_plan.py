"""Plans with places carried out: bytes, bits and limits; pipelines whose components take turns."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vramkit
from test_offload_report import settled
from torch import Tensor, nn
from vramkit.estimator import weight_bytes
from vramkit.plans import Plan
from vramkit.rates import Rates

WIDTH = 256
# Compute, link and disk as such: the choice of places is not what these tests are about.
RATES = Rates(
    compute=dict.fromkeys(("plain32", "plain16", "bf16", "int8", "nf4"), (4e-09, 1e-09)),
    link_bytes_per_second=1e9,
    disk_bytes_per_second=5e8,
)


class Stack(nn.Module):
    """Six layers of 256 KiB each."""

    def __init__(self, seed: int = 0, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        result: Tensor = self.norm(x)
        return result


def planned(limit: int, model: nn.Module, **options: Any) -> Plan:
    return vramkit.plan(model, f"{limit} B", rates=RATES, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


LIMIT = 1_200_000


@pytest.mark.parametrize(
    "tiers", [("device", "disk"), ("device", "host"), ("device", "host", "disk")]
)
@pytest.mark.parametrize("formats", [(), ("int8",), ("nf4",)])
def test_what_is_planned_is_what_happens(
    tiers: tuple[str, ...], formats: tuple[str, ...], x: Tensor, tmp_path: Path
) -> None:
    limit = LIMIT if not formats else 1 << 20
    model = Stack(layers={(): 6, ("int8",): 18, ("nf4",): 32}[formats])
    host = {"host_limit": f"{3 << 18} B"} if len(tiers) == 3 else {}
    # Every layer in the one format: the limit is met by streaming alone.
    made = planned(limit, model, tiers=tiers, rules={"layers.*": list(formats) or [None]}, **host)
    streamed = [e for e in made.entries if e.tier != "resident"]
    assert streamed
    assert {e.tier for e in made.entries if e.tier != "resident"} <= set(tiers)
    twin = copy.deepcopy(model)
    made.convert(twin)
    made.apply(model, inputs=(x,), folder=tmp_path)
    session = model.vramkit_session
    with torch.inference_mode():
        expected = twin(x)
        assert torch.equal(model(x), expected)
        model(x)
        settled(session)  # blocks are read ahead of the next pass
        before = session.engine.stats()
        for _ in range(3):
            assert torch.equal(model(x), expected)
        settled(session)
        after = session.engine.stats()
    per_pass = sum(e.bytes for e in streamed)
    # Places in a block are multiples of 64 bytes, and scales are not.
    padding = 64 * 3 * len(streamed)
    copied = after.bytes_copied - before.bytes_copied
    assert 3 * per_pass <= copied <= 3 * (per_pass + padding)
    assert after.commits == before.commits
    assert session.device_bytes <= made.limit_bytes
    by_path = after.bytes_by_path
    assert (by_path["memory"] > 0) == any(e.tier == "host" for e in streamed)
    assert (after.bytes_copied > by_path["memory"]) == any(e.tier == "disk" for e in streamed)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in twin.state_dict().items()
    }
    session.disable()
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_changes_to_what_waits_on_the_host(x: Tensor, tmp_path: Path) -> None:
    model = Stack()
    made = planned(LIMIT, model, tiers=("device", "host"), rules={"layers.*": [None]})
    made.apply(model, inputs=(x,), folder=tmp_path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for one in (model, twin):
            for parameter in one.parameters():
                parameter.mul_(1.5)
        for _ in range(2):
            assert torch.equal(model(x), twin(x))


def test_without_inputs_the_first_call_tells(x: Tensor, tmp_path: Path) -> None:
    model = Stack()
    made = planned(LIMIT, model, tiers=("device", "disk"), rules={"layers.*": [None]})
    with torch.inference_mode():
        expected = model(x)
        made.apply(model, folder=tmp_path)
        assert getattr(model, "vramkit_session", None) is None
        assert torch.equal(model(x), expected)
    assert model.vramkit_session.device_bytes <= LIMIT


def test_fit_streams(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMKIT_CACHE", str(tmp_path))
    model = Stack()
    with torch.inference_mode():
        expected = model(x)
    vramkit.fit(
        model,
        f"{LIMIT} B",
        inputs=(x,),
        tiers=("device", "disk"),
        rules={"layers.*": [None]},
        rates=RATES,
    )
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    first = model.vramkit_first_run
    assert first.within_limit
    assert first.weights_bytes == model.vramkit_session.device_bytes < weight_bytes(model)
    assert abs(first.difference) < 0.01


def test_a_module_that_moves_as_one_and_is_too_large(tmp_path: Path) -> None:
    class Wide(nn.Module):
        """Reads the weights of its layers without calling them: they move as one."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Reader(), Reader()])

        def forward(self, x: Tensor) -> Tensor:
            for reader in self.inner:
                x = reader(x)
            return x

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x @ layer.weight  # type: ignore[operator]
            return x

    model = Wide()
    made = planned(1_100_000, model, tiers=("device", "disk"), rules={"inner.*": [None]}, slots=2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(vramkit.BudgetError, match="smallest limit") as caught:
        made.apply(model, inputs=(torch.randn(2, WIDTH),), folder=tmp_path)
    assert caught.value.needed_bytes > 1_100_000
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    assert type(model.inner[0].layers[0]) is nn.Linear


class Two(nn.Module):
    """A pipeline that is a module: its children are called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(1), Stack(2)

    def run(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for _ in range(3):
            x = self.decoder(x)
        return x


def test_planned_turns(x: Tensor, tmp_path: Path) -> None:
    model = Two()
    limit = 1_300_000
    made = planned(
        limit,
        model,
        turns={"encoder": 1, "decoder": 3},
        tiers=("device", "disk", "host"),
        rules={"*": [None]},
    )
    with torch.inference_mode():
        expected = model.run(x)
        made.apply(model, folder=tmp_path)
        session = model.vramkit_session
        for _ in range(3):
            assert torch.equal(model.run(x), expected)
            assert session.device_bytes <= limit
    assert set(session.sessions) == {"encoder", "decoder"}
    streamed = {e.name for e in made.entries if e.tier != "resident"}
    for name, one in session.sessions.items():
        for block in one.division.blocks:
            moves = {f"{name}.{p}".removesuffix(".weight") for p in block.parameters} & streamed
            assert bool(moves) == block.streamed
    session.disable()
    with torch.inference_mode():
        assert torch.equal(model.run(x), expected)


class Vae(nn.Module):
    """Never called itself: its decoder is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(3), Stack(4)
        self.post = nn.Linear(WIDTH, WIDTH)

    def decode(self, z: Tensor) -> Tensor:
        result: Tensor = self.decoder(self.post(z))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x))


def pipeline() -> SimpleNamespace:
    return SimpleNamespace(text=Stack(1), dit=Stack(2), vae=Vae(), steps=3)


def generate(pipe: Any, x: Tensor) -> Tensor:
    x = pipe.text(x)
    for _ in range(pipe.steps):
        x = pipe.dit(x)
    result: Tensor = pipe.vae.decode(x)
    return result


def test_a_pipeline_takes_turns(x: Tensor, tmp_path: Path) -> None:
    pipe = pipeline()
    with torch.inference_mode():
        expected = generate(pipe, x)
    state = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    limit = 1_100_000
    assert vramkit.enable_vram_management(pipe, f"{limit} B", 0, folder=tmp_path) is pipe
    session = pipe.vramkit_session
    assert session.device_bytes < 10_000  # before anything is called all waits on the disk
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(generate(pipe, x), expected)
            assert session.device_bytes <= limit
    assert set(session.sessions) == {"text", "dit", "vae.decoder", "vae.post"}
    stats = session.stats()
    assert sum(s.committed > 0 for s in stats.values()) == 1
    # What was never called stays where it is, and reads right.
    for key, value in pipe.vae.state_dict().items():
        assert torch.equal(value, state[key])
    clone = copy.deepcopy(pipe.dit)
    assert pickle.loads(pickle.dumps(pipe.dit)).layers[0].weight.shape == (WIDTH, WIDTH)
    with torch.inference_mode():
        assert torch.equal(clone(x), pipe.dit(x))
    session.resize("2 MB")
    with torch.inference_mode():
        assert torch.equal(generate(pipe, x), expected)
    with pytest.raises(vramkit.BudgetError):
        session.resize("100 KB")
    with pytest.raises(ValueError, match="takes turns with others"):
        pipe.dit.vramkit_session.disable()
    session.disable()
    assert pipe.vramkit_session is None
    assert list(tmp_path.iterdir()) == []
    with torch.inference_mode():
        assert torch.equal(generate(pipe, x), expected)


def test_what_comes_to_one_component_counts_for_all(x: Tensor, tmp_path: Path) -> None:
    pipe, twin = pipeline(), pipeline()
    limit = 1_400_000
    vramkit.enable_vram_management(pipe, f"{limit} B", 0, folder=tmp_path)
    session = pipe.vramkit_session
    with torch.inference_mode():
        assert torch.equal(generate(pipe, x), generate(twin, x))
    before = session.fixed_bytes
    extra = torch.zeros(100_000)
    for one in (pipe, twin):
        one.dit.register_buffer("extra", extra.clone())
        # Another object in a block: its store and its engine are made anew.
        one.dit.layers[0].weight = nn.Parameter(torch.full((WIDTH, WIDTH), 0.01))
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(generate(pipe, x), generate(twin, x))
            assert session.device_bytes <= limit
    assert session.fixed_bytes == before + extra.nbytes
    assert {s.limit for s in (one.engine.stats() for one in session.sessions.values())} == {
        limit - session.fixed_bytes
    }


def test_a_pipeline_s_components_by_name(x: Tensor, tmp_path: Path) -> None:
    pipe = pipeline()
    vramkit.enable_vram_management(
        pipe, "5 MB", 0, inputs={"dit": (x,)}, skip=["vae"], folder=tmp_path
    )
    session = pipe.vramkit_session
    assert set(session.sessions) == {"dit"}
    assert session.fixed_bytes >= weight_bytes(pipe.vae)
    with torch.inference_mode():
        generate(pipe, x)
    with pytest.raises(ValueError, match="offloaded already"):
        vramkit.enable_vram_management(pipe, "3 MB", 0)
    session.disable()
    for options, message in (
        ({"skip": ["unet"]}, "unet"),
        ({"inputs": {"unet": (x,)}}, "dict by component"),
        ({"inputs": (x,)}, "dict by component"),
    ):
        with pytest.raises(ValueError, match=message):
            vramkit.enable_vram_management(pipe, "3 MB", 0, folder=tmp_path, **options)
    with pytest.raises(vramkit.BudgetError, match="always stay"):
        vramkit.enable_vram_management(pipe, "1 MB", 0, skip=["vae"], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_component_that_does_not_fit_says_so_at_its_call(x: Tensor, tmp_path: Path) -> None:
    pipe = pipeline()
    with torch.inference_mode():
        expected = generate(pipe, x)
    vramkit.enable_vram_management(pipe, "100 KB", 0, folder=tmp_path)
    before = pipe.vramkit_session.device_bytes
    for _ in range(2):
        with pytest.raises(vramkit.BudgetError, match="smallest limit"):
            pipe.text(x)
    assert pipe.vramkit_session.device_bytes == before
    pipe.vramkit_session.resize("1.2 MB")
    with torch.inference_mode():
        assert torch.equal(generate(pipe, x), expected)


def test_components_that_call_each_other(x: Tensor, tmp_path: Path) -> None:
    inner = Stack(5, 2)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.other = [inner]  # not a child

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.other[0](self.linear(x))
            return y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Calls()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.calls(x)
            return y

    outer = Outer()
    with torch.inference_mode():
        expected = outer(x)
    pipe = SimpleNamespace(outer=outer, inner=inner)
    vramkit.enable_vram_management(pipe, "1.2 MB", 0, folder=tmp_path)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(outer(x), expected)
