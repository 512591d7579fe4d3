"""Nothing damaged or foreign is used or overwritten: each refusal names the file or field, and what to do about it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from store_processes import content

from ghostfunc import _parquet
from ghostfunc.index import Shard, Source, Store, StoreError, StoreWriter, _writer
from ghostfunc.index._manifest import SourceFile, create_source

DIM = 6
ARGUMENTS = {
    "dim": DIM,
    "dtype": "float32",
    "slices": {"a": (0, 2), "b": (2, 6)},
    "model": {"name": "gpt2", "fingerprint": "m1"},
    "projection": {"kind": "gaussian", "fingerprint": "p1"},
    "settings": {"token_budget": 4096, "corpus": {"block_size": 8}},
}


def begin(folder: Path, **changes) -> StoreWriter:
    return StoreWriter(folder, **(ARGUMENTS | changes))


def rows_of(shard: Shard) -> torch.Tensor:
    return torch.arange(shard.start * DIM, shard.stop * DIM).view(-1, DIM).float()


def samples_of(shard: Shard) -> pa.Table:
    return pa.table({"sample_id": range(100 + shard.start, 100 + shard.stop)})


def fill(source: Source) -> list[int]:
    """Write what is missing, and return its numbers."""
    shards = source.missing()
    for shard in shards:
        source.write(shard, rows_of(shard), samples_of(shard))
    return [shard.number for shard in shards]


def data_of(writer: StoreWriter) -> Source:
    return writer.source("data", fingerprint="d1", rows=12, shard_rows=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(data_of(begin(tmp_path / "index")))
    return tmp_path / "index"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 7, "slices": None}, "dim is 6 there and 7 now"),
        ({"dtype": "int8"}, "dtype is 'float32' there and 'int8' now"),
        ({"slices": {"a": (0, 3), "b": (3, 6)}}, "slices.a is [0, 2] there and [0, 3] now"),
        ({"slices": {"a": (0, 2), "c": (2, 6)}}, "slices.c is 'absent' there and [2, 6] now"),
        ({"model": {"name": "opt", "fingerprint": "m2"}}, "model.fingerprint is 'm1' there and 'm2' now"),
        ({"projection": {"kind": "pca", "fingerprint": "p2"}}, "projection.kind is 'gaussian' there and 'pca' now"),
        (
            {"settings": {"token_budget": 4096, "corpus": {"block_size": 16}}},
            "settings.corpus.block_size is 8 there and 16 now",
        ),
    ],
)
def test_another_index_is_refused(change: dict, message: str, folder: Path) -> None:
    before = content(folder)
    with pytest.raises(StoreError, match=re.escape(message)) as refusal:
        begin(folder, **change)
    assert "Choose another folder" in str(refusal.value)
    assert content(folder) == before


def test_names_are_no_part_of_the_identity(folder: Path) -> None:
    writer = begin(folder, model={"name": "/elsewhere/gpt2", "fingerprint": "m1"})
    assert fill(data_of(writer)) == []
    assert Store(folder).manifest["model"]["name"] == "gpt2"


def test_other_data_is_refused_unless_appended(folder: Path) -> None:
    writer = begin(folder)
    with pytest.raises(StoreError, match=r"holds other data: 'data' \(d1\), not 'news' \(d2\). append=True adds it"):
        writer.source("news", fingerprint="d2", rows=3)
    with pytest.raises(StoreError, match=r"source 'data' of other data .*d1 there, d2 now"):
        writer.source("data", fingerprint="d2", rows=3, append=True)
    with pytest.raises(StoreError, match="was begun with rows=12, and now rows=13"):
        writer.source("data", fingerprint="d1", rows=13, shard_rows=4)
    with pytest.raises(StoreError, match="was begun with shard_rows=4, and now shard_rows=5"):
        writer.source("data", fingerprint="d1", rows=12, shard_rows=5)
    assert fill(writer.source("news", fingerprint="d2", rows=3, append=True)) == [0]
    assert fill(writer.source("news", fingerprint="d2", rows=3)) == []


def flip(path: Path) -> None:
    written = bytearray(path.read_bytes())
    written[-3] ^= 1
    path.write_bytes(written)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_text('{"index": ')


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("suffix", "harm", "reason"),
    [
        (".safetensors", flip, "safetensors does not have its checksum"),
        (".safetensors", truncate, "safetensors has .* bytes instead of"),
        (".safetensors", Path.unlink, "safetensors is missing"),
        (".parquet", flip, "parquet does not have its checksum"),
        (".parquet", truncate, "parquet has .* bytes instead of"),
        (".parquet", Path.unlink, "parquet is missing"),
        (".json", garble, "json is damaged"),
        (".json", empty, "json is damaged"),
    ],
)
def test_a_damaged_shard_is_named_and_refused(
    suffix: str, harm: Callable[[Path], None], reason: str, folder: Path
) -> None:
    store = Store(folder)
    expected = content(folder)
    harm(folder / f"shards/0000-000001{suffix}")
    harmed = content(folder)
    message = f"(?s)A shard of the index .*0000-000001[.]{reason}.*Delete the files of this number"
    for use in (
        lambda: fill(data_of(begin(folder))),
        store.verify,
        lambda: Store(folder).verify(),
        lambda: store.read(5, 6),
        lambda: list(store.stream()),
        store.samples,
        lambda: store.sample_rows([6]),
    ):
        with pytest.raises(StoreError, match=message):
            use()
    assert torch.equal(store.read(0, 4), rows_of(Shard(0, 0, 4)))  # the others are as good as before
    assert content(folder) == harmed
    for path in folder.glob("shards/0000-000001.*"):
        path.unlink()
    assert fill(data_of(begin(folder))) == [1]
    assert content(folder) == expected


def test_every_damaged_shard_is_named(folder: Path) -> None:
    flip(folder / "shards/0000-000000.safetensors")
    truncate(folder / "shards/0000-000002.parquet")
    with pytest.raises(StoreError, match=r"(?s)2 shards of .*0000-000000.safetensors.*0000-000002.parquet"):
        Store(folder).verify()
    # A process is concerned with its own share: another rank's damage is the other rank's to name.
    assert data_of(begin(folder)).missing(rank=1, world=3) == []
    with pytest.raises(StoreError, match="A shard of "):
        data_of(begin(folder)).missing(rank=2, world=3)


def test_a_stream_without_checksums_still_sees_a_wrong_size(folder: Path) -> None:
    flip(folder / "shards/0000-000001.safetensors")
    assert len(list(Store(folder).stream(check=False))) == 3
    truncate(folder / "shards/0000-000001.safetensors")
    with pytest.raises(StoreError, match="bytes instead of"):
        list(Store(folder).stream(check=False))


@pytest.mark.parametrize(
    ("field", "value", "what"), [("index", "ff", "another index"), ("source", "d9", "other data"), ("stop", 7, "rows")]
)
def test_a_foreign_shard_is_refused(field: str, value: str | int, what: str, folder: Path) -> None:
    path = folder / "shards/0000-000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for use in (lambda: fill(data_of(begin(folder))), lambda: Store(folder).read(5, 6), Store(folder).verify):
        with pytest.raises(StoreError, match=f"0000-000001.json is foreign: it is of .*{what} .*{field}"):
            use()


@pytest.mark.parametrize("files", [None, {}, {".safetensors": {"bytes": 1}}, {".safetensors": 3}])
def test_a_shard_without_checksums_is_refused(files: dict | None, folder: Path) -> None:
    path = folder / "shards/0000-000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    with pytest.raises(StoreError, match=r"0000-000001.json is damaged: it has no checksum of its .safetensors"):
        Store(folder).verify()


def test_a_shard_of_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    fill(data_of(begin(tmp_path / "other", settings={"token_budget": 1})))
    for path in (tmp_path / "other/shards").glob("0000-000001.*"):
        shutil.copy(path, folder / "shards")
    with pytest.raises(StoreError, match="foreign: it is of another index"):
        data_of(begin(folder)).missing()


@pytest.mark.parametrize("name", ["0000-000003.json", "0001-000000.json"])
def test_a_shard_of_no_source_is_refused(name: str, folder: Path) -> None:
    shutil.copy(folder / "shards/0000-000000.json", folder / "shards" / name)
    with pytest.raises(StoreError, match=f"{name} is foreign"):
        Store(folder)


def test_leftovers_of_a_kill_are_replaced(folder: Path) -> None:
    expected = content(folder)
    (folder / "shards/0000-000001.json").unlink()
    flip(folder / "shards/0000-000001.safetensors")
    (folder / "shards/0000-000001.parquet.tmp").write_bytes(b"half of")
    (folder / "shards/0000-000002.json.tmp").write_bytes(b"{")
    (folder / "manifest.json.0f.tmp").write_bytes(b"{")
    (folder / "sources/0000.json.0f.tmp").write_bytes(b"{")
    assert not Store(folder).complete
    assert fill(data_of(begin(folder))) == [1]
    assert content(folder) == expected


def test_a_grown_source_with_a_gap_is_refused(tmp_path: Path) -> None:
    source = begin(tmp_path).source("loop", fingerprint="l", rows=None)
    shards = [source.append(rows_of(Shard(0, 2 * n, 2 * n + 2)), samples_of(Shard(0, 0, 2))) for n in range(3)]
    assert shards[-1] == Shard(2, 4, 6)
    expected = content(tmp_path)
    flip(tmp_path / "shards/0000-000001.safetensors")
    with pytest.raises(StoreError, match=r"0000-000001.safetensors does not have its checksum"):
        begin(tmp_path).source("loop", fingerprint="l", rows=None)
    for path in tmp_path.glob("shards/0000-000001.*"):
        path.unlink()
    for use in (lambda: begin(tmp_path).source("loop", fingerprint="l", rows=None), lambda: Store(tmp_path)):
        with pytest.raises(StoreError, match=r"0000-000001.json is missing, .* delete the later ones too"):
            use()
    for path in tmp_path.glob("shards/0000-000002.*"):
        path.unlink()
    source = begin(tmp_path).source("loop", fingerprint="l", rows=None)
    assert source.rows_written == 2
    for n in (1, 2):
        source.append(rows_of(Shard(0, 2 * n, 2 * n + 2)), samples_of(Shard(0, 0, 2)))
    assert content(tmp_path) == expected


def test_an_index_without_its_description(folder: Path) -> None:
    with pytest.raises(StoreError, match=r"is no index: it has no manifest.json"):
        Store(folder / "shards")
    manifest = (folder / "manifest.json").read_text()
    for damage in (manifest[:-9], "[]", manifest.replace('"dim"', '"dims"')):
        (folder / "manifest.json").write_text(damage)
        for use in (Store, begin):
            with pytest.raises(StoreError, match=r"manifest.json is damaged"):
                use(folder)
    (folder / "manifest.json").write_text(manifest.replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match="has format 2, and this version of ghostfunc reads format 1"):
        Store(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest.json is lost"):
        begin(folder)
    (folder / "manifest.json").write_text(manifest)
    (folder / "sources/0000.json").write_text('{"name": 1}')
    with pytest.raises(StoreError, match=r"0000.json is damaged"):
        Store(folder)
    (folder / "sources/0000.json").rename(folder / "sources/0001.json")
    with pytest.raises(StoreError, match=r"0000.json is missing"):
        Store(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused(dtype: str, value: float, tmp_path: Path) -> None:
    source = data_of(begin(tmp_path, dtype=dtype))
    shard = source.shards[1]
    rows = rows_of(shard)
    rows[1, 3] = rows[3, 0] = value
    before = content(tmp_path)
    with pytest.raises(StoreError, match="Rows 4 to 8 of source 'data': those of sample_id 105, 107 are not finite"):
        source.write(shard, rows, samples_of(shard))
    assert content(tmp_path) == before


def test_rows_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    source = data_of(begin(tmp_path, dtype="float16"))
    rows = rows_of(source.shards[0])
    rows[2, 2] = 7e4
    with pytest.raises(StoreError, match="sample_id 102 do not fit into float16: choose bfloat16 or float32"):
        source.write(source.shards[0], rows, samples_of(source.shards[0]))


def test_many_rows_that_are_not_finite(tmp_path: Path) -> None:
    source = begin(tmp_path).source("data", fingerprint="d", rows=30)
    with pytest.raises(StoreError, match="row 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more are not finite"):
        source.write(source.shards[0], torch.full((30, DIM), torch.nan), pa.table({"loss": [0.0] * 30}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, DIM), r"shape \[4, 6\]; they are \[3, 6\] of torch.float32"),
        (torch.zeros(4, DIM + 1), r"they are \[4, 7\]"),
        (torch.zeros(4 * DIM), r"they are \[24\]"),
        (torch.zeros(4, DIM, dtype=torch.int64), r"they are \[4, 6\] of torch.int64"),
        (torch.zeros(4, DIM, dtype=torch.complex64), r"of torch.complex64"),
    ],
)
def test_rows_of_another_shape_or_kind_are_refused(rows: torch.Tensor, message: str, tmp_path: Path) -> None:
    source = data_of(begin(tmp_path))
    with pytest.raises(StoreError, match=message):
        source.write(source.shards[0], rows, samples_of(source.shards[0]))
    assert list(tmp_path.glob("shards/*")) == []


def test_other_wrong_arguments(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    source = data_of(writer)
    shard = source.shards[0]
    with pytest.raises(StoreError, match=r"table of 3 samples .*; it should have 4"):
        source.write(shard, rows_of(shard), samples_of(Shard(0, 0, 3)))
    with pytest.raises(StoreError, match="no column 'row', which the store adds"):
        source.write(shard, rows_of(shard), pa.table({"row": range(4)}))
    with pytest.raises(StoreError, match="is no shard of source 'data', which has 3"):
        source.write(Shard(0, 0, 5), rows_of(Shard(0, 0, 5)), samples_of(Shard(0, 0, 5)))
    with pytest.raises(StoreError, match="was begun with 12 rows: write its `missing` shards"):
        source.append(rows_of(shard), samples_of(shard))
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(StoreError, match=f"rank={rank} is not one of world={world}"):
            source.missing(rank, world)
    with pytest.raises(StoreError, match="rows=-1 and shard_rows=1024 make no shards"):
        writer.source("x", fingerprint="x", rows=-1, append=True)
    with pytest.raises(StoreError, match="dtype='float8' is not stored; choose one of float32"):
        begin(tmp_path / "x", dtype="float8")
    with pytest.raises(StoreError, match="dim=0"):
        begin(tmp_path / "x", dim=0, slices=None)
    with pytest.raises(StoreError, match=r"slices\['b'\] is slice\(3, 6, None\), and it should begin at column 2"):
        begin(tmp_path / "x", slices={"a": (0, 2), "b": (3, 6)})
    with pytest.raises(StoreError, match="slices are of 5 columns, and the rows have dim=6"):
        begin(tmp_path / "x", slices={"a": (0, 2), "b": (2, 5)})
    with pytest.raises(StoreError, match=r"settings goes into manifest.json, and .*dtype is not JSON serializable"):
        begin(tmp_path / "x", settings={"dtype": torch.float32})
    assert not (tmp_path / "x").exists()


def test_wrong_reads(folder: Path) -> None:
    store = Store(folder)
    for start, stop in ((-1, 2), (3, 2), (0, 13)):
        with pytest.raises(StoreError, match=f"Rows {start} to {stop} are asked for, and .* has rows 0 to 12"):
            store.read(start, stop)
    for columns in (slice(2, 2), slice(6, 9), slice(0, 4, 2)):
        with pytest.raises(StoreError, match="none of the 6 columns, or skips some"):
            store.read(0, 2, columns)
    with pytest.raises(StoreError, match="rows_at_a_time=0"):
        store.stream(rows_at_a_time=0)
    assert store.read(2, 2).shape == (0, DIM)


def test_two_processes_at_the_same_shard_are_told(tmp_path: Path) -> None:
    source = data_of(begin(tmp_path))
    shard = source.missing()[0]
    other = tmp_path / "shards/0000-000000.parquet.tmp"
    other.write_bytes(b"being written")
    with pytest.raises(StoreError, match=r"Another process writes .*0000-000000.parquet too .* its own rank"):
        source.write(shard, rows_of(shard), samples_of(shard))
    # The other process has perhaps written the rows just before: they are its own, too.
    assert set(content(tmp_path / "shards")) == {other.name, "0000-000000.safetensors"}
    assert other.read_bytes() == b"being written"
    assert fill(data_of(begin(tmp_path))) == [0, 1, 2]  # as after a kill: it is a leftover now


def test_a_temporary_file_that_another_process_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data_of(begin(tmp_path))
    shard = source.missing()[0]

    def started_again(_: int) -> None:
        assert data_of(begin(tmp_path)).missing() == source.shards

    with monkeypatch.context() as patch:
        patch.setattr(_parquet.os, "fsync", started_again)
        with pytest.raises(StoreError, match=r"Another process writes .*0000-000000.safetensors too"):
            source.write(shard, rows_of(shard), samples_of(shard))
    assert fill(data_of(begin(tmp_path))) == [0, 1, 2]


def test_two_sources_appended_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the next number for its own source, between our looking and our writing."""

    def raced(where: Path, number: int, source: SourceFile) -> None:
        monkeypatch.undo()
        begin(folder).source("theirs", fingerprint="d3", rows=3, append=True)
        create_source(where, number, source)

    monkeypatch.setattr(_writer, "create_source", raced)
    begin(folder).source("ours", fingerprint="d2", rows=2, append=True)
    assert Store(folder).sources == {"data": range(12), "theirs": range(12, 15), "ours": range(15, 17)}
