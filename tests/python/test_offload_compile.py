"""Offloaded models and torch.compile: right results, from slots, in as few graphs as residents."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from test_offload import TellingAll, offloaded
from torch import Tensor, nn
from vramkit.offload import turns
from vramkit.offload.ordering import activations_in
from vramkit.offload.turns import Turn


class Layer(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.layers = nn.ModuleList([Layer() for _ in range(count)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Counter:
    """A backend that counts graphs, and the operators of ours in them."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs, self.orders, self.backend = 0, 0, backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        self.orders += sum("vramkit_offload" in str(node.target) for node in graph.graph.nodes)
        return lookup_backend(self.backend)(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


IDS = torch.arange(10).reshape(2, 5)


def net(precision: str | None = None, count: int = 4) -> Net:
    torch.manual_seed(0)
    model = Net(count).eval()
    if precision is not None:
        vramkit.convert(model, precision)
    return model


def poison(model: nn.Module) -> None:
    """What the store's mapping holds becomes NaN, unseen: only slots, which the file fills, count.

    In a model's own terms nothing was changed, so that nothing is written to the file.
    """
    session: Any = model.vramkit_session
    session._pages = None
    for guest in session._guests:
        for view in guest.views:
            view.view(torch.uint8).fill_(255)  # NaN in every float format


def whole(model: nn.Module, counter: Counter, **options: Any) -> nn.Module:
    return torch.compile(model, backend=counter, **options)


def pieces(model: Any, counter: Counter) -> nn.Module:
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=counter)
    return model  # type: ignore[no-any-return]


def in_place(model: Any, counter: Counter) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend=counter)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("first", "way", "precision"),
    [
        ("compile", whole, "nf4"),
        ("offload", pieces, "nf4"),
        ("offload", in_place, None),
    ],
)
def test_without_gradients(
    first: str, way: Callable[..., nn.Module], precision: str | None, tmp_path: Path
) -> None:
    resident, model = net(precision), net(precision)
    counts = Counter(), Counter()
    with torch.no_grad():
        expected = way(resident, counts[0])(IDS)
        if first == "compile":
            compiled = way(model, counts[1])
            offloaded(model, (IDS,), tmp_path)
        else:
            offloaded(model, (IDS,), tmp_path)
            compiled = way(model, counts[1])
        poison(model)
        session = model.vramkit_session
        for _ in range(3):
            assert torch.equal(compiled(IDS), expected)
        assert counts[0].graphs == 1
        # Pieces are told apart by what took the place of their forwards: each has its own graph.
        assert 1 <= counts[1].graphs <= (1 if way is whole else len(model.layers))
        assert counts[1].orders > 0
        assert counts[0].orders == 0
        stats = session.stats()
        assert stats.bytes_copied > 0
        assert stats.committed <= stats.limit
        session.engine.check()
        session.disable()


def test_one_graph(tmp_path: Path) -> None:
    model, counter = net(), Counter()
    with torch.no_grad():
        expected = model(IDS)
        offloaded(model, (IDS,), tmp_path)
        compiled = whole(model, counter, fullgraph=True)
        assert torch.equal(compiled(IDS), expected)
        assert torch.equal(compiled(IDS.T), model(IDS.T))
        assert counter.graphs in (1, 2)  # one for each shape, or one for all
        entries = sum(len(block.entries) for block in model.vramkit_session.division.blocks)
        assert counter.orders == counter.graphs * 2 * (entries + 1)
        assert torch.equal(model(IDS), expected)  # not compiled, beside it
        for layer in model.layers:
            layer.up.weight.data.mul_(2)  # a change is seen as elsewhere
        assert torch.equal(compiled(IDS), model(IDS))
        assert not torch.equal(compiled(IDS), expected)
        model.vramkit_session.resize(model.vramkit_session.stats().limit * 10)
        assert torch.equal(compiled(IDS), model(IDS))
        again = model(IDS)
        model.vramkit_session.disable()
        assert torch.equal(compiled(IDS), again)


def test_inductor(tmp_path: Path) -> None:
    """Code of inductor's own reads slots too, and refuses weights as constants."""
    model, counter = net(count=1), Counter("inductor")
    with torch.no_grad():
        expected = whole(copy.deepcopy(model), Counter("inductor"))(IDS)
        offloaded(model, (IDS,), tmp_path)
        poison(model)
        compiled = whole(model, counter, fullgraph=True)
        for _ in range(3):
            assert torch.equal(compiled(IDS), expected)
        assert counter.graphs == 1
        import torch._inductor.config as config

        with config.patch(freezing=True), pytest.raises(vramkit.VramkitError, match="freezing"):
            compiled(IDS)
    model.vramkit_session.engine.check()


@pytest.mark.parametrize("way", [whole, pieces])
def test_with_gradients(way: Callable[..., nn.Module], tmp_path: Path) -> None:
    resident, model = net(), net()
    resident(IDS).square().sum().backward()
    offloaded(model, (IDS,), tmp_path)
    counter = Counter()
    compiled = way(model, counter)
    for _ in range(2):
        model.zero_grad()
        compiled(IDS).square().sum().backward()
        for a, b in zip(model.parameters(), resident.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="blocks come and go here"):
        whole(model, counter, fullgraph=True)(IDS)
    assert torch.equal(model(IDS), resident(IDS))


