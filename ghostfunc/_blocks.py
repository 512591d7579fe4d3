"""Blocks: a parameter as matrices `[d_in, d_out]` side by side, d_in the side that meets the activation.

    blocks = parameter.reshape(split).permute(dims).reshape(count, d_in, d_out)

A use of the parameter, or of a part of it, is a matrix too: its rows and columns find their places in a block by the
strides of a view, or, where the use is of a copy, by indices that are sent the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._nesting import functorch_level, readable, with_values
from ghostfunc._operations import op_name, tensors_in
from ghostfunc._parts import SELECTIONS
from ghostfunc._sites import ISOMETRIES, Site, Tracked

_CASTS = frozenset("to float double half bfloat16 type type_as".split())
_MOST_DIMS = 5  # of a parameter whose blocks are searched for among all orders of its dimensions


class Entries(NamedTuple):
    """The entries of a parameter that a use has as its matrix `[p, q]`: (r, c) is number start + rows[r] + cols[c].

    Attributes:
        start: the number of the first.
        rows: `[p]`.
        cols: `[q]`.
    """

    start: int
    rows: Tensor
    cols: Tensor


class Box(NamedTuple):
    """Where the matrix of a use is in a parameter's blocks.

    Attributes:
        block: which block.
        rows_in: whether its rows are along d_in, rather than d_out.
        inside: the places along d_in.
        outside: the places along d_out.
    """

    block: int
    rows_in: bool
    inside: slice | Tensor
    outside: slice | Tensor


@dataclass(frozen=True)
class Blocks:
    """How a parameter is seen as blocks.

    Attributes:
        split: the shape that it is given first.
        dims: the order of that shape's dimensions.
        count: how many blocks.
        d_in: rows of a block.
        d_out: columns of a block.
    """

    split: tuple[int, ...]
    dims: tuple[int, ...]
    count: int
    d_in: int
    d_out: int

    def of(self, gradients: Tensor) -> Tensor:
        """Gradients `[b, *shape]` as blocks, `[b, count, d_in, d_out]`."""
        ordered = gradients.reshape(len(gradients), *self.split).permute(0, *(dim + 1 for dim in self.dims))
        return ordered.reshape(len(gradients), self.count, self.d_in, self.d_out)

    def back(self, blocks: Tensor) -> Tensor:
        """Blocks `[b, count, d_in, d_out]` as gradients `[b, *split]`, the entries in the parameter's own order."""
        ordered = blocks.reshape(len(blocks), *(self.split[dim] for dim in self.dims))
        order = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return ordered.permute(0, *(dim + 1 for dim in order)).contiguous()

    def position(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block, row and column of the parameter's entries, which are given by their numbers."""
        digits = []
        for size in reversed(self.split):
            digits.append(number % size)
            number = number // size
        digits.reverse()
        place = torch.zeros_like(number)
        for dim in self.dims:
            place = place * self.split[dim] + digits[dim]
        return place // (self.d_in * self.d_out), place // self.d_out % self.d_in, place % self.d_out

    def box(self, entries: Entries) -> Box | None:
        """Where the matrix of a use is; None where it is no rows times columns of one block."""
        block, rows_i, rows_o = self.position(entries.start + entries.rows)
        of_cols, cols_i, cols_o = self.position(entries.start + entries.cols)
        if not _constant(block) or not _constant(of_cols):
            return None
        if _constant(rows_o) and _constant(cols_i):
            return Box(int(block[0]), True, _places(rows_i), _places(cols_o))
        if _constant(rows_i) and _constant(cols_o):
            return Box(int(block[0]), False, _places(cols_i), _places(rows_o))
        return None


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _places(index: Tensor) -> slice | Tensor:
    start = int(index[0])
    in_turn = torch.arange(start, start + len(index), device=index.device)
    return slice(start, start + len(index)) if torch.equal(index, in_turn) else index


# ---------------------------------------------------------------- the entries of a use


@with_values
def place_of(site: Site, blocks: Blocks | None) -> Box | Blocks | None:
    """Where a use is in its parameter's blocks: in one, in all of them, or, where it is derived, in none."""
    if len(site.tracked.names) > 1 or blocks is None:
        return None
    entries = entries_of(site)
    box = None if entries is None else blocks.box(entries)
    return blocks if box is None and site.tracked.derivation is None else box


def entries_of(site: Site) -> Entries | None:
    """The entries of a parameter that a site uses; None where its tensor has other values than these."""
    tracked = _without_casts(site.tracked)
    root = _root(tracked)
    real = tracked.real
    if root is None or len(tracked.names) != 1 or real.is_complex() or not real.numel():
        return None
    split = max(real.dim() - 1, 0) if site.kind == "dense" else min(real.dim(), 1)
    parameter = root.real
    if tracked is root:
        in_order = [prod(real.shape[dim + 1 :]) for dim in range(real.dim())]  # whatever its strides are
        return _strided(0, real.shape, in_order, split)
    if functorch_level() is not None or not readable(parameter):
        return None
    same_memory = parameter.untyped_storage().data_ptr() == real.untyped_storage().data_ptr()
    if same_memory and parameter.is_contiguous() and parameter.dtype == real.dtype:
        start = int(real.storage_offset() - parameter.storage_offset())
        return _strided(start, real.shape, real.stride(), split)
    numbers = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    found = _sent_through(tracked, numbers)
    if found is None:
        return None
    matrix = found.reshape(prod(real.shape[:split]), -1)
    start = int(matrix[0, 0])
    rows, cols = matrix[:, 0] - start, matrix[0] - start
    return Entries(start, rows, cols) if torch.equal(matrix, start + rows[:, None] + cols) else None


def _strided(start: int, shape: Sequence[int], stride: Sequence[int], split: int) -> Entries:
    def numbers(dims: range) -> Tensor:
        found = torch.zeros(1, dtype=torch.int64)
        for dim in dims:
            found = (found[:, None] + stride[dim] * torch.arange(shape[dim])).flatten()
        return found

    return Entries(start, numbers(range(split)), numbers(range(split, len(shape))))


def _source(tracked: Tracked) -> Tracked | None:
    """The tracked tensor that one is derived from, where it is one alone."""
    how = tracked.derivation
    found = [] if how is None else [t for t in pytree.tree_leaves((how.args, how.kwargs)) if isinstance(t, Tracked)]
    return found[0] if len(found) == 1 else None


def _root(tracked: Tracked | None) -> Tracked | None:
    while tracked is not None and tracked.derivation is not None:
        tracked = _source(tracked)
    return tracked


def _without_casts(tracked: Tracked) -> Tracked:
    while tracked.derivation is not None and op_name(tracked.derivation.func) in _CASTS:
        source = _source(tracked)
        if source is None:
            break
        tracked = source
    return tracked


def _sent_through(tracked: Tracked, numbers: Tensor) -> Tensor | None:
    """The numbers of a parameter's entries, moved as the entries were; None where an operation computes with them."""
    how = tracked.derivation
    if how is None:
        return numbers
    source = _source(tracked)
    before = None if source is None else _sent_through(source, numbers)
    name = op_name(how.func)
    if before is None or name in _CASTS:
        return before
    if name not in ISOMETRIES | SELECTIONS and not (how.func is F.embedding and _plain_look_up(how.args, how.kwargs)):
        return None
    args, kwargs = pytree.tree_map(lambda leaf: before if leaf is source else leaf, (how.args, how.kwargs))
    out = how.again(args, kwargs)
    return out if how.out_of == 0 else tensors_in([out])[how.index]


def _plain_look_up(args: Sequence, kwargs: dict) -> bool:
    """Whether every row of an embedding that is looked up has a gradient."""
    options = [*args[2:], *(value for key, value in kwargs.items() if key not in ("input", "weight", "norm_type"))]
    return all(value is None or value is False or isinstance(value, float) for value in options)


# ---------------------------------------------------------------- the blocks of a parameter


class FirstUse(NamedTuple):
    """What the first use of a parameter tells about it.

    Attributes:
        kind: "outer", "gather" or "dense".
        op: the operation.
        rows_in: whether the rows of the use's matrix meet the activation.
        maps: `(maps, p, q)` where the use is of several linear maps side by side.
        shape: of the tensor that is used.
        itself: whether that is the parameter, or a cast of it.
        entries: which entries of the parameter it is; None where it is computed from them.
    """

    kind: str
    op: str
    rows_in: bool
    maps: tuple[int, int, int] | None
    shape: tuple[int, ...]
    itself: bool
    entries: Entries | None


def first_use(site: Site, *, rows_in: bool, maps: tuple[int, int, int] | None) -> FirstUse:
    """What a site tells, of which the factor says how its rows and columns lie."""
    itself = _without_casts(site.tracked).derivation is None
    entries = entries_of(site)
    if maps is not None and not itself and entries is not None:  # of the first map, which tells the others' order
        _, p, q = maps
        entries = _first_map(site, p, q)
    return FirstUse(site.kind, site.op, rows_in, maps, tuple(site.tracked.real.shape), itself, entries)


def _first_map(site: Site, p: int, q: int) -> Entries | None:
    tracked = _without_casts(site.tracked)
    root = _root(tracked)
    assert root is not None
    found = _sent_through(tracked, torch.arange(root.real.numel(), device=root.real.device).view(root.real.shape))
    if found is None:
        return None
    matrix = found.reshape(-1, p, q)[0]
    start = int(matrix[0, 0])
    return Entries(start, matrix[:, 0] - start, matrix[0] - start)


def blocks_of(shape: Sequence[int], use: FirstUse | None) -> Blocks:
    """A parameter's blocks, by its first use.

    Args:
        shape: the parameter's.
        use: its first use; None for a parameter that is not used.

    Returns:
        One block for a linear map, `[d_in, d_out]`; one for each group of a convolution and each expert of a
        stack `[experts, ...]`; for a table `[rows, d_out]`; for a vector `[numbers, 1]`.
    """
    sizes = [size for size in shape if size != 1]
    if use is None:
        return _matrix(shape, rows_in=False) if len(sizes) > 1 else _vector(shape)
    if use.kind == "dense" and use.maps is None:
        return (
            _vector(shape)
            if len(sizes) < 2
            else Blocks((prod(sizes[:-1]), sizes[-1]), (0, 1), 1, prod(sizes[:-1]), sizes[-1])
        )
    if use.itself:
        if use.maps is None:
            return _matrix(shape, rows_in=use.rows_in)
        return _side_by_side(use.maps, rows_in=use.rows_in)
    if use.entries is not None:
        p, rest = len(use.entries.rows), prod(shape[1:])
        if "conv" in use.op and p < shape[0] and shape[0] % p == 0 and len(use.entries.cols) == rest:
            return _side_by_side((shape[0] // p, p, rest), rows_in=use.rows_in)
        found = _searched(shape, use.entries, use.rows_in)
        if found is not None:
            return found
    if len(sizes) < 2:
        return _vector(shape)
    return _matrix(shape, rows_in=use.rows_in and use.shape == tuple(shape))


def _vector(shape: Sequence[int]) -> Blocks:
    return Blocks((prod(shape),), (0,), 1, prod(shape), 1)


def _matrix(shape: Sequence[int], *, rows_in: bool) -> Blocks:
    p, q = shape[0], prod(shape[1:])
    return Blocks((p, q), (0, 1), 1, p, q) if rows_in else Blocks((p, q), (1, 0), 1, q, p)


def _side_by_side(maps: tuple[int, int, int], *, rows_in: bool) -> Blocks:
    count, p, q = maps
    return Blocks(maps, (0, 1, 2), count, p, q) if rows_in else Blocks(maps, (0, 2, 1), count, q, p)


def _searched(shape: Sequence[int], entries: Entries, rows_in: bool) -> Blocks | None:
    """The smallest blocks, of the parameter's dimensions in any order, of which one holds the matrix of the use."""
    split = tuple(size for size in shape if size != 1)
    if len(split) > _MOST_DIMS:
        return None
    best: Blocks | None = None
    for dims in permutations(range(len(split))):
        ordered = [split[dim] for dim in dims]
        for first in range(len(split) + 1):
            for second in range(first, len(split) + 1):
                sizes = prod(ordered[:first]), prod(ordered[first:second]), prod(ordered[second:])
                blocks = Blocks(split, dims, *sizes)
                if best is not None and best.d_in * best.d_out <= blocks.d_in * blocks.d_out:
                    continue
                box = blocks.box(entries)
                if box is not None and box.rows_in == rows_in:
                    best = blocks
    return best
