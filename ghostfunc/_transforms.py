"""The public transforms of dot products and factors: pure functions of `(model_fn, params, batches)`, like `grad`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ghostfunc._axes import LayerOf
from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Layers, Params, checked, one_direction, product_columns, units_of
from ghostfunc._compile import one_node
from ghostfunc._dots import ALL_AXES, BoundedDots, Precondition, ValGradient, asked_of, by_head, dots_of, val_phase
from ghostfunc._factors import Factor
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import unrecorded
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Group
from ghostfunc._run_result import base_factor


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
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    memory: int | float | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
    group: Group | None = None,
) -> Any:
    """Dot products of each train sample's gradient with the validation gradient.

    dots[i] = <grad l_i, mean_j grad l_j>: to first order, a step of plain gradient descent on sample i alone with
    learning rate lr changes the mean validation loss by -lr * dots[i]. Positive is helpful. (In-Run Data Shapley,
    section 4.2, equation of the first-order value.)

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`; or the `ValGradient` of one, where several calls share it.
        out: the axes of the result, any of them in any order: "train" (or "sample") `[n]`, "val" `[m]`, "token" `[R]`
            (positions of the train samples), "head" `[H]`, and "param" or "layer", a dict of tensors. "train val" is
            `[n, m]`, "param train" a dict of `[n]`. An axis that is left out is summed over, but "val" as `reduction`
            says. The entry of a token is the part of its sample's gradient that comes through its position's
            activations and cotangents.
        reduction: "mean" or "sum" over the validation samples.
        precondition: a function of the validation gradient (a dict like `params`) that gives the direction used.
        schedule: "joint": train and validation rows in one forward and backward; "two-phase": the validation gradient
            first; "auto": joint where the batches allow it and nothing random is drawn.
        rank: r, to take in place of the validation gradient of each linear map one of rank r near it, by a randomised
            range finder: the dot products with it cost r (d_in + d_out) for each row where exact ones cost d_in d_out,
            and come with a bound on their error. A weight whose exact dot products cost less has these. Docs:
            `docs/low_rank.md`.
        dtype: the dtype of contractions; by default float32, float64 for float64 parameters.
        memory: what the contraction of a weight may take at a time, beside its factors and its results: bytes (an int),
            or a share of what a plain training step takes (a float). By default what suits the device.
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
        group: the data-parallel process group, or a mesh of one dimension: the batches are this rank's shares (of any
            sizes, none empty), the validation gradient is that of all ranks' samples, and results are about this
            rank's train samples; the axis "val" has all ranks' validation samples, in the order of the ranks. With
            `rank`, directions are the same on all ranks, but one whose exact dot products cost it less takes these. All
            ranks make the call, and what one raises, all raise. (A step of micro-batches: `mean_gradient`.)

    Returns:
        The dot products in the axes of `out`; with `rank`, `BoundedDots(dots, bound)`, where no dot product is further
        from the exact one than its bound; with `has_aux`, `(dots, aux)`.

    Raises:
        UnsupportedUse: if the use of a parameter is not accounted for, or if the samples cannot share what a random
            operation draws (randomness="same").
        InteractingSamples: if a sample's loss depends on other samples.
        RuntimeError: if random numbers are drawn (randomness="error").
        TypeError: for a rank that is no int.
        ValueError: for batches, axes, layers, ranks or schedules that do not fit; for too little memory; for a rank
            with the axes "val", "token" or "head", or with a dtype below float32.

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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group, memory)
    values, aux = dots_of(
        call,
        train,
        val,
        asked_of(out, ALL_AXES, reduction, layer_of, heads, rank, call.dtype),
        precondition=precondition,
        schedule=schedule,
        grads=False,
        segments=segments,
    )
    dots = values.dots if values.bound is None else BoundedDots(values.dots, values.bound)
    return (dots, aux) if has_aux else dots


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
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    memory: int | float | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
    group: Group | None = None,
) -> Any:
    """Losses, the mean training gradient and the dot products of `ghost_grad_dot`, from one forward and backward.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: as in `ghost_grad_dot`; its samples do not enter `grads`.
        out: as in `ghost_grad_dot`.
        reduction: as in `ghost_grad_dot`.
        precondition: as in `ghost_grad_dot`.
        schedule: as in `ghost_grad_dot`. With dropout active, "auto" takes "two-phase": train samples draw what a plain
            step would, validation samples run without dropout.
        rank: as in `ghost_grad_dot`; the bound is the result's `.bound`, and `grads` are exact.
        dtype: as in `ghost_grad_dot`.
        memory: as in `ghost_grad_dot`.
        layers: restricts the dot products; `grads` has every parameter.
        layer_of: as in `ghost_grad_dot`.
        heads: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`; `grads` is the gradient of the mean over all ranks' train samples, the same on
            every rank.

    Returns:
        `ValueAndGradDot(losses[n], val_losses[m], grads, dots)`; `grads` is what `torch.func.grad` of the mean train
        loss gives, `.unused` names the parameters that the train losses do not depend on, and with `rank` `.bound` has
        the axes of the dots. With `has_aux`, `(ValueAndGradDot, aux)`.

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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group, memory)
    values, aux = dots_of(
        call,
        train,
        val,
        asked_of(out, ALL_AXES, reduction, layer_of, heads, rank, call.dtype),
        precondition=precondition,
        schedule=schedule,
        grads=True,
        segments=segments,
    )
    return (values, aux) if has_aux else values


