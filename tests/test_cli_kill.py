"""`ghostfunc index` killed by SIGKILL at any moment: the same command goes on, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_world import content, make_model, make_texts

from ghostfunc.index import Store

SAMPLES = 16

# Runs the first command that it reads itself, and so imports everything once, and each that follows in a process of its
# own. It answers with the process, and then with its end.
SERVER = """
import os, sys
from ghostfunc.cli._app import app
app(sys.stdin.readline().split(), standalone_mode=False)
for line in sys.stdin:
    child = os.fork()
    if not child:
        app(line.split())
    print("started", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COMMAND = [sys.executable, "-c", "from ghostfunc.cli import main; main()"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_texts(folder / "texts.jsonl", range(SAMPLES))
    return folder


def arguments(world: Path, out: str) -> list[str]:
    # One sample a shard and a batch: the more to be killed between.
    run = f"index {world}/texts.jsonl --model {world}/model --out {world}/{out} --shard-rows 1 --token-budget 1"
    return [*run.split(), "--rank", "16", "--min-rank", "2", "--block-size", "64"]


def shards(folder: Path) -> int:
    return len(list((folder / "shards").glob("*.json"))) if folder.exists() else 0


def test_killed_three_times(world: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    randomly = random.Random(0)
    partly = []
    with subprocess.Popen([sys.executable, "-c", SERVER], **piped) as server:
        assert server.stdin and server.stdout
        lines = iter(server.stdout.readline, "")

        def answer(word: str) -> int:
            return int(next(line for line in lines if line.startswith(word)).split()[1])

        def start(out: str) -> None:
            print(*arguments(world, out), file=server.stdin, flush=True)

        start("whole")
        for after in (1, 5, 10):
            start("killed")
            child = answer("started")
            while shards(world / "killed") < after:
                time.sleep(0.001)
            time.sleep(randomly.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert answer("ended") == -signal.SIGKILL
            partly.append(shards(world / "killed"))
        start("killed")
        assert answer("ended") == 0
    assert partly == sorted(partly) and partly[0] >= 1 and partly[-1] < SAMPLES, "each kill left a part"
    assert content(world / "killed") == content(world / "whole")
    Store(world / "killed").verify()


@pytest.mark.slow
def test_killed_twenty_times(world: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*COMMAND, *arguments(world, out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )

    began = time.monotonic()
    whole = start("once")
    assert whole.communicate() and whole.returncode == 0
    seconds = time.monotonic() - began
    randomly = random.Random(0)
    killed = finished = 0
    while killed < 20 or not finished:
        out = f"often-{finished}"
        running = start(out)
        try:
            running.communicate(timeout=randomly.uniform(0, seconds) if killed < 20 else None)
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()
        assert running.returncode in (0, -signal.SIGKILL)
        if running.returncode:
            killed += 1
            continue
        assert content(world / out) == content(world / "once")
        Store(world / out).verify()
        finished += 1


@pytest.mark.slow
def test_a_reader_that_goes_away_and_an_interruption_are_quiet(world: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*COMMAND, "explain", f"{world}/model"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert running.stdout and running.stderr
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait() == 141 and "Traceback" not in said and "Exception" not in said

    running = subprocess.Popen(
        [*COMMAND, *arguments(world, "interrupted")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    while not shards(world / "interrupted"):
        time.sleep(0.001)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130 and "Traceback" not in said
    assert said.endswith("interrupted: the same command goes on from what is written\n")
