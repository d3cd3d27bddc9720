"""Safetensors files that no careful writer makes, and tensors compared bit for bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import Tensor
from vramkit.shards import SAFETENSORS_DTYPES


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def askew(tensors: dict[str, Tensor], path: Path, lead: int) -> Path:
    """A sound file whose elements lie at odd addresses: others' writers need not pad."""
    header, data = {}, b""
    for name, tensor in {"lead": torch.zeros(lead, dtype=torch.uint8), **tensors}.items():
        dtype = next(n for n, d in SAFETENSORS_DTYPES.items() if d == tensor.dtype)
        raw = bits(tensor).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
