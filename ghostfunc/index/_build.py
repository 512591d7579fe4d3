"""Building an index: every sample's projected gradient and loss, shard by shard."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._projection import ghost_grad_proj
from ghostfunc.index._batches import Batch, NotFinite, in_order, not_finite
from ghostfunc.index._models import model_fingerprint
from ghostfunc.index._progress import Counter, Progress
from ghostfunc.index._store import Store
from ghostfunc.index._writer import StoreWriter, explained
from ghostfunc.text import Corpus

PROJECTION_FILE = "projection.safetensors"


def build_index(
    folder: str | os.PathLike,
    corpus: Corpus,
    model_fn: ModelFn,
    params: dict[str, Tensor],
    projection: KroneckerProjection,
    *,
    model: str = "",
    dtype: str = "float32",
    token_budget: int = 2048,
    shard_rows: int = 1024,
    rank: int = 0,
    world: int = 1,
    append: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Store:
    """Write the projected gradient of every sample of a corpus to a folder, or go on with it.

    Row i is `ghost_grad_proj` of sample i alone, in the columns of `projection.slices`: of the gradient of the sample's
    own loss, on no batch's scale. Samples are computed in batches of like length within a shard, so that a shard
    depends on nothing but its samples: interrupted at any moment, the same call goes on after the last whole shard,
    and ends with the same bytes. Beside each row stand what `corpus.samples` gives, its `loss` and the `norm` of the
    projected gradient (both float32).

    Args:
        folder: where the index is, or will be.
        corpus: the samples.
        model_fn: `model_fn(params, batch) -> losses[B]`, without dropout: of a module in eval mode.
        params: parameters by name; their fingerprint is a part of the index's identity.
        projection: of `kronecker_projection`.
        model: what the model is called.
        dtype: how rows are stored: "float32", "bfloat16", "float16" or "int8".
        token_budget: the most tokens of a batch, padding included; lower it when memory runs out. It is no part of the
            identity: rows of another budget are the same up to rounding.
        shard_rows: rows of a shard: what a kill may cost, and what memory must hold.
        rank: this process's number of `world`; each process writes its share of the shards.
        world: how many processes write.
        append: whether to add this corpus to an index that has others.
        settings: whatever else decides the numbers and should not be mixed up, such as the loss.
        progress: `progress(done, total, tokens)`: the rows of this process's share that are written, earlier runs'
            included, or computed; how many there are; the tokens of this call. Called at the beginning and after each
            batch.

    Returns:
        The store; `store.complete` says whether all processes are done.

    Raises:
        StoreError: if the folder holds another index, a damaged shard, or other data without `append`; or if the disk
            is full.
        ValueError: if a loss or a gradient is not finite; the message names the sample.
    """
    describe = projection.describe() | {"fingerprint": projection.fingerprint}
    writer = StoreWriter(
        folder,
        dim=projection.dim,
        dtype=dtype,
        slices=projection.slices,
        model={"name": model, "fingerprint": model_fingerprint(params)},
        projection=describe,
        settings=settings or {},
    )
    source = writer.source(
        corpus.name, fingerprint=corpus.fingerprint, rows=len(corpus), shard_rows=shard_rows, append=append
    )
    if rank == 0:
        with explained(writer.folder):
            projection.save(writer.folder / PROJECTION_FILE)
    device = next(iter(params.values())).device
    projection = projection.to(device)

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        return _rows_and_losses(model_fn, params, batch, projection)

    missing = source.missing(rank, world)
    counter = Counter.of_shards(source.share(rank, world), missing, progress)
    for shard in missing:
        rows, losses = in_order(
            corpus, shard.start, shard.stop, compute, token_budget=token_budget, device=device, done=counter.add
        )
        finite = torch.isfinite(losses) & torch.isfinite(rows).all(dim=1)
        if not finite.all():
            raise not_finite(corpus, np.arange(shard.start, shard.stop), losses, finite)
        samples = corpus.samples(shard.start, shard.stop).append_column("loss", pa.array(losses.numpy()))
        source.write(shard, rows, samples.append_column("norm", pa.array(rows.norm(dim=1).numpy())))
    return Store(folder)


def _rows_and_losses(
    model_fn: ModelFn, params: dict[str, Tensor], batch: Batch, projection: KroneckerProjection
) -> tuple[Tensor, Tensor]:
    """Projections `[B, k]` and losses `[B]` of a batch, in float32."""
    seen: list[Tensor] = []

    def with_losses(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        losses = model_fn(params, batch)
        seen.append(losses.detach())
        return losses, losses

    try:
        rows, losses = ghost_grad_proj(with_losses, params, batch, projection, has_aux=True)
    except ValueError as error:
        if seen and not torch.isfinite(seen[-1]).all():
            raise NotFinite(seen[-1]) from error
        raise
    return rows.float(), losses.float()