@one_node
def val_gradient(
    model_fn: ModelFn,
    params: Params,
    val: Any,
    *,
    reduction: str = "mean",
    precondition: Precondition | None = None,
    dtype: torch.dtype | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> ValGradient:
    """The validation gradient, once for many calls: pass it to `ghost_grad_dot` or `value_and_grad_dot` in val's place.

    Where several micro-batches meet the same parameters, the validation samples are run once instead of with each:
    k micro-batches of n train samples then cost k·n + m samples, and not k·(n + m). It is also how a validation set is
    used that is too large for one batch: add up the gradients of its parts, and divide by its size.

    Args:
        model_fn: as in `ghost_grad_dot`.
        params: as in `ghost_grad_dot`.
        val: a pytree of tensors `[m, ...]`; run without dropout.
        reduction: over the samples: "mean", or "sum".
        precondition: as in `ghost_grad_dot`, applied here; one that needs the train gradient too cannot be.
        dtype: as in `ghost_grad_dot`.
        has_aux: whether `model_fn` returns `(losses, aux)`; the auxiliary output is dropped.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`: the gradient is over all ranks' samples.

    Returns:
        `ValGradient(losses[m], direction)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for a reduction or a precondition that does not fit.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> val = gf.val_gradient(model_fn, params, (torch.randn(2, 4), torch.tensor([2, 0])))
        >>> micro = [tuple(t[k : k + 2] for t in batch) for k in (0, 2, 4)]
        >>> [gf.ghost_grad_dot(model_fn, params, b, val).shape for b in micro]
        [torch.Size([2]), torch.Size([2]), torch.Size([2])]
    """
    call = checked(model_fn, params, dtype, "", has_aux, on_unsupported, randomness, group)
    asked = asked_of("train", ("train",), reduction, "", None, None, call.dtype)
    if getattr(precondition, "about_train_gradient", False):
        raise ValueError("this precondition needs the train gradient too: pass it to value_and_grad_dot, with val.")
    val = plain(val)
    before = RandomState.of(call.device)
    with call.together():
        m = batch_size(val, "val")
    found = val_phase(call, val, m, asked.val_weight(call.over_ranks(m)))
    before.restore()  # train samples draw what they would without this call
    return found if precondition is None else found._replace(direction=precondition(found.direction))


@one_node
def ghost_grad_along(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    direction: Params,
    *,
    out: str = "sample",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    memory: int | float | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    heads: Mapping[str, str] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
    group: Group | None = None,
) -> Any:
    """Dot products of each sample's gradient with a direction: d[b] = <grad l_b, direction>.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        direction: a dict like `params`.
        out: as in `ghost_grad_dot`, without "val": "sample" `[B]`, "param sample" a dict of `[B]`, ...
        rank: as in `ghost_grad_dot`.
        dtype: as in `ghost_grad_dot`.
        memory: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        layer_of: as in `ghost_grad_dot`.
        heads: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`: nothing is summed over ranks here, and what one rank raises, all raise.

    Returns:
        `[B]`, or a dict of them; with `rank`, `BoundedDots(dots, bound)`; with `has_aux`, `(dots, aux)`.

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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group, memory)
    available = tuple(axis for axis in ALL_AXES if axis != "val")
    asked = asked_of(out, available, "sum", layer_of, heads, rank, call.dtype)
    batch = plain(batch)
    with call.together():
        samples = batch_size(batch, "given")
        units = units_of(batch, samples, segments, token=asked.axes.has("token"))
        products = asked.along(call, units.runs, one_direction(direction, call))
        how = {"train": units.runs, "segments": units.segments}
        if asked.by_head:
            result = call.run(batch, samples, factors=call.names, **how)
            columns = by_head(call, products, result, units, asked)
        else:
            result = call.contracted(products, batch, samples, **how)
            columns = product_columns(products, result, call.names)
    dots, bound = asked.arranged(columns, units, 1), asked.bound(products, result, call.names, units, 1)
    dots = dots if bound is None else BoundedDots(dots, bound)
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
    group: Group | None = None,
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
        group: as in `ghost_grad_along`.

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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group)
    batch = plain(batch)
    with call.together(), unrecorded():
        samples = batch_size(batch, "given")
        units = units_of(batch, samples, segments, token=False)
        result = call.run(batch, samples, train=units.runs, factors=call.names, segments=units.segments)
        factors: dict[str, list[Factor]] = {
            name: [base_factor(result, s, result.factors[s].part(0, units.count), name) for s in result.sites(name)]
            for name in call.params
            if name in call.names
        }
    return (result.losses, factors, result.aux) if has_aux else (result.losses, factors)
