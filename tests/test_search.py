"""Exact search over stores of every dtype, against scores and a stable sort of all of them."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pyarrow
import pytest
import torch
from torch import Tensor

import ghostfunc.index._scan as scan
from ghostfunc.index import (
    Store,
    StoreWriter,
    rows_of_domain,
    search,
    search_ends,
    search_layers,
    stream_scores,
)

SLICES = {"h.0.mlp": slice(0, 6), "h.0.attn": slice(6, 11), "h.1.mlp": slice(11, 16)}
DIM = 16
Make = Callable[..., Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A store of some rows, `[N, DIM]`."""

    numbers = count()

    def made(rows: Tensor, dtype: str = "float32", shard_rows: int = 100, slices: dict | None = SLICES) -> Store:
        folder = tmp_path / f"store {next(numbers)}"
        writer = StoreWriter(folder, dim=rows.shape[1], dtype=dtype, slices=slices)
        source = writer.source("rows", fingerprint="f", rows=len(rows), shard_rows=shard_rows)
        for shard in source.missing():
            domains = [f"domain {row % 3}" for row in range(shard.start, shard.stop)]
            source.write(shard, rows[shard.start : shard.stop], pyarrow.table({"domain": domains}))
        return Store(folder)

    return made


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LEAST_ROWS", 37)  # so that a store of some hundred rows is many pieces
    monkeypatch.setattr(scan, "PIECE_BYTES", 0)


def ranked(scores: Tensor, k: int, *, least: bool = False) -> tuple[Tensor, Tensor]:
    """What a stable sort of all scores `[Q, N]` gives."""
    order = scores.sort(dim=1, descending=not least, stable=True).indices[:, :k]
    return scores.gather(1, order), order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_best_rows_of_every_dtype(make: Make, dtype: str, metric: str) -> None:
    store, queries = make(torch.randn(731, DIM), dtype), torch.randn(9, DIM)
    rows = store.read(0, 731).double()
    scores = queries.double() @ rows.t()
    if metric == "cosine":
        scores = scores / queries.double().norm(dim=1)[:, None] / rows.norm(dim=1)
    for least in (False, True):
        hits = search(store, queries, 12, metric=metric, least=least)
        expected, numbers = ranked(scores, 12, least=least)
        assert torch.equal(hits.rows, numbers)
        torch.testing.assert_close(hits.scores.double(), expected, rtol=1e-5, atol=1e-6)
        assert hits.scores.dtype == torch.float32


def test_both_ends_in_one_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, queries = make(torch.randn(500, DIM)), torch.randn(4, DIM)
    expected = search(store, queries, 7), search(store, queries, 7, least=True)
    passes = []
    stream = Store.stream
    monkeypatch.setattr(Store, "stream", lambda self, **how: passes.append(1) or stream(self, **how))
    ends = search_ends(store, queries, 7)
    assert len(passes) == 1
    for found, wanted in zip(ends, expected, strict=True):
        assert torch.equal(found.rows, wanted.rows) and torch.equal(found.scores, wanted.scores)


def test_ties_go_to_the_lower_row(make: Make) -> None:
    store, queries = make(torch.randint(-1, 2, (900, DIM)).float(), "int8"), torch.randint(-1, 2, (8, DIM)).float()
    scores = queries @ store.read(0, 900).t()
    assert len(scores.unique()) < 40  # so that nearly every place is tied
    ends = search_ends(store, queries, 300)
    for hits, least in ((ends.most, False), (ends.least, True)):
        expected, rows = ranked(scores, 300, least=least)
        assert torch.equal(hits.rows, rows) and torch.equal(hits.scores, expected)


def test_zero_and_minus_zero_are_equal(make: Make) -> None:
    rows = torch.zeros(80, DIM)
    rows[40:] = -0.0
    assert search(make(rows), torch.ones(1, DIM), 80).rows.tolist() == [list(range(80))]


