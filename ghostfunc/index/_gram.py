"""The inverse Gram matrix of a store's rows as a preconditioner of queries: what all gradients share counts less.

    H_s = X_s^T X_s / n                                     X_s [n, k_s]: the rows' columns of slice s
    q_s -> (H_s + damping * mean diagonal(H_s) * I)^-1 q_s  slice by slice

H_s is the empirical Fisher matrix of the projected gradients of one layer, so that with it the scores are influence
functions in the projected space (LoGra: Choe et al., 2024, arXiv 2405.13954, section 3).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ghostfunc._parquet import write_atomically
from ghostfunc.index._manifest import StoreError
from ghostfunc.index._scan import rows_at_a_time
from ghostfunc.index._state import state_of
from ghostfunc.index._store import Store

_FORMAT = "ghostfunc gram 1"


class GramPreconditioner:
    """The damped inverse of the block-diagonal Gram matrix of a store's rows: a function of queries.

    What `inverse_gram` returns, for `precondition=` of `search`. Linear, symmetric and positive semi-definite.

    Attributes:
        slices: the columns of each block.
        factors: for each block the Cholesky factor (lower) of the damped Gram matrix, float64; None where all rows are
            zero, and a query becomes zero as well.
        damping: as given.
        rows: how many rows the Gram matrix is the mean over.
        state: of the store that they are of.
    """

    def __init__(
        self, slices: dict[str, slice], factors: dict[str, Tensor | None], damping: float, rows: int, state: str
    ) -> None:
        self.slices, self.factors, self.damping, self.rows, self.state = slices, factors, damping, rows, state

    def __call__(self, queries: Tensor) -> Tensor:
        """Precondition queries.

        Args:
            queries: `[Q, dim]`.

        Returns:
            `[Q, dim]`, in the queries' dtype and on their device; computed in float64.

        Raises:
            ValueError: for queries of another dimension.
        """
        dim = max(columns.stop for columns in self.slices.values())
        if queries.dim() != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries have shape {tuple(queries.shape)}; the preconditioner is for [Q, {dim}].")
        solved = torch.zeros_like(queries)
        for name, columns in self.slices.items():
            factor = self.factors[name]
            if factor is not None:
                part = queries[:, columns].double().t()
                solved[:, columns] = torch.cholesky_solve(part, factor.to(queries.device)).t().to(queries.dtype)
        return solved

    def save(self, path: str | os.PathLike) -> None:
        """Write the preconditioner to one safetensors file, whole or not at all.

        Args:
            path: of the file; one that is there is replaced.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "damping": self.damping,
            "rows": self.rows,
            "state": self.state,
            "slices": {name: [columns.start, columns.stop] for name, columns in self.slices.items()},
        }
        tensors = {name: factor for name, factor in self.factors.items() if factor is not None}
        data = safetensors.torch.save(tensors, {"format": _FORMAT, "about": json.dumps(about)})
        write_atomically(path, lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike, store: Store) -> GramPreconditioner:
        """Read what `save` wrote; nothing is unpickled.

        Args:
            path: of the file.
            store: the store that it was made from.

        Returns:
            The same preconditioner.

        Raises:
            FileNotFoundError: if there is no such file.
            StoreError: if the file is damaged, or was made from another store or from this one before rows were added.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != _FORMAT:
                raise StoreError(f"{path} is no Gram preconditioner (format {about.get('format')!r}, not {_FORMAT!r}).")
            found = json.loads(about["about"])
            slices = {name: slice(*bounds) for name, bounds in found["slices"].items()}
            made = cls(slices, {n: tensors.get(n) for n in slices}, found["damping"], found["rows"], found["state"])
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} is damaged ({error}). Make it again with inverse_gram, and save it.") from error
        if made.state != state_of(store):
            raise StoreError(
                f"{path} was made from the {made.rows} rows of another store, or of this one before it was changed; "
                f"{store.folder} has {store.rows}. Make it again with inverse_gram, and save it."
            )
        return made

    def __repr__(self) -> str:
        zero = [name for name, factor in self.factors.items() if factor is None]
        note = f"; without curvature, so that queries become zero: {', '.join(zero)}" if zero else ""
        return f"GramPreconditioner({self.rows} rows, {len(self.slices)} blocks, damping {self.damping:g}{note})"


def inverse_gram(store: Store, *, damping: float | int = 0.1) -> GramPreconditioner:
    """The inverse Gram matrix of a store's rows, slice by slice, from one pass over the store.

    Args:
        store: the store. Each slice (the columns of one parameter) is a block; without slices all columns are one.
        damping: positive; what is added to the diagonal, as a multiple of its mean in the block.

    Returns:
        A `GramPreconditioner` for `precondition=`; it can be saved.

    Raises:
        ValueError: for damping that is not positive, and a store without rows.
        StoreError: if the store is damaged.

    Cost: a pass over the rows, 2 k^2 FLOPs for each row and block of k columns in float64; memory of 16 k^2 bytes for
    each block.
    """
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping={damping!r}: expected a number above 0, a multiple of the mean diagonal.")
    if not store.rows:
        raise ValueError(f"{store.folder} has no rows to make a Gram matrix of.")
    slices = store.slices or {"all": slice(0, store.dim)}
    sums = {
        name: torch.zeros(columns.stop - columns.start, columns.stop - columns.start, dtype=torch.float64)
        for name, columns in slices.items()
    }
    for _, piece in store.stream(rows_at_a_time=rows_at_a_time(store.dim, 1)):
        for name, columns in slices.items():
            part = piece[:, columns].double()
            sums[name].addmm_(part.t(), part)
    factors = {name: _factor(total / store.rows, damping) for name, total in sums.items()}
    return GramPreconditioner(dict(slices), factors, float(damping), store.rows, state_of(store))


def _factor(gram: Tensor, damping: float | int) -> Tensor | None:
    mean = gram.diagonal().mean()
    if mean == 0:
        return None
    return torch.linalg.cholesky(gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype)).contiguous()
