"""Any set of quantities of per-sample gradients from one forward and one backward.

Inside the backward each weight's factors are contracted for all quantities together, and let go. A weight whose uses
are not all known there (a tied head and embedding), and every weight where gradients are clipped (the norm of the whole
gradient is known at the end), keep their factors until the backward has run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axes import Axes, LayerOf, match_layers, parse
from ghostfunc._batch import batch_size, cannot_join, join, plain
from ghostfunc._call import Call, Layers, Params, Units, checked, units_of
from ghostfunc._contract import scaled, total
from ghostfunc._factors import Factor
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import unrecorded
from ghostfunc._products import meet, same
from ghostfunc._projection import TAP, Projected
from ghostfunc._quantities import Accumulator, Clip, Dots, Gram, Norms, Project, Quantity, Setting, Stream, accumulate
from ghostfunc._randomness import DrewRandomNumbers, RandomState
from ghostfunc._run import Run
from ghostfunc._sites import Site
from ghostfunc._tiles import Block, Tile, blocks_of
from ghostfunc._transforms import ghost_grad_dot


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


@dataclass(eq=False)
class _Contraction:
    """Contracts what can be inside the backward of the train samples, and the rest behind it.

    Attributes:
        call: the shared arguments.
        train: units of the train batch.
        val: validation samples that follow them in the same run.
        accumulators: quantities that are summed up weight by weight.
        projected: the projection that is wanted.
        val_run: the run of the validation samples, where it is another.
        fuse: whether anything is contracted inside the backward.
    """

    call: Call
    train: int
    val: int
    accumulators: list[Accumulator]
    projected: Projected | None = None
    val_run: Run | None = None
    fuse: bool = True

    def more_taps(self, site: Site) -> dict[str, Tensor]:
        """A tap for the projection."""
        return {} if self.projected is None or not self.fuse else self.projected.more_taps(site)

    def plan(self, sites: list[Site]) -> None:
        """Fuse every linear map whose weight, or part of one, has no other use."""
        by_name: dict[str, list[Site]] = {}
        for site in sites:
            for name in site.tracked.names:
                by_name.setdefault(name, []).append(site)
        for site in sites:
            others = [s for s in by_name[site.tracked.names[0]] if s is not site and meet(s, site)]
            block = self._alone(site) if self.fuse and site.kind == "outer" and not others else None
            if block is not None and site.tracked.root is not None:
                site.treatment = "fused"
                site.contract = partial(self._contract, site, block)

    def _alone(self, site: Site) -> Callable[[Factor], Block] | None:
        """How the block of a site that meets no other is made of its factor."""
        (name, *others), tracked = site.tracked.names, site.tracked
        part = None if tracked.derivation is None else tracked.part
        if others or (tracked.derivation is not None and part is None):
            return None
        vals: tuple[Factor, ...] = ()
        if self.val_run is not None:
            theirs = [s for s in self.val_run.sites(name) if meet(s, site)]
            if not all(same(s, site) for s in theirs):
                return None
            vals = tuple(self.val_run.factors[s] for s in theirs)

        def block(factor: Factor) -> Block:
            val = (factor.part(self.train, self.train + self.val),) if self.val else vals
            return Block(name, tuple(tracked.real.shape), part, (factor.part(0, self.train),), val)

        return block

    def _contract(
        self, site: Site, block: Callable[[Factor], Block], factor: Factor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        grad = accumulate(block(factor), self.accumulators, want_grad=site.wants_grad)
        values: dict[str, Tensor] = {}
        if self.projected is not None and TAP in site.taps:
            values[TAP] = self.projected.project(site, factor)
        return None if grad is None else grad.view(site.tracked.real.shape), values

    def finish(self, result: Run) -> None:
        """Contract the factors that were kept."""
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            for name in self.call.params:
                if name in self.call.names:
                    for block in blocks_of(result, name, self.train, self.val, self.val_run):
                        accumulate(block, self.accumulators, want_grad=False)

    def projections(self, result: Run) -> Tensor:
        """The projections `[n, k]`."""
        assert self.projected is not None
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            columns = [self.projected.products(result, name) for name in self.projected.projection.parts]
        return torch.cat(columns, 1)[: self.train]

    def weighted(self, result: Run, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the train samples' gradients, with weights `[n]` for each parameter."""
        sums: dict[str, Tensor] = {}
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            for name, leaf in result.leaves.items():
                if name not in self.call.names:
                    continue
                gradient = torch.zeros_like(leaf)
                for site in result.sites(name):
                    shape = site.tracked.real.shape
                    here = total(scaled(result.factors[site].part(0, self.train), weights[name]), shape)
                    gradient = gradient + result.pull(site.tracked, name, here.unsqueeze(0))[0].to(leaf.dtype)
                sums[name] = gradient
        return sums


