"""Calibration on a real sentence-embedding model, and int4's scale search against HQQ's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit._operators import encode

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

    def embed(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return suite.SentenceEmbedder(model)(**batch)

    texts = suite.real_models.sentences(tokenizer.get_vocab(), 2000)
    assert not set(texts) & set(suite.SENTENCES)
    calibration = suite.real_models.sentence_batches(tokenizer, texts)
    model = copy.deepcopy(reference)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    precision = {n: "int8" if n in suite.MINILM_MIX else "nf4_dq" for n in names}
    report = vramkit.convert(model, precision, calibration=calibration)
    assert report.uncalibrated == []
    stored = sum(layer.bytes for layer in report.layers)
    bits = 32 * stored / sum(layer.original_bytes for layer in report.layers)
    cosine = float(nn.functional.cosine_similarity(embed(model), embed(reference)).min())
    print(f"{bits:.3f} bits per weight, least cosine {cosine:.4f}")
    assert bits <= suite.BITS
    assert cosine >= suite.COSINE


def test_int4_errs_less_than_the_peers_at_no_more_bytes(reference: nn.Module, suite: Any) -> None:
    fmt = vramkit.get_format("int4")
    ours = 0.0
    theirs = dict.fromkeys(suite.PEERS, 0.0)
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            ours += float((encode(weight, fmt).dense(torch.float32) - weight).square().sum())
            for name, (bits, change) in suite.PEERS.items():
                assert bits >= fmt.bits_per_weight(weight.shape)
                theirs[name] += float((change(weight) - weight).square().sum())
    print({name: round((ours / error) ** 0.5, 4) for name, error in theirs.items()})
    assert all(ours < error for error in theirs.values())
