"""The scores of all rows of a store, summed up by domains: means, and how they are spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostfunc.index import Store, stream_scores
from ghostfunc.report._data import Distribution, DomainMeans, Spread

BINS = 60
EXAMINED_ROWS = 50_000
EXAMINED_SCORES = 20_000_000


class Moments(NamedTuple):
    """The scores of all rows with each query.

    Attributes:
        mean: `[Q]`.
        deviation: the standard deviation, `[Q]`.
        positive: the share of positive ones, `[Q]`.
    """

    mean: list[float]
    deviation: list[float]
    positive: list[float]


class Survey(NamedTuple):
    """What the scores of all rows come to.

    Attributes:
        moments: by query, of what passages are ranked by.
        means: by domains, of inner products and cosines.
        spreads: by query domain, of what passages are ranked by.
        examined: of how many rows the spreads are, or 0 if of all.
    """

    moments: Moments
    means: DomainMeans
    spreads: tuple[Spread, ...]
    examined: int


class _Domains(NamedTuple):
    names: tuple[str, ...]
    codes: np.ndarray
    counts: tuple[int, ...]


def survey(
    store: Store, queries: Tensor, query_domains: Sequence[str], row_domains: Sequence[str], metric: str
) -> Survey:
    """Look at the scores of all rows with all queries, in two passes over the store.

    Args:
        store: the store.
        queries: `[Q, dim]`.
        query_domains: of each query.
        row_domains: of each row of the store.
        metric: "dot" or "cosine", what passages are ranked by.

    Returns:
        What they come to. Means are of all rows; spreads of all, or of EXAMINED_ROWS that are evenly picked from each
        domain.
    """
    asked, held = _domains(query_domains), _domains(row_domains)
    limit = max(len(held.names), min(EXAMINED_ROWS, EXAMINED_SCORES // len(queries)))
    picked = _evenly(held, limit)
    other = _Sums(len(queries), held)
    for rows, scores in stream_scores(store, queries, metric="cosine" if metric == "dot" else "dot"):
        other.add(rows, scores)
    ranked, kept = _Sums(len(queries), held), []
    for rows, scores in stream_scores(store, queries, metric=metric):
        ranked.add(rows, scores)
        kept.append(scores[:, torch.from_numpy(picked[rows.cpu().numpy()]).to(scores.device)].cpu().numpy())
    by_metric = {metric: ranked.by_domain(asked), ("cosine" if metric == "dot" else "dot"): other.by_domain(asked)}
    means = DomainMeans(asked.names, asked.counts, held.names, held.counts, by_metric["dot"], by_metric["cosine"])
    sample, codes = np.concatenate(kept, 1), held.codes[picked]
    spreads = tuple(
        _spread(name, sample[asked.codes == place], codes, held.names) for place, name in enumerate(asked.names)
    )
    examined = 0 if picked.all() else int(picked.sum())
    return Survey(ranked.moments(), means, spreads, examined)


def _domains(of_each: Sequence[str]) -> _Domains:
    names, codes, counts = np.unique(
        np.asarray(of_each, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    return _Domains(tuple(map(str, names)), codes, tuple(map(int, counts)))


def _evenly(held: _Domains, limit: int) -> np.ndarray:
    """Which rows to look at, `[rows]`: all, or of each domain at most its share of the limit, evenly spaced."""
    if len(held.codes) <= limit:
        return np.ones(len(held.codes), dtype=bool)
    picked = np.zeros(len(held.codes), dtype=bool)
    share = limit // len(held.names)
    for code, count in enumerate(held.counts):
        own = np.flatnonzero(held.codes == code)
        picked[own[np.linspace(0, count - 1, min(share, count)).round().astype(int)]] = True
    return picked


class _Sums:
    """Running sums of scores, in float64."""

    def __init__(self, queries: int, held: _Domains) -> None:
        self._held, self._codes = held, torch.from_numpy(held.codes)
        self._by_domain = torch.zeros(queries, len(held.names), dtype=torch.float64)
        self._squares = torch.zeros(queries, dtype=torch.float64)
        self._positive = torch.zeros(queries, dtype=torch.float64)

    def add(self, rows: Tensor, scores: Tensor) -> None:
        exact = scores.double().cpu()
        self._by_domain.index_add_(1, self._codes[rows.cpu()], exact)
        self._squares += exact.square().sum(1)
        self._positive += (exact > 0).sum(1)

    def moments(self) -> Moments:
        count = len(self._held.codes)
        mean = self._by_domain.sum(1) / count
        deviation = (self._squares / count - mean.square()).clamp(min=0).sqrt()
        return Moments(mean.tolist(), deviation.tolist(), (self._positive / count).tolist())

    def by_domain(self, asked: _Domains) -> tuple[tuple[float, ...], ...]:
        means = self._by_domain.numpy() / np.asarray(self._held.counts)
        table = (means[asked.codes == place].mean(0) for place in range(len(asked.names)))
        return tuple(tuple(map(float, row)) for row in table)


def _spread(query_domain: str, scores: np.ndarray, codes: np.ndarray, names: tuple[str, ...]) -> Spread:
    low, high = (float(end) for end in np.percentile(scores, (1, 99)))
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = -1.0, 1.0
    found = []
    for code, name in enumerate(names):
        own = scores[:, codes == code].ravel()
        p5, p25, p50, p75, p95 = map(float, np.percentile(own, (5, 25, 50, 75, 95)))
        histogram = tuple(int(count) for count in np.histogram(own, bins=BINS, range=(low, high))[0])
        found.append(Distribution(name, len(own), (p5, p25, p50, p75, p95), float((own > 0).mean()), histogram))
    return Spread(query_domain, low, high, tuple(found))
