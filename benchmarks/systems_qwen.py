"""Qwen-Image: bytes of the published model by mode, and what modes cost on a trained small one.

True scale is counted from the real classes on the meta device. Quality is measured on a transformer
of the same class with 1.4 M parameters, trained here by flow matching on scikit-learn's digits
(8 x 8 pixels, 16 patches, the digit as the text): random weights would say nothing. Streaming is
timed on a larger one with random weights, whose limit is a quarter of it.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import vramkit
from torch import Tensor, nn
from vramkit.qwen_image import QwenImage, compare_modes, measure_keep
from vramkit.qwen_image.keep import EMBEDDERS, KEEP, MODULATION, PROJECTIONS
from vramkit.qwen_image.modes import Mode, needed_bytes
from vramkit.qwen_image.parts import bytes_of
from vramkit.qwen_image.sizes import published_bytes

DOCUMENTED = {  # the guide's table, in its GB
    "original": 24,
    "fp8": 14,
    "fp8_fused": 14,
    "low_vram": 8,
    "low_vram_fused": 6,
}
TOKENS, TEXT, WIDTH = 16, 32, 96
TEXT_TOKENS, SHAPES = 2, [(1, 4, 4)]
STEPS, BATCH, SAMPLING = 400, 32, 10
# What is promised of fp8 with the default list against the model as it is.
FP8_ERROR, LOW_VRAM_TIMES = 0.10, 4


def run(folder: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """All parts; (data, promises missed). `folder`: where the page with the pictures goes."""
    missed: list[str] = []
    data: dict[str, Any] = {"published": published(missed)}
    data["streamed"] = streamed(missed)
    data["digits"] = digits(missed, folder)
    return data, missed


def published(missed: list[str]) -> list[dict[str, Any]]:
    """The guide's figure beside ours, by mode; checked against the real class."""
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
    plain = published_bytes()
    if (plain.transformer, plain.vae) != (bytes_of(model), bytes_of(vae)):
        missed.append("the sizes of the published model are not those of diffusers' classes")
    rows = []
    print("mode            modulation  DiT GB   in turns GB  (GB: 10^9)   guide GB")
    for mode in Mode:
        for modulation in (None, "int8") if mode is not Mode.ORIGINAL else (None,):
            precision = None if mode is Mode.ORIGINAL else "fp8"
            sizes = published_bytes(precision, modulation=modulation)
            row = {
                "mode": mode.value,
                "modulation": modulation,
                "transformer_bytes": sizes.transformer,
                "text_encoder_bytes": sizes.text_encoder,
                "vae_bytes": sizes.vae,
                "together_bytes": sizes.together,
                "weights_at_once_bytes": needed_bytes(mode, sizes),
                "documented_gb": DOCUMENTED[mode.value],
            }
            rows.append(row)
            print(
                f"{mode.value:<16}{modulation or '16 bit':<10}{sizes.transformer / 1e9:>8.2f}"
                f"{row['weights_at_once_bytes'] / 1e9:>12.2f}{DOCUMENTED[mode.value]:>22}"
            )
    return rows


# A model of four times its limit


class _Pipeline:
    """What a pipeline has that matters here: a transformer, and a call that denoises."""

    def __init__(self, transformer: nn.Module, text: int, tokens: int) -> None:
        self.transformer, self._text, self._tokens = transformer, text, tokens

    @torch.inference_mode()
    def __call__(self, steps: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self._tokens, 64, generator=generator)
        prompt = torch.randn(1, 16, self._text, generator=generator)
        side = int(self._tokens**0.5)
        for step in range(steps):
            change = self.transformer(
                hidden_states=latents,
                timestep=torch.full((1,), 1 - step / steps),
                encoder_hidden_states=prompt,
                img_shapes=[[(1, side, side)]],
                return_dict=False,
            )[0]
            latents = latents - change / steps
        return latents


