"""What `record` keeps of a model: its outputs, as a safetensors file that can be compared later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .shards import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from .sizes import format_size

LayerOutputs = dict[str, list[Tensor]]

_KIND = "vramkit recording"
_VERSION = "1"


@dataclass
class Recording:
    """Outputs of a reference, one per batch, to compare other models with.

    Attributes:
        outputs: The compared tensor of each batch, on the CPU.
        layers: By batch, the outputs of each call of each recorded layer (empty without them).
        seconds: Median time of a batch.
        task_metric: What the metric gave for the reference, if there was one.
    """

    outputs: list[Tensor] = field(default_factory=list)
    layers: list[LayerOutputs] = field(default_factory=list)
    seconds: float = 0.0
    task_metric: float | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def __repr__(self) -> str:
        layers = len(self.layers[0]) if self.layers else 0
        return f"Recording({len(self.outputs)} outputs, {layers} layers, {format_size(self.bytes)})"

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"output.{batch}": tensor for batch, tensor in enumerate(self.outputs)}
        for batch, layers in enumerate(self.layers):
            for name, calls in layers.items():
                for call, tensor in enumerate(calls):
                    tensors[f"layer.{batch}.{call}.{name}"] = tensor
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a safetensors file, which appears whole or not at all.

        Raises ValueError for a dtype that such files lack, OSError if the system refuses.
        """
        from ._native import _core

        tensors = {name: t.detach().cpu().contiguous() for name, t in self._tensors().items()}
        specs = []
        for name, tensor in tensors.items():
            if tensor.dtype not in SAFETENSORS_NAMES:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}, which a recording's file cannot hold; "
                    "convert it in output="
                )
            specs.append((name, SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)))
        metadata = {
            "kind": _KIND,
            "version": _VERSION,
            "seconds": repr(self.seconds),
            "task_metric": json.dumps(self.task_metric),
            # By batch, in the order of the calls, with their number.
            "layers": json.dumps(
                [{n: len(c) for n, c in layers.items()} for layers in self.layers]
            ),
        }
        with _core.SafetensorsWriter(os.fspath(path), specs, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.data_ptr(), tensor.nbytes)
            writer.commit()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording that `save` wrote.

        Raises CheckpointError for a file that is damaged or no recording, OSError if it cannot be
        read.
        """
        from ._native import _core

        file = _core.SafetensorsFile(os.fspath(path))
        metadata = file.metadata()
        if metadata.get("kind") != _KIND or metadata.get("version") != _VERSION:
            raise CheckpointError(
                f"{os.fspath(path)} is no recording of this version; "
                "make one with vramkit.record(model, batches).save(path)"
            )
        try:
            calls = [dict(layers) for layers in json.loads(metadata["layers"])]
            seconds = float(metadata["seconds"])
            task_metric = json.loads(metadata["task_metric"])
            batches = sum(name.startswith("output.") for name in file.names())
            outputs = [_read(file, f"output.{batch}") for batch in range(batches)]
            layers = [
                {
                    name: [_read(file, f"layer.{batch}.{call}.{name}") for call in range(count)]
                    for name, count in of_batch.items()
                }
                for batch, of_batch in enumerate(calls)
            ]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{os.fspath(path)} is a damaged recording: {error!r}; record it again"
            ) from error
        return cls(outputs, layers, seconds, task_metric)


def _read(file: Any, name: str) -> Tensor:
    info = file.info(name)
    dtype = SAFETENSORS_DTYPES[info.dtype]
    tensor = torch.empty(info.shape, dtype=dtype)
    if tensor.nbytes:
        file.read_into(name, tensor.data_ptr(), tensor.nbytes)
    return tensor
