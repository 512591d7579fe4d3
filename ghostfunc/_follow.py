"""Follows the samples through torch operations: from what the operands carry to what the results carry.

One row of `_RULES` an operation. One that is not understood leaves `Lost(mixed=False)` (a probe of the backward
decides later); one that lets samples meet leaves `Lost(mixed=True)`. A tensor that carries nothing does not depend on
the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ghostfunc._axis_algebra import Op, agree, aligned, argument, ints, mixed, row_major, unknown
from ghostfunc._letters import as_einsum
from ghostfunc._nesting import readable, with_values
from ghostfunc._operations import LIKE_ANOTHER, Operation, einsum_letters, operation, tensors_in
from ghostfunc._packed import PACKING, is_packed, packed_recurrent
from ghostfunc._routing import ROUTING, assigned, mark_enumeration, moved
from ghostfunc._sample_axis import (
    Lost,
    SampleAxis,
    Samples,
    following_positions,
    samples_of,
    scattered,
    set_samples,
)

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
    fix complex polar laid_on
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
}


def _elementwise(name: str, tensors: Sequence[Tensor], out: Tensor) -> Samples:
    found: list[Samples] = []
    for tensor in tensors:
        axis = samples_of(tensor)
        if axis is not None:
            found.append(aligned(axis, tensor, out))
    return found[0] if len(found) == 1 or (len(found) == 2 and found[0] is found[1]) else agree(name, found)


def _entrywise(op: Op) -> Samples:
    return _elementwise(op.name, op.tensors, op.out)


def _without(axis: SampleAxis, dims: Iterable[int], rank: int, keep: bool, name: str) -> Samples:
    """The axis after a reduction over `dims`."""
    removed = {dim % rank for dim in dims}
    if axis.dim in removed:
        return mixed(name)
    return axis if keep else axis.at(axis.dim - sum(dim < axis.dim for dim in removed))


def _reduction(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensor = args[0] if args else kwargs["input"]
    if len(args) > 1 and isinstance(args[1], Tensor):  # torch.max(x, y)
        return _elementwise(name, [t for t in args if isinstance(t, Tensor)], out)
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = kwargs.get("dim", kwargs.get("axis"))
    dims = ints([dims]) if dims is not None else ints(args[1:])
    if not dims:
        return mixed(name)
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name)


def _norm(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    dims = ints([argument(args, kwargs, 2, "dim")])
    return _without(axis, dims, tensor.dim(), out.dim() == tensor.dim(), name) if dims else mixed(name)


def _permuted(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Samples:
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


def _matmul(name: str, a: Tensor, b: Tensor, out: Tensor) -> Samples:
    def in_result(tensor: Tensor, other: Tensor, contracted: int) -> Samples:
        axis = samples_of(tensor)
        if not isinstance(axis, SampleAxis):
            return axis
        dim = axis.dim - tensor.dim()  # from the right, as batch dimensions broadcast
        if tensor.dim() == 1 or dim == contracted:
            return mixed(name)
        if other.dim() == 1 and not (tensor is b and dim == -1):
            dim += 1  # a vector operand leaves no dimension of its own in the result
        return axis.at(out.dim() + dim)

    return agree(name, (in_result(a, b, -1), in_result(b, a, -2)))


def _einsum(args: Sequence[Any]) -> Samples:
    equation, operands = args[0], args[1:]
    if not isinstance(equation, str):
        return unknown("einsum")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    inputs, output = einsum_letters(equation, [t.dim() for t in operands])
    found: list[Samples] = []
    for letters, tensor in zip(inputs, operands, strict=True):
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis):
            letter = letters[axis.dim]
            axis = axis.at(output.index(letter)) if letter in output else mixed("einsum")
        found.append(axis)
    return agree("einsum", found)


def _cross_entropy(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    logits, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
    reduced = argument(args, kwargs, 99, "reduction", default="mean") != "none"
    axis = samples_of(logits)
    if isinstance(axis, SampleAxis):
        if reduced or (axis.dim == 1 and logits.dim() > 1) or logits.dim() == 1:
            return mixed(name)
        axis = axis.at(axis.dim - (axis.dim > 1))
    other = samples_of(target)
    if isinstance(other, SampleAxis):
        if reduced:
            return mixed(name)
        if target.dim() == logits.dim():  # class probabilities
            other = other.at(other.dim - (other.dim > 1)) if other.dim != 1 else mixed(name)
    return agree(name, (axis, other))


def _token_losses(op: Op) -> Samples:
    """Losses `[..., 1]` of hidden states `[..., d]` and targets `[...]`."""
    hidden, weight, targets, bias = op.args[:4]
    axis = samples_of(hidden)
    if isinstance(axis, SampleAxis) and axis.dim == hidden.dim() - 1:
        return mixed(op.name)
    of_head = (unknown(op.name) for t in (weight, bias) if samples_of(t) is not None)
    return agree(op.name, (axis, samples_of(targets), *of_head))


def _attention(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    name = "scaled_dot_product_attention"
    if following_positions():
        return samples_of(argument(args, kwargs, 0, "query"))
    found: list[Samples] = []
    for position, key in enumerate(("query", "key", "value")):
        tensor = argument(args, kwargs, position, key)
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis) and (axis.dim >= tensor.dim() - 2 or axis.size != out.shape[axis.dim]):
            return mixed(name)
        found.append(axis)
    mask = argument(args, kwargs, 3, "attn_mask")
    if isinstance(mask, Tensor):
        axis = samples_of(mask)
        if isinstance(axis, SampleAxis) and axis.dim >= mask.dim() - 2:
            return unknown(name)
        found.append(aligned(axis, mask, out))
    return agree(name, found)


def _concatenation(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
    tensors = [t for t in argument(args, kwargs, 0, "tensors") if t.shape != (0,)]  # torch leaves these out
    dim = argument(args, kwargs, 1, "dim", "axis", default=0) % out.dim()
    axes = [samples_of(t) for t in tensors]
    if name == "stack":
        moved = [a.at(a.dim + (a.dim >= dim)) if isinstance(a, SampleAxis) else a for a in axes]
        return agree(name, moved)
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


def _parts(op: Op) -> Samples:
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


def _repeated(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Samples:
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


def _norm_layer(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Samples:
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    rank = len(ints([argument(args, kwargs, 1, "normalized_shape")]))
    return axis if axis.dim < tensor.dim() - rank else mixed(name)


def _reshaped(op: Op) -> Samples:
    return row_major(op.name, op.axis, op.args[0].shape, op.out.shape) if isinstance(op.axis, SampleAxis) else op.axis


def _along(op: Op) -> Samples:
    """Operations along dimensions that keep their place: softmax, sort, cumsum, flip."""
    position, default = _ALONG[op.name]
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    dims = ints([argument(op.args, op.kwargs, position, "dim", "dims", "axis", "dimension", default=default)])
    dims = ints(op.args[1:]) or dims if op.name == "flip" else dims
    if dims and axis.dim not in {d % op.args[0].dim() for d in dims}:
        return axis
    return moved(op) if op.name in _MOVES else mixed(op.name)


def _added_matmul(op: Op) -> Samples:
    first, a, b = op.tensors[:3]
    return agree(op.name, (aligned(samples_of(first), first, op.out), _matmul(op.name, a, b, op.out)))


def _added_blocks(op: Op) -> Samples:
    first, a, b = op.tensors[:3]
    return agree(op.name, (aligned(samples_of(first), first, op.out), _einsum(("eni,eij->nj", a, b))))


def _linear(op: Op) -> Samples:
    x, weight, *bias = op.tensors
    product = op.axis
    if samples_of(weight) is not None:
        blocks = "s" if op.name == "block_linear" else ""
        product = _einsum((f"...{blocks}i,{blocks}oi->...{blocks}o", x, weight))
    elif isinstance(product, SampleAxis) and product.dim == x.dim() - 1:
        return mixed(op.name)
    return agree(op.name, (product, *(unknown(op.name) for t in bias if samples_of(t) is not None)))


def _looked_up(op: Op) -> Samples:
    """embedding(ids, table), torch.embedding(table, ids), one_hot(ids): the axis of the ids."""
    ids = next(t for t in op.tensors if not t.is_floating_point())
    others = any(samples_of(t) is not None for t in op.tensors if t is not ids)
    return unknown(op.name) if others else samples_of(ids)


def _batch_norm(op: Op) -> Samples:
    training = argument(op.args, op.kwargs, 5, "training", default=False)
    if training or argument(op.args, op.kwargs, 1, "running_mean") is None:
        return mixed("batch_norm in training mode")
    return op.axis


def _batch_first(op: Op) -> Samples:
    axis, rank = op.axis, _BATCH_FIRST[op.name]
    if not isinstance(axis, SampleAxis):
        return axis
    plain = (rank is None or op.args[0].dim() == rank) and axis.dim == 0 and axis.size == op.out.shape[0]
    others = [t for t in op.tensors if t is not op.args[0] and samples_of(t) is not None]
    return axis if plain and all(samples_of(t) == axis for t in others) else unknown(op.name)


def _prelu(op: Op) -> Samples:
    """The axis of the data, unless a slope for each channel meets samples as channels."""
    axis, slopes = op.axis, op.tensors[1]
    in_channels = isinstance(axis, SampleAxis) and axis.dim == 1 and slopes.numel() > 1
    return unknown(op.name) if in_channels or samples_of(slopes) is not None else axis


def _bilinear(op: Op) -> Samples:
    """Every dimension but the last is a dimension of both inputs and of the result."""
    if any(samples_of(t) is not None for t in op.tensors[2:]):
        return unknown(op.name)
    axes = [samples_of(t) for t in op.tensors[:2]]
    last = op.tensors[0].dim() - 1
    return agree(op.name, (mixed(op.name) if isinstance(a, SampleAxis) and a.dim == last else a for a in axes))


def _matrices(op: Op) -> Samples:
    """Operations on the last two dimensions of every operand, with batches of matrices in front that broadcast."""
    axes = [(samples_of(t), t) for t in op.tensors]
    if any(isinstance(axis, SampleAxis) and axis.dim >= t.dim() - 2 for axis, t in axes):
        return mixed(op.name)
    return agree(op.name, (aligned(axis, t, op.out) for axis, t in axes))


def _bags(op: Op) -> Samples:
    """embedding_bag: the first dimension of ids `[B, L]`."""
    ids = next(t for t in op.tensors if not t.is_floating_point())
    table = _looked_up(op)
    return table if ids.dim() == 2 and isinstance(table, SampleAxis) and table.dim == 0 else unknown(op.name)


def _distances(op: Op) -> Samples:
    """Cdist of `[..., P, d]` and `[..., R, d]`: `[..., P, R]`."""
    found: list[Samples] = []
    for tensor, of_rows in zip(op.tensors[:2], (-2, -1), strict=True):
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis):
            dim = axis.dim - tensor.dim()
            dim = of_rows if dim == -2 else dim
            axis = mixed(op.name) if axis.dim == tensor.dim() - 1 else axis.at(op.out.dim() + dim)
        found.append(axis)
    return agree(op.name, found)


def _padded(op: Op) -> Samples:
    axis = op.axis
    if not isinstance(axis, SampleAxis):
        return axis
    amounts = ints([argument(op.args, op.kwargs, 1, "pad")])  # (before, after), from the last dimension backward
    at = 2 * (op.args[0].dim() - 1 - axis.dim)
    return unknown(op.name) if any(amounts[at : at + 2]) else axis


def _pointwise_loss(op: Op) -> Samples:
    if argument(op.args, op.kwargs, 99, "reduction", default="mean") == "none":
        return _elementwise(op.name, op.tensors, op.out)
    return mixed(op.name)


def _cosine_similarity(op: Op) -> Samples:
    wide = torch.broadcast_tensors(*op.tensors[:2])[0]
    axis = _elementwise(op.name, op.tensors[:2], wide)
    dim = argument(op.args, op.kwargs, 2, "dim", default=1)
    return _without(axis, [dim], wide.dim(), False, op.name) if isinstance(axis, SampleAxis) else axis


def _recurrent(op: Op) -> Samples:
    """lstm, gru, rnn: `[T, B, d]`, or `[B, T, d]` for the input and the first result, and states `[layers, B, d]`."""
    x, batch_first = op.args[0], op.args[-1]
    if is_packed(op.args):
        return packed_recurrent(op)
    found = []
    for tensor in tensors_in(op.args[:2]):
        axis = samples_of(tensor)
        if isinstance(axis, SampleAxis):
            at = 0 if tensor is x and batch_first else 1
            axis = axis.at(0 if op.index == 0 and batch_first else 1) if axis.dim == at else mixed(op.name)
        found.append(axis)
    return agree(op.name, found)


def _cell(op: Op) -> Samples:
    """lstm_cell, gru_cell and rnn_cell: everything is `[B, d]`."""
    found = [samples_of(t) for t in op.tensors]
    away = any(isinstance(axis, SampleAxis) and axis.dim != 0 for axis in found)
    return mixed(op.name) if away else agree(op.name, found)


_UNMOVED = (_ELEMENTWISE | _ROW_MAJOR) - LIKE_ANOTHER


def _no_rule(op: Op) -> Samples:
    return unknown(op.name)


def _rows(names: str, rule: Callable[[Op], Samples]) -> dict[str, Callable[[Op], Samples]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[Op], Samples]] = {
    **dict.fromkeys(_ELEMENTWISE, _entrywise),
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
        lambda op: _matmul(op.name, op.args[0], argument(op.args, op.kwargs, 1, "other", "mat2"), op.out),
    ),
    "rmatmul": lambda op: _matmul(op.name, op.args[1], op.args[0], op.out),
    **_rows("addmm baddbmm", _added_matmul),
    "addbmm": _added_blocks,
    "einsum": lambda op: _einsum(op.args),
    **_rows("tensordot inner outer ger", lambda op: _einsum(as_einsum(op.name, op.args, op.kwargs))),
    "addmv": _added_matmul,
    "bilinear": _bilinear,
    "cdist": _distances,
    **_rows("linear block_linear", _linear),
    "embedding_bag": _bags,
    **_rows(
        "linalg_solve_triangular linalg_inv inverse linalg_cholesky cholesky linalg_matrix_exp matrix_exp", _matrices
    ),
    "prelu": _prelu,
    **_rows("embedding one_hot", _looked_up),
    **_rows("layer_norm rms_norm", lambda op: _norm_layer(op.name, op.args, op.kwargs)),
    "batch_norm": _batch_norm,
    "pad": _padded,
    "token_losses": _token_losses,
    **_rows("cross_entropy nll_loss", lambda op: _cross_entropy(op.name, op.args, op.kwargs, op.out)),
    "cosine_similarity": _cosine_similarity,
    "scaled_dot_product_attention": lambda op: _attention(op.args, op.kwargs, op.out),
    **_rows("cat concat concatenate stack", lambda op: _concatenation(op.name, op.args, op.kwargs, op.out)),
    **_rows(
        "chunk split split_with_sizes tensor_split unbind select narrow",
        _parts,
    ),
    **ROUTING,
    "where": lambda op: ROUTING["nonzero"](op) if len(op.args) == 1 else _elementwise(op.name, op.tensors, op.out),
    **_rows("repeat repeat_interleave tile", lambda op: _repeated(op.name, op.args, op.kwargs, op.out)),
    **_rows("view_as_real view_as_complex", lambda op: op.axis),
    **PACKING,
    **_rows("lstm gru rnn_tanh rnn_relu", _recurrent),
    **_rows("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _cell),
}


def follow(
    func: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    out: Any,
    samples: int,
    notes: list[str],
    operands: list[Tensor] | None = None,
) -> None:
    """Let the results of an operation carry the samples that its operands carry.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        samples: the number of samples in the batch.
        notes: takes why integers of the whole batch decided what a sample goes through.
        operands: the tensors among the arguments, where they are known.
    """
    known = operation(func)
    name, in_place = known
    tensors = tensors_in(args) + tensors_in(kwargs.values()) if operands is None else operands
    if name in _UNMOVED and samples > 1 and not in_place and isinstance(out, Tensor) and kwargs.get("out") is None:
        axis = _unmoved(name, tensors, out)
        if axis is not None:
            set_samples(out, axis)
            return
    _follow_by_rule(known, args, kwargs, tensors, out, samples, notes)


def _unmoved(name: str, operands: list[Tensor], out: Tensor) -> SampleAxis | None:
    """The axis of the operands, where they agree and it is seen at once that the result has it too: most often."""
    axis, shape = None, out.shape
    for tensor in operands:
        found = samples_of(tensor)
        if found is None:
            continue
        if isinstance(found, Lost) or found.owners is not None:
            return None
        if axis is not None and axis is not found and axis != found:
            return None
        before = tensor.shape
        if before != shape and (name not in _ROW_MAJOR or before[: found.dim + 1] != shape[: found.dim + 1]):
            return None
        axis = found
    return axis


@with_values
def _follow_by_rule(
    known: Operation,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    out: Any,
    samples: int,
    notes: list[str],
) -> None:
    name = known.name
    mark_enumeration(known, args, out)
    if name in LIKE_ANOTHER:
        tensors = tensors[:1]
    carried = [s for s in map(samples_of, tensors) if s is not None]
    if not carried or name in _CONSTANT:
        return
    if name == "setitem":
        op = Op(name, args, kwargs, tensors, args[0], 0, [], notes)
        _follow_write(args[0], SampleAxis(0, 1) if samples == 1 else assigned(op))
        return
    results = [out] if isinstance(out, Tensor) else tensors_in((out,))
    if not results:
        return
    rule = _RULES.get(name, _no_rule)
    if name in ROUTING:  # an index has no gradient; what it does to samples, its rule finds
        carried = [samples_of(t) for k, t in enumerate(tensors) if k == 0 or t.is_floating_point()]
    lost = next((s for s in carried if isinstance(s, Lost)), None)
    if lost is not None and following_positions() and any(isinstance(s, SampleAxis) for s in carried):
        lost = None  # positions may meet, as they do in attention
    for index, result in enumerate(results):
        if lost is not None:
            found: Samples = lost
        elif samples == 1 and name != "batch_norm":
            found = SampleAxis(0, 1)
        else:
            try:
                found = rule(Op(name, args, kwargs, tensors, result, index, results, notes))
            except (AssertionError, IndexError, KeyError, StopIteration, TypeError, ValueError):
                found = unknown(name)  # an unusual call: the probe decides
        if isinstance(found, Lost) and lost is None:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            found = replace(found, reason=f"{found.reason} on shapes {shapes}")
        if known.in_place or kwargs.get("out") is not None:
            _follow_write(result, found)
        else:
            set_samples(result, found)


def _follow_write(tensor: Tensor, samples: Samples) -> None:
    """Let a tensor that was written to carry its samples, and the tensor that it is a view of too, or lose them."""
    before = samples_of(tensor)
    set_samples(tensor, samples)
    base = tensor._base
    if base is None or samples == before:  # each entry still belongs to the sample that it did
        return
    whole = samples_of(base)
    if isinstance(samples, SampleAxis) and whole is None:
        set_samples(base, _seen_in(base, tensor, samples))
    elif whole != samples:
        set_samples(base, unknown("an in-place operation on a view"))


def _seen_in(base: Tensor, view: Tensor, axis: SampleAxis) -> Samples:
    """The axis of a tensor without data after data was written to a view of it."""
    along = (view.shape[axis.dim], view.stride(axis.dim))
    same = [dim for dim in range(base.dim()) if (base.shape[dim], base.stride(dim)) == along]
    if len(same) == 1:
        return axis.at(same[0])
    if view.numel() == base.numel() and view.is_contiguous() and base.is_contiguous():
        return row_major("a write to a view", axis, view.shape, base.shape)
    return unknown("an in-place operation on a view")
