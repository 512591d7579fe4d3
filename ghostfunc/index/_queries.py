"""Queries: the gradients of prompts or of a validation file, in the columns of an index.

q_i = proj(grad l_i)                 what the index has of its own samples
q_i = proj(P grad l_i)               with a preconditioner P of gradients, which needs the whole gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._call import Params
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._projection import ghost_grad_proj
from ghostfunc.index._batches import Batch, in_order, token_batches
from ghostfunc.index._progress import Counter, Progress
from ghostfunc.text import Corpus

REDUCTIONS = ("each", "mean")

Gradient = dict[str, Tensor]
Preconditioner = Callable[[Gradient], Gradient]


class Queries(NamedTuple):
    """Queries of an index.

    Attributes:
        rows: `[Q, dim]`.
        losses: `[Q]`.
    """

    rows: Float[Tensor, "q dim"]
    losses: Float[Tensor, " q"]


def project_queries(
    model_fn: ModelFn,
    params: Params,
    projection: KroneckerProjection,
    corpus: Corpus,
    *,
    precondition: Preconditioner | None = None,
    token_budget: int = 2048,
    reduction: str = "each",
    progress: Progress | None = None,
) -> Queries:
    """The projected gradients of a corpus of queries: what `search` compares with the rows of an index.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name, those that the index was made with.
        projection: the index's.
        corpus: prompts (`TextCorpus.of(texts, ...)`) or a validation file (`open_corpus(path, ...)`); each of its
            samples is a query.
        precondition: of gradients, before they are projected: `gf.ekfac(...)`, `gf.kfac(...)`, or another function of
            a gradient dict. Each query's whole gradient is made then, one query at a time.
        token_budget: padded tokens of a batch at most.
        reduction: "each" sample a query, or "mean" for one query, the gradient of their mean loss.
        progress: called as `progress(samples done, samples, tokens done)`, before the first batch and after each.

    Returns:
        `Queries(rows[Q, dim], losses[Q])`, in the corpus's order, on the CPU; Q is 1 for "mean", and the
        loss the mean loss.

    Raises:
        ValueError: if the parameters are not the projection's, the corpus is empty, or an option is unknown.
        UnsupportedUse: as in `ghost_grad_proj`.
        InteractingSamples: as in `ghost_grad_proj`.
    """
    check_queries(corpus, reduction)
    projection = projection.to(_device(params))
    if precondition is not None:
        names = list(projection.parts)
        found = query_gradients(model_fn, params, corpus, names, precondition, token_budget, reduction, progress)
        pairs = [(projection.project(gradient).cpu(), loss.cpu()) for loss, gradient in found]
        return Queries(torch.stack([row for row, _ in pairs]), torch.stack([loss for _, loss in pairs]))

    def with_losses(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        losses = model_fn(params, batch)
        return losses, losses

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        return ghost_grad_proj(with_losses, params, batch, projection, has_aux=True)

    rows, losses = in_order(
        corpus,
        0,
        len(corpus),
        compute,
        token_budget=token_budget,
        device=_device(params),
        done=Counter(len(corpus), progress).add,
    )
    return Queries(rows, losses) if reduction == "each" else Queries(rows.mean(0, True), losses.mean(0, True))


def query_gradients(
    model_fn: ModelFn,
    params: Params,
    corpus: Corpus,
    names: Iterable[str],
    precondition: Preconditioner | None,
    token_budget: int,
    reduction: str,
    progress: Progress | None = None,
) -> Iterator[tuple[Tensor, Gradient]]:
    """The loss and the whole (preconditioned) gradient of each sample, one at a time; or of the mean loss, one pair."""
    names, each = list(names), reduction == "each"
    batches = [np.array([i]) for i in range(len(corpus))] if each else token_batches(corpus.lengths, token_budget)
    change = precondition or (lambda gradient: gradient)
    total, loss = {name: torch.zeros_like(params[name]) for name in names}, torch.zeros((), device=_device(params))
    counter = Counter(len(corpus), progress)
    for indices in batches:
        batch = {name: value.to(_device(params)) for name, value in corpus.batch(indices).items()}
        losses, gradient = _gradient(model_fn, params, batch, names)
        if each:
            yield losses[0], change(gradient)
        else:
            loss = loss + losses.sum() / len(corpus)
            total = {name: total[name] + gradient[name] / len(corpus) for name in names}
        counter.add(len(indices), int(corpus.lengths[indices].sum()))
    if not each:
        yield loss, change(total)


def check_queries(corpus: Corpus, reduction: str) -> None:
    """Refuse an empty corpus, and an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected {' or '.join(map(repr, REDUCTIONS))}.")
    if not len(corpus):
        raise ValueError(f"the corpus {corpus.name} has no samples, and so no queries.")


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device


def _gradient(model_fn: ModelFn, params: Params, batch: Any, names: list[str]) -> tuple[Tensor, Gradient]:
    """The losses of a batch, and the gradient of their sum."""
    leaves = {name: p.detach().requires_grad_(name in names) for name, p in params.items()}
    losses = model_fn(leaves, batch)
    found = torch.autograd.grad(losses.sum(), [leaves[name] for name in names], allow_unused=True)
    zeros = (torch.zeros_like(params[name]) if g is None else g for name, g in zip(names, found, strict=True))
    return losses.detach(), dict(zip(names, zeros, strict=True))