def _collected(
    call: Call,
    train: Any,
    val: Any,
    units: Units,
    start: Callable[[Setting], list[Accumulator]],
    *,
    grads: bool,
    fuse: bool,
    projection: Any = None,
) -> tuple[_Contraction, Run, Tensor, Tensor | None]:
    """Run the batches and accumulate: `(contraction, run, losses, val_losses)`. Sums over train samples are plain."""
    n = batch_size(train, "train" if val is not None else "given")
    m = 0 if val is None else batch_size(val, "val")
    names = tuple(name for name in call.params if name in call.names)
    accumulators = start(Setting(call.params, names, call.dtype, units.runs, m))
    joint = m > 0 and not cannot_join(train, val) and not call.has_aux and m <= n and units.segments is None

    def contraction(val_here: int, val_run: Run | None) -> _Contraction:
        rows = units.runs + val_here
        projected = None
        if projection is not None:
            projected = Projected(call.names, rows, projection, call.dtype, call.device)
        fused = fuse and not call.lenient
        return _Contraction(call, units.runs, val_here, accumulators, projected, val_run, fused)

    def run_of(products: _Contraction, batch: Any, samples: int, **want: Any) -> Run:
        more = {"more_taps": products.more_taps, "plan": products.plan, "segments": units.segments}
        return call.run(batch, samples, train=units.runs, grads=grads, factors=call.names, **more, **want)

    before = RandomState.of(call.device)
    if joint:
        products = contraction(m, None)
        try:
            batches = (("train", n), ("val", m))
            result = run_of(products, join(train, val), n + m, refuse_random=True, batches=batches)
        except DrewRandomNumbers:
            before.restore()
        else:
            products.finish(result)
            return products, result, result.losses[:n], result.losses[n:]
    val_run = val_losses = None
    if m:
        each = any(a.val == "each" for a in accumulators)
        how = {"factors": call.names} if each else {"grads": True}
        first = call.run(val, m, train=m, dropout=False, batches=(("val", m),), **how)
        val_run, val_losses = first if each else None, first.losses
        for a in accumulators:
            if isinstance(a, Dots) and not each:
                a.along(first.grads)
        before.restore()
    products = contraction(0, val_run)
    result = run_of(products, train, n, batches=(("train" if m else "given", n),))
    products.finish(result)
    return products, result, result.losses, val_losses


# ---------------------------------------------------------------- clipping


def _groups(max_norm: float | int | Mapping[str, float], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """`{group: {parameter: its group's norm}}`, checked; one group "" for one norm."""
    if not isinstance(max_norm, Mapping):
        max_norm = {"": float(max_norm)}
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
    contraction: _Contraction, result: Run, norms: Norms, groups: dict[str, dict[str, float]], losses: Tensor
) -> ClippedGrad:
    weights: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for group, members in groups.items():
        square = torch.stack([norms.columns[name] for name in members]).sum(0)
        norm = square.clamp(min=0).sqrt()
        limit = next(iter(members.values()))
        weight = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
        found[group] = norm
        weights |= dict.fromkeys(members, weight)
    clipped = ClippedGrad(contraction.weighted(result, weights), found[""] if list(found) == [""] else found)
    clipped.losses = losses
    return clipped


