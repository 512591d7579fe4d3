"""Second moments of the factors of a matrix's gradients, and the matrix's Fisher block out of them.

The gradient of a matrix `[p, q]` in sample i is G_i = sum_r l_r r_r^T, r over the sample's positions at all its uses.

    K-FAC    E[vec G vec G^T] ~ (sum l l^T) x (sum r r^T) / (N M)    N samples, M positions: "expand", the terms of the
                                                                     positions are taken as independent of each other
    EK-FAC   its eigenvectors U_L, U_R with the eigenvalues s = E[(U_L^T G U_R)^2], of all that have these eigenvectors
             the nearest to E[vec G vec G^T]

A position with l_r = 0 or r_r = 0 is no part of a gradient and is in no sum, so that padding changes nothing. Uses of
several kinds (a tied head and embedding) have sums of their own, because their sides differ in scale and meaning, and
the block is the Kronecker product nearest to the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._factors import Gather, Outer
from ghostfunc._fisher import Block

_TILE_BYTES = 16 << 20

LOOK_UP = "look-up"  # a kind of use, whose moment on the table's side is diagonal

Rows = Outer | Gather


@dataclass(eq=False)
class Sums:
    """Sums over the positions of one kind of use; a vector where only the diagonal of a side is kept.

    Attributes:
        left: sum of l l^T, `[p, p]` or `[p]`.
        right: sum of r r^T, `[q, q]` or `[q]`.
        positions: how many are in the sums, `[]`.
    """

    left: Tensor
    right: Tensor
    positions: Tensor


@dataclass(eq=False)
class Matrix:
    """Entries of a parameter that are used as one matrix `[p, q]`, and what is known of its gradients.

    Attributes:
        shape: `(p, q)`.
        entries: where they are in the flat parameter, `[p * q]`; None for all of them in order.
        max_side: of a longer side, only the diagonal of its moment is kept.
        sums: by kind of use.
        block: eigenvectors, and K-FAC's eigenvalues, once there are all sums.
        squares: the sum over samples of (U_L^T G_i U_R)^2, `[p, q]`.
    """

    shape: tuple[int, int]
    entries: Int[Tensor, " pq"] | None
    max_side: int
    sums: dict[str, Sums] = field(default_factory=dict)
    block: Block | None = None
    squares: Float[Tensor, "p q"] | None = None

    def is_of(self, shape: tuple[int, int], entries: Tensor | None) -> bool:
        """Whether these are the entries, in this order."""
        if shape != self.shape or entries is None or self.entries is None:
            return shape == self.shape and entries is self.entries
        return torch.equal(entries, self.entries)

    def add(self, factors: Sequence[Rows]) -> None:
        """Add the positions of some samples, from the factors of all uses."""
        for factor in factors:
            self._add(factor)

    def _add(self, factor: Rows) -> None:
        p, q = self.shape
        right = (factor.g if isinstance(factor, Gather) else factor.right).flatten(0, 1)  # [N, q]
        if isinstance(factor, Gather):
            kind, ids = LOOK_UP, factor.ids.flatten()
            live = (right != 0).any(1).to(right.dtype)  # [N]
            left_moment = right.new_zeros(p).index_add_(0, ids, live)
        else:
            kind, left = (
                ("transposed linear map" if factor.transposed else "linear map"),
                factor.left.flatten(0, 1),
            )  # [N, p]
            live = ((left != 0).any(1) & (right != 0).any(1)).to(right.dtype)
            left_moment = _moment(left, live, dense=p <= self.max_side)
        here = Sums(left_moment, _moment(right, live, dense=q <= self.max_side), live.sum())
        sums = self.sums.setdefault(kind, here)
        if sums is not here:
            sums.left += here.left
            sums.right += here.right
            sums.positions += here.positions

    def zero_sums(self, kind: str, dtype: torch.dtype, device: torch.device) -> Sums:
        """The sums of a kind of use over no positions."""
        p, q = self.shape
        left = (p, p) if p <= self.max_side and kind != LOOK_UP else (p,)
        right = (q, q) if q <= self.max_side else (q,)
        return Sums(*(torch.zeros(size, dtype=dtype, device=device) for size in (left, right, ())))

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(torch.isfinite(side).all()) for sums in self.sums.values() for side in (sums.left, sums.right))

    def diagonalise(self, samples: int) -> None:
        """Make K-FAC's block, as the mean over so many samples, not damped yet."""
        lefts = [sums.left / sums.positions.clamp(min=1) for sums in self.sums.values()]
        rights = [sums.right / samples for sums in self.sums.values()]
        (left_values, left), (right_values, right) = (_eigen(side) for side in nearest_kronecker(lefts, rights))
        self.block = Block(torch.outer(left_values, right_values), 0.0, left, right, self.entries)

    def zero_block(self) -> Block:
        """Zeros of the shapes that `diagonalise` gives a block."""
        p, q = self.shape
        sums = list(self.sums.values())
        like = sums[0].right
        left = like.new_zeros(p, p) if any(s.left.dim() == 2 for s in sums) else None
        right = like.new_zeros(q, q) if any(s.right.dim() == 2 for s in sums) else None
        return Block(like.new_zeros(p, q), 0.0, left, right, self.entries)

    def add_squares(self, factors: Sequence[Rows]) -> None:
        """Add (U_L^T G_i U_R)^2 of some samples, from the factors of all uses."""
        assert self.block is not None
        if self.squares is None:
            self.squares = torch.zeros_like(self.block.values)
        left, right = self.block.left, self.block.right
        maps, look_ups = [], []
        for factor in factors:
            if isinstance(factor, Outer):
                maps.append((_rotated(factor.left, left), _rotated(factor.right, right)))
            elif left is not None:
                maps.append((left[factor.ids], _rotated(factor.g, right)))
            else:
                look_ups.append((factor.ids, _rotated(factor.g, right)))
        lefts, rights = (torch.cat(parts, 1) for parts in zip(*maps, strict=True)) if maps else (None, None)
        ids, rows = (torch.cat(parts, 1) for parts in zip(*look_ups, strict=True)) if look_ups else (None, None)
        add_squares(self.squares, lefts, rights, ids, rows)

    def correct(self, samples: int) -> None:
        """Put EK-FAC's eigenvalues, the mean over so many samples, in the block's place of K-FAC's."""
        assert self.block is not None
        values = torch.zeros_like(self.block.values) if self.squares is None else self.squares / samples
        self.block = replace(self.block, values=values)


