"""Rules of products: every product of a parameter with data is an einsum, and every einsum one of three things.

Of the letters of a weight in an einsum with data, some are summed, some appear in the result alone, some are shared by
weight, data and result:

    summed, none shared       a linear map, y[k, o] = sum_i x[k, i] w[o, i]             by `F.linear`
    summed, new and shared    a linear map a block, y[k, s, o] = sum_i x[k, s, i] w[s, o, i]
    otherwise                 a scale, y = x * w, and a sum                             by `torch.mul`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Own
from ghostfunc._interpreter import Interpreter
from ghostfunc._letters import NAMES, as_einsum
from ghostfunc._lift import unexpanded
from ghostfunc._operations import einsum_letters, is_in_place
from ghostfunc._sample_axis import Partition, RowMap, SampleAxis, samples_of
from ghostfunc._tap import NO_RULE, Rule, Use, tapped

# ---------------------------------------------------------------- einsum


def _einsum(mode: Interpreter, func: Callable, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2:
        return NO_RULE
    inputs, output = einsum_letters(equation, [t.dim() for t in operands])
    plain = dict(zip(dict.fromkeys("".join(inputs)), ascii_letters, strict=False))  # `...` has letters of its own
    inputs, output = ["".join(plain[c] for c in letters) for letters in inputs], "".join(plain[c] for c in output)
    if len(operands) == 2:
        return _pair(mode, inputs, operands, output)
    first, second = _smallest_pair(inputs, operands, output)
    rest = [k for k in range(len(operands)) if k not in (first, second)]
    kept = _kept(inputs, first, second, output)
    merged = mode.call(torch.einsum, f"{inputs[first]},{inputs[second]}->{kept}", operands[first], operands[second])
    remaining = ",".join([kept, *(inputs[k] for k in rest)])
    return mode.call(torch.einsum, f"{remaining}->{output}", merged, *(operands[k] for k in rest))


def _kept(inputs: Sequence[str], first: int, second: int, output: str) -> str:
    """The letters that the product of two operands is to keep."""
    needed = set(output).union(*(inputs[k] for k in range(len(inputs)) if k not in (first, second)))
    return "".join(c for c in dict.fromkeys(inputs[first] + inputs[second]) if c in needed)


def _smallest_pair(inputs: Sequence[str], operands: Sequence[Tensor], output: str) -> tuple[int, int]:
    """The two operands whose product is smallest."""
    sizes = _sizes(inputs, operands)

    def size(pair: tuple[int, int]) -> int:
        return math.prod(sizes[c] for c in _kept(inputs, *pair, output))

    return min(combinations(range(len(operands)), 2), key=size)


def _sizes(inputs: Sequence[str], operands: Sequence[Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for letters, tensor in zip(inputs, operands, strict=True):
        for c, n in zip(letters, tensor.shape, strict=True):
            sizes[c] = n if sizes.get(c, 1) == 1 else sizes[c]  # a dimension of size 1 broadcasts
    return sizes


def _pair(mode: Interpreter, inputs: Sequence[str], operands: Sequence[Tensor], output: str) -> Any:
    """An einsum of a weight and data."""
    place = 0 if mode.find(operands[0]) is not None else 1
    weight, data = operands[place], operands[1 - place]
    sizes = _sizes(inputs, operands)
    weight, of_weight = _without_copies(mode, weight, inputs[place], data, inputs[1 - place])
    weight, of_weight = _reduced(mode, weight, of_weight, inputs[1 - place], output, sizes)
    data, of_data = _reduced(mode, data, inputs[1 - place], of_weight, output, sizes)
    shared = [c for c in of_weight if c in of_data and c in output]
    summed = [c for c in of_weight if c in of_data and c not in output]  # d_in
    fresh = [c for c in of_weight if c not in of_data]  # d_out
    kept = [c for c in of_data if c not in of_weight]  # positions, and samples unless these are shared
    apart = [[c] for c in kept]  # not flattened: a dimension has the samples
    if summed and not shared:
        x = _flat(mode, data, of_data, [*apart, summed], sizes)
        out = mode.call(F.linear, x, _flat(mode, weight, of_weight, [fresh, summed], sizes))
    elif summed and fresh:
        x = _flat(mode, data, of_data, [*apart, shared, summed], sizes)
        out = mode.call(
            block_linear, *_as_autocast(mode, x, _flat(mode, weight, of_weight, [shared, fresh, summed], sizes))
        )
    else:
        x, w = _as_autocast(mode, data, weight)
        every = kept + shared + fresh + summed
        out = mode.call(torch.mul, _spread(mode, x, of_data, every), _spread(mode, w, of_weight, every))
        if summed:
            out = mode.call(torch.sum, out, list(range(len(every) - len(summed), len(every))))
    out = mode.call(torch.reshape, out, [sizes[c] for c in kept + shared + fresh])
    return _permuted(mode, out, kept + shared + fresh, output)


def _without_copies(mode: Interpreter, weight: Tensor, letters: str, data: Tensor, of_data: str) -> tuple[Tensor, str]:
    """A weight that was expanded along letters of the data, before it was."""
    tracked = mode.find(weight)
    if tracked is None or (base := unexpanded(tracked)) is tracked:
        return weight, letters
    ahead = weight.dim() - base.real.dim()
    small = (1,) * ahead + tuple(base.real.shape)
    copied = {c for c, n, whole in zip(letters, small, weight.shape, strict=True) if n != whole}
    ones = {c for c, whole in zip(letters, weight.shape, strict=True) if whole == 1}  # one sample is as several are
    there = {c for c, n in zip(of_data, data.shape, strict=True) if n != 1 or c in ones}
    return (base.sentinel, letters[ahead:]) if copied | set(letters[:ahead]) <= there else (weight, letters)


def _reduced(
    mode: Interpreter, tensor: Tensor, letters: str, others: str, output: str, sizes: dict[str, int]
) -> tuple[Tensor, str]:
    """An operand without repeated letters, letters of its own that are summed, and dimensions that broadcast."""
    needed = "".join(c for c in dict.fromkeys(letters) if c in others or c in output)
    if needed != letters:
        tensor = mode.call(torch.einsum, f"{letters}->{needed}", tensor)
    for c in [c for c, n in zip(needed, tensor.shape, strict=True) if n != sizes[c] and c in others]:
        tensor = mode.call(torch.squeeze, tensor, needed.index(c))
        needed = needed.replace(c, "")
    return tensor, needed


def _permuted(mode: Interpreter, tensor: Tensor, letters: Sequence[str], target: Sequence[str]) -> Tensor:
    order = [letters.index(c) for c in target]
    if order == sorted(order):
        return tensor
    return mode.call(torch.t, tensor) if len(order) == 2 else mode.call(torch.permute, tensor, order)


def _flat(
    mode: Interpreter, tensor: Tensor, letters: str, groups: Sequence[Sequence[str]], sizes: dict[str, int]
) -> Tensor:
    """A tensor with one dimension for each group of letters."""
    tensor = _permuted(mode, tensor, letters, [c for group in groups for c in group])
    shape = [math.prod(sizes[c] for c in group) for group in groups]
    return tensor if list(tensor.shape) == shape else mode.call(torch.reshape, tensor, shape)


def _spread(mode: Interpreter, tensor: Tensor, letters: str, target: list[str]) -> Tensor:
    """A tensor with its dimensions in the order of `target`, and dimensions of size 1 for letters that it lacks."""
    tensor = _permuted(mode, tensor, letters, [c for c in target if c in letters])
    for dim, c in enumerate(target):
        if c not in letters:
            tensor = mode.call(torch.unsqueeze, tensor, dim)
    return tensor


def _as_autocast(mode: Interpreter, *tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype that autocast gives the operands of products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else mode.call(torch.Tensor.to, t, dtype) for t in tensors]


# ---------------------------------------------------------------- a linear map a block


def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map for each block: `[..., blocks, d_in]` by a weight `[blocks, d_out, d_in]`."""
    return torch.einsum("...si,soi->...so", x, weight)