class Breaking(Layer):
    """A layer in which a graph ends, with blocks on both sides of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x * 2


def test_graphs_that_end_within_a_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    for i in (1, 3):
        model.layers[i] = Breaking()
    with torch.no_grad():
        expected = model(IDS)
        offloaded(model, (IDS,), tmp_path)
        poison(model)
        compiled = whole(model, Counter())
        for _ in range(3):
            assert torch.equal(compiled(IDS), expected)
    model.vramkit_session.engine.check()


def test_the_first_call_is_a_compiled_one(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        expected = model(IDS)
        vramkit.enable_vram_management(model, "1 GB", 0, folder=tmp_path)
        compiled = whole(model, Counter())
        for _ in range(3):
            assert torch.equal(compiled(IDS), expected)
    assert model.vramkit_session.stats().acquires > 0


def test_a_compiled_model_is_offloaded(tmp_path: Path) -> None:
    model, counter = net(), Counter()
    with torch.no_grad():
        expected = model(IDS)
        compiled = whole(model, counter)
        assert torch.equal(compiled(IDS), expected)
        assert (
            vramkit.enable_vram_management(compiled, "1 GB", 0, inputs=(IDS,), folder=tmp_path)
            is compiled
        )
        for _ in range(2):
            assert torch.equal(compiled(IDS), expected)
        assert compiled.vramkit_session.stats().acquires > 0
        assert counter.orders > 0


def test_a_compiled_call_that_fails(tmp_path: Path) -> None:
    """What a graph took is given back by the next call, of whatever thread."""
    model = net()

    class Fails(Exception):
        pass

    failing = [True]

    @torch.library.custom_op("vramkit_test::maybe", mutates_args=())
    def maybe(x: Tensor) -> Tensor:
        if failing[0]:
            raise Fails
        return x.clone()

    maybe.register_fake(torch.empty_like)

    class Between(Layer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(maybe(torch.relu(self.up(x))))
            return out

    model.layers[2] = Between()
    with torch.no_grad():
        failing[0] = False
        expected = model(IDS)
        offloaded(model, (IDS,), tmp_path, 2.0)
        session: Any = model.vramkit_session
        compiled = whole(model, Counter(), fullgraph=True)
        # Here a block is one Linear; the operator that fails has to be within one.
        guest = next(g for g in session._guests if model.layers[2].up in g.entries)
        assert torch.equal(compiled(IDS), expected)
        for run in (compiled, model):
            failing[0] = True
            with pytest.raises(Fails):
                compiled(IDS)
            # As if the operator had been within the block: it was brought and not let go.
            holding(session, guest)
            failing[0] = False
            found: list[Tensor] = []

            def call(run: nn.Module = run, found: list[Tensor] = found) -> None:
                with torch.no_grad():
                    found.append(run(IDS))

            other = threading.Thread(target=call)
            other.start()
            other.join(60)
            assert not other.is_alive()
            assert torch.equal(found[0], expected)
            assert session._depth == 0
    session.engine.check()


def holding(session: Any, guest: Any) -> None:
    """A graph that took a block, and failed."""
    session._station(guest).before()
    assert session._in_graph is guest


def test_threads_and_compiled_code(tmp_path: Path) -> None:
    model = net()
    inputs = [IDS + i for i in range(6)]
    with torch.no_grad():
        expected = [model(ids) for ids in inputs]
        offloaded(model, (IDS,), tmp_path)
        poison(model)
        compiled = whole(model, Counter(), fullgraph=True)
        compiled(IDS)
        wrong: list[Any] = []

        def run(i: int) -> None:
            with torch.no_grad():
                for _ in range(10):
                    found = (compiled if i % 2 else model)(inputs[i])
                    if not torch.equal(found, expected[i]):
                        wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert wrong == []
    model.vramkit_session.engine.check()


def test_turns() -> None:
    turn, order = Turn(), []

    def take(name: str) -> None:
        with turn:
            order.append(name)

    def fails() -> None:
        with turn:
            turn.hold()
            assert turn.frame is not None
        order.append("held")

    fails()  # its frame has gone: nobody would give it back
    other = threading.Thread(target=take, args=("other",))
    other.start()
    other.join(30)
    assert not other.is_alive()
    with turn, turn:
        turn.hold()
        other = threading.Thread(target=take, args=("later",))
        other.start()
        other.join(5 * turns._LOOK_AGAIN)
        assert other.is_alive()
        order.append("let go")
        turn.let_go()
    other.join(30)
    assert order == ["held", "other", "let go", "later"]


def test_what_an_operator_may_say_it_writes() -> None:
    x, y = torch.ones(2, 3), torch.ones(2)
    assert activations_in(((1, "text"), {"a": [x, None], "b": (y, x)})) == [x, y]
    assert activations_in((x.expand(4, 2, 3), torch.empty(0), {"b": x})) == [x]
    assert activations_in((x.expand(4, 2, 3), None, 3)) == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_results_that_are_weights(backend: str, tmp_path: Path) -> None:
    model, x = TellingAll(), torch.randn(3, 64)
    with torch.no_grad():
        expected, rows = copy.deepcopy(model)(x)
        offloaded(model, (x,), tmp_path)
        compiled = whole(model, Counter(backend), fullgraph=True)
        for _ in range(2):
            found, told = compiled(x)
            model(x * 2)
            assert torch.equal(found, expected)
            assert all(torch.equal(a, b) for a, b in zip(told, rows, strict=True))
