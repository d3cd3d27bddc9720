"""Operations of transformers that converted models need help with."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._operators import StoredParts, keep_rows
from ..convert import _plain_ties, convert
from ..formats import StorageFormat
from ..layers import QuantizedLayer, unswap


def resize_token_embeddings(model: Any, new_num_tokens: int, **options: Any) -> nn.Module:
    """`model.resize_token_embeddings`, for models whose embedding and head are converted too.

    Both become plain for the time of the call and are then stored in their formats again; tied ones
    stay tied. Options go to transformers' own method. Returns the input embedding.

    Needed where embedding and head are tied (the model's own method raises ReadOnlyWeightError
    there). Old rows keep their codes and scales; in formats whose blocks or scales cross rows they
    are decoded and encoded once more.
    """
    formats: dict[str, StorageFormat] = {}
    before: dict[str, StoredParts] = {}
    made: dict[int, nn.Parameter] = {}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    for end in ends:
        if isinstance(end, QuantizedLayer):
            formats[names[id(end)]] = end.storage_format
            before[names[id(end)]] = end.parts
            key = id(end.codes)
            if key not in made:
                made[key] = nn.Parameter(end.dense_weight(), requires_grad=False)
            unswap(end, made[key])
    _plain_ties(model)
    try:
        resized: nn.Module = model.resize_token_embeddings(new_num_tokens, **options)
    finally:
        # Tied ones are one candidate, by the name of the first.
        owners: dict[int, str] = {}
        for name in formats:
            owners.setdefault(id(model.get_submodule(name).weight), name)
        plain = {name: model.get_submodule(name).weight for name in owners.values()}
        convert(model, {name: formats[name] for name in plain})
        for name, weight in plain.items():
            keep_rows(model.get_submodule(name).parts, weight, before[name])
    return resized
