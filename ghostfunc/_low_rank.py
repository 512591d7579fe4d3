"""Dot products with a direction near the given one and of low rank, each with a bound on what that leaves out.

The direction of a linear map, V `[d_out, d_in]`, is replaced by its projection on r orthonormal directions Q of the
activations' space:

    V_r = C Q^T,    C = V Q,    Q from the randomised range finder (Halko, Martinsson, Tropp 2011, algorithms 4.3, 4.4)
    dot_i = sum_r (g_r C) · (a_r Q)                 2·nR·r(d_in + d_out), where V itself takes 2·nR·d_in·d_out

Validation rows (a', g'), whose direction is V = g'^T a', serve V X as g'^T (a' X) and V^T Y as a'^T (g' Y): V is not
formed. As V - V_r = V (I - Q Q^T), the error of sample i is <G_i (I - Q Q^T), V - V_r>, so that

    |error_i| <= |G_i (I - Q Q^T)| |V - V_r|

in Frobenius norms. |V - V_r| is computed from its entries or from Gram matrices of the rows (a' (I - Q Q^T), g'), never
as |V|^2 - |C|^2, which would lose half the digits. Of so many validation rows that Gram matrices cost more than half of
V, it is bounded by 64 random probes, twice their root mean square: too low for one draw in 10^8. The other norm is
bounded by the sum over blocks of r positions of

    |sum_{r in block} g_r (a_r (I - Q Q^T))^T|^2 = sum_rs (g_r · g_s)(a_r · a_s - a_r Q · a_s Q)

which costs as much again as the dot products, and is exact where a sample has no more than r positions. To both come
terms that allow for rounding. Activations, not grad-outputs, are projected: theirs are the few large directions that a
sample shares with V, and on a trained GPT-2 the bound is two to four times as tight (`docs/low_rank.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._factors import Outer
from ghostfunc._planner import Order, Shape

OVERSAMPLING = 4  # directions beside the r that are wanted, of which the best r stay
# |E Ω|^2 / PROBES of Ω normal `[d, PROBES]` has the mean |E|^2. It is below t |E|^2, t = PROBE_FACTOR^-2, with a
# probability of at most (t e^(1 - t))^(PROBES / 2) = 1.5e-9: Chernoff's bound for a rank of 1, which is the worst.
PROBES, PROBE_FACTOR = 64, 2.0
_ROWS = 32  # of a Gram matrix at a time


@dataclass(frozen=True, eq=False)
class Formed:
    """A direction V that is there."""

    v: Float[Tensor, "d_out d_in"]

    @property
    def full_rank(self) -> int:
        """The largest rank that it may have."""
        return min(self.v.shape)

    def times(self, x: Float[Tensor, "d_in l"]) -> Float[Tensor, "d_out l"]:
        """V x."""
        return self.v @ x

    def transposed_times(self, y: Float[Tensor, "d_out l"]) -> Float[Tensor, "d_in l"]:
        """V^T y."""
        return self.v.t() @ y

    def distance(self, inner: Float[Tensor, "d_in r"], outer: Float[Tensor, "d_out r"]) -> Float[Tensor, ""]:
        """|V - C Q^T|."""
        return _norm(torch.addmm(self.v, outer, inner.t(), alpha=-1))

    def size(self) -> Float[Tensor, ""]:
        """What rounding in products with V is relative to."""
        return _norm(self.v)


@dataclass(frozen=True, eq=False)
class Rows:
    """A direction V = g^T a of N rows, which is not formed."""

    a: Float[Tensor, "N d_in"]
    g: Float[Tensor, "N d_out"]

    @property
    def full_rank(self) -> int:
        """The largest rank that it may have."""
        return min(*self.a.shape, self.g.shape[1])

    def times(self, x: Float[Tensor, "d_in l"]) -> Float[Tensor, "d_out l"]:
        """V x."""
        return self.g.t() @ (self.a @ x)

    def transposed_times(self, y: Float[Tensor, "d_out l"]) -> Float[Tensor, "d_in l"]:
        """V^T y."""
        return self.a.t() @ (self.g @ y)

    def distance(self, inner: Float[Tensor, "d_in r"], outer: Float[Tensor, "d_out r"]) -> Float[Tensor, ""]:
        """|V - C Q^T| = |g^T (a - a Q Q^T)|; by probes about twice that."""
        left = torch.addmm(self.a, self.a @ inner, inner.t(), alpha=-1)  # [N, d_in]
        way, _ = way_to_norm(len(left), len(outer), len(inner))
        if way == "formed":
            return _norm(self.g.t() @ left)
        if way == "probes":
            return PROBE_FACTOR * _norm(self.g.t() @ (left @ _random(left, PROBES, seed=1))) / math.sqrt(PROBES)
        square = left.new_zeros(())
        for start in range(0, len(left), _ROWS):
            some = slice(start, start + _ROWS)
            pairs = (self.g[some] @ self.g[start:].t()) * (left[some] @ left[start:].t())
            square = square + 2 * pairs.sum() - pairs[:, : len(pairs)].sum()
        rounding = _rounding(left, self.g) * (self.g.norm(dim=1) * left.norm(dim=1)).square().sum()
        return (square.clamp(min=0) + rounding).sqrt()

    def size(self) -> Float[Tensor, ""]:
        """What rounding in products with V is relative to: that of each row, over all rows."""
        rows = self.g.norm(dim=1) * self.a.norm(dim=1)
        return rows.norm() * math.sqrt(1 + len(rows) / (self.a.shape[1] + self.g.shape[1]))


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is near a direction V `[d_out, d_in]`: C Q^T.

    Attributes:
        inner: Q, with orthonormal columns, `[d_in, r]`.
        outer: C = V Q, `[d_out, r]`.
        rest: at least |V - C Q^T|, but for rounding.
        size: what rounding is relative to.
    """

    inner: Float[Tensor, "d_in r"]
    outer: Float[Tensor, "d_out r"]
    rest: Float[Tensor, ""]
    size: Float[Tensor, ""]


