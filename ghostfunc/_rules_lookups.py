"""Rules of look-ups: entries of a parameter that indices among the data pick. Rows of a table are an embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._interpreter import Interpreter
from ghostfunc._lift import lift
from ghostfunc._nesting import readable
from ghostfunc._sample_axis import SampleAxis, samples_of
from ghostfunc._tap import NO_RULE, Rule


def _is_index(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype in (torch.int64, torch.int32)


def _inside(ids: Tensor, size: int) -> bool:
    return not readable(ids) or not bool(((ids < -size) | (ids >= size)).any())


def _getitem(mode: Interpreter, func: Callable, table: Tensor, index: Any) -> Any:
    """Rows `table[i]`, `table[i, j]` or `table[:, i]` by integer tensors: a look-up in one table of what they index."""
    items = list(index) if isinstance(index, tuple) else [index]
    ahead = 0
    while ahead < len(items) and isinstance(items[ahead], slice) and items[ahead] == slice(None):
        ahead += 1
    indices = items[ahead:]
    if mode.find(table) is None or not indices or not all(_is_index(item) for item in indices):
        return NO_RULE
    sizes = table.shape[ahead : ahead + len(indices)]
    if len(indices) > 1 and not all(_inside(ids, size) for ids, size in zip(indices, sizes, strict=True)):
        return NO_RULE  # torch's own error
    rows: Any = 0
    for ids, size in zip(indices, sizes, strict=True):
        counted = mode.call(torch.where, mode.call(torch.lt, ids, 0), mode.call(torch.add, ids, size), ids)
        rows = mode.call(torch.add, counted, rows if isinstance(rows, int) else mode.call(torch.mul, rows, size))
    if ahead:
        table = mode.call(torch.movedim, table, list(range(ahead)), list(range(len(sizes), len(sizes) + ahead)))
    behind = table.shape[len(sizes) :]
    found = mode.call(F.embedding, rows, mode.call(torch.reshape, table, (sizes.numel(), behind.numel())))
    found = mode.call(torch.reshape, found, (*rows.shape, *behind))
    if not ahead:
        return found
    return mode.call(torch.movedim, found, list(range(rows.dim(), rows.dim() + ahead)), list(range(ahead)))


def _index_select(mode: Interpreter, func: Callable, input: Tensor, dim: int, index: Tensor) -> Any:
    return _getitem(mode, func, input, (*(slice(None),) * (dim % input.dim()), index))


def _gather(mode: Interpreter, func: Callable, input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Any:
    axis = samples_of(index)
    dim %= input.dim()
    fits = isinstance(axis, SampleAxis) and axis.dim != dim and input.shape[axis.dim] == axis.size
    if mode.find(input) is None or mode.segments is not None or not fits:
        return NO_RULE
    return torch.gather(lift(mode, "gather", input, input.shape), dim, index, **kwargs)


def _take_along_dim(mode: Interpreter, func: Callable, input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    axis = samples_of(indices)
    rank = input.dim()
    if mode.segments is not None or dim is None or indices.dim() != rank:
        return NO_RULE
    if not isinstance(axis, SampleAxis) or axis.dim == dim % rank:
        return NO_RULE
    shape = list(torch.broadcast_shapes(*(t.movedim(dim, -1).shape[:-1] for t in (input, indices))))
    shape.insert(dim % rank, input.shape[dim])
    return torch.take_along_dim(lift(mode, "take_along_dim", input, torch.Size(shape)), indices, dim)


LOOKUPS: dict[str, Rule] = {
    "getitem": _getitem,
    "index_select": _index_select,
    "gather": _gather,
    "take_along_dim": _take_along_dim,
}
