"""A tied head whose own products were taken inside its backward, and what earlier look-ups of its weight still need.

The gradient of a tied weight is H_i + E_i, by the head and by the look-ups. Products of H with H need all of its
grad-output `[B, R, V]`, and are taken while that is there. Products with E need the columns of the ids that were looked
up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._factors import Factor, Outer


@dataclass(frozen=True, eq=False)
class Seen(Outer):
    """What is left of a linear map's factor: `a` is its right side, `g` the columns of its left side that are known.

    Attributes:
        known: the rows of the weight that these columns belong to, sorted.
    """

    known: Int[Tensor, " u"] = field(kw_only=True)

    @classmethod
    def of(cls, factor: Outer, ids: Sequence[Tensor]) -> Seen:
        """The factor at the rows of the weight that were looked up."""
        known = torch.cat([t.flatten() for t in ids]).unique()
        return cls(factor.right.detach(), factor.left_at(known).detach(), known=known)  # without the graph

    def left_at(self, ids: Int[Tensor, "*b k"]) -> Float[Tensor, "b r k"]:
        """What `left` has for these rows of the weight, which are known."""
        return super().left_at(torch.searchsorted(self.known, ids.contiguous()))


def untaken(ours: Sequence[Factor], theirs: Sequence[Factor]) -> list[tuple[Factor, Factor]]:
    """The pairs of uses whose products have not been taken."""
    return [(a, b) for a, b in product(ours, theirs) if not (_taken(a, b) or _taken(b, a))]


def _taken(one: Factor, other: Factor) -> bool:
    return isinstance(one, Seen) and isinstance(other, Outer)
