"""FP8 attention, switched on for a model: `enable_fp8_attention`.

While a module that it is switched on for runs its forward, calls of torch's
scaled_dot_product_attention pass through here: diffusers', transformers' and anybody's own. Each
call of a forward is a site. On a site's first calls the FP8 result is held against exact attention
on the real inputs, and the time of both is taken; a site whose error is above the bound, or that
gains nothing, has exact attention from then on. What cannot be done in FP8 calls torch's function
as it was, so that its bits are the same. The arithmetic is in _fp8_attention.py.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._fp8_attention import Call, Product, attend, emulated_product, sampled_error, scaled_product
from .capabilities import explain, multiplies

# Relative L2 error of a site's output; docs/attention.md has what real models show.
ERROR_BOUND = 0.15
# Sites are measured on this many of their calls, on so many heads and rows of each.
CHECKED_CALLS, CHECKED_HEADS, CHECKED_ROWS = 2, 4, 64
# Below so many queries or keys a call is too small to gain; a step of generation has one query.
LEAST_LENGTH = 64
_BACKENDS = ("auto", "emulate")
_KEY = "_vramkit_fp8_attention"
_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass
class AttentionSite:
    """One call of attention in a forward, counted from 0.

    Attributes:
        index: Which one, in the order of calls.
        shape: Of the query at its last call.
        fp8_calls: Calls in FP8 so far.
        exact_calls: Calls of torch's function so far.
        error: Largest measured relative L2 error; None before the first measurement.
        speedup: Exact attention's time over FP8's at the last measurement; None where time does
            not count (`backend="emulate"`) or has not been taken.
        reason: Why it is exact from now on; empty where it is not.
    """

    index: int
    shape: tuple[int, ...] = ()
    fp8_calls: int = 0
    exact_calls: int = 0
    error: float | None = None
    speedup: float | None = None
    reason: str = ""
    checked: int = 0


@dataclass
class Fp8Attention:
    """What `enable_fp8_attention` switched on for one module, and what came of it.

    Attributes:
        backend: "auto" or "emulate".
        error_bound: Largest relative L2 error of a site.
        check_calls: On how many calls a site is measured.
        least_length: Fewer queries or keys than this stay exact.
        sites: What each call of attention in a forward does.
        exact: Why single calls were exact, with their numbers.
        warning: The warning that was given; empty where there was none.
    """

    backend: str = "auto"
    error_bound: float = ERROR_BOUND
    check_calls: int = CHECKED_CALLS
    least_length: int = LEAST_LENGTH
    sites: list[AttentionSite] = field(default_factory=list)
    exact: Counter[str] = field(default_factory=Counter)
    warning: str = ""

    @property
    def fp8_calls(self) -> int:
        """Calls that ran in FP8 so far."""
        return sum(site.fp8_calls for site in self.sites)

    @property
    def exact_calls(self) -> int:
        """Calls that ran exactly so far."""
        return sum(site.exact_calls for site in self.sites)

    @property
    def error(self) -> float | None:
        """The largest error that any site in FP8 showed; None where none was measured."""
        shown = [s.error for s in self.sites if s.error is not None and not s.reason]
        return max(shown, default=None)

    def report(self) -> dict[str, Any]:
        """All of it as data."""
        return {
            "backend": self.backend,
            "error_bound": self.error_bound,
            "fp8_calls": self.fp8_calls,
            "exact_calls": self.exact_calls,
            "error": self.error,
            "exact": dict(self.exact),
            "warning": self.warning,
            "sites": [asdict(site) for site in self.sites],
        }

    def warn(self, text: str) -> None:
        """Warn, once for this module."""
        if not self.warning:
            self.warning = text
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def fresh(self) -> Fp8Attention:
        """The same settings with nothing seen yet: for a copy of the module."""
        return Fp8Attention(self.backend, self.error_bound, self.check_calls, self.least_length)


class _Switch:
    """The hooks of one module, kept in its attribute `_KEY`; a copy of the module has its own."""

    def __init__(self, state: Fp8Attention) -> None:
        self.state = state
        self._entered = threading.local()

    def attach(self, module: nn.Module, *, idle: bool) -> None:
        """Put this on a module; `idle` without hooks, which some modules take slower ways by."""
        module.__dict__[_KEY] = self
        if not idle:
            module.register_forward_pre_hook(self.enter, prepend=True)
            # always_call: an exception in the forward leaves the mode too.
            module.register_forward_hook(self.leave, always_call=True)

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Take it off, by what hooks are: those of a copied module have no handles."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _Switch):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        del module.__dict__[_KEY]

    def enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        mode = _Mode(self.state)
        stack = self._entered.__dict__.setdefault("modes", [])
        mode.__enter__()
        stack.append(mode)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.state.exact["compiled"] += 1
            self.state.warn("compiled code keeps exact attention: FP8 attention is not traced")
            return
        stack = self._entered.__dict__.get("modes")
        if not stack:  # an earlier hook failed before this one entered
            return
        mode = stack.pop()
        mode.__exit__(None, None, None)
        if not mode.calls and output is not None:
            self.state.warn(
                "this module's forward called no scaled_dot_product_attention, so there is nothing "
                "to do in FP8; load transformers' models with attn_implementation='sdpa'"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Switch:
        return _Switch(self.state.fresh())

    def __reduce__(self) -> Any:
        return _Switch, (self.state.fresh(),)


class _Mode(TorchFunctionMode):
    """One forward: counts its calls of attention and decides each."""

    def __init__(self, state: Fp8Attention) -> None:
        super().__init__()
        self.state, self.calls = state, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _sdpa:
            return func(*args, **kwargs)
        index, self.calls = self.calls, self.calls + 1
        sites = self.state.sites
        while len(sites) <= index:
            sites.append(AttentionSite(len(sites)))
        return _decide(self.state, sites[index], *args, **kwargs)


def _decide(
    state: Fp8Attention,
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One call of attention, in FP8 where it may be."""
    site.shape = tuple(query.shape)

    def exactly() -> Tensor:
        made: Tensor = _sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return made

    def exact(why: str) -> Tensor:
        site.exact_calls += 1
        state.exact[why] += 1
        return exactly()

    if site.reason:
        return exact(site.reason)
    why = _unfit(state, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if why:
        return exact(why)
    product = _product_for(state, query.device)
    if product is None:
        state.warn(no_hardware(query.device))
        return exact("no FP8 matrix units")
    width = query.shape[-1]
    call = Call(
        _four(query),
        _four(key),
        _four(value),
        attn_mask,
        is_causal,
        1.0 / math.sqrt(width) if scale is None else float(scale),
    )
    with torch.no_grad():
        if site.checked >= state.check_calls:
            site.fp8_calls += 1
            return attend(call, product).reshape(*query.shape[:-1], value.shape[-1])
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return exact("not measured before a graph was captured")
        return _measured(state, site, call, product, exactly, exact)


def _measured(
    state: Fp8Attention,
    site: AttentionSite,
    call: Call,
    product: Product,
    exactly: Callable[[], Tensor],
    exact: Callable[[str], Tensor],
) -> Tensor:
    """One of a site's first calls: its FP8 result if it holds, and whether it will go on so."""
    made = attend(call, product)
    error = sampled_error(call, made, CHECKED_HEADS, CHECKED_ROWS)
    site.error = error if site.error is None else max(site.error, error)
    site.checked += 1
    if not error <= state.error_bound:  # NaN too
        site.reason = "error above the bound"
        state.warn(
            f"FP8 attention differs by {error:.3g} (relative L2) from exact attention at call "
            f"{site.index} of a forward, more than error_bound={state.error_bound:g}: such calls "
            "are exact from now on (Fp8Attention.report() has each)"
        )
        return exact(site.reason)
    if state.backend == "auto":
        site.speedup = _seconds(exactly, call.query) / _seconds(
            lambda: attend(call, product), call.query
        )
        if not site.speedup > 1.0:
            site.reason = "no faster in FP8"
            state.warn(
                f"FP8 attention takes {1 / max(site.speedup, 1e-9):.3g} times the time of exact "
                f"attention at call {site.index} of a forward ({list(call.query.shape)}): such "
                "calls are exact from now on (Fp8Attention.report() has each)"
            )
            return exact(site.reason)
    site.fp8_calls += 1
    shape = (*site.shape[:-1], call.value.shape[-1])
    return made.reshape(shape)


def _unfit(
    state: Fp8Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    gqa: bool,
) -> str:
    """Why a call is none for FP8; empty where it is one."""
    tensors = [t for t in (query, key, value, mask) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_nested or t.is_meta for t in tensors):
        return "traced, nested or a tensor subclass"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients"
    if dropout:
        return "dropout"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "dtype"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return "shape"
    if min(query.shape[-2], key.shape[-2]) < max(1, state.least_length) or not query.numel():
        return "short"
    q, k, v = _four(query), _four(key), _four(value)
    heads = q.shape[1] if gqa else k.shape[1]
    if (
        q.shape[0] != k.shape[0]
        or k.shape[:3] != v.shape[:3]
        or q.shape[-1] != k.shape[-1]
        or q.shape[1] != heads
        or (gqa and heads % k.shape[1])
        or (mask is not None and (causal or mask.dim() > 4 or (mask.dim() > 2 and q is not query)))
    ):
        return "shape"  # broadcast, or an error that torch's own function raises
    return ""


def _four(tensor: Tensor) -> Tensor:
    """[batch, heads, length, width] of a tensor that may lack its heads."""
    return tensor if tensor.dim() == 4 else tensor.unsqueeze(1)


def _product_for(state: Fp8Attention, device: torch.device) -> Product | None:
    if state.backend == "emulate":
        return emulated_product
    return scaled_product if multiplies(device, "fp8") else None


def _seconds(work: Callable[[], Tensor], like: Tensor) -> float:
    """Seconds of one call, after one to warm up."""
    work()
    if not like.is_cuda:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def no_hardware(device: torch.device) -> str:
    """What the warning says where a device has no FP8 matrix units."""
    if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
        where = explain(torch.cuda.get_device_capability(device))
    else:
        where = f"this model runs on {device.type}"
    return (
        f"FP8 attention needs a CUDA device of capability 8.9 or later, and {where}: attention "
        "stays exact (backend='emulate' rounds as FP8 would, to measure quality, slowly)"
    )


def enable_fp8_attention(
    module_or_pipeline: Any,
    *,
    backend: str = "auto",
    error_bound: float = ERROR_BOUND,
    check_calls: int = CHECKED_CALLS,
    least_length: int = LEAST_LENGTH,
) -> dict[str, Fp8Attention]:
    """Compute attention in FP8 where the hardware has it and a measured error holds.

    Args:
        module_or_pipeline: A module, or any object that holds modules; each is switched on for its
            own forward (a pipeline's VAE, whose decode is another method, stays exact).
        backend: "auto": FP8 matrix units of CUDA devices from capability 8.9 on, else exact
            attention with one warning. "emulate": the same rounding on any device, decoded and
            multiplied in float32: slow, for measuring quality.
        error_bound: Largest relative L2 error of one call's output against exact attention, on a
            sample of heads and rows of real inputs. Calls that exceed it are exact from then on.
        check_calls: On how many calls each place in the forward is measured (these wait for the
            device; later ones do not).
        least_length: Calls with fewer queries or keys stay exact.

    Returns what was switched on, by the name of the module ("" for a module given itself): see
    `Fp8Attention` for what runs, its errors and the reasons of what does not. Masks, causal
    attention, `scale` and grouped heads are taken; dropout, gradients, compiled code and tensor
    subclasses keep torch's function, and so its bits. Each module warns at most once. Enabling
    again starts anew; `disable_fp8_attention` takes it back.

    Raises TypeError where there is no module, ValueError for an unknown backend or bad number.

    >>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     state = enable_fp8_attention(model)[""]
    >>> state.backend, disable_fp8_attention(model)
    ('auto', 1)
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend is one of {', '.join(_BACKENDS)}, not {backend!r}")
    if not error_bound > 0:
        raise ValueError(f"error_bound is a positive number, got {error_bound}")
    if check_calls < 1 or least_length < 1:
        raise ValueError(
            f"check_calls and least_length are 1 or more, got {check_calls} and {least_length}"
        )
    modules = _modules_of(module_or_pipeline)
    if not modules:
        raise TypeError(
            f"FP8 attention is switched on for modules, and {type(module_or_pipeline).__name__} "
            "holds none"
        )
    disable_fp8_attention(module_or_pipeline)
    made = {}
    idle = backend == "auto" and not _any_fp8()
    for name, module in modules.items():
        state = Fp8Attention(backend, error_bound, check_calls, least_length)
        _Switch(state).attach(module, idle=idle)
        made[name] = state
    if idle:
        # No device here will ever do; one warning stands for all modules.
        first = next(iter(made.values()))
        first.warn(no_hardware(_device_of(next(iter(modules.values())))))
        for state in made.values():
            state.warning = first.warning
    return made


def disable_fp8_attention(module_or_pipeline: Any) -> int:
    """Take `enable_fp8_attention` back; returns of how many modules. Others are left alone."""
    count = 0
    for module in _modules_of(module_or_pipeline).values():
        if _KEY in module.__dict__:
            _Switch.detach(module)
            count += 1
    return count


def fp8_attention_of(module_or_pipeline: Any) -> dict[str, Fp8Attention]:
    """What is switched on, by the name of the module; empty where nothing is."""
    return {
        name: module.__dict__[_KEY].state
        for name, module in _modules_of(module_or_pipeline).items()
        if _KEY in module.__dict__
    }


def _modules_of(obj: Any) -> dict[str, nn.Module]:
    """Modules by name: a module itself under "", those of other objects by their attribute."""
    from .model_objects import find_modules

    if isinstance(obj, nn.Module):
        return {"": obj}
    names = {id(value): name for name, value in getattr(obj, "__dict__", {}).items()}
    found: dict[str, nn.Module] = {}
    for index, module in enumerate(find_modules(obj)):
        found[names.get(id(module), f"{type(module).__name__}_{index}")] = module
    return found


def _any_fp8() -> bool:
    """Whether any device of this machine has FP8 matrix units."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return any(
        multiplies(torch.device("cuda", index), "fp8") for index in range(torch.cuda.device_count())
    )


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
