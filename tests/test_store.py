"""What is written into a store is what is read from it: rows in every dtype, their samples, pieces and columns."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from ghostfunc.index import Shard, Store, StoreError, StoreWriter

DIM = 12
SLICES = {"mlp": slice(0, 5), "attn": slice(5, 6), "head": slice(6, 12)}


def samples_of(start: int, stop: int) -> pa.Table:
    ids = pa.array(range(start, stop), pa.int64())
    return pa.table({"sample_id": ids, "domain": ["law" if i % 2 else "code" for i in range(start, stop)]})


def write(
    folder: Path, rows: Tensor, shard_rows: int = 4, name: str = "data", append: bool = False, **options
) -> Store:
    writer = StoreWriter(folder, dim=rows.shape[1], **options)
    source = writer.source(name, fingerprint=name, rows=len(rows), shard_rows=shard_rows, append=append)
    for shard in source.missing():
        source.write(shard, rows[shard.start : shard.stop], samples_of(shard.start, shard.stop))
    return Store(folder)


def random_rows(n: int, dim: int = DIM) -> Tensor:
    """Rows whose slices differ by orders of magnitude, and one of zeros."""
    rows = torch.randn(n, dim)
    rows[:, 5] *= 1e-6
    rows[:, 6:] *= 1e4
    rows[n // 2] = 0
    return rows


@pytest.mark.parametrize("n", [0, 1, 4, 5, 17])
def test_float32_is_exact(n: int, tmp_path: Path) -> None:
    rows = torch.randn(n, DIM)
    store = write(tmp_path, rows)
    assert torch.equal(store.read(0, n), rows)
    assert (store.rows, len(store), store.dim, store.dtype, store.complete) == (n, n, DIM, "float32", True)
    assert store.missing_shards == [] and store.sources == {"data": range(n)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_nearest_number(dtype: str, tmp_path: Path) -> None:
    rows = random_rows(10) / 10
    read = write(tmp_path, rows, dtype=dtype).read(0, 10)
    assert read.dtype == torch.float32
    assert torch.equal(read, rows.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_any_float_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(5, DIM).to(dtype)
    assert torch.equal(write(tmp_path, rows).read(0, 5), rows.float())


def test_int8_keeps_each_slice_to_a_254th(tmp_path: Path) -> None:
    rows = random_rows(40)
    store = write(tmp_path, rows, dtype="int8", slices=SLICES)
    read = store.read(0, 40)
    for part in SLICES.values():
        bound = rows[:, part].abs().amax(dim=1, keepdim=True) / 254
        assert ((read - rows)[:, part].abs() <= bound * (1 + 1e-5)).all()
    assert torch.equal(read[20], torch.zeros(DIM))
    # Without slices, a small layer is lost next to a large one: the test above is one of slices.
    one_part = write(tmp_path / "one part", rows, dtype="int8").read(0, 40)
    assert torch.equal(one_part[:, 5], torch.zeros(40))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_int8_of_any_magnitude(size: float, tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, -0.5, 0.01, 0.0]]) * size
    read = write(tmp_path, rows, dtype="int8").read(0, 1)
    assert (read - rows).abs().max() <= max(rows.abs().max() / 254 * (1 + 1e-5), 6e-39)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_columns_are_those_of_whole_rows(dtype: str, tmp_path: Path) -> None:
    store = write(tmp_path, random_rows(11) / 100, dtype=dtype, slices=SLICES)
    whole = store.read(0, 11)
    for columns in [*store.slices.values(), slice(3, 9), slice(None), slice(-4, None), slice(5, 6)]:
        assert torch.equal(store.read(2, 9, columns), whole[2:9, columns])
        assert torch.equal(torch.cat([rows for _, rows in store.stream(columns=columns)]), whole[:, columns])


@pytest.mark.parametrize("at_a_time", [None, 1, 3, 100])
def test_a_stream_is_the_rows_in_pieces(at_a_time: int | None, tmp_path: Path) -> None:
    rows = torch.randn(11, DIM)
    store = write(tmp_path, rows)
    at = 0
    for start, piece in store.stream(rows_at_a_time=at_a_time):
        assert start == at and len(piece) <= (at_a_time or 4)
        assert torch.equal(piece, rows[start : start + len(piece)])
        at += len(piece)
    assert at == 11


def test_a_piece_is_at_most_64_mib(tmp_path: Path) -> None:
    wide = torch.zeros(3, 2**23)
    store = write(tmp_path, wide, dtype="int8")
    assert [len(rows) for _, rows in store.stream()] == [2, 1]


def test_what_is_read_belongs_to_the_reader(tmp_path: Path) -> None:
    rows = torch.randn(6, DIM)
    store = write(tmp_path, rows)
    store.read(0, 6).zero_()
    for _, piece in store.stream():
        piece.zero_()
    store.verify()
    assert torch.equal(store.read(0, 6), rows)


def test_samples_come_with_their_rows(tmp_path: Path) -> None:
    store = write(tmp_path, torch.randn(11, DIM))
    table = store.samples()
    assert table.column_names == ["row", "sample_id", "domain"]
    assert table["row"].to_pylist() == table["sample_id"].to_pylist() == list(range(11))
    assert store.samples(["domain"]).column_names == ["row", "domain"]
    picked = store.sample_rows([9, 0, 9, 4])
    assert picked["sample_id"].to_pylist() == [9, 0, 9, 4]
    assert picked["domain"].to_pylist() == ["law", "code", "law", "code"]
    assert store.sample_rows([3], ["sample_id"]).to_pylist() == [{"row": 3, "sample_id": 3}]
    assert store.sample_rows([]).num_rows == 0
    with pytest.raises(StoreError, match="No source has a column 'los'"):
        store.samples(["los"])
    with pytest.raises(StoreError, match="Row 11 is asked for"):
        store.sample_rows([2, 11])


def test_appended_sources_follow(tmp_path: Path) -> None:
    first, second = torch.randn(5, DIM), torch.randn(6, DIM)
    write(tmp_path, first)
    writer = StoreWriter(tmp_path, dim=DIM)
    source = writer.source("more", fingerprint="m", rows=6, shard_rows=3, append=True)
    for shard in source.missing():
        table = pa.table({"sample_id": range(shard.start, shard.stop), "loss": [0.5] * 3})
        source.write(shard, second[shard.start : shard.stop], table)
    store = Store(tmp_path)
    assert store.sources == {"data": range(5), "more": range(5, 11)}
    assert store.fingerprints == {"data": "data", "more": "m"}
    assert torch.equal(store.read(3, 9), torch.cat([first, second])[3:9])
    assert store.samples()["loss"].to_pylist() == [None] * 5 + [0.5] * 6
    assert store.sample_rows([6, 1]).select(["row", "sample_id", "loss"]).to_pylist() == [
        {"row": 6, "sample_id": 1, "loss": 0.5},
        {"row": 1, "sample_id": 1, "loss": None},
    ]
    assert store.samples(["loss"])["row"].to_pylist() == list(range(11))


def test_a_source_that_grows(tmp_path: Path) -> None:
    rows = torch.randn(9, DIM)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        source = StoreWriter(tmp_path, dim=DIM).source("loop", fingerprint="l", rows=None)
        assert source.rows_written == start
        assert source.append(rows[start:stop], samples_of(start, stop)).stop == stop
        assert source.rows_written == stop and source.missing() == []
    source.append(rows[:0], samples_of(0, 0))
    store = Store(tmp_path)
    assert store.complete and store.rows == 9
    assert torch.equal(store.read(0, 9), rows)
    with pytest.raises(StoreError, match="was begun with rows=None, and now rows=9"):
        StoreWriter(tmp_path, dim=DIM).source("loop", fingerprint="l", rows=9)


def test_an_index_that_is_not_complete(tmp_path: Path) -> None:
    rows = torch.randn(12, DIM)
    source = StoreWriter(tmp_path, dim=DIM).source("data", fingerprint="d", rows=12, shard_rows=4)
    assert not Store(tmp_path).complete
    for shard in source.missing()[1::2]:
        source.write(shard, rows[shard.start : shard.stop], samples_of(shard.start, shard.stop))
    store = Store(tmp_path)
    assert source.rows_written == 4
    assert store.missing_shards == [("data", Shard(0, 0, 4)), ("data", Shard(2, 8, 12))]
    assert not store.complete and "2 shards to be written" in repr(store)
    assert torch.equal(store.read(5, 8), rows[5:8])
    for unwritten in (lambda: store.read(3, 5), lambda: store.read(4, 9)):
        with pytest.raises(StoreError, match=r"Row [38] of .* is yet to be written. Run the command .* again"):
            unwritten()
    for all_of_it in (store.stream, store.samples):
        with pytest.raises(StoreError, match="2 shards are yet to be written, the first of them rows 0 to 4 of source"):
            all_of_it()


def test_repr(tmp_path: Path) -> None:
    store = write(tmp_path / "pile", torch.randn(5, DIM), dtype="bfloat16")
    assert repr(store) == "Store(pile: 5 rows x 12, bfloat16, complete)\n  sources: data (5)"
    writer = StoreWriter(tmp_path / "pile", dim=DIM, dtype="bfloat16")
    assert repr(writer) == "StoreWriter(pile: dim 12, bfloat16)"
    source = writer.source("data", fingerprint="data", rows=5, shard_rows=4)
    assert repr(source) == "Source('data', 5 rows, 2 shards, 5 rows written)"


def test_the_manifest_says_what_the_index_is_of(tmp_path: Path) -> None:
    store = write(
        tmp_path, torch.randn(2, DIM), slices=SLICES, model={"name": "m", "fingerprint": "0a"}, settings={"budget": 7}
    )
    assert store.manifest["model"] == {"name": "m", "fingerprint": "0a"}
    assert store.manifest["settings"] == {"budget": 7}
    assert list(store.slices.items()) == list(SLICES.items())


def test_a_shard_again_with_the_same_numbers_is_no_matter(tmp_path: Path) -> None:
    rows = torch.randn(4, DIM)
    source = StoreWriter(tmp_path, dim=DIM).source("data", fingerprint="d", rows=4)
    source.write(source.shards[0], rows, samples_of(0, 4))
    source.write(source.shards[0], rows, samples_of(0, 4))
    with pytest.raises(StoreError, match=r"0000-000000.json is there, .* Nothing was overwritten"):
        source.write(source.shards[0], rows + 1, samples_of(0, 4))
    assert torch.equal(Store(tmp_path).read(0, 4), rows)
