"""What may be done to a model while it is offloaded: it is right, or it is refused in words."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from test_offload import Chain, chain, offloaded
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from vramkit import enable_vram_management
from vramkit.estimator import weight_bytes
from vramkit.offload import pages as pages_module
from vramkit.offload import session as session_module
from vramkit.offload.lent import Lent
from vramkit.offload.pages import Found, Pages


def twins(folder: Path, share: float = 0.5) -> tuple[Chain, Chain, Tensor]:
    """One offloaded, one resident."""
    model, x = chain()
    twin = copy.deepcopy(model)
    offloaded(model, (x,), folder, share)
    return model, twin, x


def check_the_same(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = twin(x)
        for _ in range(2):
            assert torch.equal(model(x), expected)
    session: Any = model.vramkit_session
    assert session.stats().committed <= session.stats().limit
    session.engine.check()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def through_numpy(model: Chain) -> None:
    model.layers[4].weight.detach().numpy()[3] *= 2


def through_data(model: Chain) -> None:
    for layer in model.layers:
        layer.weight.data += 0.25
        layer.bias.data.mul_(-1)


def by_transposing_in_place(model: Chain) -> None:
    model.layers[3].weight.data = model.layers[3].weight.data.t()


def through_a_kept_alias(model: Chain) -> None:
    alias = model.layers[2].weight.data
    with torch.no_grad():
        model(torch.zeros(1, 1, 96))
    alias[5] = 3.0


def by_assignment(model: Chain) -> None:
    torch.manual_seed(8)
    model.layers[1].weight = nn.Parameter(torch.randn(96, 96))
    model.layers[3].bias = nn.Parameter(torch.randn(96))
    model.attention.out_proj.weight = nn.Parameter(torch.randn(96, 96))


def by_loading(model: Chain) -> None:
    torch.manual_seed(8)
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def by_assigning_all(model: Chain) -> None:
    torch.manual_seed(8)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_pruning(model: Chain) -> None:
    prune.l1_unstructured(model.layers[2], "weight", amount=0.5)


def by_pruning_for_good(model: Chain) -> None:
    prune.l1_unstructured(model.layers[2], "weight", amount=0.5)
    prune.remove(model.layers[2], "weight")


def by_converting(model: Chain) -> None:
    vramkit.convert(model, "int8")


def by_converting_and_restoring(model: Chain) -> None:
    vramkit.convert(model, "nf4")
    with torch.no_grad():
        model(torch.zeros(1, 1, 96))
    vramkit.restore(model, "fp32")


def by_a_new_layer(model: Chain) -> None:
    torch.manual_seed(8)
    model.layers[5] = nn.Linear(96, 96)


def by_tying(model: Chain) -> None:
    model.layers[6].weight = model.layers[2].weight


def by_a_cast_of_one_layer(model: Chain) -> None:
    """The model's own code casts nothing, so the layer does."""
    layer = model.layers[3].bfloat16()
    layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    layer.register_forward_hook(lambda _, args, out: out.float())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def by_parametrizing(model: Chain) -> None:
    parametrize.register_parametrization(model.layers[4], "weight", Twice())
    parametrize.register_parametrization(model.layers[5], "bias", nn.Tanh())


def by_weight_norm(model: Chain) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[1])


