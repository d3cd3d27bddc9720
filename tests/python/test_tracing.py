"""Traces against the profiler's own events: probes, rules, phases, generation, targets, breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from numerics import PROBED_PEAK, RULED_PEAK
from torch import Tensor, nn
from vramkit.measure import profiled_peak
from vramkit.probing import Store, run_probes
from vramkit.targets import parse_target
from vramkit.tracing import RELEASE, Call, Trace, described, paired


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Probes of a test start from nothing and stay with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vramkit"


def measured(model: Any, *args: Any, **kwargs: Any) -> int:
    with torch.inference_mode():
        model(*args, **kwargs)
        return profiled_peak(model, args, kwargs)


class Mixed(nn.Module):
    """Convolutions, a recurrent layer, attention, dtypes that differ, a reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3))
        self.up = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.rnn = nn.LSTM(32, 48, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(96, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.up(y).mean((2, 3))
        flat, _ = self.rnn(y.flatten(2).transpose(1, 2)[:, ::9])
        out, _ = self.attention(flat, flat, flat, need_weights=False)
        made: Tensor = (out.sum(1).double() * torch.arange(96)).sum() + z.sum()
        return made


CASES: dict[str, Any] = {
    "mixed": lambda: (Mixed(), (torch.randn(3, 3, 31, 37),)),
    "vocoder": lambda: (
        nn.Sequential(nn.Conv1d(40, 96, 7, padding=3), nn.ConvTranspose1d(96, 48, 8, 4, 2)),
        (torch.randn(2, 40, 70),),
    ),
    "encoder, fused": lambda: (
        nn.TransformerEncoderLayer(96, 4, 256, batch_first=True),
        (torch.randn(3, 50, 96),),
    ),
    "channels last": lambda: (
        nn.Sequential(nn.Conv2d(32, 64, 3, 2), nn.GroupNorm(4, 64), nn.Upsample(scale_factor=2.0)),
        (torch.randn(2, 32, 33, 33).to(memory_format=torch.channels_last),),
    ),
    "bfloat16": lambda: (
        nn.Sequential(nn.Linear(96, 768), nn.GELU(), nn.Linear(768, 96)).bfloat16(),
        (torch.randn(500, 96).bfloat16(),),
    ),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """oneDNN's scratch for each further thread is in no rule: with two, the vocoder misses 18 %."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_peaks_by_probe_and_by_rule(build: Any) -> None:
    model, inputs = build()
    model.eval()
    real = measured(model, *inputs)
    probed = vramkit.estimate(model, None, inputs)
    assert probed.probes[0] > 0
    assert probed.probes[1] > 0
    assert probed.activations_bytes == pytest.approx(real, rel=PROBED_PEAK)
    # What was learned is kept: nothing runs again, and nothing changes.
    again = vramkit.estimate(model, None, inputs)
    assert again.probes[0] == 0
    assert again.activations_bytes == probed.activations_bytes
    ruled = vramkit.estimate(model, None, inputs, probe=False)
    assert ruled.probes == (0, 0.0)
    assert any("no operator was probed" in note for note in ruled.notes)
    assert ruled.activations_bytes == pytest.approx(real, rel=RULED_PEAK)


def test_live_storages_alone_would_miss_most_of_it() -> None:
    """So that the tests above can fail: results alone are far from the measured peak."""
    layer = nn.TransformerEncoderLayer(96, 4, 256, batch_first=True).eval()
    x = torch.randn(3, 50, 96)
    assert x.nbytes < measured(layer, x) / 2


def test_events() -> None:
    model, inputs = CASES["mixed"]()
    model.eval()
    found = vramkit.estimate(model, None, inputs)
    trace = found.trace
    assert trace is not None
    events = trace.numpy()
    assert events.dtype == np.int64
    assert events.shape == (len(trace), 4)
    alive: dict[int, int] = {}
    live = peak = 0
    seen = set()
    for block, size, stream, tag in events.tolist():
        assert stream == 0
        assert 0 <= tag < len(trace.tags)
        if size == RELEASE:
            live -= alive.pop(block)
        else:
            assert block not in seen  # a block's number is used once
            seen.add(block)
            alive[block] = size
            live += size
        peak = max(peak, live)
    assert not alive  # the output was given back too
    assert peak == trace.peak() == found.activations_bytes
    assert sum(trace.alive_at_peak().values()) == peak
    modules = {name for name, _ in model.named_modules()}
    assert {tag.module for tag in trace.tags} <= modules
    assert "up" in {tag.module for tag in trace.tags}
    assert trace.phases() == ["run"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["at_peak"][0]["live_bytes"] == found.at_peak(1)[0][1]


def test_pairs_of_signed_sizes() -> None:
    steps, staying = paired((10, 4, 4, -4, 7, -10, -4))
    assert steps == [(0, True), (1, True), (2, True), (2, False), (4, True), (0, False), (1, False)]
    assert staying == [4]
    assert Trace().peak() == 0
    assert Trace().alive_at_peak() == {}


def test_probes_leave_the_random_state_and_report_failures() -> None:
    x = torch.randn(4, 4)
    good = Call(torch.ops.aten.bernoulli.p, (described((x, 0.5)), described({})))
    bad = Call(torch.ops.aten.mm.default, (described((x, torch.randn(3, 3))), described({})))
    state = torch.get_rng_state()
    found = run_probes([good, bad])
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(found[bad], str)
    assert sum(found[good].sizes) == x.nbytes  # type: ignore[union-attr]


def test_a_damaged_cache_is_said_and_not_used(cache: Path) -> None:
    model, inputs = nn.Linear(8, 8), torch.randn(2, 8)
    expected = vramkit.estimate(model, None, inputs)
    path = Store().path
    assert path.parent == cache
    for text in ("{", "[]", '{"schema": "vramkit.probes/0", "about": "", "calls": {}}'):
        path.write_text(text)
        found = vramkit.estimate(model, None, inputs)
        assert found.activations_bytes == expected.activations_bytes
        assert any(path.name in note for note in found.notes)
    # One entry that makes no sense is learned again.
    data = json.loads(path.read_text())
    data["calls"] = {key: [["x"], 3] for key in data["calls"]}
    path.write_text(json.dumps(data))
    assert vramkit.estimate(model, None, inputs).probes[0] > 0


def test_large_calls_are_not_probed() -> None:
    with torch.device("meta"):
        model = nn.Linear(16384, 16384, bias=False)
    found = vramkit.estimate(model, None, (4096, 16384))
    assert found.probes[0] == 0
    assert any("mm" in note for note in found.notes)
    assert found.activations_bytes == 4096 * 16384 * 4


class Masked(nn.Module):
    """Values that are known: a mask that is all ones is dropped, a buffer says how much to pad."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("padding", torch.tensor(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if bool(mask.all()):
            return x + 1
        size = int(self.padding)  # type: ignore[arg-type]
        return nn.functional.pad(x, (size, size)) * 2


def test_known_values_decide() -> None:
    x = torch.randn(5, 100)
    for mask in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        inputs = {"x": x, "mask": mask}
        found = vramkit.estimate(Masked(), None, inputs)
        # Masks' own few bytes: scalars that the reduction holds.
        assert found.activations_bytes == pytest.approx(measured(Masked(), **inputs), abs=64)
    with pytest.raises(ValueError, match="decides by the values"):
        vramkit.estimate(Masked(), None, {"x": x, "mask": (torch.bool, (5,))})


class Forgetful(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flag = torch.zeros(1, dtype=torch.int64)
        flag.copy_(x.sum().to(torch.int64).reshape(1))
        return x if int(flag) > 0 else -x


def test_values_written_from_unknown_ones_are_unknown() -> None:
    with pytest.raises(ValueError, match=r"_local_scalar_dense"):
        vramkit.estimate(Forgetful(), None, (3,))


class Table(nn.Module):
    """Computes something once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.randn(1000, 10)
        return x * 2


def test_what_a_first_call_leaves_is_told_apart() -> None:
    model = Table()
    found = vramkit.estimate(model, None, (50,))
    assert found.kept_bytes == 40000
    assert found.activations_bytes == pytest.approx(measured(model, torch.randn(50)), abs=16)
    assert model.kept is not None  # by the measurement, not by the estimate


def test_shapes_and_output() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 32))
    found = vramkit.estimate(model, None, shapes={"one": (1, 16), "many": (50, 16)})
    single = {n: vramkit.estimate(model, None, (n, 16)).activations_bytes for n in (1, 50)}
    assert found.shapes == {"one": single[1], "many": single[50]}
    assert found.activations_bytes == single[50]
    without = vramkit.estimate(model, None, (50, 16), output_kept=False)
    assert without.activations_bytes == 50 * 64 * 4
    with pytest.raises(ValueError, match="either inputs"):
        vramkit.estimate(model, None, (1, 16), shapes={"a": (1, 16)})


class Encoder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 4)


def test_pipelines() -> None:
    parts = {"encoder": Encoder(), "model": nn.Linear(64, 64), "decoder": nn.Linear(64, 128)}

    def run(encoder: Any, model: Any, decoder: Any, x: Tensor | None = None) -> Tensor:
        y = encoder(torch.ones(10, 16) if x is None else x)
        for _ in range(2):
            y = model(y)
        return decoder(y)  # type: ignore[no-any-return]

    found = vramkit.estimate_pipeline(parts, run)
    assert [p.name for p in found.phases] == ["encoder", "model", "model (2)", "decoder"]
    x = torch.ones(10, 16)
    assert found.trace is not None
    assert found.trace.peak() - x.nbytes <= measured(lambda: run(**parts, x=x)) + 640
    assert found.phases[1].activations_bytes == 2 * 10 * 64 * 4
    one = vramkit.estimate_pipeline(parts, run, resident="one", precision={"model": "int8"})
    assert one.components["model"] < found.components["model"]
    assert one.phases[0].weights_bytes == 0
    assert one.phases[3].weights_bytes == found.components["decoder"]
    listed = vramkit.estimate_pipeline(parts, [("encoder", (10, 16)), ("decoder", (10, 64))])
    assert listed.phases[1].activations_bytes == 10 * (64 + 128) * 4  # the first's result lives on
    assert json.loads(json.dumps(listed.to_dict()))["peak_bytes"] == listed.peak_bytes
    assert "decoder" in str(listed)
    with pytest.raises(KeyError, match="no component 'vae'"):
        vramkit.estimate_pipeline(parts, [("vae", (1, 2))])
    with pytest.raises(ValueError, match="resident"):
        vramkit.estimate_pipeline(parts, run, resident="some")


def llama(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=700, eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 3, 30])
def test_generation(count: int) -> None:
    model: Any = llama()
    inputs = {"input_ids": torch.randint(700, (3, 11))}

    def run(**given: Any) -> Any:
        return model.generate(**given, max_new_tokens=count, do_sample=False)

    real = measured(run, **inputs)
    found = vramkit.estimate(model, None, inputs, generate=count)
    assert found.activations_bytes == pytest.approx(real, rel=PROBED_PEAK)
    assert found.generation is not None
    per_token = 2 * 2 * 3 * 2 * 24 * 4  # layers, keys and values, batch, heads, width, bytes
    assert found.generation.cache_bytes == (11 + count - 1) * per_token
    if count > 1:
        assert found.generation.bytes_per_token == per_token
        assert f"decode {count - 1}" in found.trace.phases()  # type: ignore[union-attr]
    by_shape = vramkit.estimate(model, None, {"input_ids": (3, 11)}, generate=count)
    assert by_shape.generation == found.generation


def test_generation_refuses() -> None:
    with pytest.raises(ValueError, match="input_ids"):
        vramkit.estimate(llama(), None, {"inputs_embeds": (1, 3, 96)}, generate=3)
    with pytest.raises(ValueError, match="at least 1"):
        vramkit.estimate(llama(), None, {"input_ids": (1, 3)}, generate=-1)
    with pytest.raises(ValueError, match="past_key_values"):
        vramkit.estimate(nn.Embedding(3, 3), None, {"input_ids": (1, 3)}, generate=2)


class Attention(nn.Module):
    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q, mask)


def test_targets_decide_attention() -> None:
    length, heads = 2048, 8
    shape = ("bfloat16", (1, heads, length, 64))
    flash = vramkit.estimate(Attention(), None, (shape,), target="cuda:8.9")
    assert flash.target == "cuda:8.9"
    # The output, and a float32 for each row of each head.
    assert flash.activations_bytes == heads * length * (64 * 2 + 4)
    assert any("flash" in note for note in flash.notes)
    assert any("nothing was measured on CUDA" in note for note in flash.notes)
    wide = ("float64", (1, heads, length, 64))
    math = vramkit.estimate(Attention(), None, (wide,), target="cuda:8.9")
    assert math.activations_bytes >= heads * length * length * 8
    single = vramkit.estimate(Attention(), None, (("float32", shape[1]),), target="cuda:7.5")
    assert single.activations_bytes == heads * length * 64 * 4
    assert parse_target("cuda:9.0").blas_bytes > parse_target("cuda:8.0").blas_bytes
    assert not parse_target("cuda:7.5").flash
    for wrong in ("tpu", "cuda:0", "cuda:3.5", "cuda:8.9.1"):
        with pytest.raises(ValueError, match="target"):
            vramkit.estimate(Attention(), None, (shape,), target=wrong)


@torch.library.custom_op("vramkit_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return opaque(self.inner(x))  # type: ignore[no-any-return]


class Huge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] + x[None, :]


def test_breaks_say_where() -> None:
    with pytest.raises(ValueError, match=r"vramkit_tests.*opaque.*register_fake.*measure\.call"):
        vramkit.estimate(nn.Sequential(Opaque()), None, (3,))
    with pytest.raises(ValueError, match=r"2\*\*63"):
        vramkit.estimate(nn.ReLU(), None, (2**40, 2**40))
    with pytest.raises(ValueError, match=r"2\*\*63"):
        vramkit.estimate(Huge(), None, (2**32,), probe=False)

    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ValueError, match=r"in module '1'.*_local_scalar_dense"):
        vramkit.estimate(nn.Sequential(nn.Linear(4, 4), Deciding()), None, (2, 4))


@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "fp8", "int8_dynamic", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_declared_workspaces_of_our_operators(name: str, dtype: torch.dtype, rows: int) -> None:
    """What our operators say they hold, against what they do; and the same by probes."""
    model = nn.Sequential(nn.Linear(256, 384), nn.Linear(384, 128)).to(dtype).eval()
    vramkit.convert(model, name)
    x = torch.randn(rows, 256, dtype=dtype)
    real = measured(model, x)
    probed = vramkit.estimate(model, None, x)
    assert probed.probes[0] == 2
    assert probed.activations_bytes == pytest.approx(real, rel=PROBED_PEAK)
    declared = vramkit.estimate(model, None, x, probe=False)
    if name != "bf16":  # whose weights may go to torch's own product, with panels of its own
        assert declared.activations_bytes == pytest.approx(real, rel=PROBED_PEAK)


@pytest.mark.parametrize("name", [None, "nf4", "int8"])
def test_the_load_phase(name: str | None) -> None:
    """A weight and its codes are there together, one weight at a time."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64))
    found = vramkit.estimate(model, name)
    assert found.load_trace is not None
    assert found.load_trace.phases() == ["load"]
    assert found.load_trace.live()[-1] == found.weights_bytes
    if name is None:
        assert found.load_peak_bytes == found.weights_bytes
        return
    codes = vramkit.get_format(name).bytes((512, 256)).total
    assert found.load_peak_bytes == 256 * 512 * 4 + codes
    assert [tag.operator for tag in found.load_trace.tags[:2]] == ["read", "encode"]
    assert found.trace is None


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((1, 128, 48, 40), (128, 1, 5120, 128)),
        ((1, 48, 1, 28, 32), (43008, 896, 43008, 32, 1)),
        ((1, 1, 3072), (18432, 3072, 1)),
        ((1, 7, 5), (99, 1, 7)),
    ],
)
def test_strides_of_elementwise_results(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """The real operator's strides, in dimensions of size one too, where a fake one's differ."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 3

    x = torch.empty_strided(shape, stride).fill_(1.0)
    seen = []
    model = Scaled()
    model.register_forward_hook(lambda _m, _a, out: seen.append(out.stride()))
    vramkit.estimate(model, None, (x,), probe=False)
    assert seen[0] == (x / 3).stride()


class Speller(nn.Module):
    """Biases that C++ adds in place to real tensors, and not to fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(64, 96, batch_first=True), nn.Linear(96, 500)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.rnn(x)[0].transpose(0, 1))
        return made


def test_biases_of_strided_inputs_are_added_in_place() -> None:
    model, x = Speller().eval(), torch.randn(3, 20, 64)
    real = measured(model, x)
    found = vramkit.estimate(model, None, x)
    assert found.activations_bytes == pytest.approx(real, rel=PROBED_PEAK)
