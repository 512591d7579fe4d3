"""Any set of quantities of per-sample gradients, and the mean gradient, from one forward and one backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._accumulate import Accumulator, Setting
from ghostfunc._axes import Axes, match_layers, parse
from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Call, Layers, Params, Units, checked
from ghostfunc._compile import one_node
from ghostfunc._contraction import Contraction, collected
from ghostfunc._dots import asked_of, dots_of
from ghostfunc._functionalize import ModelFn
from ghostfunc._graph_ops import norms_not_finite
from ghostfunc._nesting import readable, recorded
from ghostfunc._quantities import Clip, Gram, Norms, Project, Quantity, Stream
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Group
from ghostfunc._run_result import Run


@dataclass(eq=False)
class Quantities:
    """What `ghost_quantities` returns; `result["name"]` is a quantity.

    Attributes:
        losses: `[n]`, of the train samples.
        val_losses: `[m]`, of the validation samples; None without any.
        grads: the gradient of the mean train loss, by name; empty unless wanted.
        values: the quantities by the names that they were asked for under.
        unused: names of parameters that the train losses do not depend on, where gradients were wanted.
        aux: the auxiliary output of `model_fn`, with `has_aux`.
    """

    losses: Tensor
    val_losses: Tensor | None
    grads: dict[str, Tensor]
    values: dict[str, Any]
    unused: tuple[str, ...] = ()
    aux: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


@one_node
def ghost_quantities(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any = None,
    *,
    want: Mapping[str, Quantity],
    grads: bool = True,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Quantities:
    """Any set of quantities of per-sample gradients, and the mean training gradient, from one forward and backward.

    The weight gradient of a linear map is a sum over samples; making it one sample at a time, in tiles, costs the same
    products, and every quantity is a pass over a tile that is there.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; all of them are differentiated.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`, where a quantity needs it.
        want: the quantities by names of your choice: `Dot`, `Along`, `Gram`, `Norm`, `Project`, `Clip`, `Stream`.
        grads: whether the mean training gradient is wanted.
        dtype: as in `ghost_grad_dot`.
        layers: restricts the quantities, not the gradient, as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`; the output is at `.aux`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`: the mean gradient, the validation gradient and the sum of clipped gradients are
            over all ranks' samples; the columns of a `Gram` and the axis "val" of a `Dot` are all ranks' samples, in
            the order of the ranks; a `Stream` is of this rank's. The samples of other ranks are run on this one too:
            a `Gram` costs a call of `ghost_grad_gram` beside this one.

    Returns:
        `Quantities`: `.losses[n]`, `.val_losses[m]`, `.grads` (of the mean train loss) and `result[name]`. Every
        quantity is about the gradients of the samples' own losses, not divided by n.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for batches, axes or layers that do not fit, a `Dot` without validation samples, or a `Clip` of
            gradients that are not finite.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "gram": gf.Gram(), "norms": gf.Norm()}
        >>> result = gf.ghost_quantities(model_fn, params, train, val, want=want)
        >>> result["dots"].shape, result["matrix"].shape, result["gram"].shape, result.grads["weight"].shape
        (torch.Size([5]), torch.Size([5, 2]), torch.Size([5, 5]), torch.Size([3, 4]))
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group)
    train, val = plain(train), plain(val)
    with call.together():
        n = batch_size(train, "train")
    names = tuple(name for name in call.params if name in call.names)
    for name, quantity in want.items():
        if not isinstance(quantity, Quantity):
            raise TypeError(
                f"want[{name!r}] is a {type(quantity).__name__}; expected Dot, Along, Gram, Norm, Project, Clip or "
                "Stream."
            )
    projections = {name: quantity for name, quantity in want.items() if isinstance(quantity, Project)}
    clips = {name: _groups(quantity.max_norm, names) for name, quantity in want.items() if isinstance(quantity, Clip)}
    grams = {name: quantity for name, quantity in want.items() if isinstance(quantity, Gram) and call.ranks is not None}
    if len(projections) > 1:
        raise ValueError(f"want has {len(projections)} projections ({', '.join(projections)}); one call makes one.")
    started: dict[str, Accumulator] = {}
    squares: list[Norms] = []

    def start(setting: Setting) -> list[Accumulator]:
        for name, quantity in want.items():
            if name not in grams and not isinstance(quantity, Project | Clip):
                started[name] = quantity.start(setting)
        if clips:
            squares.append(Norms(setting, "", Axes("", ("train",), "")))
        return [*started.values(), *squares]

    before = RandomState.of(call.device) if grams else None
    projection = next((quantity.projection for quantity in projections.values()), None)
    # What is no power of the gradient must see it as it is: its mean is made behind the run.
    mean = grads and not clips and not projections and not any(isinstance(q, Stream) for q in want.values())
    contraction, result, losses, val_losses = collected(
        call, train, val, Units(n, n, None), start, grads=grads, fuse=not clips, projection=projection, mean=mean
    )
    values: dict[str, Any] = {}
    for name in want:
        if before is not None and name in grams:
            before.restore()  # the train samples draw what they drew
            values[name] = _gram_of_all_ranks(call, train, grams[name])
        elif name in projections:
            values[name] = contraction.projections(result)
        elif name in clips:
            with call.together():
                clipped = _clipped(contraction, result, squares[0], clips[name], losses)
            values[name] = ClippedGrad(call.sums(clipped.grads), clipped.norms)
            values[name].losses = losses
        else:
            values[name] = started[name].value()
    all_n = 1 if mean else call.over_ranks(n)
    means = result.grads if all_n == 1 else {name: grad / all_n for name, grad in result.grads.items()}
    aux = pytree.tree_map_only(Tensor, lambda t: t[:n] if t.dim() and len(t) > n else t, result.aux)
    return Quantities(losses, val_losses, means, values, result.unused, aux)


def _gram_of_all_ranks(call: Call, train: Any, gram: Gram) -> Any:
    """Dot products of this rank's train samples with those of all ranks, `[n, all ranks' n]`: a call of its own."""
    parse(gram.out, ("param", "layer", "train", "other"))
    out = gram.out.replace("other", "val")
    asked = asked_of(out, ("param", "layer", "train", "val"), "sum", gram.layer_of, None, None, call.dtype)
    how = {"precondition": None, "schedule": "two-phase", "grads": False, "segments": None}
    return dots_of(call, train, train, asked, **how)[0].dots


# ---------------------------------------------------------------- clipping


def _groups(max_norm: float | int | Mapping[str, float], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """`{group: {parameter: its group's norm}}`, checked; one group "" for one norm."""
    if not isinstance(max_norm, Mapping):
        max_norm = {"": float(max_norm)}
    if not max_norm:
        raise ValueError("max_norm={}: expected a number, or one for each group of parameters, {pattern: number}.")
    groups: dict[str, dict[str, float]] = {}
    for pattern, norm in max_norm.items():
        if not 0 < norm < float("inf"):
            raise ValueError(f"max_norm={norm!r}{f' for {pattern!r}' if pattern else ''}: expected a number above 0.")
        groups[pattern] = dict.fromkeys(sorted(match_layers(pattern, list(names))), float(norm))
    for name in names:
        of = [pattern for pattern, members in groups.items() if name in members]
        if len(of) != 1:
            raise ValueError(
                f"max_norm: the parameter {name} is in {len(of)} groups ({', '.join(map(repr, of))}); every parameter "
                f"needs one of {', '.join(map(repr, groups))}."
            )
    return groups


class _ClippedGrad(NamedTuple):
    grads: dict[str, Tensor]
    norms: Any


class ClippedGrad(_ClippedGrad):
    """What `ghost_clipped_grad` returns: the tuple `(grads, norms)`, and the losses beside it.

    Attributes:
        grads: the sum of the clipped per-sample gradients, by name.
        norms: `[B]`, the norms before clipping; a dict of them by group where there are several thresholds.
        losses: `[B]`.
    """

    losses: Tensor


def _clipped(
    contraction: Contraction, result: Run, norms: Norms, groups: dict[str, dict[str, float]], losses: Tensor
) -> ClippedGrad:
    weights: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for group, members in groups.items():
        square = torch.stack([norms.columns[name] for name in members]).sum(0)
        norm = square.clamp(min=0).sqrt()
        if recorded(norm):  # the same check, when the compiled graph runs
            norm = torch.ops.ghostfunc.finite(norm, norm, [], [])
        elif readable(norm) and not bool(norm.isfinite().all()):
            raise ValueError(norms_not_finite(norm))
        limit = next(iter(members.values()))
        weight = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
        found[group] = norm
        weights |= dict.fromkeys(members, weight)
    clipped = ClippedGrad(contraction.weighted(result, weights), found[""] if list(found) == [""] else found)
    clipped.losses = losses
    return clipped
