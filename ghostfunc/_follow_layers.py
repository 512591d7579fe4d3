"""Where samples are after products, layers and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ghostfunc._axis_algebra import Op, agree, aligned, argument, ints, mixed, unknown
from ghostfunc._follow_shapes import elementwise
from ghostfunc._operations import einsum_letters, tensors_in
from ghostfunc._packed import is_packed, packed_recurrent
from ghostfunc._sample_axis import SampleAxis, Samples, following_positions, samples_of

BATCH_FIRST = {  # operations that keep a leading batch dimension, with the rank of a batched input
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


def matmul(name: str, a: Tensor, b: Tensor, out: Tensor) -> Samples:
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


def einsum(args: Sequence[Any]) -> Samples:
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


def added_matmul(op: Op) -> Samples:
    first, a, b = op.tensors[:3]
    return agree(op.name, (aligned(samples_of(first), first, op.out), matmul(op.name, a, b, op.out)))


def added_blocks(op: Op) -> Samples:
    first, a, b = op.tensors[:3]
    return agree(op.name, (aligned(samples_of(first), first, op.out), einsum(("eni,eij->nj", a, b))))


def linear(op: Op) -> Samples:
    x, weight, *bias = op.tensors
    product = op.axis
    if samples_of(weight) is not None:
        blocks = "s" if op.name == "block_linear" else ""
        product = einsum((f"...{blocks}i,{blocks}oi->...{blocks}o", x, weight))
    elif isinstance(product, SampleAxis) and product.dim == x.dim() - 1:
        return mixed(op.name)
    return agree(op.name, (product, *(unknown(op.name) for t in bias if samples_of(t) is not None)))


def bilinear(op: Op) -> Samples:
    """Every dimension but the last is a dimension of both inputs and of the result."""
    if any(samples_of(t) is not None for t in op.tensors[2:]):
        return unknown(op.name)
    axes = [samples_of(t) for t in op.tensors[:2]]
    last = op.tensors[0].dim() - 1
    return agree(op.name, (mixed(op.name) if isinstance(a, SampleAxis) and a.dim == last else a for a in axes))


def matrices(op: Op) -> Samples:
    """Operations on the last two dimensions of every operand, with batches of matrices in front that broadcast."""
    axes = [(samples_of(t), t) for t in op.tensors]
    if any(isinstance(axis, SampleAxis) and axis.dim >= t.dim() - 2 for axis, t in axes):
        return mixed(op.name)
    return agree(op.name, (aligned(axis, t, op.out) for axis, t in axes))


def distances(op: Op) -> Samples:
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


def looked_up(op: Op) -> Samples:
    """embedding(ids, table), torch.embedding(table, ids), one_hot(ids): the axis of the ids."""
    ids = next(t for t in op.tensors if not t.is_floating_point())
    others = any(samples_of(t) is not None for t in op.tensors if t is not ids)
    return unknown(op.name) if others else samples_of(ids)


def bags(op: Op) -> Samples:
    """embedding_bag: the first dimension of ids `[B, L]`."""
    ids = next(t for t in op.tensors if not t.is_floating_point())
    table = looked_up(op)
    return table if ids.dim() == 2 and isinstance(table, SampleAxis) and table.dim == 0 else unknown(op.name)


def norm_layer(op: Op) -> Samples:
    name, args, kwargs = op.name, op.args, op.kwargs
    tensor = args[0]
    axis = samples_of(tensor)
    if not isinstance(axis, SampleAxis):
        return axis
    rank = len(ints([argument(args, kwargs, 1, "normalized_shape")]))
    return axis if axis.dim < tensor.dim() - rank else mixed(name)


def batch_norm(op: Op) -> Samples:
    training = argument(op.args, op.kwargs, 5, "training", default=False)
    if training or argument(op.args, op.kwargs, 1, "running_mean") is None:
        return mixed("batch_norm in training mode")
    return op.axis


def batch_first(op: Op) -> Samples:
    axis, rank = op.axis, BATCH_FIRST[op.name]
    if not isinstance(axis, SampleAxis):
        return axis
    plain = (rank is None or op.args[0].dim() == rank) and axis.dim == 0 and axis.size == op.out.shape[0]
    others = [t for t in op.tensors if t is not op.args[0] and samples_of(t) is not None]
    return axis if plain and all(samples_of(t) == axis for t in others) else unknown(op.name)


def prelu(op: Op) -> Samples:
    """The axis of the data, unless a slope for each channel meets samples as channels."""
    axis, slopes = op.axis, op.tensors[1]
    in_channels = isinstance(axis, SampleAxis) and axis.dim == 1 and slopes.numel() > 1
    return unknown(op.name) if in_channels or samples_of(slopes) is not None else axis


def attention(op: Op) -> Samples:
    args, kwargs, out = op.args, op.kwargs, op.out
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


def recurrent(op: Op) -> Samples:
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


def cell(op: Op) -> Samples:
    """lstm_cell, gru_cell and rnn_cell: everything is `[B, d]`."""
    found = [samples_of(t) for t in op.tensors]
    away = any(isinstance(axis, SampleAxis) and axis.dim != 0 for axis in found)
    return mixed(op.name) if away else agree(op.name, found)


def cross_entropy(op: Op) -> Samples:
    name, args, kwargs = op.name, op.args, op.kwargs
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


def token_losses(op: Op) -> Samples:
    """Losses `[..., 1]` of hidden states `[..., d]` and targets `[...]`."""
    hidden, weight, targets, bias = op.args[:4]
    axis = samples_of(hidden)
    if isinstance(axis, SampleAxis) and axis.dim == hidden.dim() - 1:
        return mixed(op.name)
    of_head = (unknown(op.name) for t in (weight, bias) if samples_of(t) is not None)
    return agree(op.name, (axis, samples_of(targets), *of_head))


def pointwise_loss(op: Op) -> Samples:
    if argument(op.args, op.kwargs, 99, "reduction", default="mean") == "none":
        return elementwise(op.name, op.tensors, op.out)
    return mixed(op.name)
