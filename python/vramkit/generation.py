"""A generation loop traced by a prefill and two decode steps, with the cache grown between them.

`generate()` itself cannot be traced: it ends by a token's value. The loop here does what its greedy
search does for memory: the last logits copied to float32 and held until the next ones are there,
the ids concatenated, the cache updated by its own code. Nothing but the cache and the ids grows
from step to step, so that the last step holds the most.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recorder import Recorder

LONGEST_UNROLLED = 64  # steps, for a cache whose growth is not understood


@dataclass
class Generation:
    """One loop's cache.

    Attributes:
        prompt: Tokens of the prompt (of the decoder's, where there is an encoder).
        new_tokens: Tokens made after it.
        cache_bytes: The cache's bytes at the last step.
        bytes_per_token: What one more token adds to it.
    """

    prompt: int
    new_tokens: int
    cache_bytes: int = 0
    bytes_per_token: float = 0.0


class Loop:
    """Plays a greedy generation of `new_tokens` for a recorder."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> None:
        if new_tokens < 1:
            raise ValueError(f"generate is a count of new tokens, at least 1; got {new_tokens}")
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError(
                "a generation loop needs its prompt as inputs={'input_ids': …}; other inputs "
                "go by their names beside it"
            )
        self.model, self.inputs, self.new_tokens = model, dict(inputs), new_tokens
        self.takes = set(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self.takes:
            raise ValueError(
                f"{type(model).__name__}.forward takes no past_key_values: it has no cache that a "
                "generation loop could be traced with"
            )
        self.encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.found = Generation(0, new_tokens)
        self.scores: Tensor | None = None

    def __call__(self, recorder: Recorder) -> Any:
        """The whole loop; returns the ids."""
        ids = self.inputs["input_ids"]
        others = {k: v for k, v in self.inputs.items() if k != "input_ids"}
        mask = others.pop("attention_mask", None)
        if mask is None:
            mask = torch.ones(ids.shape, dtype=torch.int64)
        if self.encodes:
            ids, others = self._encoded(recorder, ids, mask, others)
        self.found.prompt = ids.shape[1]
        recorder.begin("prefill")
        out = self.model(**self._step(ids, mask, None, 0, others))
        cache = out.past_key_values
        _mark(recorder, cache)
        others = {k: v for k, v in others.items() if k not in _FIRST_ONLY}
        ids, mask = self._next(ids, mask, out)
        del out
        steps = self.new_tokens - 1
        before = _bytes(cache)
        done = 0
        while done < steps:
            recorder.begin(f"decode {done + 1}")
            out = self.model(**self._step(ids, mask, cache, 1, others))
            cache = out.past_key_values
            _mark(recorder, cache)
            ids, mask = self._next(ids, mask, out)
            del out
            done += 1
            if done == 1:
                self.found.bytes_per_token = float(_bytes(cache) - before)
                if steps > 2:
                    done, ids, mask = self._jump(recorder, cache, steps - 2, ids, mask)
        self.found.cache_bytes = _bytes(cache)
        self.scores = None
        return ids

    def _encoded(
        self, recorder: Recorder, ids: Tensor, mask: Tensor, others: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        recorder.begin("encode")
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        encoded = encoder(input_ids=ids, attention_mask=mask, return_dict=True)
        first = others.pop("decoder_input_ids", None)
        if first is None:
            first = torch.zeros((ids.shape[0], 1), dtype=torch.int64)
        return first, {**others, "encoder_outputs": encoded, "attention_mask": mask}

    def _step(
        self, ids: Tensor, mask: Tensor, cache: Any, last: int, others: dict[str, Any]
    ) -> dict[str, Any]:
        prefix = "decoder_" if self.encodes else ""
        ids = ids[:, -last:] if last else ids
        given = {**others, f"{prefix}input_ids": ids.clone(), "past_key_values": cache}
        if not self.encodes:
            given["attention_mask"] = mask
            places = mask.cumsum(-1) - 1
            given["position_ids"] = places[:, -ids.shape[1] :]
        given |= {"use_cache": True, "return_dict": True, "logits_to_keep": 1}
        return {k: v for k, v in given.items() if k in self.takes}

    def _next(self, ids: Tensor, mask: Tensor, out: Any) -> tuple[Tensor, Tensor]:
        self.scores = out.logits[:, -1].to(copy=True, dtype=torch.float32)
        token = self.scores.argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=-1)
        if not self.encodes:
            mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
        return ids, mask

    def _jump(
        self, recorder: Recorder, cache: Any, count: int, ids: Tensor, mask: Tensor
    ) -> tuple[int, Tensor, Tensor]:
        """(steps done, ids, mask) with the cache grown by `count` tokens through its own update."""
        layers = list(_growing(cache))
        if not layers:
            if count > LONGEST_UNROLLED:
                raise ValueError(
                    f"the cache {type(cache).__name__} grows in a way that is not understood, so "
                    f"that each step has to be traced: give at most {LONGEST_UNROLLED} new tokens. "
                    "Or measure one real run: vramkit.measure.call(model, inputs)"
                )
            return 1, ids, mask
        recorder.begin("growth")
        with recorder.paused():
            for layer in layers:
                new = [t.new_empty((*t.shape[:2], count, t.shape[3])) for t in _pair(layer)]
                layer.update(*new)
                del new
            ids = torch.cat([ids, ids.new_zeros((ids.shape[0], count))], dim=-1)
            if not self.encodes:
                mask = torch.cat([mask, mask.new_ones((mask.shape[0], count))], dim=-1)
        for tensor in (*(t for layer in layers for t in _pair(layer)), ids, mask):
            recorder.follow(tensor, recorder.current_tag("cache"))
        _mark(recorder, cache)
        return 1 + count, ids, mask


_FIRST_ONLY = frozenset({"pixel_values", "input_features", "inputs_embeds", "image_sizes"})


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _growing(cache: Any) -> Iterator[Any]:
    """Layers of a cache that grow by concatenation, with keys and values [batch, heads, n, d]."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and hasattr(layer, "update"):
            yield layer


def _tensors_of(cache: Any) -> dict[int, Tensor]:
    """All tensors in a cache, by identity."""
    parts = [cache]
    parts += [getattr(cache, f"{kind}_attention_cache", None) for kind in ("self", "cross")]
    found: dict[int, Tensor] = {}
    for part in parts:
        for layer in getattr(part, "layers", ()):
            for value in vars(layer).values():
                if isinstance(value, Tensor):
                    found[id(value)] = value
    return found


def _bytes(cache: Any) -> int:
    """Bytes of all tensors in a cache, each once."""
    return sum(t.untyped_storage().nbytes() for t in _tensors_of(cache).values())


def _mark(recorder: Recorder, cache: Any) -> None:
    """Let the trace know which blocks are the cache's."""
    for tensor in _tensors_of(cache).values():
        block = recorder.blocks.get(tensor.untyped_storage(), 0)
        if block:
            recorder.recording.cache.add(block)
