"""Exact search: the rows of a store with the highest (or lowest) scores against queries, in one streaming pass.

    score(query, row) = <query, row>                        metric="dot"
    score(query, row) = <query, row> / (|query| |row|)      metric="cosine"

A piece of the store's rows is in memory at a time, and the scores of that piece: never all rows, nor all scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ghostfunc._call import Layers
from ghostfunc.index._scan import Hits, Precondition, Rows, Scan
from ghostfunc.index._store import Store


class Ends(NamedTuple):
    """Both ends of a ranking.

    Attributes:
        most: the rows with the highest scores, the highest first.
        least: the rows with the lowest scores, the lowest first.
    """

    most: Hits
    least: Hits


def search(
    store: Store,
    queries: Tensor,
    k: int = 10,
    *,
    metric: str = "dot",
    layers: Layers = "",
    precondition: Precondition | None = None,
    least: bool = False,
    rows: Rows | None = None,
) -> Hits:
    """The k rows of a store with the highest scores against each query, exactly.

    One pass over the store serves all queries. It computes on the queries' device, in float32, with all of torch's
    threads; memory is that of some ten MB of rows and of their scores.

    Args:
        store: the store.
        queries: `[Q, dim]`, in the columns of `store.slices`; what `project_queries` gives.
        k: how many rows for each query.
        metric: "dot", the inner product, or "cosine"; a row or query of zeros has cosine 0 with everything.
        layers: comma-separated name parts, matched at dots, of `store.slices`: only their columns enter, the norms of
            "cosine" included. Empty for all columns. Or names, or a function of the name.
        precondition: applied to the queries first, `[Q, dim] -> [Q, dim]`; `inverse_gram` makes one.
        least: the lowest scores instead, the lowest first: for "dot" and "cosine" the most opposing rows.
        rows: the only rows to look at, in any order; `rows_of_domain` gives those of domains. None for all.

    Returns:
        `Hits(scores[Q, k], rows[Q, k])`, with fewer columns where there are fewer rows than k. Rows with equal scores
        are in the order of their numbers.

    Raises:
        ValueError: for queries of another dimension or that are not finite, for k below 1, rows outside of the store,
            an unknown metric, layers that match nothing, and scores too large for float32.
        StoreError: if the store is not complete, or damaged.

    Example:
        >>> import tempfile, pyarrow, torch
        >>> from ghostfunc.index import Store, StoreWriter
        >>> folder = tempfile.mkdtemp()
        >>> source = StoreWriter(folder, dim=2).source("poems", fingerprint="0f", rows=None)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> _ = source.append(rows, pyarrow.table({"domain": ["haiku", "ode", "ode"]}))
        >>> scores, rows = search(Store(folder), torch.tensor([[1.0, 1.0]]), k=2)
        >>> scores, rows
        (tensor([[6., 2.]]), tensor([[2, 1]]))
    """
    scan = Scan(store, queries, metric, layers, precondition, rows)
    best = scan.best(k, least=least)
    for numbers, scores in scan.scores():
        best.add(numbers, scores)
    return best.hits()


def search_ends(
    store: Store,
    queries: Tensor,
    k: int = 10,
    *,
    metric: str = "dot",
    layers: Layers = "",
    precondition: Precondition | None = None,
    rows: Rows | None = None,
) -> Ends:
    """The k rows with the highest scores against each query, and the k with the lowest, in one pass.

    Args:
        store: as in `search`.
        queries: as in `search`.
        k: how many rows at each end.
        metric: as in `search`.
        layers: as in `search`.
        precondition: as in `search`.
        rows: as in `search`.

    Returns:
        `Ends(most, least)`, each as `search` gives it.

    Raises:
        ValueError: as in `search`.
        StoreError: as in `search`.
    """
    scan = Scan(store, queries, metric, layers, precondition, rows)
    ends = [scan.best(k, least=least) for least in (False, True)]
    for numbers, scores in scan.scores():
        for end in ends:
            end.add(numbers, scores)
    return Ends(*(end.hits() for end in ends))


def search_layers(
    store: Store,
    queries: Tensor,
    k: int = 10,
    *,
    metric: str = "dot",
    layers: Layers = "",
    precondition: Precondition | None = None,
    least: bool = False,
    rows: Rows | None = None,
) -> dict[str, Hits]:
    """What `search` gives for each layer by itself, from one pass over the store.

    Args:
        store: as in `search`.
        queries: as in `search`.
        k: how many rows for each query and layer.
        metric: as in `search`, of the layer's columns alone.
        layers: the layers, as in `search`.
        precondition: as in `search`.
        least: as in `search`.
        rows: as in `search`.

    Returns:
        `{name of a slice of the store: Hits}`, in the order of `store.slices`.

    Raises:
        ValueError: as in `search`.
        StoreError: as in `search`.
    """
    scan = Scan(store, queries, metric, layers, precondition, rows)
    best = {name: scan.best(k, least=least) for name in scan.slices}
    parts = {name: scan.part([columns]) for name, columns in scan.slices.items()}
    for numbers, piece in scan.pieces():
        for name, part in parts.items():
            best[name].add(numbers, scan.score(part, piece))
    return {name: found.hits() for name, found in best.items()}


def stream_scores(
    store: Store,
    queries: Tensor,
    *,
    metric: str = "dot",
    layers: Layers = "",
    precondition: Precondition | None = None,
    rows: Rows | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The scores of all rows against all queries, some rows at a time: for histograms, means of domains, thresholds.

    Args:
        store: as in `search`.
        queries: as in `search`.
        metric: as in `search`.
        layers: as in `search`.
        precondition: as in `search`.
        rows: as in `search`.

    Returns:
        An iterator of `(rows[n], scores[Q, n])`, rows in ascending order, every row once.

    Raises:
        ValueError: as in `search`.
        StoreError: as in `search`, while it runs.
    """
    return Scan(store, queries, metric, layers, precondition, rows).scores()


def rows_of_domain(store: Store, *domains: str) -> Int[Tensor, " n"]:
    """The rows of a store whose samples are of some domains, for `rows=` of `search`.

    Args:
        store: the store.
        *domains: names of domains.

    Returns:
        Their numbers, ascending.

    Raises:
        ValueError: for a domain that no row is of; the message lists the domains.
    """
    column = store.samples(["domain"])["domain"].to_pylist()
    if unknown := sorted(set(domains) - set(column)):
        known = ", ".join(map(repr, sorted(set(column) - {None})))
        raise ValueError(f"no row is of domain {', '.join(map(repr, unknown))}; the store has {known}.")
    wanted = set(domains)
    return torch.tensor([row for row, domain in enumerate(column) if domain in wanted], dtype=torch.int64)
