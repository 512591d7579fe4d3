"""An index that is killed, however often and wherever, ends with the bytes of one that was not; so do many writers."""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from store_processes import DIM, Forks, content, forks, read_all, rows_of, write_index

from ghostfunc.index import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed by signals")


@pytest.fixture(scope="module")
def starter() -> Iterator[Forks]:
    with forks() as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill is the same there, and syncing costs nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def records(folder: Path) -> int:
    return len(list(folder.glob("shards/*.json")))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, place: Path, starter: Forks) -> None:
    rows = 20 * kills
    write_index(place / "uninterrupted", rows)
    total = records(place / "uninterrupted")
    folder = place / "killed"
    dice = random.Random(7)
    moments = sorted(dice.uniform(0, 0.97) for _ in range(kills))
    died = 0
    for moment in moments:
        pid = starter.start(folder, rows)
        deadline = time.monotonic() + 60
        while records(folder) < moment * total and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.003))  # anywhere between two files of a shard
        os.kill(pid, signal.SIGKILL)
        died += starter.wait(pid) == -signal.SIGKILL
    assert died == kills
    assert records(folder) < total  # so that the last run had something to do
    assert starter.wait(starter.start(folder, rows)) == 0
    assert content(folder) == content(place / "uninterrupted")


@pytest.mark.slow
def test_killed_at_every_step(place: Path, starter: Forks) -> None:
    """Each run dies one file operation later than the last one, until a run comes to its end."""
    rows = 8
    write_index(place / "uninterrupted", rows)
    expected = content(place / "uninterrupted")
    event, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        event += 1
        folder = place / f"killed at {event}"
        status = starter.wait(starter.start(folder, rows, die_at=event))
        if (folder / "manifest.json").exists():
            assert set(content(folder)) >= {"manifest.json"}
            store = Store(folder)
            store.verify()
        assert starter.wait(starter.start(folder, rows)) == 0
        assert content(folder) == expected, f"killed at file operation {event}"
    assert status == 0
    assert event > 9 * records(place / "uninterrupted")  # three files a shard, each opened, moved and synced


def test_killed_again_and_again_at_the_next_step(place: Path, starter: Forks) -> None:
    """One folder, killed at a step that comes later and later in each run, leftovers of leftovers included."""
    rows = 8
    write_index(place / "uninterrupted", rows)
    folder = place / "killed"
    status, runs = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        runs += 1
        status = starter.wait(starter.start(folder, rows, die_at=3 * runs))
    assert status == 0 and runs > 5
    assert content(folder) == content(place / "uninterrupted")


def test_two_writers_at_once(place: Path, starter: Forks) -> None:
    rows = 60
    write_index(place / "one", rows)
    pids = [starter.start(place / "two", rows, rank, 2) for rank in range(2)]
    assert [starter.wait(pid) for pid in pids] == [0, 0]
    assert content(place / "two") == content(place / "one")


def test_eight_writers_begin_the_same_index(place: Path, starter: Forks) -> None:
    rows = 8
    write_index(place / "one", rows)
    for attempt in range(4):
        folder = place / f"eight {attempt}"
        pids = [starter.start(folder, rows, rank, 8) for rank in range(8)]
        assert [starter.wait(pid) for pid in pids] == [0] * 8
        assert content(folder) == content(place / "one")


def test_two_killed_writers_are_followed_by_three(place: Path, starter: Forks) -> None:
    rows = 200
    write_index(place / "one", rows)
    folder = place / "many"
    pids = [starter.start(folder, rows, rank, 2, die_at=120 + 37 * rank) for rank in range(2)]
    assert [starter.wait(pid) for pid in pids] == [-signal.SIGKILL] * 2
    assert 0 < records(folder) < records(place / "one")
    pids = [starter.start(folder, rows, rank, 3) for rank in range(3)]
    assert [starter.wait(pid) for pid in pids] == [0, 0, 0]
    assert content(folder) == content(place / "one")


def test_the_same_writer_twice_at_once(place: Path, starter: Forks) -> None:
    """A mistake that is told, unless it does no harm; neither process damages what the other has written."""
    rows = 80
    write_index(place / "one", rows)
    for attempt in range(5):
        folder = place / f"twice {attempt}"
        pids = [starter.start(folder, rows) for _ in range(2)]
        assert {starter.wait(pid) for pid in pids} <= {0, 1}
        Store(folder).verify()
        assert starter.wait(starter.start(folder, rows)) == 0
        assert content(folder) == content(place / "one")


def test_what_the_writers_write(place: Path) -> None:
    """The comparisons above are of something: int8 rows near those that were given, source after source."""
    write_index(place, 20)
    expected = torch.cat([rows_of(0, 20), rows_of(0, 10), rows_of(0, 6)])
    read = read_all(place)
    assert read.shape == (36, DIM)
    assert (read - expected).abs().max() <= 1 / 254
    assert Store(place).sample_rows([21])["document"].to_pylist() == ["document 0"]
