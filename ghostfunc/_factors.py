"""Factors: what one use of a parameter contributes to each sample's gradient, kept as small as the operation allows.

The gradient of sample b is the sum over uses of

    Outer     G_b = sum_r outer(g[b, r], a[b, r])                   a linear map at R positions
    Gather    G_b = sum_r onehot(ids[b, r]) outer g[b, r]            an embedding; a one-hot activation is its index
    Dense     G_b = grad[b]                                          scales, biases, anything else
    Own       G_b = grad[b] in the part that only sample b uses      a tensor that has a part for each sample
    Later     G_b computed when it is asked for                      an operation without a rule
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from ghostfunc._sample_axis import SampleAxis

LATER_BYTES = 64 << 20  # what the per-sample gradients of an operation without a rule may take at a time


@dataclass(frozen=True, eq=False)
class Outer:
    """Per-sample gradient of a weight `[d_out, d_in]` that is used at R positions: G_b = g_b^T a_b.

    Attributes:
        a: activations `[B, R, d_in]`.
        g: grad-outputs (cotangents) `[B, R, d_out]`.
        transposed: whether the weight is stored `[d_in, d_out]`, as by `Conv1D` and `x @ w`.
    """

    a: Float[Tensor, "b r d_in"]
    g: Float[Tensor, "b r d_out"]
    transposed: bool = False

    @property
    def left(self) -> Float[Tensor, "b r p"]:
        """`[B, R, p]` of a weight stored `[p, q]`: G_b = left_b^T right_b."""
        return self.a if self.transposed else self.g

    @property
    def right(self) -> Float[Tensor, "b r q"]:
        """`[B, R, q]` of a weight stored `[p, q]`."""
        return self.g if self.transposed else self.a

    @property
    def size(self) -> tuple[int, int]:
        """`(p, q)`, the weight's rows and columns as it is stored."""
        d_in, d_out = self.a.shape[2], self.g.shape[2]
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    @property
    def positions(self) -> int:
        """Positions of a sample, R."""
        return self.right.shape[1]

    def left_rows(self, start: int, stop: int) -> Float[Tensor, "b r t"]:
        """What `left` has for some rows of the weight: contractions that walk over rows ask for no more."""
        return self.left[:, :, start:stop]

    @property
    def rows_at_a_time(self) -> int:
        """How many rows of the weight are best asked of `left_rows`, where nothing else decides: all of them."""
        return self.size[0]

    def left_at(self, ids: Int[Tensor, "*b k"]) -> Float[Tensor, "b r k"]:
        """What `left` has for these rows of the weight: `ids` `[K]` for all samples, or `[B, K]` of each."""
        if ids.dim() == 1:
            return self.left[:, :, ids]
        return self.left.gather(2, ids[:, None, :].expand(-1, self.left.shape[1], -1))

    def left_product(self, matrix: Float[Tensor, "p k"]) -> Float[Tensor, "b r k"]:
        """`left` times a matrix."""
        return self.left @ matrix

    def scaled(self, weights: Float[Tensor, " b"]) -> Outer:
        """The factor of the samples' gradients times a weight for each."""
        column = weights.view(-1, 1, 1).to(self.a.dtype)
        if self.a.shape[2] < self.g.shape[2]:  # the narrower side
            return replace(self, a=self.a * column)
        return replace(self, g=self.g * column)

    def at_positions(self, start: int, stop: int) -> Outer:
        """The factor of some of the positions."""
        return replace(self, a=self.a[:, start:stop], g=self.g[:, start:stop])

    def dense(self, shape: Sequence[int]) -> Inexact[Tensor, "b ..."]:
        """The per-sample gradients `[B, *shape]`."""
        return torch.bmm(self.left.transpose(1, 2), self.right).view(-1, *shape)

    def part(self, start: int, stop: int) -> Outer:
        """The factor of samples start to stop."""
        if type(self) is Outer:  # often, and without what `replace` takes
            return Outer(self.a[start:stop], self.g[start:stop], self.transposed)
        return replace(self, a=self.a[start:stop], g=self.g[start:stop])


