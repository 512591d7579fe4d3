"""Second order: what a training step does to the validation loss, sample by sample, curvature included.

    L(theta - lr U) = L - lr <V, U> + 1/2 lr^2 U^T H U + ...,   U = 1/n sum_i g_i for plain gradient descent

V and H are the gradient and the Hessian of the mean validation loss. The quadratic is a game of n players, and its
Shapley values are (Wang et al., 2024, arXiv 2406.11011, section 4, with the sign of a decrease)

    value_i = lr/n <g_i, V> - 1/2 (lr/n)^2 g_i^T H sum_j g_j

One run of the train rows keeps their factors; U is known after it, then H U, and the factors are contracted with both
directions at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Call, Layers, Params, checked, one_direction, product_columns
from ghostfunc._curvature import Curvature, curvature
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import unrecorded
from ghostfunc._products import Along
from ghostfunc._ranks import Group, Ranks
from ghostfunc._run_result import Run
from ghostfunc._sharded import group_of, is_sharded
from ghostfunc._transforms import value_and_grad_dot

Direction = dict[str, Tensor]
Precondition = Callable[..., Direction]


class _Values(NamedTuple):
    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    first: Tensor
    second: Tensor
    values: Tensor


class InRunValues(_Values):
    """What `in_run_values` returns: the tuple of its first six attributes, and `unused` beside it.

    Attributes:
        losses: `[n]`, of the train samples.
        val_losses: `[m]`, of the validation samples.
        grads: the gradient of the mean train loss, by name.
        first: `[n]`, first-order values.
        second: `[n]`, second-order terms; zeros for order=1.
        values: `[n]`, `first + second`.
        unused: names of parameters that the train losses do not depend on; their gradients are zero.
    """

    unused: tuple[str, ...] = ()


class _Terms(NamedTuple):
    train: Run
    val: Curvature
    first: Tensor  # [n]: <g_i, P V>
    second: Tensor  # [n]: <P g_i, H (2U - P mean_j g_j)>
    all_n: int  # train samples of all ranks


def ghost_grad_hess_grad(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    precondition: Precondition | None = None,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Any:
    """Interaction of each train sample with the whole step through the validation loss's curvature.

    h[i] = g_i^T H sum_j g_j: g_i the gradient of train sample i, the sum over all n train samples (i included), H the
    Hessian of the mean validation loss. In a step of plain gradient descent on the mean train loss, the second-order
    part of sample i's value is -1/2 (lr/n)^2 h[i] (In-Run Data Shapley, section 4.2). Positive lowers the value: the
    sample moves along with the step in a direction in which the validation loss curves upward.

    The factors of the train rows stay in memory until the Hessian-vector product is known, as in `ghost_factors`.
    Attention of the validation rows runs in its math kernel, whose backward has a derivative.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`.
        precondition: P, linear and symmetric: a function of a gradient dict (and, if it has `about_train_gradient`, of
            the mean train gradient) that gives the change which the optimizer makes of it, divided by -lr. Then
            h[i] = n (P g_i)^T H (2U - P mean_j g_j), with U = `precondition.update(mean_j g_j)` where that exists (the
            whole change of the parameters, momentum and weight decay included) and U = P mean_j g_j elsewhere, so
            that h[i] = (P g_i)^T H sum_j P g_j. The first form is the same -1/2 (lr/n)^2 h[i] in the Shapley value of
            the game in which every coalition has the part of the step that no sample of this batch makes.
        dtype: as in `ghost_grad_dot`.
        layers: restricts the samples' gradients g_i to matching parameters, while the step and H keep all of them: the
            values of disjoint parts that make up the model add up to the model's.
        has_aux: `model_fn` returns `(losses, aux)`, and the result is `(h, aux)` with the train batch's aux.
        on_unsupported: as in `ghost_grad_dot`, for the train rows.
        randomness: as in `ghost_grad_dot`. Dropout is off for the validation samples.
        group: as in `ghost_grad_dot`: the sum, n and H are over all ranks' samples.

    Returns:
        `[n]`; with `has_aux`, `(h, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        RuntimeError: if the validation loss cannot be differentiated twice, with the reasons.
        ValueError: for batches, losses, layers or directions that do not fit.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> gf.ghost_grad_hess_grad(model_fn, params, train, val).shape
        torch.Size([5])
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group)
    terms = _terms(call, train, val, precondition)
    h = terms.second * terms.all_n
    return (h, terms.train.aux) if has_aux else h


