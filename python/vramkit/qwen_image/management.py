"""`enable_vram_management` with DiffSynth's arguments, for either kind of pipeline.

The engine is that of `vramkit.enable_vram_management`; here are the arguments that it does not
have, checked before anything moves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..convert import Progress
from ..errors import BudgetError
from ..offload.homes import LARGE_PAGE, SMALL
from ..offload.places import PAGE
from ..sizes import format_size, parse_size
from .fp8_compute import Fp8Compute, enable_fp8_computation, switch_back
from .parts import Parts, blocks_of, bytes_of, parts_of

# Blocks are this part of the room at most, so that two are there while a third is on its way.
_SHARE, _LEAST_BLOCKS = 3, 12
# Tensors of a block begin at multiples of 64, its runs where they lie within a page.
_PADDING = 8192


@dataclass(frozen=True)
class Management:
    """What `enable_vram_management` set up; kept with the pipeline as `vramkit_management`.

    Attributes:
        limit_bytes: None where no limit was given: all the memory there is.
        offloads: Whether components take turns and stream; else all stays in memory.
        stay: Components that stay in memory whole while others take turns.
        persistent_parameters: Of the transformer, those that stay for its turn; None: by room.
        fp8: What became of `enable_dit_fp8_computation`; None where it was not asked for.
    """

    limit_bytes: int | None
    buffer_bytes: int
    offloads: bool
    stay: tuple[str, ...]
    persistent_parameters: int | None
    fp8: Fp8Compute | None


def enable_vram_management(
    pipeline: Any,
    vram_limit: int | float | str | None = None,
    vram_buffer: int | float | str = 0.5,
    auto_offload: bool = True,
    enable_dit_fp8_computation: bool = False,
    num_persistent_param_in_dit: int | None = None,
    *,
    stay: Collection[str] = ("vae",),
    folder: str | os.PathLike[str] | None = None,
    pressure: bool | Callable[[Any], None] = True,
    progress: bool | Progress = False,
) -> Any:
    """Keep a Qwen-Image pipeline's weights within a limit; returns the pipeline.

    Args:
        pipeline: Of diffusers or DiffSynth, with its modules on the CPU, plain or converted.
        vram_limit: A hard bound, with `vram_buffer` off it: GiB as numbers, or text such as
            "10 GB". None: all the memory there is.
        vram_buffer: Kept free within the limit.
        auto_offload: Components take turns and are read block by block as they are needed. False:
            all stays in memory, and has to fit.
        enable_dit_fp8_computation: Products of the transformer's FP8 layers in FP8, where the
            hardware has it; elsewhere a warning, and products as before.
        num_persistent_param_in_dit: How many of the transformer's parameters stay in memory for
            its turn: whole blocks, evenly spread. None: as many as the limit has room for.
        stay: Components that stay in memory whole.
        folder, pressure, progress: As for `vramkit.enable_vram_management`.

    Raises BudgetError, with the bytes that would do and nothing changed, for a limit that is not
    above the buffer, that is below what always stays and the largest block, or below everything
    where nothing may move. ValueError for a pipeline that is managed already.
    """
    parts = parts_of(pipeline)
    if getattr(pipeline, "vramkit_session", None) is not None:
        raise ValueError("this pipeline is managed already; call disable_vram_management first")
    components = parts.components
    limit = None if vram_limit is None else parse_size(vram_limit)
    buffer = parse_size(vram_buffer)
    known = set(stay) & set(components)
    persistent = _count(num_persistent_param_in_dit)
    fixed = sum(bytes_of(components[name]) for name in known)
    moved = {name: module for name, module in components.items() if name not in known}
    if limit is not None and limit <= buffer:
        raise BudgetError(
            f"a limit of {format_size(limit)} leaves nothing beside a buffer of "
            f"{format_size(buffer)}: give a limit of more than "
            f"{format_size(buffer + fixed + least_room(moved.values()))}",
            buffer + fixed + least_room(moved.values()),
        )
    if not auto_offload:
        _check_whole(components, limit, buffer)
        compute = enable_fp8_computation(parts.transformer) if enable_dit_fp8_computation else None
        _note(pipeline, Management(limit, buffer, False, tuple(components), persistent, compute))
        return pipeline
    if limit is not None:
        needed = buffer + fixed + least_room(moved.values())
        if limit < needed:
            raise BudgetError(
                f"{format_size(limit)} hold no block: {format_size(fixed)} always stay in memory, "
                f"the largest block takes {format_size(least_room(moved.values()))} and "
                f"{format_size(buffer)} are buffer; the smallest limit that would do is "
                f"{format_size(needed)} ({needed} B)",
                needed,
            )
    room = None if limit is None else limit - buffer - fixed
    places: dict[str, tuple[int, set[int] | None, tuple[int, ...]]]
    places = {name: (_cap(module, room), None, ()) for name, module in moved.items()}
    if persistent is not None:
        places[parts.name] = _with_persistent(parts, places[parts.name][0], persistent)
    # Before the engine takes hold of the layers' forwards.
    compute = enable_fp8_computation(parts.transformer) if enable_dit_fp8_computation else None
    try:
        _start(pipeline, components, limit, buffer, places, known, folder, pressure, progress)
    except BaseException:
        switch_back(parts.transformer)
        raise
    stays = tuple(name for name in components if name in known)
    _note(pipeline, Management(limit, buffer, True, stays, persistent, compute))
    return pipeline


def disable_vram_management(pipeline: Any) -> None:
    """The pipeline as it was before: all in memory, products in the activations' dtype."""
    session = getattr(pipeline, "vramkit_session", None)
    if session is not None:
        session.disable()
    switch_back(parts_of(pipeline).transformer)
    _note(pipeline, None)


