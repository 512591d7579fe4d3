"""Per-sample gradients as a stream of tiles: one weight at a time, some of its rows, some or all of the samples.

    tile[i] = sum over uses of (left_i^T right_i)[start:stop]            [S, rows, cols]

The uses of a weight add up inside a tile, so that cross terms between them need no care. A tile is made in a buffer
that stays in the cache, handed to whatever wants it, and overwritten by the next one: memory is that of a tile, never
S x the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Gather, Later, Outer, Own
from ghostfunc._nesting import functorch_level, recorded
from ghostfunc._parts import Part
from ghostfunc._planner import at_a_time, tile_bytes
from ghostfunc._products import meet, same
from ghostfunc._run_result import Run, base_factor
from ghostfunc._sites import Site
from ghostfunc._stream import per_sample


@dataclass(frozen=True, eq=False)
class Block:
    """Entries of a parameter that every use of them has in one layout, as a matrix `[p, q]`.

    A weight `[d_out, d_in]` is one block, and so is each expert of a stack of experts. A vector is a matrix of one row.

    Attributes:
        name: the parameter's.
        shape: of the entries, as they are used.
        part: which entries of the parameter; None for all, as the parameter has them.
        train: the uses' factors, of the train samples.
        val: of the validation samples.
    """

    name: str
    shape: tuple[int, ...]
    part: Part | None
    train: tuple[Factor, ...]
    val: tuple[Factor, ...] = ()

    @property
    def rows(self) -> int:
        """The rows of the matrix, p."""
        return math.prod(self._table[:-1]) if self._table else self.shape[0] if len(self.shape) > 1 else 1

    @property
    def cols(self) -> int:
        """The columns of the matrix, q."""
        return math.prod(self.shape) // self.rows if self.rows else 0

    @property
    def _table(self) -> tuple[int, ...]:
        """The shape of a table of more than two dimensions, whose rows are looked up; empty for anything else."""
        looked_up = any(isinstance(f, Gather) for f in (*self.train, *self.val))
        return self.shape if looked_up and len(self.shape) > 2 else ()

    def entries(self, tensor: Tensor) -> Tensor:
        """The block's entries of a tensor like the parameter: a view `[p, ...]`, to read or to write."""
        if self.part is not None:
            tensor = self.part.view(tensor)
        if self._table:
            return tensor.flatten(0, -2)
        return tensor if len(self.shape) > 1 else tensor.unsqueeze(0)

    def making(self, factors: Sequence[Factor]) -> int:
        """FLOPs of making the per-sample gradients of these factors."""
        outer = [f for f in factors if isinstance(f, Outer)]
        return sum(2 * f.right.shape[0] * f.right.shape[1] * self.rows * self.cols for f in outer)


@dataclass(frozen=True, eq=False)
class _ValTile:
    """Validation gradients of some rows of a block, made when they are asked for, and once."""

    block: Block
    start: int
    stop: int
    each_val: bool

    @cached_property
    def each(self) -> Tensor:
        """`[m, rows * cols]`."""
        return _made(self.block, self.block.val, self.start, self.stop, None).flatten(1)

    @cached_property
    def sum(self) -> Tensor:
        """`[1, rows * cols]`."""
        if self.each_val:
            return self.each.sum(0, keepdim=True)
        return sum(_summed(self.block, f, self.start, self.stop) for f in self.block.val).reshape(1, -1)  # type: ignore[union-attr]


