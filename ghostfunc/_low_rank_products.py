"""Dot products with validation directions of low rank, and bounds on their errors, one parameter at a time.

What is approximated is the direction of a linear map that is contracted inside its backward, where that costs less than
the exact dot products (`low_rank_order` against the planner's best). Everything else is exact, with a bound of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._contract import contract_outer, shape_of, total
from ghostfunc._directions import Directions, FromRows, Given
from ghostfunc._factors import Outer
from ghostfunc._low_rank import Formed, Rows, approximate, contract_low_rank, low_rank_order
from ghostfunc._planner import best_order
from ghostfunc._products import Along, Joint
from ghostfunc._run_result import Run
from ghostfunc._sites import Site

Contracted = tuple[Tensor | None, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LowRankJoint(Joint):
    """`Joint` with directions of low rank, out of the validation rows: the directions are not formed.

    Attributes:
        rank: r.
    """

    rank: int = field(kw_only=True)

    def _contract_rows(self, site: Site, train: Outer, val: Outer) -> Contracted:
        return contract_near(site, train, FromRows(val, each=False), self.rank, self.budget.bytes)

    def bounds(self, result: Run, name: str) -> Tensor:
        """Bounds on the errors of a parameter's dot products, `[n, 1]`, on their scale."""
        return _bounds(result, name, self.train)


@dataclass(frozen=True, eq=False)
class LowRankAlong(Along):
    """`Along` with directions of low rank.

    Attributes:
        rank: r.
    """

    rank: int = field(kw_only=True)

    def _contract_given(self, site: Site, factor: Outer, given: Tensor) -> Contracted:
        return contract_near(site, factor, Given(given.flatten(2).to(site.dtype)), self.rank, self.budget.bytes)

    def bounds(self, result: Run, name: str) -> Tensor:
        """Bounds on the errors of a parameter's dot products, `[n, 1]`, on their scale."""
        return _bounds(result, name, self.train)


def contract_near(site: Site, factor: Outer, direction: Directions, rank: int, budget: int | None) -> Contracted:
    """The sum of the samples' gradients, and their dot products with a direction or with one of low rank near it."""
    if not _pays(factor, direction, rank, budget, want_grad=site.wants_grad):
        dots, grad = contract_outer(factor, direction, want_grad=site.wants_grad, budget=budget)
        return grad, {"dots": dots, "bound": torch.zeros_like(dots)}
    if isinstance(direction, FromRows):
        val = direction.factor
        near = approximate(Rows(val.a.flatten(0, 1), val.g.flatten(0, 1)), rank)
    else:
        (v,) = direction.tensor
        near = approximate(Formed(v.t() if factor.transposed else v), rank)
    dots, bound = contract_low_rank(factor, near)
    grad = total(factor, site.tracked.real.shape) if site.wants_grad else None
    return grad, {"dots": dots.unsqueeze(1), "bound": bound.unsqueeze(1)}


def _pays(factor: Outer, direction: Directions, rank: int, budget: int | None, *, want_grad: bool) -> bool:
    """Whether the low rank fits the budget and costs less than the exact dot products."""
    if type(factor) is not Outer or factor.g.is_complex():  # rows that are computed as they are asked for: once
        return False
    shape = shape_of(factor, direction, want_grad=want_grad)
    order = low_rank_order(shape, rank)
    return (budget is None or order.bytes <= budget) and order.cost < best_order(shape, budget).cost


def _bounds(result: Run, name: str, train: int) -> Tensor:
    found = [result.fused[site]["bound"] for site in result.sites(name) if site in result.fused]
    if found:
        return torch.stack(found).sum(0)
    leaf = result.leaves[name]
    return torch.zeros(train, 1, dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