def streamed(missed: list[str]) -> dict[str, Any]:
    """58 M random parameters: bytes and seconds resident, in FP8, and within a quarter of that."""
    from diffusers import QwenImageTransformer2DModel

    def build() -> _Pipeline:
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=6,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=512,
            axes_dims_rope=(16, 24, 24),
        )
        return _Pipeline(model.eval(), 512, 256)

    rows: dict[str, Any] = {}
    results = {}
    for mode in ("original", "fp8", "low_vram"):
        pipe = build()
        limit = None
        if mode == "low_vram":
            limit = f"{rows['fp8']['weights_bytes'] // LOW_VRAM_TIMES} B"
        wrapped = QwenImage(pipe, mode, vram_limit=limit, vram_buffer=0)
        wrapped()
        start = time.perf_counter()
        results[mode] = wrapped()
        seconds = time.perf_counter() - start
        session = getattr(pipe, "vramkit_session", None)
        rows[mode] = {
            "weights_bytes": bytes_of(pipe.transformer),
            "in_memory_bytes": bytes_of(pipe.transformer)
            if session is None
            else session.device_bytes,
            "seconds": seconds,
        }
        wrapped.disable_vram_management()
        print(mode, rows[mode])
    if not torch.equal(results["fp8"], results["low_vram"]):
        missed.append("low_vram differs from fp8")
    if rows["low_vram"]["in_memory_bytes"] * LOW_VRAM_TIMES > rows["fp8"]["weights_bytes"]:
        missed.append("low_vram has more than a quarter of the weights in memory")
    return rows


# A trained model


def label_embeddings() -> Tensor:
    """[10, 2, 32]: a digit as text."""
    return torch.randn(10, TEXT_TOKENS, TEXT, generator=torch.Generator().manual_seed(3))


def to_patches(images: Tensor) -> Tensor:
    """[n, 8, 8] to [n, 16, 4]."""
    return images.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, TOKENS, 4)


def to_images(patches: Tensor) -> Tensor:
    """[n, 16, 4] to [n, 8, 8]."""
    return patches.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 8, 8)


def digit_transformer() -> nn.Module:
    """Qwen-Image's own class with 1.4 M parameters."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=TEXT,
        axes_dims_rope=(8, 12, 12),
    )
    return model


def velocity(model: nn.Module, latents: Tensor, time_: Tensor, text: Tensor) -> Tensor:
    """The transformer's prediction."""
    found: Tensor = model(
        hidden_states=latents,
        timestep=time_,
        encoder_hidden_states=text,
        img_shapes=[SHAPES] * len(latents),
        return_dict=False,
    )[0]
    return found


def train(steps: int = STEPS) -> tuple[nn.Module, Tensor, Tensor]:
    """The transformer after `steps` steps of flow matching; images and digits held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 8 - 1
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held, used = order[:200], order[200:]
    model, text = digit_transformer().train(), label_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(2)
    start = time.perf_counter()
    for step in range(steps):
        chosen = used[torch.randint(len(used), (BATCH,), generator=generator)]
        clean = to_patches(images[chosen])
        noise = torch.randn(clean.shape, generator=generator)
        at = torch.rand(BATCH, generator=generator)
        mixed = torch.lerp(clean, noise, at[:, None, None])
        found = velocity(model, mixed, at, text[labels[chosen]])
        loss = (found - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            taken = time.perf_counter() - start
            print(f"  step {step + 1}: loss {float(loss.detach()):.3f}, {taken:.0f} s")
    return model.eval().requires_grad_(False), images[held], labels[held]


class DigitPipeline:
    """Draws digits: ten Euler steps from fixed noise."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    @torch.inference_mode()
    def __call__(self, digits: Tensor) -> Tensor:
        """[n] digits to [n, 8, 8] images from 0 to 1."""
        generator = torch.Generator().manual_seed(4)
        latents = torch.randn(len(digits), TOKENS, 4, generator=generator)
        text = label_embeddings()[digits]
        for step in range(SAMPLING):
            at = torch.full((len(digits),), 1 - step / SAMPLING)
            latents = latents - velocity(self.transformer, latents, at, text) / SAMPLING
        return (to_images(latents).clamp(-1, 1) + 1) / 2


def _grid(images: Tensor) -> Tensor:
    """Ten columns of digits as one picture [3, height, width]."""
    rows = images.reshape(-1, 10, 8, 8).permute(0, 2, 1, 3).reshape(-1, 80)
    return rows[None].expand(3, -1, -1).contiguous()


