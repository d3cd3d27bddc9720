"""FP8 attention: its arithmetic against float64, the error bound, whom it touches and whom not."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from numerics import FP8_ATTENTION, UNIT
from torch import Tensor, nn
from torch.nn import functional
from vramkit import _fp8_attention, attention
from vramkit._fp8_attention import Call, attend, emulated_product, sampled_error, scaled_product
from vramkit.attention import (
    Fp8Attention,
    disable_fp8_attention,
    enable_fp8_attention,
    fp8_attention_of,
)

sdpa = functional.scaled_dot_product_attention


def reference(call: Call) -> Tensor:
    """Exact attention in float64 by torch's own function."""
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    made: Tensor = sdpa(
        call.query.double(), call.key.double(), call.value.double(), mask,
        is_causal=call.causal, scale=call.scale, enable_gqa=call.group > 1,
    )  # fmt: skip
    return made


def random_call(
    batch: int = 2,
    heads: int = 4,
    shared: int = 4,
    rows: int = 70,
    keys: int = 90,
    width: int = 24,
    values: int = 40,
    mask: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    return Call(
        torch.randn(batch, heads, rows, width).to(dtype),
        torch.randn(batch, shared, keys, width).to(dtype),
        torch.randn(batch, shared, keys, values).to(dtype),
        mask,
        causal,
        1 / math.sqrt(width),
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b))


