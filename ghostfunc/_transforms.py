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

from ghostfunc._batch import batch_size, cannot_join, join, plain
from ghostfunc._compile import one_node
from ghostfunc._factors import Factor
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import unrecorded
from ghostfunc._products import Along, Joint, Products, WithSamples
from ghostfunc._randomness import RANDOMNESS, DrewRandomNumbers, RandomState
from ghostfunc._run import Run, Want, base_factor, run
from ghostfunc._segments import Segments

Params = Mapping[str, Tensor]
Dots = Tensor | dict[str, Tensor]


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


class _Axes(NamedTuple):
    order: tuple[str, ...]
    per_param: bool
    each_val: bool


_AXES = ("param", "train", "val")


def _axes(out: str, available: tuple[str, ...] = _AXES) -> _Axes:
    names = tuple("train" if name == "sample" else name for name in out.split())
    unknown = [name for name in names if name not in available]
    if unknown or "train" not in names or len(set(names)) != len(names):
        raise ValueError(
            f"out={out!r}: each axis may stand once and 'train' (or 'sample') must be among them; the axes here are "
            f"{', '.join(map(repr, available))}, for example 'train', 'param train' or 'train val'."
        )
    return _Axes(names, "param" in names, "val" in names)


def match_layers(layers: str | Callable[[str], bool], names: list[str]) -> frozenset[str]:
    """The parameters that a pattern means.

    Args:
        layers: comma-separated name parts, matched at dots ("h.1" is not "h.11"); empty for all; or a function of
            the name.
        names: the parameters' names.

    Returns:
        The names that match.

    Raises:
        ValueError: if a part matches nothing; the message lists the names.
    """
    if callable(layers):
        return frozenset(name for name in names if layers(name))
    found: set[str] = set()
    for part in (p.strip() for p in layers.split(",") if p.strip()):
        matched = [name for name in names if f".{part}." in f".{name}."]
        if not matched:
            raise ValueError(f"layers: no parameter matches {part!r}; the parameters are {', '.join(names)}.")
        found.update(matched)
    return frozenset(found or names)


def _check_params(params: Params) -> dict[str, Tensor]:
    if not isinstance(params, Mapping) or not params:
        raise ValueError("params must be a dict of at least one tensor by name.")
    for name, p in params.items():
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(p).__name__}, not a tensor.")
        if not p.is_floating_point():
            raise TypeError(
                f"params[{name!r}] of shape {tuple(p.shape)} has dtype {p.dtype}: only floating-point tensors have "
                "gradients. Leave it in the module, or close over it in model_fn."
            )
    return dict(params)