def test_more_rows_asked_for_than_there_are(make: Make) -> None:
    store = make(torch.randn(50, DIM))
    hits = search(store, torch.randn(3, DIM), 1000)
    assert hits.scores.shape == hits.rows.shape == (3, 50)
    assert all(sorted(row) == list(range(50)) for row in hits.rows.tolist())


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("mlp", ["h.0.mlp", "h.1.mlp"]),
        ("attn", ["h.0.attn"]),
        ("h.0", ["h.0.mlp", "h.0.attn"]),
        ("h.0.mlp, h.1", ["h.0.mlp", "h.1.mlp"]),
        (["h.1.mlp"], ["h.1.mlp"]),
        (lambda name: "0" in name, ["h.0.mlp", "h.0.attn"]),
    ],
)
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_some_layers(make: Make, layers, names: list[str], metric: str) -> None:
    store, queries = make(torch.randn(300, DIM)), torch.randn(5, DIM)
    columns = torch.cat([torch.arange(DIM)[SLICES[name]] for name in names])
    rows, queries_there = store.read(0, 300)[:, columns].double(), queries[:, columns].double()
    scores = queries_there @ rows.t()
    if metric == "cosine":
        scores = scores / queries_there.norm(dim=1)[:, None] / rows.norm(dim=1)
    hits = search(store, queries, 5, layers=layers, metric=metric)
    expected, numbers = ranked(scores, 5)
    assert torch.equal(hits.rows, numbers)
    torch.testing.assert_close(hits.scores.double(), expected, rtol=1e-5, atol=1e-6)


def test_each_layer_by_itself(make: Make) -> None:
    store, queries = make(torch.randn(300, DIM)), torch.randn(5, DIM)
    for metric in ("dot", "cosine"):
        found = search_layers(store, queries, 6, metric=metric, least=True)
        assert list(found) == list(SLICES)
        for name, hits in found.items():
            alone = search(store, queries, 6, metric=metric, layers=[name], least=True)
            assert torch.equal(hits.rows, alone.rows) and torch.equal(hits.scores, alone.scores)
    assert list(search_layers(store, queries, layers="mlp")) == ["h.0.mlp", "h.1.mlp"]


def test_a_store_without_slices(make: Make) -> None:
    rows, queries = torch.randn(60, 5), torch.randn(2, 5)
    store = make(rows, slices=None)
    assert torch.equal(search(store, queries, 3).rows, ranked(queries @ rows.t(), 3)[1])
    with pytest.raises(ValueError, match="no parameter matches 'mlp'"):
        search(store, queries, layers="mlp")


def test_only_some_rows(make: Make) -> None:
    store, queries = make(torch.randn(700, DIM)), torch.randn(4, DIM)
    scores = queries @ store.read(0, 700).t()
    rows = [3, 699, 3, 250, 251, 100, 5]
    for given in (rows, torch.tensor(rows), torch.tensor(rows, dtype=torch.int32)):
        hits = search(store, queries, 4, rows=given)
        allowed = torch.tensor(sorted(set(rows)))
        assert torch.equal(hits.rows, allowed[ranked(scores[:, allowed], 4)[1]])
    assert search(store, queries, 4, rows=[]).rows.shape == (4, 0)
    domain = rows_of_domain(store, "domain 2", "domain 0")
    assert domain.tolist() == [row for row in range(700) if row % 3 != 1]
    assert (search(store, queries, 9, rows=domain).rows % 3 != 1).all()


def test_rows_elsewhere_are_not_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, asked = make(torch.randn(700, DIM)), Store.read, []
    monkeypatch.setattr(Store, "read", lambda self, a, b, columns: asked.append((a, b)) or read(self, a, b, columns))
    search(store, torch.randn(1, DIM), rows=[5, 6, 650])
    assert asked == [(5, 7), (650, 651)]


@pytest.mark.parametrize("scale", [1e-25, 1e-30, 1e15, 1e30])
def test_cosine_of_tiny_and_of_large_rows(make: Make, scale: float) -> None:
    rows, queries = torch.randn(90, DIM), torch.randn(3, DIM)
    expected = search(make(rows), queries, 90, metric="cosine")
    found = search(make(rows * scale), queries * scale, 90, metric="cosine")
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_rows_and_queries_of_zeros_have_cosine_zero(make: Make) -> None:
    rows = torch.randn(50, DIM)
    rows[7] = 0
    queries = torch.stack([torch.zeros(DIM), torch.randn(DIM)])
    scores = torch.cat([found for _, found in stream_scores(make(rows), queries, metric="cosine")], 1)
    assert (scores[0] == 0).all() and scores[1, 7] == 0 and scores[1].count_nonzero() == 49


