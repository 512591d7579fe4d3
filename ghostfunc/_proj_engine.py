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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._engine_autocast import FLOAT16_LOSS_SCALE, Autocast, functionalized
from ghostfunc._engine_batch import as_batch, require_one_of, size_of
from ghostfunc._engine_manager import world_size
from ghostfunc._functionalize import LossFn, _default_call
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._losses import causal_lm_loss
from ghostfunc._make_projection import kronecker_projection
from ghostfunc._parquet import import_pyarrow, write_atomically
from ghostfunc._projection import ghost_grad_proj
from ghostfunc._randomness import RandomState
from ghostfunc._sample_ids import SampleIds, names_of, split_ids

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

    Attributes:
        projection: the `KroneckerProjection`; None before the first batch.
        losses: `[B]`, the last batch's losses, detached; None before.

    Raises:
        ValueError: for an unknown `proj_dtype`, or a `proj_save_interval` below 1.
        NotImplementedError: in a process group of several ranks.
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
    ) -> None:
        require_one_of("proj_dtype", proj_dtype, list(DTYPES))
        if proj_save_interval < 1:
            raise ValueError(f"proj_save_interval={proj_save_interval}: expected a number of batches, 1 or more.")
        if proj_dir is not None:
            import_pyarrow("a GradProjEngine with proj_dir")
        if world_size() > 1:
            raise NotImplementedError(
                f"GradProjEngine runs in one process; this one is of {world_size()}, which would write over each "
                "other's rows. Start one process."
            )
        self.module = module
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
        self._source: Any = None  # a `ghostfunc.index.Source`
        self._unsaved: list[tuple[Tensor, Any]] = []  # rows of a batch, and the table of its samples
        self._rows = 0
        self._detached = False

    def attach(self, batch: Any = None) -> None:
        """Make the projection and open the store, which then says what it holds (`rows_written`); or end a `detach`.

        Without it the first `collect_batch` does the same with its batch.

        Args:
            batch: any batch, as in `collect_batch`: one forward and backward shows how it uses the parameters. Without
                it nothing is made yet.

        Raises:
            StoreError: if `proj_dir` holds rows of another projection, model, `proj_dtype` or `config`, or is damaged.
            ValueError: if `proj_layers` matches nothing; the message lists the names.
        """
        self._detached = False
        if batch is not None and self.projection is None:
            self._make_projection(self._as_batch(batch))

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
        batch = self._as_batch(batch)
        n = size_of(batch)
        if self.projection is None:
            self._make_projection(batch)
        if batch_indices is None:
            batch_indices = range(self._rows, self._rows + n)
        sample_ids, names = split_ids("batch_indices", batch_indices, domains)
        if not len(sample_ids) == len(names) == n:
            raise ValueError(
                f"collect_batch: the batch has {n} samples, but there are {len(sample_ids)} ids in batch_indices and "
                f"{len(names)} domains; expected one of each per sample."
            )
        labels = names_of(sample_ids, names)
        rows, losses = self._project(batch, labels)
        _require(
            "projection of {} is not finite", rows.isfinite().all(1), labels, "Look at these samples, or at the dtype."
        )
        stored = rows.to("cpu", DTYPES[self.proj_dtype])
        remedy = 'Use proj_dtype="bfloat16" or "float32".'
        _require("projection of {} does not fit into " + self.proj_dtype, stored.isfinite().all(1), labels, remedy)
        self.losses = losses
        self._rows += n
        if self._source is not None:
            self._unsaved.append((stored, _samples(sample_ids, names, losses)))
            if len(self._unsaved) >= self.proj_save_interval:
                self.save()
        return rows

    def save(self) -> None:
        """Write what was collected since the last time as one shard, whole or not at all. Without `proj_dir`, nothing.

        `collect_batch` does it every `proj_save_interval` batches, and `detach` at the end.

        Raises:
            StoreError: if the shard cannot be written, as on a full disk; what was written before stays good.
        """
        if self._source is None or not self._unsaved:
            return
        pyarrow = import_pyarrow("a GradProjEngine with proj_dir")
        rows, samples = zip(*self._unsaved, strict=True)
        self._source.append(torch.cat(rows), pyarrow.concat_tables(samples))
        self._unsaved = []

    def detach(self) -> None:
        """Save, and refuse batches until `attach`. There is nothing to take off the module."""
        self.save()
        self._detached = True

    @property
    def rows_written(self) -> int:
        """How many rows the store holds: where a loop goes on that was interrupted.

        Raises:
            RuntimeError: without `proj_dir`, or before `attach(batch)` or the first `collect_batch`.
        """
        if self._source is None:
            raise RuntimeError(
                "rows_written is about a store: pass proj_dir, and call attach(batch) first, which opens it."
            )
        return self._source.rows_written

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
        described = self.projection.describe()
        layers = {
            name: {
                "shape": part["shape"],
                "blocks": part["blocks"],
                "d_i": part["d_in"],
                "d_o": part["d_out"],
                "k_i": part["k_in"],
                "k_o": part["k_out"],
                "slice": part["columns"],
                "clipped": part["clipped"],
            }
            for name, part in described["parameters"].items()
        }
        return {
            "dim": described["dim"],
            "proj_dtype": self.proj_dtype,
            "proj_layers": self.proj_layers,
            "proj_rank_total": self.proj_rank_total,
            "proj_rank_min": self.proj_rank_min,
            "proj_seed": self.proj_seed,
            "proj_row_orthonormal": self.proj_row_orthonormal,
            "include_embeddings": self.include_embeddings,
            "fingerprint": self.projection.fingerprint,
            "layers": layers,
        }

    def _as_batch(self, batch: Any) -> Any:
        X, Y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        return as_batch(X, Y, is_text=self.loss_fn is causal_lm_loss)

    def _make_projection(self, batch: Any) -> None:
        """The projection for the module, and the store of its rows."""
        with self._undisturbed() as autocast:
            model_fn, params = functionalized(self.module, self.loss_fn, self.call, autocast, 1.0)
            projection = kronecker_projection(
                model_fn,
                params,
                self._on_device(batch),
                layers=self.proj_layers,
                rank=self.proj_rank_total,
                min_rank=self.proj_rank_min,
                kind="orthonormal" if self.proj_row_orthonormal else "gaussian",
                seed=self.proj_seed,
                include=("embedding",) if self.include_embeddings else (),
            )
        if projection.clipped:
            warnings.warn(
                f"{', '.join(projection.clipped)}: smaller than proj_rank_total={self.proj_rank_total}, so that fewer "
                "numbers are kept of them (metadata has each layer's k_i and k_o).",
                stacklevel=3,
            )
        if self.proj_dir is not None:
            self._source = self._open_store(self.proj_dir, projection)
            self._rows = self._source.rows_written
        self.projection = projection
        if self.proj_dir is not None:
            described = json.dumps(self.metadata, indent=1) + "\n"
            write_atomically(self.proj_dir / "metadata.json", lambda file: file.write(described.encode()))

    def _open_store(self, folder: Path, projection: KroneckerProjection) -> Any:
        from ghostfunc.index import StoreWriter

        of_store = {"model": {"name": type(self.module).__name__}, "data": {}}
        model, data = (self.config.get(name, default) for name, default in of_store.items())
        writer = StoreWriter(
            folder,
            dim=projection.dim,
            dtype=self.proj_dtype,
            slices=projection.slices,
            model=model,
            projection={**projection.describe(), "fingerprint": projection.fingerprint},
            settings={name: value for name, value in self.config.items() if name not in of_store},
        )
        projection.save(folder / "projection.safetensors")
        return writer.source(data.get("name", "collected"), fingerprint=data.get("fingerprint", ""), rows=None)

    def _project(self, batch: Any, names: list[str]) -> tuple[Tensor, Tensor]:
        """The rows `[B, k]` and the losses `[B]` of a batch, whose samples messages call by these names."""
        with self._undisturbed() as autocast:
            batch = self._on_device(batch)
            try:
                return self._project_within_range(batch, autocast)
            except ValueError:
                # The transform knows rows of the batch; whoever collects it wants to read which samples they are.
                model_fn, params = functionalized(self.module, self.loss_fn, self.call, autocast, 1.0)
                with torch.no_grad():
                    losses = model_fn(params, batch)
                _require("loss of {} is not finite", losses.isfinite(), names, "Look at these samples.")
                raise

    def _project_within_range(self, batch: Any, autocast: Autocast) -> tuple[Tensor, Tensor]:
        if torch.float16 not in (autocast.dtype, *(p.dtype for p in self.module.parameters())):
            return self._project_scaled(batch, autocast, 1.0)
        # Without a scale small gradients vanish in float16; one that makes them overflow is halved. Every batch begins
        # with the same, so that rows do not depend on what was collected before.
        scale = FLOAT16_LOSS_SCALE
        found = self._project_scaled(batch, autocast, scale)
        while scale > 1 and not found[0].isfinite().all():
            scale /= 2
            found = self._project_scaled(batch, autocast, scale)
        return found

    def _project_scaled(self, batch: Any, autocast: Autocast, scale: float) -> tuple[Tensor, Tensor]:
        model_fn, params = functionalized(self.module, self.loss_fn, self.call, autocast, scale)

        def losses_twice(params: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
            losses = model_fn(params, batch)
            return losses, losses.detach()

        assert self.projection is not None
        rows, losses = ghost_grad_proj(losses_twice, params, batch, self.projection, has_aux=True)
        return rows / scale, losses / scale

    def _on_device(self, batch: Any) -> Any:
        device = next(self.module.parameters()).device
        return pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)

    @contextmanager
    def _undisturbed(self) -> Iterator[Autocast]:
        """Evaluation mode, and no autocast but the forward's own; modes and random numbers are restored."""
        autocast = Autocast.of(self.module)
        random = RandomState.of(next(self.module.parameters()).device)
        in_training = [m for m in self.module.modules() if m.training]
        try:
            for m in in_training:
                m.training = False  # not .eval(), which some modules take for more, such as merging adapters
            with torch.enable_grad(), autocast.left():
                yield autocast
        finally:
            for m in in_training:
                m.training = True
            random.restore()


def _require(what: str, good: Tensor, names: list[str], remedy: str) -> None:
    """Raise FloatingPointError where a sample is not good `[B]`; `what` has a place for how many there are."""
    bad = [name for name, is_good in zip(names, good.tolist(), strict=True) if not is_good]
    if bad:
        which = what.format(f"{len(bad)} of {len(names)} samples")
        raise FloatingPointError(f"the {which}: {'; '.join(bad[:8])}. Nothing of this batch was kept. {remedy}")


def _samples(sample_ids: list[int], domains: list[str], losses: Tensor) -> Any:
    pyarrow = import_pyarrow("a GradProjEngine with proj_dir")
    return pyarrow.table(
        {
            "sample_id": pyarrow.array(sample_ids, pyarrow.int64()),
            "domain": pyarrow.array(domains, pyarrow.string()),
            "loss": pyarrow.array(losses.float().cpu().numpy(), pyarrow.float32()),
        }
    )
