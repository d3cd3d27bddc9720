"""What was measured of sensitivities, kept by content: the same bytes are never measured twice.

A record's key is a hash of all that its figures depend on, so that a changed weight, input or
format is another record, and a measurement that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .formats import StorageFormat
from .probing import cache_folder
from .text_file import replace_text

SCHEMA = "vramkit.sensitivity-store/1"
# Records in the file; the oldest go first. About 200 bytes each.
KEPT = 100_000


def digest_of(*values: Any) -> str:
    """A hash of tensors, modules, numbers and texts, nested in any way; 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        _add(state, value)
    return state.hexdigest()


def _add(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"{value.dtype} {tuple(value.shape)};".encode())
        if value.numel():
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            state.update(flat.numpy().data)
    elif isinstance(value, nn.Module):
        state.update(f"{type(value).__module__}.{type(value).__qualname__} {value!r};".encode())
        for name, tensor in _tensors(value):
            state.update(f"{name}:".encode())
            _add(state, tensor)
    elif isinstance(value, StorageFormat):
        table = list(value.native.table)
        state.update(f"{value.name} {value.spec} {table!r} {value.activations};".encode())
    elif isinstance(value, Mapping):
        state.update(b"{")
        for key, item in value.items():
            _add(state, key)
            _add(state, item)
        state.update(b"}")
    elif isinstance(value, (tuple, list)):
        state.update(b"(")
        for item in value:
            _add(state, item)
        state.update(b")")
    else:
        state.update(f"{value!r};".encode())


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


class Store:
    """Figures by the hash of what they depend on, in a file that grows by a line for each.

    A line that was cut off, by an interrupt or a full disk, is left out when the file is read.
    `notes` says what went wrong with the file; nothing is lost then but time.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(folder or cache_folder()) / "sensitivity.jsonl"
        self.notes: list[str] = []
        self.found = self.measured = 0
        self.records: dict[str, list[float]] = {}
        self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.notes.append(f"{self.path} could not be read ({error}); all is measured again")
            lines = []
        unsound = 0
        if not lines or lines[0] != json.dumps({"schema": SCHEMA}):
            unsound, lines = 1, []
        for line in lines[1:]:
            record = _parsed(line)
            if record is None:
                unsound += 1
            else:
                self.records[record[0]] = record[1]
        if unsound:
            self.notes.append(f"{self.path}: what could not be read there is measured again")
        if unsound or len(self.records) > KEPT:
            for key in list(self.records)[: max(0, len(self.records) - KEPT)]:
                del self.records[key]
            self._rewrite()

    def _rewrite(self) -> None:
        text = "".join(_line(key, values) for key, values in self.records.items())
        try:
            replace_text(self.path, json.dumps({"schema": SCHEMA}) + "\n" + text)
        except OSError as error:
            self.notes.append(f"{self.path} could not be mended: {error}")

    def get(self, key: str, count: int) -> list[float] | None:
        """The `count` figures under `key`; None where there are none."""
        values = self.records.get(key)
        if values is None or len(values) != count:
            return None
        self.found += 1
        return values

    def put(self, key: str, values: list[float]) -> None:
        """Keep figures, in the file too; a folder that cannot be written is noted."""
        self.measured += 1
        self.records[key] = values
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # In one write, so that processes that share the file do not mix their lines.
            with self.path.open("a", encoding="utf-8") as file:
                fresh = file.tell() == 0
                head = json.dumps({"schema": SCHEMA}) + "\n" if fresh else ""
                file.write(head + _line(key, values))
        except OSError as error:
            note = f"what was measured is not kept: {error}"
            if note not in self.notes:
                self.notes.append(note)


def _line(key: str, values: list[float]) -> str:
    # Infinity is no JSON.
    return json.dumps([key, [v if math.isfinite(v) else None for v in values]]) + "\n"


def _parsed(line: str) -> tuple[str, list[float]] | None:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        key, values = json.loads(line)
        if isinstance(key, str) and len(key) == 32 and isinstance(values, list):
            figures = [math.inf if v is None else float(v) for v in values]
            if all(v >= 0 for v in figures):
                return key, figures
    return None


def store_for(cache: bool | str | os.PathLike[str] | None) -> Store | None:
    """The store that `cache=` asks for: True for the user's folder, a folder, or none."""
    if cache is None or cache is False:
        return None
    return Store(None if cache is True else cache)
