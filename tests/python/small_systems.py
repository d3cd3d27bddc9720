"""Small models with the published structure of the systems, for tests: random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class QkNorm(nn.Module):
    """RMS norm written out in Python: in float16 squares of small values vanish."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, dim: int, context: int | None = None, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context or dim, dim, bias=False)
        self.to_v = nn.Linear(context or dim, dim, bias=False)
        self.q_norm, self.k_norm = QkNorm(dim // heads), QkNorm(dim // heads)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MoE(nn.Module):
    """Experts, the best two of them for each token, and one for all."""

    def __init__(self, dim: int, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(_mlp(dim) for _ in range(experts))
        self.shared = _mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).softmax(-1).topk(2)
        out = self.shared(x)
        for index, expert in enumerate(self.experts):
            weight = (scores * (chosen == index)).sum(-1, keepdim=True)
            out = out + weight * expert(x)
        return out


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class DitBlock(nn.Module):
    def __init__(self, dim: int, context: int, moe: bool, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))
        self.attn1 = Attention(dim)
        self.attn2, self.attn3 = Attention(dim, context), Attention(dim, context)
        self.mlp = MoE(dim) if moe else _mlp(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, a: Tensor, b: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat((skip, x), -1))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), a) + self.attn3(self.norm3(x), b)
        return x + self.mlp(self.norm4(x))


class PartFormerDit(nn.Module):
    """U-skips: the second half takes what the first half gave; its last blocks are mixtures."""

    def __init__(self, dim: int = 64, depth: int = 5, context: int = 48) -> None:
        super().__init__()
        half = depth // 2
        self.blocks = nn.ModuleList(
            DitBlock(dim, context, moe=i >= depth - 2, skip=i > half) for i in range(depth)
        )
        self.half = half

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, a, b, kept.pop() if index > self.half else None)
            if index < self.half:
                kept.append(x)
        return x


class Vae(nn.Module):
    """Encoder and decoder; a pipeline uses one of them."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, dim), nn.GELU(), nn.Linear(dim, 48))
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def encode(self, points: Tensor) -> Tensor:
        return self.encoder(points)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class Sonata(nn.Module):
    """Refuses what is not float32, as the real one's sparse convolutions would fail."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(3, dim), nn.Linear(dim, dim)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        assert data["coord"].dtype == self.stem.weight.dtype == torch.float32
        return {"feat": self.body(self.stem(data["coord"]).relu())}


class Conditioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.geometry, self.part = Vae(), Vae()
        self.sonata = Sonata()

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.geometry.encode(points), self.sonata({"coord": points})["feat"]


class P3Sam(nn.Module):
    """Masks of prompts: [points, prompts, dim] in the middle, which is what takes the memory."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.sonata = Sonata(dim)
        self.head = nn.Sequential(nn.Linear(2 * dim, 128), nn.GELU(), nn.Linear(128, 1))

    def forward(self, points: Tensor, prompts: Tensor) -> Tensor:
        """points [n, 3], prompts [m, 3] -> masks [n, m]."""
        of_points = self.sonata({"coord": points})["feat"]
        of_prompts = self.sonata({"coord": prompts})["feat"]
        n, m = len(points), len(prompts)
        pairs = torch.cat(
            (
                of_points[:, None].expand(n, m, -1),
                of_prompts[None].expand(n, m, -1),
            ),
            -1,
        )
        return self.head(pairs).squeeze(-1)


class AutoMask:
    """The driver: a plain object around the model."""

    def __init__(self, model: P3Sam) -> None:
        self.model = model

    def predict_aabb(self, mesh: Tensor, prompt_num: int = 8) -> tuple[Tensor, Tensor]:
        """(boxes [m, 2, 3], labels [n]) of a cloud [n, 3]."""
        masks = self.model(mesh, mesh[:prompt_num])
        labels = masks.argmax(-1)
        boxes = [
            torch.stack((mesh[labels == i].amin(0), mesh[labels == i].amax(0)))
            for i in labels.unique().tolist()
        ]
        return torch.stack(boxes), labels


class BboxPredictor:
    """Holds a P3-SAM where the pipeline's `.to()` does not see it."""

    def __init__(self, model: P3Sam) -> None:
        self._auto_mask = AutoMask(model)

    def __call__(self, mesh: Tensor) -> Tensor:
        return self._auto_mask.predict_aabb(mesh)[0]


class PartFormerPipeline:
    """A plain object with the published parts, arguments and results."""

    def __init__(self) -> None:
        self.vae, self.model, self.conditioner = Vae(), PartFormerDit(), Conditioner()
        self.scheduler: dict[str, Any] = {"steps": 50}
        self.bbox_predictor = BboxPredictor(P3Sam())

    def to(self, device: Any = None, dtype: Any = None) -> PartFormerPipeline:
        for module in (self.vae, self.model, self.conditioner):
            module.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(
        self,
        mesh_path: Any = None,
        octree_resolution: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = -1.0,
        num_chunks: int = 400000,
        seed: int = 42,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        made = torch.Generator().manual_seed(seed)
        mesh = torch.rand(24, 3, generator=made) if mesh_path is None else torch.load(mesh_path)
        boxes = self.bbox_predictor(mesh)
        dtype = self.model.blocks[0].norm1.weight.dtype
        a, b = self.conditioner(mesh[None].to(dtype))
        x = torch.randn(1, 6, 64, generator=made).to(dtype)
        for _ in range(num_inference_steps):
            x = x - self.model(x, a, b) / num_inference_steps
        return self.vae.decode(x), (boxes, boxes.clone(), x)


def partformer(seed: int = 0) -> PartFormerPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PartFormerPipeline()
    return made


def clone(pipeline: PartFormerPipeline) -> PartFormerPipeline:
    return copy.deepcopy(pipeline)