def _contraction_dtype(params: Params, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    widest = torch.float32
    for p in params.values():
        widest = torch.promote_types(widest, p.dtype)
    return widest


def _arranged(columns: dict[str, Tensor], axes: _Axes, scale: int) -> Dots:
    """Per-parameter products `[n, k]` in the axes that were asked for."""

    def shaped(dots: Tensor) -> Tensor:
        dots = dots * scale if scale != 1 else dots
        if not axes.each_val:
            return dots.squeeze(1)
        return dots if axes.order.index("train") < axes.order.index("val") else dots.t()

    if axes.per_param:
        return {name: shaped(dots) for name, dots in columns.items()}
    return shaped(torch.stack(list(columns.values())).sum(0))


def _product_columns(products: Products, result: Run, names: frozenset[str]) -> dict[str, Tensor]:
    with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
        columns = {name: products.products(result, name) for name in result.leaves if name in names}
    for site in result.fused:
        site.fused_right = None
    return columns


class _Call(NamedTuple):
    """The arguments that every transform shares, checked."""

    model_fn: ModelFn
    params: dict[str, Tensor]
    dtype: torch.dtype
    names: frozenset[str]
    has_aux: bool
    lenient: bool
    randomness: str

    def run(self, batch: Any, samples: int, **want: Any) -> Run:
        return run(
            self.model_fn,
            self.params,
            batch,
            samples,
            Want(
                dtype=self.dtype,
                has_aux=self.has_aux,
                lenient=self.lenient,
                randomness=self.randomness,
                **want,
            ),
        )

    def contracted(self, products: Products, batch: Any, samples: int, **want: Any) -> Run:
        return self.run(batch, samples, factors=self.names, more_taps=products.more_taps, plan=products.plan, **want)


def _checked(
    model_fn: ModelFn,
    params: Params,
    dtype: torch.dtype | None,
    layers: str | Callable[[str], bool],
    has_aux: bool,
    on_unsupported: str,
    randomness: str,
) -> _Call:
    params = _check_params(params)
    if on_unsupported not in ("raise", "dense"):
        raise ValueError(f"on_unsupported={on_unsupported!r}: expected 'raise' or 'dense'.")
    if randomness not in RANDOMNESS:
        raise ValueError(f"randomness={randomness!r}: expected {', '.join(map(repr, RANDOMNESS))}.")
    names = match_layers(layers, list(params))
    lenient = on_unsupported == "dense"
    return _Call(model_fn, params, _contraction_dtype(params, dtype), names, has_aux, lenient, randomness)


def _segments(segments: Tensor | None, batch: Any, samples: int) -> Segments | None:
    return None if segments is None else Segments.of(segments, batch, samples)


def _dots(
    call: _Call,
    train: Any,
    val: Any,
    *,
    out: str,
    reduction: str,
    precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    schedule: str,
    grads: bool,
    segments: Tensor | None,
) -> tuple[ValueAndGradDot, Any]:
    axes = _axes(out)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum' over the validation samples.")
    if schedule not in ("auto", "joint", "two-phase"):
        raise ValueError(f"schedule={schedule!r}: expected 'auto', 'joint' or 'two-phase'.")
    if precondition is not None and axes.each_val:
        raise ValueError("precondition takes one validation gradient; it cannot serve an out with the axis 'val'.")
    train, val = plain(train), plain(val)
    n, m = batch_size(train, "train"), batch_size(val, "val")
    why_not = "a precondition needs the whole validation gradient first" if precondition else cannot_join(train, val)
    why_not = "only the train rows have segments" if segments is not None else why_not
    if schedule == "joint" and why_not:
        raise ValueError(f"schedule='joint' cannot serve this call: {why_not}. Use schedule='two-phase' or 'auto'.")
    device = next(iter(call.params.values())).device
    joint = schedule == "joint" or (schedule == "auto" and not why_not and not call.has_aux and m <= n)
    if joint:
        before = RandomState.of(device)
        try:
            return _joint(call, train, val, n, m, axes, reduction, grads, refuse_random=schedule == "auto")
        except DrewRandomNumbers:
            before.restore()
    return _two_phase(call, train, val, n, m, axes, reduction, precondition, grads, _segments(segments, train, n))


def _joint(
    call: _Call, train: Any, val: Any, n: int, m: int, axes: _Axes, reduction: str, grads: bool, refuse_random: bool
) -> tuple[ValueAndGradDot, Any]:
    device = next(iter(call.params.values())).device
    val_weight = 1.0 if axes.each_val or reduction == "sum" else 1.0 / m
    weights = torch.full((n + m,), 1.0 / n if grads else 1.0, dtype=torch.float64, device=device)
    weights[n:] = val_weight
    products = Joint(call.names, n, m, axes.each_val, fuse=not call.lenient)
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
    dots = _arranged(_product_columns(products, result, call.names), axes, n if grads else 1)
    aux = pytree.tree_map_only(Tensor, lambda t: t[:n] if t.dim() and len(t) == n + m else t, result.aux)
    return _values(result, result.losses[:n], result.losses[n:], dots), aux


def _two_phase(
    call: _Call,
    train: Any,
    val: Any,
    n: int,
    m: int,
    axes: _Axes,
    reduction: str,
    precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    grads: bool,
    segments: Segments | None,
) -> tuple[ValueAndGradDot, Any]:
    units = n if segments is None else segments.count + 1
    device = next(iter(call.params.values())).device
    products: Products
    before = RandomState.of(device)  # the train samples draw what a plain step would
    if axes.each_val:
        first = call.run(val, m, train=m, factors=call.names, dropout=False, batches=(("val", m),))
        products = WithSamples(call.names, units, first, m)
    else:
        weights = torch.full((m,), 1.0 / m if reduction == "mean" else 1.0, dtype=torch.float64, device=device)
        first = call.run(val, m, train=m, grads=True, weights=weights, dropout=False, batches=(("val", m),))
        if getattr(precondition, "about_train_gradient", False):
            before.restore()
            return _about_train_gradient(call, first, train, n, axes, precondition, grads, segments)
        direction = first.grads if precondition is None else precondition(first.grads)
        products = Along(call.names, units, _one_direction(direction, call), 1)
    before.restore()
    weights = torch.full((n,), 1.0 / n if grads else 1.0, dtype=torch.float64, device=device)
    result = call.contracted(
        products, train, n, train=units, grads=grads, weights=weights, batches=(("train", n),), segments=segments
    )
    columns = _product_columns(products, result, call.names)
    if segments is not None:
        columns = {name: dots[: segments.count] for name, dots in columns.items()}
    dots = _arranged(columns, axes, n if grads else 1)
    return _values(result, result.losses, first.losses, dots), result.aux


def _about_train_gradient(
    call: _Call,
    first: Run,
    train: Any,
    n: int,
    axes: _Axes,
    precondition: Any,
    grads: bool,
    segments: Segments | None,
) -> tuple[ValueAndGradDot, Any]:
    """The direction depends on the mean train gradient: one run of the train rows, its factors kept until it is known."""
    units = n if segments is None else segments.count + 1
    device = next(iter(call.params.values())).device
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64, device=device)
    result = call.run(
        train,
        n,
        train=units,
        grads=True,
        weights=weights,
        factors=call.names,
        batches=(("train", n),),
        segments=segments,
    )
    direction = _one_direction(precondition(first.grads, result.grads), call)
    columns = _product_columns(Along(call.names, units, direction, 1), result, call.names)
    if segments is not None:
        columns = {name: dots[: segments.count] for name, dots in columns.items()}
    if not grads:
        result.grads = {}
    return _values(result, result.losses, first.losses, _arranged(columns, axes, n)), result.aux


