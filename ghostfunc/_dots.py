"""Dot products of train samples with validation samples: one run of both together, or one of each.

joint       train and validation rows go through one forward and backward
two-phase   the validation gradient first, then the train rows are contracted with it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axes import Axes, LayerOf, arrange, parse
from ghostfunc._batch import batch_size, cannot_join, join, plain
from ghostfunc._call import Call, Units, one_direction, product_columns, units_of
from ghostfunc._heads import along_heads, heads_of, with_samples_heads
from ghostfunc._low_rank_products import LowRankAlong, LowRankJoint
from ghostfunc._nesting import unrecorded
from ghostfunc._products import Along, Joint, Products, WithSamples
from ghostfunc._randomness import DrewRandomNumbers, RandomState
from ghostfunc._run_result import Run

Dots = Tensor | dict[str, Tensor]
Precondition = Callable[..., dict[str, Tensor]]


class _Values(NamedTuple):
    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    dots: Dots


class ValueAndGradDot(_Values):
    """What `value_and_grad_dot` returns: the tuple `(losses, val_losses, grads, dots)`; `unused` and `bound` beside it.

    Attributes:
        losses: `[n]`, of the train samples.
        val_losses: `[m]`, of the validation samples.
        grads: the gradient of the mean train loss, by name.
        dots: the dot products, in the axes that `out` asks for.
        unused: names of parameters that the train losses do not depend on; their gradients and dots are zero.
        bound: with `rank=`, the most that each of the dots may be off the exact one, in the same axes; else None.
    """

    unused: tuple[str, ...] = ()
    bound: Dots | None = None


class BoundedDots(NamedTuple):
    """Dot products with directions of low rank: what `ghost_grad_dot` and `ghost_grad_along` return with `rank=`.

    Attributes:
        dots: the dot products, in the axes that `out` asks for.
        bound: the most that each may be off the exact one, in the same axes.
    """

    dots: Dots
    bound: Dots


class ValGradient(NamedTuple):
    """The validation gradient, for any number of calls with the same parameters: what `val_gradient` returns.

    Attributes:
        losses: `[m]`, of this rank's validation samples.
        direction: the gradient of their mean (or sum), over all ranks, by name; preconditioned if that was asked for.
    """

    losses: Tensor
    direction: dict[str, Tensor]


class Shares(NamedTuple):
    """How many samples there are.

    Attributes:
        n: train samples here.
        m: validation samples here.
        all_n: train samples of all ranks.
        all_m: validation samples of all ranks.
    """

    n: int
    m: int
    all_n: int
    all_m: int


class Asked(NamedTuple):
    """What is asked of dot products.

    Attributes:
        axes: of the result.
        reduction: over the validation samples, where the axes have none.
        layer_of: the layer of a parameter.
        heads: patterns by parameter, for the axis "head".
        rank: of the directions that stand for those of the linear maps; None for these themselves.
    """

    axes: Axes
    reduction: str
    layer_of: LayerOf
    heads: Mapping[str, str] | None
    rank: int | None = None

    @property
    def each_val(self) -> bool:
        return self.axes.has("val")

    @property
    def by_head(self) -> bool:
        return self.axes.has("head")

    def val_weight(self, m: int) -> float:
        return 1.0 if self.each_val or self.reduction == "sum" else 1.0 / m

    def pattern(self, name: str) -> str:
        if self.heads is None or name not in self.heads:
            raise ValueError(
                f"out={self.axes.out!r}: heads= has no pattern for {name}. Pass heads=gf.attention_heads(module), or "
                "patterns of your own, and restrict the call to their parameters with layers=heads."
            )
        return self.heads[name]

    def joint(self, call: Call, n: int, m: int) -> Joint:
        """The products of n train samples with m validation samples of the same run."""
        how = (call.names, n, m, self.each_val, not call.lenient, call.budget)
        return Joint(*how) if self.rank is None else LowRankJoint(*how, rank=self.rank)

    def along(self, call: Call, train: int, directions: Mapping[str, Tensor]) -> Along:
        """The products of train samples with a direction that is there."""
        how = (call.names, train, directions, 1, call.budget)
        return Along(*how) if self.rank is None else LowRankAlong(*how, rank=self.rank)

    def bound(
        self, products: Products, result: Run, names: frozenset[str], units: Units, scale: float | int
    ) -> Dots | None:
        """Bounds on the errors of what `arranged` gives of the same run; None where nothing is approximated."""
        if self.rank is None:
            return None
        bounds = cast(LowRankJoint | LowRankAlong, products).bounds
        return self.arranged({name: bounds(result, name) for name in result.leaves if name in names}, units, scale)

    def arranged(self, columns: dict[str, Tensor], units: Units, scale: float | int) -> Dots:
        """Columns `[units, k]`, or `[units, k, H]`, in the axes asked for."""
        columns = units.own(columns)
        if not self.each_val:
            columns = {name: column.squeeze(len(units.axes)) for name, column in columns.items()}
        has = (*units.axes, *(("val",) if self.each_val else ()), *(("head",) if self.by_head else ()))
        return arrange(columns, self.axes, has=has, scale=scale, layer_of=self.layer_of)


ALL_AXES = ("param", "layer", "train", "token", "val", "head")


def asked_of(
    out: str,
    available: tuple[str, ...],
    reduction: str,
    layer_of: LayerOf,
    heads: Mapping[str, str] | None,
    rank: int | None,
    dtype: torch.dtype,
) -> Asked:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum' over the validation samples.")
    axes = parse(out, available)
    if rank is not None:
        _check_rank(rank, axes, dtype)
    return Asked(axes, reduction, layer_of, heads, rank)


def _check_rank(rank: int, axes: Axes, dtype: torch.dtype) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank={rank!r}: expected a positive int, or None for exact dot products.")
    if rank < 1:
        raise ValueError(f"rank={rank}: expected a positive int, or None for exact dot products.")
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        raise ValueError(f"rank={rank} with dtype={dtype}: in less than float32 the bound is one of rounding alone.")
    for axis, why in _WHOLE.items():
        if axes.has(axis):
            raise ValueError(f"out={axes.out!r} with rank={rank}: {why}. Leave the axis {axis!r} out, or rank=.")


_WHOLE = {
    "val": "one direction is approximated, the sum of the validation samples' gradients, and none for each of them",
    "token": "the error is bounded for whole samples, not for their positions",
    "head": "the direction of low rank is of a whole weight, not of its heads",
}


def dots_of(
    call: Call,
    train: Any,
    val: Any,
    asked: Asked,
    *,
    precondition: Precondition | None,
    schedule: str,
    grads: bool,
    segments: Tensor | None,
) -> tuple[ValueAndGradDot, Any]:
    if schedule not in ("auto", "joint", "two-phase"):
        raise ValueError(f"schedule={schedule!r}: expected 'auto', 'joint' or 'two-phase'.")
    if precondition is not None and asked.each_val:
        raise ValueError("precondition takes one validation gradient; it cannot serve an out with the axis 'val'.")
    made = isinstance(val, ValGradient)
    if made:
        _check_made(asked, precondition)
    train, val = plain(train), val if made else plain(val)
    with call.together():
        n, m = batch_size(train, "train"), len(val.losses) if made else batch_size(val, "val")
        units = units_of(train, n, segments, token=asked.axes.has("token"))
        why_not = "the validation gradient is there" if made else ""
        why_not = why_not or _why_not_joint(train, val, asked, precondition, segments)
    if call.ranks is not None:
        why_not = "the validation samples of all ranks make one gradient, which must be there first"
    if schedule == "joint" and why_not:
        raise ValueError(f"schedule='joint' cannot serve this call: {why_not}. Use schedule='two-phase' or 'auto'.")
    if schedule == "joint" or (schedule == "auto" and not why_not and not call.has_aux):
        before = RandomState.of(call.device)
        try:
            return _joint(call, train, val, n, m, asked, grads, refuse_random=schedule == "auto")
        except DrewRandomNumbers:
            before.restore()
    shares = Shares(n, m, call.over_ranks(n), call.over_ranks(m))
    return _two_phase(call, train, val, shares, units, asked, precondition, grads)


def _check_made(asked: Asked, precondition: Precondition | None) -> None:
    """Raise where a validation gradient that is there cannot serve the call."""
    if asked.each_val:
        raise ValueError(f"out={asked.axes.out!r}: a ValGradient is one direction; the axis 'val' needs the val batch.")
    if precondition is not None:
        raise ValueError("a ValGradient has its precondition already: pass precondition= to val_gradient.")
    if asked.reduction != "mean":
        raise ValueError("a ValGradient has its reduction already: pass reduction= to val_gradient.")


def _why_not_joint(
    train: Any, val: Any, asked: Asked, precondition: Precondition | None, segments: Tensor | None
) -> str:
    if precondition is not None:
        return "a precondition needs the whole validation gradient first"
    if segments is not None:
        return "only the train rows have segments"
    for axis in ("token", "head"):
        if asked.axes.has(axis):
            return f"the axis {axis!r} is of the train rows"
    return cannot_join(train, val)


def _joint(
    call: Call, train: Any, val: Any, n: int, m: int, asked: Asked, grads: bool, refuse_random: bool
) -> tuple[ValueAndGradDot, Any]:
    weights = call.weights(n + m, 1.0 / n if grads else 1.0)
    weights[n:] = asked.val_weight(m)
    products = asked.joint(call, n, m)
    result = call.contracted(
        products,
        join(train, val),
        n + m,
        train=n,
        grads=grads,
        weights=weights,
        refuse_random=refuse_random,
        batches=(("train", n), ("val", m)),
    )
    columns = product_columns(products, result, call.names)
    units, scale = Units(n, n, None), n if grads else 1
    dots, bound = asked.arranged(columns, units, scale), asked.bound(products, result, call.names, units, scale)
    aux = pytree.tree_map_only(Tensor, lambda t: t[:n] if t.dim() and len(t) == n + m else t, result.aux)
    return _values(result, result.losses[:n], result.losses[n:], dots, bound), aux


def _two_phase(
    call: Call,
    train: Any,
    val: Any,
    shares: Shares,
    units: Units,
    asked: Asked,
    precondition: Precondition | None,
    grads: bool,
) -> tuple[ValueAndGradDot, Any]:
    before = RandomState.of(call.device)  # the train samples draw what a plain step would
    n, m = shares.n, shares.m
    val_here = slice(0, m)
    if asked.each_val and call.ranks is not None:
        start = sum(call.ranks.counts(m)[: call.ranks.rank])
        val, m, val_here = call.ranks.batch(val, "val"), shares.all_m, slice(start, start + m)
    first: Run | None = None
    if asked.each_val:
        with call.together():
            first = call.run(val, m, factors=call.names, train=m, dropout=False, batches=(("val", m),))
        val = ValGradient(first.losses[val_here], {})
    elif not isinstance(val, ValGradient):
        val = val_phase(call, val, m, asked.val_weight(shares.all_m))
    direction = val.direction if first is None else None
    before.restore()
    about = direction is not None and getattr(precondition, "about_train_gradient", False)
    if direction is not None and precondition is not None and not about:
        direction = precondition(direction)

    products: Products
    if first is not None:
        products = WithSamples(call.names, units.runs, first, m, call.budget)
    else:
        products = asked.along(call, units.runs, {} if about else one_direction(direction or {}, call))
    sums = grads or about
    how = {
        "train": units.runs,
        "grads": sums,
        "weights": call.weights(n, 1.0 / shares.all_n if sums else 1.0),
        "batches": (("train", n),),
        "segments": units.segments,
    }
    with call.together():
        if about or asked.by_head:  # factors are kept until the direction is known, or for the heads
            result = call.run(train, n, factors=call.names, **how)
        else:
            result = call.contracted(products, train, n, **how)
    result.grads, result.unused = call.sums(result.grads), call.unused(result.unused)
    if about:
        assert precondition is not None and direction is not None
        products = asked.along(call, units.runs, one_direction(precondition(direction, result.grads), call))
    columns = by_head(call, products, result, units, asked) if asked.by_head else None
    columns = columns or product_columns(products, result, call.names)
    if not grads:
        result.grads = {}
    scale = shares.all_n if sums else 1
    dots, bound = asked.arranged(columns, units, scale), asked.bound(products, result, call.names, units, scale)
    return _values(result, result.losses, val.losses, dots, bound), result.aux


def val_phase(call: Call, val: Any, m: int, weight: float) -> ValGradient:
    """The first phase: losses of m validation samples, and the sum over all ranks of their gradients times a weight."""
    with call.together():
        how = {"train": m, "dropout": False, "batches": (("val", m),)}
        first = call.run(val, m, grads=True, weights=call.weights(m, weight), **how)
    return ValGradient(first.losses, call.sums(first.grads))


def by_head(call: Call, products: Products, result: Run, units: Units, asked: Asked) -> dict[str, Tensor]:
    columns: dict[str, Tensor] = {}
    with unrecorded():
        for name in call.params:
            if name in call.names:
                heads = heads_of(name, call.params[name].shape, asked.pattern(name))
                if isinstance(products, Along):
                    columns[name] = along_heads(result, name, products.directions[name], heads, units.runs)
                elif isinstance(products, WithSamples):
                    columns[name] = with_samples_heads(result, products.val, name, heads, units.runs)
    return columns


def _values(result: Run, losses: Tensor, val_losses: Tensor, dots: Dots, bound: Dots | None) -> ValueAndGradDot:
    values = ValueAndGradDot(losses, val_losses, result.grads, dots)
    values.unused, values.bound = result.unused, bound
    return values
