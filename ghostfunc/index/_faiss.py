"""Approximate search: a FAISS index of a store's rows, saved beside them, and refused once they have changed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostfunc._parquet import TEMPORARY, sync_folder, write_atomically
from ghostfunc.index._manifest import StoreError, read_json
from ghostfunc.index._scan import Hits, Precondition, checked_queries, is_cosine, row_lengths, rows_at_a_time
from ghostfunc.index._state import state_of
from ghostfunc.index._store import Store

_FORMAT = 1
_PER_LIST = 64  # rows that k-means sees for each list: FAISS wants 39 at least, and takes no more than 256
_RUNS = 1024


def _faiss() -> Any:
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            'approximate search needs faiss, which is an extra: pip install "ghostfunc[faiss]"; `search` is exact '
            "and needs nothing."
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class FaissIndex:
    """A FAISS index of all rows of a store, by inner product or cosine.

    It holds the rows in memory, as float32 unless `kind` says otherwise: rows x dim x 4 bytes. With "cosine" both
    rows and queries have unit length.

    Attributes:
        index: FAISS' own object.
        kind: as in `build`.
        metric: "dot" or "cosine".

    Example:
        >>> import tempfile, pyarrow, torch
        >>> from ghostfunc.index import Store, StoreWriter
        >>> folder = tempfile.mkdtemp()
        >>> source = StoreWriter(folder, dim=2).source("poems", fingerprint="0f", rows=None)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> _ = source.append(rows, pyarrow.table({"domain": ["haiku", "ode", "ode"]}))
        >>> store = Store(folder)
        >>> FaissIndex.build(store, "flat").save().name
        'faiss-flat-dot.index'
        >>> FaissIndex.load(store, "flat").search(torch.tensor([[1.0, 1.0]]), k=2).rows
        tensor([[2, 1]])
    """

    def __init__(self, store: Store, index: Any, kind: str, metric: str) -> None:
        self.store, self.index, self.kind, self.metric = store, index, kind, metric

    @classmethod
    def build(cls, store: Store, kind: str = "ivf", *, metric: str = "dot") -> FaissIndex:
        """Make an index of all rows, in one pass over the store (and part of one before it, to train an "ivf").

        Args:
            store: the store.
            kind: "flat" (exact), "ivf" (inverted lists around about sqrt(rows) centroids), "hnsw" (a graph of 32
                links), or anything that FAISS' `index_factory` takes, as "IVF4096,PQ32".
            metric: "dot" or "cosine".

        Returns:
            The index. The same store and threads give the same one, but for "hnsw" with several threads.

        Raises:
            ImportError: without FAISS.
            ValueError: for an unknown metric, a kind that FAISS does not know, or a store with too few rows for it.
            StoreError: if the store is damaged.
        """
        faiss = _faiss()
        cosine = is_cosine(metric)
        if not store.rows:
            raise ValueError(f"{store.folder} has no rows to make an index of.")
        factory = _factory(kind, store.rows)
        try:
            index = faiss.index_factory(store.dim, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(_training_rows(store, faiss, index, cosine=cosine))
            for _, piece in store.stream(rows_at_a_time=rows_at_a_time(store.dim, 1)):
                index.add(_vectors(piece, cosine=cosine))
        except RuntimeError as error:
            raise ValueError(
                f"kind={kind!r} ({factory}) and {store.rows} rows of {store.dim}: FAISS says {error}"
            ) from error
        return cls(store, index, kind, metric)

    def search(
        self, queries: Tensor, k: int = 10, *, effort: int | None = None, precondition: Precondition | None = None
    ) -> Hits:
        """The k rows with the highest scores that the index finds.

        Args:
            queries: as in `search`.
            k: how many rows for each query.
            effort: how much of the index is looked at: lists of "ivf", candidates of "hnsw"; None for a sixteenth of
                the lists, 64 candidates. Of no account where the index is neither.
            precondition: as in `search`.

        Returns:
            `Hits`, best first, the lower row first of equal scores. Where fewer than k were found, the last rows of a
            query are -1 and their scores -inf.

        Raises:
            ValueError: for queries of another dimension or that are not finite, k or effort below 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least one row for each query.")
        if effort is not None and effort < 1:
            raise ValueError(f"effort={effort}: expected at least 1.")
        faiss = _faiss()
        vectors = checked_queries(self.store, queries, precondition)
        if is_cosine(self.metric):
            vectors = vectors / row_lengths([vectors])[:, None]
        self._set_effort(faiss, effort)
        scores, rows = self.index.search(vectors.cpu().contiguous().numpy(), min(k, self.store.rows))
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores))
        found = (np.take_along_axis(table, order, 1) for table in (scores, rows))
        return Hits(*(torch.from_numpy(table).to(queries.device) for table in found))

    def _set_effort(self, faiss: Any, effort: int | None) -> None:
        lists = getattr(self.index, "nlist", None)
        if lists is not None:
            faiss.ParameterSpace().set_index_parameter(self.index, "nprobe", effort or max(1, lists // 16))
        elif hasattr(self.index, "hnsw"):
            faiss.ParameterSpace().set_index_parameter(self.index, "efSearch", effort or 64)

    def save(self, folder: str | os.PathLike | None = None) -> Path:
        """Write the index, whole or not at all, with what it is an index of.

        Args:
            folder: where to; None for the store's own.

        Returns:
            The path of the index; beside it is a `.json` with the store's state and a checksum.
        """
        path = _path(Path(folder) if folder is not None else self.store.folder, self.kind, self.metric)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY)
        _faiss().write_index(self.index, str(temporary))
        about = {
            "format": _FORMAT,
            "kind": self.kind,
            "metric": self.metric,
            "state": state_of(self.store),
            "sha256": _checksum(temporary),
        }
        os.replace(temporary, path)
        sync_folder(path.parent)
        write_atomically(
            path.with_suffix(".json"), lambda file: file.write((json.dumps(about, indent=1) + "\n").encode())
        )
        return path

    @classmethod
    def load(
        cls, store: Store, kind: str = "ivf", *, metric: str = "dot", folder: str | os.PathLike | None = None
    ) -> FaissIndex:
        """Read what `save` wrote; the file is not opened before its checksum is right.

        Args:
            store: the store that it was made from.
            kind: as in `build`.
            metric: as in `build`.
            folder: where it is; None for the store's own.

        Returns:
            The index.

        Raises:
            FileNotFoundError: if it was not saved there.
            StoreError: if it is damaged, or was made from another store or from this one before it was changed.
        """
        faiss = _faiss()
        is_cosine(metric)
        path = _path(Path(folder) if folder is not None else store.folder, kind, metric)
        about_path = path.with_suffix(".json")
        for needed in (path, about_path):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} is not there. Make it: FaissIndex.build(store, {kind!r}).save()")
        about = read_json(about_path)
        remedy = f"Make it again: FaissIndex.build(store, {kind!r}, metric={metric!r}).save()"
        made = (_FORMAT, kind, metric, state_of(store))
        if tuple(about.get(key) for key in ("format", "kind", "metric", "state")) != made:
            raise StoreError(f"{path} is stale: it was made from other rows than {store.folder} has now. {remedy}")
        if _checksum(path) != about.get("sha256"):
            raise StoreError(f"{path} is damaged (it does not have its checksum). {remedy}")
        return cls(store, faiss.read_index(str(path)), kind, metric)


