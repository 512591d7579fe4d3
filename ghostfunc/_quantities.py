"""Quantities: what can be asked of per-sample gradients, and how each is had from one weight's factors.

For per-sample gradients G_i of a weight, validation gradients V_j, and sums over all weights:

    Dot        sum <G_i, mean_j V_j>  or, with the axis "val",  sum <G_i, V_j>
    Along      sum <G_i, D>
    Gram       sum <G_i, G_j>
    Norm       sqrt(sum <G_i, G_i>)
    Project    P_in^T A_i^T G_i P_out of each weight
    Clip       sum_i min(1, C / |G_i|) G_i
    Stream     sum f(tile)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._accumulate import Accumulator, Setting, pairs_flops
from ghostfunc._axes import Axes, LayerOf, arrange, parse
from ghostfunc._contract import along, pair, pair_own, pair_sum
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._seen import Seen, untaken
from ghostfunc._stream import long_products, squares
from ghostfunc._tiles import Block, Tile


@dataclass(frozen=True)
class Dot:
    """Dot products of the train samples' gradients with the validation gradients, as `ghost_grad_dot` gives them.

    Attributes:
        out: axes, of "param", "layer", "train" (or "sample") and "val".
        reduction: "mean" or "sum" over the validation samples, where "val" is no axis.
        layer_of: as in `ghost_grad_dot`.
    """

    out: str = "train"
    reduction: str = "mean"
    layer_of: LayerOf = ""

    def start(self, setting: Setting) -> Dots:
        """An empty accumulator."""
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r}: expected 'mean' or 'sum' over the validation samples.")
        if not setting.val:
            raise ValueError(f"{self}: a dot product with the validation gradient needs a validation batch.")
        return Dots(setting, self, parse(self.out, ("param", "layer", "train", "val")))


def _direction_of(block: Block, direction: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A block's entries of a direction: `[p, ...]`."""
    return block.entries(direction[block.name].to(dtype))


class _AlongOne(Accumulator):
    """Dot products `[n]` with one direction that is there before the train samples' backward."""

    direction: Mapping[str, Tensor]

    def prepare(self, block: Block) -> None:
        if not self.val:
            self.direction[block.name]  # a sharded one is gathered, and stays for this block

    def pairs_cost(self, block: Block) -> float | int:
        return block.making(block.train)

    def tile_cost(self, block: Block) -> float | int:
        return 2 * self.setting.train * block.rows * block.cols

    def by_pairs(self, block: Block) -> None:
        direction = _direction_of(block, self.direction, self.setting.dtype).reshape(1, *block.shape)
        for factor in block.train:
            if not isinstance(factor, Seen):
                self.add(block.name, along(factor, direction))

    def by_tile(self, tile: Tile) -> None:
        rows = _direction_of(tile.block, self.direction, self.setting.dtype)[tile.start : tile.stop]
        self.add(tile.name, long_products(tile.flat, rows.reshape(1, -1)), tile.first)


class Dots(_AlongOne):
    """Columns `[n, m]`, or `[n, 1]` for the sum of the validation samples, whose gradient may be there before."""

    def __init__(self, setting: Setting, asked: Dot, axes: Axes) -> None:
        self.each = axes.has("val")
        super().__init__(setting, setting.train, setting.val if self.each else 1)
        self.asked, self.axes = asked, axes
        self.val = "each" if self.each else "sum"

    def along(self, direction: Mapping[str, Tensor]) -> None:
        """Take the validation samples' gradient, summed, instead of their factors."""
        self.direction, self.val = self.setting.direction(direction), ""

    def pairs_cost(self, block: Block) -> float | int:
        if not self.val:
            return super().pairs_cost(block)
        s = self.setting
        gram = pairs_flops(block, block.train, block.val, n=s.train, m=s.val)
        if self.each:
            return gram
        return min(gram, block.making(block.val) * len(block.train) + block.making(block.train) * len(block.val))

    def tile_cost(self, block: Block) -> float | int:
        return 2 * self.setting.train * self.columns[block.name].shape[1] * block.rows * block.cols

    def by_pairs(self, block: Block) -> None:
        if not self.val:
            super().by_pairs(block)
            return
        for ours, theirs in untaken(block.train, block.val):
            self.add(block.name, (pair if self.each else pair_sum)(ours, theirs))

    def by_tile(self, tile: Tile) -> None:
        if not self.val:
            super().by_tile(tile)
            return
        self.add(tile.name, long_products(tile.flat, tile.val if self.each else tile.val_sum), tile.first)

    def value(self) -> Any:
        mean = not self.each and self.asked.reduction == "mean"
        columns = self.columns if self.each else {name: c.squeeze(1) for name, c in self.columns.items()}
        has = ("train", "val") if self.each else ("train",)
        scale = self.setting.divisor / self.setting.val if mean else self.setting.divisor
        return arrange(columns, self.axes, has=has, scale=scale, layer_of=self.asked.layer_of)


