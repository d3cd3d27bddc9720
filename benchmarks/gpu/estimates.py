"""The estimate for a CUDA device beside what torch reserves there, on a few small models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import Tensor, nn

WANTED = 0.05


def _mlp() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4096, 16384), nn.GELU(), nn.Linear(16384, 4096))
    return model.half(), (torch.randn(2048, 4096).half(),)


def _convolutions() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.Conv2d(64, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 512, 3, 2, 1),
    )  # fmt: skip
    return model, (torch.randn(4, 3, 256, 256),)


def _encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True)
    return nn.TransformerEncoder(layer, 6).bfloat16(), (torch.randn(4, 512, 1024).bfloat16(),)


def _llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16(), {"input_ids": torch.randint(3, 1000, (1, 1024))}


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), {"input_ids": torch.randint(3, 1000, (8, 256))}


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": _mlp, "convolutions": _convolutions, "encoder": _encoder, "llama": _llama, "bert": _bert,
}  # fmt: skip


def run(rehearse: bool) -> dict[str, Any]:
    """Reserved bytes, predicted and measured; a rehearsal only predicts, the smallest of them."""
    names = ["convolutions"] if rehearse else list(ZOO)
    rows = [one(name, rehearse) for name in names]
    lines = ["  reserved bytes by torch, predicted and measured (wanted: within 5 %)"]
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured'] / 1e6:9.1f} MB"
        off = "" if row["off"] is None else f"{row['off']:+.1%}"
        lines.append(f"  {row['name']:14} {row['predicted'] / 1e6:9.1f} MB  {measured}  {off}")
    missed = [f"{r['name']}: {r['off']:+.1%}" for r in rows if r["off"] and abs(r["off"]) > WANTED]
    print("\n".join(lines))
    return {"data": rows, "missed": missed}


def one(name: str, rehearse: bool) -> dict[str, Any]:
    """A model's row."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()
    target = "cuda:9.0"
    if not rehearse:
        major, minor = torch.cuda.get_device_capability()
        target = f"cuda:{major}.{minor}"
    found = vramkit.estimate(model, inputs=inputs, target=target)
    predicted = found.reserved_bytes
    assert predicted is not None
    row: dict[str, Any] = {
        "name": name, "predicted": predicted, "measured": None, "off": None,
        "notes": list(found.notes),
    }  # fmt: skip
    if rehearse:
        return row
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_reserved()
    model.cuda()
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), inputs)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        _ = model(**moved) if isinstance(moved, dict) else model(*moved)
    torch.cuda.synchronize()
    row["measured"] = torch.cuda.max_memory_reserved() - before
    row["off"] = predicted / row["measured"] - 1
    return row
