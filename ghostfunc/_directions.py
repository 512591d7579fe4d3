"""Directions: what per-sample gradients of a weight `[p, q]` are contracted with, in tiles of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._factors import Outer


@dataclass(frozen=True, eq=False)
class Given:
    """Directions as tensors: `[k, p, q]`."""

    tensor: Float[Tensor, "k p q"]

    @property
    def count(self) -> int:
        """The number of directions, k."""
        return len(self.tensor)

    def tile(self, start: int, stop: int) -> Float[Tensor, "k t q"]:
        """Rows start to stop of every direction, `[k, t, q]`."""
        return self.tensor[:, start:stop]


@dataclass(frozen=True, eq=False)
class FromRows:
    """Directions left_j^T right_j of m validation samples: for each of them, or their sum."""

    factor: Outer
    each: bool

    @property
    def count(self) -> int:
        """The number of directions, k."""
        return len(self.factor.right) if self.each else 1

    @property
    def rows(self) -> int:
        """The number of validation rows, m·R'."""
        return self.factor.right.shape[0] * self.factor.right.shape[1]

    def tile(self, start: int, stop: int) -> Float[Tensor, "k t q"]:
        """Rows start to stop of every direction, `[k, t, q]`."""
        left, right = self.factor.left_rows(start, stop), self.factor.right
        if self.each:
            return torch.bmm(left.transpose(1, 2), right)
        return (left.flatten(0, 1).t() @ right.flatten(0, 1)).unsqueeze(0)


Directions = Given | FromRows
