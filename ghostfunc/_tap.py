"""Taps: where the factors of an operation's parameters leave the backward.

A rule runs its operation on the parameters' values, which carry no gradient of their own, and puts `Tap` behind the
result: the identity, whose backward receives the grad-output g, makes the factor out of g and the saved activations,
returns the cotangent of the parameter and leaves what the site's treatment asks for with the site.

Inside a functorch transform (an ensemble by `vmap`, `grad` or `jvp` of a result) no `autograd.Function` is needed: a
zero tap is added to the result, its cotangent is g, and the factor is made after the backward, by operations that the
outer transform sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ghostfunc._factors import Factor
from ghostfunc._interpreter import Interpreter
from ghostfunc._sites import Site, Tracked

NO_RULE = object()  # what a rule returns for arguments that it does not know
Rule = Callable[..., Any]  # rule(mode, func, *args, **kwargs) -> the operation's result, or NO_RULE


class Use(NamedTuple):
    """How an operation uses one tensor.

    Attributes:
        tracked: the tensor; None for one that no parameter is behind.
        kind: "outer", "gather" or "dense": what `factor` makes.
        factor: `factor(g, samples, *saved)`, the factor of all samples from the grad-output.
        plain: `plain(g, *saved)`, the gradient over all samples, where there is a shorter way than through the factor.
        ids: for "gather": the ids as they were given.
        fallback: whether the operation has no rule.
        activation: where the first saved tensor is an activation whose last dimension meets the weight: whether that
            is the weight's "rows" or its "cols", as it is stored; the factor is then linear in that dimension.
    """

    tracked: Tracked | None
    kind: str
    factor: Callable[..., Factor]
    plain: Callable[..., Tensor] | None = None
    ids: Tensor | None = None
    fallback: bool = False
    activation: str = ""


class Tap(Function):
    """The identity on an operation's result; its backward makes the factors of the tensors that the operation used."""

    @staticmethod
    def forward(ctx, out, tap, uses, sites, saved, *used):
        ctx.uses, ctx.sites = uses, sites
        ctx.save_for_backward(*saved)
        return out.detach()  # its own tensor to autograd, so that the model may write to it

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # where activations are checkpointed, the interpreter sees them computed again
        gradients: list[Tensor | None] = []
        with torch._C.DisableTorchFunction():  # and nothing of what follows
            for use, site in zip(ctx.uses, ctx.sites, strict=True):
                gradient = site.resolve(
                    grad,
                    lambda g, samples, use=use: use.factor(g, samples, *saved),
                    None if use.plain is None else lambda use=use: use.plain(grad, *saved),
                )
                gradients.append(gradient)
        return grad, None, None, None, None, *gradients


def tapped(mode: Interpreter, op: str, out: Tensor, saved: tuple[Tensor, ...], *uses: Use) -> Tensor:
    """The result of an operation with a tap behind it for each tracked tensor that the operation used.

    Args:
        mode: the interpreter.
        op: the operation's name.
        out: its result.
        saved: the tensors that the factors are made of.
        uses: how it used each tensor.

    Returns:
        The result, as `model_fn` is to see it.
    """
    uses = tuple([use for use in uses if use.tracked is not None])
    if not uses:
        return out
    sites = mode.sites_of(op, [(use.tracked, use.kind) for use in uses if use.tracked is not None], out)
    for use, site in zip(uses, sites, strict=True):
        site.ids, site.fallback = use.ids, use.fallback
    if not mode.nested:
        saved = _narrowed(mode, saved, uses, sites)
        tap = torch.empty(0, device=out.device, requires_grad=True)
        for site in sites:
            site.tap = tap
        return Tap.apply(out, tap, uses, sites, saved, *(site.tracked.real for site in sites))  # type: ignore[return-value]
    tap = mode.leaf(out.new_zeros(out.shape))
    for use, site in zip(uses, sites, strict=True):
        site.tap = tap
        site.make = lambda g, samples, use=use: use.factor(g, samples, *saved)
    return out + tap


def _narrowed(
    mode: Interpreter, saved: tuple[Tensor, ...], uses: tuple[Use, ...], sites: list[Site]
) -> tuple[Tensor, ...]:
    """What is saved for the backward, an activation as its projection where that is all that will be asked for."""
    for use, site in zip(uses, sites, strict=True):
        matrix = mode.narrow(site, use.activation) if use.activation else None
        if matrix is not None:
            site.narrowed = True
            with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False), torch._C.DisableTorchFunction():
                return saved[0].to(matrix.dtype) @ matrix, *saved[1:]
    return saved
