"""Which parameters of a model can be stored, under what name, and why the others stay plain.

docs/layers.md is the list in words.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._operators import matrix_shape
from .layers import QuantizedLayer, find_kind, is_layer_weight, row_dimensions
from .layers.base import PART_NAMES, part_name
from .layers.folding import Folding, foldings

# Routers of mixtures of experts: a few bytes, and a rounded one sends tokens to other experts.
ROUTERS = (r"(^|\.)router(\.|$)", r"(^|\.)gate$", r"(^|\.)shared_expert_gate$")
_ROUTER_KINDS = re.compile(r"Router$|TopK?Gate$|MoEGate$", re.IGNORECASE)
# Exponents of state-space layers: exp() makes a relative error of what was an absolute one.
_EXPONENTS = re.compile(r"(^|\.)A(_log|_real|_imag)?s?$")
# Elements from which on a parameter outside torch's own layers is stored unless told otherwise:
# below lie tokens, scales and small tables, which no model is large by.
RAW_ELEMENTS = 1 << 14
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

Parameters = bool | Iterable[str]


class User(NamedTuple):
    """One place where a parameter is used: the module's name, the parameter's, the module."""

    name: str
    leaf: str
    module: nn.Module

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.name}.{self.leaf}" if self.name else self.leaf

    @property
    def layer_name(self) -> str:
        """Under which name a user asks for it: a `weight` by its module's, others by their own."""
        return self.name if self.leaf == "weight" else self.full_name


@dataclass
class Candidate:
    """A parameter that can be stored, with every module that shares it.

    `name` is that of its layer if it is the layer's `weight`, else the parameter's own. `folding`
    says how the weight is computed where it is not a parameter yet.
    """

    users: list[User]
    folding: Folding | None = None

    @property
    def name(self) -> str:
        """The name that precisions, plans and reports use."""
        return self.users[0].layer_name

    @property
    def leaf(self) -> str:
        """The parameter's name in its module."""
        return self.users[0].leaf

    @property
    def module(self) -> nn.Module:
        """The first module that has it."""
        return self.users[0].module

    @property
    def module_name(self) -> str:
        """That module's name."""
        return self.users[0].name

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return self.users[0].full_name

    @property
    def tied(self) -> list[tuple[str, nn.Module]]:
        """The other modules that have it, by name."""
        return [(user.name, user.module) for user in self.users[1:]]

    @property
    def weight(self) -> Tensor:
        """The plain weight; computed where it is still to be folded."""
        if self.folding is not None:
            return self.folding.weight()
        weight = self.module._parameters[self.leaf]
        assert weight is not None
        return weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.weight.shape)

    @property
    def lead(self) -> int:
        """How many of the weight's dimensions are rows with scales of their own."""
        return row_dimensions(self.module, self.leaf, self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight as formats see it."""
        return matrix_shape(self.shape, self.lead)

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        if self.folding is not None:
            return type(self.module).__name__.removeprefix("Parametrized")
        return getattr(self.module, "_base", type(self.module)).__name__

    @property
    def source_names(self) -> list[str]:
        """Names in the state dict of what the weight is made of: itself, or what is folded."""
        if self.folding is None:
            return [self.full_name]
        prefix = f"{self.module_name}." if self.module_name else ""
        return [prefix + name for name, _, _ in self.folding.sources]

    @property
    def original_bytes(self) -> int:
        """Bytes of what storing it replaces."""
        if self.folding is not None:
            return self.folding.sources_bytes()
        return self.weight.numel() * self.weight.element_size()


@dataclass
class _Search:
    """What a search through a model has been told."""

    skip: list[str]
    raw: bool  # whether large raw parameters are stored
    named: list[str]  # raw parameters asked for
    used: set[str] = field(default_factory=set)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's `name` is one of `patterns`: full name, parent, last part(s), or glob."""
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return (
        name == pattern
        or name.startswith(pattern + ".")
        or name.endswith("." + pattern)
        or fnmatch.fnmatchcase(name, pattern)
    )


def candidates(
    model: nn.Module, skip: Iterable[str] = (), parameters: Parameters = True
) -> tuple[list[Candidate], list[tuple[str, str, int]]]:
    """The parameters of `model` that can be stored, and (name, reason, bytes) of what cannot.

    Modules that share a parameter are one candidate; if one of them has to stay plain, all do.
    `parameters` as in `convert`; a name or glob of it that nothing has is a ValueError.
    """
    if isinstance(parameters, str):
        raise TypeError("parameters is True, False or a list of names, not one string")
    named = [] if isinstance(parameters, bool) else list(parameters)
    search = _Search(list(skip), parameters is True, named)
    owners: dict[int, list[User]] = {}
    found: list[Candidate] = []
    left_out: list[tuple[str, str, int]] = []
    folded: set[int] = set()
    counts = _counts(model)
    for module_name, module in model.named_modules():
        for folding in foldings(module):
            candidate = Candidate([User(module_name, folding.leaf, module)], folding)
            reason = _reason_to_leave(candidate.users, search, candidate)
            sources = list(folding._source_parameters())
            if any(counts[id(p)] > 1 for p in sources):
                reason = reason or f"{folding.kind} of a shared parameter"
            if reason is None:
                found.append(candidate)
            else:
                left_out.append((candidate.full_name, reason, candidate.original_bytes))
            folded.update(id(p) for p in sources)
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in folded:
                if id(parameter) not in owners:
                    owners[id(parameter)] = []
                owners[id(parameter)].append(User(module_name, leaf, module))
    # A parametrization's list comes after the module that has it, so its parameters are known.
    for key, users in owners.items():
        if key in folded:
            continue
        parameter = users[0].module._parameters[users[0].leaf]
        assert parameter is not None
        reason = _reason_to_leave(users, search, None)
        if reason is None:
            found.append(Candidate(_weights_first(users)))
        else:
            left_out.append((users[0].full_name, reason, _nbytes(parameter)))
    unused = [pattern for pattern in named if pattern not in search.used]
    if unused:
        raise ValueError(
            f"no parameter that can be stored is named {unused[0]!r}; "
            "the names are those of the model's named_parameters()"
        )
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda c: order[c.module_name])
    return found, left_out


