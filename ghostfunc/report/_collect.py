"""From a store, queries and a model to what a report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc._call import Params
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._sketches import KINDS
from ghostfunc.index import Queries, Store, project_queries, search_ends
from ghostfunc.report._data import Passage, Query, ReportData
from ghostfunc.report._facts import check_identity, facts_of, notices_of, parameters_of
from ghostfunc.report._survey import Moments, survey
from ghostfunc.report._texts import Highlighter, Texts
from ghostfunc.text import Corpus

NO_DOMAIN = "no domain"


def collect_report(
    *,
    store: Store,
    queries: Corpus,
    model_fn: ModelFn,
    params: Params,
    projection: KroneckerProjection,
    corpora: Sequence[Corpus] = (),
    k: int = 5,
    metric: str = "dot",
    projected: Queries | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    preconditioned: str = "",
    model: Mapping[str, Any] | None = None,
    title: str = "",
    token_budget: int = 2048,
    highlights: bool = True,
) -> ReportData:
    """Search a store for queries, and collect what a report shows: the arguments and errors of `write_report`."""
    check_identity(store, params, projection)
    projection = projection.to(next(iter(params.values())).device)
    described = {**store.manifest["model"], **(model or {})}
    if not len(queries):
        raise ValueError(f"queries: {queries.name!r} has no samples; a report needs one at least.")
    texts = Texts(store, corpora)
    rows, losses = projected or project_queries(model_fn, params, projection, queries, token_budget=token_budget)
    if len(rows) != len(queries):
        raise ValueError(f"projected: {len(rows)} rows; {queries.name!r} has {len(queries)} queries.")
    if precondition is not None:
        rows = precondition(rows)
        preconditioned = preconditioned or "by a function of the caller's"
    most, least = search_ends(store, rows, k, metric=metric)
    asked = queries.samples(0, len(queries)).to_pylist()
    samples = store.samples()
    of_rows = samples["domain"].to_pylist() if "domain" in samples.column_names else [None] * store.rows
    row_domains = [domain or NO_DOMAIN for domain in of_rows]
    found = survey(store, rows, [sample["domain"] or NO_DOMAIN for sample in asked], row_domains, metric)
    highlighter = Highlighter(model_fn, params, projection, token_budget) if highlights else None
    shown = []
    for number, sample in enumerate(asked):
        scores = dict(zip(most.rows[number].tolist(), most.scores[number].tolist(), strict=True))
        scores |= dict(zip(least.rows[number].tolist(), least.scores[number].tolist(), strict=True))
        passages = _passages(store, texts, scores, rows[number], highlighter)
        shown.append(
            Query(
                text=queries.text(number),
                document=sample["document"] or "",
                domain=sample["domain"] or NO_DOMAIN,
                loss=float(losses[number]),
                most=tuple(passages[row] for row in most.rows[number].tolist()),
                least=tuple(passages[row] for row in least.rows[number].tolist()),
                **_moments_of(found.moments, number),
            )
        )
    return ReportData(
        title=title or f"What supports these queries in {', '.join(store.sources)}?",
        facts=facts_of(store, samples, projection, described, metric, preconditioned),
        parameters=parameters_of(projection),
        notices=notices_of(store, projection, described, texts.missing, shown),
        metric=metric,
        dim=store.dim,
        random=projection.kind in KINDS,
        preconditioned=preconditioned,
        queries=tuple(shown),
        means=found.means,
        spreads=found.spreads,
        examined=found.examined,
        untokened=() if highlighter is None else tuple(highlighter.untokened),
    )


def _moments_of(moments: Moments, query: int) -> dict[str, float]:
    return {name: values[query] for name, values in moments._asdict().items()}


def _passages(
    store: Store, texts: Texts, scores: Mapping[int, float], query: Tensor, highlighter: Highlighter | None
) -> dict[int, Passage]:
    """The passages of these rows, by row."""
    rows = list(scores)
    vectors = torch.cat([store.read(row, row + 1) for row in rows]).double()
    exact = query.double().cpu()
    dots = vectors @ exact
    lengths = vectors.norm(dim=1) * exact.norm()
    cosines = torch.where(lengths > 0, dots / lengths, 0.0)
    dot_of = dict(zip(rows, dots.tolist(), strict=True))
    places = texts.places(rows)
    marked = {} if highlighter is None else highlighter.highlights(places, dot_of, query)
    found = {}
    for row, cosine, sample in zip(rows, cosines.tolist(), store.sample_rows(rows).to_pylist(), strict=True):
        place = places.get(row)
        found[row] = Passage(
            row=row,
            document=sample.get("document") or "",
            domain=sample.get("domain") or NO_DOMAIN,
            loss=sample.get("loss"),
            score=scores[row],
            dot=dot_of[row],
            cosine=cosine,
            text=None if place is None else place.corpus.text(place.sample),
            highlights=marked.get(row),
        )
    return found
