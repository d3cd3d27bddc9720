"""Qwen-Image's modes and `enable_vram_management`: diffusers' pipelines, DiffSynth's interface.

The models are small and have random weights: they show plumbing and bytes, not quality.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vramkit
from numerics import UNIT
from qwen_models import SmallDiffSynth, image_of, lora_keys, pipeline, transformer
from torch import nn
from vramkit.errors import BudgetError
from vramkit.layers import QuantizedLayer
from vramkit.qwen_image import (
    KEEP,
    Mode,
    QwenImage,
    choose_tiling,
    fp8_compute,
    parts,
    recommend,
    sizes,
)
from vramkit.qwen_image import enable_vram_management as manage
from vramkit.qwen_image.pictures import relative_l2

pytest.importorskip("diffusers")
ATTENTION = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"]


def aligned(layers: int = 3) -> nn.Module:
    return transformer(layers, heads=2, head_dim=64, text=64)


def formats(model: nn.Module) -> dict[str, str]:
    return {n: m.format_names for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_sizes_are_those_of_the_published_model() -> None:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=60,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=3584,
            axes_dims_rope=(16, 56, 56),
        ).to(torch.bfloat16)
        vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    assert sizes.published_bytes().transformer == parts.bytes_of(model)
    assert sizes.published_bytes().vae == parts.bytes_of(vae)
    assert sizes.published_bytes().block == parts.bytes_of(model.transformer_blocks[0])
    vramkit.convert(model, "fp8", skip=KEEP)
    found = sizes.published_bytes("fp8")
    assert found.transformer == parts.bytes_of(model)
    assert found.block == parts.bytes_of(model.transformer_blocks[0])
    rest = [f"transformer_blocks.{n}.{side}_mod.1" for n in range(60) for side in ("img", "txt")]
    vramkit.convert(model, dict.fromkeys(rest, "int8"))
    assert sizes.published_bytes("fp8", modulation="int8").transformer == parts.bytes_of(model)


def test_recommended_modes_fit_and_what_is_better_does_not() -> None:
    names = {gb: recommend(gb) for gb in (8, 12, 16, 24, 32, 48, 80)}
    assert {gb: str(found.mode) for gb, found in names.items()} == {
        8: "low_vram_fused",
        12: "low_vram_fused",
        16: "low_vram_fused",
        24: "fp8_fused",
        32: "fp8_fused",
        48: "original",
        80: "original",
    }
    assert (names[24].modulation, names[32].modulation) == ("int8", None)
    for found in names.values():
        assert found.device_bytes <= found.usable_bytes
        assert all(needed > found.usable_bytes for _, needed in found.refused)
    assert recommend(12, separate_lora=True).mode is Mode.LOW_VRAM
    with pytest.raises(BudgetError) as error:
        recommend(4)
    assert recommend(error.value.needed_bytes / 2**30 + 1e-9).mode is Mode.LOW_VRAM_FUSED
    with pytest.raises(ValueError, match="fp8, fp8_fused, low_vram, low_vram_fused"):
        Mode.parse("int3")
    assert Mode.parse(" Low-VRAM fused") is Mode.LOW_VRAM_FUSED


def test_fp8_stores_what_is_not_kept_with_a_scale_for_each_row() -> None:
    pipe = pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    reference = image_of(pipe)
    wrapped = QwenImage(pipe, "FP8")
    found = formats(pipe.transformer)
    assert set(found.values()) == {"fp8"}
    assert all(".attn." in name or "_mlp." in name for name in found)
    assert len(found) == 2 * 12
    after = pipe.transformer.state_dict()
    kept = [name for name in before if name in after]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {"img_in.weight", "transformer_blocks.0.img_mod.1.weight"} <= set(kept)
    layer: Any = pipe.transformer.transformer_blocks[0].attn.to_q
    weight = before["transformer_blocks.0.attn.to_q.weight"]
    by_row = weight.abs().amax(1, keepdim=True)
    apart = (layer.dense_weight(torch.float32) - weight).abs()
    assert bool((apart <= by_row * 2.0**-4).all())  # E4M3: half of an eighth at most
    assert 0 < relative_l2(reference, image_of(wrapped)) < 0.1
    assert wrapped.mode is Mode.FP8
    assert wrapped.vae is pipe.vae
    with pytest.raises(ValueError, match="converted already"):
        wrapped.set_mode("fp8")


def test_modulation_text_encoder_and_vae_by_themselves() -> None:
    pipe = pipeline(text_encoder=nn.Sequential(nn.Linear(32, 32)))
    QwenImage(pipe, "fp8", modulation="int8", text_encoder="nf4", vae="bf16")
    found = formats(pipe.transformer)
    assert {f for n, f in found.items() if "_mod." in n} == {"int8"}
    assert {f for n, f in found.items() if "_mod." not in n} == {"fp8"}
    assert formats(pipe.text_encoder) == {"0": "nf4"}
    assert set(formats(pipe.vae).values()) == {"bf16"}
    with pytest.raises(ValueError, match="no text_encoder"):
        QwenImage(pipeline(), "fp8", text_encoder="fp8")


def test_low_vram_runs_a_model_of_four_times_its_limit_with_the_same_bits() -> None:
    arguments = {"text": 64}
    resident = QwenImage(pipeline(aligned(6)), "fp8")
    reference = image_of(resident, **arguments)
    stays = parts.bytes_of(resident.vae)
    streamed = parts.bytes_of(resident.transformer)
    limit = stays + streamed // 4
    made = pipeline(aligned(6))
    pipe = QwenImage(made, "low_vram", vram_limit=f"{limit} B", vram_buffer=0)
    assert torch.equal(image_of(pipe, **arguments), reference)
    session = made.vramkit_session
    assert session.device_bytes <= limit
    copied = session.sessions["transformer"].engine.stats().bytes_copied
    assert copied > streamed  # two steps read it more than once
    pipe.disable_vram_management()
    assert made.vramkit_session is None
    assert torch.equal(image_of(pipe, **arguments), reference)


def test_fused_modes_are_the_unfused_ones_up_to_rounding_and_unfuse_exactly(tmp_path) -> None:
    keys = lora_keys(transformer(), ATTENTION, "down", "diffusion_model.")
    beside = QwenImage(pipeline(), "fp8", lora=[(keys, 0.8)])
    fused = QwenImage(pipeline(), "fp8_fused", lora=[(keys, 0.8)], backup_folder=tmp_path)
    without = QwenImage(pipeline(), "fp8")
    images = [image_of(pipe) for pipe in (beside, fused, without)]
    assert 0 < relative_l2(images[0], images[1]) < relative_l2(images[2], images[1])
    assert fused.loras.fused
    assert not beside.loras.fused
    fused.unfuse_lora()
    fused.clear_lora()
    beside.clear_lora()
    assert same(fused.transformer.state_dict(), without.transformer.state_dict())
    assert same(beside.transformer.state_dict(), without.transformer.state_dict())
    assert torch.equal(image_of(fused), images[2])
    assert torch.equal(image_of(beside), images[2])


def test_lora_changes_while_low_vram_streams() -> None:
    model = aligned()
    keys = lora_keys(model, ["transformer_blocks.2.attn.to_k", "transformer_blocks.0.img_mod.1"])
    resident = QwenImage(pipeline(aligned()), "fp8")
    pipe = pipeline(model)
    limit = parts.bytes_of(pipe.vae) + parts.bytes_of(model) // 4
    low = QwenImage(pipe, "low_vram", vram_limit=f"{limit} B", vram_buffer=0)
    plain = image_of(low, 64)
    for one in (low, resident):
        one.load_lora(keys, 0.5, name="style")
    assert torch.equal(image_of(low, 64), image_of(resident, 64))
    assert not torch.equal(image_of(low, 64), plain)
    low.clear_lora()
    assert torch.equal(image_of(low, 64), plain)
    low.disable_vram_management()


def test_a_mode_that_cannot_fit_says_its_bytes_and_changes_nothing() -> None:
    pipe = pipeline()
    before = plain_state(pipe.transformer)
    keys = lora_keys(pipe.transformer, ATTENTION)
    for mode in ("fp8", "fp8_fused", "low_vram", "low_vram_fused"):
        with pytest.raises(BudgetError) as error:
            QwenImage(pipe, mode, lora=keys, vram_limit="16 MB", vram_buffer="15.9 MB")
        assert error.value.needed_bytes > 16_000_000
        assert "nothing was changed" in str(error.value)
    assert same(plain_state(pipe.transformer), before)
    needed = error.value.needed_bytes
    low = QwenImage(
        pipe, "low_vram_fused", lora=keys, vram_limit=f"{needed} B", vram_buffer="15 MB"
    )
    low.disable_vram_management()
    other = pipeline()
    with pytest.raises(ValueError, match="give lora="):
        QwenImage(other, "fp8_fused")
    with pytest.raises(ValueError, match="give vram_limit"):
        QwenImage(other, "low_vram")
    with pytest.raises(ValueError, match="no layer of"):
        QwenImage(other, "fp8", lora={"x.lora_A.weight": torch.ones(1, 2)} | _half())
    assert same(plain_state(other.transformer), before)
    with pytest.raises(TypeError, match="neither a transformer"):
        QwenImage(object())


def _half() -> dict[str, torch.Tensor]:
    return {"x.lora_B.weight": torch.ones(2, 1)}


def test_the_arguments_of_enable_vram_management() -> None:
    pipe = pipeline(aligned())
    before = plain_state(pipe.transformer)
    reference = image_of(pipe, 64)
    total = sum(parts.bytes_of(m) for m in (pipe.transformer, pipe.vae))
    with pytest.raises(BudgetError, match="leaves nothing"):
        manage(pipe, 1.5, 1.5)
    with pytest.raises(BudgetError, match="hold no block") as error:
        manage(pipe, f"{parts.bytes_of(pipe.vae) + 1000} B", 0)
    with pytest.raises(BudgetError, match="without auto_offload") as whole:
        manage(pipe, f"{total - 1} B", 0, False)
    assert whole.value.needed_bytes == total
    for wrong, kind in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(kind, match="num_persistent"):
            manage(pipe, 1, 0, num_persistent_param_in_dit=wrong)
    assert getattr(pipe, "vramkit_session", None) is None
    assert same(plain_state(pipe.transformer), before)

    manage(pipe, f"{total} B", 0, False)
    assert pipe.vramkit_management.offloads is False
    manage(pipe, 10.0, 1.5)  # the guide's call: GiB
    found = pipe.vramkit_management
    assert (found.limit_bytes, found.buffer_bytes) == (10 << 30, 3 << 29)
    assert found.offloads
    assert found.stay == ("vae",)
    assert torch.equal(image_of(pipe, 64), reference)
    with pytest.raises(ValueError, match="managed already"):
        manage(pipe, 10.0)
    QwenImage(pipe).disable_vram_management()
    manage(pipe)  # None: all there is
    assert torch.equal(image_of(pipe, 64), reference)
    QwenImage(pipe).disable_vram_management()
    least = f"{error.value.needed_bytes} B"
    manage(pipe, least, 0)
    assert torch.equal(image_of(pipe, 64), reference)
    assert pipe.vramkit_session.device_bytes <= error.value.needed_bytes
    QwenImage(pipe).disable_vram_management()


def test_persistent_parameters_are_read_once_and_the_others_in_each_step() -> None:
    copied, resident = {}, {}
    counts = [sum(p.numel() for p in b.parameters()) for b in aligned().transformer_blocks]
    for number in (0, counts[0] + 1, sum(counts)):
        pipe = pipeline(aligned())
        manage(pipe, "1 GB", 0, num_persistent_param_in_dit=number)
        image_of(pipe, 64)
        engine = pipe.vramkit_session.sessions["transformer"].engine
        start = engine.stats().bytes_copied
        image_of(pipe, 64)
        copied[number] = engine.stats().bytes_copied - start
        resident[number] = engine.stats().residents
        QwenImage(pipe).disable_vram_management()
    none, one, every = copied
    assert copied[none] > copied[one] > copied[every]
    assert resident[none] < resident[one] < resident[every]


def test_fp8_products_are_those_of_the_rounded_operands(monkeypatch) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 32)
    vramkit.convert(layer, "fp8")
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    found = fp8_compute.fp8_linear(x, layer.codes, layer.scales, layer.bias, 32)
    rows = x.reshape(-1, 64).float()
    scale = rows.abs().amax(1, keepdim=True) / 448
    rounded = (rows / scale).to(torch.float8_e4m3fn).float() * scale
    weight = layer.dense_weight(torch.float32)
    exact = (rounded.double() @ weight.double().t() + layer.bias.double()).reshape(2, 5, 32)
    # rounded to bfloat16 as a product, and again with the bias
    size = rounded.double().abs() @ weight.double().abs().t() + layer.bias.double().abs()
    bound = 4 * UNIT[torch.bfloat16] * size.reshape(2, 5, 32)
    assert found.dtype is torch.bfloat16
    assert bool(((found - exact).abs() <= bound).all())

    pipe = pipeline(aligned(2))
    QwenImage(pipe, "fp8")
    plain = image_of(pipe, 64)
    with pytest.warns(UserWarning, match="cpu has no FP8 matrix units"):
        manage(pipe, 1, 0, enable_dit_fp8_computation=True)
    assert not pipe.vramkit_management.fp8.effective
    assert torch.equal(image_of(pipe, 64), plain)
    QwenImage(pipe).disable_vram_management()
    monkeypatch.setattr(fp8_compute, "can_compute", lambda device: "")
    manage(pipe, 1, 0, enable_dit_fp8_computation=True)
    assert pipe.vramkit_management.fp8.layers == 24
    assert 0 < relative_l2(plain, image_of(pipe, 64)) < 0.2
    QwenImage(pipe).disable_vram_management()
    assert torch.equal(image_of(pipe, 64), plain)


def test_editing_and_the_wrapper_s_own_arguments(monkeypatch) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
    from PIL import Image

    # The pipeline brings pictures to a megapixel before it encodes them: minutes on a processor.
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (32, 32, None)
    )
    pipe = pipeline(edit=True)
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    reference = image_of(pipe, image=picture)
    wrapped = QwenImage(pipe, "fp8")
    assert 0 < relative_l2(reference, image_of(wrapped, image=picture)) < 0.1
    assert not torch.equal(
        image_of(wrapped, image=picture), image_of(wrapped, image=picture.rotate(90))
    )
    with pytest.raises(ValueError, match="vae_tiling"):
        wrapped(vae_tiling="maybe")


def test_tiles_are_chosen_by_the_estimate(monkeypatch) -> None:
    from vramkit.qwen_image import tiling

    pipe = pipeline()
    before = tiling._settings(pipe.vae)
    whole, tiled = (tiling.decode_bytes(pipe.vae, 128, 128, tile=side) for side in (None, 64))
    assert tiled < whole
    assert tiling._settings(pipe.vae) == before
    known = {None: whole, 64: tiled}  # an estimate takes seconds
    monkeypatch.setattr(tiling, "decode_bytes", lambda vae, height, width, tile: known[tile])
    assert choose_tiling(pipe.vae, 128, 128, whole).tile is None
    assert choose_tiling(pipe.vae, 128, 128, whole - 1).tile == 64
    with pytest.raises(BudgetError) as error:
        choose_tiling(pipe.vae, 128, 128, tiled - 1)
    assert error.value.needed_bytes == tiled
    wrapped = QwenImage(pipe, "fp8")
    used = []
    decode = pipe.vae.tiled_decode
    monkeypatch.setattr(pipe.vae, "tiled_decode", lambda *a, **k: used.append(1) or decode(*a, **k))
    total = sum(wrapped.weights_bytes.values())
    wrapped.enable_vram_management(f"{total + whole - 1} B", 0, False)
    image_of(wrapped, height=128, width=128)
    assert used
    assert wrapped.tiling.tile == 64
    wrapped.enable_vram_management(f"{total + whole} B", 0, False)
    used.clear()
    image_of(wrapped, height=128, width=128)
    assert not used
    assert wrapped.tiling.tile is None


def test_diffsynth_s_interface() -> None:
    prompt = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(5))
    pipe = SmallDiffSynth(transformer())
    reference = pipe(prompt, seed=3)
    wrapped = QwenImage(pipe, "fp8")
    assert wrapped.transformer is pipe.dit
    assert set(formats(pipe.dit).values()) == {"fp8"}
    plain = wrapped(prompt, seed=3)
    assert 0 < relative_l2(reference, plain) < 0.1
    keys = lora_keys(transformer(), ATTENTION, "AB", "diffusion_model.")
    wrapped.load_lora(pipe.dit, keys, alpha=0.5)
    changed = wrapped(prompt, seed=3)
    assert not torch.equal(changed, plain)
    wrapped.clear_lora()
    assert torch.equal(wrapped(prompt, seed=3), plain)
    wrapped(prompt, vae_tiling=True)
    assert pipe.seen["tiled"] is True
    wrapped.enable_vram_management(10.0, 1.5)
    assert torch.equal(wrapped(prompt, seed=3), plain)
    assert list(pipe.vramkit_session.sessions) == ["dit"]
    wrapped.disable_vram_management()
    with pytest.raises(ValueError, match="this pipeline's transformer"):
        wrapped.load_lora(pipe.vae, keys)
