"""Small things around a model in mixed precision: shapes, layouts, losses, inference."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.base import QuantizedLayer
from ..precision import PrecisionMode
from .wrapper import _device_of, _mode

Model = TypeVar("Model", bound=nn.Module)


def make_tensor_core_friendly(channels: int, multiple: int = 8) -> int:
    """The next multiple of 8 (16 for 8-bit formats), which matrix units want of a dimension.

    >>> make_tensor_core_friendly(190)
    192
    """
    if channels <= 0 or multiple <= 0:
        raise ValueError(f"channels and multiple are positive, not {channels} and {multiple}")
    return -(-channels // multiple) * multiple


def optimize_conv_memory_format(model: Model, *, inputs: bool = True) -> Model:
    """Put convolutions' weights channels-last, 2-D and 3-D; returns the model.

    Converted layers are left alone: their codes lie as their kernels want them.

    Args:
        model: Changed in place; its values, and the objects that its parameters are, stay.
        inputs: Also lay out what enters the model: a hook on its forward pass, so that the first
            convolution need not copy.

    >>> model = optimize_conv_memory_format(torch.nn.Conv2d(3, 8, 3))
    >>> model(torch.zeros(1, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    True
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d)
    for module in model.modules():
        if isinstance(module, kinds) and not isinstance(module, QuantizedLayer):
            weight = module.weight
            weight.data = weight.data.contiguous(memory_format=formats[weight.dim()])

    def lay_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(laid_out, args)), {k: laid_out(v) for k, v in kwargs.items()}

    def laid_out(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() in formats:
            return value.contiguous(memory_format=formats[value.dim()])
        return value

    if inputs:
        model.register_forward_pre_hook(lay_out, with_kwargs=True)
    return model


def stable_mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in float32: squares of float16 overflow from 256 up.

    >>> stable_mse_loss(torch.full((4,), 300.0, dtype=torch.float16), torch.zeros(4)).item()
    90000.0
    """
    _same_shape(prediction, target)
    return F.mse_loss(prediction.float(), target.float())


def stable_l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, summed in float32."""
    _same_shape(prediction, target)
    return F.l1_loss(prediction.float(), target.float())


def stable_huber_loss(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Huber's loss in float32."""
    _same_shape(prediction, target)
    return F.huber_loss(prediction.float(), target.float(), delta=delta)


def stable_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Cross entropy with the logarithm of the softmax in float32."""
    return F.cross_entropy(logits.float(), target, **options)


def _same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target have shapes {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}: a loss over broadcast shapes is seldom meant"
        )


def autocast_for(precision: PrecisionMode | str, device: torch.device) -> Any:
    """torch.autocast in a precision ("auto": the device's best), or nothing for fp32.

    Raises ValueError for what autocast has not, PrecisionUnavailableError for what the device has
    not.
    """
    plain = (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16)
    if str(precision).strip().lower() != "auto" and PrecisionMode.parse(precision) not in plain:
        raise ValueError(f"autocast computes in fp16, bf16, fp32 or auto, not {precision}")
    mode = _mode(precision, device)
    if mode is PrecisionMode.FP32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=mode.torch_dtype)


@torch.inference_mode()
def optimized_inference(model: nn.Module, x: Any, precision: PrecisionMode | str = "fp16") -> Any:
    """Run a model once for its output alone, in evaluation mode, under autocast.

    Parameters keep their dtype (`MixedPrecisionWrapper` casts them for real). The caches of CUDA's
    allocator stay: emptying them before each call makes it slower, not smaller.

    Args:
        model: Its mode, training or evaluation, is put back.
        x: A tensor, moved to the model's device, or a tuple of arguments.
        precision: "fp16", "bf16", "fp32", or "auto" for what the device is best at.

    Raises ValueError for another precision, PrecisionUnavailableError for one that the device
    lacks.
    """
    device = _device_of(model)
    args = x if isinstance(x, tuple) else (x,)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with autocast_for(precision, device):
            return model(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
    finally:
        for module, training in modes:
            module.training = training


def async_inference(
    model: Callable[[Tensor], Tensor],
    stream: Iterable[Tensor],
    *,
    device: str | torch.device | None = None,
    depth: int = 2,
) -> list[Tensor]:
    """Run a model over a stream of batches while the next ones are made and copied.

    A thread takes batches from `stream`; on CUDA it pins them and copies them on a stream of its
    own, and results go to pinned host memory on another, each ordered by events. Results come in
    the order of their batches, on the host for a CUDA model.

    Args:
        model: Called with one batch at a time, without gradients.
        stream: Batches; may be empty.
        device: Where the model is; None asks its parameters.
        depth: Batches made ahead.

    An exception of the stream or the model is raised here; the thread has ended by then.
    """
    if depth < 1:
        raise ValueError(f"depth is 1 or more, not {depth}")
    if device is None:
        device = _device_of(model) if isinstance(model, nn.Module) else "cpu"
    device = torch.device(device)
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    returns = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item: Any) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.05)
                return True
        return False

    def produce() -> None:
        try:
            for batch in stream:
                if not put((_sent(batch, device, copies), None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=produce, name="vramkit-async-inference", daemon=True)
    thread.start()
    results: list[Tensor] = []
    try:
        with torch.inference_mode():
            for batch, event in _taken(ready):
                if event is not None:
                    torch.cuda.current_stream(device).wait_event(event)
                    batch.record_stream(torch.cuda.current_stream(device))
                results.append(_returned(model(batch), returns))
    finally:
        stop.set()
        thread.join()
    if copies is not None:
        torch.cuda.synchronize(device)
    return results


def _taken(ready: queue.Queue[Any]) -> Iterator[tuple[Tensor, Any]]:
    while True:
        item, error = ready.get()
        if error is not None:
            raise error
        if item is None:
            return
        yield item


def _sent(batch: Tensor, device: torch.device, copies: Any) -> tuple[Tensor, Any]:
    if copies is None:
        return batch, None
    with torch.cuda.stream(copies):
        there = batch.pin_memory().to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return there, event


def _returned(result: Tensor, returns: Any) -> Tensor:
    if result.device.type != "cuda":
        return result
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    returns.wait_stream(torch.cuda.current_stream(result.device))
    with torch.cuda.stream(returns):
        host.copy_(result, non_blocking=True)
        result.record_stream(returns)
    return host
