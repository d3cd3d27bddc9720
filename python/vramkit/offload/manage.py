"""Offloading switched on and off: from a model and a limit to a session."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import nn

from .. import _core
from ..errors import BudgetError
from ..estimator import weight_bytes
from ..first_run import by_name
from ..probing import cache_folder
from ..sizes import format_size, parse_size
from .blocks import Division, divide, touches_of
from .lent import Lent, Uncompiled, not_a_graph
from .session import OffloadSession
from .store import BlockStore

SLOTS, DEPTH, THREADS = 3, 1, 2
# Below this much to move, memory is counted in small pages: large ones would be most of the limit.
SMALL = 256 << 20


def enable_vram_management(
    model: nn.Module,
    vram_limit: int | float | str | None = None,
    vram_buffer: int | float | str = 0.5,
    *,
    inputs: Any = None,
    folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Keep at most `vram_limit` of the model's weights in memory; the rest is read when needed.

    Args:
        model: A module on the CPU, plain or converted; changed in place, and returned.
        vram_limit: Bounds the weights in memory: a number of GiB, or text such as "6 GB". None: all
            the memory that is available now.
        vram_buffer: Kept free within the limit.
        inputs: One call's inputs (or their shapes, as for `vramkit.estimate`), from which is seen
            which weights a call uses, and in what order. Without, the first call's inputs serve.
        folder: Where the weights are written, on a disk (by default the user's cache folder).

    The weights are written to one file, which goes with the session, and read from it block by
    block, ahead of need, past the page cache where the file is not in it. The limit bounds weights:
    a call's own memory comes on top. ``model.vramkit_session`` has `stats`, `resize`, `disable`.

    The parameters stay parameters, views of the file: they can be read, copied, saved and changed
    at any time. Raises BudgetError, which says the smallest limit that would do; ValueError where
    a call cannot be followed on fake tensors, for models on other devices, and where nothing can be
    moved; OSError where the file cannot be written. The model is as it was then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"offloading takes a module, not {type(model).__name__}")
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("only models on the CPU can be offloaded so far (docs/gpu-status.md)")
    if getattr(model, "vramkit_session", None) is not None:
        raise ValueError("this model is offloaded already; model.vramkit_session.disable() first")
    buffer = parse_size(vram_buffer)
    limit = _available() if vram_limit is None else parse_size(vram_limit)
    where = os.fspath(folder) if folder is not None else str(cache_folder() / "blocks")
    if inputs is not None:
        start(model, divide(model, touches_of(model, inputs)), limit, buffer, where)
        return model

    first = threading.Lock()

    @not_a_graph
    def around(lent: Lent, args: Any, kwargs: Any) -> Any:
        with Uncompiled() as compiler:
            with first:
                if model.__dict__.get("forward") is lent:  # else another thread was faster
                    lent.end(for_good=False)
                    try:
                        touches = touches_of(model, by_name(model, args, kwargs))
                        start(model, divide(model, touches), limit, buffer, where)
                    except BaseException:
                        lent.begin()  # nothing runs whole unasked
                        raise
            return compiler.again(model.forward, args, kwargs)

    Lent(model, around)  # takes the place of the model's forward
    return model


def _available() -> int:
    """Bytes that this process may still take."""
    from ..doctor import available_memory

    found = available_memory()
    if found is None:
        raise ValueError("this system does not say what memory is available; give vram_limit")
    return found


@torch.inference_mode(False)  # what it makes lasts longer than a call
def start(
    model: nn.Module, division: Division, limit: int, buffer: int, folder: str
) -> OffloadSession:
    """Move the blocks to a file, and lend them from there within the limit."""
    if not division.blocks:
        raise ValueError(
            "nothing of this model can be moved: its weights are used by the model itself, beside "
            "its modules"
        )
    moved = sum(block.nbytes for block in division.blocks)
    fixed = weight_bytes(model) - moved
    store = BlockStore(model, division.blocks, folder)

    def make_engine(division: Division, store: BlockStore, room: int) -> _core.Engine:
        blocks = [
            _core.BlockSpec(", ".join(block.entries), size, [_core.Extent(0, at, 0, size)])
            for block, at, size in zip(division.blocks, store.starts, store.sizes, strict=True)
        ]
        return _core.Engine(
            [_core.FileSource(str(store.path))],
            blocks,
            limit=room,
            order=division.order,
            depth=DEPTH,
            slots=SLOTS,
            threads=THREADS,
            granularity=4096 if store.nbytes < SMALL else 2 << 20,
        )

    try:
        session = OffloadSession(
            model,
            division,
            store,
            make_engine,
            limit=limit,
            buffer_bytes=buffer,
            fixed_bytes=fixed,
        )
    except BudgetError as error:
        store.release()
        needed = error.needed_bytes + fixed + buffer
        raise BudgetError(
            f"no room for the slots within {format_size(limit)}: the smallest limit that would do "
            f"is {format_size(needed)} ({needed} B), of which {format_size(fixed)} always stay in "
            f"memory and {format_size(buffer)} are buffer",
            needed,
        ) from None
    except BaseException:
        store.release()
        raise
    object.__setattr__(model, "vramkit_session", session)
    return session
