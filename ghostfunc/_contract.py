"""Contractions of factors: dot products with directions, dot products between samples, sums over samples.

The dot products of a linear map's factor can be had in three orders (`_planner`): Gram, direction first, and the tile
stream (`_stream`). Every function here accumulates in the dtype that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ghostfunc._directions import Directions, FromRows, Given
from ghostfunc._factors import Dense, Factor, Gather, Later, Outer, Own
from ghostfunc._nesting import functorch_level, readable, recorded
from ghostfunc._planner import Order, Shape, at_a_time, best_order, tile_bytes
from ghostfunc._stream import long_products, stream

_PAIR_BYTES = 256 << 20


def contract_outer(
    factor: Outer, directions: Directions, *, want_grad: bool, budget: int | None = None
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """Dot products of every sample with every direction, and the sum of the samples' gradients.

    Args:
        factor: the train rows.
        directions: k directions.
        want_grad: whether the sum over samples is wanted.
        budget: bytes of working memory; None for what suits the device.

    Returns:
        `(dots[n, k], grad[p, q] or None)`.

    Raises:
        ValueError: where the budget is too small for any order.
    """
    # A loop into reused buffers is no function of an outer transform's inputs.
    shape = shape_of(factor, directions, want_grad=want_grad)
    order = best_order(shape, budget, tiles=functorch_level() is None)
    if order.name == "tile stream":
        return _stream(factor, directions, order, want_grad)
    if factor.rows_at_a_time < factor.size[0]:
        return _in_blocks(factor, directions, order, want_grad)
    grad = total(factor, factor.size) if want_grad else None
    if isinstance(directions, FromRows) and order.name == "Gram":
        return _pair(factor, directions.factor, order, each=directions.each), grad
    return _along_outer(factor, directions, order), grad


def shape_of(factor: Outer, directions: Directions, *, want_grad: bool) -> Shape:
    """What the planner is to know of a contraction."""
    right, (p, q), given = factor.right, factor.size, isinstance(directions, Given)
    val_rows = 0 if isinstance(directions, Given) else directions.rows
    size = len(right), right.shape[1], p, q, directions.count, val_rows
    return Shape(*size, given, want_grad, right.element_size(), right.device.type)


def _stream(
    factor: Outer, directions: Directions, order: Order, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    if not recorded(factor.right):
        rows = min(order.rows, factor.rows_at_a_time)
        return stream(factor, directions, samples=order.samples, rows=rows, want_grad=want_grad)
    given, rows, each = None, (None, None), False
    if isinstance(directions, Given):
        given = directions.tensor
    else:
        rows, each = (directions.factor.left, directions.factor.right), directions.each
    dots, grad = torch.ops.ghostfunc.tile_stream(factor.left, factor.right, given, *rows, each, want_grad)
    return dots, grad if want_grad else None


def tile_loop(
    left: Float[Tensor, "n r p"], right: Float[Tensor, "n r q"], directions: Directions, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """The tile stream of two matrices a sample: `torch.ops.ghostfunc.tile_stream` in a compiled graph."""
    formed = 0 if isinstance(directions, Given) else directions.count
    limit = tile_bytes(right.device.type) // right.element_size()
    samples, rows = at_a_time(len(right), left.shape[2], right.shape[2], formed, limit)
    return stream(Outer(right, left), directions, samples=samples, rows=rows, want_grad=want_grad)


def _in_blocks(
    factor: Outer, directions: Directions, order: Order, want_grad: bool
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "p q"] | None]:
    """Gram or direction first, with the gradient in the same walk over rows: each row's left side is computed once."""
    if len(factor.right) > order.samples:
        pieces = range(0, len(factor.right), order.samples)
        some = [_in_blocks(factor.part(k, k + order.samples), directions, order, want_grad) for k in pieces]
        sums = [grad for _, grad in some if grad is not None]
        return torch.cat([dots for dots, _ in some]), torch.stack(sums).sum(0) if sums else None
    right, (p, q) = factor.right, factor.size
    dots = right.new_zeros(len(right), directions.count)
    val, gram = None, right.new_empty(0)
    if isinstance(directions, FromRows) and order.name == "Gram":
        val = directions.factor
        gram = right.new_zeros(right[..., 0].numel(), directions.rows)  # [n * R, m * R']
    grad = right.new_empty(p, q) if want_grad else None
    for start in range(0, p, factor.rows_at_a_time):
        stop = min(start + factor.rows_at_a_time, p)
        left = factor.left_rows(start, stop)  # [n, R, t]
        rows = left.flatten(0, 1)
        if val is not None:
            torch.addmm(gram, rows, val.left_rows(start, stop).flatten(0, 1).t(), out=gram)
        else:
            dots += torch.stack([_row_dots(left, right, v) for v in directions.tile(start, stop)], 1)
        if grad is not None:
            torch.mm(rows.t(), right.flatten(0, 1), out=grad[start:stop])
    if val is not None:
        products = gram.mul_(right_gram(factor, val)).view(*right.shape[:2], directions.count, -1)
        dots = products.sum((1, 3))
    return dots, grad


def _along_outer(factor: Outer, directions: Directions, order: Order) -> Float[Tensor, "n k"]:
    """sum_r left_r · (V right_r) for each V of `[k, p, q]`, through the narrower side: `[n, k]`."""
    right, p, n = factor.right, factor.size[0], len(factor.right)
    dots = None
    for start in range(0, p, order.rows):
        stop = min(start + order.rows, p)
        left, tile = factor.left_rows(start, stop), directions.tile(start, stop)  # [n, R, t], [k, t, q]
        samples = []
        for first in range(0, n, order.samples):
            some = slice(first, first + order.samples)
            samples.append(torch.stack([_row_dots(left[some], right[some], v) for v in tile], 1))
        share = torch.cat(samples)
        dots = share if dots is None else dots + share
        del left, tile  # before the next ones are made
    assert dots is not None
    return dots