CHANGES: list[Callable[[Chain], None]] = [
    through_numpy, through_data, by_transposing_in_place, through_a_kept_alias, by_assignment,
    by_loading, by_assigning_all, by_pruning, by_pruning_for_good, by_converting,
    by_converting_and_restoring, by_a_new_layer, by_tying, by_a_cast_of_one_layer,
    by_parametrizing, by_weight_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_calls(change: Callable[[Chain], None], tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path)
    check_the_same(model, twin, x)
    change(model)
    change(twin)
    check_the_same(model, twin, x)
    with torch.no_grad():  # and what comes after is seen too
        for one in (model, twin):
            for parameter in one.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(0.5)
    check_the_same(model, twin, x)
    session = model.vramkit_session
    assert list(tmp_path.iterdir()) == []  # the file has no name
    session.disable()
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert not any(isinstance(m.__dict__.get("forward"), Lent) for m in model.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [by_assigning_all, by_converting, by_loading])
def test_what_is_changed_moves_on(change: Callable[[Chain], None], tmp_path: Path) -> None:
    """Weights of a module in a block that are replaced are streamed as those before them."""
    model, _, x = twins(tmp_path, 0.0)
    limit = model.vramkit_session.stats().limit + model.vramkit_session.fixed_bytes
    change(model)
    with torch.no_grad():
        model(x)
    session = model.vramkit_session
    moved = {n for block in session.division.blocks for n in block.parameters}
    assert moved >= {n for n, _ in model.named_parameters() if n.startswith("layers")}
    assert session.fixed_bytes == sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if n not in moved
    )
    assert session.stats().committed + session.fixed_bytes <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", ["to", "data"])
def test_another_dtype(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path, 0.9)
    for one in (model, twin):
        if way == "to":
            one.to(dtype)
        else:
            for parameter in one.parameters():
                parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        model.vramkit_session.resize(f"{weight_bytes(model)} B")
    check_the_same(model, twin, x.to(dtype))
    moved = sum(block.nbytes for block in model.vramkit_session.division.blocks)
    assert moved + model.vramkit_session.fixed_bytes == weight_bytes(model)
    model.to("cpu")
    check_the_same(model, twin, x.to(dtype))


def test_a_dtype_that_does_not_fit(tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path, 0.0)
    model.double(), twin.double()
    x = x.double()
    for _ in range(2):
        with pytest.raises(vramkit.BudgetError, match="smallest limit that would do") as caught:
            model(x)
    model.vramkit_session.resize(f"{caught.value.needed_bytes} B")
    check_the_same(model, twin, x)
    model.float(), twin.float()
    check_the_same(model, twin, x.float())


def test_another_device_is_refused(tmp_path: Path) -> None:
    model, _, x = twins(tmp_path)
    model.to("meta")
    with torch.no_grad(), pytest.raises(vramkit.VramkitError, match="moved to meta"):
        model(x)
    model, twin, x = twins(tmp_path)
    with pytest.raises(NotImplementedError):
        nn.Module.to(model.to("meta"), "cpu")
    assert next(twin.parameters()).device.type == "cpu"


def test_a_weight_changed_before_backward_is_an_error(tmp_path: Path) -> None:
    for share in (0.0, 2.0):
        model, twin, x = twins(tmp_path, share)
        for one in (model, twin):
            x.requires_grad_()
            loss = one(x).square().sum()
            with torch.no_grad():
                one.layers[4].weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        one.zero_grad(), model.zero_grad()
        model(x).sum().backward(), twin(x).sum().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_backward_after_the_session_ends(tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path)
    loss, expected = model(x).square().sum(), twin(x).square().sum()
    model.vramkit_session.disable()
    loss.backward(), expected.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_saved_and_copied_in_the_middle(tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path / "blocks")
    with torch.no_grad():
        for one in (model, twin):
            one(x)
            one.layers[0].weight.data.mul_(2)
    vramkit.save(model, tmp_path / "saved")
    loaded = vramkit.load(tmp_path / "saved", factory=Chain).eval()
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    copies = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(whole, weights_only=False))
    for one in copies:
        assert torch.equal(one(x), twin(x))
        assert getattr(one, "vramkit_session", None) is None
    again = copies[1]
    offloaded(again, (x,), tmp_path / "blocks")
    check_the_same(again, twin, x)
    again.vramkit_session.disable()
    assert torch.equal(again(x), twin(x))


