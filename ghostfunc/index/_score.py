"""Scores without an index: every sample of a corpus against a few queries, exactly, in one pass that keeps the scores.

    score[i, q] = <grad l_i, P grad l_q>

The queries' gradients are whole and stay in memory; a sample's never exists.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ghostfunc._axes import match_layers
from ghostfunc._call import Layers, Params
from ghostfunc._fisher import FisherPreconditioner
from ghostfunc._functionalize import ModelFn
from ghostfunc._many import ghost_quantities
from ghostfunc._quantities import Along
from ghostfunc.index._batches import Batch, in_order
from ghostfunc.index._models import model_fingerprint
from ghostfunc.index._progress import Counter, Progress
from ghostfunc.index._queries import Preconditioner, check_queries, query_gradients
from ghostfunc.index._store import Store
from ghostfunc.index._writer import StoreWriter
from ghostfunc.text import Corpus


def score_corpus(
    folder: str | os.PathLike,
    corpus: Corpus,
    model_fn: ModelFn,
    params: Params,
    queries: Corpus,
    *,
    reduction: str = "each",
    precondition: Preconditioner | None = None,
    layers: Layers = "",
    model: str = "",
    token_budget: int = 2048,
    shard_rows: int = 1024,
    rank: int = 0,
    world: int = 1,
    append: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Write the exact score of every sample of a corpus against each query to a folder, or go on with it.

    Column q of row i is <grad l_i, grad l_q>, un-projected, each loss the sample's own; positive where a small step of
    gradient descent on sample i lowers the query's loss. A batch costs one forward and one backward for all queries,
    and a pass over its per-sample gradients, in tiles, for each; the queries' gradients are in memory, as large as the
    parameters each, so that this is for few queries. Many queries, or queries that are yet to come, are what
    `build_index` is for. Beside each row stand what `corpus.samples` gives and its `loss`.

    Interrupted at any moment, the same call goes on after the last whole shard. The best samples of each query are
    `search(store, torch.eye(store.dim), k)`.

    Args:
        folder: where the scores are, or will be.
        corpus: the samples.
        model_fn: `model_fn(params, batch) -> losses[B]`, without dropout: of a module in eval mode.
        params: parameters by name; their fingerprint is a part of the scores' identity.
        queries: each of its samples is a query.
        reduction: "each" sample a query, or "mean" for one query, the gradient of their mean loss.
        precondition: P, of the queries' gradients: `gf.ekfac(...)`, `gf.kfac(...)`, or a function of a gradient dict
            with an attribute `fingerprint`, a string that tells it from others.
        layers: the only parameters whose gradients enter, as in `ghost_grad_dot`.
        model: what the model is called.
        token_budget: padded tokens of a batch at most; no part of the identity, as in `build_index`.
        shard_rows: rows of a shard, as in `build_index`.
        rank: this process's number of `world`, as in `build_index`.
        world: how many processes write.
        append: whether to add this corpus to scores of others.
        progress: called as `progress(rows done, rows, tokens)`, as in `build_index`.

    Returns:
        The store, of `dim` Q and dtype float32, with a slice "query 0", "query 1", ... for each column ("mean" for the
        mean); `store.complete` says whether all processes are done.

    Raises:
        StoreError: if the folder holds scores of another model, of other queries or layers, or a damaged shard, other
            data without `append`; or if the disk is full.
        ValueError: if a loss or a score is not finite, the queries are empty, or an option is unknown.
        TypeError: if the preconditioner cannot be told from others.
        UnsupportedUse: as in `ghost_quantities`.
        InteractingSamples: as in `ghost_quantities`.
    """
    check_queries(queries, reduction)
    chosen = match_layers(layers, list(params))
    names = [name for name in params if name in chosen]
    columns = [f"query {i}" for i in range(len(queries))] if reduction == "each" else ["mean"]
    settings = {
        "scores": "exact",
        "queries": queries.fingerprint,
        "reduction": reduction,
        "precondition": None if precondition is None else _fingerprint(precondition),
        "layers": names,
    }
    writer = StoreWriter(
        folder,
        dim=len(columns),
        slices={name: slice(i, i + 1) for i, name in enumerate(columns)},
        model={"name": model, "fingerprint": model_fingerprint(params)},
        settings=settings,
    )
    source = writer.source(
        corpus.name, fingerprint=corpus.fingerprint, rows=len(corpus), shard_rows=shard_rows, append=append
    )
    missing = source.missing(rank, world)
    counter = Counter.of_shards(source.share(rank, world), missing, progress)
    if not missing:
        return Store(folder)
    found = query_gradients(model_fn, params, queries, names, precondition, token_budget, reduction)
    want = {column: Along(_complete(direction, names)) for column, (_, direction) in zip(columns, found, strict=True)}

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        result = ghost_quantities(model_fn, params, batch, want=want, grads=False, layers=names)
        return torch.stack([result[column] for column in columns], 1).float(), result.losses.float()

    device = next(iter(params.values())).device
    for shard in missing:
        where = (corpus, shard.start, shard.stop)
        try:
            rows, losses = in_order(*where, compute, token_budget=token_budget, device=device, done=counter.add)
        except ValueError as error:
            raise ValueError(f"{corpus.name}, in a batch of samples {shard.start} to {shard.stop}: {error}") from error
        samples = corpus.samples(shard.start, shard.stop)
        source.write(shard, rows, samples.append_column("loss", pa.array(losses.numpy())))
    return Store(folder)


def _complete(direction: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    if missing := [name for name in names if name not in direction]:
        raise ValueError(
            f"precondition= gave nothing for {', '.join(missing)}. Make it for these parameters too, or leave them out "
            "with layers=."
        )
    return direction


def _fingerprint(precondition: Any) -> str:
    """What tells a preconditioner from others, so that scores of two are never mixed."""
    if isinstance(precondition, FisherPreconditioner):
        digest = hashlib.sha256(repr(precondition).encode())
        for name, blocks in precondition.blocks.items():
            digest.update(name.encode())
            for block in blocks:
                digest.update(str(block.damping).encode())
                tensors = {"s": block.values, "l": block.left, "r": block.right, "e": block.entries}
                digest.update(model_fingerprint({k: t for k, t in tensors.items() if t is not None}).encode())
        return digest.hexdigest()
    fingerprint = getattr(precondition, "fingerprint", None)
    if not isinstance(fingerprint, str):
        raise TypeError(
            f"precondition= is a {type(precondition).__name__} without a `fingerprint`. Give it one, a string that "
            "tells it from others: a run that is resumed with another would mix two kinds of scores."
        )
    return fingerprint
