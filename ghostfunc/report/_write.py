"""Write a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ghostfunc._call import Params
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._parquet import write_atomically
from ghostfunc.index import Queries, Store
from ghostfunc.report._collect import collect_report
from ghostfunc.report._render import render
from ghostfunc.text import Corpus


def write_report(
    path: str | os.PathLike,
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
) -> Path:
    """Write one self-contained HTML page: queries, the passages that support and oppose them, and what scores mean.

    It passes over the store three times, and computes the queries' gradients; with `highlights` every passage that is
    shown takes a forward and a backward.

    Args:
        path: the page's file, written whole or not at all.
        store: the index, complete.
        queries: each of its samples is a query.
        model_fn: the index's, `model_fn(params, batch) -> losses[B]`, of `functionalize(module, causal_lm_loss)`.
        params: the index's.
        projection: the index's own.
        corpora: those of the store's sources that are at hand; passages of others have no text.
        k: how many passages at each end of a query's ranking.
        metric: "dot", the inner product, or "cosine": what passages are ranked by.
        projected: the queries' rows and losses, of `project_queries`, where they are at hand or took a preconditioner
            of whole gradients; None computes them.
        precondition: applied to the queries' rows, `[Q, dim] -> [Q, dim]`, as in `search`.
        preconditioned: in a few words for the page, what was done to the queries.
        model: more to say of the model than the store's manifest does: its "name", whether it is "trained".
        title: of the page.
        token_budget: tokens of a batch, padding included.
        highlights: whether to colour tokens by what they add to a score.

    Returns:
        The page's file.

    Raises:
        ValueError: if there are no queries, a corpus is none of the store's sources, or as in `search`.
        StoreError: if the projection or the model is not the store's, or the store is incomplete or damaged.
        UnsupportedUse: as in `ghost_grad_dot`.
    """
    data = collect_report(
        store=store,
        queries=queries,
        model_fn=model_fn,
        params=params,
        projection=projection,
        corpora=corpora,
        k=k,
        metric=metric,
        projected=projected,
        precondition=precondition,
        preconditioned=preconditioned,
        model=model,
        title=title,
        token_budget=token_budget,
        highlights=highlights,
    )
    source = render(data).encode()
    write_atomically(Path(path), lambda file: file.write(source))
    return Path(path)