def _row_dots(
    left: Float[Tensor, "n r t"], right: Float[Tensor, "n r q"], direction: Float[Tensor, "t q"]
) -> Float[Tensor, " n"]:
    if left.shape[2] < right.shape[2]:
        return ((right @ direction.t()) * left).sum((1, 2))
    return ((left @ direction) * right).sum((1, 2))


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
    (_, positions, _), (m, val_positions, _) = _right(train).shape, _right(val).shape
    samples = max(1, _PAIR_BYTES // max(1, 3 * positions * m * val_positions * _right(train).element_size()))
    return _pair(train, val, Order("Gram", 0, 0, 0, samples, positions))


def _pair(train: Outer | Gather, val: Outer | Gather, order: Order, *, each: bool = True) -> Float[Tensor, "n k"]:
    """The same for uses at positions, some samples, or some positions of one sample, at a time; or its sum over m."""
    positions, rows = _right(train).shape[1], _right(val)
    m, val_positions = rows.shape[:2] if each else (1, rows.shape[0] * rows.shape[1])
    samples = []
    for first in range(0, len(_right(train)), order.samples):
        some = train.part(first, first + order.samples)
        dots = None
        for start in range(0, positions, order.rows):
            few = some if order.rows >= positions else some.at_positions(start, start + order.rows)
            product = left_gram(few, val) * right_gram(few, val)  # [s * R, m * R']
            share = product.view(len(_right(few)), -1, m, val_positions).sum((1, 3))
            dots = share if dots is None else dots + share
            del product  # before the next one is made
        assert dots is not None
        samples.append(dots)
    return torch.cat(samples)


def pair_sum(train: Factor, val: Factor) -> Float[Tensor, "n 1"]:
    """Dot products of every train sample with the sum of the validation samples' gradients, `[n, 1]`."""
    if isinstance(train, Outer) and isinstance(val, Outer):
        return contract_outer(train, FromRows(val, each=False), want_grad=False)[0]
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
        columns = train.left_at(known)  # [n, R, U]
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
    n, positions = _right(one).shape[:2]
    step = max(1, _PAIR_BYTES // max(1, positions * _right(other).shape[1] * _right(one).element_size()))
    blocks = []
    for start in range(0, n, step):
        a = one.part(start, start + step)
        b = a if other is one else other.part(start, start + step)
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
        return one.left_at(other.ids)
    return sum_of_blocks(one, other, lambda a, b: a.bmm(b.transpose(1, 2)))


def sum_of_blocks(one: Outer, other: Outer, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A product of two left sides that sums over the weight's rows, as many of these at a time as suits both."""
    p, step = one.size[0], min(one.rows_at_a_time, other.rows_at_a_time)
    found: Tensor | None = None
    for start in range(0, p, step):
        stop = min(start + step, p)
        left = one.left_rows(start, stop)
        share = product(left, left if other is one else other.left_rows(start, stop))
        found = share if found is None else found.add_(share)
    assert found is not None
    return found


def scaled(factor: Factor, weights: Float[Tensor, " n"]) -> Factor:
    """The factor of the samples' gradients times a weight for each."""
    if isinstance(factor, Later):
        rows = factor.rows

        def weighted(start: int, stop: int) -> Tensor:
            grads = rows(start, stop)
            return grads * weights[start - factor.start : stop - factor.start].view(-1, *(1,) * (grads.dim() - 1))

        return replace(factor, rows=weighted)
    if isinstance(factor, Outer):
        return factor.scaled(weights)
    if isinstance(factor, Gather):
        return replace(factor, g=factor.g * weights.view(-1, 1, 1).to(factor.g.dtype))
    return replace(factor, grad=factor.grad * weights.view(-1, *(1,) * (factor.grad.dim() - 1)).to(factor.grad.dtype))


def left_gram(train: Outer | Gather, val: Outer | Gather) -> Float[Tensor, "nr ms"]:
    """Left · left' for every pair of positions, `[n * R, m * R']`."""
    if isinstance(train, Gather) and isinstance(val, Gather):
        return (train.ids.flatten()[:, None] == val.ids.flatten()).to(train.g.dtype)
    if isinstance(val, Gather):
        return train.left_at(val.ids.flatten()).flatten(0, 1)  # type: ignore[union-attr]
    if isinstance(train, Gather):
        return left_gram(val, train).t()
    return sum_of_blocks(train, val, lambda a, b: a.flatten(0, 1) @ b.flatten(0, 1).t())


def right_gram(train: Outer | Gather, val: Outer | Gather) -> Float[Tensor, "nr ms"]:
    """Right · right' for every pair of positions, `[n * R, m * R']`."""
    right = [f.g if isinstance(f, Gather) else f.right for f in (train, val)]
    return right[0].flatten(0, 1) @ right[1].flatten(0, 1).t()


def total(factor: Factor, shape: Sequence[int]) -> Tensor:
    """The sum of the samples' gradients, `[*shape]`."""
    if isinstance(factor, Outer):
        right, (p, q), step = factor.right.flatten(0, 1), factor.size, factor.rows_at_a_time
        if step >= p:
            return (factor.left.flatten(0, 1).t() @ right).view(shape)
        whole = right.new_empty(p, q)
        for start in range(0, p, step):
            stop = min(start + step, p)
            torch.mm(factor.left_rows(start, stop).flatten(0, 1).t(), right, out=whole[start:stop])
        return whole.view(shape)
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
