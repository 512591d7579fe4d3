"""`ghostfunc index` killed by SIGKILL at any moment: the same command goes on, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cli_world import content, make_model, make_texts

from ghostfunc.index import Store

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

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


class Commands:
    """The server, asked from here."""

    def __init__(self) -> None:
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], **piped)
        assert self._server.stdin and self._server.stdout
        self._asked = self._server.stdin
        self._lines = iter(self._server.stdout.readline, "")

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)

    def ask(self, arguments: list[str]) -> None:
        print(*arguments, file=self._asked, flush=True)

    def answer(self, word: str) -> int:
        return int(next(line for line in self._lines if line.startswith(word)).split()[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_texts(folder / "few.jsonl", range(32))
    make_texts(folder / "many.jsonl", range(80))
    return folder


def arguments(world: Path, data: str, out: str) -> list[str]:
    # One sample a shard and a batch: the more to be killed between.
    run = f"index {world}/{data}.jsonl --model {world}/model --out {world}/{out} --shard-rows 1 --token-budget 1"
    return [*run.split(), "--rank", "16", "--min-rank", "2", "--block-size", "64"]


def shards(folder: Path) -> int:
    return len(list((folder / "shards").glob("*.json"))) if folder.exists() else 0


def test_killed_three_times(world: Path) -> None:
    randomly = random.Random(0)
    partly = []
    with Commands() as commands:
        commands.ask(arguments(world, "few", "whole"))
        for after in (1, 5, 10):
            commands.ask(arguments(world, "few", "killed"))
            child = commands.answer("started")
            while shards(world / "killed") < after:
                time.sleep(0.001)
            time.sleep(randomly.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert commands.answer("ended") == -signal.SIGKILL
            partly.append(shards(world / "killed"))
        commands.ask(arguments(world, "few", "killed"))
        assert commands.answer("ended") == 0
    assert partly == sorted(partly) and partly[0] >= 1 and partly[-1] < 32, "each kill left a part"
    assert content(world / "killed") == content(world / "whole")
    Store(world / "killed").verify()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(world: Path) -> None:
    randomly = random.Random(0)
    killed, finished = 0, 0
    with Commands() as commands:
        commands.ask(arguments(world, "few", "warm"))
        commands.ask(arguments(world, "many", "once"))
        commands.answer("started")
        began = time.monotonic()
        assert commands.answer("ended") == 0
        seconds = time.monotonic() - began
        while killed < 20 or not finished:
            out = f"often-{finished}"
            commands.ask(arguments(world, "many", out))
            child = commands.answer("started")
            if killed < 20:
                time.sleep(randomly.uniform(0, seconds))
                with suppress(ProcessLookupError):  # it may have finished
                    os.kill(child, signal.SIGKILL)
            ended = commands.answer("ended")
            assert ended in (0, -signal.SIGKILL)
            if ended:
                killed += 1
                continue
            assert content(world / out) == content(world / "once")
            Store(world / out).verify()
            finished += 1


@pytest.mark.slow
def test_a_reader_that_goes_away_and_an_interruption_are_quiet(world: Path) -> None:
    running = subprocess.Popen(
        [*COMMAND, "explain", f"{world}/model"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert running.stdout and running.stderr
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait() == 141 and "Traceback" not in said and "Exception" not in said

    # Where a shell has started the tests in the background, they and their children ignore SIGINT.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    running = subprocess.Popen(
        [*COMMAND[:-1], heard + COMMAND[-1], *arguments(world, "many", "interrupted")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    while not shards(world / "interrupted"):
        time.sleep(0.001)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130 and "Traceback" not in said
    assert said.endswith("interrupted: the same command goes on from what is written\n")
