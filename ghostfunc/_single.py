"""Calls of one quantity each: norms, the Gram matrix, clipped sums, and streams of tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ghostfunc._accumulate import Accumulator, Setting
from ghostfunc._axes import LayerOf, parse
from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Layers, Params, checked, units_of
from ghostfunc._compile import one_node
from ghostfunc._contraction import collected
from ghostfunc._functionalize import ModelFn
from ghostfunc._many import ghost_quantities
from ghostfunc._quantities import Clip, Gram, Norms, Stream
from ghostfunc._ranks import Group
from ghostfunc._sharded import group_of
from ghostfunc._tiles import Tile
from ghostfunc._transforms import ghost_grad_dot


@one_node
def ghost_grad_norm(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    *,
    out: str = "sample",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
    group: Group | None = None,
) -> Any:
    """Norms of each sample's gradient: |grad l_b|.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        out: axes: "sample" (or "train") `[B]`; "token", `[B, R]`, the norm of each position's own contribution to its
            sample's gradient (these do not add up: contributions point in different directions); with "param" or
            "layer", a dict of the norms of these parts of the gradient, whose squares add up to the whole's.
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        layer_of: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`.
        group: as in `ghost_grad_along`.

    Returns:
        The norms; with `has_aux`, `(norms, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for axes, layers or segments that do not fit.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> gf.ghost_grad_norm(model_fn, params, batch).shape
        torch.Size([5])
        >>> gf.ghost_grad_norm(model_fn, params, batch, out="param sample")["bias"].shape
        torch.Size([5])
    """
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness, group)
    axes = parse(out, ("param", "layer", "train", "token"))
    if "train" not in axes.tensor:  # a norm is of one sample's gradient
        if "token" not in axes.tensor:
            raise ValueError(f"out={out!r}: a norm is of a sample or a token; the axes must have one of them.")
        axes = axes._replace(tensor=("train", *axes.tensor))
    batch = plain(batch)
    with call.together():
        units = units_of(batch, batch_size(batch, "given"), segments, token=axes.has("token"))
    found: list[Norms] = []

    def start(setting: Setting) -> list[Accumulator]:
        found.append(Norms(setting, layer_of, axes))
        return list(found)

    _, result, _, _ = collected(call, batch, None, units, start, grads=False, fuse=True)
    (norms,) = found
    norms.columns, norms.has = units.own(norms.columns), units.axes
    return (norms.value(), result.aux) if has_aux else norms.value()


@one_node
def ghost_grad_gram(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    other: Any = None,
    *,
    out: str = "sample other",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    layer_of: LayerOf = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Any:
    """Dot products of every two samples' gradients: K[i, j] = <grad l_i, grad l_j>.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        other: a pytree of tensors `[B', ...]`, whose samples are the columns; by default the batch's own.
        out: axes: "sample other", and "param" or "layer" for a dict of the shares, which add up.
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        layer_of: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`: the columns are all ranks' samples, in the order of the ranks.

    Returns:
        `[B, B]`, symmetric with the squared norms on its diagonal, or `[B, B']`; with `has_aux`, `(K, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for axes or layers that do not fit.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> gf.ghost_grad_gram(model_fn, params, batch).shape
        torch.Size([5, 5])
    """
    group = group_of(params, group)
    if other is not None or group is not None:
        other = batch if other is None else other
        parse(out, ("param", "layer", "train", "other"))
        dots = out.replace("other", "val")
        return ghost_grad_dot(
            model_fn, params, batch, other, out=dots, reduction="sum", dtype=dtype, layers=layers, layer_of=layer_of,
            has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness, group=group,
        )  # fmt: skip
    result = ghost_quantities(
        model_fn, params, batch, want={"gram": Gram(out, layer_of)}, grads=False, dtype=dtype, layers=layers,
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness,
    )  # fmt: skip
    return (result["gram"], result.aux) if has_aux else result["gram"]


@one_node
def ghost_clipped_grad(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    max_norm: float | int | Mapping[str, float],
    *,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Any:
    """The sum of per-sample gradients, each clipped to a norm: sum_b min(1, C / |grad l_b|) grad l_b.

    One forward and one backward: the factors of every weight are kept until the norms are known, and then summed with
    the clipping weights, so that no gradient is computed a second time and none of a single sample is built.
    (Book-keeping, Bu et al., 2023, arXiv 2210.00038.) No noise is added.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        max_norm: C, above 0; or one for each of several groups of parameters, `{pattern: C}` with patterns as in
            `layers=`: every parameter in one group, each group clipped by its own norm.
        dtype: as in `ghost_grad_dot`.
        layers: the parameters that are clipped and returned, as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_dot`; the sum is over all ranks' samples, the norms are of this rank's.

    Returns:
        `ClippedGrad(grads, norms)`: the sum by name (divide by the batch size that you account for), and the norms
        `[B]` before clipping, or a dict of them by group; `.losses` `[B]` beside. With `has_aux`, `(ClippedGrad, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for a `max_norm` that is not above 0, groups that miss a parameter or share one, or gradients that
            are not finite.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> grads, norms = gf.ghost_clipped_grad(model_fn, params, batch, max_norm=0.1)
        >>> grads["weight"].shape, norms.shape
        (torch.Size([3, 4]), torch.Size([5]))
    """
    result = ghost_quantities(
        model_fn, params, batch, want={"clipped": Clip(max_norm)}, grads=False, dtype=dtype, layers=layers,
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness, group=group,
    )  # fmt: skip
    return (result["clipped"], result.aux) if has_aux else result["clipped"]


@one_node
def ghost_grad_stream(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    function: Callable[[Tile], Any],
    *,
    out: str = "",
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> Any:
    """A function of your own on per-sample gradients, a tile of one weight at a time, accumulated over all of them.

    For what no other call gives: the gradient noise scale, sign agreement, a sketch, second moments per entry. Memory
    is that of a tile, about 16 MB, not B times the parameters.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        function: `function(tile) -> tensor or pytree of tensors`. `tile.grads` `[B, rows, cols]` are the samples' own
            gradients of some rows of the parameter `tile.name` (a vector is one row, a convolution's kernel has
            `d_in * kh * kw` columns); `tile.of(tensor)` are the same entries of a tensor like the parameter. The
            memory of `tile.grads` is used again.
        out: what becomes of the results. "": their sum over all tiles. "param": `{name: sum over its tiles}`. "entry":
            `[rows, cols]` for each tile, put in their places: a dict like `params`.
        dtype: as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        group: as in `ghost_grad_along`: what becomes of the ranks' results, which need not be sums, is for you to say.

    Returns:
        The sums, or the tensors; with `has_aux`, `(result, aux)`. A parameter that the losses do not depend on has no
        tile (and zeros with out="entry").

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: if with out="entry" a result does not have the tile's entries.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> second = gf.ghost_grad_stream(model_fn, params, batch, lambda t: t.grads.square().mean(0), out="entry")
        >>> second["weight"].shape
        torch.Size([3, 4])
    """
    result = ghost_quantities(
        model_fn, params, batch, want={"stream": Stream(function, out)}, grads=False, dtype=dtype, layers=layers,
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness, group=group,
    )  # fmt: skip
    return (result["stream"], result.aux) if has_aux else result["stream"]