@dataclass(frozen=True, eq=False)
class Tile:
    """Per-sample gradients of some rows of a weight.

    Attributes:
        name: the parameter's.
        grads: `[S, rows, cols]`: sample by sample, the gradients of these rows. The memory is used again for the next
            tile: copy what is to be kept.
        start: the first row, counted in the block.
        block: what the rows are rows of.
        vals: the validation samples' gradients of the same entries.
        first: the first of these samples; 0 where they are all there.
    """

    name: str
    grads: Tensor
    start: int
    block: Block
    vals: _ValTile
    first: int = 0

    @property
    def stop(self) -> int:
        """The row behind the last one."""
        return self.start + self.grads.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        """The same entries of a tensor like the parameter: `[rows, cols]`."""
        return self.block.entries(tensor)[self.start : self.stop].reshape(self.grads.shape[1:])

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write values `[rows, cols]` to the same entries of a tensor like the parameter."""
        place = self.block.entries(tensor)[self.start : self.stop]
        place.copy_(values.reshape(place.shape))

    @property
    def flat(self) -> Tensor:
        """The gradients as rows: `[S, rows * cols]`."""
        return self.grads.flatten(1)

    @property
    def val(self) -> Tensor:
        """The validation samples' gradients of the same entries: `[m, rows * cols]`."""
        return self.vals.each

    @property
    def val_sum(self) -> Tensor:
        """Their sum: `[1, rows * cols]`."""
        return self.vals.sum


