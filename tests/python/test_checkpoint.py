"""save, load and convert_checkpoint: bit for bit, from every layout, file to file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import vramkit
from torch import Tensor, nn
from vramkit import QuantizedLayer, _core
from vramkit.estimator import weight_bytes
from vramkit.shards import Checkpoint

BUILTIN = [name for name, _ in _core.builtin_formats()]


class Net(nn.Module):
    """Tied weights, a buffer that is saved and one that is not, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 63)
        self.up = nn.Linear(63, 129)
        self.down = nn.Linear(129, 63, bias=False)
        self.norm = nn.LayerNorm(63)
        self.head = nn.Linear(63, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(5))
        self.register_buffer("computed", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        out: Tensor = self.head(self.norm(y + self.down(torch.relu(self.up(y)))))
        return out * self.computed[0]


X = torch.arange(12).reshape(2, 6)


def plain_file(model: nn.Module, path: Path) -> Path:
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if n != "head.weight"}
    safetensors.torch.save_file(tensors, path)
    return path


def sharded(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if n != "head.weight"}
    names = list(tensors)
    weight_map = {}
    for i in range(3):
        part = {n: tensors[n] for n in names[i::3]}
        file = f"model-{i + 1:05}-of-00003.safetensors"
        safetensors.torch.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name
    with torch.no_grad():
        assert torch.equal(one(X), other(X))


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Net().to(dtype).eval()
    vramkit.convert(model, name)
    assert vramkit.save(model, tmp_path / "a") == tmp_path / "a"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "model.safetensors",
        "vramkit.json",
    ]
    loaded = vramkit.load(tmp_path / "a", factory=Net)
    assert_equal_models(model, loaded)
    assert not loaded.training
    assert loaded.head.codes is loaded.embed.codes
    assert loaded.embed.compute_dtype == loaded.up.compute_dtype == dtype
    assert loaded.up.storage_format is vramkit.get_format(name)
    assert torch.equal(loaded.computed, torch.ones(3))
    # Other readers see plain tensors under the model's names.
    seen = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(seen["up.codes"], model.up.codes)
    assert "head.codes" not in seen
    size = sum(t.nbytes for t in seen.values())
    assert size == weight_bytes(model) - model.computed.nbytes


def test_mixed_plain_and_edited(tmp_path: Path) -> None:
    model = Net().eval()
    vramkit.convert(model, {"up": "nf4_dq", "embed": "int8"})
    with torch.no_grad():
        model.norm.bias += 1
        model.kept += 3
    vramkit.save(model, tmp_path / "a")
    loaded = vramkit.load(tmp_path / "a", factory=Net)
    assert_equal_models(model, loaded)
    assert type(loaded.down) is nn.Linear
    plain = Net().eval()
    vramkit.save(plain, tmp_path / "b")
    assert_equal_models(plain, vramkit.load(tmp_path / "b", factory=Net))


def test_saving_again_replaces(tmp_path: Path) -> None:
    first, second = Net().eval(), Net().eval()
    vramkit.convert(first, "nf4")
    vramkit.convert(second, "int8")
    vramkit.save(first, tmp_path / "a")
    vramkit.save(second, tmp_path / "a")
    assert_equal_models(vramkit.load(tmp_path / "a", factory=Net), second)
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("layout", ["file", "folder", "shards"])
@pytest.mark.parametrize("name", [None, "nf4", "int8", "int4"])
def test_load_converts_like_convert(name: str | None, layout: str, tmp_path: Path) -> None:
    model = Net().eval()
    if layout == "shards":
        source = sharded(model, tmp_path / "in")
    else:
        (tmp_path / "in").mkdir()
        source = plain_file(model, tmp_path / "in" / "model.safetensors")
        source = source if layout == "file" else source.parent
    if name is not None:
        vramkit.convert(model, name)
    loaded = vramkit.load(source, precision=name, factory=Net)
    assert_equal_models(model, loaded)
    assert loaded.head._parameters.keys() == model.head._parameters.keys()


