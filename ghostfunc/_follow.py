"""Follows the samples through torch operations: from what the operands carry to what the results carry.

One row of `_RULES` an operation. One that is not understood leaves `Lost(mixed=False)` (a probe of the backward
decides later); one that lets samples meet leaves `Lost(mixed=True)`. A tensor that carries nothing does not depend on
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._operations import LIKE_ANOTHER, einsum_letters, is_in_place, op_name, tensors_in
from ghostfunc._sample_axis import Lost, SampleAxis, Samples, samples_of, set_samples

_ELEMENTWISE = frozenset(
    """
    abs absolute acos acosh add addcdiv addcmul and angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
    asinh atan atan2 atanh bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool broadcast_to bucketize ceil
    celu clamp clamp_max clamp_min clip clone contiguous conj copy copysign cos cosh cpu cuda deg2rad detach digamma
    div divide double dropout eq elu erf erfc erfinv exp exp2 expand expand_as expm1 fill float float_power floor
    floor_divide floordiv fmax fmin fmod frac ge gelu greater greater_equal gt half hardshrink hardsigmoid hardswish
    hardtanh heaviside hypot iadd iand idiv ifloordiv imul int invert ior ipow isclose isfinite isinf isnan isneginf
    isposinf isub itruediv ixor ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp
    logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum minimum
    mish mod mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal or polygamma positive pow
    radd rand rdiv reciprocal relu relu6 remainder requires_grad rfloordiv rmod rmul ror round rpow rrelu rsqrt rsub
    rtruediv rxor selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign special_entr
    special_erf special_expit special_log1p special_xlogy sqrt square sub subtract tan tanh tanhshrink threshold to
    tril triu true_divide truediv trunc type type_as where xlogy xor alpha_dropout get_data get_real get_imag
    fix
    """.split()
)
_ROW_MAJOR = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as unsafe_view atleast_2d".split()
)
_CONSTANT = frozenset(
    """
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_tensor size dim numel
    """.split()
)
_REDUCTIONS = frozenset(
    """
    sum mean prod amax amin max min argmax argmin any all logsumexp nansum nanmean var std median mode count_nonzero
    aminmax var_mean std_mean
    """.split()
)
_ALONG = {  # position of `dim` among the arguments, and its default
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
_POINTWISE_LOSSES = frozenset(
    """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    poisson_nll_loss gaussian_nll_loss soft_margin_loss
    """.split()
)
_BATCH_FIRST = {  # operations that keep a leading batch dimension, with the rank of a batched input
    "conv1d": 3,
    "conv2d": 4,
    "conv3d": 5,
    "conv_transpose1d": 3,
    "conv_transpose2d": 4,
    "conv_transpose3d": 5,
    "max_pool1d": 3,
    "max_pool2d": 4,
    "max_pool3d": 5,
    "avg_pool1d": 3,
    "avg_pool2d": 4,
    "avg_pool3d": 5,
    "adaptive_avg_pool1d": 3,
    "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5,
    "adaptive_max_pool1d": 3,
    "adaptive_max_pool2d": 4,
    "group_norm": None,
    "instance_norm": None,
    "interpolate": None,
    "pixel_shuffle": None,
    "dropout1d": None,
    "dropout2d": None,
    "dropout3d": None,
    "feature_alpha_dropout": None,
    "prelu": None,
    "bilinear": None,
}


def _mixed(name: str) -> Lost:
    return Lost(f"samples meet in `{name}`", mixed=True)


def _unknown(name: str) -> Lost:
    return Lost(f"`{name}` is not known to keep samples apart", mixed=False)


def _agree(name: str, found: Iterable[Samples]) -> Samples:
    """One sample axis for a result out of those that its operands give it."""
    result: Samples = None
    for samples in found:
        if isinstance(samples, Lost):
            return samples
        if samples is not None and result is not None and samples != result:
            return _mixed(name)
        result = result or samples
    return result


def _aligned(axis: Samples, tensor: Tensor, out: Tensor) -> Samples:
    """The axis of an operand in a result that broadcasts it: dimensions count from the right."""
    if not isinstance(axis, SampleAxis):
        return axis
    dim = axis.dim + out.dim() - tensor.dim()
    if dim < 0 or out.shape[dim] != axis.size:
        return _unknown("broadcasting")
    return replace(axis, dim=dim)


def _elementwise(name: str, tensors: Sequence[Tensor], out: Tensor) -> Samples:
    return _agree(name, (_aligned(samples_of(t), t, out) for t in tensors))


def _row_major(name: str, axis: SampleAxis, before: torch.Size, after: torch.Size) -> Samples:
    """The axis after a reshape that keeps the row-major order of the entries."""
    outer = math.prod(before[: axis.dim]) * axis.outer
    inner = axis.inner * math.prod(before[axis.dim + 1 :])
    ahead = 1
    for dim, size in enumerate(after):
        behind = math.prod(after[dim + 1 :])
        if outer % ahead == 0 and inner % behind == 0:
            new = SampleAxis(dim, axis.samples, outer // ahead, inner // behind)
            if new.size == size:
                return new
        ahead *= size
    return _unknown(name)


def _without(axis: SampleAxis, dims: Iterable[int], rank: int, keep: bool, name: str) -> Samples:
    """The axis after a reduction over `dims`."""
    removed = {dim % rank for dim in dims}
    if axis.dim in removed:
        return _mixed(name)
    return axis if keep else replace(axis, dim=axis.dim - sum(dim < axis.dim for dim in removed))


def _ints(values: Iterable[Any]) -> list[int]:
    found: list[int] = []
    for value in values:
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            found.append(value)
        elif isinstance(value, (tuple, list, torch.Size)):
            found += _ints(value)
    return found


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, *names: str, default: Any = None) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if len(args) > position else default


def _reduction(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensor = args[0] if args else kwargs["input"]
    if len(args) > 1 and isinstance(args[1], Tensor):  # torch.max(x, y)
        return _elementwise(name, [t for t in args if isinstance(t, Tensor)], out)
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = kwargs.get("dim", kwargs.get("axis"))
    dims = _ints([dims]) if dims is not None else _ints(args[1:])
    if not dims:
        return _mixed(name)
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name)


def _norm(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = _ints([_argument(args, kwargs, 2, "dim")])
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name) if dims else _mixed(name)


def _permuted(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    order = list(range(tensor.dim()))
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = _ints(args[1:]) or _ints(kwargs.values())
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        order = [dim % tensor.dim() for dim in _ints(args[1:]) or _ints(kwargs.values())]
    elif name in ("movedim", "moveaxis"):
        source, target = ([d % tensor.dim() for d in _ints([part])] for part in args[1:3])
        rest = iter([dim for dim in order if dim not in source])
        placed = dict(zip(target, source, strict=True))
        order = [placed[dim] if dim in placed else next(rest) for dim in order]
    elif name in ("get_mT", "get_mH", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    else:  # t, T, H
        order.reverse()
    return replace(axis, dim=order.index(axis.dim))


def _matmul(name: str, a: Tensor, b: Tensor, out: Tensor) -> Samples:
    def in_result(tensor: Tensor, other: Tensor, contracted: int) -> Samples:
        axis = samples_of(tensor)
        if not isinstance(axis, SampleAxis):
            return axis
        dim = axis.dim - tensor.dim()  # from the right, as batch dimensions broadcast
        if tensor.dim() == 1 or dim == contracted:
            return _mixed(name)
        if other.dim() == 1 and not (tensor is b and dim == -1):
            dim += 1  # a vector operand leaves no dimension of its own in the result
        return replace(axis, dim=out.dim() + dim)

    return _agree(name, (in_result(a, b, -1), in_result(b, a, -2)))


def _einsum(args: Sequence[Any]) -> Samples:
    equation, operands = args[0], args[1:]
    if not isinstance(equation, str):
        return _unknown("einsum")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    inputs, output = einsum_letters(equation, [t.dim() for t in operands])
    found: list[Samples] = []
    for letters, tensor in zip(inputs, operands, strict=True):
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis):
            letter = letters[axis.dim]
            axis = replace(axis, dim=output.index(letter)) if letter in output else _mixed("einsum")
        found.append(axis)
    return _agree("einsum", found)


def _cross_entropy(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    logits, target = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "target")
    reduced = _argument(args, kwargs, 99, "reduction", default="mean") != "none"
    axis = samples_of(logits)
    if isinstance(axis, SampleAxis):
        if reduced or (axis.dim == 1 and logits.dim() > 1) or logits.dim() == 1:
            return _mixed(name)
        axis = replace(axis, dim=axis.dim - (axis.dim > 1))
    other = samples_of(target)
    if isinstance(other, SampleAxis):
        if reduced:
            return _mixed(name)
        if target.dim() == logits.dim():  # class probabilities
            other = replace(other, dim=other.dim - (other.dim > 1)) if other.dim != 1 else _mixed(name)
    return _agree(name, (axis, other))


def _attention(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    name = "scaled_dot_product_attention"
    found: list[Samples] = []
    for position, key in enumerate(("query", "key", "value")):
        tensor = _argument(args, kwargs, position, key)
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis) and (axis.dim >= tensor.dim() - 2 or axis.size != out.shape[axis.dim]):
            return _mixed(name)
        found.append(axis)
    mask = _argument(args, kwargs, 3, "attn_mask")
    if isinstance(mask, Tensor):
        axis = samples_of(mask)
        if isinstance(axis, SampleAxis) and axis.dim >= mask.dim() - 2:
            return _unknown(name)
        found.append(_aligned(axis, mask, out))
    return _agree(name, found)


def _concatenation(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensors = _argument(args, kwargs, 0, "tensors")
    dim = _argument(args, kwargs, 1, "dim", "axis", default=0) % out.dim()
    axes = [samples_of(t) for t in tensors]
    if name == "stack":
        moved = [replace(a, dim=a.dim + (a.dim >= dim)) if isinstance(a, SampleAxis) else a for a in axes]
        return _agree(name, moved)
    if all(isinstance(a, SampleAxis) and a.dim == dim for a in axes):
        inner = {a.inner for a in axes}  # type: ignore[union-attr]
        if len(inner) == 1:
            return replace(axes[0], outer=sum(a.outer for a in axes))  # type: ignore[union-attr,type-var]
    if any(isinstance(a, SampleAxis) and a.dim == dim for a in axes):
        return _unknown(name)
    return _agree(name, axes)


def _parts(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Samples:
    """chunk, split, unbind, select, narrow: the axis of each part."""
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    position = 1 if name in ("unbind", "select", "narrow") else 2
    dim = _argument(args, kwargs, position, "dim", default=0) % tensor.dim()
    if dim == axis.dim:
        return _unknown(name)
    return replace(axis, dim=axis.dim - (dim < axis.dim)) if name in ("unbind", "select") else axis


def _along_index(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    """index_select, gather, scatter, take_along_dim: rows along another dimension than the samples'."""
    tensor = args[0]
    axis = samples_of(tensor)
    dim = _argument(args, kwargs, 1, "dim", default=None)
    others = [t for t in [*args[1:], *kwargs.values()] if isinstance(t, Tensor)]
    if name == "take_along_dim":
        dim = _argument(args, kwargs, 2, "dim")
    if dim is None:
        return _unknown(name)
    dim %= max(tensor.dim(), 1)
    if isinstance(axis, SampleAxis) and (dim == axis.dim or out.shape[axis.dim] != axis.size):
        return _unknown(name)
    found = [axis]
    for other in others:
        samples = samples_of(other)
        if isinstance(samples, SampleAxis) and (name == "index_select" or samples.dim == dim):
            return _unknown(name)
        found.append(samples)
    return _agree(name, found)


