"""The factor of a head whose logits are computed when they are asked for, and the walk that its backward is.

    Outer(a = h, g),    g[b, r, v] = (exp(z[b, r, v] - lse[b, r]) - [v = y[b, r]]) token[b, r]

with token the cotangent of each position's loss. Whoever contracts the factor asks for some rows of the weight at a
time; while the backward runs, each of these tiles of g also adds its share to the gradient of h,

    dh[b, r] = sum_v g[b, r, v] W[v]

so that the logits are computed once more, and not twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from ghostfunc._factors import Outer
from ghostfunc._linear_cross_entropy import add_product_, blocks, cotangents_, logits_of


@dataclass(frozen=True, eq=False)
class LogitsOuter(Outer):
    """An `Outer` of a weight `[V, d]` whose g is made for some rows of the weight at a time, out of what it takes.

    Attributes:
        a: activations `[B, R, d]` in the dtype of contractions.
        g: `[B, R, V]`, made anew when it is read: the exact way out for whatever does not know better.
        hidden: `[B, R, d]` in the dtype of the forward.
        weight: `[V, d]`.
        bias: `[V]`, or None.
        targets: `[B, R]`.
        lse: `[B, R, 1]`, the logsumexp of the logits.
        token: `[B, R, 1]`, the cotangent of each loss, 0 where the target is ignored.
        softcap: of the logits, or None.
        block: rows of the weight that are made at a time, where nothing else decides.
        walk: takes the tiles that are made while the backward runs.
        first: the place of the first sample among the walk's.
    """

    g: Tensor = field(init=False, repr=False)
    hidden: Tensor = field(kw_only=True)
    weight: Tensor = field(kw_only=True)
    bias: Tensor | None = field(kw_only=True)
    targets: Tensor = field(kw_only=True)
    lse: Tensor = field(kw_only=True)
    token: Tensor = field(kw_only=True)
    softcap: float | None = field(kw_only=True)
    block: int = field(kw_only=True)
    walk: Walk | None = field(default=None, kw_only=True)
    first: int = field(default=0, kw_only=True)

    def __getattr__(self, name: str) -> Tensor:
        if name == "g":  # no such attribute is set
            return self.left_rows(0, len(self.weight))
        raise AttributeError(name)

    @property
    def size(self) -> tuple[int, int]:
        """`(p, q)`, the weight's rows and columns."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def rows_at_a_time(self) -> int:
        """How many rows of the weight are best asked of `left_rows`, where nothing else decides."""
        return self.block

    def left_rows(self, start: int, stop: int) -> Tensor:
        """The columns start to stop of g: `[B, R, t]`."""
        bias = None if self.bias is None else self.bias[start:stop]
        logits = logits_of(self.hidden, self.weight[start:stop], bias, self.softcap)
        g = cotangents_(logits, self.lse, self.token, self.targets, start, self.softcap)
        if self.walk is not None:
            self.walk.take(self.first, start, stop, g)
        return g.to(self.a.dtype)

    def left_at(self, ids: Tensor) -> Tensor:
        """The columns of g at these rows of the weight: `[B, R, K]` for ids `[K]`, or `[B, K]`."""
        some = self.weight[ids].to(self.hidden.dtype)  # [K, d] or [B, K, d]
        logits = (self.hidden @ some.transpose(-1, -2)).to(self.lse.dtype)
        at = ids.unsqueeze(-2)  # [1, K] or [B, 1, K]
        if self.bias is not None:
            logits += self.bias[at]
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return cotangents_(logits, self.lse, self.token, self.targets, at, self.softcap).to(self.a.dtype)

    def left_product(self, matrix: Tensor) -> Tensor:
        """The matrix `[V, k]` times g: `[B, R, k]`."""
        found = matrix.new_zeros(*self.a.shape[:2], matrix.shape[1])
        for start, stop in blocks(len(self.weight), self.block):
            rows = self.left_rows(start, stop).flatten(0, 1)
            torch.addmm(found.flatten(0, 1), rows, matrix[start:stop], out=found.flatten(0, 1))
        return found

    def left_sum(self) -> Tensor:
        """The sum of g over positions: `[B, V]`."""
        return torch.cat([self.left_rows(*rows).sum(1) for rows in blocks(len(self.weight), self.block)], 1)

    def scaled(self, weights: Tensor) -> LogitsOuter:
        """The factor of the samples' gradients times a weight for each."""
        return replace(self, a=self.a * weights.view(-1, 1, 1).to(self.a.dtype))

    def at_positions(self, start: int, stop: int) -> LogitsOuter:
        """The factor of some of the positions, of which the walk takes nothing."""
        of_rows = ("a", "hidden", "targets", "lse", "token")
        return replace(self, walk=None, **{name: getattr(self, name)[:, start:stop] for name in of_rows})

    def part(self, start: int, stop: int) -> LogitsOuter:
        """The factor of samples start to stop."""
        of_rows = ("a", "hidden", "targets", "lse", "token")
        rows = {name: getattr(self, name)[start:stop] for name in of_rows}
        return replace(self, first=self.first + start, **rows)


class Walk:
    """Collects the gradient of h, and of the bias, from the tiles of g that contractions ask for in a backward.

    Each sample's tiles count as far as they follow one another from the first row on; `finish` makes what nobody asked
    for.
    """

    def __init__(self, factor: LogitsOuter, *, hidden: bool, bias: bool) -> None:
        samples, vocabulary = len(factor.hidden), len(factor.weight)
        self.factor: LogitsOuter | None = replace(factor, walk=self)
        self.of_hidden = factor.lse.new_zeros(factor.hidden.shape) if hidden else None  # [B, R, d]
        self.of_bias = factor.lse.new_empty(samples, vocabulary) if bias else None
        self.reached = [0] * samples

    def take(self, first: int, start: int, stop: int, g: Tensor) -> None:
        """Take the tile of g for rows start to stop: `[b, R, t]` of samples first and later."""
        last = first + len(g)
        if any(reached != start for reached in self.reached[first:last]):
            return
        self.reached[first:last] = [stop] * len(g)
        if self.of_hidden is not None:
            assert self.factor is not None
            dtype = self.factor.hidden.dtype
            rows = self.of_hidden[first:last].flatten(0, 1)
            add_product_(rows, g.flatten(0, 1).to(dtype), self.factor.weight[start:stop].to(dtype))
        if self.of_bias is not None:
            self.of_bias[first:last, start:stop] = g.sum(1)

    def finish(self) -> None:
        """Make the tiles that nobody asked for."""
        if self.factor is None or (self.of_hidden is None and self.of_bias is None):
            return
        vocabulary, first = len(self.factor.weight), 0
        for reached, group in groupby(list(self.reached)):
            last = first + len(list(group))
            some = self.factor.part(first, last)
            for start, stop in blocks(vocabulary, self.factor.block, reached):
                some.left_rows(start, stop)
            first = last

    def close(self) -> None:
        """The backward is over: let everything go, though factors still know the walk."""
        self.factor = self.of_hidden = self.of_bias = None