def approximate(direction: Formed | Rows, rank: int) -> LowRank:
    """A direction of low rank near a given one, the same at every call.

    Args:
        direction: V.
        rank: r.

    Returns:
        V_r, with its distance from V. The basis is that of V^T (V Ω), Ω random `[d_in, r + 4]`: half a power iteration.
    """
    width = min(rank + OVERSAMPLING, direction.full_rank)
    like = direction.v if isinstance(direction, Formed) else direction.a  # [., d_in]
    image = torch.linalg.qr(direction.times(_random(like, width, seed=0))).Q  # [d_out, l]
    inner = torch.linalg.qr(direction.transposed_times(image)).Q  # [d_in, l]
    outer = direction.times(inner)  # [d_out, l]
    if width > rank:  # the r of these directions in which V is largest
        wide = outer.double()
        turn = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, -rank:].to(outer)  # [l, r]
        inner, outer = inner @ turn, outer @ turn
    whole = inner.shape[1] == direction.full_rank  # nothing but rounding is left out
    rest = outer.new_zeros(()) if whole else direction.distance(inner, outer)
    return LowRank(inner, outer, rest, direction.size() + _norm(outer))


def contract_low_rank(factor: Outer, near: LowRank) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Dot products of every sample with V_r, and bounds on how far they are from those with V.

    Args:
        factor: n samples.
        near: V_r.

    Returns:
        `(dots[n], bounds[n])`.
    """
    a, g = factor.a, factor.g  # [n, R, d_in], [n, R, d_out]
    inner = a @ near.inner  # [n, R, r]
    dots = ((g @ near.outer) * inner).sum((1, 2))
    n, positions, rank = inner.shape
    whole = positions // rank * rank
    left, sizes = 0, 0
    for start, stop, length in ((0, whole, min(rank, positions)), (whole, positions, positions - whole)):
        if start < stop:
            blocks = [x[:, start:stop].reshape(-1, length, x.shape[2]) for x in (a, g, inner)]
            of_block, of_rows = _norms(*blocks)
            left, sizes = left + of_block.view(n, -1).sum(1), sizes + of_rows.view(n, -1).sum(1)
    return dots, left * near.rest + _rounding(a, g) * sizes * near.size


def _norms(
    a: Float[Tensor, "k b d_in"], g: Float[Tensor, "k b d_out"], inner: Float[Tensor, "k b r"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Of each block bounds on |sum_r g_r (a_r (I - Q Q^T))^T| and on |sum_r g_r a_r^T|: `([k], [k])`."""
    of_g, of_a = (x.bmm(x.transpose(1, 2)) for x in (g, a))  # [k, b, b]
    rows = (of_g.diagonal(dim1=1, dim2=2) * of_a.diagonal(dim1=1, dim2=2)).sqrt()  # [k, b]
    squares = (of_g * (of_a - inner.bmm(inner.transpose(1, 2)))).sum((1, 2))
    return (squares.clamp(min=0) + _rounding(a, g) * rows.square().sum(1)).sqrt(), rows.sum(1)