def _moment(rows: Float[Tensor, "n d"], live: Float[Tensor, " n"], *, dense: bool) -> Tensor:
    """The sum of rows r r^T, each as often as it is live: `[d, d]`, or its diagonal `[d]`."""
    return (rows * live.unsqueeze(1)).t() @ rows if dense else live @ rows.square()


def _rotated(rows: Float[Tensor, "b r d"], basis: Float[Tensor, "d d"] | None) -> Float[Tensor, "b r d"]:
    return rows if basis is None else rows @ basis


def _eigen(moment: Tensor) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"] | None]:
    """Eigenvalues, and eigenvectors as columns; None where the moment is a diagonal `[d]`."""
    if moment.dim() == 1:
        return moment, None
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0), vectors.contiguous()  # a negative one is rounding


def nearest_kronecker(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The Kronecker product L x R that is nearest, in Frobenius' norm, to a sum of such products of PSD matrices.

    L x R is nearest to sum_u L_u x R_u where vec(L) vec(R)^T is nearest to Z = sum_u vec(L_u) vec(R_u)^T (Van Loan and
    Pitsianis, 1993): L and R are made of Z's first singular vectors, sums of the L_u and of the R_u. Inner products
    of PSD matrices are not negative, so that the coefficients are not either (Perron-Frobenius), and L and R are PSD.

    Args:
        lefts: L_u, `[p, p]`, or `[p]` for a diagonal one.
        rights: R_u, `[q, q]` or `[q]`.

    Returns:
        `(L, R)`, diagonal where all of them are.
    """
    lefts, rights = _alike(lefts), _alike(rights)
    if len(lefts) == 1:
        return lefts[0], rights[0]
    tiny = torch.finfo(lefts[0].dtype).tiny
    left_norms = torch.stack([left.norm() for left in lefts])
    right_norms = torch.stack([right.norm() for right in rights])
    weights = left_norms * right_norms
    scale = weights.max().clamp(min=tiny)  # gradients are small numbers, and Gram matrices have them to the fourth
    a = torch.stack([left.flatten() for left in lefts]) * (weights / scale / left_norms.clamp(min=tiny)).unsqueeze(1)
    b = torch.stack([right.flatten() for right in rights]) / right_norms.clamp(min=tiny).unsqueeze(1)  # Z = scale a^T b
    values, vectors = torch.linalg.eigh(b @ b.t())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()  # of the Gram matrix of the R_u
    first = torch.linalg.eigh(root @ (a @ a.t()) @ root)[1][:, -1]
    left = (root @ first).abs() @ a  # Z y / scale, y = sum_u beta_u vec(R_u) of length 1
    right = (a @ left) @ b / left.norm().square().clamp(min=tiny)  # Z^T x / |x|^2 of x = left
    return scale * left.view_as(lefts[0]), right.view_as(rights[0])


def _alike(moments: Sequence[Tensor]) -> list[Tensor]:
    """Diagonal ones as matrices, where not all of them are diagonal."""
    if all(moment.dim() == 1 for moment in moments):
        return list(moments)
    return [torch.diag(moment) if moment.dim() == 1 else moment for moment in moments]


def add_squares(
    squares: Float[Tensor, "p q"],
    left: Float[Tensor, "b r p"] | None,
    right: Float[Tensor, "b r q"] | None,
    ids: Int[Tensor, "b s"] | None,
    rows: Float[Tensor, "b s q"] | None,
) -> None:
    """Add sum_i G_i^2 to `squares`, G_i = left_i^T right_i + onehot(ids_i)^T rows_i, in tiles: never `[B, p, q]`.

    Args:
        squares: what is added to.
        left: of linear maps, rotated; None where there are none.
        right: likewise.
        ids: of look-ups; None where there are none.
        rows: their grad-outputs, rotated.
    """
    if left is None or right is None:
        if ids is not None and rows is not None:
            _add_squares_of_look_ups(squares, ids, rows)
        return
    if ids is None and left.shape[1] == 1:
        squares += left.squeeze(1).square().t() @ right.squeeze(1).square()
        return
    samples, (p, q) = len(left), squares.shape
    height = max(1, min(p, _TILE_BYTES // max(1, samples * q * squares.element_size())))
    for start in range(0, p, height):
        stop = min(start + height, p)
        tile = torch.bmm(left[:, :, start:stop].transpose(1, 2), right)  # [B, t, q]
        if ids is not None and rows is not None:
            sample, position = ((ids >= start) & (ids < stop)).nonzero(as_tuple=True)
            place = sample * (stop - start) + ids[sample, position] - start
            tile.view(-1, q).index_add_(0, place, rows[sample, position])
        squares[start:stop] += tile.square_().sum(0)


def _add_squares_of_look_ups(
    squares: Float[Tensor, "p q"], ids: Int[Tensor, "b s"], rows: Float[Tensor, "b s q"]
) -> None:
    """The same of look-ups alone: only the rows of the table that a sample looks up have a gradient in it."""
    p = len(squares)
    sample = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    pairs, place = (sample * p + ids).unique(return_inverse=True)
    gradients = rows.new_zeros(len(pairs), rows.shape[2]).index_add_(0, place.flatten(), rows.flatten(0, 1))
    squares.index_add_(0, pairs % p, gradients.square_())