@dataclass(frozen=True, eq=False)
class Along:
    """Dot products of the samples' gradients with a direction, as `ghost_grad_along` gives them.

    Attributes:
        direction: a dict like the parameters.
        out: axes, of "param", "layer" and "train" (or "sample").
        layer_of: as in `ghost_grad_dot`.
    """

    direction: Mapping[str, Tensor]
    out: str = "sample"
    layer_of: LayerOf = ""

    def start(self, setting: Setting) -> Accumulator:
        """An empty accumulator."""
        return _AlongDirection(setting, self, parse(self.out, ("param", "layer", "train")))


class _AlongDirection(_AlongOne):
    def __init__(self, setting: Setting, asked: Along, axes: Axes) -> None:
        super().__init__(setting, setting.train, 1)
        for name in setting.names:
            given = asked.direction.get(name)
            if given is None or given.shape != setting.params[name].shape:
                shape = None if given is None else tuple(given.shape)
                raise ValueError(
                    f"direction[{name!r}] has shape {shape}; the parameter has {tuple(setting.params[name].shape)}."
                )
        self.asked, self.axes, self.direction = asked, axes, setting.direction(asked.direction)

    def value(self) -> Any:
        columns = {name: column.squeeze(1) for name, column in self.columns.items()}
        return arrange(columns, self.axes, has=("train",), scale=self.setting.divisor, layer_of=self.asked.layer_of)


@dataclass(frozen=True)
class Gram:
    """Dot products of every two train samples' gradients.

    Attributes:
        out: axes, of "param", "layer", "sample" (or "train") and "other", the sample that it is paired with.
        layer_of: as in `ghost_grad_dot`.
    """

    out: str = "sample other"
    layer_of: LayerOf = ""

    def start(self, setting: Setting) -> Accumulator:
        """An empty accumulator."""
        return _Gram(setting, self, parse(self.out, ("param", "layer", "train", "other")))


class _Gram(Accumulator):
    together = True

    def __init__(self, setting: Setting, asked: Gram, axes: Axes) -> None:
        super().__init__(setting, setting.train, setting.train)
        self.asked, self.axes = asked, axes

    def pairs_cost(self, block: Block) -> float | int:
        return pairs_flops(block, block.train, block.train, n=self.setting.train, m=self.setting.train)

    def tile_cost(self, block: Block) -> float | int:
        return 2.0 * self.setting.train**2 * block.rows * block.cols

    def by_pairs(self, block: Block) -> None:
        for place, one in enumerate(block.train):
            if not isinstance(one, Seen):
                self.add(block.name, pair(one, one))
            for other in block.train[:place]:
                cross = pair(one, other)
                self.add(block.name, cross + cross.t())

    def by_tile(self, tile: Tile) -> None:
        self.add(tile.name, long_products(tile.flat, tile.flat))

    def value(self) -> Any:
        scale = self.setting.divisor**2
        return arrange(self.columns, self.axes, has=("train", "other"), scale=scale, layer_of=self.asked.layer_of)


@dataclass(frozen=True)
class Norm:
    """Norms of the samples' gradients.

    Attributes:
        out: axes: "sample" (or "train"), and "param" or "layer" for norms of parts of the gradient.
        layer_of: as in `ghost_grad_dot`.
    """

    out: str = "sample"
    layer_of: LayerOf = ""

    def start(self, setting: Setting) -> Accumulator:
        """An empty accumulator."""
        return Norms(setting, self.layer_of, parse(self.out, ("param", "layer", "train"), needed="train"))