def test_the_library_next_to_it_is_left_in_place(tmp_path: Path) -> None:
    """A forward that others replaced before or since stays replaced."""
    model, x = chain()
    calls: list[str] = []

    def forward(module: Any, *args: Any) -> Any:
        calls.append(type(module).__name__)
        return type(module).forward(module, *args)

    for module in (model, model.layers[0]):
        module.forward = types.MethodType(forward, module)
    expected = model(x)
    offloaded(model, (x,), tmp_path)
    since = model.layers[1].forward

    def later(*args: Any) -> Any:
        calls.append("later")
        return since(*args)

    model.layers[1].forward = later
    for active in (True, False):
        calls.clear()
        assert torch.equal(model(x), expected)
        assert calls == ["Chain", "Linear", "later"]
        if active:
            model.vramkit_session.disable()
    assert model.layers[1].__dict__.pop("forward") is later
    assert not isinstance(model.forward, Lent)


def test_hooks_of_accelerate_on_top(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, twin, x = twins(tmp_path)

    class Doubling(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * arg for arg in args), kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output + 1

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(model(x), twin(x))

    for append in (False, True):
        for one in (model, twin):
            for module in (one, one.layers[3]):
                hooks.add_hook_to_module(module, Doubling(), append=append)
        check()
    assert model.forward.__name__ == "forward"
    for one in (model, twin):
        for module in (one, one.layers[3]):
            hooks.remove_hook_from_module(module)
    assert isinstance(model.forward, Lent)
    check()
    for one in (model, twin):
        hooks.add_hook_to_module(one.layers[0], Doubling())
    model.vramkit_session.disable()  # under the hook, which stays
    check()
    offloaded(model, (x,), tmp_path)  # and over it
    check()
    assert model.vramkit_session.stats().acquires > 0


def test_batch_norms_that_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(5)]
    model = nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    offloaded(model, (torch.randn(4, 64),), tmp_path)
    for _ in range(3):
        x = torch.randn(4, 64)
        assert torch.equal(model(x), twin(x))
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in twin.state_dict().items())
    assert int(state["0.1.num_batches_tracked"]) == 3


def test_inference_mode_and_gradients_in_turn(tmp_path: Path) -> None:
    model, x = chain()
    twin = copy.deepcopy(model)
    enable_vram_management(model, "1 GB", 0, folder=tmp_path)
    for size in ("1 GB", f"{weight_bytes(model) // 2} B"):
        with torch.inference_mode():
            assert torch.equal(model(x), twin(x))
            model.vramkit_session.resize(size)
            model.layers[0].weight.mul_(2), twin.layers[0].weight.mul_(2)
            assert torch.equal(model(x), twin(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), twin(x))
        for one in (model, twin):
            one.zero_grad()
            one(x).square().sum().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_what_cannot_be_followed_is_a_value_error(tmp_path: Path) -> None:
    """A forward that casts its weights in every call: fake tensors refuse it, in words of torch."""

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.to(torch.bfloat16)
            out = super().forward(x.bfloat16())
            self.to(torch.float32)
            return out.float()

    model, x = nn.Sequential(nn.Linear(64, 64), Casting(64, 64)), torch.randn(2, 64)
    with pytest.raises(ValueError, match="could not be followed on fake tensors: in module '1'"):
        enable_vram_management(model, "1 GB", 0, inputs=(x,), folder=tmp_path)
    assert "forward" not in model.__dict__
    assert model(x).shape == (2, 64)


