"""The tiles of a block as one operator of a compiled graph: a loop that fills a buffer again and again is no graph.

The operator's body is the loop itself, with the quantities as they are. A function of tiles that a user wrote is no
part of it: it is recorded once, with one tile of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ghostfunc._accumulate import Accumulator, Setting, by_tiles
from ghostfunc._factors import Dense, Factor, Gather, Outer
from ghostfunc._graph_ops import WAITS
from ghostfunc._quantities import Along, Dot, Gram, Norm, Norms
from ghostfunc._tiles import Block


def by_operator(block: Block, accumulators: list[Accumulator], *, want_grad: bool) -> Tensor | None:
    """Add a block's share to quantities, as `by_tiles` does, with an operator in place of its loop.

    Args:
        block: the block.
        accumulators: the quantities.
        want_grad: whether the sum over the train samples is wanted.

    Returns:
        That sum, `[p, q]`, or None where it is not wanted.
    """
    kinds = [_kind(a) for a in accumulators]
    others = [a for a, kind in zip(accumulators, kinds, strict=True) if not kind]
    grad = by_tiles(block, others, want_grad=want_grad) if others else None
    known = [(a, kind) for a, kind in zip(accumulators, kinds, strict=True) if kind]
    if not known:
        return grad
    summed, *shares = torch.ops.ghostfunc.tiles(
        _pairs(block.train, block),
        _pairs(block.val, block) if any(a.val for a, _ in known) else [],
        [_direction(block, a) for a, kind in known if kind == "along"],
        [block.rows, block.cols],
        [kind for _, kind in known],
        want_grad and grad is None,
    )
    for (a, _), share in zip(known, shares, strict=True):
        a.add(block.name, share)
    return summed if want_grad and grad is None else grad


def _kind(accumulator: Accumulator) -> str:
    """What the operator calls a quantity; "" for what it does not know."""
    if isinstance(accumulator, Norms):
        return "norm"
    asked = getattr(accumulator, "asked", None)
    if isinstance(asked, Gram):
        return "gram"
    if isinstance(asked, (Along, Dot)):
        return {"": "along", "sum": "dot", "each": "dot each"}[accumulator.val]
    return ""


def _direction(block: Block, accumulator: Any) -> Tensor:
    direction = accumulator.direction[block.name].to(accumulator.setting.dtype)
    return block.entries(direction).reshape(block.rows, block.cols)


def _pairs(factors: Sequence[Factor], block: Block) -> list[Tensor]:
    """Factors as tensors, two for each: sides `[n, R, p]` and `[n, R, q]`, ids and rows, or gradients and nothing."""
    found: list[Tensor] = []
    for factor in factors:
        if isinstance(factor, Outer):
            found += [factor.left, factor.right]
        elif isinstance(factor, Gather):
            found += [factor.ids, factor.g]
        else:
            grads = factor.dense(block.shape).reshape(-1, block.rows, block.cols)
            found += [grads, grads.new_empty(0)]
    return found


def _factors(pairs: Sequence[Tensor]) -> Iterator[Factor]:
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        if other.dim() == 1:
            yield Dense(one)
        else:
            yield Outer(other, one) if one.is_floating_point() else Gather(one, other)


# ---------------------------------------------------------------- the operator


def _tiles(
    train: Sequence[Tensor],
    val: Sequence[Tensor],
    along: Sequence[Tensor],
    shape: Sequence[int],
    kinds: Sequence[str],
    want_grad: bool,
) -> list[Tensor]:
    block = Block("", tuple(shape), None, tuple(_factors(train)), tuple(_factors(val)))
    like = train[1] if train[1].dim() > 1 else train[0]
    n, m = len(train[0]), len(val[0]) if val else 0
    setting = Setting({"": like.new_empty(1).expand(*shape)}, ("",), like.dtype, n, m, m)
    directions = iter(along)
    accumulators = [_started(kind, setting, directions) for kind in kinds]
    grad = by_tiles(block, accumulators, want_grad=want_grad)
    return [like.new_empty(0) if grad is None else grad, *(a.columns[""] for a in accumulators)]


def _started(kind: str, setting: Setting, directions: Iterator[Tensor]) -> Accumulator:
    if kind == "along":
        return Along({"": next(directions)}).start(setting)
    quantity = {"norm": Norm(), "gram": Gram(), "dot": Dot(), "dot each": Dot("train val")}[kind]
    return quantity.start(setting)


_tiles_op = custom_op(
    "ghostfunc::tiles",
    _tiles,
    mutates_args=(),
    schema="(Tensor[] train, Tensor[] val, Tensor[] along, SymInt[] shape, str[] kinds, bool want_grad) -> Tensor[]",
    **WAITS,  # for the places of look-ups
)


def _widths(kind: str, n: int, m: int) -> tuple[int, ...]:
    return {"norm": (n,), "gram": (n, n), "dot each": (n, m)}.get(kind, (n, 1))


@_tiles_op.register_fake
def _(train, val, along, shape, kinds, want_grad):
    like = train[1] if train[1].dim() > 1 else train[0]
    n, m = len(train[0]), len(val[0]) if val else 0
    grad = like.new_empty(shape if want_grad else 0)
    return [grad, *(like.new_empty(_widths(kind, n, m)) for kind in kinds)]


@register_flop_formula(torch.ops.ghostfunc.tiles)
def _tiles_flops(train, val, along, shape, kinds, want_grad, **_: Any) -> int:
    p, q = shape
    n, m = train[0][0], val[0][0] if val else 0

    def making(pairs: Sequence[Any]) -> int:
        maps = [one for one, other in zip(pairs[::2], pairs[1::2], strict=True) if len(one) == len(other) == 3]
        return sum(2 * samples * positions * p * q for samples, positions, _ in maps)

    entries = sum(prod(_widths(kind, n, m)) for kind in kinds if kind != "norm")  # products of two rows of p * q
    return making(train) + making(val) + 2 * entries * p * q
