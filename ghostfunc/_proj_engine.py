"""The projection engine: every sample's projected gradient out of an ordinary PyTorch loop, and into a store.

A thin layer over `functionalize`, `ghost_grad_proj` and `StoreWriter`. A projection is a transform of its own: it runs
the module once more on the parameters as they are, so that there is nothing to hook, and nothing of the loop's training
that it could disturb.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ghostfunc._engine_batch import as_batch, require_one_of, size_of
from ghostfunc._functionalize import LossFn, _default_call
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._losses import causal_lm_loss
from ghostfunc._parquet import import_pyarrow, write_atomically
from ghostfunc._proj_rows import Projected, require_all
from ghostfunc._proj_store import Collected, Loop, Pass, layers_of, open_source, require_same
from ghostfunc._ranks import Group, Ranks, world_size
from ghostfunc._sample_ids import SampleIds, names_of, split_ids
from ghostfunc._sharded import is_sharded
from ghostfunc._wrapped import inner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GradProjEngine:
    """Projections of per-sample gradients inside a PyTorch loop that stays as it is, collected in a store on disk.

    `collect_batch` projects the gradient of each sample's own loss (not divided by the batch size) at the module's
    parameters as they are then. It costs a forward and the gradients of activations, beside whatever the loop does.
    The loop's training is what it would be without it: no `.grad`, no buffer, no random number and no mode of the
    module is changed. Rows are those of evaluation mode, without dropout, so that a row depends on nothing but its
    sample and the parameters.

    Args:
        module: the model. Its trainable parameters are looked up at each call.
        loss: `loss(output, batch) -> losses[B]`, as in `GradDotProdEngine`.
        call: `call(module, batch) -> output`, as in `functionalize`.
        proj_layers: which layers, comma-separated name parts (`"mlp,attn"`), matched at dots: `kronecker_projection`'s
            `layers`. Empty takes all linear maps and convolutions but the head.
        proj_rank_total: about how many numbers a layer's gradient becomes, k_i * k_o.
        proj_rank_min: the least k_i and k_o, where the layer has as many.
        proj_seed: of the projection's matrices.
        proj_dtype: of the stored rows: "float32", "bfloat16" or "float16".
        proj_row_orthonormal: matrices with orthogonal columns (rows of their transposes) instead of Gaussian ones.
        include_embeddings: project embeddings too.
        proj_dir: the folder of the store; None stores nothing.
        proj_save_interval: write a shard after so many calls of `collect_batch`.
        config: what else decides the rows, for the store, which is refused where it was begun with another; JSON can
            hold it. `config["model"]` and `config["data"]`, dicts that may have a "name" and a "fingerprint", say whose
            gradients of what these are. Without them nothing tells the rows of one checkpoint from those of another.
        group: the ranks, each with batches of its own, that fill one store: a process group or a device mesh. All make
            the same projection, which is checked. In a loop they call `collect_batch`, `save` and `detach` in step: the
            store is that of one process whose batches are all ranks' of a step in a row, and rank 0 writes it. A pass
            (`attach` with `samples`) they share. What one rank raises, all raise. None is for one process.

    Attributes:
        module: the model; of one in `DistributedDataParallel` the module inside.
        projection: the `KroneckerProjection`; None before the first batch.
        losses: `[B]`, the last batch's losses, detached; None before.

    Raises:
        ValueError: for an unknown `proj_dtype`, a `proj_save_interval` below 1, a `proj_dir` without `group` in one of
            several processes, or a group that this rank is not in.
        ImportError: for a `proj_dir` without the extra `index`.

    Example:
        >>> import tempfile, torch, ghostfunc as gf
        >>> from ghostfunc.index import Store
        >>> model, folder = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 3)), tempfile.mkdtemp()
        >>> engine = gf.GradProjEngine(model, loss=gf.classification_loss, proj_rank_total=64, proj_dir=folder)
        >>> for step in range(3):
        ...     X, Y, batch_indices = torch.randn(5, 40), torch.randint(3, (5,)), range(5 * step, 5 * step + 5)
        ...     gf.classification_loss(model(X), (X, Y)).mean().backward()  # whatever the loop does
        ...     rows = engine.collect_batch((X, Y), batch_indices)
        >>> engine.detach()
        >>> rows.shape, Store(folder).rows, engine.metadata["layers"]["0.weight"]["slice"]
        (torch.Size([5, 63]), 15, [0, 63])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: LossFn = causal_lm_loss,
        call: Callable[[nn.Module, Any], Any] | None = None,
        proj_layers: str = "",
        proj_rank_total: int = 256,
        proj_rank_min: int = 4,
        proj_seed: int = 42,
        proj_dtype: str = "bfloat16",
        proj_row_orthonormal: bool = False,
        include_embeddings: bool = False,
        proj_dir: str | os.PathLike[str] | None = None,
        proj_save_interval: int = 10,
        config: Mapping[str, Any] | None = None,
        group: Group | None = None,
    ) -> None:
        require_one_of("proj_dtype", proj_dtype, list(DTYPES))
        if proj_save_interval < 1:
            raise ValueError(f"proj_save_interval={proj_save_interval}: expected a number of batches, 1 or more.")
        if proj_dir is not None:
            import_pyarrow("a GradProjEngine with proj_dir")
        if proj_dir is not None and group is None and world_size() > 1:
            raise ValueError(
                f"this process is one of {world_size()}, which would write over each other's rows in {proj_dir}: pass "
                "group=torch.distributed.group.WORLD to all of them, or leave out proj_dir."
            )
        self.module = inner(module)  # whose parameters have the names that they have in one process
        self.loss_fn = loss
        self.call = call or _default_call
        self.proj_layers = proj_layers
        self.proj_rank_total = proj_rank_total
        self.proj_rank_min = proj_rank_min
        self.proj_seed = proj_seed
        self.proj_dtype = proj_dtype
        self.proj_row_orthonormal = proj_row_orthonormal
        self.include_embeddings = include_embeddings
        self.proj_dir = None if proj_dir is None else Path(proj_dir)
        self.proj_save_interval = proj_save_interval
        self.config = dict(config or {})
        self.projection: KroneckerProjection | None = None
        self.losses: Tensor | None = None
        self._projected = Projected(self.module, self.loss_fn, self.call)
        self._ranks = None if group is None else Ranks.of(group, self._projected.device)
        self._store: Loop | Pass | None = None
        self._detached = False

    def attach(self, batch: Any = None, *, samples: int | None = None, batch_size: int | None = None) -> None:
        """Make the projection and open the store, which then says what it holds (`rows_written`); or end a `detach`.

        Without it the first `collect_batch` does the same with its batch.

        Args:
            batch: any batch, as in `collect_batch`: one forward and backward shows how it uses the parameters. Without
                it nothing is made yet.
            samples: how many samples the data have, for a pass over them, whose row i is of sample i: then `batches`
                says what to collect. None for a loop, whose rows are numbered as they come.
            batch_size: samples of a batch of the pass; a shard has `proj_save_interval` times as many.

        Raises:
            StoreError: if `proj_dir` holds rows of another projection, model, `proj_dtype`, `config` or pass, or is
                damaged.
            ValueError: if `proj_layers` matches nothing (the message lists the names), if ranks make different
                projections (it names them), or for a pass without `batch_size` or `proj_dir`, or with sharded
                parameters.
            RuntimeError: for a pass after the first batch.
        """
        if samples is not None:
            with self._together():
                self._check_pass(batch, samples, batch_size)
        self._detached = False
        if batch is None or self.projection is not None:
            return
        with self._together():
            batch = self._as_batch(batch)
        if self._ranks is not None:
            require_same(self._ranks, self._decisive(samples=samples, batch_size=batch_size))
        projection = self._make_projection(batch)
        if self._ranks is not None:
            require_same(self._ranks, {"the projection's fingerprint": projection.fingerprint})
        self._store = self._open_store(projection, samples, batch_size)
        self.projection = projection

    def batches(self) -> AbstractContextManager[Iterator[range]]:
        """The samples of a pass that this process has to collect: its share of those that the store lacks.

        Every rank gets whole shards in turn, `proj_save_interval` batches each: a batch is of the same samples however
        many ranks there are, so that the store's bytes do not depend on their number, and any number of them goes on
        after a kill. At the end of a shard ranks wait for each other. An error inside the `with` ends the pass on all
        of them.

        Returns:
            A context that gives an iterator of ranges of samples: collect each one before the next.

        Raises:
            RuntimeError: before `attach` with `samples`. Inside, `RankFailed` where another rank raised.
            StoreError: if a shard is damaged or cannot be written, or ranks do not share `proj_dir`'s disk.

        Example:
            >>> import tempfile, torch, ghostfunc as gf
            >>> from ghostfunc.index import Store
            >>> X, Y, folder = torch.randn(10, 4), torch.randint(3, (10,)), tempfile.mkdtemp()
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
            >>> engine = gf.GradProjEngine(model, loss=gf.classification_loss, proj_rank_total=16, proj_dir=folder)
            >>> engine.attach((X[:1], Y[:1]), samples=10, batch_size=4)
            >>> with engine.batches() as batches:
            ...     for rows in batches:
            ...         projected = engine.collect_batch((X[rows.start : rows.stop], Y[rows.start : rows.stop]))
            >>> Store(folder).complete, Store(folder).samples()["sample_id"].to_pylist()[-3:]
            (True, [7, 8, 9])
        """
        if not isinstance(self._store, Pass):
            raise RuntimeError("batches() is about a pass: call attach(batch, samples=..., batch_size=...) first.")
        return self._store.batches()

    def collect_batch(
        self, batch: Any, batch_indices: SampleIds | None = None, *, domains: Sequence[str] | None = None
    ) -> Float[Tensor, "b k"]:
        """Project the gradient of each sample of a batch, and keep the rows for the store.

        Args:
            batch: as in `functionalize`: a dict, token ids `[B, T]` (under `causal_lm_loss`), or a tuple `(X, Y)`, put
                together as `GradDotProdEngine` does.
            batch_indices: `[B]` sample ids, integers or `(domain, offset)` pairs; by default the numbers of the rows.
            domains: `[B]` domain names, where `batch_indices` are integers; otherwise empty strings are stored.

        Returns:
            `[B, k]`, the projection of the gradient of each sample's own loss, in the columns of `projection.slices`,
            on the module's device and not rounded to `proj_dtype`.

        Raises:
            RuntimeError: if the engine is detached.
            ValueError: if the number of ids or domains is not the number of samples.
            FloatingPointError: if a loss or a row is not finite, or does not fit `proj_dtype`; the message names the
                samples, and nothing of the batch is kept.
            StoreError: as in `attach`.
        """
        if self._detached:
            raise RuntimeError("the engine is detached: attach() it before collect_batch.")
        if self._store is None:
            self.attach(batch)
        store = self._store
        assert store is not None
        with store.together():
            batch = self._as_batch(batch)
            n = size_of(batch)
            ids = range(n) if batch_indices is None else batch_indices
            sample_ids, names = split_ids("batch_indices", ids, domains)
            if not len(sample_ids) == len(names) == n:
                raise ValueError(
                    f"collect_batch: the batch has {n} samples, but there are {len(sample_ids)} ids in batch_indices "
                    f"and {len(names)} domains; expected one of each per sample."
                )
        first = store.first_row(n)
        if batch_indices is None:
            sample_ids = list(range(first, first + n))
        labels = names_of(sample_ids, names)
        with store.together():
            assert self.projection is not None
            rows, losses = self._projected.rows(batch, self.projection, labels)
            stored = rows.to("cpu", DTYPES[self.proj_dtype])
            remedy = 'Use proj_dtype="bfloat16" or "float32".'
            fits = stored.isfinite().all(1)
            require_all("projection of {} does not fit into " + self.proj_dtype, fits, labels, remedy)
        self.losses = losses
        store.add(Collected(stored, losses, sample_ids, names))
        return rows

    def save(self) -> None:
        """Write what was collected since the last time as one shard, whole or not at all. Without `proj_dir`, nothing.

        `collect_batch` does it every `proj_save_interval` batches, and `detach` at the end. A pass has whole shards
        only, each written with its last batch.

        Raises:
            StoreError: if the shard cannot be written, as on a full disk; what was written before stays good.
        """
        if self._store is not None:
            self._store.save()

    def detach(self) -> None:
        """Save, and refuse batches until `attach`. There is nothing to take off the module."""
        self.save()
        self._detached = True

    @property
    def rows_written(self) -> int:
        """How many rows the store holds, of all ranks: where a loop goes on that was interrupted.

        Raises:
            RuntimeError: without `proj_dir`, or before `attach(batch)` or the first `collect_batch`.
        """
        if self._store is None or self.proj_dir is None:
            raise RuntimeError(
                "rows_written is about a store: pass proj_dir, and call attach(batch) first, which opens it."
            )
        return self._store.rows_written

    @property
    def metadata(self) -> dict[str, Any]:
        """What a row is: its length, the projection, and each layer's k_i, k_o and slice. JSON can hold it.

        A store has it in `metadata.json`. Of a layer `d_i` and `d_o` are the sizes of a block `[d_i, d_o]` of its
        gradient, `blocks` how many it has, `slice` its columns `[start, stop]` of a row, `clipped` whether it has fewer
        numbers than `proj_rank_total`.

        Raises:
            RuntimeError: before `attach(batch)` or the first `collect_batch`.
        """
        if self.projection is None:
            raise RuntimeError("metadata is about the projection, which attach(batch) or collect_batch makes first.")
        return self._described(self.projection)

    def _described(self, projection: KroneckerProjection) -> dict[str, Any]:
        ends = {"fingerprint": projection.fingerprint, "layers": layers_of(projection)}
        return {"dim": projection.dim, **self._options(), **ends}

    def _options(self) -> dict[str, Any]:
        names = ("dtype", "layers", "rank_total", "rank_min", "seed", "row_orthonormal")
        options = {f"proj_{name}": getattr(self, f"proj_{name}") for name in names}
        return {**options, "include_embeddings": self.include_embeddings}

    def _decisive(self, **of_pass: int | None) -> dict[str, Any]:
        """What ranks that fill one store must have in common."""
        shapes = {name: list(p.shape) for name, p in self.module.named_parameters() if p.requires_grad}
        return {
            **self._options(),
            "proj_save_interval": self.proj_save_interval,
            **of_pass,
            **{f"config[{name!r}]": value for name, value in self.config.items()},
            **{f"the shape of {name}": shape for name, shape in shapes.items()},
        }

    def _as_batch(self, batch: Any) -> Any:
        X, Y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        return as_batch(X, Y, is_text=self.loss_fn is causal_lm_loss)

    def _make_projection(self, batch: Any) -> KroneckerProjection:
        projection = self._projected.projection(
            batch,
            layers=self.proj_layers,
            rank=self.proj_rank_total,
            min_rank=self.proj_rank_min,
            kind="orthonormal" if self.proj_row_orthonormal else "gaussian",
            seed=self.proj_seed,
            include=("embedding",) if self.include_embeddings else (),
            **({} if self._ranks is None else {"group": self._ranks.group}),
        )
        if projection.clipped and self._is_first:
            warnings.warn(
                f"{', '.join(projection.clipped)}: smaller than proj_rank_total={self.proj_rank_total}, so that fewer "
                "numbers are kept of them (metadata has each layer's k_i and k_o).",
                stacklevel=3,
            )
        return projection

    @property
    def _is_first(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def _together(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.together()

    def _check_pass(self, batch: Any, samples: int, batch_size: int | None) -> None:
        if self._store is not None:
            raise RuntimeError("attach: samples= begins a pass, and this engine has begun already: make another.")
        if batch is None or batch_size is None or batch_size < 1 or samples < 1:
            raise ValueError(
                f"attach: samples={samples}, batch_size={batch_size}: a pass takes both, 1 or more, and a batch."
            )
        if self.proj_dir is None:
            raise ValueError("attach: samples= is of a pass, which fills a store: make the engine with proj_dir.")
        sharded = [name for name, p in self.module.named_parameters() if is_sharded(p)]
        if sharded:
            raise ValueError(
                f"attach: {sharded[0]} is sharded over ranks, which in a pass have different numbers of batches: give "
                "each process the whole model, or leave out samples= and let all ranks collect equally many batches."
            )

    def _open_store(self, projection: KroneckerProjection, samples: int | None, batch_size: int | None) -> Loop | Pass:
        source = None
        with self._together():
            if self._is_first and self.proj_dir is not None:
                source = self._source(self.proj_dir, projection, samples, batch_size)
                self._write_down(self.proj_dir, projection)
        if samples is None or batch_size is None:
            return Loop(source, self.proj_dir is not None, self.proj_save_interval, self._ranks)
        with self._together():  # after the first, whose manifest decides what the folder is of
            if source is None and self.proj_dir is not None:
                source = self._source(self.proj_dir, projection, samples, batch_size)
        return Pass(source, batch_size, self._ranks)

    def _source(
        self, folder: Path, projection: KroneckerProjection, samples: int | None, batch_size: int | None
    ) -> Any:
        shard_rows = None if batch_size is None else batch_size * self.proj_save_interval
        name = type(self.module).__name__
        return open_source(folder, projection, self.proj_dtype, name, self.config, samples, shard_rows)

    def _write_down(self, folder: Path, projection: KroneckerProjection) -> None:
        """What a row is, for readers: the matrices and the metadata, each file whole or not there."""
        projection.save(folder / "projection.safetensors")
        described = json.dumps(self._described(projection), indent=1) + "\n"
        write_atomically(folder / "metadata.json", lambda file: file.write(described.encode()))