class Norms(Accumulator):
    """Squared norms; their square root is the value."""

    def __init__(self, setting: Setting, layer_of: LayerOf, axes: Axes) -> None:
        super().__init__(setting, setting.train)
        self.layer_of, self.axes = layer_of, axes
        self.has: tuple[str, ...] = ("train",)

    def pairs_cost(self, block: Block) -> float | int:
        return pairs_flops(block, block.train, block.train, n=self.setting.train, m=1)

    def tile_cost(self, block: Block) -> float | int:
        return 2.0 * self.setting.train * block.rows * block.cols

    def by_pairs(self, block: Block) -> None:
        for place, one in enumerate(block.train):
            if not isinstance(one, Seen):
                self.add(block.name, pair_own(one, one))
            for other in block.train[:place]:
                self.add(block.name, 2 * pair_own(one, other))

    def by_tile(self, tile: Tile) -> None:
        self.add(tile.name, squares(tile.flat), tile.first)

    def value(self) -> Any:
        scale = self.setting.divisor**2
        squares = arrange(self.columns, self.axes, has=self.has, scale=scale, layer_of=self.layer_of)
        return pytree.tree_map(lambda square: square.clamp(min=0).sqrt(), squares)  # pairs may round below 0


@dataclass(frozen=True, eq=False)
class Project:
    """The samples' gradients projected, as `ghost_grad_proj` gives them.

    Attributes:
        projection: as `kronecker_projection` gives.
    """

    projection: KroneckerProjection


@dataclass(frozen=True)
class Clip:
    """The sum of the samples' gradients, each scaled down to a norm, as `ghost_clipped_grad` gives it.

    Attributes:
        max_norm: the norm; or a norm for each of several groups of parameters, by a pattern as in `layers=`.
    """

    max_norm: float | int | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Stream:
    """A function of per-sample gradient tiles, accumulated over all of them.

    Attributes:
        function: `function(tile) -> tensor or pytree of tensors`; `tile.grads` is `[S, rows, cols]`, `tile.name` the
            parameter's name, `tile.of(tensor)` the same entries `[rows, cols]` of a tensor like the parameter.
        out: what becomes of the results. "": their sum over all tiles. "param": `{name: sum over its tiles}`. "entry":
            `[rows, cols]` for each tile, put in their places: a dict like the parameters.
    """

    function: Callable[[Tile], Any]
    out: str = ""

    def start(self, setting: Setting) -> Accumulator:
        """An empty accumulator."""
        if self.out not in ("", "param", "entry"):
            raise ValueError(f"out={self.out!r}: expected '', 'param' or 'entry' for a stream.")
        return _Streamed(setting, self)


class _Streamed(Accumulator):
    together = True
    adds_up = False

    def __init__(self, setting: Setting, asked: Stream) -> None:
        self.setting, self.asked = setting, asked
        self.of_param: dict[str, Any] = {}
        self.placed: dict[str, Tensor] = {}

    def pairs_cost(self, block: Block) -> float | int:
        return float("inf")

    def tile_cost(self, block: Block) -> float | int:
        return 0.0

    def by_pairs(self, block: Block) -> None:
        raise TypeError("a function of tiles has no share from pairs")

    def by_tile(self, tile: Tile) -> None:
        value = self.asked.function(tile)
        if self.asked.out == "entry":
            self._put(tile, value)
            return
        before = self.of_param.get(tile.name)
        value = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)
        self.of_param[tile.name] = value if before is None else pytree.tree_map(torch.add, before, value)

    def _put(self, tile: Tile, value: Any) -> None:
        expected = tuple(tile.grads.shape[1:])
        if not isinstance(value, Tensor) or value.numel() != expected[0] * expected[1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{tile.name}: the function gave {got} for a tile of shape {tuple(tile.grads.shape)}; with out='entry' "
                f"it must give {expected}."
            )
        like = self.setting.params[tile.name]
        if tile.name not in self.placed:
            self.placed[tile.name] = torch.zeros(like.shape, dtype=value.dtype, device=value.device)
        tile.put(self.placed[tile.name], value)

    def value(self) -> Any:
        if self.asked.out == "entry":
            missing = {n: self.setting.params[n] for n in self.setting.names if n not in self.placed}
            zeros = {n: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for n, p in missing.items()}
            return {name: self.placed.get(name, zeros.get(name)) for name in self.setting.names}
        if self.asked.out == "param":
            return self.of_param
        values = list(self.of_param.values())
        total = values[0] if values else None
        for value in values[1:]:
            total = pytree.tree_map(torch.add, total, value)
        return total


Quantity = Dot | Along | Gram | Norm | Project | Clip | Stream