class Branching(nn.Module):
    """Which of two ways a call takes is up to its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(96, 96)
        self.ways = nn.ModuleList([nn.Linear(96, 96) for _ in range(4)])
        self.register_buffer("scale", torch.ones(96))
        self.register_buffer("shift", torch.ones(96), persistent=False)

    def forward(self, x: Tensor, way: int = 0) -> Tensor:
        out: Tensor = self.ways[way](self.common(x)) * self.scale + self.shift
        if way == 3:  # reads what is another module's, beside its calls
            out = out @ self.common.weight + self.ways[0].bias
        return out


def test_another_way_than_the_traced_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(2, 96)
    with torch.no_grad():
        expected = [model(torch.cat([x] * rows), way=rows) for rows in range(1, 4)]
        first, twin = model(x), copy.deepcopy(model)
        session = offloaded(model, (x,), tmp_path).vramkit_session
        reasons = dict(session.division.stays)
        assert all("not used" in reasons[f"ways.{i}.weight"] for i in (1, 2, 3))
        for _ in range(3):
            for rows in range(1, 4):
                assert torch.equal(model(torch.cat([x] * rows), way=rows), expected[rows - 1])
            assert torch.equal(model(x), first)
        for one in (model, twin):
            one.scale.mul_(2)
            one.shift = torch.zeros(96)
        assert torch.equal(model(x), twin(x))
    assert "shift" not in model.state_dict()
    assert session.fixed_bytes == 4 * (3 * (96 * 96 + 96) + 2 * 96)
    assert session.stats().committed <= session.stats().limit


class Calling(nn.Module):
    """A layer that calls the whole model again, and a chain after it."""

    def __init__(self) -> None:
        super().__init__()
        self.again = Again()
        self.again.whole.append(self)
        self.layers = nn.ModuleList([nn.Linear(96, 96) for _ in range(6)])

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            x = self.again(x, depth - 1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 96))
        self.whole: list[nn.Module] = []

    def forward(self, x: Tensor, depth: int) -> Tensor:
        out: Tensor = self.whole[0](x @ self.weight, depth) @ self.weight
        return out


def test_a_model_that_calls_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Calling(), torch.randn(2, 96)
    with torch.no_grad():
        expected = [model(x, depth=i) for i in range(4)]
        session = offloaded(model, (x,), tmp_path, 0.3).vramkit_session
        for _ in range(2):
            for i in range(4):
                assert torch.equal(model(x, depth=i), expected[i])
    assert session.stats().bytes_copied > 0
    session.engine.check()
    assert session.stats().committed <= session.stats().limit


def test_a_model_that_calls_itself_needs_two_slots(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Calling(), torch.randn(2, 96)
    with torch.no_grad():
        expected = model(x, depth=1), model(x, depth=0)
        session = offloaded(model, (x,), tmp_path).vramkit_session
        with pytest.raises(vramkit.BudgetError, match="smallest limit that would do") as caught:
            model(x, depth=1)
        assert torch.equal(model(x, depth=0), expected[1])
        session.resize(f"{caught.value.needed_bytes} B")
        assert torch.equal(model(x, depth=1), expected[0])


def test_hooks_that_read_weights(tmp_path: Path) -> None:
    model, twin, x = twins(tmp_path)
    seen: dict[int, list[Tensor]] = {id(model): [], id(twin): []}
    for one in (model, twin):

        def look(module: nn.Module, args: Any, out: Any = None, one: nn.Module = one) -> None:
            weight = module.weight if isinstance(module, nn.Linear) else module.in_proj_weight
            seen[id(one)].append(weight.detach().clone())

        for module in [*one.layers, one.attention]:
            module.register_forward_pre_hook(look)
            module.register_forward_hook(look)
        with torch.no_grad():
            one(x), one(x)
    assert len(seen[id(model)]) == 36
    assert all(torch.equal(a, b) for a, b in zip(seen[id(model)], seen[id(twin)], strict=True))


def test_an_error_within_a_nested_call(tmp_path: Path) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(*[nn.Linear(96, 96) for _ in range(6)])
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    model, x = Failing(), torch.randn(2, 96)
    with torch.no_grad():
        expected = model(x)
        session = offloaded(model, (x,), tmp_path).vramkit_session

        def fail(module: nn.Module, args: Any) -> None:
            if model.fails:
                raise KeyError("from a hook")

        for layer in model.inner:
            layer.register_forward_pre_hook(fail)
        for _ in range(3):
            model.fails = True
            with pytest.raises(KeyError, match="from a hook"):
                model(x)
            model.fails = False
            assert torch.equal(model(x), expected)
    session.engine.check()


def test_threads_and_changes(tmp_path: Path) -> None:
    """Several threads call while another adds and removes a layer's parameters."""
    model, twin, x = twins(tmp_path)
    with torch.no_grad():
        expected = twin(x)
    wrong: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                wrong.extend(1 for _ in range(12) if not torch.equal(model(x), expected))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(12):
        model.register_parameter("extra", nn.Parameter(torch.zeros(i)))
        del model.extra
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("tied", [False, True])
def test_generation(tied: bool, tmp_path: Path) -> None:
    """Tokens are the resident model's, and in steady state every block is foreseen."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, max_position_embeddings=128,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 320, (2, 7))
    options = {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, do_sample=False, **options)
    torch.manual_seed(4)
    sampled = model.generate(prompt, do_sample=True, **options)
    offloaded(model, {"input_ids": prompt}, tmp_path, 0.2)
    session = model.vramkit_session
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert torch.equal(model.generate(prompt, do_sample=False, **options), expected)
    before = session.stats()
    assert torch.equal(model.generate(prompt, do_sample=False, **options), expected)
    after = session.stats()
    loads = after.loads - before.loads
    streamed = len(session.division.blocks) - after.residents
    # Each pass loads each streamed block once: what was foreseen wrongly would be loaded for
    # nothing. The first pass and the last may add a block that nobody asks for.
    passes = options["max_new_tokens"]
    assert streamed > 0
    assert loads <= passes * streamed + 2
    torch.manual_seed(4)
    assert torch.equal(model.generate(prompt, do_sample=True, **options), sampled)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    gradients = []
    ids = torch.randint(3, 320, (2, 9))
    for offload in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            vocab_size=320,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
        if offload:
            offloaded(model, {"input_ids": ids, "labels": ids}, tmp_path)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 16
    for name, expected in gradients[0].items():
        assert expected.abs().sum() > 0
        assert torch.equal(gradients[1][name], expected), name


def test_what_backward_and_others_read_is_let_go(tmp_path: Path) -> None:
    """Pages of the store that were read beside the blocks' calls leave memory again."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    x = torch.randn(2, 512)
    offloaded(model, (x,), tmp_path)
    session: Any = model.vramkit_session
    pages = Pages()

    def present() -> int:
        return sum(pages.look(g.address, g.nbytes).present for g in session._guests)

    model(x).sum().backward()
    assert present() <= 2  # the block that backward read last; the system maps some pages around
    assert len(pickle.dumps(model.state_dict())) > 6 << 20
    assert present() == 6
    with torch.no_grad():
        model(x)
    assert present() == 0


