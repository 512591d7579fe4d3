"""What a report shows, as plain values: the rendering knows nothing of stores, models and tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Highlights:
    """How a passage's inner product with its query divides over the passage's tokens.

    The sum of `scores`, `elsewhere` and `remainder` is the passage's `dot`.

    Attributes:
        pieces: the text of each token; together they are the passage's text.
        scores: the share of each token.
        elsewhere: the share of the parameters that cannot be divided over tokens.
        remainder: what the stored row differs by from a gradient that is computed anew: rounding in the store, other
            sums in another batch.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    elsewhere: float
    remainder: float


@dataclass(frozen=True)
class Passage:
    """One sample of the index as an answer to a query.

    Attributes:
        row: its number in the store.
        document: where it is from.
        domain: of the sample.
        loss: the mean loss over its tokens, in nats, or None if the store has none.
        score: what it was ranked by.
        dot: the inner product of its stored row with the query's row.
        cosine: the same, divided by the norms of both rows.
        text: of the sample, or None where no corpus was given that has it.
        highlights: of its tokens, or None.
    """

    row: int
    document: str
    domain: str
    loss: float | None
    score: float
    dot: float
    cosine: float
    text: str | None = None
    highlights: Highlights | None = None


@dataclass(frozen=True)
class Query:
    """A query with the passages at both ends of its ranking.

    Attributes:
        text: of the query, or None if there is none.
        document: where it is from.
        domain: of the query.
        loss: the mean loss over its tokens, in nats, or None.
        most: the passages of the highest scores, the highest first.
        least: the passages of the lowest scores, the lowest first.
        mean: of the scores of all rows.
        deviation: the standard deviation of the scores of all rows.
        positive: the share of rows with a positive score, from 0 to 1.
    """

    text: str | None
    document: str
    domain: str
    loss: float | None
    most: tuple[Passage, ...]
    least: tuple[Passage, ...]
    mean: float
    deviation: float
    positive: float


@dataclass(frozen=True)
class Distribution:
    """The scores of one domain's rows for the queries of one domain.

    Attributes:
        domain: of the rows.
        count: how many scores it is of: rows that were looked at, times queries.
        quantiles: the 5th, 25th, 50th, 75th and 95th percentile.
        positive: the share of positive ones, from 0 to 1.
        histogram: counts in equal bins between the ends of the `Spread`.
    """

    domain: str
    count: int
    quantiles: tuple[float, float, float, float, float]
    positive: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """The distributions of the scores for the queries of one domain, a corpus domain each, on one scale.

    Attributes:
        query_domain: of the queries.
        low: the left end of the histograms.
        high: the right end.
        distributions: one for each corpus domain.
    """

    query_domain: str
    low: float
    high: float
    distributions: tuple[Distribution, ...]


@dataclass(frozen=True)
class DomainMeans:
    """Means over query domains x corpus domains, of all pairs of a query and a row.

    Attributes:
        query_domains: the rows of the table, with the number of queries of each in `queries`.
        queries: the number of queries of each query domain.
        domains: the columns of the table, with the number of rows of each in `rows`.
        rows: the number of the store's rows of each domain.
        dots: mean inner products, `[query domain][domain]`.
        cosines: mean cosines, `[query domain][domain]`.
    """

    query_domains: tuple[str, ...]
    queries: tuple[int, ...]
    domains: tuple[str, ...]
    rows: tuple[int, ...]
    dots: tuple[tuple[float, ...], ...]
    cosines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        title: of the page.
        facts: what the index is, as names with values.
        parameters: the projected parameters, each with its shape and the shape of its projection.
        notices: what a reader must know before reading on (weights that are untrained, text that is missing, ...).
        metric: "dot" or "cosine": what passages are ranked by.
        dim: how many numbers of a sample's gradient the index keeps.
        random: whether the projection's matrices are random, so that inner products are kept in expectation only.
        preconditioned: how the queries were preconditioned, in words, or "".
        queries: in the order of their corpus.
        means: by domains.
        spreads: one for each query domain.
        examined: how many rows the spreads are of, at most; 0 if of all.
        untokened: the parameters that cannot be divided over tokens.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, str, str], ...]
    notices: tuple[str, ...]
    metric: str
    dim: int
    random: bool
    preconditioned: str
    queries: tuple[Query, ...]
    means: DomainMeans
    spreads: tuple[Spread, ...]
    examined: int = 0
    untokened: tuple[str, ...] = ()