@dataclass(frozen=True, eq=False)
class Gather:
    """Per-sample gradient of a table `[V, d]` whose rows are looked up: G_b[v] = sum_r [ids[b, r] = v] g[b, r].

    The table may have more dimensions: its rows are all of them but the last, flattened.

    Attributes:
        ids: `[B, R]`.
        g: grad-outputs `[B, R, d]`, zero where the id is the table's padding.
    """

    ids: Int[Tensor, "b r"]
    g: Float[Tensor, "b r d"]

    @property
    def positions(self) -> int:
        """Positions of a sample, R."""
        return self.g.shape[1]

    def dense(self, shape: Sequence[int]) -> Inexact[Tensor, "b ..."]:
        """The per-sample gradients `[B, *shape]`."""
        grads = self.g.new_zeros(len(self.g), math.prod(shape[:-1]), shape[-1])
        return grads.scatter_add_(1, self.ids.unsqueeze(-1).expand_as(self.g), self.g).view(-1, *shape)

    def part(self, start: int, stop: int) -> Gather:
        """The factor of samples start to stop."""
        return Gather(self.ids[start:stop], self.g[start:stop])

    def at_positions(self, start: int, stop: int) -> Gather:
        """The factor of some of the positions."""
        return Gather(self.ids[:, start:stop], self.g[:, start:stop])


@dataclass(frozen=True, eq=False)
class Dense:
    """Per-sample gradients as they are.

    Attributes:
        grad: `[B, *shape]`.
        maps: for linear maps side by side, as of a grouped convolution: `(maps, p, q)`, as which the weight is stored.
        transposed: whether each of these is stored `[d_in, d_out]`.
    """

    grad: Inexact[Tensor, "b ..."]
    maps: tuple[int, int, int] | None = None
    transposed: bool = False

    def dense(self, shape: Sequence[int]) -> Inexact[Tensor, "b ..."]:
        """The per-sample gradients `[B, *shape]`."""
        return self.grad.view(-1, *shape)

    def part(self, start: int, stop: int) -> Dense:
        """The factor of samples start to stop."""
        return Dense(self.grad[start:stop], self.maps, self.transposed)


@dataclass(frozen=True, eq=False)
class Own:
    """Per-sample gradients of a tensor of which each sample uses a part of its own, and no other.

    Attributes:
        grad: `[B, *part]`.
        axis: where the parts are in the tensor.
        start: the sample that the first row belongs to.
    """

    grad: Inexact[Tensor, "b ..."]
    axis: SampleAxis
    start: int = 0

    def dense(self, shape: Sequence[int]) -> Inexact[Tensor, "b ..."]:
        """The per-sample gradients `[B, *shape]`."""
        grads = self.grad.new_zeros(len(self.grad), *shape)
        for row, grad in enumerate(self.grad):
            self.axis.split(grads[row])[self.start + row] = grad
        return grads

    def part(self, start: int, stop: int) -> Own:
        """The factor of samples start to stop."""
        return Own(self.grad[start:stop], self.axis, self.start + start)


@dataclass(frozen=True, eq=False)
class Later:
    """Per-sample gradients that are computed when they are asked for, as many samples at a time as fit the budget.

    Attributes:
        rows: `(start, stop) -> [stop - start, *shape]`.
        shape: of one sample's gradient.
        samples: how many there are, B.
        start: the first one.
    """

    rows: Callable[[int, int], Tensor]
    shape: tuple[int, ...]
    samples: int
    start: int = 0

    def dense(self, shape: Sequence[int]) -> Inexact[Tensor, "b ..."]:
        """The per-sample gradients `[B, *shape]`."""
        return self.rows(self.start, self.start + self.samples).view(-1, *shape)

    def part(self, start: int, stop: int) -> Later:
        """The factor of samples start to stop."""
        return replace(self, start=self.start + start, samples=stop - start)

    @staticmethod
    def at_a_time(numel: int, itemsize: int) -> int:
        """How many samples' gradients of so many numbers are made at a time."""
        return max(1, LATER_BYTES // max(1, numel * itemsize))

    def chunks(self) -> Iterator[Dense]:
        """The samples in turn, as many at a time as fit the budget."""
        return (chunk for _, chunk in self.placed_chunks())

    def placed_chunks(self) -> Iterator[tuple[int, Dense]]:
        """The same, each with the place of its first sample among these."""
        step = self.at_a_time(math.prod(self.shape), 8)
        for start in range(self.start, self.start + self.samples, step):
            yield start - self.start, Dense(self.rows(start, min(start + step, self.start + self.samples)))


Factor = Outer | Gather | Dense | Own | Later
