"""What a run gave, and how factors of a tensor that is derived from a parameter become factors of the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Gather, Later, Own
from ghostfunc._nesting import functorch_level, readable, unrecorded
from ghostfunc._operations import op_name
from ghostfunc._sharded import is_sharded
from ghostfunc._sites import Site, Tracked


@dataclass(eq=False)
class Run:
    """What a run gave.

    Attributes:
        losses: `[S]`, detached.
        aux: the auxiliary output of `model_fn`, detached.
        grads: the weighted sum of the first `train` samples' gradients, by name; empty unless wanted.
        tracked: every tracked tensor.
        factors: the factor of each site that has one, all samples.
        fused: the fused contractions of each site that has them.
        leaves: the parameters.
        unused: where gradients were wanted: names that the losses do not depend on.
    """

    losses: Tensor
    aux: Any
    grads: dict[str, Tensor]
    tracked: list[Tracked]
    factors: dict[Site, Factor]
    fused: dict[Site, dict[str, Tensor]]
    leaves: dict[str, Tensor]
    unused: tuple[str, ...] = ()

    def sites(self, name: str) -> list[Site]:
        """The sites that contribute to the gradient of a parameter."""
        return self._by_name.get(name, [])

    def add_factors(self, factors: Mapping[Site, Factor]) -> None:
        """Add what is left of factors that were contracted in part."""
        self.factors |= factors
        self.__dict__.pop("_by_name", None)

    @cached_property
    def _by_name(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in (*self.factors, *self.fused):
            for name in site.tracked.names:
                found.setdefault(name, []).append(site)
        return found

    def push(self, tracked: Tracked, name: str, direction: Tensor) -> Tensor:
        """A change of a parameter as a change of a tensor derived from it: the derivation's Jacobian times it."""
        if tracked.derivation is None:
            return direction
        if tracked.root is not None:
            with unrecorded():
                return tracked.replay({name: direction})
        if functorch_level() is not None:
            values, derived, pullback = self._pullback(tracked, name)
            zero = torch.zeros_like(derived)
            return torch.func.vjp(lambda cotangent: pullback(cotangent)[0], zero)[1](direction.to(values.dtype))[0]
        with torch.enable_grad():
            leaf, derived = self._derived(tracked, name)
            cotangent = torch.zeros_like(derived, requires_grad=True)
            (pulled,) = torch.autograd.grad(derived, [leaf], cotangent, create_graph=True)
            if not pulled.requires_grad:
                return torch.zeros_like(derived)
            (pushed,) = torch.autograd.grad(pulled, [cotangent], direction.to(pulled.dtype))
        return pushed

    def pull(self, tracked: Tracked, name: str, gradients: Tensor) -> Tensor:
        """Gradients `[k, *derived]` with respect to a derived tensor as gradients `[k, *parameter]`."""
        if tracked.derivation is None:
            return gradients
        if functorch_level() is not None:
            _, derived, pullback = self._pullback(tracked, name)
            return torch.stack([pullback(g.to(derived.dtype))[0] for g in gradients])
        with torch.enable_grad():
            leaf, derived = self._derived(tracked, name)
            pulled = [
                torch.autograd.grad(derived, [leaf], g.to(derived.dtype), retain_graph=True)[0] for g in gradients
            ]
        return torch.stack(pulled)

    def _pullback(self, tracked: Tracked, name: str) -> tuple[Tensor, Tensor, Callable]:
        """The same inside a functorch transform: `(parameter, derived tensor, cotangent -> (gradient,))`."""
        value = self.leaves[name]
        derived, pullback, *_ = torch.func.vjp(lambda leaf: tracked.replay({**self.leaves, name: leaf}), value)
        return value, derived, pullback

    def _derived(self, tracked: Tracked, name: str) -> tuple[Tensor, Tensor]:
        parameters = {t.names[0]: t for t in self.tracked if t.derivation is None}
        values = {key: parameters[key].values.detach() for key in tracked.names}
        leaf = values[name].requires_grad_()
        return leaf, tracked.replay(values)


def base_factor(result: Run, site: Site, factor: Factor, name: str) -> Factor:
    """The factor of a site as a factor of a parameter: pulled back where the site's tensor is derived from it."""
    tracked = site.tracked
    if tracked.derivation is None and not isinstance(factor, (Own, Later)):
        return factor
    if isinstance(factor, Gather) and (rows := _rows_picked(tracked, result.leaves[name])) is not None:
        return Gather(rows[factor.ids], factor.g)
    return Dense(result.pull(tracked, name, factor.dense(tracked.real.shape)))


def _rows_picked(tracked: Tracked, parameter: Tensor) -> Tensor | None:
    """Which row of a table each row of a tensor is that was picked from it; None where it is no such tensor."""
    how = tracked.derivation
    if how is None or parameter.dim() != 2 or is_sharded(parameter):
        return None
    if functorch_level() is not None or not readable(parameter):
        return None
    arguments = (*how.args, *how.kwargs.values())
    if op_name(how.func) != "embedding" or not any(t.derivation is None for t in arguments if isinstance(t, Tracked)):
        return None
    (ids,) = (t for t in arguments if isinstance(t, Tensor) and not t.is_floating_point())
    ones = parameter.new_ones(*ids.shape, parameter.shape[1])
    with torch.enable_grad():  # a look-up that counts gradients in another way (padding) is not taken for one
        leaf = torch.zeros_like(parameter).requires_grad_()
        (counts,) = torch.autograd.grad(tracked.replay({tracked.names[0]: leaf}), [leaf], ones)
    seen = torch.bincount(ids.flatten(), minlength=len(parameter)).to(counts)
    return ids.flatten() if torch.equal(counts, seen.unsqueeze(1).expand_as(counts)) else None