class TestPages:
    def ranges(self, tmp_path: Path) -> np.ndarray[Any, Any]:
        (tmp_path / "file").write_bytes(b"\1" * (8 * pages_module.PAGE))
        return np.memmap(tmp_path / "file", np.uint8, "c")

    @pytest.mark.parametrize("old", [False, True])
    def test_what_is_seen(self, old: bool, tmp_path: Path) -> None:
        mapped = self.ranges(tmp_path)
        start, page = mapped.ctypes.data, pages_module.PAGE
        pages = Pages()
        pages._scans = pages._scans and not old
        assert pages.look(start, 8 * page) == Found(False, False)
        assert mapped[5 * page] == 1
        assert pages.look(start, 8 * page) == Found(False, True)
        mapped[5 * page + 7] = 2
        assert pages.look(start, 8 * page) == Found(True, True)
        assert pages.look(start + 5 * page + 9, 1) == Found(True, True)
        assert not pages.look(start, page).written
        pages.drop(start, 2 * page)
        assert not pages.look(start, 2 * page).present
        assert mapped[5 * page + 7] == 2

    def test_a_system_that_does_not_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Silent:
            def __init__(self) -> None:
                raise OSError(2, "no /proc here")

        monkeypatch.setattr(session_module, "Pages", Silent)
        model, x = chain()
        with pytest.warns(session_module.OffloadWarning, match="will not be seen"):
            enable_vram_management(model, "1 GB", 0, inputs=(x,), folder=tmp_path)
        twin = copy.deepcopy(model)
        for one in (model, twin):
            with torch.no_grad():
                one.layers[2].weight.mul_(3)  # version counters are still there
        assert torch.equal(model(x), twin(x))
