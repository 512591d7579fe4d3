"""Follows rows that are picked, masked, sorted, scattered: the sample that owns each of them.

Tokens on their way to experts and back are rows out of order. A row's owner is read off the values of the index that
picks it: `x[index]` has owners[index], `out.index_add(0, index, rows)` has at each index the owner of its row. Where
the index itself was computed from the whole batch, a sample may go another way when it is alone: that is noted, and a
sample's loss alone is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc._axis_algebra import Op, agree, aligned, argument, ints, mixed, unknown
from ghostfunc._nesting import readable
from ghostfunc._operations import Operation
from ghostfunc._sample_axis import Lost, SampleAxis, Samples, samples_of, scattered, set_samples

_ENUMERATES = "_ghost_enumerates"  # marks the result of arange(n)
_SAME_ORDER = frozenset("getitem view reshape unsqueeze squeeze flatten to long contiguous clone".split())


def mark_enumeration(operation: Operation, args: Sequence[Any], out: Any) -> None:
    """Remember that a tensor holds arange(n), which a compiler's tensors do not tell by their values."""
    name, in_place = operation
    if args and (in_place or name == "setitem") and hasattr(args[0], _ENUMERATES):
        delattr(args[0], _ENUMERATES)
    elif (name in _SAME_ORDER and _same_numbers(name, args, out)) or (name == "arange" and len(ints(args)) == 1):
        setattr(out, _ENUMERATES, True)


def _same_numbers(name: str, args: Sequence[Any], out: Tensor) -> bool:
    """Whether a result holds the numbers of an enumeration, in order, along other dimensions."""
    if not args or not getattr(args[0], _ENUMERATES, False) or out.numel() != args[0].numel():
        return False
    index = args[1] if name == "getitem" else None
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, slice) for item in items)


def _enumerated(axis: SampleAxis, index: Tensor) -> int | None:
    """The dimension along which an index is arange(samples), each sample in its place; None where it is another."""
    if axis.outer * axis.inner != 1 or axis.owners is not None or index.numel() != axis.samples:
        return None
    long = [dim for dim, size in enumerate(index.shape) if size == axis.samples]
    return long[0] if long and getattr(index, _ENUMERATES, False) else None


def _owners(op: Op, axis: SampleAxis, index: Tensor) -> Tensor | Lost:
    """The owner of each entry that an integer tensor picks along the samples' dimension, in the index's shape."""
    if not readable(index):
        return unknown(op.name)
    owners = axis.of_index().to(index.device)[index]
    carried = samples_of(index)
    if isinstance(carried, Lost):
        op.notes.append(f"`{op.name}` picks rows by an index that the whole batch decides")
    elif carried is not None:
        own = carried.of_index().to(index.device).view(-1, *(1,) * (index.dim() - 1 - carried.dim))
        if bool(((owners != own) & (owners >= 0) & (own >= 0)).any()):
            return unknown(op.name)
    return owners


def _along_one(name: str, owners: Tensor | Lost, start: int, samples: int) -> Samples:
    """The axis of owners `[*shape]` whose dimensions stand at `start` in the result: they vary along one of them."""
    if isinstance(owners, Lost):
        return owners
    if owners.dim() == 1:
        return scattered(start, samples, owners)
    for dim in sorted(range(owners.dim()), key=lambda d: owners.shape[d] == 1):
        lines = owners.movedim(dim, 0).flatten(1)
        if lines.numel() and readable(lines) and bool((lines == lines[:, :1]).all()):
            return scattered(start + dim, samples, lines[:, 0])
    return unknown(name)


def _coordinates(op: Op, mask: Tensor) -> tuple[Tensor, ...] | None:
    """Where a mask is true, each coordinate with the owners of its rows."""
    if not readable(mask):
        return None
    found = mask.nonzero(as_tuple=True)
    axis = samples_of(mask)
    for coordinate in found:
        if isinstance(axis, SampleAxis):
            owners = axis.of_index().to(mask.device)[found[axis.dim]]
            set_samples(coordinate, scattered(0, axis.samples, owners))
        elif axis is not None:
            set_samples(coordinate, axis)
    return found


