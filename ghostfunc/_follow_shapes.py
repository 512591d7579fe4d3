"""Where samples are after operations entry by entry, along dimensions, and from one shape to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ghostfunc._axis_algebra import Op, agree, aligned, argument, ints, mixed, row_major, unknown
from ghostfunc._nesting import readable
from ghostfunc._routing import moved
from ghostfunc._sample_axis import SampleAxis, Samples, samples_of, scattered

ALONG = {  # position of `dim` among the arguments, and its default
    "softmax": (1, None),
    "log_softmax": (1, None),
    "softmin": (1, None),
    "cumsum": (1, None),
    "cumprod": (1, None),
    "logcumsumexp": (1, None),
    "cummax": (1, None),
    "cummin": (1, None),
    "sort": (1, -1),
    "argsort": (1, -1),
    "topk": (2, -1),
    "normalize": (2, 1),
    "flip": (1, None),
    "glu": (1, -1),
    "roll": (2, None),
    "unfold": (1, None),
    "diff": (2, -1),
}
_MOVES = frozenset("flip roll sort argsort topk".split())  # along the samples' dimension: they move rows, and add none


def elementwise(name: str, tensors: Sequence[Tensor], out: Tensor) -> Samples:
    """An entry of the result is of the sample whose entries it is made of."""
    found: list[Samples] = []
    for tensor in tensors:
        axis = samples_of(tensor)
        if axis is not None:
            found.append(aligned(axis, tensor, out))
    return found[0] if len(found) == 1 or (len(found) == 2 and found[0] is found[1]) else agree(name, found)


def entrywise(op: Op) -> Samples:
    return elementwise(op.name, op.tensors, op.out)


def _without(axis: SampleAxis, dims: Iterable[int], rank: int, keep: bool, name: str) -> Samples:
    """The axis after a reduction over `dims`."""
    removed = {dim % rank for dim in dims}
    if axis.dim in removed:
        return mixed(name)
    return axis if keep else axis.at(axis.dim - sum(dim < axis.dim for dim in removed))


def reduction(op: Op) -> Samples:
    """Of one tensor over dimensions or whole, and max(x, y)."""
    name, args, kwargs, out = op.name, op.args, op.kwargs, op.out
    tensor = args[0] if args else kwargs["input"]
    if len(args) > 1 and isinstance(args[1], Tensor):  # torch.max(x, y)
        return elementwise(name, [t for t in args if isinstance(t, Tensor)], out)
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = kwargs.get("dim", kwargs.get("axis"))
    dims = ints([dims]) if dims is not None else ints(args[1:])
    if not dims:
        return mixed(name)
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name)


def norm(op: Op) -> Samples:
    """Norms of vectors and matrices over dimensions."""
    name, args, kwargs, out = op.name, op.args, op.kwargs, op.out
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = ints([argument(args, kwargs, 2, "dim")])
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name) if dims else mixed(name)


def permuted(op: Op) -> Samples:
    """Operations that change the order of dimensions."""
    name, args, kwargs = op.name, op.args, op.kwargs
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    order = list(range(tensor.dim()))
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = ints(args[1:]) or ints(kwargs.values())
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        order = [dim % tensor.dim() for dim in ints(args[1:]) or ints(kwargs.values())]
    elif name in ("movedim", "moveaxis"):
        source, target = ([d % tensor.dim() for d in ints([part])] for part in args[1:3])
        rest = iter([dim for dim in order if dim not in source])
        placed = dict(zip(target, source, strict=True))
        order = [placed[dim] if dim in placed else next(rest) for dim in order]
    elif name in ("get_mT", "get_mH", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    else:  # t, T, H
        order.reverse()
    return axis.at(order.index(axis.dim))


def reshaped(op: Op) -> Samples:
    return row_major(op.name, op.axis, op.args[0].shape, op.out.shape) if isinstance(op.axis, SampleAxis) else op.axis


def along(op: Op) -> Samples:
    """Operations along dimensions that keep their place: softmax, sort, cumsum, flip."""
    position, default = ALONG[op.name]
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    dims = ints([argument(op.args, op.kwargs, position, "dim", "dims", "axis", "dimension", default=default)])
    dims = ints(op.args[1:]) or dims if op.name == "flip" else dims
    if dims and axis.dim not in {d % op.args[0].dim() for d in dims}:
        return axis
    return moved(op) if op.name in _MOVES else mixed(op.name)


def concatenation(op: Op) -> Samples:
    """cat, stack: what has no samples, joined to what has, is nobody's."""
    name, args, kwargs, out = op.name, op.args, op.kwargs, op.out
    tensors = [t for t in argument(args, kwargs, 0, "tensors") if t.shape != (0,)]  # torch leaves these out
    dim = argument(args, kwargs, 1, "dim", "axis", default=0) % out.dim()
    axes = [samples_of(t) for t in tensors]
    if name == "stack":
        return agree(name, [a.at(a.dim + (a.dim >= dim)) if isinstance(a, SampleAxis) else a for a in axes])
    if all(isinstance(a, SampleAxis) and a.dim == dim for a in axes):
        inner = {a.inner for a in axes}  # type: ignore[union-attr]
        if len(inner) == 1 and all(a.owners is None for a in axes):  # type: ignore[union-attr]
            return replace(axes[0], outer=sum(a.outer for a in axes))  # type: ignore[union-attr,type-var]
    if any(isinstance(a, SampleAxis) and a.dim == dim for a in axes):
        if not all(a is None or (isinstance(a, SampleAxis) and a.dim == dim) for a in axes):
            return unknown(name)
        samples = next(a.samples for a in axes if isinstance(a, SampleAxis))
        nobody = torch.full((out.shape[dim],), -1, device=out.device)
        owners = [
            a.of_index().to(out.device) if isinstance(a, SampleAxis) else nobody[: t.shape[dim]]
            for a, t in zip(axes, tensors, strict=True)
        ]
        return scattered(dim, samples, torch.cat(owners))
    return agree(name, axes)


