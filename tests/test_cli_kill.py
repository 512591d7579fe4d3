"""Commands killed by SIGKILL at any moment, one process or several: they go on, and end with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cli_world import content, make_model, make_texts

from ghostfunc.index import Store

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Runs the first command that it reads itself, and so imports everything once, and each that follows in a process of its
# own. It answers with the process, and when asked for it, with its end.
SERVER = """
import os, sys
from ghostfunc.cli._app import app
app(sys.stdin.readline().split(), standalone_mode=False)
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "wait":
        print("ended", os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        app(words)
    print("started", child, flush=True)
"""
COMMAND = [sys.executable, "-c", "from ghostfunc.cli import main; main()"]


class Commands:
    """The server, asked from here."""

    def __init__(self, first: list[str]) -> None:
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], **piped)
        assert self._server.stdin and self._server.stdout
        self._asked = self._server.stdin
        self._lines = iter(self._server.stdout.readline, "")
        print(*first, file=self._asked, flush=True)

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)

    def start(self, arguments: list[str]) -> int:
        """Begin a command, and return its process."""
        return self._answer("started", "start", *arguments)

    def wait(self, child: int) -> int:
        """The exit status of a command; minus the signal that ended it."""
        return self._answer("ended", "wait", child)

    def run(self, arguments: list[str]) -> int:
        """The exit status of a command, from its start to its end."""
        return self.wait(self.start(arguments))

    def _answer(self, word: str, *question: object) -> int:
        print(*question, file=self._asked, flush=True)
        return int(next(line for line in self._lines if line.startswith(word)).split()[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_texts(folder / "few.jsonl", range(32))
    make_texts(folder / "many.jsonl", range(80))
    make_texts(folder / "questions.jsonl", range(90, 92))
    return folder


@pytest.fixture(scope="module")
def commands(world: Path) -> Iterator[Commands]:
    with Commands(arguments(world, "few", "whole-index")) as running:
        yield running


def arguments(world: Path, data: str, out: str, *, command: str = "index") -> list[str]:
    # One sample a shard and a batch: the more to be killed between.
    run = f"{command} {world}/{data}.jsonl --model {world}/model --out {world}/{out} --shard-rows 1 --token-budget 1"
    own = {"index": "--rank 16 --min-rank 2", "score": f"--file {world}/questions.jsonl"}[command]
    return [*run.split(), *own.split(), "--block-size", "64"]


def ranks(command: list[str], world: int) -> list[list[str]]:
    """The command of each of so many processes."""
    return [[*command, "--rank-of", str(rank), "--world-size", str(world)] for rank in range(world)]


def shards(folder: Path) -> int:
    return len(list((folder / "shards").glob("*.json"))) if folder.exists() else 0


@pytest.mark.slow
def test_killed_three_times(world: Path, commands: Commands) -> None:
    randomly = random.Random(0)
    partly = []
    for after in (1, 5, 10):
        child = commands.start(arguments(world, "few", "killed"))
        while shards(world / "killed") < after:
            time.sleep(0.001)
        time.sleep(randomly.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert commands.wait(child) == -signal.SIGKILL
        partly.append(shards(world / "killed"))
    assert commands.run(arguments(world, "few", "killed")) == 0
    assert partly == sorted(partly) and partly[0] >= 1 and partly[-1] < 32, "each kill left a part"
    assert content(world / "killed") == content(world / "whole-index")
    Store(world / "killed").verify()


@pytest.mark.parametrize("command", ["index", pytest.param("score", marks=pytest.mark.slow)])
def test_a_killed_rank_of_three_is_made_up_for_by_two(world: Path, commands: Commands, command: str) -> None:
    whole, killed = world / f"whole-{command}", world / f"killed-rank-{command}"
    assert commands.run(arguments(world, "few", whole.name, command=command)) == 0  # the index is there already
    asked = arguments(world, "few", killed.name, command=command)
    children = [commands.start(of_rank) for of_rank in ranks(asked, 3)]
    while shards(killed) < 3:
        time.sleep(0.001)
    os.kill(children[1], signal.SIGKILL)
    assert [commands.wait(child) for child in children] == [0, -signal.SIGKILL, 0]
    assert 20 <= shards(killed) < 32 and not Store(killed).complete
    assert [commands.wait(child) for child in [commands.start(of_rank) for of_rank in ranks(asked, 2)]] == [0, 0]
    assert content(killed) == content(whole)
    Store(killed).verify()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["index", "score"])
def test_any_number_of_ranks_killed_at_random_moments(world: Path, commands: Commands, command: str) -> None:
    randomly = random.Random(1)
    whole, killed = world / f"one-{command}", world / f"any-{command}"
    assert commands.run(arguments(world, "many", whole.name, command=command)) == 0
    asked = arguments(world, "many", killed.name, command=command)
    partly, died = [], 0
    for after in range(0, 64, 8):
        children = [commands.start(of_rank) for of_rank in ranks(asked, randomly.randint(1, 4))]
        deadline = time.monotonic() + 300
        while shards(killed) < after and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(randomly.uniform(0, 0.02))
        for child in children:
            with suppress(ProcessLookupError):  # it may have finished
                os.kill(child, signal.SIGKILL)
        died += sum(commands.wait(child) == -signal.SIGKILL for child in children)
        partly.append(shards(killed))
    assert died >= 8 and partly == sorted(partly) and len(set(partly)) > 4 and partly[-1] < 80, (died, partly)
    children = [commands.start(of_rank) for of_rank in ranks(asked, 3)]
    assert [commands.wait(child) for child in children] == [0, 0, 0]
    assert content(killed) == content(whole)
    for count in (2, 3):  # and without a kill
        several = world / f"{count}-{command}"
        for of_rank in ranks(arguments(world, "many", several.name, command=command), count):
            assert commands.run(of_rank) == 0
        assert content(several) == content(whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(world: Path, commands: Commands) -> None:
    randomly = random.Random(0)
    killed, finished = 0, 0
    began = time.monotonic()
    assert commands.run(arguments(world, "many", "once")) == 0
    seconds = time.monotonic() - began
    while killed < 20 or not finished:
        out = f"often-{finished}"
        child = commands.start(arguments(world, "many", out))
        if killed < 20:
            time.sleep(randomly.uniform(0, seconds))
            with suppress(ProcessLookupError):  # it may have finished
                os.kill(child, signal.SIGKILL)
        ended = commands.wait(child)
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
