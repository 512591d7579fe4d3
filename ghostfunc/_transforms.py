"""The public transforms: pure functions of `(model_fn, params, batches)`, shaped like `torch.func.grad`.

Each is one or two runs (forward and backward under the interpreter) and the contractions of their factors:

    joint       train and validation rows go through one forward and one backward
    two-phase   the validation gradient first, then the train rows are contracted with it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axes import Axes, LayerOf, arrange, parse
from ghostfunc._batch import batch_size, cannot_join, join, plain
from ghostfunc._call import Call, Layers, Params, Units, checked, one_direction, product_columns, units_of
from ghostfunc._compile import one_node
from ghostfunc._factors import Factor
from ghostfunc._functionalize import ModelFn
from ghostfunc._heads import along_heads, heads_of, with_samples_heads
from ghostfunc._nesting import unrecorded
from ghostfunc._products import Along, Joint, Products, WithSamples
from ghostfunc._randomness import DrewRandomNumbers, RandomState
from ghostfunc._run import Run, base_factor

Dots = Tensor | dict[str, Tensor]
Precondition = Callable[..., dict[str, Tensor]]


class _Values(NamedTuple):
    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    dots: Dots


class ValueAndGradDot(_Values):
    """What `value_and_grad_dot` returns: the tuple `(losses, val_losses, grads, dots)`, and `unused` beside it.

    Attributes:
        losses: `[n]`, of the train samples.
        val_losses: `[m]`, of the validation samples.
        grads: the gradient of the mean train loss, by name.
        dots: the dot products, in the axes that `out` asks for.
        unused: names of parameters that the train losses do not depend on; their gradients and dots are zero.
    """

    unused: tuple[str, ...] = ()


class _Asked(NamedTuple):
    """What is asked of dot products.

    Attributes:
        axes: of the result.
        reduction: over the validation samples, where the axes have none.
        layer_of: the layer of a parameter.
        heads: patterns by parameter, for the axis "head".
    """

    axes: Axes
    reduction: str
    layer_of: LayerOf
    heads: Mapping[str, str] | None

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

    def arranged(self, columns: dict[str, Tensor], units: Units, scale: float | int) -> Dots:
        """Columns `[units, k]`, or `[units, k, H]`, in the axes asked for."""
        columns = units.own(columns)
        if not self.each_val:
            columns = {name: column.squeeze(len(units.axes)) for name, column in columns.items()}
        has = (*units.axes, *(("val",) if self.each_val else ()), *(("head",) if self.by_head else ()))
        return arrange(columns, self.axes, has=has, scale=scale, layer_of=self.layer_of)


_ALL_AXES = ("param", "layer", "train", "token", "val", "head")


def _asked(
    out: str, available: tuple[str, ...], reduction: str, layer_of: LayerOf, heads: Mapping[str, str] | None
) -> _Asked:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum' over the validation samples.")
    return _Asked(parse(out, available), reduction, layer_of, heads)


def _dots(
    call: Call,
    train: Any,
    val: Any,
    asked: _Asked,
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
    train, val = plain(train), plain(val)
    n, m = batch_size(train, "train"), batch_size(val, "val")
    units = units_of(train, n, segments, token=asked.axes.has("token"))
    why_not = _why_not_joint(train, val, asked, precondition, segments)
    if schedule == "joint" and why_not:
        raise ValueError(f"schedule='joint' cannot serve this call: {why_not}. Use schedule='two-phase' or 'auto'.")
    if schedule == "joint" or (schedule == "auto" and not why_not and not call.has_aux and m <= n):
        before = RandomState.of(call.device)
        try:
            return _joint(call, train, val, n, m, asked, grads, refuse_random=schedule == "auto")
        except DrewRandomNumbers:
            before.restore()
    return _two_phase(call, train, val, n, m, units, asked, precondition, grads)


def _why_not_joint(
    train: Any, val: Any, asked: _Asked, precondition: Precondition | None, segments: Tensor | None
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
    call: Call, train: Any, val: Any, n: int, m: int, asked: _Asked, grads: bool, refuse_random: bool
) -> tuple[ValueAndGradDot, Any]:
    weights = call.weights(n + m, 1.0 / n if grads else 1.0)
    weights[n:] = asked.val_weight(m)
    products = Joint(call.names, n, m, asked.each_val, fuse=not call.lenient)
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
    dots = asked.arranged(columns, Units(n, n, None), n if grads else 1)
    aux = pytree.tree_map_only(Tensor, lambda t: t[:n] if t.dim() and len(t) == n + m else t, result.aux)
    return _values(result, result.losses[:n], result.losses[n:], dots), aux


def _two_phase(
    call: Call,
    train: Any,
    val: Any,
    n: int,
    m: int,
    units: Units,
    asked: _Asked,
    precondition: Precondition | None,
    grads: bool,
) -> tuple[ValueAndGradDot, Any]:
    before = RandomState.of(call.device)  # the train samples draw what a plain step would
    if asked.each_val:
        first = call.run(val, m, train=m, factors=call.names, dropout=False, batches=(("val", m),))
        direction = None
    else:
        weights = call.weights(m, asked.val_weight(m))
        first = call.run(val, m, train=m, grads=True, weights=weights, dropout=False, batches=(("val", m),))
        direction = first.grads
    before.restore()
    about = direction is not None and getattr(precondition, "about_train_gradient", False)
    if direction is not None and precondition is not None and not about:
        direction = precondition(direction)

    products: Products
    if direction is None:
        products = WithSamples(call.names, units.runs, first, m)
    else:
        products = Along(call.names, units.runs, {} if about else one_direction(direction, call), 1)
    sums = grads or about
    how = {
        "train": units.runs,
        "grads": sums,
        "weights": call.weights(n, 1.0 / n if sums else 1.0),
        "batches": (("train", n),),
        "segments": units.segments,
    }
    if about or asked.by_head:  # factors are kept until the direction is known, or for the heads
        result = call.run(train, n, factors=call.names, **how)
    else:
        result = call.contracted(products, train, n, **how)
    if about:
        assert precondition is not None and direction is not None
        products = Along(call.names, units.runs, one_direction(precondition(direction, result.grads), call), 1)
    columns = _by_head(call, products, result, units, asked) if asked.by_head else None
    columns = columns or product_columns(products, result, call.names)
    if not grads:
        result.grads = {}
    dots = asked.arranged(columns, units, n if sums else 1)
    return _values(result, result.losses, first.losses, dots), result.aux


def _by_head(call: Call, products: Products, result: Run, units: Units, asked: _Asked) -> dict[str, Tensor]:
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


def _values(result: Run, losses: Tensor, val_losses: Tensor, dots: Dots) -> ValueAndGradDot:
    values = ValueAndGradDot(losses, val_losses, result.grads, dots)
    values.unused = result.unused
    return values


@one_node
def ghost_grad_dot(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    out: str = "train",
    reduction: str = "mean",
    precondition: Precondition | None = None,
    schedule: str = "auto",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
) -> Any:
    """Dot products of each train sample's gradient with the validation gradient.

    dots[i] = <grad l_i, mean_j grad l_j>: to first order, a step of plain gradient descent on sample i alone with
    learning rate lr changes the mean validation loss by -lr * dots[i]. Positive is helpful. (In-Run Data Shapley,
    section 4.2, equation of the first-order value.)

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`.
        out: the axes of the result, any of them in any order: "train" (or "sample") `[n]`, "val" `[m]`, "token" `[R]`
            (positions of the train samples), "head" `[H]`, and "param" or "layer", a dict of tensors. "train val" is
            `[n, m]`, "param train" a dict of `[n]`. An axis that is left out is summed over, but "val" as `reduction`
            says. The entry of a token is the part of its sample's gradient that comes through its position's
            activations and cotangents.
        reduction: "mean" or "sum" over the validation samples.
        precondition: a function of the validation gradient (a dict like `params`) that gives the direction used.
        schedule: "joint": train and validation rows in one forward and backward; "two-phase": the validation gradient
            first; "auto": joint where the batches allow it and nothing random is drawn.
        dtype: the dtype of contractions; by default float32, float64 for float64 parameters.
        layers: restricts the dot products to parameters whose names match: comma-separated parts, matched at dots, or
            names, or a function of the name.
        layer_of: what the axis "layer" groups parameters by: a regular expression, whose first group (or whole match)
            is the layer's name, or a function of the parameter's name. By default the name up to its first number
            ("transformer.h.0"), or the module.
        heads: for the axis "head": where the heads of each weight are, `{name: pattern}`, as `attention_heads` gives.
        has_aux: `model_fn` returns `(losses, aux)`, and the result is `(dots, aux)` with the train batch's aux.
        on_unsupported: "raise", or "dense": a parameter used where no rule sees it costs one backward pass for each
            sample, and is exact.
        randomness: what dropout and other random operations draw for the train samples, as in `torch.func.vmap`.
            "different": every sample its own numbers, those that a plain training step on the same batch and seed
            draws; "same": every sample the same, those that it draws alone in its batch; "error": drawing raises.
            Dropout is off for the validation samples of the two-phase schedule, which "auto" takes.
        segments: integers `[n, T]`, the sample that each position of the train batch belongs to, from 0 to K - 1, or
            -1 for none: packed documents. The axis "train" has K entries then, each the part of the gradient of the
            sum of the losses that comes through the segment's positions: its own gradient, where attention and losses
            keep segments apart (as `causal_lm_loss` does for a batch with "segments").

    Returns:
        The dot products in the axes of `out`; with `has_aux`, `(dots, aux)`.

    Raises:
        UnsupportedUse: if the use of a parameter is not accounted for, or if the samples cannot share what a random
            operation draws (randomness="same").
        InteractingSamples: if a sample's loss depends on other samples.
        RuntimeError: if random numbers are drawn (randomness="error").
        ValueError: for batches, axes, layers or schedules that do not fit.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> gf.ghost_grad_dot(model_fn, params, train, val).shape
        torch.Size([5])
        >>> gf.ghost_grad_dot(model_fn, params, train, val, out="train val").shape
        torch.Size([5, 2])
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    values, aux = _dots(
        call,
        train,
        val,
        _asked(out, _ALL_AXES, reduction, layer_of, heads),
        precondition=precondition,
        schedule=schedule,
        grads=False,
        segments=segments,
    )
    return (values.dots, aux) if has_aux else values.dots


@one_node
def value_and_grad_dot(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    out: str = "train",
    reduction: str = "mean",
    precondition: Precondition | None = None,
    schedule: str = "auto",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
) -> Any:
    """Losses, the mean training gradient and the dot products of `ghost_grad_dot`, from one forward and backward.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`; its samples do not enter `grads`.
        out: as in `ghost_grad_dot`.
        reduction: as in `ghost_grad_dot`.
        precondition: as in `ghost_grad_dot`.
        schedule: as in `ghost_grad_dot`. With dropout active, "auto" takes "two-phase": train samples draw what a plain
            step would, validation samples run without dropout.
        dtype: as in `ghost_grad_dot`.
        layers: restricts the dot products; `grads` has every parameter.
        layer_of: as in `ghost_grad_dot`.
        heads: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.

    Returns:
        `ValueAndGradDot(losses[n], val_losses[m], grads, dots)`; `grads` is what `torch.func.grad` of the mean train
        loss gives, and `.unused` names the parameters that the train losses do not depend on. With
        `has_aux`, `(ValueAndGradDot, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> result = gf.value_and_grad_dot(model_fn, params, train, val)
        >>> result.losses.shape, result.grads["weight"].shape, result.dots.shape
        (torch.Size([5]), torch.Size([3, 4]), torch.Size([5]))
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    values, aux = _dots(
        call,
        train,
        val,
        _asked(out, _ALL_AXES, reduction, layer_of, heads),
        precondition=precondition,
        schedule=schedule,
        grads=True,
        segments=segments,
    )
    return (values, aux) if has_aux else values


@one_node
def ghost_grad_along(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    direction: Params,
    *,
    out: str = "sample",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
) -> Any:
    """Dot products of each sample's gradient with a direction: d[b] = <grad l_b, direction>.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        direction: a dict like `params`.
        out: as in `ghost_grad_dot`, without "val": "sample" `[B]`, "param sample" a dict of `[B]`, ...
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        layer_of: as in `ghost_grad_dot`.
        heads: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.

    Returns:
        `[B]`, or a dict of them; with `has_aux`, `(dots, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: if the direction's names or shapes are not the parameters'.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> gf.ghost_grad_along(model_fn, params, batch, {k: torch.ones_like(p) for k, p in params.items()}).shape
        torch.Size([5])
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    asked = _asked(out, tuple(axis for axis in _ALL_AXES if axis != "val"), "sum", layer_of, heads)
    batch = plain(batch)
    samples = batch_size(batch, "given")
    units = units_of(batch, samples, segments, token=asked.axes.has("token"))
    products = Along(call.names, units.runs, one_direction(direction, call), 1)
    how = {"train": units.runs, "segments": units.segments}
    if asked.by_head:
        result = call.run(batch, samples, factors=call.names, **how)
        columns = _by_head(call, products, result, units, asked)
    else:
        result = call.contracted(products, batch, samples, **how)
        columns = product_columns(products, result, call.names)
    dots = asked.arranged(columns, units, 1)
    return (dots, result.aux) if has_aux else dots


def ghost_factors(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    *,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
) -> Any:
    """The factors of every parameter's per-sample gradients, as values.

    The gradient of sample b with respect to a parameter is the sum of its factors' gradients of sample b
    (`factor.dense(shape)[b]`). Unlike contractions, factors stay in memory: every
    layer's activations and grad-outputs.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        dtype: the factors' dtype, as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.

    Returns:
        `(losses[B], {name: [Outer | Gather | Dense, ...]})`, one factor for each use; an empty list for a
        parameter that the losses do not depend on. With `has_aux`, `(losses, factors, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> losses, factors = gf.ghost_factors(model_fn, params, (torch.randn(2, 4), torch.tensor([0, 1])))
        >>> factors["weight"][0].a.shape, factors["weight"][0].g.shape
        (torch.Size([2, 1, 4]), torch.Size([2, 1, 3]))
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    batch = plain(batch)
    samples = batch_size(batch, "given")
    units = units_of(batch, samples, segments, token=False)
    result = call.run(batch, samples, train=units.runs, factors=call.names, segments=units.segments)
    with unrecorded():
        factors: dict[str, list[Factor]] = {
            name: [base_factor(result, s, result.factors[s].part(0, units.count), name) for s in result.sites(name)]
            for name in call.params
            if name in call.names
        }
    return (result.losses, factors, result.aux) if has_aux else (result.losses, factors)
