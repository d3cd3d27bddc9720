"""PEFT's LoRA adapters on converted models, with a merge that is right and an exact unmerge.

Training an adapter needs nothing of this. PEFT's own merge writes to `.weight.data`, which a
converted layer refuses; after `register()` new adapters get LoRA layers that decode, add and encode
again. `vramkit.convert` calls it by itself where PEFT is already imported.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

_lock = threading.Lock()
_own: Any = None


def _lora() -> Any:
    try:
        import peft.tuners.lora.model as model
    except ImportError as error:
        raise ImportError(
            f"vramkit.interop.peft needs PEFT, which could not be imported ({error}); install it "
            "with: pip install peft"
        ) from error
    if not callable(getattr(model, "dispatch_default", None)):
        raise ImportError(
            "this version of PEFT chooses its LoRA layers in another way than vramkit knows; "
            "use vramkit.interop.peft.upgrade(model) after get_peft_model"
        )
    return model


def register() -> None:
    """From now on, LoRA adapters on converted layers are ones that can merge; idempotent.

    It takes the place of the last of PEFT's dispatchers (`peft.tuners.lora.model`), which still
    makes every layer; those over converted layers then become subclasses of what it made.
    """
    global _own
    with _lock:
        if _own is not None:
            return
        model = _lora()
        own = model.dispatch_default

        def dispatch(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            from ._peft_layers import upgrade

            made = own(target, adapter_name, *args, **kwargs)
            upgrade(made)
            return made

        _own, model.dispatch_default = own, dispatch


def unregister() -> None:
    """Give PEFT its own dispatcher back; adapters that were made meanwhile stay as they are."""
    global _own
    with _lock:
        if _own is not None:
            _lora().dispatch_default, _own = _own, None


def upgrade(model: nn.Module) -> int:
    """Do the same for a model whose adapters were made before `register()`, in place.

    Returns the number of adapters changed. Raises RuntimeError for one that is merged already,
    which cannot be over a converted layer unless vramkit.writable() was open.
    """
    _lora()
    from ..layers import QuantizedLayer
    from ._peft_layers import upgrade as upgrade_layer

    for name, module in model.named_modules():
        merged = bool(getattr(module, "merged_adapters", None))
        base = getattr(module, "base_layer", None)
        if merged and isinstance(base, QuantizedLayer) and not hasattr(module, "_backup"):
            raise RuntimeError(f"the adapters of {name!r} are merged: unmerge them first")
    return sum(upgrade_layer(module) for module in list(model.modules()))
