"""Kill tests: a training that loses one of its ranks, anywhere, goes on to the numbers of one that does not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_worker import PLACES, STEPS, build
from lm_world import options_of, values, weights, write_data, write_model
from safetensors.torch import load_file
from torch import Tensor

import ghostfunc as gf
from ghostfunc.checkpoint import TrainingCheckpoints

WORKER = Path(__file__).with_name("kill_worker.py")
EXAMPLE = Path(__file__).parents[1] / "examples" / "GradDotProd_LM" / "main.py"
BOUND = 90.0  # seconds in which the other ranks end on a busy machine; their collectives would wait for 120
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", "localhost:0"]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


class Run:
    """A training in a folder, which can be started again and again."""

    def __init__(self, folder: Path, ranks: int, *flags: str) -> None:
        folder.mkdir()
        self.folder, self.ranks, self.flags, self.starts = folder, ranks, flags, 0

    def start(self, *flags: str) -> list[subprocess.Popen[str]]:
        self.starts += 1
        common = ["--ranks", str(self.ranks), "--store", str(self.folder / f"store-{self.starts}")]
        common += [*self.flags, *flags]
        return [
            start([sys.executable, str(WORKER), str(self.folder), "--rank", str(rank), *common])
            for rank in range(self.ranks)
        ]

    def finish(self) -> None:
        processes = self.start()
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * self.ranks, "\n".join(errors)

    def lose(self, rank: int, step: int, place: str) -> list[str]:
        """Let a rank die; what the others say when they end, which they have to do in time."""
        processes = self.start("--die", str(rank), str(step), place)
        processes[rank].communicate(timeout=300)
        assert processes[rank].returncode == -signal.SIGKILL, f"rank {rank} never came to {place} from step {step} on"
        return self.ended(processes, but=rank)

    def ended(self, processes: list[subprocess.Popen[str]], but: int) -> list[str]:
        others = [process for number, process in enumerate(processes) if number != but]
        died = time.monotonic()
        errors = [process.communicate(timeout=BOUND)[1] for process in others]
        assert time.monotonic() - died < BOUND
        assert all(process.returncode not in (0, None) for process in others), errors
        return errors

    @property
    def progress(self) -> int:
        path = self.folder / "progress"
        return int(path.read_text() or 0) if path.exists() else 0

    @property
    def checkpoint(self) -> Path:
        return sorted((self.folder / "checkpoints").glob("step-*"))[-1]


def assert_same(run: Run, expected: Run) -> None:
    """Ledger, log and everything that the last checkpoint holds, bit for bit."""
    for where in (run, expected):
        assert where.checkpoint.name == f"step-{STEPS:08d}"
    assert (
        gf.InRunShapley(run.folder / "values")
        .by_sample()
        .equals(gf.InRunShapley(expected.folder / "values").by_sample())
    )
    assert gf.read_dot_log(run.folder / "dot_log").equals(gf.read_dot_log(expected.folder / "dot_log"))
    found, wanted = (stored(where.checkpoint) for where in (run, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert (run.checkpoint / "state.json").read_text() == (expected.checkpoint / "state.json").read_text()


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors, random states and optimizer included, shards under their rank."""
    return {
        f"{path.name} {name}": tensor
        for path in sorted((checkpoint / "tensors").iterdir())
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("kill") / "whole", 2)
    run.finish()
    return run


@pytest.mark.slow
def test_killed_at_every_place_it_goes_on_to_the_same_numbers(whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "cut", 2)
    draw = random.Random(7)
    for number, place in enumerate(PLACES):
        rank = 0 if place in ("state", "rename", "removal") else draw.randrange(2)  # these, rank 0 does for all
        (said,) = run.lose(rank, 1 + 2 * number, place)
        assert "RankFailed" in said and f"rank {rank} ended without a word" in said, (place, said)
        assert not list((run.folder / "checkpoints").glob("step-*/*.tmp"))
    run.finish()
    assert_same(run, whole)
    assert not list((run.folder / "checkpoints").glob(".*")), "drafts of killed runs stay"


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_numbers(whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "random", 2)
    draw = random.Random(11)
    for step in (2, 7, 13):
        processes = run.start()
        while run.progress < step:
            assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        rank = draw.randrange(2)
        processes[rank].kill()
        processes[rank].communicate()
        if processes[rank].returncode == -signal.SIGKILL:  # it may have come to its end before
            run.ended(processes, but=rank)
    run.finish()
    assert_same(run, whole)