def parts(op: Op) -> Samples:
    """chunk, split, unbind, select, narrow: the axis of each part."""
    name, args, kwargs = op.name, op.args, op.kwargs
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    position = 1 if name in ("unbind", "select", "narrow") else 2
    dim = argument(args, kwargs, position, "dim", default=0) % tensor.dim()
    if dim == axis.dim:
        if name in ("unbind", "select"):
            return unknown(name)
        start = args[2] if name == "narrow" else sum(part.shape[dim] for part in op.results[: op.index])
        return scattered(dim, axis.samples, axis.of_index()[start : start + op.out.shape[dim]])
    return axis.at(axis.dim - (dim < axis.dim)) if name in ("unbind", "select") else axis


def repeated(op: Op) -> Samples:
    """repeat, tile, repeat_interleave: each copy is of the sample that it copies."""
    name, args, kwargs, out = op.name, op.args, op.kwargs, op.out
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    if name == "repeat_interleave":
        times, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
        if dim is None:
            return unknown(name)
        if dim % tensor.dim() != axis.dim:
            return axis if isinstance(times, int) or samples_of(times) is None else unknown(name)
        if not isinstance(times, int) and not readable(times):
            return unknown(name)
        owners = axis.of_index()
        times = times if isinstance(times, int) else times.to(owners.device)
        return scattered(axis.dim, axis.samples, owners.repeat_interleave(times))
    dim = axis.dim + out.dim() - tensor.dim()
    return scattered(dim, axis.samples, axis.of_index().repeat(out.shape[dim] // axis.size))


def padded(op: Op) -> Samples:
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    amounts = ints([argument(op.args, op.kwargs, 1, "pad")])  # (before, after), from the last dimension backward
    at = 2 * (op.args[0].dim() - 1 - axis.dim)
    return unknown(op.name) if any(amounts[at : at + 2]) else axis


def cosine_similarity(op: Op) -> Samples:
    wide = torch.broadcast_tensors(*op.tensors[:2])[0]
    axis = elementwise(op.name, op.tensors[:2], wide)
    dim = argument(op.args, op.kwargs, 2, "dim", default=1)
    return _without(axis, [dim], wide.dim(), False, op.name) if isinstance(axis, SampleAxis) else axis
