"""Configs of bitsandbytes as requests: each field honoured, or refused by its name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vramkit
from torch import nn
from vramkit.errors import PrecisionConfigError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def config(**fields: Any) -> Any:
    """transformers' own class where it is installed; it has all fields, at their defaults."""
    return pytest.importorskip("transformers").BitsAndBytesConfig(**fields)


def formats(model: nn.Module) -> list[str]:
    layers = (m for m in model.modules() if isinstance(m, vramkit.QuantizedLayer))
    return [layer.storage_format.name for layer in layers]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"load_in_8bit": True}, "llm_int8"),
        ({"load_in_8bit": True, "llm_int8_threshold": 4.5}, "llm_int8@4.5"),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "int8_dynamic"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "fp4_dq"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4_dq",
        ),
    ],
)
def test_formats(fields: dict[str, Any], name: str) -> None:
    for given in (config(**fields), SimpleNamespace(**fields), fields):
        model = net()
        report = vramkit.convert(model, given)
        assert formats(model) == [name, name]
        assert {layer.format for layer in report.layers} == {name}


def test_named_modules_stay_plain_beside_those_of_skip() -> None:
    model = nn.Sequential(*net(), nn.Linear(64, 8))
    vramkit.convert(model, config(load_in_8bit=True, llm_int8_skip_modules=["3"]), skip=["0"])
    assert type(model[3]) is nn.Linear
    assert type(model[0]) is nn.Linear
    assert formats(model) == ["llm_int8"]


def test_compute_dtype_of_four_bits() -> None:
    """Products in the asked dtype, whatever comes in; what comes out has the input's."""
    model = net().bfloat16()
    plain = copy.deepcopy(model)
    vramkit.convert(model, config(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    vramkit.convert(plain, "nf4")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    y = model[0](x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain[0](x.float()).bfloat16(), rtol=0, atol=0)
    half = copy.deepcopy(plain)
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    again = vramkit.restore(half, "fp32")
    vramkit.convert(again, {**fields, "bnb_4bit_compute_dtype": "bfloat16"})
    assert again[0].computes_in is torch.bfloat16
    torch.testing.assert_close(
        again[0](x.float()), again[0](x).float(), rtol=0, atol=0
    )  # rounded on the way in
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x.float()).dtype == torch.bfloat16  # autocast wins
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].computes_in is torch.float32
        torch.testing.assert_close(other[0](x), y, rtol=0, atol=0)
    vramkit.restore(model)
    assert type(model[0]) is nn.Linear
    assert "computes_in" not in vars(model[0])


def test_parts_on_the_cpu_stay_float32() -> None:
    """What was placed on the CPU, of a model that lies elsewhere too (here on meta)."""
    model = net().half()
    model[0].to("meta")
    fields = {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}
    vramkit.convert(model, config(**fields))
    assert formats(model) == ["llm_int8"]
    assert model[2].weight.dtype == torch.float32
    alone = net()
    vramkit.convert(alone, config(**fields))  # all in one place: nothing is offloaded
    assert len(formats(alone)) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit"),
        ({"load_in_8bit": False, "load_in_4bit": False}, "nothing to convert"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, "llm_int8_threshold"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "llm_int8_threshold"),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "llm_int8_threshold"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "head"}, "llm_int8_skip_modules"),
        ({"load_in_8bit": 1}, "load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "quant_storage"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.int8}, "compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float17"}, "compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_new": 3}, "bnb_4bit_new"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], words: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    for given in (fields, SimpleNamespace(**fields)):
        with pytest.raises(PrecisionConfigError, match=words):
            vramkit.convert(model, given)
        assert type(model[0]) is nn.Linear
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_both_set_on_transformers_own_class() -> None:
    """Its constructor refuses both; its setters may not."""
    both = config(load_in_8bit=True)
    both._load_in_4bit = True
    with pytest.raises(PrecisionConfigError, match="choose one"):
        vramkit.convert(net(), both)


def test_fit_estimate_and_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    asked = config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["2"],
    )
    model = net()
    assert vramkit.fit(net(), 1, precision="int8")[0].weight.dtype == torch.float32  # it fits
    kept = 4 * (96 * 64 + 64 + 96)
    small = kept + 64 * 96 // 2 + 64 * 96 // 64 * 4
    # Biases and the layer that stays plain are in the sum.
    assert vramkit.estimate(model, asked, skip=["nothing"]).weights_bytes == small
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = vramkit.load(tmp_path / "w.safetensors", precision=asked, factory=net)
    vramkit.convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "out", asked, factory=net)
    again = vramkit.load(tmp_path / "out", factory=net)
    fitted = vramkit.fit(net(), f"{small} B", precision=asked)
    for made in (loaded, again, fitted):
        assert formats(made) == ["nf4"]
        assert made[0].computes_in is torch.bfloat16
        assert sum(p.nbytes for p in made.parameters()) == small
    x = torch.randn(2, 64)
    torch.testing.assert_close(loaded(x), again(x), rtol=0, atol=0)
    with pytest.raises(vramkit.BudgetError):
        vramkit.fit(net(), f"{small - 1} B", precision=asked)