def _items(op: Op, tensor: Tensor, index: Any) -> list[Any] | Lost:
    """An index as one item for each dimension: masks as integers, scalars of tensors as numbers, `...` written out."""
    items: list[Any] = []
    for item in index if isinstance(index, tuple) else [index]:
        if isinstance(item, (list, range)):
            item = torch.as_tensor(item)
        if not isinstance(item, Tensor):
            items.append(item)
        elif item.dtype in (torch.bool, torch.uint8):
            coordinates = _coordinates(op, item)
            if coordinates is None or not coordinates:
                return unknown("indexing with a mask")
            items += coordinates
        elif item.dim() == 0:
            if isinstance(samples_of(item), Lost):
                op.notes.append(f"`{op.name}` picks rows by a number that the whole batch decides")
            items.append(int(item) if readable(item) else 0)
        else:
            items.append(item)
    used = sum(item is not None and item is not Ellipsis for item in items)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    place = next(k for k, item in enumerate(items) if item is Ellipsis)
    items[place : place + 1] = [slice(None)] * (tensor.dim() - used)
    return items


def _getitem(op: Op) -> Samples:
    """Indexing: slices and None keep the samples' dimension, integers pick along it or beside it."""
    tensor = op.args[0]
    axis = samples_of(tensor)
    items = _items(op, tensor, op.args[1])
    if isinstance(items, Lost):
        return items
    name = "indexing"
    advanced = [k for k, item in enumerate(items) if isinstance(item, Tensor)]
    shape = torch.broadcast_shapes(*(items[k].shape for k in advanced)) if advanced else torch.Size()
    adjacent = bool(advanced) and advanced == list(range(advanced[0], advanced[-1] + 1))
    found: list[Samples] = []
    source, target = 0, 0
    start = None  # where the gathered dimensions stand in the result
    if advanced and not adjacent:
        start, target = 0, len(shape)
    for item in items:
        if item is None:
            target += 1
            continue
        here = isinstance(axis, SampleAxis) and axis.dim == source
        if isinstance(item, Tensor):
            if start is None:
                start, target = target, target + len(shape)
            dim = _enumerated(axis, item) if here else None  # type: ignore[arg-type]
            if dim is not None:
                found.append(SampleAxis(start + len(shape) - item.dim() + dim, item.numel()))
            elif here:
                owners = _owners(op, axis, item)  # type: ignore[arg-type]
                if isinstance(owners, Tensor):
                    owners = owners.expand(shape) if readable(item) else owners
                found.append(_along_one(name, owners, start, axis.samples))  # type: ignore[union-attr]
        elif isinstance(item, slice):
            if here:
                whole = item.indices(tensor.shape[source]) == (0, tensor.shape[source], 1)
                moved = axis.at(target)  # type: ignore[type-var]
                found.append(moved if whole else scattered(target, moved.samples, moved.of_index()[item]))
            target += 1
        elif here:
            return unknown("indexing one entry of the samples' dimension")
        source += 1
    for k in advanced:
        samples = samples_of(items[k])
        if isinstance(samples, SampleAxis):
            assert start is not None
            samples = samples.at(start + len(shape) - items[k].dim() + samples.dim)
        if not isinstance(samples, Lost):  # an index is data without a gradient: its doubts were noted
            found.append(samples)
        elif not isinstance(axis, SampleAxis):
            return samples
    return agree(name, found)


def assigned(op: Op) -> Samples:
    """What a tensor carries after `tensor[index] = value`."""
    target, index, value = op.args
    kept, given = samples_of(target), samples_of(value)
    name = "assignment to a part of a tensor"
    if isinstance(kept, Lost) or isinstance(given, Lost):
        return kept if isinstance(kept, Lost) else given
    items = _items(op, target, index)
    if isinstance(items, Lost):
        return items
    if isinstance(kept, SampleAxis):
        slot = target[index]
        at_slot = _getitem(Op("getitem", (target, index), {}, [target], slot, 0, [slot], op.notes))
        if not isinstance(at_slot, SampleAxis):
            return kept if given is None and at_slot is None else unknown(name)
        both = agree(name, (at_slot, aligned(given, value, slot) if given is not None else None))
        return kept if isinstance(both, SampleAxis) else unknown(name)
    return _first_write(name, target, items, value, given)