@pytest.mark.parametrize("name", BUILTIN)
def test_convert_checkpoint_equals_convert_and_save(name: str, tmp_path: Path) -> None:
    model = Net().eval()
    source = sharded(model, tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    vramkit.convert(model, name)
    vramkit.save(model, tmp_path / "expected")
    done = vramkit.convert_checkpoint(source, tmp_path / "out", name, factory=Net)
    ours, theirs = tmp_path / "out", tmp_path / "expected"
    assert (ours / "tokenizer.json").read_text() == "{}"
    one = safetensors.torch.load_file(ours / "model.safetensors")
    other = safetensors.torch.load_file(theirs / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert json.loads((ours / "vramkit.json").read_text()) == json.loads(
        (theirs / "vramkit.json").read_text()
    )
    assert done["converted_bytes"] == sum(t.nbytes for t in one.values())
    assert done["original_bytes"] == Checkpoint(source).nbytes
    assert_equal_models(vramkit.load(ours, factory=Net), model)
    assert sorted(p.name for p in ours.iterdir()) == [
        "model.safetensors", "tokenizer.json", "vramkit.json"]  # fmt: skip


def test_formats_by_layer_and_skip(tmp_path: Path) -> None:
    model = Net().eval()
    source = plain_file(model, tmp_path / "in.safetensors")
    by_layer = {"up": "nf4", "down": "int8"}
    vramkit.convert_checkpoint(source, tmp_path / "a", by_layer, factory=Net)
    vramkit.convert_checkpoint(source, tmp_path / "b", "nf4", skip=["embed"], factory=Net)
    first = vramkit.load(tmp_path / "a", factory=Net)
    second = vramkit.load(tmp_path / "b", factory=Net)
    assert (first.up.storage_format.name, first.down.storage_format.name) == ("nf4", "int8")
    assert not isinstance(first.embed, QuantizedLayer)
    assert not isinstance(second.head, QuantizedLayer)
    assert second.head.weight is second.embed.weight
    with pytest.raises(ValueError, match="'middle'"):
        vramkit.convert_checkpoint(source, tmp_path / "c", {"middle": "nf4"}, factory=Net)
    with pytest.raises(ValueError, match="'middle'"):
        vramkit.load(source, precision={"middle": "nf4"}, factory=Net)


def test_load_under_a_limit(tmp_path: Path) -> None:
    model = Net().eval()
    source = plain_file(model, tmp_path / "in.safetensors")
    limit = f"{int(weight_bytes(model) * 0.35)} B"
    made = vramkit.plan(model, limit)
    loaded = vramkit.load(source, vram_limit=limit, factory=Net)
    made.apply(model)
    assert weight_bytes(loaded) <= int(weight_bytes(Net()) * 0.35)
    assert_equal_models(model, loaded)


def test_progress_reaches_the_checkpoints_bytes(tmp_path: Path) -> None:
    model = Net()
    source = plain_file(model, tmp_path / "in.safetensors")
    total = Checkpoint(source).nbytes
    steps: dict[str, list[tuple[int, int, str]]] = {"load": [], "convert": [], "save": []}

    def recorder(key: str) -> Callable[[int, int, str], None]:
        return lambda *step: steps[key].append(step)

    vramkit.load(source, precision="nf4", factory=Net, progress=recorder("load"))
    vramkit.convert_checkpoint(source, tmp_path / "a", "nf4", factory=Net,
                               progress=recorder("convert"))  # fmt: skip
    vramkit.save(model, tmp_path / "b", progress=recorder("save"))
    for key, seen in steps.items():
        assert seen[-1][:2] == (total, total), key


def test_float64_and_half_checkpoints(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        model = Net().to(dtype).eval()
        source = plain_file(model, tmp_path / f"{dtype}.safetensors")
        loaded = vramkit.load(source, factory=Net)
        assert loaded.up.weight.dtype == dtype
        assert_equal_models(model, loaded)


class TestTransformers:
    def config(self) -> object:
        transformers = pytest.importorskip("transformers")
        return transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=120, tie_word_embeddings=True,
        )  # fmt: skip

    def test_folder_needs_no_factory(self, tmp_path: Path) -> None:
        import transformers

        model = transformers.LlamaForCausalLM(self.config()).eval()
        model.save_pretrained(tmp_path / "in")
        vramkit.convert(model, "nf4")
        with torch.no_grad():
            expected = model(X).logits
        vramkit.convert_checkpoint(tmp_path / "in", tmp_path / "out", "nf4")
        vramkit.save(model, tmp_path / "saved")
        loads = [
            vramkit.load(tmp_path / "in", precision="nf4"),
            vramkit.load(tmp_path / "out"),
            vramkit.load(tmp_path / "saved"),
        ]
        for loaded in loads:
            assert type(loaded).__name__ == "LlamaForCausalLM"
            assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
            with torch.no_grad():
                assert torch.equal(loaded(X).logits, expected)

    def test_base_model_from_a_task_models_checkpoint(self, tmp_path: Path) -> None:
        """Names differ by the base model's prefix, as transformers' own loader allows."""
        import transformers

        model = transformers.LlamaForCausalLM(self.config()).eval()
        model.save_pretrained(tmp_path / "in")
        loaded = vramkit.load(
            tmp_path / "in", factory=lambda: transformers.LlamaModel(self.config())
        )
        with torch.no_grad():
            expected = model.model(X).last_hidden_state
            assert torch.equal(loaded(X).last_hidden_state, expected)

    def test_real_weights(self, minilm_path: Path, tmp_path: Path) -> None:
        import transformers

        plain = transformers.AutoModel.from_pretrained(minilm_path, dtype=torch.float32).eval()
        ids = torch.randint(1000, (2, 9))
        with torch.no_grad():
            expected = plain(ids).last_hidden_state
            as_stored = vramkit.load(minilm_path)
            assert torch.equal(as_stored(ids).last_hidden_state, expected)
            vramkit.convert(plain, "int8")
            expected = plain(ids).last_hidden_state
            vramkit.convert_checkpoint(minilm_path, tmp_path / "out", "int8")
            loaded = vramkit.load(tmp_path / "out")
            assert torch.equal(loaded(ids).last_hidden_state, expected)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")  # the folder stands alone


def test_skeletons_parameters_take_no_memory(tmp_path: Path) -> None:
    """The factory's parameters go to the meta device as they are registered, in every thread."""
    seen = []

    def factory() -> nn.Module:
        layer = nn.Linear(8, 8)
        seen.append(layer.weight.device.type)
        return layer

    layer = nn.Linear(8, 8)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "a.safetensors")
    loaded = vramkit.load(tmp_path / "a.safetensors", factory=factory)
    assert seen == ["meta"]
    assert torch.equal(loaded.weight, layer.weight)
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # the way back is clean


def test_parameters_without_gradient_stay_so(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        layer = nn.Linear(8, 8)
        layer.bias.requires_grad_(False)
        return layer

    safetensors.torch.save_file(nn.Linear(8, 8).state_dict(), tmp_path / "a.safetensors")
    loaded = vramkit.load(tmp_path / "a.safetensors", factory=factory)
    assert loaded.weight.requires_grad
    assert not loaded.bias.requires_grad


def test_a_factory_that_needs_values_is_told_so(tmp_path: Path) -> None:
    def orthogonal() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64))
        torch.nn.utils.parametrizations.orthogonal(model[0])
        return model

    model = orthogonal()
    vramkit.convert(model, "int8")  # folds the parametrization
    vramkit.save(model, tmp_path / "a")
    with pytest.raises(vramkit.CheckpointError, match="plain layers"):
        vramkit.load(tmp_path / "a", factory=orthogonal)
    loaded = vramkit.load(tmp_path / "a", factory=lambda: nn.Sequential(nn.Linear(64, 64)))
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
