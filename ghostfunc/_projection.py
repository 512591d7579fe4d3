"""Projections of per-sample gradients, inside the backward: no weight gradient, and nothing that outlives its layer.

An activation a_r is projected where the forward has it, and a_r P_in is what the backward keeps.

    Outer     P_in^T (sum_r a_r g_r^T) P_out  =  sum_r (a_r P_in)^T (g_r P_out)
    Gather    the same, with rows of P_in in place of a_r P_in
    Dense     P_in^T G P_out

A parameter used several times has the sum of its uses' projections, each with the rows of the matrices that belong to
the entries it uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._batch import batch_size, plain
from ghostfunc._blocks import Blocks, Box, place_of
from ghostfunc._call import Call, Params, checked, units_of
from ghostfunc._compile import one_node
from ghostfunc._factors import Dense, Factor, Gather, Later, Outer
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._nesting import functorch_level, unrecorded
from ghostfunc._ranks import Group
from ghostfunc._run_result import Run
from ghostfunc._sites import Site

TAP = "projection"


def project_factor(
    factor: Outer | Gather | Dense, p_rows: Float[Tensor, "p k"], p_cols: Float[Tensor, "q l"]
) -> Float[Tensor, "b k l"]:
    """P_rows^T G_b P_cols of every sample, G_b the gradient `[p, q]` of a weight as it is stored.

    Args:
        factor: B samples.
        p_rows: `[p, k]`: P_in where the rows of the stored weight meet the activation, else P_out.
        p_cols: `[q, l]`: the other.

    Returns:
        `[B, k, l]`.
    """
    if isinstance(factor, Dense):
        matrices = factor.grad.reshape(len(factor.grad), len(p_rows), len(p_cols))
        return (p_rows.t() @ matrices) @ p_cols
    if isinstance(factor, Gather):
        rows, cols = p_rows[factor.ids], factor.g @ p_cols
    else:
        rows, cols = factor.left_product(p_rows), factor.right @ p_cols
    return rows.transpose(1, 2) @ cols


@dataclass(frozen=True, eq=False)
class Projected:
    """The projections of each parameter that a projection is of.

    Attributes:
        names: the parameters.
        units: the number of samples, B.
        projection: the projection.
        dtype: of contractions.
        device: of the parameters.
    """

    names: frozenset[str]
    units: int
    projection: KroneckerProjection
    dtype: torch.dtype
    device: torch.device
    _matrices: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _found: dict[Site, Box | Blocks | None] = field(default_factory=dict)

    def more_taps(self, site: Site) -> set[str]:
        """The projection of a use whose entries are the parameter's."""
        return set() if self._place(site) is None else {TAP}

    def narrow(self, site: Site, side: str) -> Tensor | None:
        """The matrix of the side of a weight that the activation meets, where the use is of one block."""
        place = self._place(site) if TAP in site.taps else None
        if not isinstance(place, Box):
            return None
        p_in, p_out = self._matrices_of(site.tracked.names[0])
        return p_in[place.inside] if (side == "rows") == place.rows_in else p_out[place.outside]

    def plan(self, sites: list[Site]) -> None:
        """Fuse every use that has a tap."""
        for site in sites:
            if TAP in site.taps:
                site.treatment = "fused"
                site.contract = partial(self._contract, site)

    def _contract(self, site: Site, factor: Factor) -> tuple[None, dict[str, Tensor]]:
        return None, {TAP: self.project(site, factor)}

    def project(self, site: Site, factor: Factor) -> Tensor:
        """The projection of one use that has a tap: `[B, k]` of its block, or of all blocks."""
        (name,) = site.tracked.names
        place = self._place(site)
        if isinstance(place, Blocks):
            return self._whole(name, _chunks(factor, site.tracked.real.shape))
        assert place is not None
        p_in, p_out = self._matrices_of(name)
        p_in, p_out = p_in[place.inside], p_out[place.outside]
        rows, cols = (p_in, p_out) if place.rows_in else (p_out, p_in)
        if site.narrowed:
            assert isinstance(factor, Outer)
            left = factor.left if factor.transposed else factor.left_product(rows)
            right = factor.right @ cols if factor.transposed else factor.right
            found = left.transpose(1, 2) @ right
        elif isinstance(factor, (Outer, Gather, Dense)):
            found = project_factor(factor, rows, cols)
        else:
            chunks = _chunks(factor, site.tracked.real.shape)
            found = torch.cat([project_factor(Dense(chunk), rows, cols) for chunk in chunks])
        return (found if place.rows_in else found.transpose(1, 2)).flatten(1)

    def products(self, result: Run, name: str) -> Tensor:
        """Projections of a parameter, `[B, blocks * k_in * k_out]`, on the scale of the run's weights."""
        part = self.projection.parts[name]
        zero = torch.zeros(self.units, part.size, dtype=self.dtype, device=self.device)
        of_block = [[zero] for _ in range(part.blocks.count)]
        for site in result.sites(name):
            place = self._place(site)
            if site in result.fused:
                found = result.fused[site][TAP]
            elif place is not None:
                found = self.project(site, result.factors[site])
            else:
                gradients = _chunks(result.factors[site], site.tracked.real.shape)
                found = self._whole(name, (result.pull(site.tracked, name, chunk) for chunk in gradients))
            if isinstance(place, Box):
                of_block[place.block].append(found)
            else:
                for columns, block in zip(of_block, found.split(part.size, 1), strict=True):
                    columns.append(block)
        return torch.cat([torch.stack(columns).sum(0) for columns in of_block], 1)

    def _place(self, site: Site) -> Box | Blocks | None:
        """Where a use is in its parameter's blocks: in one, in all of them, or, where it is derived, in none."""
        if site not in self._found:
            part = self.projection.parts.get(site.tracked.names[0])
            self._found[site] = place_of(site, None if part is None else part.blocks)
        return self._found[site]

    def _matrices_of(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._matrices:
            p_in, p_out = self.projection.matrices(name)
            self._matrices[name] = p_in.to(self.device, self.dtype), p_out.to(self.device, self.dtype)
        return self._matrices[name]

    def _whole(self, name: str, gradients: Iterator[Tensor]) -> Tensor:
        """The projections `[B, blocks * k_in * k_out]` of gradients `[b, *shape]`, some samples at a time."""
        p_in, p_out = self._matrices_of(name)
        blocks = self.projection.parts[name].blocks
        return torch.cat([((p_in.t() @ blocks.of(some.to(p_in.dtype))) @ p_out).flatten(1) for some in gradients])


def _chunks(factor: Factor, shape: torch.Size) -> Iterator[Tensor]:
    """The per-sample gradients `[b, *shape]` of a factor, as many samples at a time as fit the budget."""
    samples = (
        factor.samples
        if isinstance(factor, Later)
        else len(factor.right if isinstance(factor, Outer) else factor.g if isinstance(factor, Gather) else factor.grad)
    )
    step = Later.at_a_time(prod(shape), 8)
    for start in range(0, samples, step):
        yield factor.part(start, min(start + step, samples)).dense(shape)


@one_node
def ghost_grad_proj(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    projection: KroneckerProjection,
    *,
    dtype: torch.dtype | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    segments: Tensor | None = None,
    group: Group | None = None,
) -> Any:
    """Projections of each sample's gradient: for each parameter of the projection `P_in^T G_b P_out`, side by side.

    It costs a forward, the gradients of activations down to the lowest layer that is projected, and the products with
    the matrices: no weight gradient is computed.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; those that the projection is not of are constants.
        batch: a pytree of tensors `[B, ...]`.
        projection: of `kronecker_projection`.
        dtype: as in `ghost_grad_dot`.
        has_aux: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`.
        segments: as in `ghost_grad_dot`; the result has a row for each segment then.
        group: as in `ghost_grad_along`.

    Returns:
        `[B, projection.dim]`, the projection of the gradient of each sample's own loss (not divided by B), in the
        columns of `projection.slices`; with `has_aux`, `(projections, aux)`.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.
        ValueError: if the parameters are not those that the projection was made for.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> batch = (torch.randn(5, 40), torch.tensor([0, 1, 2, 0, 1]))
        >>> projection = gf.kronecker_projection(model_fn, params, batch, rank=64)
        >>> gf.ghost_grad_proj(model_fn, params, batch, projection).shape
        torch.Size([5, 64])
    """
    call = checked(model_fn, params, dtype, "", has_aux, on_unsupported, randomness, group)
    _check(projection, call.params)
    call = call._replace(names=frozenset(projection.parts))
    if functorch_level() is None:  # inside of a transform the result may be differentiated in the other parameters
        call = _of_names(call)
    batch = plain(batch)
    with call.together():
        samples = batch_size(batch, "given")
        units = units_of(batch, samples, segments, token=False)
        projected = Projected(call.names, units.runs, projection, call.dtype, call.device)
        result = call.run(
            batch,
            samples,
            train=units.runs,
            factors=call.names,
            more_taps=projected.more_taps,
            narrow=projected.narrow,
            plan=projected.plan,
            segments=units.segments,
        )
    with unrecorded(), torch.autocast(call.device.type, enabled=False):
        columns = units.own({name: projected.products(result, name) for name in projection.parts})
    found = torch.cat(list(columns.values()), 1)
    return (found, result.aux) if has_aux else found


def _of_names(call: Call) -> Call:
    """The same call as a function of the parameters in play alone, so that the backward ends at the lowest of them."""
    constants = {name: p.detach() for name, p in call.params.items() if name not in call.names}

    def model_fn(params: dict[str, Tensor], batch: Any) -> Any:
        return call.model_fn({name: params[name] if name in params else constants[name] for name in call.params}, batch)

    return call._replace(model_fn=model_fn, params={name: p for name, p in call.params.items() if name in call.names})


def _check(projection: KroneckerProjection, params: dict[str, Tensor]) -> None:
    missing = [name for name in projection.parts if name not in params]
    if missing:
        raise ValueError(
            f"the projection is of {', '.join(missing)}, which are not among the parameters {', '.join(params)}. Make "
            "one for this model with kronecker_projection."
        )
    for name, part in projection.parts.items():
        if tuple(params[name].shape) != part.shape:
            raise ValueError(
                f"{name} has shape {tuple(params[name].shape)}; the projection was made for {part.shape}. Make one for "
                "this model with kronecker_projection."
            )