def in_run_values(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    lr: float | Tensor,
    order: int = 2,
    precondition: Precondition | None = None,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Any:
    """In-Run Data Shapley values of one training step: the decrease of the validation loss that each sample makes.

    With P the precondition (the identity for plain gradient descent), V and H the gradient and Hessian of the mean
    validation loss, for a step theta - lr P mean_j g_j of n samples:

        first_i  =  lr/n <g_i, P V>
        second_i = -1/2 (lr/n)^2 g_i^T P H P sum_j g_j
        values   =  first + second

    in the unit of the validation loss. Positive is helpful. The sums over i estimate the whole step's decrease of the
    mean validation loss, to first and to second order; for a quadratic validation loss the second is exact. (Wang et
    al., 2024, arXiv 2406.11011, section 4.) With `precondition.update`, the sum of values is what the batch adds to
    the part of the step that is made without it (momentum, weight decay); see `ghost_grad_hess_grad`.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters before the step, by name.
        train: a pytree of tensors `[n, ...]`; the step is on the mean of their losses.
        val: a pytree of tensors `[m, ...]`.
        lr: the step's learning rate, a number or a 0-dimensional tensor.
        order: 1 (no Hessian, and the dot products' cost) or 2.
        precondition: as in `ghost_grad_hess_grad`.
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_hess_grad`; `grads` has every parameter.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`: the step is on the mean over all ranks' train samples, n of them in all.

    Returns:
        `InRunValues(losses[n], val_losses[m], grads, first[n], second[n], values[n])`; with `has_aux`,
        `(InRunValues, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        RuntimeError: as in `ghost_grad_hess_grad`.
        TypeError: if lr is a tensor with dimensions.
        ValueError: as in `ghost_grad_hess_grad`, for another order, or a learning rate that is not finite.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> result = gf.in_run_values(model_fn, params, train, val, lr=0.01)
        >>> result.values.shape, torch.equal(result.values, result.first + result.second)
        (torch.Size([5]), True)
    """
    _check_lr(lr)
    if order not in (1, 2):
        raise ValueError(f"order={order!r}: expected 1 (dot products) or 2 (the Hessian too).")
    options: dict[str, Any] = {
        "dtype": dtype, "layers": layers, "has_aux": has_aux, "on_unsupported": on_unsupported,
        "randomness": randomness, "group": group,
    }  # fmt: skip
    if order == 1:
        found = value_and_grad_dot(model_fn, params, train, val, precondition=precondition, **options)
        dots, aux = found if has_aux else (found, None)
        ranks = Ranks.of(group_of(params, group), dots.losses.device)
        n = len(dots.losses)
        first = dots.dots * lr / (n if ranks is None else ranks.total(n))
        values = InRunValues(dots.losses, dots.val_losses, dots.grads, first, torch.zeros_like(first), first.clone())
        values.unused = dots.unused
    else:
        call = checked(model_fn, params, **options)
        terms = _terms(call, train, val, precondition)
        aux, n = terms.train.aux, terms.all_n
        first = terms.first * lr / n
        second = -0.5 * lr * lr * terms.second / n
        values = InRunValues(terms.train.losses, terms.val.losses, terms.train.grads, first, second, first + second)
        values.unused = terms.train.unused
    return (values, aux) if has_aux else values


def _check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor):
        if lr.dim():
            raise TypeError(f"lr is a tensor of shape {tuple(lr.shape)}; expected a number or a tensor without dims.")
    elif not math.isfinite(lr):
        raise ValueError(f"lr={lr!r}: the learning rate must be finite.")


def _terms(call: Call, train: Any, val: Any, precondition: Precondition | None) -> _Terms:
    if any(map(is_sharded, call.params.values())):
        raise NotImplementedError(
            "second order with sharded parameters: the Hessian's product is a derivative of the backward, which does "
            "not go through the gathering of shards. Use first order (ghost_grad_dot, in_run_values(order=1)), or "
            "unsharded parameters."
        )
    train, val = plain(train), plain(val)
    with call.together():
        n, m = batch_size(train, "train"), batch_size(val, "val")
    all_n, all_m = call.over_ranks(n), call.over_ranks(m)
    weights = call.weights(n, 1.0 / all_n)
    with call.together():
        result = call.run(train, n, train=n, grads=True, weights=weights, factors=call.names, batches=(("train", n),))
    mean = result.grads = call.sums(result.grads)
    result.unused = call.unused(result.unused)

    def preconditioned(direction: Direction) -> Direction:
        if precondition is None:
            return direction
        about = getattr(precondition, "about_train_gradient", False)
        return precondition(direction, mean) if about else precondition(direction)

    with unrecorded():
        step = preconditioned(mean)
        update = getattr(precondition, "update", None)
        if update is not None:
            step = _twice_without(update(mean), step)
    everywhere = call._replace(names=frozenset(call.params))
    step = {name: u.squeeze(0) for name, u in one_direction(step, everywhere).items()}
    with call.together():
        found = curvature(call.model_fn, call.params, val, m, step, has_aux=call.has_aux, randomness=call.randomness)
    if call.ranks is not None:  # of the mean over this rank's samples
        shares = ({name: t * (m / all_m) for name, t in of.items()} for of in (found.gradient, found.product))
        found = Curvature(found.losses, *(call.sums(share) for share in shares))
    with unrecorded():
        slope = one_direction(preconditioned(found.gradient), call)
        curved = one_direction(preconditioned(found.product), call)
        directions = {name: torch.cat([slope[name], curved[name]]) for name in call.names}
    columns = product_columns(Along(call.names, n, directions, 2), result, call.names)
    first, second = (torch.stack(list(columns.values())).sum(0) * all_n).unbind(1)  # factors are of l_i / n
    return _Terms(result, found, first, second, all_n)


def _twice_without(update: Direction, preconditioned: Direction) -> Direction:
    """2U - P mean_j g_j: half of it meets the samples' own part of the step, all of it the part without them."""
    return {name: 2 * update[name] - own for name, own in preconditioned.items()}