def test_the_stream_is_every_row_once(make: Make) -> None:
    store, queries = make(torch.randn(333, DIM)), torch.randn(4, DIM)
    pieces = list(stream_scores(store, queries))
    assert len(pieces) > 5
    assert torch.equal(torch.cat([rows for rows, _ in pieces]), torch.arange(333))
    scores = torch.cat([scores for _, scores in pieces], 1)
    torch.testing.assert_close(scores, queries @ store.read(0, 333).t())


def test_queries_are_preconditioned_first(make: Make) -> None:
    store, queries, matrix = make(torch.randn(200, DIM)), torch.randn(4, DIM), torch.randn(DIM, DIM)
    for metric in ("dot", "cosine"):
        found = search(store, queries, 5, metric=metric, precondition=lambda q: q @ matrix, layers="mlp")
        expected = search(store, queries @ matrix, 5, metric=metric, layers="mlp")
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.scores, expected.scores)


def test_nothing_to_look_for_and_nothing_to_find(make: Make) -> None:
    assert search(make(torch.zeros(0, DIM)), torch.randn(2, DIM)).rows.shape == (2, 0)
    ends = search_ends(make(torch.randn(20, DIM)), torch.randn(0, DIM))
    assert ends.most.rows.shape == ends.least.rows.shape == (0, 10)


def test_on_a_device(make: Make, device: torch.device) -> None:
    store, queries = make(torch.randint(-3, 4, (400, DIM)).float()), torch.randint(-3, 4, (5, DIM)).float()
    here, there = search(store, queries, 20), search(store, queries.to(device), 20, rows=torch.arange(400))
    assert there.rows.device.type == device.type
    assert torch.equal(there.rows.cpu(), here.rows) and torch.equal(there.scores.cpu(), here.scores)


def test_queries_of_other_dtypes(make: Make) -> None:
    store, queries = make(torch.randn(100, DIM)), torch.randn(2, DIM)
    assert torch.equal(search(store, queries.double(), 5).rows, search(store, queries, 5).rows)
    learned = torch.ones(DIM, requires_grad=True)
    grown = search(store, queries.clone().requires_grad_(), 5, precondition=lambda q: q * learned)
    assert not grown.scores.requires_grad


def test_under_another_default_dtype(make: Make) -> None:
    store, queries = make(torch.randn(100, DIM)), torch.randn(2, DIM)
    expected = search(store, queries, 5, metric="cosine")
    torch.set_default_dtype(torch.float64)
    try:
        found = search(store, queries, 5, metric="cosine")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.scores.dtype == torch.float32 and torch.equal(found.scores, expected.scores)


def test_refusals(make: Make) -> None:
    store, queries = make(torch.randn(40, DIM)), torch.randn(2, DIM)
    bad = queries.clone()
    bad[1, 3] = torch.nan
    for message, how in {
        r"queries have shape \(16,\); the store needs \[Q, 16\]": {"queries": queries[0]},
        r"queries have shape \(2, 15\)": {"queries": queries[:, 1:]},
        r"queries: rows \[1\] are not finite": {"queries": bad},
        r"queries after precondition=: rows \[0, 1\] are not finite": {"precondition": lambda q: q / 0},
        r"queries after precondition= have shape \(2, 3\)": {"precondition": lambda q: q[:, :3]},
        "k=0: expected at least one": {"k": 0},
        "metric='euclid': expected 'dot' or 'cosine'": {"metric": "euclid"},
        "no parameter matches 'h.2'; the parameters are h.0.mlp": {"layers": "h.2"},
        "choose nothing; the store has h.0.mlp": {"layers": []},
        "rows= goes from 3 to 40; the store has rows 0 to 39": {"rows": [3, 40]},
        "rows= goes from -1": {"rows": [-1]},
        r"dtype torch.bool; expected row numbers": {"rows": torch.ones(40, dtype=torch.bool)},
        "query 1 has scores that are too large": {"queries": torch.stack([queries[0], torch.full((DIM,), 3e38)])},
    }.items():
        with pytest.raises(ValueError, match=message):
            search(**({"store": store, "queries": queries} | how))
    with pytest.raises(ValueError, match="no row is of domain 'law'; the store has 'domain 0', 'domain 1'"):
        rows_of_domain(store, "law", "domain 0")


def test_a_damaged_store_is_refused(make: Make) -> None:
    store = make(torch.randn(300, DIM))
    path = sorted((store.folder / "shards").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        search(store, torch.randn(1, DIM))
