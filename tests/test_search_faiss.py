"""FAISS indices of a store: recall against exact search, and files that are refused once the store has changed."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pyarrow
import pytest
import torch
from torch import Tensor

from ghostfunc.index import FaissIndex, Store, StoreError, StoreWriter, faiss_search, search
from ghostfunc.index._gram import inverse_gram

pytest.importorskip("faiss")
DIM = 24
Make = Callable[..., Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    numbers = count()

    def made(rows: Tensor, folder: Path | None = None, name: str = "rows") -> Store:
        folder = folder or tmp_path / f"store {next(numbers)}"
        writer = StoreWriter(folder, dim=DIM)
        source = writer.source(name, fingerprint=name, rows=len(rows), shard_rows=1000, append=True)
        for shard in source.missing():
            source.write(shard, rows[shard.start : shard.stop], pyarrow.table({"x": range(shard.stop - shard.start)}))
        return Store(folder)

    return made


def clusters(n: int, seed: int = 0) -> Tensor:
    """Rows around forty centres, which they stray far from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, DIM, generator=torch.Generator().manual_seed(99))
    of = torch.randint(40, (n,), generator=generator)
    return centres[of] * (1 + torch.rand(n, 1, generator=generator)) + torch.randn(n, DIM, generator=generator) * 1.5


def recall(found: Tensor, exact: Tensor) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.numel()


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_flat_is_exact(make: Make, metric: str) -> None:
    store, queries = make(clusters(3000)), clusters(20, 1)
    found, exact = (
        FaissIndex.build(store, "flat", metric=metric).search(queries, 10),
        search(store, queries, 10, metric=metric),
    )
    assert recall(found.rows, exact.rows) > 0.99  # nothing but ties of rounding
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("kind", ["ivf", "hnsw", "IVF16,SQfp16"])
def test_recall_rises_with_effort(make: Make, kind: str, metric: str) -> None:
    store, queries = make(clusters(6000)), clusters(50, 1)
    index, exact = FaissIndex.build(store, kind, metric=metric), search(store, queries, 10, metric=metric)
    low, high = (recall(index.search(queries, 10, effort=effort).rows, exact.rows) for effort in (1, 200))
    assert low < high
    assert high > (0.97 if kind != "hnsw" else 0.9)
    hits = index.search(queries, 10)
    assert (hits.scores.diff(dim=1) <= 0).all()


def test_the_same_store_gives_the_same_index(make: Make) -> None:
    store, queries = make(clusters(3000)), clusters(20, 1)
    one, two = (FaissIndex.build(store, "ivf").search(queries, 10, effort=2) for _ in range(2))
    assert torch.equal(one.rows, two.rows) and torch.equal(one.scores, two.scores)


def test_queries_are_preconditioned(make: Make) -> None:
    store, queries = make(clusters(3000)), clusters(20, 1)
    gram = inverse_gram(store)
    found = FaissIndex.build(store, "flat").search(queries, 10, precondition=gram)
    assert recall(found.rows, search(store, queries, 10, precondition=gram).rows) > 0.99


def test_fewer_found_than_asked_for(make: Make) -> None:
    store = make(clusters(2000))
    hits = FaissIndex.build(store, "ivf").search(clusters(3, 1), 2000, effort=1)
    none = hits.rows == -1
    assert hits.rows.shape == (3, 2000) and none.any(1).all() and not none[:, 0].any()
    assert (hits.scores[none] == -torch.inf).all() and hits.scores[~none].isfinite().all()
    assert FaissIndex.build(store, "flat").search(clusters(3, 1), 5000).rows.shape == (3, 2000)


def test_equal_scores_are_in_the_order_of_rows(make: Make) -> None:
    store = make(torch.ones(100, DIM))
    assert FaissIndex.build(store, "flat").search(torch.ones(1, DIM), 100).rows.tolist() == [list(range(100))]


def test_saved_beside_the_store_and_loaded(make: Make, tmp_path: Path) -> None:
    store, queries = make(clusters(2000)), clusters(5, 1)
    for kind, metric in (("ivf", "dot"), ("ivf", "cosine"), ("hnsw", "dot")):
        made = FaissIndex.build(store, kind, metric=metric)
        assert made.save().parent == store.folder
        again = FaissIndex.load(Store(store.folder), kind, metric=metric)
        assert torch.equal(again.search(queries).rows, made.search(queries).rows)
    store.verify()
    assert made.save(tmp_path / "elsewhere").parent == tmp_path / "elsewhere"
    FaissIndex.load(store, "hnsw", folder=tmp_path / "elsewhere")


def test_a_stale_or_foreign_one_is_refused(make: Make) -> None:
    store = make(clusters(2000))
    FaissIndex.build(store, "ivf").save()
    grown = make(clusters(50, 3), folder=store.folder, name="more")
    with pytest.raises(StoreError, match=r"faiss-ivf-dot\.index is stale.*Make it again"):
        FaissIndex.load(grown, "ivf")
    with pytest.raises(FileNotFoundError, match=r"faiss-ivf-cosine\.index is not there"):
        FaissIndex.load(store, "ivf", metric="cosine")
    other = make(clusters(2000, 5))
    for path in store.folder.glob("faiss-*"):
        (other.folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="is stale"):
        FaissIndex.load(other, "ivf")


def test_a_damaged_one_is_not_opened(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(clusters(2000))
    path = FaissIndex.build(store, "flat").save()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("faiss.read_index", lambda name: pytest.fail("a damaged file was opened"))
    with pytest.raises(StoreError, match="is damaged"):
        FaissIndex.load(store, "flat")


def test_the_shortcut_makes_the_index_once_and_again_after_changes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, queries, builds = make(clusters(2000)), clusters(5, 1), []
    build = FaissIndex.build.__func__
    monkeypatch.setattr(FaissIndex, "build", classmethod(lambda *a, **how: builds.append(1) or build(*a, **how)))
    first = faiss_search(store, queries, 5, kind="flat")
    assert torch.equal(faiss_search(store, queries, 5, kind="flat").rows, first.rows)
    assert len(builds) == 1
    grown = make(queries * 9, folder=store.folder, name="more")
    assert faiss_search(grown, queries, 1, kind="flat").rows.min() >= 2000
    assert len(builds) == 2


def test_refusals(make: Make) -> None:
    store, queries = make(clusters(500)), clusters(2, 1)
    with pytest.raises(ValueError, match=r"kind='no such kind' .* FAISS says"):
        FaissIndex.build(store, "no such kind")
    with pytest.raises(ValueError, match=r"kind='IVF4096,Flat' .* and 500 rows of 24: FAISS says"):
        FaissIndex.build(store, "IVF4096,Flat")
    with pytest.raises(ValueError, match="metric='l2'"):
        FaissIndex.build(store, "flat", metric="l2")
    with pytest.raises(ValueError, match="has no rows"):
        FaissIndex.build(make(torch.zeros(0, DIM)), "flat")
    index = FaissIndex.build(store, "flat")
    with pytest.raises(ValueError, match="k=0"):
        index.search(queries, 0)
    with pytest.raises(ValueError, match="effort=0"):
        index.search(queries, effort=0)
    with pytest.raises(ValueError, match="not finite"):
        index.search(queries / 0)