def _first_write(name: str, target: Tensor, items: list[Any], value: Any, given: Samples) -> Samples:
    """The axis of a tensor without data after the first data is written to a part of it."""
    tensors = [item for item in items if isinstance(item, Tensor)]
    if tensors:
        simple = isinstance(items[0], Tensor) and len(tensors) == 1 and tensors[0].dim() == 1
        whole = simple and all(item == slice(None) for item in items[1:])
        axis = given if isinstance(given, SampleAxis) else samples_of(tensors[0])
        if not whole or not isinstance(axis, SampleAxis) or axis.dim != 0 or not readable(tensors[0]):
            return unknown(name) if given is not None or any(samples_of(t) is not None for t in tensors) else None
        return _put(name, None, 0, len(target), tensors[0], axis)
    if not isinstance(given, SampleAxis):
        return given
    places = []  # the target's dimension of each of the slot's
    for dim, item in enumerate(item for item in items if item is not None):
        if isinstance(item, slice):
            places.append(dim if item == slice(None) else None)
    if any(item is None for item in items):
        return unknown(name)
    at = given.dim + len(places) - value.dim()
    dim = places[at] if at >= 0 else None
    if dim is None or target.shape[dim] != given.size:
        return unknown(name)
    return given.at(dim)


def _put(name: str, axis: SampleAxis | None, dim: int, size: int, index: Tensor, source: SampleAxis) -> Samples:
    """The axis after rows were put at, or added to, the indices of a dimension of this size."""
    rows = source.of_index().to(index.device)
    owners = torch.full((size,), -1, device=index.device) if axis is None else axis.of_index().to(index.device).clone()
    before = owners[index]
    owners[index] = rows
    if bool(((before >= 0) & (before != rows)).any()) or not torch.equal(owners[index], rows):
        return mixed(name)
    return scattered(dim, source.samples, owners)


def _index_select(op: Op) -> Samples:
    axis, dim = op.axis, argument(op.args, op.kwargs, 1, "dim")
    index = argument(op.args, op.kwargs, 2, "index")
    if isinstance(axis, SampleAxis) and dim % op.args[0].dim() == axis.dim:
        return _along_one(op.name, _owners(op, axis, index), axis.dim, axis.samples)
    if isinstance(samples_of(index), SampleAxis):
        return unknown(op.name)
    return axis


def _index_add(op: Op) -> Samples:
    """index_add, index_copy: rows are added at the indices of one dimension."""
    target, dim = op.args[0], argument(op.args, op.kwargs, 1, "dim")
    index, source = argument(op.args, op.kwargs, 2, "index"), argument(op.args, op.kwargs, 3, "source", "tensor")
    dim %= target.dim()
    if index.dim() == 0:
        return unknown(op.name)
    axis, given, of_index = op.axis, samples_of(source), samples_of(index)
    if isinstance(of_index, Lost):
        op.notes.append(f"`{op.name}` puts rows at an index that the whole batch decides")
    if isinstance(given, SampleAxis) and given.dim != dim:
        return agree(op.name, (axis, given)) if not isinstance(of_index, SampleAxis) else unknown(op.name)
    rows = given if given is not None else of_index
    if not isinstance(rows, SampleAxis):
        return axis if rows is None else rows
    if (isinstance(axis, SampleAxis) and axis.dim != dim) or not readable(index):
        return unknown(op.name)
    return _put(op.name, axis, dim, target.shape[dim], index, rows.at(dim))  # type: ignore[arg-type]


