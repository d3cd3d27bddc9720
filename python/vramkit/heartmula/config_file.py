"""Configuration files of a checkpoint, read so that a wrong one says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def config_fields(
    path: Path, kind: type[Any], other_names: dict[str, str] | None = None
) -> dict[str, Any]:
    """The fields of the dataclass `kind` that a JSON file has; other keys are left alone.

    `other_names` are keys that a field may have instead, {field: key}. Raises FileNotFoundError,
    and CheckpointError for what is no JSON object, or a value that is not of its default's type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected an object")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        key = field.name
        if key not in data and other_names and key in other_names:
            key = other_names[key]
        if key not in data:
            continue
        value = data[key]
        if isinstance(field.default, tuple):
            good = isinstance(value, list) and all(type(item) is int for item in value)
            value = tuple(value) if good else value
        else:
            good = type(value) is type(field.default)
        if not good:
            wanted = type(field.default).__name__.replace("tuple", "list of int")
            raise CheckpointError(f"{path}: {key!r} is {value!r}, expected type {wanted}")
        found[field.name] = value
    return found
