"""Rules: how each operation that uses a parameter is run, and the factor that its backward yields.

A rule is an `autograd.Function` that takes the real parameter and *taps*, zero inputs whose cotangents carry the
factor (or its contraction) out of the backward, and a short function that recognises the operation's arguments and
applies it. `RULES` is the table; an operation without a row there takes `Opaque`, which is exact for every operation
whose result keeps samples apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree

from ghostfunc._errors import InteractingSamples, UnsupportedUse
from ghostfunc._factors import Dense, Factor, Gather, Outer, Own
from ghostfunc._interpreter import Interpreter, Site
from ghostfunc._operations import einsum_letters, is_in_place, tensors_in
from ghostfunc._sample_axis import Partition, SampleAxis, samples_of

NO_RULE = object()  # what a rule returns for arguments that it does not know

Rule = Callable[..., Any]


def _resolved(site: Site | None, *how: Any) -> tuple[Tensor | None, ...]:
    return (None,) if site is None else site.resolve(*how)


def _taps(*sites: Site | None) -> list[Tensor]:
    return [tap for site in sites if site is not None for tap in site.taps.values()]


# ---------------------------------------------------------------- linear maps


class Affine(Function):
    """y = x W^T + b, or y = x W + b for a weight stored `[d_in, d_out]`: Outer(x, g), and Dense for the bias."""

    @staticmethod
    def forward(x, weight, bias, transposed, cast, weight_site, bias_site, *taps):
        if cast is not None:
            x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.transposed, ctx.cast, ctx.weight_site, ctx.bias_site, *_ = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.cast is not None:
            x, weight = x.to(ctx.cast), weight.to(ctx.cast)
        transposed = ctx.transposed

        def outer(g: Tensor, samples: Partition) -> Factor:
            return Outer(samples.rows(x.to(g.dtype)), samples.rows(g), transposed)

        def plain() -> Tensor:
            a, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            return a.t() @ g if transposed else g.t() @ a

        def dense(g: Tensor, samples: Partition) -> Factor:
            return Dense(samples.sum_to(g, ctx.bias_shape))

        x_grad = grad @ (weight.t() if transposed else weight) if ctx.needs_input_grad[0] else None
        weight_grad, *weight_taps = _resolved(ctx.weight_site, grad, outer, plain)
        bias_grad, *bias_taps = _resolved(ctx.bias_site, grad, dense, lambda: grad.sum_to_size(ctx.bias_shape))
        return x_grad, weight_grad, bias_grad, None, None, None, None, *weight_taps, *bias_taps


def _affine(mode: Interpreter, op: str, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if samples_of(weight) is not None or samples_of(bias) is not None or mode.find(x) is not None:
        return NO_RULE  # type: ignore[return-value]
    if weight.dim() != 2 or weight.is_complex() or x.is_complex():
        return NO_RULE  # type: ignore[return-value]
    cast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    width = weight.shape[1] if transposed else weight.shape[0]
    out = torch.empty((), dtype=cast or x.dtype, device=x.device).expand(*x.shape[:-1], width)
    tracked = mode.find(weight)
    if tracked is not None and (base := tracked.transposed_base()) is not None:
        tracked, transposed = base, not transposed
    real = mode.real(weight) if tracked is None else tracked.real
    weight_site = mode.site(tracked, op, "outer", out)
    bias_site = mode.site(mode.find(bias), op, "dense", out)
    return Affine.apply(
        x, real, mode.real(bias), transposed, cast, weight_site, bias_site, *_taps(weight_site, bias_site)
    )  # type: ignore[return-value]


def _linear(mode: Interpreter, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _affine(mode, "linear", input, weight, bias, transposed=False)


def _addmm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: int | float = 1,
    alpha: int | float = 1,
) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1 or is_in_place(func):
        return NO_RULE
    return _affine(mode, "addmm", mat1, mat2, input, transposed=True)


def _matmul(mode: Interpreter, func: Callable, input: Tensor, other: Tensor) -> Any:
    if is_in_place(func):
        return NO_RULE
    weight = mode.find(other)
    if weight is not None and mode.find(input) is None and input.dim() >= 2:
        if other.dim() == 2:
            return _affine(mode, "matmul", input, other, None, transposed=True)
        if other.dim() == 1:  # a vector is a weight with one output
            return mode.call(torch.Tensor.squeeze, mode.call(F.linear, input, mode.call(torch.unsqueeze, other, 0)), -1)
    weight = mode.find(input)
    if weight is not None and mode.find(other) is None and input.dim() == 2 and other.dim() >= 2:  # W x = (x^T W^T)^T
        turned = mode.call(F.linear, mode.call(torch.transpose, other, -1, -2), input)
        return mode.call(torch.transpose, turned, -1, -2)
    return NO_RULE


def _einsum(mode: Interpreter, func: Callable, equation: Any, *operands: Any) -> Any:
    """A two-operand einsum with one weight, as a linear map of permuted operands."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NO_RULE
    inputs, output = einsum_letters(equation, [t.dim() for t in operands])
    place = 0 if mode.find(operands[0]) is not None else 1
    weight, data = operands[place], operands[1 - place]
    of_weight, of_data = inputs[place], inputs[1 - place]
    summed = [c for c in of_weight if c in of_data and c not in output]  # d_in
    fresh = [c for c in of_weight if c not in of_data and c in output]  # d_out
    kept = [c for c in of_data if c not in of_weight and c in output]  # samples and positions
    repeated = any(len(set(letters)) != len(letters) for letters in (of_weight, of_data, output))
    if (
        mode.find(data) is not None
        or repeated
        or not summed
        or len(summed) + len(fresh) != len(of_weight)
        or len(summed) + len(kept) != len(of_data)
    ):
        return NO_RULE
    sizes = {
        c: n for letters, t in ((of_weight, weight), (of_data, data)) for c, n in zip(letters, t.shape, strict=True)
    }
    matrix = mode.call(torch.permute, weight, [of_weight.index(c) for c in fresh + summed])
    d_in = _product(sizes[c] for c in summed)
    matrix = mode.call(torch.reshape, matrix, (-1 if fresh else 1, d_in))
    rows = mode.call(torch.permute, data, [of_data.index(c) for c in kept + summed])
    rows = mode.call(torch.reshape, rows, (*(sizes[c] for c in kept), d_in))
    out = mode.call(F.linear, rows, matrix)  # [*kept, d_out]
    out = mode.call(torch.reshape, out, tuple(sizes[c] for c in kept + fresh))
    order = kept + fresh
    return mode.call(torch.permute, out, [order.index(c) for c in output])


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


