"""Offloading switched on and off: from a model and a limit to a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import _core
from ..errors import BudgetError
from ..estimator import weight_bytes
from ..probing import cache_folder
from ..sizes import format_size, parse_size
from .blocks import Division, divide, touches_of
from .session import Lent, OffloadSession
from .store import BlockStore

SLOTS, DEPTH, THREADS = 3, 1, 2
# Below this much to move, memory is counted in small pages: large ones would be most of the limit.
SMALL = 256 << 20


def enable_vram_management(
    model: nn.Module,
    vram_limit: int | float | str,
    vram_buffer: int | float | str = 0,
    *,
    inputs: Any = None,
    folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Keep at most `vram_limit` of the model's weights in memory; the rest is read when needed.

    Args:
        model: A module on the CPU, plain or converted; returned, and changed in place.
        vram_limit: Bounds the weights in memory: a number of GiB, or text such as "6 GB".
        vram_buffer: Kept free within the limit.
        inputs: One call's inputs (or their shapes, as for `vramkit.estimate`), from which is seen
            which weights a call uses, and in what order. Without, the first call's inputs serve.
        folder: Where the weights are written, on a disk (by default the user's cache folder).

    The weights are written to one file, which goes with the session, and read from it block by
    block, ahead of need, past the page cache where the file is not in it. The limit bounds weights:
    a call's own memory comes on top. ``model.vramkit_session`` has `stats`, `resize`, `disable`.

    The parameters stay parameters and can be read, copied, saved and changed at any time. Raises
    BudgetError, which says the smallest limit that would do, and ValueError where a call cannot be
    followed on fake tensors; the model is as it was then.
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("offloading moves weights of models on the CPU only, so far")
    if getattr(model, "vramkit_session", None) is not None:
        raise ValueError("this model is offloaded already; model.vramkit_session.disable() first")
    room = parse_size(vram_limit) - parse_size(vram_buffer)
    where = os.fspath(folder) if folder is not None else str(cache_folder() / "blocks")
    if inputs is not None:
        start(model, divide(model, touches_of(model, inputs)), room, where)
        return model

    def around(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        from ..first_run import by_name

        given = by_name(model, args, kwargs)
        del model.__dict__["forward"]
        start(model, divide(model, touches_of(model, given)), room, where)
        return inner(*args, **kwargs)

    model.__dict__["forward"] = Lent(model, around)
    return model


def start(model: nn.Module, division: Division, room: int, folder: str) -> OffloadSession:
    """Move the blocks to a file and set up the session within `room` bytes."""
    moved = sum(block.nbytes for block in division.blocks)
    fixed = weight_bytes(model) - moved
    if not division.blocks:
        raise ValueError(
            "nothing of this model can be moved: its weights are used by the model itself, beside "
            "its modules"
        )
    store = BlockStore(model, division.blocks, folder)

    def make_engine() -> _core.Engine:
        source = _core.FileSource(str(store.path))
        blocks = [
            _core.BlockSpec(", ".join(block.entries), size, [_core.Extent(0, at, 0, size)])
            for block, at, size in zip(division.blocks, store.starts, store.sizes, strict=True)
        ]
        return _core.Engine(
            [source],
            blocks,
            limit=max(0, room - fixed),
            order=division.order,
            depth=DEPTH,
            slots=SLOTS,
            threads=THREADS,
            granularity=4096 if moved < SMALL else 2 << 20,
        )

    try:
        session = OffloadSession(model, division, store, make_engine)
    except BudgetError as error:
        store.release()
        needed = error.needed_bytes + fixed
        raise BudgetError(
            f"no room for the slots within {format_size(room)}: the smallest limit that would do "
            f"is {format_size(needed)} ({needed} B, and the buffer), of which {format_size(fixed)} "
            "always stay in memory",
            needed,
        ) from None
    except BaseException:
        store.release()
        raise
    object.__setattr__(model, "vramkit_session", session)
    return session
