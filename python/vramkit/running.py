"""Calls a model on batches, for `quality`: the tensor to compare, times, and layers' outputs."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Output = Callable[[Any], Tensor]

_OUTPUT_NAMES = ("last_hidden_state", "logits", "sample")


def default_output(result: Any) -> Tensor:
    """The tensor to compare in what a model returned.

    A tensor itself, else `.last_hidden_state`, `.logits` or `.sample` (attribute or key), else the
    first item of a tuple or list (or of what `.to_tuple()` gives), else the only tensor of a
    mapping or object. TypeError otherwise.
    """
    if isinstance(result, Tensor):
        return result
    fields: Mapping[Any, Any] = (
        result if isinstance(result, Mapping) else getattr(result, "__dict__", {})
    )
    for name in _OUTPUT_NAMES:
        value = fields[name] if name in fields else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    items = result.to_tuple() if hasattr(result, "to_tuple") else result
    if isinstance(items, (tuple, list)) and items:
        return default_output(items[0])
    tensors = {str(k): v for k, v in fields.items() if isinstance(v, Tensor)}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    among = f"; it holds the tensors {', '.join(sorted(tensors))}" if tensors else ""
    raise TypeError(
        f"cannot tell which tensor of a {type(result).__name__} to compare{among}. "
        "Pass output=, a function of what the model returns"
    )


class Runner:
    """Calls one model on batches: its outputs, its times, and its layers' outputs.

    `role` is what messages call the model: "reference" or "model".
    """

    def __init__(self, model: Any, output: Output | None, role: str) -> None:
        if not callable(model):
            raise TypeError(f"the {role} is no model but a {type(model).__name__}")
        self.model, self.role = model, role
        self.output = output or default_output
        self.times: list[float] = []
        self.device = _device_of(model)
        self.warm = False
        if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
            warnings.warn(
                f"the {role} ({type(model).__name__}) is in training mode, where dropout and batch "
                "statistics change its outputs; call .eval() on it",
                stacklevel=4,
            )

    def call(self, batch: Any) -> Any:
        """What the model returns for a batch on its device."""
        if isinstance(batch, Tensor):
            return self.model(batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch)

    def feed(self, batch: Any) -> None:
        """One call, untimed, for hooks that look at what passes (and at tensors' versions)."""
        with torch.no_grad():
            self.call(_to_device(batch, self.device))

    def run(self, batch: Any) -> Tensor:
        """The tensor to compare, with the call timed (the first batch is run once before)."""
        batch = _to_device(batch, self.device)
        with torch.inference_mode():
            if not self.warm:
                self.call(batch)
                self.warm = True
            self._wait()
            start = time.perf_counter()
            result = self.call(batch)
            self._wait()
            self.times.append(time.perf_counter() - start)
            tensor = self.output(result)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"output= must return a Tensor, not {type(tensor).__name__}")
        return tensor.detach().cpu()

    def run_layers(self, batch: Any, take: Callable[[str, Any], None], names: set[str]) -> None:
        """One more call, untimed, in which `take(name, output)` sees each call of each layer."""

        def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                take(name, output)

            return hook

        batch = _to_device(batch, self.device)
        layers = [(n, m) for n, m in self.layers() if n in names]
        handles = [m.register_forward_hook(hook_for(n)) for n, m in layers]
        try:
            with torch.inference_mode():
                self.call(batch)
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that hold parameters of their own."""
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                f"errors by layer need modules; the {self.role} is a {type(self.model).__name__}"
            )
        for name, module in self.model.named_modules():
            if name and any(p is not None for p in module._parameters.values()):
                yield name, module

    @property
    def seconds(self) -> float:
        """Median time of a batch."""
        return statistics.median(self.times)

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _device_of(model: Any) -> torch.device | None:
    """Where a model's inputs belong; None if it does not tell."""
    device = getattr(model, "device", None)
    if not isinstance(device, torch.device) and isinstance(model, nn.Module):
        tensors = itertools.chain(model.parameters(), model.buffers())
        device = next((tensor.device for tensor in tensors), None)
    return device if isinstance(device, torch.device) and device.type != "meta" else None


def _to_device(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to_device(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_device(v, device) for v in value)
    return value


def checked(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches one by one; TypeError for what is no batch, ValueError if there is none."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list of inputs, not one {type(batches).__name__}; "
            "write [inputs] for a single one"
        )
    count = 0
    for count, batch in enumerate(batches, 1):
        if not isinstance(batch, (Tensor, tuple, Mapping)):
            raise TypeError(
                f"batch {count - 1} is a {type(batch).__name__}; a batch is a Tensor, a tuple "
                "(positional arguments) or a dict (keyword arguments)"
            )
        yield batch
    if count == 0:
        raise ValueError("no batches: nothing to run the models on")