# ---------------------------------------------------------------- tables


class Embedding(Function):
    """y = W[ids]: Gather(ids, g), with zero for the padding's row."""

    @staticmethod
    def forward(ids, weight, padding_idx, site, *taps):
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, weight, ctx.padding_idx, ctx.site, *_ = inputs
        ctx.rows = len(weight)
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        padding = ctx.padding_idx

        def gather(g: Tensor, samples: Partition) -> Factor:
            if padding is not None:
                g = g.masked_fill((ids == padding).unsqueeze(-1), 0)
            return Gather(samples.rows(ids.unsqueeze(-1)).squeeze(-1), samples.rows(g))

        weight_grad, *taps = ctx.site.resolve(grad, gather)
        return None, weight_grad, None, None, *taps


def _embedding(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: int | float | None = None,
    norm_type: int | float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if func is torch.embedding:  # its arguments are (weight, ids, padding_idx)
        input, weight = weight, input
    tracked = mode.find(weight)
    if tracked is None or input.is_floating_point():
        return NO_RULE
    name = ", ".join(tracked.names)
    if max_norm is not None:
        raise UnsupportedUse(
            f"{name}: an embedding with max_norm={max_norm} renormalises its weight in place during the "
            "forward, so its gradient is not that of a pure function. Build it without max_norm, or freeze it.",
            tracked.names,
        )
    if scale_grad_by_freq:
        raise InteractingSamples(
            f"{name}: scale_grad_by_freq=True divides a sample's gradient by the counts of the whole batch, so that "
            "samples interact. Build the embedding without it, or freeze it."
        )
    vocabulary, width = weight.shape
    if input.numel() and (int(input.min()) < 0 or int(input.max()) >= vocabulary):
        bad = input[(input < 0) | (input >= vocabulary)][0].item()
        raise IndexError(
            f"{name}: id {bad} is outside the vocabulary: the embedding has {vocabulary} rows {tuple(weight.shape)}, "
            f"the ids {tuple(input.shape)} run from {int(input.min())} to {int(input.max())}. Use the tokenizer that "
            "the model was made for, or an embedding with more rows."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx = None if func is torch.embedding and padding_idx == -1 else padding_idx % vocabulary
    out = torch.empty((), dtype=weight.dtype, device=weight.device).expand(*input.shape, width)
    site = mode.site(tracked, "embedding", "gather", out)
    assert site is not None
    site.ids = input
    return Embedding.apply(input, tracked.real, padding_idx, site, *_taps(site))


# ---------------------------------------------------------------- norms, scales, biases


class LayerNorm(Function):
    """y = (x - mean) / std * w + b: Dense(sum_r g_r * xhat_r) and Dense(sum_r g_r)."""

    @staticmethod
    def forward(x, shape, weight, bias, eps, weight_site, bias_site, *taps):
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.shape, weight, bias, _, ctx.weight_site, ctx.bias_site, *_ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        shape = torch.Size(ctx.shape)

        def scale(g: Tensor, samples: Partition) -> Factor:
            return Dense(samples.sum_to(g * ((x - mean) * rstd).to(g.dtype), shape))

        def shift(g: Tensor, samples: Partition) -> Factor:
            return Dense(samples.sum_to(g, shape))

        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, list(shape), mean, rstd, weight, bias, [True, False, False]
            )
        weight_grad, *weight_taps = _resolved(ctx.weight_site, grad, scale)
        bias_grad, *bias_taps = _resolved(ctx.bias_site, grad, shift)
        return x_grad, None, weight_grad, bias_grad, None, None, None, *weight_taps, *bias_taps


def _layer_norm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if mode.find(input) is not None or samples_of(weight) is not None or samples_of(bias) is not None:
        return NO_RULE
    x, real_weight, real_bias = input, mode.real(weight), mode.real(bias)
    if torch.is_autocast_enabled(x.device.type):  # as autocast would, which knows layer_norm and not what it calls
        x = x.to(F.layer_norm(x.new_empty(0, *normalized_shape), normalized_shape).dtype)
    if any(p is not None and p.dtype != x.dtype for p in (real_weight, real_bias)):
        return NO_RULE
    weight_site = mode.site(mode.find(weight), "layer_norm", "dense", x)
    bias_site = mode.site(mode.find(bias), "layer_norm", "dense", x)
    out = LayerNorm.apply(
        x, tuple(normalized_shape), real_weight, real_bias, eps, weight_site, bias_site, *_taps(weight_site, bias_site)
    )
    return out[0]  # type: ignore[index]


class Broadcast(Function):
    """x + p, x - p, p - x, x * p, x / p with broadcasting: Dense(the entrywise gradient, summed to p's shape)."""

    @staticmethod
    def forward(x, p, op, site, *taps):
        if op == "mul":
            return x * p
        if op == "div":
            return x / p
        return x + p if op == "add" else x - p if op == "sub" else p - x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, p, ctx.op, ctx.site, *_ = inputs
        ctx.save_for_backward(*((x, p) if ctx.op in ("mul", "div") else ()))
        ctx.x_shape, ctx.x_dtype, ctx.shape = x.shape, x.dtype, p.shape

    @staticmethod
    def backward(ctx, grad):
        op, saved = ctx.op, ctx.saved_tensors
        x_grad = None
        if ctx.needs_input_grad[0]:
            if op == "mul":
                x_grad = grad * saved[1]
            elif op == "div":
                x_grad = grad / saved[1]
            else:
                x_grad = -grad if op == "rsub" else grad
            x_grad = x_grad.sum_to_size(ctx.x_shape).to(ctx.x_dtype)

        def dense(g: Tensor, samples: Partition) -> Factor:
            if op == "mul":
                entry = g * saved[0]
            elif op == "div":
                x, p = saved
                entry = -g * x / (p * p)
            else:
                entry = -g if op == "sub" else g
            return _dense_or_own(entry, samples, ctx.shape)

        p_grad, *taps = ctx.site.resolve(grad, dense)
        return x_grad, p_grad, None, None, *taps


def _dense_or_own(entry: Tensor, samples: Partition, shape: torch.Size) -> Factor:
    if isinstance(samples, SampleAxis) and samples.samples > 1:
        dim = samples.dim - entry.dim() + len(shape)
        if dim >= 0 and shape[dim] != 1:  # the tensor has a part for each sample
            axis = SampleAxis(dim, samples.samples, samples.outer, samples.inner)
            return Own(axis.split(entry.sum_to_size(shape)), axis)
    return Dense(samples.sum_to(entry, shape))


def _broadcast(op: str) -> Rule:
    def rule(mode: Interpreter, func: Callable, input: Any, other: Any, **kwargs: Any) -> Any:
        left, right = mode.find(input), mode.find(other)
        if kwargs or (left is None) == (right is None):
            return NO_RULE
        which = op
        if left is not None:
            if op == "div" or is_in_place(func):
                return NO_RULE
            input, other, right = other, input, left
            which = {"sub": "rsub", "rsub": "sub"}.get(op, op)
        if not isinstance(input, Tensor) or right is None:
            return NO_RULE
        out = torch.empty((), dtype=torch.result_type(input, other), device=input.device)
        out = out.expand(torch.broadcast_shapes(input.shape, other.shape))
        if not out.is_floating_point() or out.dim() == 0:
            return NO_RULE
        site = mode.site(right, op, "dense", out)
        in_place = is_in_place(func)
        saved = input.clone() if in_place and which in ("mul", "div") else input  # the backward needs it unchanged
        result = Broadcast.apply(saved, right.real, which, site, *_taps(site))
        return input.copy_(result) if in_place else result  # type: ignore[arg-type]

    return rule


# ---------------------------------------------------------------- anything else


class Opaque(Function):
    """Any operation, as a graph of its own: Dense by one backward of it for each sample, its cotangent masked."""

    @staticmethod
    def forward(ctx, operation, *tensors):
        ctx.operation = operation
        return operation.out.detach()

    @staticmethod
    def backward(ctx, grad):
        op: _Operation = ctx.operation
        grads: list[Tensor | None] = [None] * len(op.inputs)
        data = [k for k in range(len(op.inputs)) if ctx.needs_input_grad[1 + k] and k not in op.sites]
        for k, value in zip(data, op.pull(grad, data), strict=True):
            grads[k] = value
        taps: list[Tensor | None] = []
        for k, site in op.sites.items():

            def dense(g: Tensor, samples: Partition, k: int = k) -> Factor:
                g = g.to(op.out.dtype)
                return Dense(torch.stack([op.pull(samples.only(g, s), [k])[0] for s in range(samples.samples)]).to(g))

            grads[k], *of_site = site.resolve(grad, dense, lambda k=k: op.pull(grad, [k])[0])
            taps += of_site
        return None, *grads, *taps


class _Operation:
    """A call whose tensors were taken out and made leaves, with its result's graph."""

    def __init__(self, mode: Interpreter, func: Callable, args: Any, kwargs: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.given = [mode.real(leaves[k]) for k in places]
        self.tracked = [mode.find(leaves[k]) for k in places]
        self.inputs = [t.detach().requires_grad_(t.requires_grad) for t in self.given]
        self.sites: dict[int, Site] = {}
        for place, tensor in zip(places, self.inputs, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with torch.enable_grad():
            self.out = func(*args, **kwargs)

    def pull(self, grad: Tensor, which: list[int]) -> list[Tensor]:
        """The operation's gradients with respect to some of its tensors."""
        if not which:
            return []
        with torch.enable_grad():
            found = torch.autograd.grad(
                self.out, [self.inputs[k] for k in which], grad, retain_graph=True, allow_unused=True
            )
        return [torch.zeros_like(self.inputs[k]) if g is None else g for k, g in zip(which, found, strict=True)]


def _opaque(mode: Interpreter, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
    tensors = tensors_in(args) + tensors_in(kwargs.values())
    names = tuple(dict.fromkeys(n for t in map(mode.find, tensors) if t is not None for n in t.names))
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    refusal = (
        f"{', '.join(names)}: `{name}` on shapes {shapes} has no rule and {{}}. Freeze the parameter "
        "(requires_grad_(False)), pass on_unsupported='dense' (exact, one backward pass for each sample), or write it "
        "with operations that have a rule."
    )
    if is_in_place(func) or name == "setitem":
        return mode.unsupported(refusal.format("writes in place"), names, func, args, kwargs)
    operation = _Operation(mode, func, args, kwargs)
    out = operation.out
    if not isinstance(out, Tensor):
        return mode.unsupported(refusal.format("returns several results"), names, func, args, kwargs)
    if not out.requires_grad:
        return out
    for k, tracked in enumerate(operation.tracked):
        if tracked is not None and operation.inputs[k].requires_grad:
            site = mode.site(tracked, name, "dense", out)
            assert site is not None
            operation.sites[k] = site
    return Opaque.apply(operation, *operation.given, *_taps(*operation.sites.values()))


# ---------------------------------------------------------------- the table


RULES: dict[str, Rule] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "rmatmul": lambda mode, func, other, input: _matmul(mode, torch.matmul, input, other),
    "einsum": _einsum,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    **{name: _broadcast("add") for name in ("add", "radd", "iadd")},
    **{name: _broadcast("sub") for name in ("sub", "isub", "subtract")},
    "rsub": _broadcast("rsub"),
    **{name: _broadcast("mul") for name in ("mul", "rmul", "imul", "multiply")},
    **{name: _broadcast("div") for name in ("div", "truediv", "itruediv", "divide", "true_divide")},
}


def apply_rule(mode: Interpreter, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
    """Run an operation that uses tracked tensors and data: by its rule, or by `Opaque`."""
    rule = RULES.get(name)
    out = NO_RULE if rule is None else rule(mode, func, *args, **kwargs)
    return _opaque(mode, name, func, args, kwargs) if out is NO_RULE else out