def faiss_search(
    store: Store,
    queries: Tensor,
    k: int = 10,
    *,
    kind: str = "ivf",
    metric: str = "dot",
    effort: int | None = None,
    precondition: Precondition | None = None,
) -> Hits:
    """`search` by a FAISS index that is saved beside the store; the first call makes it, and so does one after changes.

    Args:
        store: as in `search`.
        queries: as in `search`.
        k: how many rows for each query.
        kind: as in `FaissIndex.build`.
        metric: as in `search`.
        effort: as in `FaissIndex.search`.
        precondition: as in `search`.

    Returns:
        As `FaissIndex.search`.

    Raises:
        ImportError: without FAISS.
        ValueError: as in `FaissIndex.build` and `FaissIndex.search`.
        StoreError: if the store is damaged.
    """
    try:
        index = FaissIndex.load(store, kind, metric=metric)
    except (FileNotFoundError, StoreError):
        index = FaissIndex.build(store, kind, metric=metric)
        index.save()
    return index.search(queries, k, effort=effort, precondition=precondition)


def _factory(kind: str, rows: int) -> str:
    """A kind in FAISS' language."""
    lists = max(1, min(round(rows**0.5), rows // 39))
    return {"flat": "Flat", "ivf": f"IVF{lists},Flat", "hnsw": "HNSW32,Flat"}.get(kind, kind)


def _path(folder: Path, kind: str, metric: str) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in kind.lower())
    return folder / f"faiss-{name}-{metric}.index"


def _training_rows(store: Store, faiss: Any, index: Any, *, cosine: bool) -> np.ndarray:
    """Rows for k-means, in runs that are spread evenly over the store: `[n, dim]`."""
    lists = faiss.extract_index_ivf(index).nlist if "IVF" in type(index).__name__ else 256
    wanted = min(store.rows, max(_PER_LIST * lists, 10_000))
    runs = max(1, min(_RUNS, store.rows // 64))
    bounds = [number * store.rows // runs for number in range(runs + 1)]
    each = -(-wanted // runs)
    return np.concatenate(
        [_vectors(store.read(start, min(start + each, stop)), cosine=cosine) for start, stop in pairwise(bounds)]
    )


def _vectors(piece: Tensor, *, cosine: bool) -> np.ndarray:
    return (piece / row_lengths([piece])[:, None] if cosine else piece).contiguous().numpy()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