def tiles(block: Block, *, each_val: bool = False, together: bool = True, budget: int | None = None) -> Iterator[Tile]:
    """The tiles of a block, one after the other.

    Args:
        block: the block, with a train factor at least.
        each_val: whether each validation sample's tile will be made too, which takes memory.
        together: whether a tile has all samples; otherwise as many as suits the products.
        budget: bytes of working memory; None for what suits the device.

    Yields:
        Tiles whose rows and samples together are all of the block's; those of the same rows one after the other.
    """
    block = replace(block, train=_as_values(block.train, block), val=_as_values(block.val, block))
    first, vals = _first(block.train), len(_first(block.val)) if each_val and block.val else 0
    n = len(first)
    limit = tile_bytes(first.device.type)
    limit = (limit if budget is None else min(limit, budget)) // first.element_size()
    samples, step = at_a_time(n, block.rows, block.cols, vals, limit)
    whole = functorch_level() is not None or recorded(first)
    if whole:
        samples, step = n, block.rows
    elif together:
        samples, step = n, max(1, min(block.rows, limit // max(1, (n + vals) * block.cols)))
    if not whole:
        step = min([step, *(f.rows_at_a_time for f in (*block.train, *block.val) if isinstance(f, Outer))])
    buffer = None if whole else first.new_empty(samples * step * block.cols)
    for start in range(0, block.rows, step):
        stop = min(start + step, block.rows)
        val_tile = _ValTile(block, start, stop, each_val)
        for sample in range(0, n, samples):
            some = tuple(f.part(sample, min(sample + samples, n)) for f in block.train) if samples < n else block.train
            yield Tile(block.name, _made(block, some, start, stop, buffer), start, block, val_tile, sample)


def _first(factors: tuple[Factor, ...]) -> Tensor:
    first = factors[0]
    return first.right if isinstance(first, Outer) else first.g if isinstance(first, Gather) else first.grad  # type: ignore[union-attr]


def _as_values(factors: tuple[Factor, ...], block: Block) -> tuple[Factor, ...]:
    """Linear maps first; gradients that are computed when they are asked for, computed."""
    computed = [Dense(f.dense(block.shape)) if isinstance(f, Later | Own) else f for f in factors]
    return tuple(sorted(computed, key=lambda f: not isinstance(f, Outer)))


def _made(block: Block, factors: tuple[Factor, ...], start: int, stop: int, buffer: Tensor | None) -> Tensor:
    """Per-sample gradients of some rows: `[S, stop - start, q]`."""
    samples, rows, cols = len(_first(factors)), stop - start, block.cols
    if functorch_level() is not None or recorded(_first(factors)):
        whole = sum(f.dense(block.shape).reshape(samples, block.rows, cols) for f in factors)
        return whole[:, start:stop]  # type: ignore[index]
    if buffer is None:
        buffer = _first(factors).new_empty(samples * rows * cols)
    tile = buffer[: samples * rows * cols].view(samples, rows, cols)
    if not isinstance(factors[0], Outer):
        tile.zero_()
    for place, factor in enumerate(factors):
        if isinstance(factor, Outer):
            left, right = factor.left_rows(start, stop), factor.right  # [S, R, rows], [S, R, q]
            if place == 0:
                per_sample(left, right, buffer)
            else:
                torch.baddbmm(tile, left.transpose(1, 2), right, out=tile)
        elif isinstance(factor, Gather):
            sample, position, row = _hits(factor, start, stop)
            tile.view(-1, cols).index_add_(0, sample * rows + row, factor.g[sample, position])
        else:
            tile += factor.dense(block.shape).reshape(samples, block.rows, cols)[:, start:stop]
    return tile


def _hits(look_up: Gather, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows start to stop are looked up: `(sample, position, row - start)`."""
    sample, position = ((look_up.ids >= start) & (look_up.ids < stop)).nonzero(as_tuple=True)
    return sample, position, look_up.ids[sample, position] - start


def _summed(block: Block, factor: Factor, start: int, stop: int) -> Tensor:
    """The sum over samples of some rows of one use's gradients: `[stop - start, q]`."""
    if isinstance(factor, Outer):
        return factor.left_rows(start, stop).flatten(0, 1).t() @ factor.right.flatten(0, 1)
    if isinstance(factor, Gather):
        sample, position, row = _hits(factor, start, stop)
        return factor.g.new_zeros(stop - start, block.cols).index_add_(0, row, factor.g[sample, position])
    return factor.dense(block.shape).reshape(-1, block.rows, block.cols)[:, start:stop].sum(0)


def blocks_of(run: Run, name: str, train: int, val: int = 0, val_run: Run | None = None) -> list[Block]:
    """The blocks of a parameter, from the factors that a run has kept.

    Args:
        run: the run of the train samples.
        name: the parameter.
        train: how many train samples there are.
        val: how many validation samples follow them in the same run.
        val_run: the run of the validation samples, where it is another.

    Returns:
        Blocks that have no entry in common. Where uses overlap in other ways, or the parameter enters through a tensor
        derived from it, one block of the whole parameter with dense per-sample gradients.
    """
    uses = [(site, run.factors[site], True) for site in run.sites(name) if site in run.factors]
    if val_run is not None:
        uses += [(site, val_run.factors[site], False) for site in val_run.sites(name) if site in val_run.factors]
    clusters: list[list[tuple[Site, Factor, bool]]] = []
    for use in uses:
        cluster = next((c for c in clusters if same(c[0][0], use[0])), None)
        if cluster is None:
            clusters.append([use])
        else:
            cluster.append(use)
    whole = any(c[0][0].tracked.part is None for c in clusters) and not all(
        c[0][0].tracked.derivation is None for c in clusters
    )
    whole = whole or any(meet(a[0][0], b[0][0]) for k, a in enumerate(clusters) for b in clusters[:k])
    if whole:
        dense = [(base_factor(run if own else val_run or run, s, f, name), own) for s, f, own in uses]
        return [_block(name, tuple(run.leaves[name].shape), None, dense, train, val)]
    found = []
    for cluster in clusters:
        tracked = cluster[0][0].tracked
        part = None if tracked.derivation is None else tracked.part
        found.append(_block(name, tuple(tracked.real.shape), part, [(f, own) for _, f, own in cluster], train, val))
    return [block for block in found if block.train]


def _block(
    name: str, shape: tuple[int, ...], part: Part | None, factors: list[tuple[Factor, bool]], train: int, val: int
) -> Block:
    """A block whose factors are the train run's (True) or another run's (False)."""
    own = [f for f, is_own in factors if is_own]
    others = [f for f, is_own in factors if not is_own]
    vals = [f.part(train, train + val) for f in own] if val else others
    return Block(name, shape, part, tuple(f.part(0, train) for f in own), tuple(vals))