def rounded(x: Tensor) -> Tensor:
    """Each head of [batch, heads, …] to e4m3 and back, with the scale of its largest magnitude."""
    scale = x.float().abs().amax((2, 3), keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def rounded_reference(call: Call) -> Tensor:
    """The documented arithmetic with whole matrices, in float64 but for the rounding to e4m3."""
    query, value = rounded(call.query), rounded(call.value).repeat_interleave(call.group, 1)
    key = call.key.float()
    key = rounded(key - key.mean(2, keepdim=True)).repeat_interleave(call.group, 1)
    scores = call.scale * query @ key.transpose(2, 3)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -math.inf)
    elif call.mask is not None:
        scores = scores + call.mask.double()
    if call.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * 448
    weights = weights.to(torch.float8_e4m3fn).double()
    return weights @ value / weights.sum(-1, keepdim=True)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block of odd sizes": {"rows": 33, "keys": 17, "width": 16, "values": 16},
    "grouped heads": {"heads": 6, "shared": 2},
    "one shared head": {"shared": 1},
    "causal": {"causal": True, "keys": 70},
    "causal, more keys": {"causal": True, "rows": 40, "keys": 90},
    "causal, more queries": {"causal": True, "rows": 90, "keys": 40},
    "mask": {"mask": torch.rand(2, 1, 70, 90) > 0.4},
    "mask by key": {"mask": (torch.arange(90) < 50)[None, None, None]},
    "added mask": {"mask": torch.randn(4, 70, 90)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("product", [emulated_product, scaled_product])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_rounding(
    case: str, product: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = random_call(**CASES[case])
    expected, exact = rounded_reference(call), reference(call)
    made = attend(call, product)
    assert made.dtype == call.query.dtype
    unit = UNIT[call.query.dtype]
    assert distance(made, expected) < FP8_ATTENTION + unit
    # What the rounding costs at normal q, k and v: four times e4m3's 2.6 %, added in squares.
    assert 0.01 < distance(made, exact) < 0.08
    # Blocks of queries do not depend on each other.
    monkeypatch.setattr(_fp8_attention, "BLOCK_BYTES", 1)
    assert _fp8_attention.block_rows(90) == 16
    assert distance(attend(call, product), expected) < FP8_ATTENTION + unit


def test_a_common_part_of_the_keys_costs_nothing() -> None:
    """Keys with a large mean, as real models have: taken away, the error stays that of the rest."""
    call = random_call(width=32)
    shifted = Call(call.query, call.key + 30.0, call.value, call.mask, call.causal, call.scale)
    plain = sampled_error(call, attend(call, emulated_product), 8, 70)
    moved = sampled_error(shifted, attend(shifted, emulated_product), 8, 70)
    assert moved < 1.2 * plain


def test_a_query_without_keys_and_values_that_are_not_finite() -> None:
    mask = torch.ones(70, 90, dtype=torch.bool)
    mask[3] = False
    call = random_call(mask=mask)
    made = attend(call, emulated_product)
    assert not made[:, :, 3].any()
    assert made.isfinite().all()
    call.value[0, 1, 5, 7] = float("nan")
    made = attend(call, emulated_product)
    assert made[0, 1].isnan().any()
    assert made[1].isfinite().all()
    assert math.isnan(sampled_error(call, made, 100, 100)) or math.isinf(
        sampled_error(call, made, 100, 100)
    )


def test_the_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fp8_attention, "BLOCK_BYTES", 64 << 10)
    call = random_call(1, 1, 1, rows=1024, keys=512, width=16, values=16)
    largest = 0

    def watch(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        nonlocal largest
        made = emulated_product(a, b, scale)
        largest = max(largest, made.nbytes)
        return made

    attend(call, watch)
    assert largest == 64 << 10


def test_the_sampled_error_is_the_error() -> None:
    call = random_call(mask=torch.rand(70, 90) > 0.3, heads=4, shared=2)
    made, exact = attend(call, emulated_product), reference(call)
    error = torch.linalg.vector_norm(made.double() - exact, dim=(2, 3))
    power = torch.linalg.vector_norm(exact, dim=(2, 3))
    found = sampled_error(call, made, 8, 70)
    assert found == pytest.approx(float((error / power).max()), rel=1e-9)
    assert sampled_error(call, exact, 8, 70) < 1e-12
    assert 0 < sampled_error(call, made, 3, 20) < 0.2
    assert sampled_error(call, torch.zeros_like(made), 8, 70) == pytest.approx(1.0)


class Attends(nn.Module):
    """Heads of a linear projection, as small as it goes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        made: Tensor = sdpa(q, k, v, **self.options)
        return made


@pytest.fixture
def model() -> Attends:
    return Attends().eval().requires_grad_(False)


X = torch.randn(2, 80, 32)


def test_without_hardware_bits_stay_and_one_warning_says_why(model: Attends) -> None:
    before = model(X)
    with pytest.warns(RuntimeWarning, match=r"capability 8.9 or later, and this model runs on cpu"):
        state = enable_fp8_attention(model)[""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(model(X), before)
    assert state.fp8_calls == 0
    assert "stays exact" in state.report()["warning"]
    assert fp8_attention_of(model) == {"": state}
    assert not model._forward_hooks
    assert disable_fp8_attention(model) == 1
    assert fp8_attention_of(model) == {}


def test_without_hardware_torchs_fast_path_is_kept() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    x = torch.randn(1, 70, 64)
    with torch.no_grad():
        before = layer(x)
        with pytest.warns(RuntimeWarning, match="FP8 attention needs"):
            enable_fp8_attention(layer)
        assert torch.equal(layer(x), before)


def test_emulation_and_back(model: Attends) -> None:
    before = model(X)
    state = enable_fp8_attention(model, backend="emulate")[""]
    made = [model(X) for _ in range(4)]
    assert state.fp8_calls == 4
    assert all(torch.equal(one, made[0]) for one in made)
    error = float((made[0] - before).norm() / before.norm())
    assert 0 < error < state.error_bound
    assert state.error == pytest.approx(error, rel=1.0)
    assert state.sites[0].checked == 2
    assert state.sites[0].speedup is None
    assert state.report()["sites"][0]["shape"] == (2, 2, 80, 16)
    assert disable_fp8_attention(model) == 1
    assert torch.equal(model(X), before)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called


def test_above_the_bound_it_is_exact_with_one_warning(model: Attends) -> None:
    before = model(X)
    state = enable_fp8_attention(model, backend="emulate", error_bound=1e-4)[""]
    with pytest.warns(RuntimeWarning, match="more than error_bound=0.0001") as found:
        assert all(torch.equal(model(X), before) for _ in range(3))
    assert len(found) == 1
    assert state.exact == {"error above the bound": 3}
    assert state.sites[0].reason
    assert state.error is None
    assert state.sites[0].error > 1e-4


def test_hardware_is_used_where_it_is_said_to_be(
    model: Attends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU with FP8, on this processor's FP8 product; the clock is set by hand."""
    monkeypatch.setattr(attention, "multiplies", lambda device, fmt: True)
    monkeypatch.setattr(attention, "_any_fp8", lambda: True)
    times = iter([3.0, 1.0] * 2)
    monkeypatch.setattr(attention, "_seconds", lambda work, like: next(times))
    before = model(X)
    state = enable_fp8_attention(model)[""]
    made = [model(X) for _ in range(3)]
    assert state.fp8_calls == 3
    assert state.sites[0].speedup == 3.0
    assert not torch.equal(made[2], before)
    assert float((made[2] - before).norm() / before.norm()) < 0.08
    monkeypatch.setattr(attention, "_seconds", lambda work, like: 1.0)
    state = enable_fp8_attention(model)[""]
    with pytest.warns(RuntimeWarning, match="takes 1 times the time of exact") as found:
        assert all(torch.equal(model(X), before) for _ in range(3))
    assert len(found) == 1
    assert state.exact == {"no faster in FP8": 3}


def test_time_is_taken_of_the_second_call() -> None:
    calls = []
    assert attention._seconds(lambda: calls.append(1) or X, X) >= 0.0
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [({"dropout_p": 0.5}, "dropout"), ({"attn_mask": torch.ones(1, 1, 1, 1, 1)}, "shape")],
)
def test_calls_that_stay_exact(options: dict[str, Any], why: str) -> None:
    model = Attends(**options).eval().requires_grad_(False)
    state = enable_fp8_attention(model, backend="emulate")[""]
    try:
        model(X)
    except RuntimeError:
        assert why == "shape"  # torch's own complaint
    assert state.exact == {why: 1}


def test_gradients_short_calls_and_dtypes_stay_exact(model: Attends) -> None:
    state = enable_fp8_attention(model, backend="emulate")[""]
    model(X[:, :63])
    assert state.exact == {"short": 1}
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert state.exact["gradients"] == 1
    model.double()(X.double())
    assert state.exact["dtype"] == 1
    assert state.fp8_calls == 0


def test_fake_tensors_are_traced_exactly(model: Attends) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = enable_fp8_attention(model, backend="emulate")[""]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(mode.from_tensor(X))
    assert out.shape == (2, 2, 80, 16)
    assert list(state.exact) == ["traced, nested or a tensor subclass"]


def test_compiled_code_stays_exact(model: Attends) -> None:
    before = model(X)
    state = enable_fp8_attention(model, backend="emulate")[""]
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stays exact
        assert torch.equal(compiled(X), before)
    assert state.exact["compiled"] > 0
    assert state.fp8_calls == 0
    assert not torch.equal(model(X), before)


def test_scale_keywords_and_grouped_heads() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made: Tensor = sdpa(query=q, key=k, value=v, scale=0.3, enable_gqa=True, is_causal=True)
            return made

    q, k, v = torch.randn(1, 6, 70, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 24)
    model = Grouped()
    expected = model(q, k, v)
    state = enable_fp8_attention(model, backend="emulate", error_bound=0.5)[""]
    made = model(q, k, v)
    assert state.fp8_calls == 1
    assert float((made - expected).norm() / expected.norm()) < 0.1


def test_three_dimensions_are_one_head() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            made: Tensor = sdpa(q, q, q)
            return made

    q, model = torch.randn(3, 70, 16), Plain()
    expected = model(q)
    enable_fp8_attention(model, backend="emulate", error_bound=0.5)
    made = model(q)
    assert made.shape == expected.shape
    assert 0 < float((made - expected).norm() / expected.norm()) < 0.1


def test_an_error_in_the_forward_leaves_the_mode(model: Attends) -> None:
    enable_fp8_attention(model, backend="emulate")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 80, 31))
    assert torch._C._len_torch_function_stack() == 0
    q = torch.randn(1, 1, 70, 16)
    assert torch.equal(sdpa(q, q, q), sdpa(q, q, q))
    assert fp8_attention_of(model)[""].fp8_calls == 0


