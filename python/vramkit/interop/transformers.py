"""Operations of transformers that converted models need help with."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..convert import _plain_ties, convert
from ..formats import StorageFormat
from ..layers import QuantizedLayer, unswap


def resize_token_embeddings(model: Any, new_num_tokens: int, **options: Any) -> nn.Module:
    """`model.resize_token_embeddings`, for models whose embedding and head are converted too.

    Both become plain for the time of the call and are then stored in their formats again; tied ones
    stay tied. Options go to transformers' own method. Returns the input embedding.

    Needed where embedding and head are tied (the model's own method raises ReadOnlyWeightError
    there). The old rows are decoded and encoded once more, which in formats that search their
    scales (int4) can change their last bits.
    """
    formats: dict[str, StorageFormat] = {}
    made: dict[int, nn.Parameter] = {}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    for end in ends:
        if isinstance(end, QuantizedLayer):
            formats[names[id(end)]] = end.storage_format
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
        convert(model, {name: formats[name] for name in owners.values()})
    return resized