def _block_linear(mode: Interpreter, func: Callable, x: Tensor, weight: Tensor) -> Any:
    """For every block s Dense(sum_r outer(g[r, s], x[r, s])), or a linear map with a factor of its own for each block.

    The first is one product, and is taken where the per-sample gradients have no more entries than the factors.
    """
    axis, tracked = samples_of(x), mode.find(weight)
    of_samples = isinstance(axis, SampleAxis) and axis.samples > 1 and axis.dim == x.dim() - 2
    entries = x.numel() // x.shape[-1] * (weight.shape[1] + weight.shape[2])  # of the activations and grad-outputs
    if mode.samples * weight.numel() > entries and not of_samples:
        parts = [
            mode.call(F.linear, mode.call(torch.select, x, -2, s), mode.call(torch.select, weight, 0, s))
            for s in range(len(weight))
        ]
        return mode.call(torch.stack, parts, -2)

    blocks, d_out, d_in = weight.shape

    def product(g: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("...so,...si->soi", g, x)

    def factor(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        x = x.to(g.dtype)
        in_blocks = isinstance(samples, SampleAxis) and samples.samples > 1 and samples.dim == g.dim() - 2
        if isinstance(samples, RowMap) or (in_blocks and samples.owners is not None):
            gradients = [product(samples.only(g, sample), x) for sample in range(samples.samples)]
            return Dense(torch.stack(gradients), (blocks, d_out, d_in))
        if in_blocks:  # each sample has blocks of its own
            own = replace(samples, dim=0)
            return Own(own.split(product(g, x)), own)
        by_sample = (samples.split(t).reshape(samples.samples, -1, *t.shape[-2:]) for t in (g, x))
        return Dense(torch.einsum("brso,brsi->bsoi", *by_sample), (blocks, d_out, d_in))

    return tapped(mode, "einsum", block_linear(x, mode.value(weight)), (x,), Use(tracked, "dense", factor, product))


# ---------------------------------------------------------------- other products


def _product(name: str) -> Rule:
    def rule(mode: Interpreter, func: Callable, *args: Any, **kwargs: Any) -> Any:
        return mode.call(torch.einsum, *as_einsum(name, args, kwargs))

    return rule


def _added_product(equation: str) -> Rule:
    """A product that is added, y = beta * input + alpha * a b."""

    def rule(
        mode: Interpreter,
        func: Callable,
        input: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        beta: int | float = 1,
        alpha: int | float = 1,
    ) -> Any:
        if is_in_place(func):
            return NO_RULE
        out = mode.call(torch.einsum, equation, a, b)
        out = out if alpha == 1 else mode.call(torch.mul, out, alpha)
        if beta == 0:  # as torch: what is in the input does not matter then
            return out
        return mode.call(torch.add, input if beta == 1 else mode.call(torch.mul, input, beta), out)

    return rule


def _bilinear(
    mode: Interpreter, func: Callable, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    """The form y[o] = sum_ij x1[i] W[o, i, j] x2[j]: through W x2, or the outer product of x1 and x2 if smaller."""
    d_out, d_1, d_2 = weight.shape
    lead = input1.shape[:-1]
    if d_out <= d_2:
        mapped = mode.call(F.linear, input2, mode.call(torch.reshape, weight, (d_out * d_1, d_2)))
        out = mode.call(torch.einsum, "...oi,...i->...o", mode.call(torch.reshape, mapped, (*lead, d_out, d_1)), input1)
        return out if bias is None else mode.call(torch.add, out, bias)
    pairs = mode.call(torch.einsum, "...i,...j->...ij", input1, input2)
    flat = mode.call(torch.reshape, pairs, (*lead, d_1 * d_2))
    return mode.call(F.linear, flat, mode.call(torch.reshape, weight, (d_out, d_1 * d_2)), bias)


PRODUCTS: dict[str, Rule] = {
    "einsum": _einsum,
    "block_linear": _block_linear,
    **{name: _product(name) for name in NAMES},
    "addmm": _added_product("ni,ij->nj"),
    "addmv": _added_product("ni,i->n"),
    "addbmm": _added_product("eni,eij->nj"),
    "baddbmm": _added_product("eni,eij->enj"),
    "bilinear": _bilinear,
}