@pytest.mark.slow
def test_shards_killed_go_on_to_the_same_numbers(whole: Run, tmp_path: Path) -> None:
    run, expected = Run(tmp_path / "cut", 2, "--sharded"), Run(tmp_path / "whole", 2, "--sharded")
    expected.finish()
    for rank, step, place in [(1, 4, "gradient"), (0, 8, "tensors"), (1, 12, "load")]:
        run.lose(rank, step, place)
    run.finish()
    assert_same(run, expected)
    # Dropout draws by rank in both, so that shards train to what whole parameters do.
    replicated, sharded = build(False), build(False)
    for model, where in ((replicated, whole), (sharded, expected)):
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 11], gamma=0.5)
        found = TrainingCheckpoints(where.folder / "checkpoints", model, optimizer, also={"scheduler": scheduler})
        assert found.load().step == STEPS
    for found, wanted in zip(sharded.parameters(), replicated.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_others_with_its_message(tmp_path: Path) -> None:
    run = Run(tmp_path / "raise", 2)
    processes = run.start("--die", "1", "4", "raise")
    assert "the data of this rank are upside down" in processes[1].communicate(timeout=300)[1]
    (said,) = run.ended(processes, but=1)
    assert "RankFailed" in said and "rank 1: ArithmeticError: the data of this rank are upside down" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", ["gradient", "raise"])
def test_torchrun_ends_them_all_and_says_who_it_was(tmp_path: Path, whole: Run, place: str) -> None:
    run = Run(tmp_path / "torchrun", 2)
    command = [*TORCHRUN, str(WORKER), str(run.folder)]
    process = start([*command, "--die", "1", "5", place])
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in said
    assert ("SIGKILL" if place == "gradient" else "the data of this rank are upside down") in said
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((run.folder / f"pid-{rank}").read_text()), 0)
    process = start(command)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same(run, whole)


@pytest.mark.slow
def test_a_process_alone_killed_twice_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    run, expected = Run(tmp_path / "cut", 1), Run(tmp_path / "whole", 1)
    expected.finish()
    for step, place in [(4, "records"), (8, "tensors")]:
        run.lose(0, step, place)
    run.finish()
    assert_same(run, expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_the_language_model_example_killed_twice_goes_on_to_the_same_run(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    more = ("--max_steps", 30, "--checkpoint_interval", 4, "--eval_interval", 10, "--dot_prod_save_interval", 3)

    def command(results: str) -> list[str]:
        options = options_of(write_data(data), write_model(model), tmp_path / results, "--batch_size", 2, *more)
        return [*TORCHRUN, str(EXAMPLE), *options]

    def steps() -> int:
        found = sorted(tmp_path.glob("cut/*/checkpoint/step-*"))
        return int(found[-1].name.removeprefix("step-")) if found else 0

    _, said = (whole := start(command("whole"))).communicate(timeout=500)
    assert whole.returncode == 0, said
    for rank, least in enumerate((4, 16)):
        process = start(command("cut"))
        while steps() < least:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[rank]), signal.SIGKILL)
        _, said = process.communicate(timeout=300)
        assert process.returncode != 0 and "SIGKILL" in said and f"rank      : {rank} (local_rank: {rank})" in said
    _, said = (process := start(command("cut"))).communicate(timeout=500)
    assert process.returncode == 0, said
    (run,), (expected,) = ((tmp_path / name).iterdir() for name in ("cut", "whole"))
    assert values(run).equals(values(expected)) and sum(values(run)["visits"].to_pylist()) == 30 * 4
    assert gf.read_dot_log(run).equals(gf.read_dot_log(expected))
    assert (run / "evaluations.csv").read_text() == (expected / "evaluations.csv").read_text()
    for name, weight in weights(run).items():
        assert torch.equal(weight, weights(expected)[name]), name
