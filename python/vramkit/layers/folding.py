"""Weights that a module computes from others: weight norm, spectral norm, parametrizations.

They are folded before they are stored: the computed weight takes the place of its ingredients. Both
of torch's generations are known, hooks (torch.nn.utils.weight_norm) and parametrizations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


@dataclass
class Folding:
    """One computed weight: where it is, what it is made of, and how to make it plain.

    Attributes:
        module: The module that has the weight.
        leaf: The weight's name in it.
        kind: What computes it, for reports.
        sources: (name relative to the module, owner, leaf) of every tensor it is made of.
    """

    module: nn.Module
    leaf: str
    kind: str
    sources: list[tuple[str, nn.Module, str]]

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The weight as it is computed now; the module stays as it is."""
        hook = _hook_of(self.module, self.leaf)
        if isinstance(hook, WeightNorm):
            made: Tensor = hook.compute_weight(self.module)
            return made
        if isinstance(hook, SpectralNorm):
            original: Tensor = getattr(self.module, f"{self.leaf}_orig")
            if original.is_meta:  # its buffers are not
                return torch.empty_like(original)
            return hook.compute_weight(self.module, do_power_iteration=False)
        chain: Any = self.module.parametrizations
        chain = chain[self.leaf]
        if any(p.is_meta for p in chain.parameters()):  # buffers may have memory still
            chain = copy.deepcopy(chain).to("meta")
        modes = [(m, m.training) for m in chain.modules()]
        chain.eval()  # spectral norm iterates in training
        try:
            computed: Tensor = chain()
            return computed
        finally:
            for part, mode in modes:
                part.training = mode

    def sources_bytes(self) -> int:
        """Bytes of the parameters that folding does away with."""
        tensors = (owner._parameters.get(leaf) for _, owner, leaf in self.sources)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @torch.no_grad()
    def apply(self) -> None:
        """Make the weight a plain parameter, in the place its first source had."""
        grad = any(p.requires_grad for p in self._source_parameters())
        hook = _hook_of(self.module, self.leaf)
        if isinstance(hook, WeightNorm):
            remove_weight_norm(self.module, self.leaf)
        elif isinstance(hook, SpectralNorm):
            weight = nn.Parameter(self.weight(), requires_grad=grad)
            _remove_spectral_norm(self.module, hook)
            self.module._parameters[self.leaf] = weight
        else:
            weight = nn.Parameter(self.weight(), requires_grad=grad)
            _remove_parametrization(self.module, self.leaf)
            self.module._parameters[self.leaf] = weight
        parameters = self.module._parameters
        weight_ = parameters.pop(self.leaf)
        others = {name: parameters.pop(name) for name in list(parameters)}
        # torch's own layers declare their weight first; other names keep their neighbours.
        first = self.leaf == "weight"
        made = {self.leaf: weight_}
        parameters.update({**made, **others} if first else {**others, **made})

    def _source_parameters(self) -> Iterator[nn.Parameter]:
        for _, owner, leaf in self.sources:
            parameter = owner._parameters.get(leaf)
            if parameter is not None:
                yield parameter


def _remove_spectral_norm(module: nn.Module, hook: SpectralNorm) -> None:
    """Take the hooks, ingredients and computed weight of `hook` away from `module`.

    torch's own function computes the weight once more, and leaves the hook that asks state dicts
    for its ingredients.
    """
    name: str = hook.name
    module.__dict__.pop(name, None)
    del module._parameters[f"{name}_orig"]
    for buffer in (f"{name}_u", f"{name}_v"):
        del module._buffers[buffer]
    for hooks in (
        module._forward_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
    ):
        for key, entry in list(hooks.items()):
            inner: Any = getattr(entry, "hook", entry)  # torch wraps some
            if getattr(inner, "fn", inner) is hook or (
                isinstance(getattr(inner, "fn", None), SpectralNorm) and inner.fn.name == name
            ):
                del hooks[key]


def _remove_parametrization(module: nn.Module, leaf: str) -> None:
    """Take the parametrization of `leaf` away from `module` alone.

    torch's own function takes it from the module's class, which copies of the module share: those
    would lose their weight.
    """
    lists: Any = module.parametrizations
    plain = parametrize.type_before_parametrizations(module)
    del lists[leaf]
    shared = type(module)
    if len(lists) == 0:
        delattr(module, "parametrizations")
        module.__class__ = plain
    else:
        body = {name: value for name, value in vars(shared).items() if name != leaf}
        module.__class__ = type(shared.__name__, (plain,), body)


def _hook_of(module: nn.Module, leaf: str) -> Any:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == leaf:
            return hook
    return None


def foldings(module: nn.Module) -> Iterator[Folding]:
    """The computed weights of `module` itself."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            names = [f"{hook.name}_g", f"{hook.name}_v"]
            yield Folding(module, hook.name, "weight norm", [(n, module, n) for n in names])
        elif isinstance(hook, SpectralNorm):
            names = [f"{hook.name}_orig", f"{hook.name}_u", f"{hook.name}_v"]
            yield Folding(module, hook.name, "spectral norm", [(n, module, n) for n in names])
    if not parametrize.is_parametrized(module):
        return
    lists: Any = module.parametrizations
    for leaf, chain in lists.items():
        sources = [
            (f"parametrizations.{leaf}.{f'{at}.{part}'.lstrip('.')}", owner, part)
            for at, owner in chain.named_modules()
            for part in (*owner._parameters, *owner._buffers)
            if owner._parameters.get(part) is not None or owner._buffers.get(part) is not None
        ]
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in chain)
        readable = {"WeightNorm": "weight norm", "SpectralNorm": "spectral norm"}
        yield Folding(module, leaf, readable.get(kinds, f"parametrization {kinds}"), sources)