def test_others_are_left_as_they_are(model: Attends) -> None:
    other = copy.deepcopy(model)
    before = other(X)
    enable_fp8_attention(model, backend="emulate")
    model(X)
    assert torch.equal(other(X), before)
    assert fp8_attention_of(other) == {}
    assert disable_fp8_attention(other) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_switch_of_their_own(model: Attends, how: Any) -> None:
    state = enable_fp8_attention(model, backend="emulate", error_bound=0.7)[""]
    copied = how(model)
    assert torch.equal(copied(X), model(X))
    theirs = fp8_attention_of(copied)[""]
    assert theirs is not state
    assert (theirs.error_bound, theirs.fp8_calls, state.fp8_calls) == (0.7, 1, 1)
    disable_fp8_attention(copied)
    assert not torch.equal(copied(X), model(X))


def test_pipelines_by_name() -> None:
    pipe = SimpleNamespace(transformer=Attends(), vae=nn.Conv2d(3, 3, 1), steps=4)
    with pytest.warns(RuntimeWarning, match="FP8 attention needs") as found:
        states = enable_fp8_attention(pipe)
    assert len(found) == 1
    assert set(states) == {"transformer", "vae"}
    assert all(isinstance(state, Fp8Attention) for state in states.values())
    assert disable_fp8_attention(pipe) == 2