# ---------------------------------------------------------------- the calls


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

    Returns:
        `Quantities`: `.losses[n]`, `.val_losses[m]`, `.grads` (of the mean train loss) and `result[name]`. Every
        quantity is about the gradients of the samples' own losses, not divided by n.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for batches, axes or layers that do not fit, or a `Dot` without validation samples.

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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    train, val = plain(train), plain(val)
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
    if len(projections) > 1:
        raise ValueError(f"want has {len(projections)} projections ({', '.join(projections)}); one call makes one.")
    started: dict[str, Accumulator] = {}
    squares: list[Norms] = []

    def start(setting: Setting) -> list[Accumulator]:
        for name, quantity in want.items():
            if not isinstance(quantity, Project | Clip):
                started[name] = quantity.start(setting)
        if clips:
            squares.append(Norms(setting, "", Axes("", ("train",), "")))
        return [*started.values(), *squares]

    projection = next((quantity.projection for quantity in projections.values()), None)
    contraction, result, losses, val_losses = _collected(
        call, train, val, Units(n, n, None), start, grads=grads, fuse=not clips, projection=projection
    )
    values: dict[str, Any] = {}
    for name in want:
        if name in projections:
            values[name] = contraction.projections(result)
        elif name in clips:
            values[name] = _clipped(contraction, result, squares[0], clips[name], losses)
        else:
            values[name] = started[name].value()
    means = {name: grad / n for name, grad in result.grads.items()}
    aux = pytree.tree_map_only(Tensor, lambda t: t[:n] if t.dim() and len(t) > n else t, result.aux)
    return Quantities(losses, val_losses, means, values, result.unused, aux)


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
    call = checked(model_fn, params, dtype, layers, has_aux, on_unsupported, randomness)
    axes = parse(out, ("param", "layer", "train", "token"))
    if "train" not in axes.tensor:  # a norm is of one sample's gradient
        if "token" not in axes.tensor:
            raise ValueError(f"out={out!r}: a norm is of a sample or a token; the axes must have one of them.")
        axes = axes._replace(tensor=("train", *axes.tensor))
    batch = plain(batch)
    units = units_of(batch, batch_size(batch, "given"), segments, token=axes.has("token"))
    found: list[Norms] = []

    def start(setting: Setting) -> list[Accumulator]:
        found.append(Norms(setting, layer_of, axes))
        return list(found)

    _, result, _, _ = _collected(call, batch, None, units, start, grads=False, fuse=True)
    (norms,) = found
    norms.columns, norms.has = units.own(norms.columns), units.axes
    return (norms.value(), result.aux) if has_aux else norms.value()


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
    if other is not None:
        parse(out, ("param", "layer", "train", "other"))
        dots = out.replace("other", "val")
        return ghost_grad_dot(
            model_fn, params, batch, other, out=dots, reduction="sum", dtype=dtype, layers=layers, layer_of=layer_of,
            has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness,
        )  # fmt: skip
    result = ghost_quantities(
        model_fn, params, batch, want={"gram": Gram(out, layer_of)}, grads=False, dtype=dtype, layers=layers,
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness,
    )  # fmt: skip
    return (result["gram"], result.aux) if has_aux else result["gram"]


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

    Returns:
        `ClippedGrad(grads, norms)`: the sum by name (divide by the batch size that you account for), and the norms
        `[B]` before clipping, or a dict of them by group; `.losses` `[B]` beside. With `has_aux`, `(ClippedGrad, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: for a `max_norm` that is not above 0, or groups that miss a parameter or share one.

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
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness,
    )  # fmt: skip
    return (result["clipped"], result.aux) if has_aux else result["clipped"]


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
        has_aux=has_aux, on_unsupported=on_unsupported, randomness=randomness,
    )  # fmt: skip
    return (result["stream"], result.aux) if has_aux else result["stream"]
