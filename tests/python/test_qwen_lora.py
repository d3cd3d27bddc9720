"""LoRA beside weights and fused into them: arithmetic, exact unfusing, keys, errors, offloading."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import vramkit
from numerics import UNIT, stack_bound
from qwen_models import lora_keys
from safetensors.torch import save_file
from torch import nn
from vramkit.qwen_image import LoraStack, read_lora
from vramkit.qwen_image.pictures import relative_l2

LAYERS = ["blocks.0", "blocks.2"]
CLOSE = stack_bound(64 + 4, 4)  # four layers of 64 columns, with rank 4 beside them


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for _ in range(4))
        self.norm = nn.LayerNorm(64, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(self.norm(x)))
        return x


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def by_hand(model: nn.Module, keys: dict[str, torch.Tensor], factor: float) -> nn.Module:
    """W + factor * B A in float64."""
    made = copy.deepcopy(model).double()
    with torch.no_grad():
        for name in LAYERS:
            layer = made.get_submodule(name)
            b, a = keys[f"{name}.lora_B.weight"], keys[f"{name}.lora_A.weight"]
            layer.weight += factor * b.double() @ a.double()
    return made


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer.", "base_model.model."])
@pytest.mark.parametrize("style", ["AB", "default", "down"])
def test_every_way_of_naming_reads_the_same(style: str, prefix: str) -> None:
    model = Small()
    plain = read_lora(lora_keys(model, LAYERS))
    found = read_lora(lora_keys(model, LAYERS, style, prefix))
    assert list(found) == LAYERS
    for name in LAYERS:
        assert torch.equal(found[name].A, plain[name].A)
        assert torch.equal(found[name].B, plain[name].B)
        assert found[name].scale == (0.5 if style == "down" else 1.0)  # alpha 2 of rank 4


def test_alpha_of_the_file_s_metadata_and_of_peft_s_folder(tmp_path) -> None:
    keys = lora_keys(Small(), LAYERS)
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    save_file(keys, tmp_path / "a.safetensors", metadata=told)
    assert read_lora(tmp_path / "a.safetensors")["blocks.0"].scale == 2.0
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(keys, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 6, "r": 4, "alpha_pattern": {"blocks.2": 4}})
    )
    found = read_lora(folder)
    assert (found["blocks.0"].scale, found["blocks.2"].scale) == (1.5, 1.0)
    assert read_lora(keys, alpha=12)["blocks.0"].scale == 3.0
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_dora": True}))
    with pytest.raises(ValueError, match="DoRA"):
        read_lora(folder)


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_beside_and_fused_are_the_sum_computed_by_hand(x: torch.Tensor, scale: float) -> None:
    model = Small()
    keys = lora_keys(model, LAYERS)
    expected = by_hand(model, keys, scale)(x.double())
    before = state(model)
    loras = LoraStack.of(model)
    loras.load(keys, "style", scale)
    assert relative_l2(expected, model(x)) < CLOSE
    assert loras.fuse() == LAYERS
    assert relative_l2(expected, model(x)) < CLOSE
    fused = model.blocks[0].weight
    a, b = keys["blocks.0.lora_A.weight"], keys["blocks.0.lora_B.weight"]
    assert torch.allclose(
        fused, before["blocks.0.weight"] + scale * (b @ a), atol=8 * UNIT[torch.float32]
    )
    loras.unfuse()
    assert relative_l2(expected, model(x)) < CLOSE
    loras.clear()
    assert same(state(model), before)
    assert not model.blocks[0]._forward_hooks


def test_several_are_stacked_swapped_scaled_and_let_go(x: torch.Tensor) -> None:
    model = Small()
    plain = model(x)
    one, two = lora_keys(model, LAYERS), lora_keys(model, ["blocks.2", "blocks.3"], "down")
    loras = LoraStack.of(model)
    loras.load(one, "one")
    first = model(x)
    loras.load(two, "two")
    both = model(x)
    loras.use("one")
    assert torch.equal(model(x), first)
    loras.use("two")
    second = model(x)
    loras.use()
    assert torch.equal(model(x), plain)
    loras.use("one", "two")
    assert torch.equal(model(x), both)
    assert not torch.equal(first, second)
    assert not torch.equal(both, first)
    loras.scale("two", 0.0)
    assert torch.equal(model(x), first)
    loras.unload("two")
    assert torch.equal(model(x), first)
    assert list(loras.adapters) == ["one"]
    loras.clear()
    assert torch.equal(model(x), plain)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_on_a_converted_base_beside_it_and_fused(x: torch.Tensor, precision: str) -> None:
    model = Small()
    vramkit.convert(model, precision)
    before, dense = state(model), vramkit.restore(copy.deepcopy(model))
    keys = lora_keys(dense, LAYERS)
    loras = LoraStack.of(model)
    loras.load(keys, "style")
    assert relative_l2(by_hand(dense, keys, 1.0)(x.double()), model(x)) < CLOSE
    with pytest.warns(UserWarning, match="rounded again"):
        loras.fuse()
    again = copy.deepcopy(dense)
    for name in LAYERS:
        b, a = keys[f"{name}.lora_B.weight"], keys[f"{name}.lora_A.weight"]
        with torch.no_grad():
            again.get_submodule(name).weight.addmm_(b, a)
    vramkit.convert(again, dict.fromkeys(LAYERS, precision))
    assert torch.equal(model.blocks[0].codes, again.blocks[0].codes)
    assert torch.equal(model.blocks[0].scales, again.blocks[0].scales)
    loras.clear()
    assert same(state(model), before)


@pytest.mark.parametrize("on_disk", [False, True])
def test_fused_then_stored_is_rounded_once_and_unfuses_to_the_converted_base(
    x: torch.Tensor, tmp_path, on_disk: bool
) -> None:
    model = Small(torch.bfloat16)
    keys = lora_keys(model, LAYERS)
    base = copy.deepcopy(model)
    vramkit.convert(base, "fp8", skip=["blocks.2"])
    loras = LoraStack.of(model)
    loras.load(keys, "style", 0.7)
    once = {}
    for name in LAYERS:
        b, a = keys[f"{name}.lora_B.weight"], keys[f"{name}.lora_A.weight"]
        once[name] = model.get_submodule(name).weight.float() + 0.7 * (b @ a)
    loras.fuse_into("fp8", skip=["blocks.2"], backup_folder=tmp_path if on_disk else None)
    vramkit.convert(model, {"blocks.1": "fp8", "blocks.3": "fp8"})
    alone = nn.Linear(64, 64)
    alone.weight.data = once["blocks.0"].detach()
    vramkit.convert(alone, "fp8")
    # float32 sums in another order may round to the neighbouring code
    apart = (model.blocks[0].codes.int() - alone.codes.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01
    assert type(model.blocks[2]) is nn.Linear
    assert torch.allclose(
        model.blocks[2].weight, once["blocks.2"].bfloat16(), rtol=4 * UNIT[torch.bfloat16], atol=0
    )
    assert model.blocks[0].compute_dtype is torch.bfloat16
    assert model(x.bfloat16()).isfinite().all()
    if on_disk:
        assert list(tmp_path.iterdir()) == []  # a file without a name
    loras.unfuse()
    loras.clear()
    assert same(state(model), state(base))


def test_what_does_not_fit_is_an_error_and_the_model_is_as_it_was(x: torch.Tensor) -> None:
    model = Small()
    before, plain = state(model), model(x)
    loras = LoraStack.of(model)
    good = lora_keys(model, LAYERS)
    name = "blocks.0.lora_A.weight"
    cases = {
        "features": good | {name: torch.zeros(4, 63)},
        "has shape": good | {name: torch.zeros(3, 64)},
        "NaN": good | {name: torch.full((4, 64), float("nan"))},
        "no layer of": {f"other.{k}": v for k, v in good.items()},
        "of the LoRA's": good | {k.replace("blocks", "more"): v for k, v in good.items()},
        "no lora_B": {k: v for k, v in good.items() if "0.lora_B" not in k},
        "no part of": good | {"blocks.0.dora_scale": torch.ones(64)},
        "only Linear": {
            "norm.lora_A.weight": torch.zeros(1, 64),
            "norm.lora_B.weight": torch.zeros(64, 1),
        },
        "no LoRA in it": {},
    }
    for words, keys in cases.items():
        with pytest.raises(ValueError, match=words):
            loras.load(keys)
        assert not loras.adapters
    with pytest.raises(ValueError, match="number"):
        loras.load(good, scale=float("nan"))
    with pytest.raises(FileNotFoundError):
        loras.load("/nowhere/lora.safetensors")
    assert same(state(model), before)
    assert torch.equal(model(x), plain)
    extra = good | {k.replace("blocks", "more"): v for k, v in good.items()}
    with pytest.warns(UserWarning, match="left out"):
        loras.load(extra, "part", skip_unmatched=True)
    with pytest.raises(ValueError, match="loaded already"):
        loras.load(good, "part")
    with pytest.raises(ValueError, match="no LoRA named 'other'"):
        loras.scale("other", 1.0)
    loras.fuse()
    for refused in (loras.fuse, lambda: loras.scale("part", 2.0), lambda: loras.load(good, "n")):
        with pytest.raises(ValueError, match="fused"):
            refused()
    vramkit.convert(model, "int8")
    with pytest.raises(ValueError, match="converted or restored"):
        loras.unfuse()


def test_an_interrupt_while_fusing_leaves_the_weights(monkeypatch, x: torch.Tensor) -> None:
    model = Small()
    loras = LoraStack.of(model)
    loras.load(lora_keys(model, LAYERS), "style")
    before, plain = state(model), model(x)
    from vramkit.qwen_image import lora

    put, calls = lora._put, []

    def interrupted(layer, weight):
        calls.append(layer)
        put(layer, weight)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lora, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loras.fuse()
    assert same(state(model), before)
    assert torch.equal(model(x), plain)
    assert not loras.fused


def test_copies_have_branches_of_their_own(x: torch.Tensor) -> None:
    model = Small()
    loras = LoraStack.of(model)
    loras.load(lora_keys(model, LAYERS), "style")
    with_style = model(x)
    other = copy.deepcopy(model)
    LoraStack.of(other).scale("style", 0.0)
    assert torch.equal(model(x), with_style)
    assert not torch.equal(other(x), with_style)
    LoraStack.of(other).clear()
    assert torch.equal(model(x), with_style)


def test_while_offloaded_the_same_bits(x: torch.Tensor) -> None:
    model = Small()
    keys = lora_keys(model, LAYERS)
    vramkit.convert(model, "fp8")
    resident = copy.deepcopy(model)
    vramkit.enable_vram_management(model, "24 KB", 0, inputs=(x,))
    with torch.no_grad():
        for step in ("load", "scale", "fuse", "unfuse", "clear"):
            for one in (model, resident):
                loras = LoraStack.of(one)
                if step == "load":
                    loras.load(keys, "style")
                elif step == "scale":
                    loras.scale("style", 0.4)
                elif step == "fuse":
                    with pytest.warns(UserWarning, match="rounded again"):
                        loras.fuse()
                else:
                    getattr(loras, step)()
            assert torch.equal(model(x), resident(x)), step
    session = model.vramkit_session
    assert session.engine.stats().bytes_copied > 0
    session.disable()