def _counts(model: nn.Module) -> dict[int, int]:
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _nbytes(parameter: Tensor) -> int:
    if is_lazy(parameter):
        return 0
    return parameter.numel() * parameter.element_size()


def _weights_first(users: list[User]) -> list[User]:
    """A layer's weight before raw parameters that share it, so that it gives the name."""
    return sorted(users, key=lambda user: not is_layer_weight(user.module, user.leaf))


def _reason_to_leave(users: list[User], search: _Search, folded: Candidate | None) -> str | None:
    with_layer = any(is_layer_weight(user.module, user.leaf) for user in users)
    for user in users:
        reason = _unusable(user, search, with_layer, folded)
        if reason is not None:
            return reason
    return None


def _unusable(
    user: User, search: _Search, with_layer: bool, folded: Candidate | None
) -> str | None:
    name, leaf, module = user
    if isinstance(module, QuantizedLayer) and any(
        leaf == part_name(stored, part) for stored in module.stored_names for part in PART_NAMES
    ):
        return "already converted"
    if leaf.rpartition(".")[2].startswith("bias") or leaf.endswith("_bias"):
        return "biases stay plain"
    if isinstance(module, _NORMS):
        return f"{type(module).__name__} stays plain"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript modules stay plain"
    parameter = module._parameters.get(leaf)
    if parameter is not None and is_lazy(parameter):
        return "not initialized yet"
    layer = is_layer_weight(module, leaf)
    if folded is not None and not layer:
        return "computed by a parametrization, outside torch's own layers"
    if getattr(module, "max_norm", None) is not None:
        return "an embedding with max_norm changes its weight in use"
    asked = [p for p in search.named if _matches(user.full_name, p)]
    search.used.update(asked)
    if not layer:
        if not asked and not with_layer:
            reason = _raw_reason(user, search)
            if reason is not None:
                return reason
        elif not asked and not search.raw:
            return f"a parameter of {type(module).__name__}: raw parameters were not asked for"
    if matches(user.layer_name, search.skip) or matches(user.full_name, search.skip):
        return "skipped on request"
    if any(re.search(pattern, name) for pattern in ROUTERS) or (
        not layer and _ROUTER_KINDS.search(type(module).__name__)
    ):
        return "sensitive: routers stay plain"
    weight = parameter if folded is None else folded.weight
    assert weight is not None
    if not weight.is_floating_point():
        return f"dtype {weight.dtype} is no float"
    if weight.numel() == 0:
        return "empty"
    return None


def _raw_reason(user: User, search: _Search) -> str | None:
    """Why a parameter outside torch's own layers, which nobody named, stays plain."""
    parameter = user.module._parameters[user.leaf]
    assert parameter is not None
    kind = type(user.module).__name__
    if parameter.dim() < 2 or max(parameter.shape) == parameter.numel():
        if find_kind(user.module) is None:
            return f"{kind} stays plain"
        return f"a parameter named {user.leaf!r} stays plain"
    if not search.raw:
        return f"a parameter of {kind}: raw parameters were not asked for"
    if parameter.numel() < RAW_ELEMENTS:
        return f"a parameter of {kind} with fewer than {RAW_ELEMENTS} elements"
    if _EXPONENTS.search(user.full_name):
        return "sensitive: exponents stay plain"
    return None
