"""Scan: one pass over some rows and columns of a store, the scores of each piece, and the best of them so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._axes import match_layers
from ghostfunc._call import Layers
from ghostfunc.index._store import Store

METRICS = ("dot", "cosine")
PIECE_BYTES = 8 << 20  # of rows, and of scores: a piece that stays in the cache is twice as fast as one that does not
KEY_BYTES = 32 << 20
LEAST_ROWS = 256
SMALL = 1e-15  # a length below which float32 squares lose entries

Rows = Tensor | Sequence[int]
Precondition = Callable[[Tensor], Tensor]


class Hits(NamedTuple):
    """The best rows of each query, best first; of rows with equal scores the lower one comes first.

    Attributes:
        scores: `[Q, k]`.
        rows: `[Q, k]`, numbers of the store's rows.
    """

    scores: Float[Tensor, "q k"]
    rows: Int[Tensor, "q k"]


class _Part(NamedTuple):
    """Columns that are scored together.

    Attributes:
        runs: the columns, counted from the first one that is read.
        queries: of each run, `[Q, c]`; of unit length over all runs for "cosine".
    """

    runs: list[slice]
    queries: list[Tensor]


class Scan:
    """One pass over the chosen rows and columns of a store."""

    def __init__(
        self,
        store: Store,
        queries: Tensor,
        metric: str,
        layers: Layers,
        precondition: Precondition | None,
        rows: Rows | None,
    ) -> None:
        self.store, self.cosine = store, is_cosine(metric)
        self.queries = checked_queries(store, queries, precondition)
        slices = store.slices or {"all": slice(0, store.dim)}
        chosen = match_layers(layers, list(slices))
        if not chosen:
            raise ValueError(f"layers={layers!r} choose nothing; the store has {', '.join(slices)}.")
        self.slices = {name: columns for name, columns in slices.items() if name in chosen}
        self.columns = slice(min(s.start for s in self.slices.values()), max(s.stop for s in self.slices.values()))
        self.rows = None if rows is None else _checked_rows(rows, store.rows)

    def best(self, k: int, *, least: bool) -> Best:
        """An empty ranking of these queries."""
        return Best(len(self.queries), k, self.queries.device, least=least)

    def part(self, slices: Iterable[slice]) -> _Part:
        """What some columns are scored with."""
        runs = _joined(slices)
        queries = [self.queries[:, run] for run in runs]
        if self.cosine:
            lengths = row_lengths(queries)[:, None]
            queries = [query / lengths for query in queries]
        first = self.columns.start
        return _Part([slice(run.start - first, run.stop - first) for run in runs], [q.contiguous() for q in queries])

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(rows [n], their columns [n, c])`, ascending; on the queries' device."""
        at_a_time = rows_at_a_time(self.columns.stop - self.columns.start, len(self.queries))
        device = self.queries.device
        if self.rows is None:
            for start, piece in self.store.stream(columns=self.columns, rows_at_a_time=at_a_time):
                yield torch.arange(start, start + len(piece), device=device), piece.to(device)
            return
        windows = (self.rows // at_a_time).unique_consecutive(return_counts=True)[1].tolist()
        for rows in self.rows.split(windows):
            start = int(rows[0])
            piece = self.store.read(start, int(rows[-1]) + 1, self.columns)
            yield rows.to(device), piece[rows - start].to(device)

    def score(self, part: _Part, piece: Tensor) -> Tensor:
        """Scores `[Q, n]` of the rows of a piece."""
        columns = [piece[:, run] for run in part.runs]
        scores = part.queries[0] @ columns[0].t()
        for query, column in zip(part.queries[1:], columns[1:], strict=True):
            scores.addmm_(query, column.t())
        return scores.div_(row_lengths(columns)) if self.cosine else scores

    def scores(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(rows [n], scores [Q, n])` over all chosen columns."""
        part = self.part(self.slices.values())
        for numbers, piece in self.pieces():
            yield numbers, self.score(part, piece)


class Best:
    """The best rows so far of each query, from pieces that come in ascending order of rows."""

    def __init__(self, queries: int, k: int, device: torch.device, *, least: bool) -> None:
        if k < 1:
            raise ValueError(f"k={k}: expected at least one row for each query.")
        self.sign, self.seen = -1 if least else 1, 0
        self.scores = torch.full((queries, k), -torch.inf, dtype=torch.float32, device=device)
        self.rows = torch.full((queries, k), -1, device=device)

    def add(self, rows: Tensor, scores: Tensor) -> None:
        """Take in the scores `[Q, n]` of some rows, which are above all rows before."""
        self.seen += len(rows)
        extreme = scores.amax(1) if self.sign > 0 else -scores.amin(1)
        if not extreme.isfinite().all():
            query = int((~extreme.isfinite()).nonzero()[0])
            raise ValueError(f"query {query} has scores that are too large for float32: scale it down.")
        # An equal score is no better than one of a lower row, and rows come in ascending order.
        better = (extreme > self.scores[:, -1]).nonzero().flatten()
        for some in better.split(max(1, KEY_BYTES // (8 * len(rows)))):
            values, places = _highest(self.sign * scores[some], self.scores.shape[1])
            values = torch.cat([self.scores[some], values], 1)
            numbers = torch.cat([self.rows[some], rows[places]], 1)
            order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.scores.shape[1]]
            self.scores[some], self.rows[some] = values.gather(1, order), numbers.gather(1, order)

    def hits(self) -> Hits:
        """The ranking."""
        width = min(self.seen, self.scores.shape[1])
        return Hits(self.sign * self.scores[:, :width], self.rows[:, :width])


def _highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row `[q, n]` with their places, highest first; of equal ones those in front.

    `topk` keeps any of equal numbers. So the numbers become integers in the same order, of 64 bits, whose lower half is
    the place: no two are equal.
    """
    bits = (scores + 0.0).view(torch.int32)  # minus zero becomes zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys = (ordered << 32) - torch.arange(scores.shape[1], device=scores.device)
    places = keys.topk(min(k, scores.shape[1]), 1).indices
    return scores.gather(1, places), places


def is_cosine(metric: str) -> bool:
    """Whether a metric is "cosine"; ValueError if it is no metric."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: expected {' or '.join(map(repr, METRICS))}.")
    return metric == "cosine"


def checked_queries(store: Store, queries: Tensor, precondition: Precondition | None = None) -> Tensor:
    """Queries `[Q, dim]` in float32, preconditioned.

    Raises:
        ValueError: if they have another shape or are not finite, before or after.
    """
    if queries.dim() != 2 or queries.shape[1] != store.dim:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)}; the store needs [Q, {store.dim}]. Project them with the "
            "store's own projection."
        )
    found = queries
    for what, change in (("queries", None), ("queries after precondition=", precondition)):
        found = (found if change is None else change(found)).detach().float()
        if found.shape != queries.shape:
            raise ValueError(f"{what} have shape {tuple(found.shape)}, expected {tuple(queries.shape)}.")
        if not (finite := found.isfinite().all(1)).all():
            raise ValueError(f"{what}: rows {(~finite).nonzero().flatten().tolist()} are not finite.")
    return found


def _checked_rows(rows: Rows, count: int) -> Tensor:
    numbers = torch.as_tensor(rows)
    if numbers.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if numbers.dim() != 1 or numbers.dtype == torch.bool or numbers.is_floating_point():
        raise ValueError(
            f"rows= has shape {tuple(numbers.shape)} and dtype {numbers.dtype}; expected row numbers, [n] integers "
            "(of a mask, mask.nonzero().flatten())."
        )
    numbers = numbers.to("cpu", torch.int64).unique()
    if numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(
            f"rows= goes from {int(numbers[0])} to {int(numbers[-1])}; the store has rows 0 to {count - 1}."
        )
    return numbers


def _joined(slices: Iterable[slice]) -> list[slice]:
    """Slices in ascending order, those that touch as one."""
    runs: list[slice] = []
    for columns in sorted(slices, key=lambda s: s.start):
        if runs and runs[-1].stop == columns.start:
            runs[-1] = slice(runs[-1].start, columns.stop)
        else:
            runs.append(columns)
    return runs


def row_lengths(columns: list[Tensor]) -> Tensor:
    """Euclidean lengths `[n]` of rows that lie in several tensors `[n, c]`; 1 for rows of zeros."""
    lengths = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(c, dim=1) for c in columns]), dim=0)
    outside = (lengths < SMALL) | lengths.isinf()
    if outside.any():  # squares of such entries are zero or infinite in float32
        exact = torch.linalg.vector_norm(torch.cat([c[outside] for c in columns], 1).double(), dim=1)
        lengths[outside] = torch.where(exact > 0, exact, 1).float()
    return lengths


def rows_at_a_time(width: int, queries: int) -> int:
    """How many rows a piece has."""
    return max(LEAST_ROWS, PIECE_BYTES // (4 * max(width, queries)))
