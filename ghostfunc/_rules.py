"""Rules: how each operation that uses a parameter is run, and the factor of each use.

A rule runs its operation on the parameters' values and hands the result to `tapped` with, for each parameter, a
function from the grad-output and the saved activations to the factor. `RULES` is the table; an operation without a
row there takes `_opaque`, which is exact for every operation whose result keeps samples apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._composites import COMPOSITES
from ghostfunc._errors import InteractingSamples, UnsupportedUse
from ghostfunc._factors import Dense, Factor, Gather, Later, Outer
from ghostfunc._interpreter import Interpreter
from ghostfunc._nesting import readable
from ghostfunc._operations import as_autocast, is_in_place, op_name
from ghostfunc._randomness import cannot_share
from ghostfunc._rules_conv import CONVOLUTIONS
from ghostfunc._rules_logits import LOGITS
from ghostfunc._rules_lookups import LOOKUPS
from ghostfunc._rules_norm import NORMS
from ghostfunc._rules_pointwise import POINTWISE
from ghostfunc._rules_products import PRODUCTS
from ghostfunc._sample_axis import Lost, Partition, samples_of
from ghostfunc._tap import NO_RULE, Rule, Use, tapped

# ---------------------------------------------------------------- linear maps


def _affine(mode: Interpreter, op: str, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
    """A linear map, y = x W^T + b, or y = x W + b for a weight stored `[d_in, d_out]`: Outer(x, g), Dense(g)."""
    if samples_of(weight) is not None or samples_of(bias) is not None or mode.find(x) is not None:
        return NO_RULE
    if weight.dim() != 2 or weight.is_complex() or x.is_complex():
        return NO_RULE
    x = as_autocast(x)
    matrix = mode.value_in_product(weight)
    out = F.linear(x, matrix.t() if transposed else matrix, None if bias is None else mode.value(bias))
    tracked = mode.find(weight)
    if tracked is not None and (base := tracked.transposed_base()) is not None:
        tracked, transposed = base, not transposed

    def outer(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return Outer(samples.rows(x.to(g.dtype)), samples.rows(g), transposed)

    def product(g: Tensor, x: Tensor) -> Tensor:
        a, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return a.t() @ g if transposed else g.t() @ a

    def shift(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return Dense(samples.sum_to(g, bias_shape))

    bias_shape = torch.Size() if bias is None else bias.shape
    return tapped(
        mode,
        op,
        out,
        (x,),
        Use(tracked, "outer", outer, product, activation="rows" if transposed else "cols"),
        Use(mode.find(bias), "dense", shift, lambda g, x: g.sum_to_size(bias_shape)),
    )


def _linear(mode: Interpreter, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    out = _affine(mode, "linear", input, weight, bias, transposed=False)
    if out is not NO_RULE or mode.find(weight) is not None:
        return out
    out = mode.call(torch.einsum, "...i,oi->...o", input, weight)  # the matrix is data
    return out if bias is None else mode.call(torch.add, out, bias)


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
    if beta == 1 and alpha == 1 and input.dim() == 1 and not is_in_place(func):
        out = _affine(mode, "addmm", mat1, mat2, input, transposed=True)
        if out is not NO_RULE:
            return out
    return PRODUCTS["addmm"](mode, func, input, mat1, mat2, beta=beta, alpha=alpha)


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
    return PRODUCTS["matmul"](mode, func, input, other)


def _grouped(
    mode: Interpreter, func: Callable, input: Tensor, weight: Tensor, offs: Tensor | None = None, **more: Any
) -> Any:
    """Rows sorted by expert, each group through its own matrix `weight[e]`, `[d_in, d_out]`: one product for each."""
    if mode.find(weight) is None or weight.dim() != 3 or input.dim() != 2 or offs is None or not readable(offs):
        return NO_RULE
    if any(value is not None for value in more.values()):
        return NO_RULE
    if isinstance(samples_of(offs), Lost):
        mode.notes.append(f"`{op_name(func)}` groups rows by counts over the whole batch")
    groups, start = [], 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            rows = mode.call(torch.Tensor.__getitem__, input, slice(start, stop))
            groups.append(mode.call(torch.matmul, rows, mode.call(torch.Tensor.__getitem__, weight, expert)))
        start = stop
    if start < len(input):
        groups.append(input.new_zeros(len(input) - start, weight.shape[2]))
    return mode.call(torch.cat, groups)


# ---------------------------------------------------------------- tables


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
    vocabulary = len(weight)
    if readable(input) and input.numel() and (int(input.min()) < 0 or int(input.max()) >= vocabulary):
        bad = input[(input < 0) | (input >= vocabulary)][0].item()
        raise IndexError(
            f"{name}: id {bad} is outside the vocabulary: the embedding has {vocabulary} rows {tuple(weight.shape)}, "
            f"the ids {tuple(input.shape)} run from {int(input.min())} to {int(input.max())}. Use the tokenizer that "
            "the model was made for, or an embedding with more rows."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx = None if func is torch.embedding and padding_idx == -1 else padding_idx % vocabulary

    def gather(g: Tensor, samples: Partition, ids: Tensor) -> Factor:
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
        return Gather(samples.rows(ids.unsqueeze(-1)).squeeze(-1), samples.rows(g))

    out = F.embedding(input, mode.value(weight))
    return tapped(mode, "embedding", out, (input,), Use(tracked, "gather", gather, ids=input))


# ---------------------------------------------------------------- norms


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
    """Layer norm, y = (x - mean) / std * w + b: Dense(sum_r g_r * xhat_r) and Dense(sum_r g_r)."""
    if mode.find(input) is not None or samples_of(weight) is not None or samples_of(bias) is not None:
        return NO_RULE
    if torch.is_autocast_enabled(input.device.type):  # as autocast would, which knows layer_norm and not what it calls
        input = input.to(F.layer_norm(input.new_empty(0, *normalized_shape), normalized_shape).dtype)
    if any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        return NO_RULE
    shape = torch.Size(normalized_shape)
    out = F.layer_norm(input, shape, mode.value(weight), mode.value(bias), eps)

    def scale(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return Dense(samples.sum_to(g * F.layer_norm(x, shape, eps=eps).to(g.dtype), shape))

    def shift(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return Dense(samples.sum_to(g, shape))

    return tapped(
        mode,
        "layer_norm",
        out,
        (input,),
        Use(mode.find(weight), "dense", scale),
        Use(mode.find(bias), "dense", shift),
    )


# ---------------------------------------------------------------- anything else


def _opaque(mode: Interpreter, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
    """Any operation: one backward of it for each sample, its cotangent masked, when the gradients are asked for."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[k] for k in places]
    tracked = [mode.find(t) for t in tensors]
    names = tuple(dict.fromkeys(n for t in tracked if t is not None for n in t.names))
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    refusal = (
        f"{', '.join(names)}: `{name}` on shapes {shapes} has no rule and {{}}. Freeze the parameter "
        "(requires_grad_(False)), pass on_unsupported='dense' (exact, one backward pass for each sample), or write it "
        "with operations that have a rule."
    )
    if is_in_place(func) or name == "setitem":
        return mode.unsupported(refusal.format("writes in place"), names, func, args, kwargs)
    if mode.nested:
        return mode.unsupported(
            refusal.format("is inside a functorch transform, where the exact fallback for single operations is not"),
            names, func, args, kwargs,
        )  # fmt: skip

    def operation(*values: Tensor) -> Any:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    state = mode.random_state(name, args, kwargs)
    if state is not None and mode.randomness == "same" and mode.samples > 1:
        raise cannot_share(name, f"it takes {', '.join(names)} together with data, and has no rule")
    values = [mode.value(t) for t in tensors]
    out = operation(*values)
    if not isinstance(out, Tensor):
        return mode.unsupported(refusal.format("returns several results"), names, func, args, kwargs)
    if not (out.is_floating_point() or out.is_complex()):
        return out

    def pull(place: int, saved: tuple[Tensor, ...], cotangents: Iterable[Tensor]) -> list[Tensor]:
        """The operation's gradients with respect to one of its tensors, for each cotangent."""
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(k == place) for k, t in enumerate(saved)]
            again = operation(*inputs) if state is None else state.replay(operation, *inputs)
            if not again.requires_grad:
                return [torch.zeros_like(saved[place]) for _ in cotangents]
            found = [
                torch.autograd.grad(again, inputs[place], g.to(again.dtype), retain_graph=True) for g in cotangents
            ]
        return [g for (g,) in found]

    def later(g: Tensor, samples: Partition, *saved: Tensor, place: int) -> Factor:
        def rows(start: int, stop: int) -> Tensor:
            return torch.stack(pull(place, saved, (samples.only(g, s) for s in range(start, stop)))).to(g)

        return Later(rows, tuple(saved[place].shape), samples.samples)

    uses = [
        Use(t, "dense", partial(later, place=k), lambda g, *saved, k=k: pull(k, saved, [g])[0], fallback=True)
        for k, t in enumerate(tracked)
        if t is not None
    ]
    return tapped(mode, name, out, tuple(values), *uses)


# ---------------------------------------------------------------- the table


RULES: dict[str, Rule] = {
    **POINTWISE,
    **LOOKUPS,
    **LOGITS,
    **PRODUCTS,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "rmatmul": lambda mode, func, other, input: _matmul(mode, torch.matmul, input, other),
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    **CONVOLUTIONS,
    **NORMS,
    **COMPOSITES,
}


def apply_rule(mode: Interpreter, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
    """Run an operation that uses tracked tensors and data: by its rule, or by `Opaque`."""
    rule = RULES.get(name)
    out = NO_RULE if rule is None else rule(mode, func, *args, **kwargs)
    return _opaque(mode, name, func, args, kwargs) if out is NO_RULE else out
