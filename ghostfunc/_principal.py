"""Projection matrices from data: the directions in which the per-sample gradients of each parameter are large.

    M_in = sum_b G_b G_b^T  [d_in, d_in],    M_out = sum_b G_b^T G_b  [d_out, d_out],    P = their leading eigenvectors

G_b is the gradient of sample b as a block `[d_in, d_out]`; blocks side by side share their matrices and add up. From
factors G_b = A^T B the moments need no G_b:  M_in = sum_b A^T (B B^T) A,  M_out = sum_b B^T (A A^T) B.
(The higher-order SVD of the stack of gradients: De Lathauwer et al., 2000, truncated in both of its sides.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._batch import batch_size, plain
from ghostfunc._blocks import Blocks, Box, place_of
from ghostfunc._call import Call
from ghostfunc._factors import Factor, Gather, Later, Outer
from ghostfunc._nesting import unrecorded
from ghostfunc._products import sites_by_name
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Ranks
from ghostfunc._run_result import Run
from ghostfunc._sites import Site
from ghostfunc._sketches import generator_of

LARGEST = 16384  # a side with more entries keeps those of the largest gradients: its moments would not fit
_OVERSAMPLING = 16  # columns beside those that are wanted, so that these converge
_MOST_ROUNDS = 200
_CONVERGED = 1e-10


class Sides(NamedTuple):
    """What is to be found for one parameter.

    Attributes:
        shape: the parameter's.
        blocks: the parameter as blocks `[d_in, d_out]`.
        k_in: columns of P_in.
        k_out: columns of P_out.
    """

    shape: tuple[int, ...]
    blocks: Blocks
    k_in: int
    k_out: int


def principal_matrices(
    call: Call, batches: Iterable[Any], sides: Mapping[str, Sides], seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices `(P_in[d_in, k_in], P_out[d_out, k_out])` of each parameter, in float64 on the CPU.

    Args:
        call: the model and its parameters; with ranks, the data is all ranks'.
        batches: the data, at least one batch, of this rank or of another.
        sides: the parameters.
        seed: of the numbers that eigenvectors are searched from.

    Returns:
        Matrices with orthonormal columns, those of the largest eigenvalues first, each with the sign that makes its
        largest entry positive.

    Raises:
        ValueError: if there is no batch, or no gradient of a parameter in any of them.
    """
    call = call._replace(names=frozenset(sides))
    moments = {name: (_Moment.of(s.blocks.d_in, call), _Moment.of(s.blocks.d_out, call)) for name, s in sides.items()}
    seen = 0
    with call.together():
        for batch in batches:
            seen += 1
            _add(call, plain(batch), sides, moments)
    if call.ranks is not None:
        _sum_over_ranks(call.ranks, moments)
    if not call.over_ranks(seen):
        raise ValueError("kind='pca' takes its matrices from data, and batches= has none.")
    empty = [name for name, (of_in, _) in moments.items() if not bool((of_in.trace > 0).all())]
    if empty:
        raise ValueError(
            f"{', '.join(empty)}: no sample of the data has a gradient there, so that it has no leading directions. "
            "Give more data in batches=, leave these out with layers=, or take a random kind."
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with call.together():
        for number, (name, of) in enumerate(sides.items()):
            if call.ranks is None or number % call.ranks.size == call.ranks.rank:
                found[name] = (
                    moments[name][0].leading(of.k_in, generator_of(seed, name, "in")),
                    moments[name][1].leading(of.k_out, generator_of(seed, name, "out")),
                )
    return found if call.ranks is None else _of_all_ranks(call.ranks, found, sides)


def _sum_over_ranks(ranks: Ranks, moments: Mapping[str, tuple[_Moment, _Moment]]) -> None:
    """Put the moments of all ranks' data in the place of this rank's."""
    sums = ranks.sums({f"{side}.{name}": m.sum for name, both in moments.items() for side, m in enumerate(both)})
    for name, both in moments.items():
        for side, moment in enumerate(both):
            moment.sum = sums[f"{side}.{name}"]


def _of_all_ranks(
    ranks: Ranks, found: Mapping[str, tuple[Tensor, Tensor]], sides: Mapping[str, Sides]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices that each rank has found, on all: their last digits are those of one machine."""
    tensors: dict[str, Tensor] = {}
    for name, of in sides.items():
        sizes = (of.blocks.d_in, of.k_in), (of.blocks.d_out, of.k_out)
        mine = found.get(name) or [torch.zeros(size, dtype=torch.float64) for size in sizes]
        tensors |= {f"{side}.{name}": matrix.to(ranks.device) for side, matrix in enumerate(mine)}
    sums = {name: matrix.cpu() for name, matrix in ranks.sums(tensors).items()}  # one rank's, zeros on the others
    return {name: (sums[f"0.{name}"], sums[f"1.{name}"]) for name in sides}


class _Moment:
    """A sum of second moments: `[d, d]`, or of a large side the diagonal alone, `[d]`."""

    def __init__(self, sum: Tensor) -> None:
        self.sum = sum

    @classmethod
    def of(cls, d: int, call: Call) -> _Moment:
        return cls(torch.zeros((d,) if d > LARGEST else (d, d), dtype=call.dtype, device=call.device))

    @property
    def whole(self) -> bool:
        return self.sum.dim() == 2

    @property
    def trace(self) -> Tensor:
        return self.sum.trace() if self.whole else self.sum.sum()

    def add_rows(self, rows: Tensor, gram: Tensor) -> None:
        """Add sum_b rows_b^T gram_b rows_b: rows `[B, R, d]`, the other side's Gram matrices `[B, R, R]`."""
        weighted = gram @ rows  # [B, R, d]
        self.sum += rows.flatten(0, 1).t() @ weighted.flatten(0, 1) if self.whole else (rows * weighted).sum((0, 1))

    def add_ids(self, ids: Tensor, gram: Tensor) -> None:
        """The same for rows that are one-hot, `[B, R]`."""
        if self.whole:
            places = ids.unsqueeze(2).expand_as(gram), ids.unsqueeze(1).expand_as(gram)
            self.sum.index_put_(places, gram, accumulate=True)
        else:
            same = ids.unsqueeze(2) == ids.unsqueeze(1)
            self.sum.index_add_(0, ids.flatten(), (gram * same).sum(2).flatten())

    def add_matrices(self, matrices: Tensor) -> None:
        """Add sum_n matrices_n matrices_n^T, `[N, d, other]`."""
        flat = matrices.transpose(0, 1).flatten(1)  # [d, N * other]
        self.sum += flat @ flat.t() if self.whole else flat.square().sum(1)

    def leading(self, k: int, generator: torch.Generator) -> Tensor:
        """The k leading eigenvectors `[d, k]`, by subspace iteration; of a diagonal, coordinates."""
        moment = self.sum.double().cpu()
        d = len(moment)
        if not self.whole:
            kept = torch.topk(moment, k).indices.sort().values
            return torch.zeros(d, k, dtype=torch.float64).index_put_((kept, torch.arange(k)), torch.ones(()).double())
        basis = torch.linalg.qr(torch.randn(d, min(d, k + _OVERSAMPLING), generator=generator, dtype=torch.float64)).Q
        before = torch.zeros(k, dtype=torch.float64)
        for _ in range(_MOST_ROUNDS):
            basis = torch.linalg.qr(moment @ basis).Q
            values, vectors = torch.linalg.eigh(basis.t() @ moment @ basis)
            found = values.flip(0)[:k]
            if bool(((found - before).abs() <= _CONVERGED * found[0]).all()):
                break
            before = found
        leading = (basis @ vectors).flip(1)[:, :k]
        largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
        return leading * largest.sign()


def _add(call: Call, batch: Any, sides: Mapping[str, Sides], moments: Mapping[str, tuple[_Moment, _Moment]]) -> None:
    """Add the moments of one batch: inside the backward where a block has one use, else from gradients after it."""
    samples = batch_size(batch, "given")
    inside: set[str] = set()

    def plan(sites: list[Site]) -> None:
        for name, used in sites_by_name(sites).items():
            boxes = [_whole_block(site, sides[name].blocks) if name in sides else None for site in used]
            numbers = {box.block for box in boxes if box is not None}
            if len(numbers) == len(used):
                inside.add(name)
                for site, box in zip(used, boxes, strict=True):
                    assert box is not None
                    site.treatment = "fused"
                    site.contract = partial(contract, moments[name], box)

    def contract(of_name: tuple[_Moment, _Moment], box: Box, factor: Factor) -> tuple[None, dict[str, Tensor]]:
        with unrecorded():
            of_in, of_out = of_name
            _add_factor(of_in if box.rows_in else of_out, of_out if box.rows_in else of_in, factor)
        return None, {}

    before = RandomState.of(call.device)
    try:
        result = call.run(batch, samples, train=samples, factors=call.names, dropout=False, plan=plan)
    finally:
        before.restore()
    with unrecorded():
        for name in sides:
            if name not in inside and result.sites(name):
                of_in, of_out = moments[name]
                for gradients in _gradients(result, name, samples, sides[name].shape):
                    blocks = sides[name].blocks.of(gradients.to(call.dtype)).flatten(0, 1)  # [b * count, d_in, d_out]
                    of_in.add_matrices(blocks)
                    of_out.add_matrices(blocks.transpose(1, 2))


def _whole_block(site: Site, blocks: Blocks) -> Box | None:
    """The block that a use is, with nothing left out and nothing in another order; None where it is none."""
    place = place_of(site, blocks) if site.kind in ("outer", "gather") else None
    if not isinstance(place, Box):
        return None
    everything = (slice(0, blocks.d_in), slice(0, blocks.d_out))
    return place if (place.inside, place.outside) == everything else None


def _add_factor(of_rows: _Moment, of_cols: _Moment, factor: Factor) -> None:
    """Add the moments of a use from its factor, both sides as the weight is stored."""
    if isinstance(factor, Outer):
        left, right = factor.left, factor.right  # [B, R, p], [B, R, q]
        of_rows.add_rows(left, right @ right.transpose(1, 2))
        of_cols.add_rows(right, left @ left.transpose(1, 2))
    else:
        assert isinstance(factor, Gather)
        of_rows.add_ids(factor.ids, factor.g @ factor.g.transpose(1, 2))
        of_cols.add_rows(factor.g, (factor.ids.unsqueeze(2) == factor.ids.unsqueeze(1)).to(factor.g.dtype))


def _gradients(result: Run, name: str, samples: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The per-sample gradients `[b, *shape]` of a parameter, all its uses, some samples at a time."""
    step = Later.at_a_time(prod(shape), 8)
    for start in range(0, samples, step):
        of_uses = [
            result.pull(
                site.tracked, name, result.factors[site].part(start, start + step).dense(site.tracked.real.shape)
            ).reshape(-1, *shape)
            for site in result.sites(name)
        ]
        yield torch.stack(of_uses).sum(0)
