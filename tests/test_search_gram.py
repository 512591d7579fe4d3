"""The inverse Gram matrix of a store's rows, against numpy's inverse; its file."""

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from torch import Tensor

from ghostfunc.index import GramPreconditioner, Store, StoreError, StoreWriter, inverse_gram, search

SLICES = {"mlp": slice(0, 7), "attn": slice(7, 12)}
Make = Callable[..., Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    numbers = count()

    def made(rows: Tensor, slices: dict | None = SLICES, folder: Path | None = None, name: str = "rows") -> Store:
        folder = folder or tmp_path / f"store {next(numbers)}"
        writer = StoreWriter(folder, dim=rows.shape[1], slices=slices)
        source = writer.source(name, fingerprint=name, rows=len(rows), shard_rows=64, append=True)
        for shard in source.missing():
            source.write(shard, rows[shard.start : shard.stop], pyarrow.table({"x": range(shard.stop - shard.start)}))
        return Store(folder)

    return made


def rows(n: int = 300, dim: int = 12) -> Tensor:
    """Rows with directions that are shared."""
    return torch.randn(n, dim) @ torch.randn(dim, dim) + 2 * torch.randn(1, dim)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 10])
@pytest.mark.parametrize("slices", [SLICES, None])
def test_it_is_the_inverse_block_by_block(make: Make, damping: float, slices: dict | None) -> None:
    store, queries = make(rows(), slices), torch.randn(5, 12, dtype=torch.float64)
    x, expected = store.read(0, 300).double().numpy(), np.zeros((5, 12))
    for columns in (slices or {"": slice(0, 12)}).values():
        gram = x[:, columns].T @ x[:, columns] / 300
        damped = gram + damping * gram.diagonal().mean() * np.eye(len(gram))
        expected[:, columns] = queries[:, columns].numpy() @ np.linalg.inv(damped)
    found = inverse_gram(store, damping=damping)(queries)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    single = inverse_gram(store, damping=damping)(queries.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), rtol=1e-4, atol=1e-6)


def test_a_shared_direction_counts_less(make: Make) -> None:
    """Every row has much of one direction; the query's own direction decides once that is taken out."""
    x = torch.randn(200, 12) * 0.1
    x[:, 0] += 10
    x[50:, 0] += 5  # these win by the shared direction alone
    query = torch.zeros(1, 12)
    query[0, 0], query[0, 3] = 1, 1
    x[7, 3] = 5
    store = make(x)
    assert search(store, query, 1).rows.item() >= 50
    assert search(store, query, 1, precondition=inverse_gram(store, damping=1e-3)).rows.item() == 7


def test_rows_that_are_zero_in_a_slice(make: Make) -> None:
    x = rows()
    x[:, :7] = 0
    preconditioner = inverse_gram(make(x))
    found = preconditioner(torch.ones(1, 12))
    assert (found[:, :7] == 0).all() and (found[:, 7:] != 0).all()
    assert "queries become zero: mlp" in repr(preconditioner)


def test_saved_and_loaded(make: Make, tmp_path: Path) -> None:
    x, queries = rows(), torch.randn(3, 12)
    x[:, :7] = 0
    store = make(x)
    made = inverse_gram(store, damping=0.25)
    made.save(tmp_path / "new folder" / "gram.safetensors")
    again = GramPreconditioner.load(tmp_path / "new folder" / "gram.safetensors", Store(store.folder))
    assert torch.equal(again(queries), made(queries))
    assert (again.damping, again.rows, repr(again)) == (0.25, 300, repr(made))
    assert os.listdir(tmp_path / "new folder") == ["gram.safetensors"]


def test_a_foreign_one_is_refused(make: Make, tmp_path: Path) -> None:
    path, store = tmp_path / "gram.safetensors", make(rows())
    inverse_gram(store).save(path)
    with pytest.raises(StoreError, match="was made from the 300 rows of another store"):
        GramPreconditioner.load(path, make(rows()))
    grown = make(rows(10), folder=store.folder, name="more")
    with pytest.raises(StoreError, match=r"before it was changed; .* has 310\. Make it again"):
        GramPreconditioner.load(path, grown)


def test_a_damaged_one_is_refused(make: Make, tmp_path: Path) -> None:
    import safetensors.torch

    path, store = tmp_path / "gram.safetensors", make(rows())
    inverse_gram(store).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(StoreError, match=r"gram\.safetensors is damaged"):
        GramPreconditioner.load(path, store)
    safetensors.torch.save_file({"mlp": torch.zeros(7, 7)}, path)
    with pytest.raises(StoreError, match="is no Gram preconditioner"):
        GramPreconditioner.load(path, store)
    safetensors.torch.save_file({"mlp": torch.zeros(7, 7)}, path, {"format": "ghostfunc gram 1", "about": "{}"})
    with pytest.raises(StoreError, match=r"gram\.safetensors is damaged"):
        GramPreconditioner.load(path, store)
    with pytest.raises(FileNotFoundError):
        GramPreconditioner.load(tmp_path / "none", store)


def test_refusals(make: Make) -> None:
    store = make(rows())
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping="):
            inverse_gram(store, damping=damping)
    with pytest.raises(ValueError, match=r"shape \(2, 11\); the preconditioner is for \[Q, 12\]"):
        inverse_gram(store)(torch.zeros(2, 11))