def _random(like: Float[Tensor, "n d"], width: int, seed: int) -> Float[Tensor, "d l"]:
    """Normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape[1], width, generator=generator, dtype=torch.float64).to(like)


def _norm(matrix: Float[Tensor, "p q"]) -> Float[Tensor, ""]:
    """A Frobenius norm, row by row: over millions of entries one sum loses a digit."""
    return matrix.norm(dim=1).norm()


def _rounding(a: Tensor, g: Tensor) -> float:
    """How far products of rows of these may be from the exact ones, of the product of their norms.

    Rounding errors add up like independent ones (Higham and Mary 2019), here over the entries of both rows.
    """
    return 2 * torch.finfo(a.dtype).eps * math.sqrt(a.shape[-1] + g.shape[-1])


def way_to_norm(rows: int, p: int, q: int) -> tuple[str, int]:
    """How the norm of a matrix `[p, q]` of a sum over rows is had, and FLOPs of it.

    From the rows' Gram matrices, where these take no more than half of what the matrix takes; else by probes, or from
    the matrix where that takes less.
    """
    formed, probes = 2 * rows * p * q, 2 * rows * PROBES * (p + q)
    gram = 2 * (p + q) * sum(min(_ROWS, rows - start) * (rows - start) for start in range(0, rows, _ROWS))
    if 2 * gram <= formed or gram <= probes:
        return "Gram", gram
    return ("probes", probes) if probes < formed else ("formed", formed)


def low_rank_order(shape: Shape, rank: int) -> Order:
    """What the dot products with a low-rank direction cost, with their bounds, and the weight gradient if it is wanted.

    Args:
        shape: what is to be contracted, with one direction.
        rank: r.

    Returns:
        The FLOPs, those of orthonormal bases included.
    """
    n, positions, p, q, _, val_rows, given, want_grad, itemsize, _ = shape
    both, block = p + q, min(rank, positions)
    width = min(rank + OVERSAMPLING, p, q) if given else min(rank + OVERSAMPLING, p, q, val_rows)
    kept = min(rank, width)
    flops = 2 * n * positions * ((kept + block) * both + block * kept) + want_grad * 2 * n * positions * p * q
    flops += (4 * width**2 + (width > rank) * (width**2 + 2 * width * rank)) * both  # bases, and their best directions
    passes = n * positions * (kept + 2 * block)
    if given:
        flops, passes = flops + (6 * width + 2 * kept) * p * q, passes + p * q
    else:
        way, of_norm = way_to_norm(val_rows, p, q)
        flops += val_rows * (6 * width + 2 * kept) * both + (kept < min(p, q, val_rows)) * of_norm
        passes += val_rows**2 // 2 if way == "Gram" else 0
    return Order("low rank", flops, passes, n * positions * (2 * kept + 3 * block) * itemsize, n, p)
