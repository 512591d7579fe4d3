"""Lift: a parameter broadcast to the shape of the data, with a tap behind it, so that an operation meets data alone.

What reaches the lifted tensor in the backward is the entrywise gradient, and the factor is its sum over each sample:
Dense, or Own where the tensor has a part for each sample. The lifted tensor takes no memory: it is a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Gather, Own
from ghostfunc._interpreter import Interpreter
from ghostfunc._operations import op_name
from ghostfunc._sample_axis import Partition, RowMap, SampleAxis
from ghostfunc._sites import Tracked
from ghostfunc._tap import Use, tapped

_REPEATS = frozenset("expand expand_as broadcast_to repeat tile contiguous clone".split())


def unexpanded(tracked: Tracked) -> Tracked:
    """The tracked tensor that one was broadcast from; itself where it was not."""
    how = tracked.derivation
    if how is None or op_name(how.func) not in _REPEATS or not how.args or not isinstance(how.args[0], Tracked):
        return tracked
    base = how.args[0].real.shape
    behind = tracked.real.shape[tracked.real.dim() - len(base) :]
    broadcasts = all(small in (1, whole) for small, whole in zip(base, behind, strict=True))
    return unexpanded(how.args[0]) if broadcasts else tracked


def dense_or_own(entry: Tensor, samples: Partition, shape: torch.Size) -> Factor:
    """The factor of a tensor that broadcasts to the data, from its gradient at every entry.

    Args:
        entry: the gradient, of the data's shape.
        samples: where the samples are in it.
        shape: the tensor's.

    Returns:
        Dense, or Own where the tensor has a part for each sample.
    """
    if isinstance(samples, SampleAxis) and samples.samples > 1 and samples.owners is None:
        dim = samples.dim - entry.dim() + len(shape)
        if dim >= 0 and shape[dim] != 1:  # the tensor has a part for each sample
            axis = SampleAxis(dim, samples.samples, samples.outer, samples.inner)
            return Own(axis.split(entry.sum_to_size(shape)), axis)
    return Dense(samples.sum_to(entry, shape))


def is_table_of_positions(narrow: torch.Size, shape: torch.Size) -> bool:
    """Whether a tensor `[..., T, d]` that broadcasts to the data `[B, T, d]` has a row for each position."""
    return narrow[-2:] == shape[-2:] and len(narrow) >= 2 and narrow[:-2].numel() == 1 and narrow[-2] > 1


def looked_up(entry: Tensor, samples: RowMap) -> Gather:
    """The factor of a tensor with a row for each position, from its gradient at every entry: a look-up of rows.

    A segment has few of the positions, and one of its own gradients `[T, d]` would be as large as a batch's row.
    """
    positions = torch.arange(entry.shape[-2], device=entry.device).expand(entry.shape[:-1])
    return Gather(samples.rows(positions.unsqueeze(-1)).squeeze(-1), samples.rows(entry))


def lift(mode: Interpreter, op: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """A tracked tensor as one that is used with data: broadcast, with a tap; any other tensor as it is.

    Args:
        mode: the interpreter.
        op: the operation that it is for. Its result must have the samples where the lifted tensor has them.
        tensor: the tensor.
        shape: the data's shape.
        dtype: the dtype that the operation uses it in; its own where none is given.

    Returns:
        `[*shape]`.
    """
    tracked = mode.find(tensor)
    if tracked is None:
        return tensor
    base = unexpanded(tracked)
    narrow = base.real.shape

    def factor(g: Tensor, samples: Partition) -> Factor:
        if mode.segments is not None and isinstance(samples, RowMap) and is_table_of_positions(narrow, g.shape):
            return looked_up(g, samples)
        return dense_or_own(g, samples, narrow)

    use = Use(base, "dense", factor, lambda g: g.sum_to_size(narrow))
    return tapped(mode, op, mode.value(base.sentinel).to(dtype or tensor.dtype).expand(shape), (), use)
