"""A plan and a rounding by calibration, on a real sentence-embedding model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def suite() -> Any:
    """benchmarks.calibration: the judge's sentences, the other ones, and the peers' formulas."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import calibration
    finally:
        sys.path.remove(str(ROOT))
    return calibration


@pytest.fixture(scope="module")
def reference(minilm_path: Path) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(minilm_path, dtype=torch.float32).eval()
    return model


def test_least_cosine_at_four_bits(minilm_path: Path, reference: nn.Module, suite: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    batch = dict(tokenizer(list(suite.SENTENCES), padding=True, return_tensors="pt"))

    embedder = suite.SentenceEmbedder(reference)
    assert not set(suite.real_models.sentences()) & set(suite.SENTENCES)
    # Half of what the suite takes, to save time.
    calibration = suite.minilm_calibration(embedder, tokenizer, count=1500)
    plan = suite.minilm_plan(embedder, tokenizer, calibration, count=32)
    assert plan.optimal
    converted = copy.deepcopy(embedder)
    report = plan.convert(converted, calibration=calibration)
    assert report.uncalibrated == []
    stored = sum(layer.bytes for layer in report.layers)
    bits = 32 * stored / sum(layer.original_bytes for layer in report.layers)
    with torch.inference_mode():
        cosine = float((converted(**batch) * embedder(**batch)).sum(1).min())
    print(f"{bits:.3f} bits per weight, least cosine {cosine:.4f}, {plan.counts()}")
    assert bits <= suite.BITS
    assert cosine >= suite.COSINE
