"""A disk that is full stops a run with a clear message, costs no shard, and leaves nothing half written."""

import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_processes import DIM, content, rows_of, samples_of, write_index

from ghostfunc import _parquet
from ghostfunc.index import Source, Store, StoreError, StoreWriter


def source_of(folder: Path, rows: int = 12, shard_rows: int = 4) -> Source:
    return StoreWriter(folder, dim=DIM).source("data", fingerprint="d", rows=rows, shard_rows=shard_rows)


def fill(source: Source) -> None:
    for shard in source.missing():
        source.write(shard, rows_of(shard.start, shard.stop), samples_of(shard.start, shard.stop))


class Failing:
    """`os.fsync` and `os.replace` that fail once, at the n-th call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: int) -> None:
        self.calls = 0
        original = getattr(os, call)

        def failing(*arguments: object) -> object:
            self.calls += 1
            if self.calls == number:
                raise OSError(code, os.strerror(code), str(arguments[0]))
            return original(*arguments)

        monkeypatch.setattr(_parquet.os, call, failing)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_any_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source_of(tmp_path / "whole"))
    source = source_of(tmp_path / "full")
    with monkeypatch.context() as patch:
        failing = Failing(patch, call, number, errno.ENOSPC)
        with pytest.raises(StoreError, match=r"cannot be written: the disk is full .* Make room and run the same"):
            fill(source)
        assert failing.calls == number
    there = content(tmp_path / "full/shards")
    assert not [name for name in there if name.endswith(".tmp")]
    records = [name for name in there if name.endswith(".json")]
    assert all(name.replace(".json", suffix) in there for name in records for suffix in (".safetensors", ".parquet"))
    Store(tmp_path / "full").verify()
    fill(source_of(tmp_path / "full"))
    assert content(tmp_path / "full") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EDQUOT, "the quota of this user is used up"), (errno.EFBIG, "larger than may be written")],
)
def test_other_ways_to_be_full(code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    first, second, _ = source.shards
    source.write(first, rows_of(0, 4), samples_of(0, 4))
    Failing(monkeypatch, "replace", 2, code)
    with pytest.raises(StoreError, match=f"0000-000001.*{reason}.*The 1 shards that are there stay good"):
        source.write(second, rows_of(4, 8), samples_of(4, 8))


def test_another_error_of_the_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    Failing(monkeypatch, "replace", 2, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        fill(source)
    assert content(tmp_path / "shards") == {}


def test_an_interrupt_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_parquet.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(source)
    assert content(tmp_path / "shards") == {}


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_disk_that_is_full_at_the_start(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Failing(patch, call, 1, errno.ENOSPC)
        with pytest.raises(StoreError, match=r"the disk is full .*The 0 shards"):
            source_of(tmp_path)
    assert content(tmp_path) == {}
    fill(source_of(tmp_path))


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(tmp_path / "links", 12)

    def unsupported(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source))

    monkeypatch.setattr(os, "link", unsupported)
    write_index(tmp_path / "none", 12)
    assert content(tmp_path / "none") == content(tmp_path / "links")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    rows, shard_rows = 20_000, 2000  # 480 kB of numbers, and as much again with the samples
    fill(source_of(tmp_path / "whole", rows, shard_rows))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    folder = small_disk / "index"
    with pytest.raises(StoreError, match=r"the disk is full .* stay good. Make room and run the same command again"):
        fill(source_of(folder, rows, shard_rows))
    store = Store(folder)
    store.verify()
    written = rows // shard_rows - len(store.missing_shards)
    assert 0 < written < rows // shard_rows
    assert not list(folder.rglob("*.tmp")) and len(list(folder.glob("shards/*"))) == 3 * written
    ballast.unlink()
    with pytest.raises(StoreError, match="the disk is full"):  # still not enough, but some shards more
        fill(source_of(folder, rows, shard_rows))
    assert rows // shard_rows - len(Store(folder).missing_shards) > written
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    fill(source_of(folder, rows, shard_rows))
    assert content(folder) == content(tmp_path / "whole")


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Set the size that no file of this process may exceed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_be_so_large(tmp_path: Path, largest_file: Callable[[int], None]) -> None:
    source = source_of(tmp_path, 4000, 2000)
    largest_file(20_000)
    with pytest.raises(StoreError, match=r"larger than may be written there \(ulimit -f.*The 0 shards"):
        fill(source)
    assert content(tmp_path / "shards") == {}
    largest_file(resource.RLIM_INFINITY)
    fill(source)
    assert Store(tmp_path).complete


STREAM = """
import resource, sys, torch
from ghostfunc.index import Store
store = Store(sys.argv[1])
next(iter(store.stream(rows_at_a_time=8)))  # whatever is set up at a first use
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
total = sum(float(rows.double().sum()) for _, rows in store.stream(rows_at_a_time=8))
print(total)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how large a process is")
def test_a_stream_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """The process may grow by less than a quarter of what it reads, mapped files included."""
    dim, shard_rows, shards = 2**13, 64, 40
    stored = dim * shard_rows * shards * 4
    source = StoreWriter(tmp_path, dim=dim).source(
        "data", fingerprint="d", rows=shard_rows * shards, shard_rows=shard_rows
    )
    rows = rows_of(0, dim * shard_rows // DIM + 1).view(-1)[: dim * shard_rows].view(shard_rows, dim)
    for shard in source.missing():
        source.write(shard, rows, samples_of(shard.start, shard.stop))
    command = [sys.executable, "-c", STREAM, str(tmp_path), str(stored // 4)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # a thread's arena is 64 MiB of names
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    expected = float(Store(tmp_path).read(0, shard_rows).double().sum()) * shards
    assert float(ran.stdout) == pytest.approx(expected, rel=1e-9)


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Of `write_atomically`, which the logs use too."""

    def write(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise RuntimeError("no more")

    (tmp_path / "log").write_bytes(b"whole")
    with pytest.raises(RuntimeError, match="no more"):
        _parquet.write_atomically(tmp_path / "log", write)
    assert content(tmp_path) == {"log": b"whole"}
    (tmp_path / "log.tmp").write_bytes(b"of another process")
    with pytest.raises(FileExistsError):
        _parquet.write_atomically(tmp_path / "log", write, alone=True)
    assert content(tmp_path) == {"log": b"whole", "log.tmp": b"of another process"}
    _parquet.write_atomically(tmp_path / "log", lambda file: file.write(b"new"))
    assert content(tmp_path) == {"log": b"new"}