def _values(result: Run, losses: Tensor, val_losses: Tensor, dots: Dots) -> ValueAndGradDot:
    values = ValueAndGradDot(losses, val_losses, result.grads, dots)
    values.unused = result.unused
    return values


def _one_direction(direction: Params, call: _Call) -> dict[str, Tensor]:
    """The direction of each parameter that is asked for, `[1, *shape]`, checked."""
    missing = sorted(call.names - set(direction))
    if missing:
        raise ValueError(
            f"direction: no entry for {', '.join(missing)}; it must have an entry for each parameter in play."
        )
    unknown = sorted(set(direction) - set(call.params))
    if unknown:
        raise ValueError(f"direction: {', '.join(unknown)} are not parameters; these are {', '.join(call.params)}.")
    for name in call.names:
        given, expected = direction[name].shape, call.params[name].shape
        if given != expected:
            raise ValueError(f"direction[{name!r}] has shape {tuple(given)}; the parameter has {tuple(expected)}.")
    with unrecorded():
        return {name: direction[name].to(call.dtype).unsqueeze(0) for name in call.names}


@one_node
def ghost_grad_dot(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    out: str = "train",
    reduction: str = "mean",
    precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    schedule: str = "auto",
    dtype: torch.dtype | None = None,
    layers: str | Callable[[str], bool] = "",
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
        out: the axes of the result: "train" `[n]`; "param train" a dict of `[n]`, which sum to "train"; "train val"
            `[n, m]`, the dot product with each validation sample; "param train val" a dict of `[n, m]`.
        reduction: "mean" or "sum" over the validation samples.
        precondition: a function of the validation gradient (a dict like `params`) that gives the direction used.
        schedule: "joint": train and validation rows in one forward and backward; "two-phase": the validation gradient
            first; "auto": joint where the batches allow it and nothing random is drawn.
        dtype: the dtype of contractions; by default float32, float64 for float64 parameters.
        layers: restricts the dot products to parameters whose names match: comma-separated parts, matched at dots, or
            a function of the name.
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
    call = _checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    values, aux = _dots(
        call,
        train,
        val,
        out=out,
        reduction=reduction,
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
    precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    schedule: str = "auto",
    dtype: torch.dtype | None = None,
    layers: str | Callable[[str], bool] = "",
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
    call = _checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    values, aux = _dots(
        call,
        train,
        val,
        out=out,
        reduction=reduction,
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
    layers: str | Callable[[str], bool] = "",
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
        out: "sample" (or "train") `[B]`, or "param sample", a dict of `[B]`.
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
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
    call = _checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    axes = _axes(out, ("param", "train"))
    batch = plain(batch)
    samples = batch_size(batch, "given")
    of = _segments(segments, batch, samples)
    units = samples if of is None else of.count + 1
    products = Along(call.names, units, _one_direction(direction, call), 1)
    result = call.contracted(products, batch, samples, train=units, segments=of)
    columns = _product_columns(products, result, call.names)
    dots = _arranged(columns if of is None else {k: d[: of.count] for k, d in columns.items()}, axes, 1)
    return (dots, result.aux) if has_aux else dots


def ghost_factors(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    *,
    dtype: torch.dtype | None = None,
    layers: str | Callable[[str], bool] = "",
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
    call = _checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    batch = plain(batch)
    samples = batch_size(batch, "given")
    of = _segments(segments, batch, samples)
    units = samples if of is None else of.count + 1
    result = call.run(batch, samples, train=units, factors=call.names, segments=of)
    count = samples if of is None else of.count
    with unrecorded():
        factors: dict[str, list[Factor]] = {
            name: [base_factor(result, s, result.factors[s].part(0, count), name) for s in result.sites(name)]
            for name in call.params
            if name in call.names
        }
    return (result.losses, factors, result.aux) if has_aux else (result.losses, factors)
