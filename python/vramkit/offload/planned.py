"""A plan carried out: what it streams moves to its tier, what takes turns takes turns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..candidates import Candidate
from ..convert import candidates
from ..layers import QuantizedLayer
from ..layers.base import PART_NAMES
from ..probing import cache_folder
from .blocks import Division, divide, touches_of
from .device import HOST, HostDevice
from .manage import (
    Settings,
    at_first_call,
    check_room,
    enable_pipeline,
    in_reach,
    inputs_on_host,
    on_the_host,
    start,
)

if TYPE_CHECKING:
    from ..plans import Plan


def tiers_of(plan: Plan, model: nn.Module, before: list[Candidate]) -> dict[str, str]:
    """The tier of every parameter that the plan streams.

    `model` is converted as planned; `before` are its candidates as they were before.
    """
    tiers = {e.name: e.tier for e in plan.entries if e.tier != "resident"}
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, str] = {}
    for candidate in before:
        tier = tiers.get(candidate.name)
        if tier is None:
            continue
        for user in candidate.users:
            module = model.get_submodule(user.name)
            if isinstance(module, QuantizedLayer) and user.leaf in module.stored_names:
                parts = [module.stored_part(user.leaf, part) for part in PART_NAMES]
                found |= {names[id(p)]: tier for p in parts if id(p) in names}
            elif candidate.folding is not None:
                found |= dict.fromkeys(candidate.source_names, tier)
            else:
                found[names[id(module._parameters[user.leaf])]] = tier
    return found


def settings_of(
    plan: Plan,
    tiers: Mapping[str, str],
    folder: str | os.PathLike[str] | None,
    device: HostDevice,
) -> Settings:
    """What the plan says of memory: its limit, and the calls' own memory as part of the buffer."""
    activations = max((phase.activations_bytes for phase in plan.phases), default=0)
    where = os.fspath(folder) if folder is not None else str(cache_folder() / "blocks")
    return Settings(
        plan.limit_bytes,
        plan.buffer_bytes + activations,
        where,
        slots=plan.slots,
        on_host=frozenset(name for name, tier in tiers.items() if tier == "host"),
        device=device,
    )


def divided(plan: Plan, model: nn.Module, inputs: Any, tiers: Mapping[str, str]) -> Division:
    """Blocks of what the plan streams, none larger than its slots where a module allows it."""
    names = (name for name, _ in model.named_parameters())
    stay = {name: "the plan keeps it in memory" for name in names if name not in tiers}
    return divide(model, touches_of(model, inputs), _cap(plan, ""), stay=stay, streamed=set(tiers))


def _cap(plan: Plan, component: str) -> int | None:
    sizes = [p.slot_bytes for p in plan.phases if p.name == component]
    return sizes[0] if sizes and sizes[0] else None


def check_reach(model: nn.Module, device: HostDevice, turns: bool) -> None:
    """ValueError for a model that is elsewhere."""
    in_reach(model, HOST if turns else device)


def check(plan: Plan, model: nn.Module, inputs: Any, device: HostDevice) -> Division:
    """The division of a model that is still to be converted; BudgetError if it does not fit.

    Nothing of the model is changed, or read.
    """
    from ..estimator import meta_copy

    with on_the_host(model, device):
        skeleton = meta_copy(model)
        before, _ = candidates(skeleton)
        plan.convert(skeleton)
        tiers = tiers_of(plan, skeleton, before)
        division = divided(plan, skeleton, inputs_on_host(inputs, device), tiers)
    check_room(skeleton, division, settings_of(plan, tiers, None, device))
    return division


def stream(
    plan: Plan,
    model: nn.Module,
    before: list[Candidate],
    inputs: Any,
    division: Division | None,
    folder: str | os.PathLike[str] | None,
    device: HostDevice,
) -> None:
    """Offload the converted model as the plan says; without a division at its first call."""
    tiers = tiers_of(plan, model, before)
    settings = settings_of(plan, tiers, folder, device)
    if len(plan.phases) > 1:
        components = {p.name: model.get_submodule(p.name) for p in plan.phases}
        parameters = dict(model.named_parameters())
        streamed = {id(parameters[name]) for name in tiers}
        by_id = {id(parameters[name]) for name in settings.on_host or ()}
        places = {name: (_cap(plan, name), streamed, by_id) for name in components}
        enable_pipeline(model, components, settings, inputs, (), places)
    elif division is not None:
        start(model, division, settings)
    else:

        def begin(call: Any) -> None:
            with on_the_host(model, device):
                found = divided(plan, model, inputs_on_host(call, device), tiers)
            start(model, found, settings)

        at_first_call(model, begin)
