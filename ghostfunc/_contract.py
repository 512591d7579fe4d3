"""Contractions of factors: dot products with directions, dot products between samples, sums over samples.

For a weight `[p, q]` and train rows left `[n, R, p]`, right `[n, R, q]` (the weight gradient is left^T right, 2nR·pq
FLOPs) the dot products with k directions V can be had in three orders:

    Gram         sum_rs (left_r · left'_s)(right_r · right'_s)      2·nR·mR'·(p + q), no direction is formed
    direction    sum_r left_r · (V right_r)                         2·nR·pq for each direction
    tile stream  <left_i^T right_i, V>, tile by tile                2·n·pq for each direction, beside that gradient

The tile stream makes the weight gradient one sample at a time, in tiles that stay in the cache, so that dot products
cost one pass over cached data. Every function here accumulates in the dtype that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Gather, Later, Outer, Own
from ghostfunc._nesting import functorch_level, readable, recorded

TILE_BYTES = 16 << 20
_GRAM_BYTES = 256 << 20
_LONG = 1 << 16  # entries that one float32 product sums without losing a digit
MEMORY_BOUND = 32  # FLOPs of a matrix product that cost what the stream's pass over one tile entry costs (measured)


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
    """Directions left_j^T right_j of validation rows `[m, R', p]` and `[m, R', q]`: for each sample, or their sum."""

    left: Float[Tensor, "m r p"]
    right: Float[Tensor, "m r q"]
    each: bool

    @property
    def count(self) -> int:
        """The number of directions, k."""
        return len(self.left) if self.each else 1

    def tile(self, start: int, stop: int) -> Float[Tensor, "k t q"]:
        """Rows start to stop of every direction, `[k, t, q]`."""
        left = self.left[:, :, start:stop]
        if self.each:
            return torch.bmm(left.transpose(1, 2), self.right)
        return (left.reshape(-1, stop - start).t() @ self.right.flatten(0, 1)).unsqueeze(0)


Directions = Given | FromRows


@dataclass(frozen=True)
class Order:
    """A way to contract one weight, with what it costs beside nothing: all products, the weight gradient included."""

    name: str  # "Gram", "direction", "tile stream"
    flops: int
    passes: int  # entries that are passed over without a product to speak of

    @property
    def cost(self) -> int:
        """FLOPs, with passes over memory as the FLOPs that take as long."""
        return self.flops + MEMORY_BOUND * self.passes


def orders(
    n: int, positions: int, p: int, q: int, k: int, val_rows: int, *, given: bool, want_grad: bool
) -> list[Order]:
    """The orders in which the dot products of n samples with k directions can be had, with their costs.

    Args:
        n: train samples.
        positions: positions of a train sample, R.
        p: rows of the weight.
        q: columns of the weight.
        k: directions.
        val_rows: validation rows m·R' that the directions are made of.
        given: whether the directions exist already.
        want_grad: whether the weight gradient is wanted too.

    Returns:
        The possible orders.
    """
    weight = 2 * n * positions * p * q
    make = 0 if given else 2 * val_rows * p * q
    found = [
        Order("direction", make + k * weight + want_grad * weight, n * positions * q * k),
        Order("tile stream", make + weight + 2 * n * k * p * q, n * p * q),
    ]
    if not given:
        pairs = n * positions * val_rows
        found.append(Order("Gram", 2 * pairs * (p + q) + want_grad * weight, pairs))
    return found


def best_order(n: int, positions: int, p: int, q: int, k: int, val_rows: int, *, given: bool, want_grad: bool) -> Order:
    """The cheapest of `orders`, which takes the same arguments."""
    found = orders(n, positions, p, q, k, val_rows, given=given, want_grad=want_grad)
    return min(found, key=lambda order: order.cost)


def contract_outer(
    factor: Outer, directions: Directions, *, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """Dot products of every sample with every direction, and the sum of the samples' gradients.

    Args:
        factor: the train rows.
        directions: k directions.
        want_grad: whether the sum over samples is wanted.

    Returns:
        `(dots[n, k], grad[p, q] or None)`.
    """
    left, right = factor.left, factor.right  # [n, R, p], [n, R, q]
    n, positions, p = left.shape
    given = isinstance(directions, Given)
    val_rows = 0 if isinstance(directions, Given) else directions.left.shape[0] * directions.left.shape[1]
    sizes = (n, positions, p, right.shape[2], directions.count, val_rows)
    possible = orders(*sizes, given=given, want_grad=want_grad)
    if functorch_level() is not None:  # a loop into reused buffers is no function of the outer transform's inputs
        possible = [order for order in possible if order.name != "tile stream"]
    best = min(possible, key=lambda order: order.cost)
    if best.name == "tile stream":
        return _tile_stream(left, right, directions, want_grad)
    grad = left.flatten(0, 1).t() @ right.flatten(0, 1) if want_grad else None  # [p, q]
    if isinstance(directions, FromRows) and best.name == "Gram":
        other = Outer(directions.right, directions.left)
        dots = pair(Outer(right, left), other)  # [n, m]
        return (dots if directions.each else dots.sum(1, keepdim=True)), grad
    return _along_outer(left, right, directions.tile(0, p)), grad


def _along_outer(
    left: Float[Tensor, "n r p"], right: Float[Tensor, "n r q"], directions: Float[Tensor, "k p q"]
) -> Float[Tensor, "n k"]:
    """sum_r left_r · (V right_r) for each V of `[k, p, q]`, through the narrower side: `[n, k]`."""
    columns = []
    for direction in directions:
        if left.shape[2] < right.shape[2]:
            moved, still = right @ direction.t(), left  # [n, R, p]
        else:
            moved, still = left @ direction, right  # [n, R, q]
        columns.append((moved * still).sum((1, 2)))
    return torch.stack(columns, 1)


def _tile_stream(
    left: Float[Tensor, "n r p"], right: Float[Tensor, "n r q"], directions: Directions, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    if not recorded(left):
        return tile_loop(left, right, directions, want_grad)
    given, rows, each = None, (None, None), False
    if isinstance(directions, Given):
        given = directions.tensor
    else:
        rows, each = (directions.left, directions.right), directions.each
    dots, grad = torch.ops.ghostfunc.tile_stream(left, right, given, *rows, each, want_grad)
    return dots, grad if want_grad else None


def tile_loop(
    left: Float[Tensor, "n r p"], right: Float[Tensor, "n r q"], directions: Directions, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """The tile stream itself; `torch.ops.ghostfunc.tile_stream` in a compiled graph."""
    n, _, p = left.shape
    q = right.shape[2]
    rows = max(1, min(p, TILE_BYTES // max(1, n * q * left.element_size())))
    dots = left.new_zeros(n, directions.count)
    grad = left.new_empty(p, q) if want_grad else None
    buffer = left.new_empty(n * rows * q)
    for start in range(0, p, rows):
        stop = min(start + rows, p)
        tile = buffer[: n * (stop - start) * q].view(n, stop - start, q)
        for sample in range(n):
            torch.mm(left[sample, :, start:stop].t(), right[sample], out=tile[sample])
        dots += long_products(tile.view(n, -1), directions.tile(start, stop).reshape(directions.count, -1))
        if grad is not None:
            torch.sum(tile, 0, out=grad[start:stop])
    return dots, grad


def long_products(rows: Inexact[Tensor, "n s"], others: Inexact[Tensor, "k s"]) -> Inexact[Tensor, "n k"]:
    """Dot products of rows with rows, summed in blocks: over millions of entries one product loses a digit or two."""
    blocks = rows.shape[1] // _LONG
    if blocks < 2:
        return rows @ others.t()
    whole = blocks * _LONG
    left = rows[:, :whole].unflatten(1, (blocks, _LONG)).transpose(0, 1)  # [blocks, n, s']
    right = others[:, :whole].unflatten(1, (blocks, _LONG)).permute(1, 2, 0)  # [blocks, s', k]
    products = torch.bmm(left, right).sum(0)
    return products if whole == rows.shape[1] else products + rows[:, whole:] @ others[:, whole:].t()


def along(factor: Factor, directions: Inexact[Tensor, "k ..."]) -> Inexact[Tensor, "b k"]:
    """Dot products of every sample's gradient with k directions.

    Args:
        factor: B samples.
        directions: `[k, *shape]` of the tensor that the factor is a gradient of.

    Returns:
        `[B, k]`.
    """
    if isinstance(factor, Outer):
        return contract_outer(factor, Given(directions.flatten(2)), want_grad=False)[0]
    if isinstance(factor, Gather):
        tables = directions.flatten(1, -2)  # [k, V, d]
        return torch.stack([(table[factor.ids] * factor.g).sum((1, 2)) for table in tables], 1)
    if isinstance(factor, Later):
        return torch.cat([along(chunk, directions) for chunk in factor.chunks()])
    if isinstance(factor, Dense):
        return long_products(factor.grad.reshape(len(factor.grad), -1), directions.reshape(len(directions), -1))
    rows = slice(factor.start, factor.start + len(factor.grad))
    return torch.stack(
        [(factor.axis.split(d)[rows] * factor.grad).reshape(len(factor.grad), -1).sum(1) for d in directions], 1
    )


def pair(train: Factor, val: Factor) -> Float[Tensor, "n m"]:
    """Dot products of every train sample with every validation sample, `[n, m]`, of one use with another.

    An `Outer` and a `Gather` are both sums over positions of outer(left, right) (a `Gather`'s left is one-hot), so
    that every pair of them is sum_rs (left_r · left'_s)(right_r · right'_s).
    """
    if isinstance(train, Own) or isinstance(val, Own):
        raise TypeError("a tensor with a part for each sample has no pairs; its gradients go through directions.")
    if isinstance(val, Later):
        return torch.cat([pair(train, chunk) for chunk in val.chunks()], 1)
    if isinstance(val, Dense):
        return along(train, val.grad)
    if isinstance(train, Later):
        return torch.cat([pair(chunk, val) for chunk in train.chunks()])
    if isinstance(train, Dense):
        return along(val, train.grad).t()
    n, m = len(train.g), len(val.g)
    positions, val_positions = train.g.shape[1], val.g.shape[1]
    bytes_per_sample = positions * m * val_positions * train.g.element_size()
    step = max(1, _GRAM_BYTES // max(1, bytes_per_sample))
    blocks = []
    for start in range(0, n, step):
        some = train.part(start, start + step)
        product = left_gram(some, val) * right_gram(some, val)  # [s * R, m * R']
        blocks.append(product.view(-1, positions, m, val_positions).sum((1, 3)))
    return torch.cat(blocks)


def pair_sum(train: Factor, val: Factor) -> Float[Tensor, "n 1"]:
    """Dot products of every train sample with the sum of the validation samples' gradients, `[n, 1]`."""
    if isinstance(train, Outer) and isinstance(val, Outer):
        return contract_outer(train, FromRows(val.left, val.right, each=False), want_grad=False)[0]
    if isinstance(val, Later):
        return along(train, total(val, val.shape).unsqueeze(0))
    if isinstance(val, Dense):
        return along(train, val.grad.sum(0, keepdim=True))
    if isinstance(val, Gather) and isinstance(train, (Outer, Gather)) and readable(val.ids):
        return _along_table(train, val)
    return pair(train, val).sum(1, keepdim=True)


def _along_table(train: Outer | Gather, val: Gather) -> Float[Tensor, "n 1"]:
    """The same where the direction is a table with few rows that are not zero: only these are formed."""
    known, place = val.ids.unique(return_inverse=True)  # [U]
    table = val.g.new_zeros(len(known), val.g.shape[-1]).index_add_(0, place.flatten(), val.g.flatten(0, 1))  # [U, d]
    if isinstance(train, Outer):
        columns = train.left[:, :, known]  # [n, R, U]
        return (columns * (train.right @ table.t())).sum((1, 2)).unsqueeze(1)
    index = torch.searchsorted(known, train.ids.contiguous()).clamp(max=len(known) - 1)  # [n, R]
    hit = (known[index] == train.ids).unsqueeze(-1)
    return (table[index] * train.g * hit).sum((1, 2)).unsqueeze(1)


def pair_own(one: Factor, other: Factor) -> Float[Tensor, " n"]:
    """Dot products of each sample's gradients by two uses, `[n]`: the diagonal of `pair`."""
    if isinstance(one, Own) or isinstance(other, Own):
        raise TypeError("a tensor with a part for each sample has no pairs.")
    if isinstance(one, Later) and isinstance(other, Later):
        parts = [(a, other.part(k, k + len(a.grad))) for k, a in one.placed_chunks()]
        return torch.cat([(a.grad * b.dense(b.shape)).reshape(len(a.grad), -1).sum(1) for a, b in parts])
    if isinstance(other, Later):
        return pair_own(other, one)
    if isinstance(one, Later):
        return torch.cat([pair_own(a, other.part(k, k + len(a.grad))) for k, a in one.placed_chunks()])
    if isinstance(one, Dense) and isinstance(other, Dense):
        return (one.grad * other.grad).reshape(len(one.grad), -1).sum(1)
    if isinstance(other, Dense):
        return pair_own(other, one)
    if isinstance(one, Dense):
        samples = range(len(one.grad))
        shape = one.grad.shape[1:]
        return torch.cat([along(other.part(s, s + 1), one.grad[s : s + 1].view(1, *shape))[:, 0] for s in samples])
    n, positions = one.g.shape[:2]
    step = max(1, _GRAM_BYTES // max(1, positions * other.g.shape[1] * one.g.element_size()))
    blocks = []
    for start in range(0, n, step):
        a, b = one.part(start, start + step), other.part(start, start + step)
        blocks.append((_left_gram_own(a, b) * _right(a).bmm(_right(b).transpose(1, 2))).sum((1, 2)))
    return torch.cat(blocks)


def _right(factor: Outer | Gather) -> Float[Tensor, "n r q"]:
    return factor.g if isinstance(factor, Gather) else factor.right


def _left_gram_own(one: Outer | Gather, other: Outer | Gather) -> Float[Tensor, "n r s"]:
    """Left · left' for every pair of positions of the same sample, `[n, R, R']`."""
    if isinstance(one, Gather) and isinstance(other, Gather):
        return (one.ids[:, :, None] == other.ids[:, None, :]).to(one.g.dtype)
    if isinstance(one, Gather):
        return _left_gram_own(other, one).transpose(1, 2)
    if isinstance(other, Gather):
        columns = other.ids[:, None, :].expand(-1, one.left.shape[1], -1)
        return one.left.gather(2, columns)
    return one.left.bmm(other.left.transpose(1, 2))


def scaled(factor: Factor, weights: Float[Tensor, " n"]) -> Factor:
    """The factor of the samples' gradients times a weight for each."""
    if isinstance(factor, Later):
        rows = factor.rows

        def weighted(start: int, stop: int) -> Tensor:
            grads = rows(start, stop)
            return grads * weights[start - factor.start : stop - factor.start].view(-1, *(1,) * (grads.dim() - 1))

        return replace(factor, rows=weighted)
    if isinstance(factor, Outer | Gather):
        column = weights.view(-1, 1, 1).to(factor.g.dtype)
        if isinstance(factor, Outer) and factor.a.shape[2] < factor.g.shape[2]:  # the narrower side
            return replace(factor, a=factor.a * column)
        return replace(factor, g=factor.g * column)
    return replace(factor, grad=factor.grad * weights.view(-1, *(1,) * (factor.grad.dim() - 1)).to(factor.grad.dtype))


def left_gram(train: Outer | Gather, val: Outer | Gather) -> Float[Tensor, "nr ms"]:
    """Left · left' for every pair of positions, `[n * R, m * R']`."""
    if isinstance(train, Gather) and isinstance(val, Gather):
        return (train.ids.flatten()[:, None] == val.ids.flatten()).to(train.g.dtype)
    if isinstance(val, Gather):
        return train.left.flatten(0, 1)[:, val.ids.flatten()]  # type: ignore[union-attr]
    if isinstance(train, Gather):
        return left_gram(val, train).t()
    return train.left.flatten(0, 1) @ val.left.flatten(0, 1).t()


def right_gram(train: Outer | Gather, val: Outer | Gather) -> Float[Tensor, "nr ms"]:
    """Right · right' for every pair of positions, `[n * R, m * R']`."""
    right = [f.g if isinstance(f, Gather) else f.right for f in (train, val)]
    return right[0].flatten(0, 1) @ right[1].flatten(0, 1).t()


def total(factor: Factor, shape: Sequence[int]) -> Tensor:
    """The sum of the samples' gradients, `[*shape]`."""
    if isinstance(factor, Outer):
        return (factor.left.flatten(0, 1).t() @ factor.right.flatten(0, 1)).view(shape)
    if isinstance(factor, Gather):
        table = factor.g.new_zeros(shape).view(-1, shape[-1])
        return table.index_add_(0, factor.ids.flatten(), factor.g.flatten(0, 1)).view(shape)
    if isinstance(factor, Later):
        return torch.stack([chunk.grad.sum(0) for chunk in factor.chunks()]).sum(0).view(shape)
    if isinstance(factor, Dense):
        return factor.grad.sum(0).view(shape)
    whole = factor.grad.new_zeros(shape)
    factor.axis.split(whole)[factor.start : factor.start + len(factor.grad)] = factor.grad
    return whole
