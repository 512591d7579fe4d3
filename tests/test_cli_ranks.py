"""Several processes of one command: under torchrun, under srun, by flags; which of them speaks, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import content, make_model, make_texts
from typer.testing import CliRunner

from ghostfunc.cli import _library, _share
from ghostfunc.cli._app import app
from ghostfunc.cli._share import LastWord, Share, wait_for_rank_0
from ghostfunc.index import Store
from ghostfunc.index._shards import Shard, share_of

COMMANDS = ("index", "score")


def srun(rank: int, world: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": str(rank)}


def torchrun(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


def run(arguments: list[str], environment: dict[str, str] | None = None, status: int = 0) -> Any:
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_texts(folder / "texts.jsonl", range(12))
    make_texts(folder / "many.jsonl", range(200))
    make_texts(folder / "questions.jsonl", range(50, 52))
    return folder


def asked(world: Path, command: str, out: Path, *, data: str = "texts", rows: int = 4) -> list[str]:
    own = {"index": "--rank 16 --min-rank 2", "score": f"--file {world}/questions.jsonl"}[command]
    line = f"{command} {world}/{data}.jsonl -m {world}/model -o {out} {own} --block-size 64 --shard-rows {rows} --json"
    return line.split()


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_shard_is_in_one_share(world_size: int) -> None:
    shards = [Shard(number, number, number + 1) for number in range(50)]
    shares = [share_of(shards, rank, world_size) for rank in range(world_size)]
    assert sorted(shard for share in shares for shard in share) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


@pytest.mark.parametrize(("before", "after"), [(4, 2), (8, 4), (4, 8), (3, 2), (8, 7)])
def test_what_a_dead_rank_left_is_work_for_all(before: int, after: int) -> None:
    left = share_of([Shard(number, number, number + 1) for number in range(64 * before)], before - 1, before)
    assert len(left) == 64
    parts = [len(share_of(left, rank, after)) for rank in range(after)]
    assert min(parts) > 0.5 * 64 / after, parts


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_a_launcher_says_which_process_this_is(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**launcher(5, 8), list(launcher(0, 1))[2]: "1"}.items():
        monkeypatch.setenv(name, value)
    assert Share.of(5, 8) == Share(5, 8, local_rank=1, together=True)
    assert Share.of(2, 4) == Share(2, 4, local_rank=2), "flags that say something else"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("auto", "cuda"):
        assert [_library._device(name, local) for local in (0, 1, 5)] == ["cuda:0", "cuda:1", "cuda:1"]


def test_a_batch_script_of_slurm_is_one_process(world: Path, tmp_path: Path) -> None:
    """It has the number of tasks of the job, and is none of them."""
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    nothing = ["index", str(tmp_path / "nothing.jsonl"), "-m", str(world / "model"), "-o", str(tmp_path / "index")]
    assert run(nothing, batch, status=2).stderr.startswith("error: "), "not 'rank 0 of 8: error: '"
    assert run(nothing, srun(0, 8), status=2).stderr.startswith("rank 0 of 8: error: ")


# ---------------------------------------------------------------- who speaks


@pytest.mark.parametrize(("command", "launcher"), [("index", torchrun), ("score", srun)])
def test_ranks_write_what_one_process_writes_and_one_of_them_tells(
    world: Path, tmp_path: Path, command: str, launcher: Any
) -> None:
    alone = json.loads(run(asked(world, command, tmp_path / "one")).stdout)
    shared = asked(world, command, tmp_path / "two")
    first = run(shared, launcher(0, 2))
    assert not first.stdout and "rank 0 of 2: done (" in first.stderr and "8 rows of other ranks" in first.stderr
    last = run(shared, launcher(1, 2))
    assert "rank 1 of 2: " in last.stderr
    told = json.loads(last.stdout)
    assert told["complete"] and {**told, "folder": 0, "run": 0} == {**alone, "folder": 0, "run": 0}
    assert content(tmp_path / "two") == content(tmp_path / "one")

    again = run(shared, launcher(1, 2))
    assert not again.stdout and "nothing is left to be written" in again.stderr
    assert json.loads(run(shared, launcher(0, 2)).stdout)["complete"]
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_of_two_that_end_at_once_one_has_the_last_word(world: Path, tmp_path: Path) -> None:
    run(asked(world, "index", tmp_path))
    record = tmp_path / "shards" / "0000-000001.json"
    held = record.read_bytes()
    record.unlink()
    words = [LastWord(str(tmp_path), Share(rank, 3)) for rank in range(3)]
    for rank, word in enumerate(words):
        word.begin(work=rank > 0)
    assert not any(word.is_ours(Store(tmp_path)) for word in words)
    record.write_bytes(held)
    assert [word.is_ours(Store(tmp_path)) for word in words[::-1]] == [True, False, False]
    assert not (tmp_path / _share.UNFINISHED).exists()


def test_a_mark_that_a_kill_left_is_taken_away(world: Path, tmp_path: Path) -> None:
    """By a kill between the last shard and the last word."""
    run(asked(world, "index", tmp_path / "index"))
    whole = content(tmp_path / "index")
    for environment in ({}, srun(1, 2)):
        (tmp_path / "index" / _share.UNFINISHED).touch()
        assert json.loads(run(asked(world, "index", tmp_path / "index"), environment).stdout)["complete"]
        assert content(tmp_path / "index") == whole


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_not_shared_is_told(
    world: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_share, "PATIENCE", 0.2)
    said = run(asked(world, command, tmp_path / "out"), srun(1, 2), status=1).stderr.splitlines()[-1]
    assert said.startswith("rank 1 of 2: error: on ") and "run.yaml has not appeared within 0.2 s" in said
    assert f"{tmp_path}/out is not on a disk that all machines share" in said
    # Processes that are started by hand may begin in any order.
    hand = run([*asked(world, command, tmp_path / "out"), "--rank-of", "1", "--world-size", "2"])
    assert "rank 1 of 2: done" in hand.stderr


def test_waiting_ends_when_rank_0_has_begun(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    late = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.5); open({str(file)!r}, 'w')"])
    began = time.monotonic()
    wait_for_rank_0(Share(1, 2, together=True), file, patience=120.0)
    assert file.exists() and 0.2 < time.monotonic() - began < 60
    assert late.wait() == 0


@pytest.mark.parametrize("launcher", [torchrun, srun])
@pytest.mark.parametrize(
    "command", ["query my-index prompt", "report my-index prompt", "explain model", "tokenize texts --output_dir out"]
)
def test_commands_for_one_process_refuse_to_be_several(command: str, launcher: Any) -> None:
    said = run(command.split(), launcher(1, 2), status=2).stderr
    assert f"this is process 1 of 2, and ghostfunc {command.split()[0]} is for one" in said


def test_one_process_of_a_launcher_is_no_matter(tmp_path: Path) -> None:
    assert "is no index" in run(["query", str(tmp_path), "prompt"], torchrun(0, 1), status=2).stderr


# ---------------------------------------------------------------- torchrun itself


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(after_name[1]) == parent:
            found.append(int(path.parent.name))
    return found


def launch(arguments: list[str], ranks: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "ghostfunc.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the ranks are found in /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_rank_under_torchrun(world: Path, tmp_path: Path, command: str) -> None:
    """torchrun ends the others; two ranks then end with the bytes of one process, and one of them tells."""
    run(asked(world, command, tmp_path / "one", data="many", rows=1))
    shared = asked(world, command, tmp_path / "three", data="many", rows=1)
    running = launch(shared, 3)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "three").glob("shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(max(children(running.pid)), signal.SIGKILL)
    said, complained = running.communicate(timeout=300)
    assert running.returncode != 0 and not said, complained
    assert not Store(tmp_path / "three").complete

    running = launch(shared, 2)
    said, complained = running.communicate(timeout=300)
    assert running.returncode == 0, complained
    assert json.loads(said)["complete"], "one object on stdout"
    assert complained.count(": done (") == 1
    assert content(tmp_path / "three") == content(tmp_path / "one")
