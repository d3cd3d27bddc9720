"""The JSON file in which a model manager keeps the precisions it was told."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .precision import PrecisionMode
from .text_file import replace_text


def read_config(
    path: str | os.PathLike[str],
) -> tuple[PrecisionMode | None, dict[str, PrecisionMode]]:
    """The manager's mode and those of components; (None, {}) if there is no file yet.

    Raises ValueError, which names the file, for anything but what `write_config` writes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, {}
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("components", {}), dict):
            raise ValueError("expected an object with precision_mode and components")
        components = data.get("components", {})
        mode = PrecisionMode.parse(data["precision_mode"])
        return mode, {name: PrecisionMode.parse(value) for name, value in components.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a precision configuration: {error}; correct it or delete it"
        ) from error


def write_config(
    path: str | os.PathLike[str], mode: PrecisionMode, components: dict[str, PrecisionMode]
) -> None:
    """Replace the file by these modes, or leave it as it is and raise OSError."""
    data = {
        "precision_mode": mode.value,
        "components": {name: value.value for name, value in sorted(components.items())},
    }
    replace_text(path, json.dumps(data, indent=2) + "\n")
