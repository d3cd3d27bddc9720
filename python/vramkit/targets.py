"""For which device an estimate is made, and which kernels run there.

Tracing happens on fake tensors of the CPU whatever the target, so that no device is needed. What
differs is decided here, by capabilities.py: which attention kernel a CUDA device takes. Source:
torch's sdp_utils.cpp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .capabilities import by_capability, explain

if TYPE_CHECKING:
    from .recorder import Recorder

_DEFAULT_CAPABILITY = (8, 0)
_FLASH_HEAD = 256  # the widest head that flash attention takes
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Target:
    """A device to predict for.

    Attributes:
        kind: "cpu" or "cuda".
        capability: Compute capability (major, minor) of a CUDA device.
        flash: Whether flash attention runs there.
        efficient: Whether memory-efficient attention runs there.
        blas_bytes: What cuBLAS takes once for its workspace.
        assumed: Whether the capability was given or assumed.
    """

    kind: str = "cpu"
    capability: tuple[int, int] | None = None
    flash: bool = False
    efficient: bool = False
    blas_bytes: int = 0
    assumed: bool = False
    used: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `parse_target` reads it."""
        if self.capability is None:
            return self.kind
        return f"{self.kind}:{self.capability[0]}.{self.capability[1]}"

    def notes(self) -> list[str]:
        """What an estimate for this target assumes."""
        if self.kind == "cpu":
            return []
        lines = [
            f"predicted for {self.name}{' (assumed)' if self.assumed else ''} from rules; nothing "
            "was measured on CUDA",
            f"cuBLAS' workspace of {self.blas_bytes} bytes is taken once and not counted; cuDNN's "
            "workspaces and recurrent layers' reserve space are not known without the device",
        ]
        if self.capability is not None:
            lines.append(f"{explain(self.capability)}; other formats are decoded for their product")
        if self.used:
            kernels = ", ".join(f"{name} ({n} calls)" for name, n in sorted(self.used.items()))
            lines.append(f"attention kernels assumed: {kernels}")
        return lines

    def choose(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
        """The kernel that scaled_dot_product_attention takes: flash, efficient or math."""
        four = query.dim() == key.dim() == value.dim() == 4
        same_head = query.shape[-1] == key.shape[-1] == value.shape[-1]
        half = query.dtype in _HALF
        fits = four and same_head and query.shape[-1] <= _FLASH_HEAD
        if self.flash and half and fits and mask is None:
            return "flash"
        if self.efficient and four and query.dtype in (*_HALF, torch.float32):
            return "efficient"
        return "math"

    @contextlib.contextmanager
    def attention(self, recorder: Recorder) -> Iterator[None]:
        """Within it, scaled_dot_product_attention allocates what the target's kernel does."""
        if self.kind == "cpu":
            yield
            return
        self.used.clear()
        with _attention_mode(self):
            yield


def _attention_mode(target: Target) -> Any:
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is torch.nn.functional.scaled_dot_product_attention:
                return _attention(target, *args, **kwargs)
            return func(*args, **kwargs)

    return Mode()


def _attention(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    chosen = target.choose(query, key, value, attn_mask)
    target.used[chosen] = target.used.get(chosen, 0) + 1
    if chosen == "math":
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    if enable_gqa and chosen == "efficient":
        # This kernel knows no groups of heads: keys and values are repeated.
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    batch, heads, length, _ = query.shape
    if chosen == "flash" and query.shape[-1] % 8:
        wider = 8 - query.shape[-1] % 8
        query, key, value = (torch.nn.functional.pad(t, (0, wider)) for t in (query, key, value))
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    # Kept by the forward kernel for a backward pass, though none comes.
    if chosen == "flash":
        query.new_empty((batch, heads, length), dtype=torch.float32)
    elif attn_mask is not None and attn_mask.shape[-1] % 8:
        attn_mask = torch.nn.functional.pad(attn_mask, (0, 8 - attn_mask.shape[-1] % 8))
    return out


def parse_target(text: str | Target | None) -> Target:
    """A target from "cpu", "cuda" or "cuda:8.9"; ValueError for anything else.

    "cuda" is this machine's own device if it has one, else capability 8.0, and then said so.
    """
    if isinstance(text, Target):
        return text
    if text is None or text == "cpu":
        return Target()
    kind, _, number = str(text).partition(":")
    if kind != "cuda":
        raise ValueError(f"target {text!r} is not known; it is 'cpu', 'cuda' or such as 'cuda:8.9'")
    assumed = False
    if number:
        major, dot, minor = number.partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            raise ValueError(
                f"target {text!r}: after 'cuda:' comes a compute capability such as 8.9, not a "
                "device's number"
            )
        capability = (int(major), int(minor))
    elif torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    else:
        capability, assumed = _DEFAULT_CAPABILITY, True
    try:
        row = by_capability(capability)
    except ValueError as error:
        raise ValueError(f"target {text!r}: {error}") from None
    return Target(
        "cuda",
        capability,
        row.flash_attention,
        row.efficient_attention,
        row.blas_workspace_bytes,
        assumed,
    )
