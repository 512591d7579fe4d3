"""The rule of `linear_cross_entropy`: its factor is made in blocks, in the same walk as the gradient of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ghostfunc._contract import total
from ghostfunc._factors import Dense, Factor
from ghostfunc._interpreter import Interpreter
from ghostfunc._linear_cross_entropy import (
    at_once,
    check_targets,
    losses_in_blocks,
    rows_at_a_time,
)
from ghostfunc._logits import LogitsOuter, Walk
from ghostfunc._nesting import recorded
from ghostfunc._operations import as_autocast
from ghostfunc._sample_axis import Partition, SampleAxis, samples_of
from ghostfunc._sites import MakeFactor, Site


@dataclass(frozen=True, eq=False)
class _Saved:
    """What the backward needs: `hidden` and `targets` as they were given, `lse` `[..., 1]`, and the options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    lse: Tensor
    ignore_index: int
    softcap: float | None
    rows: int

    def factor(self, g: Tensor, samples: Partition, dtype: torch.dtype) -> LogitsOuter:
        """The weight's factor from the cotangent `[..., 1]` of the losses."""
        hidden = samples.rows(self.hidden)
        token = g.masked_fill(self.targets.unsqueeze(-1) == self.ignore_index, 0).to(self.lse.dtype)
        return LogitsOuter(
            hidden.to(dtype), hidden=hidden, weight=self.weight, bias=self.bias,
            targets=samples.rows(self.targets.unsqueeze(-1)).squeeze(-1), lse=samples.rows(self.lse),
            token=samples.rows(token), softcap=self.softcap, block=self.rows,
        )  # fmt: skip

    def back(self, rows: Tensor, samples: Partition) -> Tensor:
        """Rows `[B, R, d]` of samples in the places that they have in `hidden`."""
        shape = self.hidden.shape
        if isinstance(samples, SampleAxis) and samples.owners is None and samples.dim == 0 and samples.outer == 1:
            return rows.reshape(shape)
        count = self.hidden[..., 0].numel()
        numbers = torch.arange(1, count + 1, device=rows.device).view(*shape[:-1], 1)  # a padded row has 0
        placed = rows.new_zeros(count + 1, shape[-1])
        placed[samples.rows(numbers).flatten()] = rows.flatten(0, 1)
        return placed[1:].view(shape)


class _Losses(Function):
    """The losses, as they were computed; the backward contracts the factors and makes the gradient of `hidden`."""

    @staticmethod
    def forward(ctx, losses, lse, targets, weight, bias, options, sites, tap, hidden, *used):
        ctx.options, ctx.sites = options, sites
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return losses.detach()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = _Saved(*ctx.saved_tensors, *ctx.options)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            of_hidden, gradients = _backward(saved, ctx.sites, grad, ctx.needs_input_grad[8])
        return *(None,) * 8, of_hidden, *gradients


def _backward(
    saved: _Saved, sites: dict[str, Site], grad: Tensor, wants_hidden: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    samples = _partition(list(sites.values()))
    wants_bias = "bias" in sites and sites["bias"].treatment not in ("off", "raw")
    walk = Walk(saved.factor(grad, samples, saved.lse.dtype), hidden=wants_hidden, bias=wants_bias)

    def of_weight(g: Tensor, samples: Partition) -> Factor:
        if walk.factor is None:  # after the backward
            return saved.factor(g, samples, g.dtype)
        return replace(walk.factor, a=walk.factor.hidden.to(g.dtype))

    def of_bias(g: Tensor, samples: Partition) -> Factor:
        if walk.factor is None:
            return Dense(saved.factor(g, samples, g.dtype).left_sum())
        walk.finish()
        assert walk.of_bias is not None
        return Dense(walk.of_bias.to(g.dtype))

    make = {"weight": of_weight, "bias": of_bias}
    gradients: list[Tensor | None] = []
    for name, site in sites.items():
        shape = site.tracked.real.shape
        plain = partial(_total, make[name], grad, samples, shape)
        gradients.append(site.resolve(grad, make[name], plain))
    walk.finish()
    of_hidden = walk.of_hidden
    walk.close()
    return None if of_hidden is None else saved.back(of_hidden, samples).to(saved.hidden.dtype), gradients


def _total(make: MakeFactor, g: Tensor, samples: Partition, shape: torch.Size) -> Tensor:
    return total(make(g, samples), shape)


def _partition(sites: list[Site]) -> Partition:
    """The samples of the losses; one sample of all rows where they do not matter, or are not known yet."""
    for site in sites:
        matter = site.treatment in ("factor", "fused")
        if matter or (site.treatment == "grad" and isinstance(site.axis, SampleAxis) and site.rows is None):
            return site.partition()
    return SampleAxis(0, 1)


def _token_losses(
    mode: Interpreter,
    func: Callable,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk: int | None,
) -> Any:
    """A linear map and the cross-entropy of its logits: Outer(h, g) with g in blocks, and Dense(sum_r g_r)."""
    of_data = any(t is not None and samples_of(t) is not None for t in (weight, bias))
    if mode.nested or recorded(hidden) or of_data or mode.find(hidden) is not None:
        with mode:  # each step has a rule
            return at_once(hidden, weight, targets, bias, ignore_index, softcap)
    check_targets(targets, len(weight), ignore_index)
    x, matrix, shift = as_autocast(hidden), mode.value(weight).detach(), mode.value(bias)
    shift = None if shift is None else shift.detach()
    rows = rows_at_a_time(x, len(matrix), chunk)
    losses, lse = losses_in_blocks(x, matrix, targets, shift, ignore_index, softcap, rows)
    kinds = {"weight": (mode.find(weight), "outer"), "bias": (mode.find(bias), "dense")}
    uses = {name: (tracked, kind) for name, (tracked, kind) in kinds.items() if tracked is not None}
    found = mode.sites_of("linear_cross_entropy", list(uses.values()), losses)
    tap = torch.empty(0, device=losses.device, requires_grad=True)
    for site in found:
        site.tap, site.width = tap, len(matrix)
    sites, options = dict(zip(uses, found, strict=True)), (ignore_index, softcap, rows)
    used = [site.tracked.real for site in found]
    return _Losses.apply(losses, lse, targets, matrix, shift, options, sites, tap, x, *used)


LOGITS = {"token_losses": _token_losses}
