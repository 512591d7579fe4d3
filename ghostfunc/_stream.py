"""The tile stream: a weight's gradient made sample by sample in tiles, each contracted while it is in the cache.

    tile[i] = left_i[:, start:stop]^T right_i                                   [samples, rows, q]

A tile's dot products with the same tile of the directions cost a pass over cached data, and so does its sum, which is
the weight gradient: no product is made a second time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ghostfunc._directions import Directions
from ghostfunc._factors import Outer

_LONG = 1 << 18  # entries that one float32 product sums without losing a digit; shorter ones take more time
_SQUARES = 1 << 16  # and one norm


def stream(
    factor: Outer, directions: Directions, *, samples: int, rows: int, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """Dot products of every sample with every direction, and the sum of the samples' gradients.

    Args:
        factor: the train rows.
        directions: k directions.
        samples: how many samples' gradients are in a tile.
        rows: how many rows of the weight are in a tile.
        want_grad: whether the sum over samples is wanted.

    Returns:
        `(dots[n, k], grad[p, q] or None)`.
    """
    right = factor.right  # [n, R, q]
    (p, q), n = factor.size, len(right)
    dots = right.new_zeros(n, directions.count)
    grad = right.new_empty(p, q) if want_grad else None
    buffer = right.new_empty(min(samples, n) * rows * q)
    for start in range(0, p, rows):
        stop = min(start + rows, p)
        left = factor.left_rows(start, stop)  # [n, R, rows]
        to = directions.tile(start, stop).flatten(1)  # [k, rows * q]
        place = None if grad is None else grad[start:stop]
        for first in range(0, n, samples):
            some = slice(first, min(first + samples, n))
            tile = per_sample(left[some], right[some], buffer, place if first == 0 else None)
            dots[some] += long_products(tile.flatten(1), to)
            if place is not None:
                if first and len(tile) > 1:
                    tile[0] += place  # in the buffer, which is done with, so that the sum needs no other
                add_up(tile, place, fresh=first == 0 or len(tile) > 1)
        del left, to  # before the next ones are made
    return dots, grad


def per_sample(
    left: Float[Tensor, "n r t"], right: Float[Tensor, "n r q"], buffer: Tensor, place: Tensor | None = None
) -> Float[Tensor, "n t q"]:
    """The samples' gradients of some rows, in a buffer; of one sample alone in the place of the sum, if any."""
    n, _, rows = left.shape
    if n == 1:
        out = buffer[: rows * right.shape[2]].view(rows, -1) if place is None else place
        return torch.mm(left[0].t(), right[0], out=out).unsqueeze(0)
    tile = buffer[: n * rows * right.shape[2]].view(n, rows, -1)
    return torch.bmm(left.transpose(1, 2), right, out=tile)


def add_up(tile: Float[Tensor, "n t q"], place: Float[Tensor, "t q"], *, fresh: bool) -> None:
    """Add a tile's sum over its samples to the place of the sum; `fresh` where nothing is there yet."""
    if not fresh:
        place += tile[0] if len(tile) == 1 else tile.sum(0)
    elif len(tile) == 2:
        torch.add(tile[0], tile[1], out=place)
    elif len(tile) > 2:
        torch.sum(tile, 0, out=place)
    elif tile.data_ptr() != place.data_ptr():
        place.copy_(tile[0])


def long_products(rows: Inexact[Tensor, "n s"], others: Inexact[Tensor, "k s"]) -> Inexact[Tensor, "n k"]:
    """Dot products of rows with rows, summed in blocks: over millions of entries one product loses a digit or two."""
    if rows.shape[1] <= _LONG:
        return rows @ others.t()
    blocks = [slice(start, start + _LONG) for start in range(0, rows.shape[1], _LONG)]
    return torch.stack([rows[:, block] @ others[:, block].t() for block in blocks]).sum(0)


def squares(rows: Inexact[Tensor, "n s"]) -> Inexact[Tensor, " n"]:
    """The squared norm of every row, summed in blocks."""
    whole = rows.shape[1] // _SQUARES * _SQUARES
    found = torch.linalg.vector_norm(rows[:, whole:], dim=1).square()
    if not whole:
        return found
    blocks = rows[:, :whole].unflatten(1, (-1, _SQUARES))
    return found + torch.linalg.vector_norm(blocks, dim=2).square().sum(1)
