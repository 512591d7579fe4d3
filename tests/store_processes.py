"""Processes that write one deterministic index, forked from one that has imported everything: they start at once."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from ghostfunc.index import Store, StoreWriter

DIM = 6


def rows_of(start: int, stop: int) -> torch.Tensor:
    return torch.sin(torch.arange(start * DIM, stop * DIM, dtype=torch.float64)).view(-1, DIM).float()


def samples_of(start: int, stop: int) -> pa.Table:
    ids = range(start, stop)
    return pa.table({"sample_id": pa.array(ids, pa.int64()), "document": [f"document {i // 3}" for i in ids]})


def write_index(folder: Path, rows: int, rank: int = 0, world: int = 1) -> None:
    """Two sources of known length, the second appended to the first, and a source that grows."""
    writer = StoreWriter(folder, dim=DIM, dtype="int8", slices={"a": (0, 2), "b": (2, DIM)}, settings={"seed": 3})
    for name, count, append in (("first", rows, False), ("second", rows // 2, True)):
        source = writer.source(name, fingerprint=name, rows=count, shard_rows=4, append=append)
        for shard in source.missing(rank, world):
            source.write(shard, rows_of(shard.start, shard.stop), samples_of(shard.start, shard.stop))
    grown = writer.source("grown", fingerprint="grown", rows=None, append=True)
    if rank == 0:
        while grown.rows_written < rows // 3:
            start = grown.rows_written
            grown.append(rows_of(start, start + 3), samples_of(start, start + 3))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Forks:
    """Starts writers by forking; a writer may kill itself at the n-th thing that it does to the file system."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def start(self, folder: Path, rows: int, rank: int = 0, world: int = 1, *, die_at: int = 0) -> int:
        """Begin a writer, and return its process id."""
        return int(self._ask(f"start {rank} {world} {rows} {die_at} {folder}"))

    def wait(self, pid: int) -> int:
        """The exit status of a writer; minus the signal that ended it."""
        return int(self._ask(f"wait {pid}"))

    def _ask(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextmanager
def forks() -> Iterator[Forks]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Forks(process)
        assert process.stdin
        process.stdin.close()


def _die_at(event: int, folder: str) -> None:
    seen = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") and folder in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _serve() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # whatever is set up at a first use is set up here
        write_index(Path(folder), 8)
    gc.freeze()
    for line in sys.stdin:
        verb, *words = line.rstrip("\n").split(" ", 5)
        if verb == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
            continue
        rank, world, rows, die_at = map(int, words[:4])
        pid = os.fork()
        if pid == 0:
            if die_at:
                _die_at(die_at, words[4])
            try:
                write_index(Path(words[4]), rows, rank, world)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)


def read_all(folder: Path) -> torch.Tensor:
    store = Store(folder)
    return store.read(0, store.rows)


if __name__ == "__main__":
    _serve()