def _note(pipeline: Any, management: Management | None) -> None:
    object.__setattr__(pipeline, "vramkit_management", management)


def _start(
    pipeline: Any,
    components: dict[str, nn.Module],
    limit: int | None,
    buffer: int,
    places: dict[str, Any],
    stay: Collection[str],
    folder: str | os.PathLike[str] | None,
    pressure: bool | Callable[[Any], None],
    progress: bool | Progress,
) -> None:
    from ..offload.device import HOST
    from ..offload.manage import Settings, available, enable_pipeline
    from ..probing import cache_folder

    where = os.fspath(folder) if folder is not None else str(cache_folder() / "blocks")
    settings = Settings(
        available(HOST) if limit is None else limit, buffer, where, pressure, progress=progress
    )
    enable_pipeline(pipeline, components, settings, None, stay, places)


def _count(number: int | None) -> int | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != int(number):
        raise TypeError(f"num_persistent_param_in_dit is a whole number, not {number!r}")
    if number < 0:
        raise ValueError(f"num_persistent_param_in_dit must not be negative, got {number}")
    return int(number)


def _check_whole(components: dict[str, nn.Module], limit: int | None, buffer: int) -> None:
    total = sum(bytes_of(module) for module in components.values())
    if limit is not None and total > limit - buffer:
        sizes = ", ".join(f"{n} {format_size(bytes_of(m))}" for n, m in components.items())
        raise BudgetError(
            f"without auto_offload all components stay in memory: {sizes}; with the buffer they "
            f"need {format_size(total + buffer)}, the limit is {format_size(limit)}",
            total + buffer,
        )


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest transformer block, or of the largest layer where there are none."""
    blocks = blocks_of(module) or _layers_of(module)
    return max((bytes_of(block) for block in blocks), default=0)


def _layers_of(module: nn.Module) -> list[nn.Module]:
    """The longest list of like modules in it, else its modules without children."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if lists:
        return max(lists, key=lambda found: sum(bytes_of(m) for m in found))
    return [m for m in module.modules() if next(m.children(), None) is None]


def least_room(moved: Iterable[nn.Module]) -> int:
    """What the largest block of these takes in whole pages, with what pads it."""
    modules = list(moved)
    total = sum(bytes_of(module) for module in modules)
    page = PAGE if total < SMALL else LARGE_PAGE
    largest = max((largest_block(module) for module in modules), default=0)
    return -(-(largest + _PADDING) // page) * page + page


def _cap(module: nn.Module, room: int | None) -> int:
    """The most bytes of a block: a third of the room, but no less than the largest layer block."""
    total = -(-bytes_of(module) // _LEAST_BLOCKS)
    least = largest_block(module)
    return max(least, total if room is None else min(total, room // _SHARE))


def _with_persistent(parts: Parts, cap: int, count: int) -> tuple[int, set[int], tuple[int, ...]]:
    """Which of the transformer's parameters stream: all but whole blocks of `count` in all."""
    blocks = blocks_of(parts.transformer)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    kept = 0
    while kept < len(blocks) and sum(sizes[i] for i in _spread(kept + 1, len(blocks))) <= count:
        kept += 1
    chosen = _spread(kept, len(blocks))
    staying = {id(p) for i in chosen for p in blocks[i].parameters()}
    streamed = {id(p) for p in parts.transformer.parameters() if id(p) not in staying}
    return cap, streamed, ()


def _spread(count: int, among: int) -> list[int]:
    """`count` numbers below `among`, evenly spread."""
    return sorted({i * among // count for i in range(count)}) if count else []