def test_a_model_without_such_calls_is_told() -> None:
    model = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    enable_fp8_attention(model, backend="emulate")
    with pytest.warns(RuntimeWarning, match="called no scaled_dot_product_attention") as found:
        assert all(model(X, X, X) for _ in range(2))
    assert len(found) == 1


def test_what_is_refused(model: Attends) -> None:
    with pytest.raises(ValueError, match="backend is one of auto, emulate"):
        enable_fp8_attention(model, backend="fp4")
    with pytest.raises(ValueError, match="error_bound"):
        enable_fp8_attention(model, error_bound=0.0)
    with pytest.raises(ValueError, match="check_calls"):
        enable_fp8_attention(model, check_calls=0)
    with pytest.raises(TypeError, match="holds none"):
        enable_fp8_attention(SimpleNamespace(steps=3))


MODELS = ["llama", "unet 2d condition", "qwen-image transformer"]


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_libraries(name: str) -> None:
    species = zoo.ZOO[name]
    pytest.importorskip(species.package)
    model, inputs = species.build()
    model.eval()
    expected = zoo.call(model, inputs)
    state = enable_fp8_attention(model, backend="emulate", error_bound=0.5, least_length=1)[""]
    with torch.no_grad():
        made = zoo.call(model, inputs)
    assert state.fp8_calls > 0
    assert not state.exact
    assert 0 < float((made - expected).norm() / expected.norm()) < 0.1
    disable_fp8_attention(model)
    assert torch.equal(zoo.call(model, inputs), expected)


def test_quality_on_real_weights(minilm_path: Path) -> None:
    """MiniLM's embeddings with attention in FP8 all through; figures in docs/attention.md."""
    from transformers import BertModel

    model = BertModel.from_pretrained(minilm_path).eval()
    ids = torch.randint(1000, 20000, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).last_hidden_state.mean(1)
        state = enable_fp8_attention(model, backend="emulate")[""]
        made = model(ids).last_hidden_state.mean(1)
    assert state.fp8_calls == 6
    assert not state.exact
    assert distance(made, expected) < 0.08
    assert float(functional.cosine_similarity(made, expected).min()) > 0.998


def test_saving_keeps_nothing_of_it(model: Attends) -> None:
    enable_fp8_attention(model, backend="emulate")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file)) == {"qkv.weight", "qkv.bias"}