def _is_enumeration(index: Tensor, samples: int) -> bool:
    return index.numel() == samples and bool(
        (index.reshape(-1) == torch.arange(samples, device=index.device)).all().item()
    )


def _getitem(tensor: Tensor, index: Any, out: Tensor) -> Samples:
    """Indexing: slices and None keep the samples' dimension; integer tensors may gather within each sample."""
    name = "indexing"
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(item) if isinstance(item, (list, range)) else item for item in items]
    axis = samples_of(tensor)
    if isinstance(axis, Lost):
        return axis
    used = sum(item is not None and item is not Ellipsis for item in items)
    if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in items):
        return _unknown("indexing with a mask")
    if Ellipsis not in [i for i in items if not isinstance(i, Tensor)]:
        items.append(Ellipsis)
    place = next(k for k, i in enumerate(items) if i is Ellipsis)
    items[place : place + 1] = [slice(None)] * (tensor.dim() - used)

    advanced = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    shape = torch.broadcast_shapes(*(items[k].shape for k in advanced)) if advanced else torch.Size()
    adjacent = bool(advanced) and advanced == list(range(advanced[0], advanced[-1] + 1))
    found: list[Samples] = []
    source, target = 0, 0
    start = None  # where the gathered dimensions stand in the result
    if advanced and not adjacent:
        start, target = 0, len(shape)
    at_axis: Tensor | None = None
    for item in items:
        if item is None:
            target += 1
            continue
        here = isinstance(axis, SampleAxis) and axis.dim == source
        if isinstance(item, Tensor):
            if start is None:
                start, target = target, target + len(shape)
            if here:
                at_axis = item
        elif isinstance(item, slice):
            if here:
                if item.indices(tensor.shape[source]) != (0, tensor.shape[source], 1):
                    return _unknown(name)
                found.append(replace(axis, dim=target))  # type: ignore[type-var]
            target += 1
        elif here:
            return _unknown("indexing one entry of the samples' dimension")
        source += 1
    if at_axis is not None:
        assert isinstance(axis, SampleAxis) and start is not None
        if axis.outer * axis.inner != 1 or not _is_enumeration(at_axis, axis.samples):
            return _unknown(name)
        long = [d for d, size in enumerate(at_axis.shape) if size == axis.samples]
        found.append(SampleAxis(start + len(shape) - at_axis.dim() + long[0], axis.samples))
    for k in advanced:
        samples = samples_of(items[k])
        if isinstance(samples, SampleAxis):
            assert start is not None
            samples = replace(samples, dim=start + len(shape) - items[k].dim() + samples.dim)
        found.append(samples)
    return _agree(name, found)


