"""Accumulate: the share of one weight in every quantity that is wanted, at the least cost for all together.

A weight's share is had in one of two ways: from *pairs* of positions of its factors, or from the *tiles* of its
per-sample gradients, which serve any number of quantities at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostfunc._factors import Factor, Gather, Outer
from ghostfunc._nesting import recorded
from ghostfunc._planner import MEMORY_BOUND
from ghostfunc._ranks import Ranks
from ghostfunc._seen import Seen
from ghostfunc._sharded import ShardedDirection, is_sharded
from ghostfunc._stream import add_up
from ghostfunc._tiles import Block, Tile, tiles


@dataclass(frozen=True)
class Setting:
    """What a quantity is accumulated for.

    Attributes:
        params: parameters by name.
        names: those in play.
        dtype: of contractions.
        train: units of the train batch, n.
        val: validation samples, m; 0 without any.
        divisor: what the train samples' losses are divided by in the run.
        ranks: those that have a share of the samples; None without a group.
    """

    params: Mapping[str, Tensor]
    names: tuple[str, ...]
    dtype: torch.dtype
    train: int
    val: int
    divisor: int = 1
    ranks: Ranks | None = None

    def direction(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A direction that is asked for weight by weight; what is sharded is whole then."""
        if not any(map(is_sharded, given.values())):
            return given
        return ShardedDirection({name: given[name] for name in self.names}, self.dtype, self.ranks)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of the contractions' dtype, where the parameters are."""
        return torch.zeros(shape, dtype=self.dtype, device=next(iter(self.params.values())).device)


class Accumulator(ABC):
    """The share of every weight in one quantity, summed up by parameter: `columns[name]`."""

    val = ""  # what it needs of the validation samples: "", "sum" or "each"
    together = False  # whether a tile has to have all samples
    adds_up = True  # whether it is a sum of products of one use with one use

    def __init__(self, setting: Setting, *shape: int) -> None:
        self.setting = setting
        self.columns = {name: setting.zeros(*shape) for name in setting.names}

    def add(self, name: str, share: Tensor, first: int = 0) -> None:
        """Add a weight's share, of all samples or of those from `first` on."""
        if len(share) == len(self.columns[name]):
            self.columns[name] = self.columns[name] + share
        else:
            self.columns[name][first : first + len(share)] += share

    def prepare(self, block: Block) -> None:
        """Have what ranks exchange for a block: which way its share is added may differ between them."""
        return

    @abstractmethod
    def pairs_cost(self, block: Block) -> float | int:
        """FLOPs of the share from pairs; infinite where only tiles give it."""

    @abstractmethod
    def tile_cost(self, block: Block) -> float | int:
        """FLOPs of the share from tiles that are there."""

    @abstractmethod
    def by_pairs(self, block: Block) -> None:
        """Add a block's share from pairs, where that is possible."""

    @abstractmethod
    def by_tile(self, tile: Tile) -> None:
        """Add a tile's share."""

    @abstractmethod
    def value(self) -> Any:
        """The quantity, once every weight's share is in."""


def accumulate(
    block: Block, accumulators: list[Accumulator], *, want_grad: bool, budget: int | None = None
) -> Tensor | None:
    """Add a block's share to every quantity, at the least cost for all together.

    Args:
        block: the block.
        accumulators: the quantities.
        want_grad: whether the sum over the train samples is wanted.
        budget: bytes of working memory; None for what suits the device.

    Returns:
        That sum, `[p, q]`, or None where it is not wanted or did not come by the way.
    """
    if not block.val:
        accumulators = [a for a in accumulators if not a.val]
    if not accumulators:
        return None
    for a in accumulators:
        a.prepare(block)
    passes = accumulators[0].setting.train * len(block.train) * block.rows * block.cols
    making = block.making(block.train) + MEMORY_BOUND * passes
    making += block.making(block.val) if any(a.val for a in accumulators) else 0
    all_by_pairs = sum(a.pairs_cost(block) for a in accumulators) + want_grad * block.making(block.train)
    with_tiles = making + sum(min(a.tile_cost(block), a.pairs_cost(block)) for a in accumulators)
    makes_tiles = with_tiles < all_by_pairs and not any(isinstance(f, Seen) for f in block.train)
    from_tiles = [a for a in accumulators if makes_tiles and a.tile_cost(block) <= a.pairs_cost(block)]
    for a in accumulators:
        if all(a is not other for other in from_tiles):
            a.by_pairs(block)
    if not makes_tiles:
        return None
    if recorded(accumulators[0].setting.params[block.name]):  # a loop into a buffer is no graph
        from ghostfunc._tile_op import by_operator  # here, for it needs the quantities, which need this module

        return by_operator(block, from_tiles, want_grad=want_grad)
    return by_tiles(block, from_tiles, want_grad=want_grad, budget=budget)


def by_tiles(
    block: Block, accumulators: list[Accumulator], *, want_grad: bool, budget: int | None = None
) -> Tensor | None:
    """Add a block's share to quantities from its tiles; the sum over the train samples where it is wanted."""
    grad: Tensor | None = None
    each_val, together = any(a.val == "each" for a in accumulators), any(a.together for a in accumulators)
    for tile in tiles(block, each_val=each_val, together=together, budget=budget):
        if want_grad and grad is None:
            grad = tile.grads.new_empty(block.rows, block.cols)
        if grad is not None:
            add_up(tile.grads, grad[tile.start : tile.stop], fresh=tile.first == 0)
        for a in accumulators:
            a.by_tile(tile)
    return grad


def pairs_flops(block: Block, ours: tuple[Factor, ...], theirs: tuple[Factor, ...], *, n: int, m: int) -> float | int:
    """FLOPs of the products of every position of n samples with every position of m, use by use."""
    flops = 0
    for one in ours:
        for other in theirs:
            if isinstance(one, Outer | Gather) and isinstance(other, Outer | Gather):
                indexed = isinstance(one, Gather) or isinstance(other, Gather)  # the rows' side is no product then
                width = block.cols + (0 if indexed else block.rows)
                flops += 2 * n * one.positions * m * other.positions * width
            else:
                flops += 2 * n * m * block.rows * block.cols
    return flops
