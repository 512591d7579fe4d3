"""Follows the samples through torch operations: from what the operands carry to what the results carry.

One row of `_RULES` an operation. One that is not understood leaves `Lost(mixed=False)` (a probe of the backward
decides later); one that lets samples meet leaves `Lost(mixed=True)`. A tensor that carries nothing does not depend on
the batch. What a row finds is in `_follow_shapes.py`, `_follow_layers.py`, `_routing.py` and `_packed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ghostfunc import _follow_layers as layers
from ghostfunc import _follow_shapes as shapes
from ghostfunc._axis_algebra import Op, argument, row_major, unknown
from ghostfunc._letters import as_einsum
from ghostfunc._nesting import with_values
from ghostfunc._operations import LIKE_ANOTHER, Operation, operation, tensors_in
from ghostfunc._packed import PACKING
from ghostfunc._routing import ROUTING, assigned, mark_enumeration
from ghostfunc._sample_axis import Lost, SampleAxis, Samples, following_positions, samples_of, set_samples

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
_POINTWISE_LOSSES = frozenset(
    """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    poisson_nll_loss gaussian_nll_loss soft_margin_loss
    """.split()
)
_UNMOVED = (_ELEMENTWISE | _ROW_MAJOR) - LIKE_ANOTHER


def _no_rule(op: Op) -> Samples:
    return unknown(op.name)


def _rows(names: str, rule: Callable[[Op], Samples]) -> dict[str, Callable[[Op], Samples]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[Op], Samples]] = {
    **dict.fromkeys(_ELEMENTWISE, shapes.entrywise),
    **dict.fromkeys(_ROW_MAJOR, shapes.reshaped),
    **dict.fromkeys(_REDUCTIONS, shapes.reduction),
    **dict.fromkeys(shapes.ALONG, shapes.along),
    **dict.fromkeys(layers.BATCH_FIRST, layers.batch_first),
    **dict.fromkeys(_POINTWISE_LOSSES, layers.pointwise_loss),
    **_rows("norm vector_norm linalg_vector_norm linalg_norm", shapes.norm),
    **_rows(
        "transpose swapaxes swapdims permute movedim moveaxis t adjoint get_T get_mT get_H get_mH",
        shapes.permuted,
    ),
    **_rows(
        "matmul mm bmm mv dot",
        lambda op: layers.matmul(op.name, op.args[0], argument(op.args, op.kwargs, 1, "other", "mat2"), op.out),
    ),
    "rmatmul": lambda op: layers.matmul(op.name, op.args[1], op.args[0], op.out),
    **_rows("addmm baddbmm", layers.added_matmul),
    "addbmm": layers.added_blocks,
    "einsum": lambda op: layers.einsum(op.args),
    **_rows("tensordot inner outer ger", lambda op: layers.einsum(as_einsum(op.name, op.args, op.kwargs))),
    "addmv": layers.added_matmul,
    "bilinear": layers.bilinear,
    "cdist": layers.distances,
    **_rows("linear block_linear", layers.linear),
    "embedding_bag": layers.bags,
    **_rows(
        "linalg_solve_triangular linalg_inv inverse linalg_cholesky cholesky linalg_matrix_exp matrix_exp",
        layers.matrices,
    ),
    "prelu": layers.prelu,
    **_rows("embedding one_hot", layers.looked_up),
    **_rows("layer_norm rms_norm", layers.norm_layer),
    "batch_norm": layers.batch_norm,
    "pad": shapes.padded,
    "token_losses": layers.token_losses,
    **_rows("cross_entropy nll_loss", layers.cross_entropy),
    "cosine_similarity": shapes.cosine_similarity,
    "scaled_dot_product_attention": layers.attention,
    **_rows("cat concat concatenate stack", shapes.concatenation),
    **_rows(
        "chunk split split_with_sizes tensor_split unbind select narrow",
        shapes.parts,
    ),
    **ROUTING,
    "where": lambda op: (
        ROUTING["nonzero"](op) if len(op.args) == 1 else shapes.elementwise(op.name, op.tensors, op.out)
    ),
    **_rows("repeat repeat_interleave tile", shapes.repeated),
    **_rows("view_as_real view_as_complex", lambda op: op.axis),
    **PACKING,
    **_rows("lstm gru rnn_tanh rnn_relu", layers.recurrent),
    **_rows("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", layers.cell),
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