def _repeated(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    if name == "repeat_interleave":
        times, dim = _argument(args, kwargs, 1, "repeats"), _argument(args, kwargs, 2, "dim")
        if dim is None or not isinstance(times, int):
            return _unknown(name)
        return replace(axis, inner=axis.inner * times) if dim % tensor.dim() == axis.dim else axis
    dim = axis.dim + out.dim() - tensor.dim()
    return replace(axis, dim=dim, outer=axis.outer * (out.shape[dim] // axis.size))


def _norm_layer(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    rank = len(_ints([_argument(args, kwargs, 1, "normalized_shape")]))
    return axis if axis.dim < tensor.dim() - rank else _mixed(name)


class _Op(NamedTuple):
    """One call of an operation, and one of its results."""

    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    out: Tensor

    @property
    def axis(self) -> Samples:
        """What the first argument carries."""
        return samples_of(self.args[0] if self.args else self.tensors[0])


def _reshaped(op: _Op) -> Samples:
    return _row_major(op.name, op.axis, op.args[0].shape, op.out.shape) if isinstance(op.axis, SampleAxis) else op.axis


def _along(op: _Op) -> Samples:
    """Operations along dimensions that keep their place: softmax, sort, cumsum, flip."""
    position, default = _ALONG[op.name]
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    dims = _ints([_argument(op.args, op.kwargs, position, "dim", "dims", "axis", "dimension", default=default)])
    dims = _ints(op.args[1:]) or dims if op.name == "flip" else dims
    if dims and axis.dim not in {d % op.args[0].dim() for d in dims}:
        return axis
    return _unknown(op.name) if op.name in _MOVES else _mixed(op.name)


def _added_matmul(op: _Op) -> Samples:
    first, a, b = op.tensors[:3]
    return _agree(op.name, (_aligned(samples_of(first), first, op.out), _matmul(op.name, a, b, op.out)))


def _linear(op: _Op) -> Samples:
    axis = op.axis
    if isinstance(axis, SampleAxis) and axis.dim == op.args[0].dim() - 1:
        return _mixed(op.name)
    return _agree(op.name, (axis, *(_unknown(op.name) for t in op.tensors[1:] if samples_of(t) is not None)))


def _looked_up(op: _Op) -> Samples:
    """embedding(ids, table), torch.embedding(table, ids), one_hot(ids): the axis of the ids."""
    ids = next(t for t in op.tensors if not t.is_floating_point())
    others = any(samples_of(t) is not None for t in op.tensors if t is not ids)
    return _unknown(op.name) if others else samples_of(ids)


def _batch_norm(op: _Op) -> Samples:
    training = _argument(op.args, op.kwargs, 5, "training", default=False)
    if training or _argument(op.args, op.kwargs, 1, "running_mean") is None:
        return _mixed("batch_norm in training mode")
    return op.axis


def _batch_first(op: _Op) -> Samples:
    axis, rank = op.axis, _BATCH_FIRST[op.name]
    if not isinstance(axis, SampleAxis):
        return axis
    plain = (rank is None or op.args[0].dim() == rank) and axis.dim == 0 and axis.size == op.out.shape[0]
    others = [t for t in op.tensors if t is not op.args[0] and samples_of(t) is not None]
    return axis if plain and all(samples_of(t) == axis for t in others) else _unknown(op.name)


def _padded(op: _Op) -> Samples:
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    amounts = _ints([_argument(op.args, op.kwargs, 1, "pad")])  # (before, after), from the last dimension backward
    at = 2 * (op.args[0].dim() - 1 - axis.dim)
    return _unknown(op.name) if any(amounts[at : at + 2]) else axis


def _pointwise_loss(op: _Op) -> Samples:
    if _argument(op.args, op.kwargs, 99, "reduction", default="mean") == "none":
        return _elementwise(op.name, op.tensors, op.out)
    return _mixed(op.name)


def _cosine_similarity(op: _Op) -> Samples:
    wide = torch.broadcast_tensors(*op.tensors[:2])[0]
    axis = _elementwise(op.name, op.tensors[:2], wide)
    dim = _argument(op.args, op.kwargs, 2, "dim", default=1)
    return _without(axis, [dim], wide.dim(), False, op.name) if isinstance(axis, SampleAxis) else axis


def _rows(names: str, rule: Callable[[_Op], Samples]) -> dict[str, Callable[[_Op], Samples]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[_Op], Samples]] = {
    **dict.fromkeys(_ELEMENTWISE, lambda op: _elementwise(op.name, op.tensors, op.out)),
    **dict.fromkeys(_ROW_MAJOR, _reshaped),
    **dict.fromkeys(_REDUCTIONS, lambda op: _reduction(op.name, op.args, op.kwargs, op.out)),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_BATCH_FIRST, _batch_first),
    **dict.fromkeys(_POINTWISE_LOSSES, _pointwise_loss),
    **_rows("norm vector_norm linalg_vector_norm linalg_norm", lambda op: _norm(op.name, op.args, op.kwargs, op.out)),
    **_rows(
        "transpose swapaxes swapdims permute movedim moveaxis t adjoint get_T get_mT get_H get_mH",
        lambda op: _permuted(op.name, op.args, op.kwargs),
    ),
    **_rows(
        "matmul mm bmm mv dot",
        lambda op: _matmul(op.name, op.args[0], _argument(op.args, op.kwargs, 1, "other", "mat2"), op.out),
    ),
    "rmatmul": lambda op: _matmul(op.name, op.args[1], op.args[0], op.out),
    **_rows("addmm baddbmm", _added_matmul),
    "addbmm": lambda op: _mixed(op.name),
    "einsum": lambda op: _einsum(op.args),
    "linear": _linear,
    **_rows("embedding one_hot", _looked_up),
    **_rows("layer_norm rms_norm", lambda op: _norm_layer(op.name, op.args, op.kwargs)),
    "batch_norm": _batch_norm,
    "pad": _padded,
    **_rows("cross_entropy nll_loss", lambda op: _cross_entropy(op.name, op.args, op.kwargs, op.out)),
    "cosine_similarity": _cosine_similarity,
    "scaled_dot_product_attention": lambda op: _attention(op.args, op.kwargs, op.out),
    **_rows("cat concat concatenate stack", lambda op: _concatenation(op.name, op.args, op.kwargs, op.out)),
    **_rows(
        "chunk split split_with_sizes tensor_split unbind select narrow",
        lambda op: _parts(op.name, op.args, op.kwargs),
    ),
    **_rows(
        "index_select gather take_along_dim scatter scatter_add index_add index_fill",
        lambda op: _along_index(op.name, op.args, op.kwargs, op.out),
    ),
    "getitem": lambda op: _getitem(op.args[0], op.args[1], op.out),
    **_rows("repeat repeat_interleave tile", lambda op: _repeated(op.name, op.args, op.kwargs, op.out)),
    **_rows("view_as_real view_as_complex", lambda op: op.axis),
}


def follow(func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any, samples: int) -> None:
    """Let the results of an operation carry the samples that its operands carry.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        samples: the number of samples in the batch.
    """
    name = op_name(func)
    tensors = tensors_in(args) + tensors_in(kwargs.values())
    if name in LIKE_ANOTHER:
        tensors = tensors[:1]
    carried = [s for s in map(samples_of, tensors) if s is not None]
    if not carried or name in _CONSTANT:
        return
    if name == "setitem":
        _follow_write(args[0], _assigned(args, tensors))
        return
    results = tensors_in([out])
    if not results:
        return
    rule = _RULES.get(name, lambda op: _unknown(op.name))
    lost = next((s for s in carried if isinstance(s, Lost)), None)
    for result in results:
        if lost is not None:
            found: Samples = lost
        elif samples == 1 and name != "batch_norm":
            found = SampleAxis(0, 1)
        else:
            try:
                found = rule(_Op(name, args, kwargs, tensors, result))
            except (AssertionError, IndexError, KeyError, StopIteration, TypeError, ValueError):
                found = _unknown(name)  # an unusual call: the probe decides
        if is_in_place(func) or kwargs.get("out") is not None:
            _follow_write(result, found)
        else:
            set_samples(result, found)


def _assigned(args: Sequence[Any], tensors: Sequence[Tensor]) -> Samples:
    """What a tensor carries after `tensor[index] = value`."""
    target, _, value = args
    kept = samples_of(target)
    index_carries = any(samples_of(t) is not None for t in tensors if t is not target and t is not value)
    if kept is not None and samples_of(value) is None and not index_carries:
        return kept
    return _unknown("assignment to a part of a tensor")


def _follow_write(tensor: Tensor, samples: Samples) -> None:
    """Let a tensor that was written to carry its samples, and the tensor that it is a view of lose them."""
    set_samples(tensor, samples)
    base = tensor._base
    if base is not None and samples_of(base) != samples:
        set_samples(base, _unknown("an in-place operation on a view"))
