"""Rules of operations that take a parameter entry by entry, or row by row, beside data: by a lift of the parameter.

The parameter is broadcast to the data (`lift`), and the operation runs as it is: its own backward gives the entrywise
gradient, and nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._axis_algebra import unknown
from ghostfunc._interpreter import Interpreter
from ghostfunc._lift import lift
from ghostfunc._operations import is_in_place, op_name, tensors_in, with_leaves
from ghostfunc._sample_axis import SampleAxis, samples_of
from ghostfunc._tap import NO_RULE, Rule


def pointwise(mode: Interpreter, func: Callable, *args: Any, **kwargs: Any) -> Any:
    """An operation whose result has, at every entry, what its operands have there."""
    tensors = tensors_in((*args, *kwargs.values()))
    if len(tensors) < 2 or (is_in_place(func) and mode.find(args[0]) is not None):
        return NO_RULE
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    inexact = [t.dtype for t in tensors if t.dim() and (t.is_floating_point() or t.is_complex())]

    def lifted(leaf: Any) -> Any:
        if mode.find(leaf) is None:
            return leaf
        wide = reduce(torch.promote_types, inexact) if inexact else leaf.dtype
        if leaf.is_complex():  # a number has no more say in the result's dtype than that
            wide = wide.to_complex()
        return lift(mode, op_name(func), leaf, shape, wide)

    args, kwargs = with_leaves(lifted, args, kwargs)
    return func(*args, **kwargs)


def _masked_fill(mode: Interpreter, func: Callable, input: Tensor, mask: Tensor, value: Any) -> Any:
    filled = mode.call(torch.where, mask, value, input)
    if is_in_place(func):
        return NO_RULE if mode.find(input) is not None else input.copy_(filled)
    return filled


def laid_on(part: Tensor, value: Tensor) -> Tensor:
    """A value in the shape and dtype of the part of a tensor that it is written to."""
    return value.to(part.dtype).expand(part.shape)


def _laid_on(mode: Interpreter, func: Callable, part: Tensor, value: Tensor) -> Tensor:
    return lift(mode, "setitem", value, part.shape, part.dtype)


def _setitem(mode: Interpreter, func: Callable, target: Tensor, index: Any, value: Tensor) -> Any:
    """A write of a parameter to a part of the data, `target[index] = value`."""
    part = mode.call(torch.Tensor.__getitem__, mode.call(torch.Tensor.detach, target), index)
    if value.dim() > part.dim():  # dimensions of size 1 in front are allowed
        value = mode.call(torch.reshape, value, value.shape[value.dim() - part.dim() :])
    return func(target, index, mode.call(laid_on, part, value))


def _cat(mode: Interpreter, func: Callable, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    if mode.segments is not None:  # the positions of the lifted tensor are not those of the result
        return NO_RULE
    dim = kwargs.get("axis", dim)
    before = len(mode.sites)
    out = torch.cat([lift(mode, "cat", t, t.shape) for t in tensors], dim)
    axes = [samples_of(t) for t in tensors]
    if any(isinstance(axis, SampleAxis) and axis.dim == dim % out.dim() for axis in axes):
        for site in mode.sites[before:]:  # rows between those of the samples: a probe tells whose they become
            site.axis = unknown("cat")
    return out


def _stack(mode: Interpreter, func: Callable, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return mode.call(torch.cat, [mode.call(torch.unsqueeze, t, dim) for t in tensors], dim)


def _cdist(mode: Interpreter, func: Callable, x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Distances between the rows `[..., P, d]` and `[..., R, d]`: the parameter is lifted to batches of the data's."""
    if mode.segments is not None:  # positions are samples, and meet in a lift to batches
        return NO_RULE
    for rows, others in ((x1, x2), (x2, x1)):
        axis = samples_of(rows)
        if isinstance(axis, SampleAxis) and axis.samples > 1 and axis.dim == rows.dim() - 2:  # each row is a batch
            apart = (mode.call(torch.unsqueeze, rows, -2), mode.call(torch.unsqueeze, others, -3))
            out = mode.call(torch.cdist, *(apart if rows is x1 else apart[::-1]), *args, **kwargs)
            out = mode.call(torch.squeeze, out, -2 if rows is x1 else -1)
            return out if rows is x1 else mode.call(torch.transpose, out, -1, -2)
    batches = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    x1, x2 = (lift(mode, "cdist", x, torch.Size((*batches, *x.shape[-2:]))) for x in (x1, x2))
    return torch.cdist(x1, x2, *args, **kwargs)


def _cosine_similarity(
    mode: Interpreter, func: Callable, x1: Tensor, x2: Tensor, dim: int = 1, eps: int | float = 1e-8
) -> Tensor:
    dim -= max(x1.dim(), x2.dim()) * (dim >= 0)  # from the right, as the operands broadcast
    units = (mode.call(F.normalize, x, dim=dim, eps=eps) for x in (x1, x2))
    return mode.call(torch.sum, mode.call(torch.mul, *units), dim)


POINTWISE: dict[str, Rule] = {
    **dict.fromkeys(
        """
        add radd iadd sub rsub isub subtract mul rmul imul multiply div rdiv divide true_divide truediv rtruediv
        itruediv pow rpow float_power where lerp addcmul addcdiv copy maximum minimum fmax fmin max min clamp clamp_min
        clamp_max clip atan2 arctan2 hypot logaddexp logaddexp2 xlogy special_xlogy remainder fmod mod rmod copysign
        ldexp
        """.split(),
        pointwise,
    ),
    "masked_fill": _masked_fill,
    "setitem": _setitem,
    "laid_on": _laid_on,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "cdist": _cdist,
    "cosine_similarity": _cosine_similarity,
}
