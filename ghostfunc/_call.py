"""What every transform's call has in common: its checked arguments, and how it runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axes import match_layers, positions_of
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import refuse_compiling, unrecorded
from ghostfunc._planner import Budget
from ghostfunc._products import Products
from ghostfunc._randomness import RANDOMNESS
from ghostfunc._ranks import Group, Ranks
from ghostfunc._run import Want, run
from ghostfunc._run_result import Run
from ghostfunc._segments import Segments
from ghostfunc._sharded import ShardedDirection, group_of, is_sharded, sharded_like

Params = Mapping[str, Tensor]
Layers = str | Iterable[str] | Callable[[str], bool]


class Call(NamedTuple):
    """The arguments that every transform shares, checked.

    Attributes:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        dtype: of contractions.
        names: the parameters that the call is about.
        has_aux: whether `model_fn` returns `(losses, aux)`.
        lenient: whether a use without a rule costs a backward for each sample.
        randomness: what random operations draw.
        ranks: those that have a share of the samples; None without a group.
        budget: the working memory of a contraction.
    """

    model_fn: ModelFn
    params: dict[str, Tensor]
    dtype: torch.dtype
    names: frozenset[str]
    has_aux: bool
    lenient: bool
    randomness: str
    ranks: Ranks | None = None
    budget: Budget = Budget()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def run(self, batch: Any, samples: int, **want: Any) -> Run:
        """One forward and backward; `want` as in `Want`."""
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
                ranks=self.ranks,
                **want,
            ),
        )

    def contracted(self, products: Products, batch: Any, samples: int, **want: Any) -> Run:
        """A run whose backward contracts what it can."""
        return self.run(batch, samples, factors=self.names, more_taps=products.more_taps, plan=products.plan, **want)

    def together(self) -> AbstractContextManager[None]:
        """Around this rank's share of the work: what one rank raises, all raise."""
        return nullcontext() if self.ranks is None else self.ranks.together()

    def over_ranks(self, count: int) -> int:
        """A number of samples of this rank, over all ranks."""
        return count if self.ranks is None else self.ranks.total(count)

    def sums(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over this rank's samples as sums over all ranks': sharded as the parameters are."""
        if self.ranks is None:
            return tensors
        whole = {name: tensor for name, tensor in tensors.items() if not is_sharded(self.params[name])}
        sums = self.ranks.sums(whole)
        return {n: sums[n] if n in sums else sharded_like(tensor, self.params[n]) for n, tensor in tensors.items()}

    def unused(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of the names that this rank's losses do not depend on those that no rank's do."""
        if self.ranks is None:
            return names
        of_ranks = [set(text.split("\n")) for text in self.ranks.texts("\n".join(names))]
        return tuple(name for name in names if all(name in unused for unused in of_ranks))

    def weights(self, samples: int, weight: float) -> Tensor:
        """The same weight for each sample's loss, `[samples]`."""
        return torch.full((samples,), weight, dtype=torch.float64, device=self.device)


def checked(
    model_fn: ModelFn,
    params: Params,
    dtype: torch.dtype | None,
    layers: Layers,
    has_aux: bool,
    on_unsupported: str,
    randomness: str,
    group: Group | None = None,
    memory: int | float | None = None,
) -> Call:
    """The shared arguments, checked.

    Raises:
        TypeError: for a parameter that is no floating-point tensor.
        ValueError: for no parameters, an unknown option, or a `memory` that is no size.
        RuntimeError: where Dynamo reads the call, or for a group inside a functorch transform.
    """
    refuse_compiling()
    params = _check_params(params)
    if on_unsupported not in ("raise", "dense"):
        raise ValueError(f"on_unsupported={on_unsupported!r}: expected 'raise' or 'dense'.")
    if randomness not in RANDOMNESS:
        raise ValueError(f"randomness={randomness!r}: expected {', '.join(map(repr, RANDOMNESS))}.")
    names = match_layers(layers, list(params))
    lenient = on_unsupported == "dense"
    if lenient and any(map(is_sharded, params.values())):
        raise ValueError(
            "on_unsupported='dense' takes a backward pass for each sample, and ranks with sharded parameters need as "
            "many passes as each other: leave it at 'raise', or the parameters unsharded."
        )
    ranks = Ranks.of(group_of(params, group), next(iter(params.values())).device)
    dtype = _contraction_dtype(params, dtype)
    return Call(model_fn, params, dtype, names, has_aux, lenient, randomness, ranks, Budget(memory))


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


class Units(NamedTuple):
    """What a per-sample result has an entry for: samples, segments of packed rows, or positions.

    Attributes:
        count: how many there are.
        runs: how many the factors of a run have: one more where positions may belong to none.
        segments: which unit each position belongs to; None where samples are the units.
        positions: of a sample, where positions are the units; else 0.
    """

    count: int
    runs: int
    segments: Segments | None
    positions: int = 0

    def own(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results without the entry of no unit, with samples and positions as two axes."""
        if self.segments is None:
            return columns
        columns = {name: column[: self.count] for name, column in columns.items()}
        if not self.positions:
            return columns
        return {name: column.unflatten(0, (-1, self.positions)) for name, column in columns.items()}

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that these are."""
        return ("train", "token") if self.positions else ("train",)


def units_of(batch: Any, samples: int, segments: Tensor | None, *, token: bool) -> Units:
    """The units of a call.

    Raises:
        ValueError: for segments that do not fit the batch, or together with the axis "token".
    """
    if token:
        if segments is not None:
            raise ValueError("the axis 'token' and segments= exclude each other: both say what a sample is.")
        length = positions_of(batch)
        device = next(leaf.device for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
        segments = torch.arange(samples * length, device=device).view(samples, length)
        of = Segments.of(segments, batch, samples)
        return Units(of.count, of.count + 1, of, length)
    if segments is None:
        return Units(samples, samples, None)
    of = Segments.of(segments, batch, samples)
    return Units(of.count, of.count + 1, of)


def product_columns(products: Products, result: Run, names: frozenset[str]) -> dict[str, Tensor]:
    """Dot products of each parameter, `[units, k]`, on the scale of the run's weights."""
    with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
        columns = {name: products.products(result, name) for name in result.leaves if name in names}
    for site in result.fused:
        site.fused_right = None
    return columns


def one_direction(direction: Params, call: Call) -> Mapping[str, Tensor]:
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
    if any(is_sharded(direction[name]) for name in call.names):
        return ShardedDirection(
            {n: direction[n] for n in call.params if n in call.names}, call.dtype, call.ranks, stacked=True
        )
    with unrecorded():
        return {name: direction[name].to(call.dtype).unsqueeze(0) for name in call.names}