def batches(images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Calls of the transformer at several times, on digits that it has not seen."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for at in (0.2, 0.5, 0.9):
        clean = to_patches(images[:24])
        noise = torch.randn(clean.shape, generator=generator)
        made.append(
            {
                "hidden_states": torch.lerp(clean, noise, at),
                "timestep": torch.full((24,), at),
                "encoder_hidden_states": label_embeddings()[labels[:24]],
                "img_shapes": [SHAPES] * 24,
            }
        )
    return made


def held_out_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean squared error of the velocity on digits held out, over three times."""
    generator = torch.Generator().manual_seed(8)
    total = 0.0
    with torch.inference_mode():
        for at in torch.linspace(0.2, 0.8, 3):
            clean = to_patches(images)
            noise = torch.randn(clean.shape, generator=generator)
            mixed = torch.lerp(clean, noise, at)
            found = velocity(model, mixed, at.expand(len(clean)), label_embeddings()[labels])
            total += float((found - (noise - clean)).square().mean()) / 3
    return total


def digits(missed: list[str], folder: str | None) -> dict[str, Any]:
    """What formats cost the trained model: which layers to keep, and images by mode."""
    import copy

    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    model, images, labels = train()
    data = load_digits()
    judge = LogisticRegression(max_iter=400, C=0.05).fit(data.data / 16, data.target)
    asked = torch.arange(10).repeat(4)
    kept = measure_keep(model, batches(images, labels), "fp8", cache=None)
    print(kept)
    modes: dict[str, dict[str, Any]] = {
        "fp8": {"mode": "fp8"},
        "fp8, modulation in int8": {"mode": "fp8", "modulation": "int8"},
        "fp8, modulation in fp8": {"mode": "fp8", "keep": EMBEDDERS + PROJECTIONS},
        "fp8, ends in fp8": {"mode": "fp8", "keep": MODULATION},
        "fp8, nothing kept": {"mode": "fp8", "keep": ()},
        "fp8, measured list": {"mode": "fp8", "keep": kept.keep},
        "int8": {"mode": "fp8", "precision": "int8"},
        "nf4": {"mode": "fp8", "precision": "nf4"},
        "low_vram": {
            "mode": "low_vram",
            "vram_limit": f"{bytes_of(model) // 2} B",
            "vram_buffer": 0,
        },
    }
    recognized: dict[str, float] = {}
    losses: dict[str, float] = {}
    names = iter(["original", *modes])

    def call(pipe: Any) -> Tensor:
        name = next(names)
        found = pipe(asked)
        guesses = judge.predict(found.reshape(-1, 64).numpy())
        recognized[name] = float((torch.from_numpy(guesses) == asked).float().mean())
        losses[name] = held_out_loss(pipe.transformer, images, labels)
        return _grid(found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        compared = compare_modes(lambda: DigitPipeline(copy.deepcopy(model)), call, modes)
    print(compared)
    rows = []
    for one in compared.images:
        row = one.to_dict()
        row |= {"recognized": recognized[one.mode], "held_out_loss": losses[one.mode]}
        rows.append(row)
        print(
            f"  {one.mode:<26} recognized {recognized[one.mode]:.2f}, held-out loss "
            f"{losses[one.mode]:.5f}"
        )
    if compared["fp8"].relative_l2 > 100 * FP8_ERROR:
        missed.append(f"fp8 changes digits by more than {FP8_ERROR:.0%}")
    if not torch.equal(compared["fp8"].image, compared["low_vram"].image):
        missed.append("low_vram draws other digits than fp8")
    with tempfile.TemporaryDirectory() as scratch:
        page = compared.write(Path(folder or scratch) / "qwen-digits.html", "Digits by mode")
        size = page.stat().st_size
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": STEPS,
        "keep": kept.to_dict(),
        "default_keep": list(KEEP),
        "modes": rows,
        "page_bytes": size,
        "vramkit": vramkit.__version__,
    }


if __name__ == "__main__":
    import sys

    found, promises = run(*sys.argv[1:])
    print("missed:", promises or "nothing")
    sys.exit(bool(promises))