def _along_index(op: Op) -> Samples:
    """gather, scatter, scatter_add, take_along_dim, index_fill: along another dimension than the samples'."""
    tensor = op.args[0]
    axis = op.axis
    dim = argument(op.args, op.kwargs, 2 if op.name == "take_along_dim" else 1, "dim")
    others = [t for t in [*op.args[1:], *op.kwargs.values()] if isinstance(t, Tensor)]
    if dim is None:
        return unknown(op.name)
    dim %= max(tensor.dim(), 1)
    if isinstance(axis, SampleAxis) and (dim == axis.dim or op.out.shape[axis.dim] != axis.size):
        return unknown(op.name)
    found = [axis]
    for other in others:
        samples = samples_of(other)
        if isinstance(samples, SampleAxis) and samples.dim == dim:
            return unknown(op.name)
        found.append(samples)
    return agree(op.name, found)


def _nonzero(op: Op) -> Samples:
    """nonzero(mask) and where(mask): each place belongs to the sample of the mask's entry."""
    axis, mask = op.axis, op.args[0] if op.args else op.tensors[0]
    if not isinstance(axis, SampleAxis) or not readable(mask):
        return axis if isinstance(axis, Lost) else unknown(op.name)
    coordinates = _coordinates(op, mask)
    return samples_of(coordinates[axis.dim]) if coordinates else unknown(op.name)


def _masked_select(op: Op) -> Samples:
    _, mask = torch.broadcast_tensors(*op.tensors[:2])
    axis = agree(op.name, (aligned(samples_of(t), t, mask) for t in op.tensors[:2]))
    if not isinstance(axis, SampleAxis) or not readable(mask):
        return axis if isinstance(axis, Lost) else unknown(op.name)
    owners = axis.of_index().to(mask.device)[mask.nonzero(as_tuple=True)[axis.dim]]
    return scattered(0, axis.samples, owners)


def _masked_scatter(op: Op) -> Samples:
    """target.masked_scatter(mask, source): the source's entries, in order, at the places of the mask."""
    target, mask, source = op.tensors[:3]
    axis = agree(op.name, (samples_of(target), aligned(samples_of(mask), mask, target)))
    given = samples_of(source)
    if not isinstance(axis, SampleAxis) or given is None or not readable(mask):
        return axis if given is None or isinstance(axis, Lost) else unknown(op.name)
    if not isinstance(given, SampleAxis):
        return given
    places = mask.expand_as(target).nonzero(as_tuple=True)[axis.dim]
    wanted = axis.of_index().to(mask.device)[places]
    entries = given.of_index().to(mask.device).view(-1, *(1,) * (source.dim() - 1 - given.dim)).expand(source.shape)
    return axis if torch.equal(entries.reshape(-1)[: len(wanted)], wanted) else unknown(op.name)


def moved(op: Op) -> Samples:
    """flip, roll, sort, argsort along the samples' dimension: the owners move with the rows."""
    axis = op.axis
    assert isinstance(axis, SampleAxis)
    owners = axis.of_index()
    if op.name == "flip":
        return scattered(axis.dim, axis.samples, owners.flip(0))
    if op.name == "roll":
        shifts, dims = (ints([argument(op.args, op.kwargs, k, name)]) for k, name in ((1, "shifts"), (2, "dims")))
        shift = sum(s for s, d in zip(shifts, dims, strict=True) if d % op.args[0].dim() == axis.dim)
        return scattered(axis.dim, axis.samples, owners.roll(shift))
    order = op.results[-1]
    if op.name not in ("sort", "argsort") or order.dim() != 1 or not readable(order):
        return unknown(op.name)
    op.notes.append(f"`{op.name}` puts the rows of all samples in one order")
    return scattered(0, axis.samples, owners.to(order.device)[order])


ROUTING: dict[str, Callable[[Op], Samples]] = {
    "getitem": _getitem,
    "index_select": _index_select,
    **dict.fromkeys(("index_add", "index_copy"), _index_add),
    **dict.fromkeys(("gather", "take_along_dim", "scatter", "scatter_add", "index_fill"), _along_index),
    **dict.fromkeys(("nonzero", "argwhere"), _nonzero),
    "masked_select": _masked_select,
    "masked_scatter": _masked_scatter,
}
