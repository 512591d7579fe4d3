"""The engine on several ranks: every rank's results are its rows of what one process finds with all samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks_worker import MICRO_STEPS, QUICK, SHARDED, SLOW, STEPS, TRAIN, VAL, share, train
from processes import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from ghostfunc.dotlog import read_dot_log

TOLERANCE = 1e-10
Run = Callable[[list[str], int], list[dict[str, dict[str, Tensor]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs these kinds on so many ranks: what each rank found."""

    def of(kinds: list[str], ranks: int) -> list[dict[str, dict[str, Tensor]]]:
        run_ranks(Path(__file__).with_name("engine_ranks_worker.py"), ranks, tmp_path, ",".join(kinds))
        files = {kind: [tmp_path / f"{kind}-{ranks}-{rank}.safetensors" for rank in range(ranks)] for kind in kinds}
        return [{k: load_file(of[rank]) for k, of in files.items() if of[rank].exists()} for rank in range(ranks)]

    return of


def assert_equals_one_process(found: list[dict[str, dict[str, Tensor]]], kinds: Any, folder: Path) -> None:
    for kind in kinds:
        for what, expected in train(kind, 0, 1, folder).items():
            for rank, of_rank in enumerate(found):
                mine = expected if what.startswith("all") else share(expected, rank, len(found))
                theirs = of_rank[kind][what]
                assert theirs.shape == mine.shape, (kind, what, rank)
                error = float((theirs - mine).norm() / (mine.norm() or 1.0))
                assert error <= TOLERANCE, (kind, what, rank, error)
        assert all(of_rank[kind].keys() == found[0][kind].keys() for of_rank in found)


def test_two_ranks_train_as_one_process_does(run: Run, tmp_path: Path) -> None:
    found = run(list(QUICK), 2)
    assert_equals_one_process(found, QUICK, tmp_path)
    logs = [read_dot_log(tmp_path / f"manager-{ranks}") for ranks in (1, 2)]
    assert logs[0].num_rows == STEPS * MICRO_STEPS * TRAIN
    for column in ("iteration", "micro_step", "sample_id", "domain", "learning_rate"):
        assert logs[0][column].equals(logs[1][column]), column
    for column, tolerance in (("dot", 1e-10), ("loss", 1e-6)):  # losses are stored as float32
        one, two = (torch.tensor(log[column].to_pylist(), dtype=torch.float64) for log in logs)
        assert (one - two).norm() <= tolerance * one.norm()
    names = ("val_batch.safetensors", "val_batch-rank0001.safetensors")
    stored = [load_file(tmp_path / "manager-2" / "dot_log" / name) for name in names]
    assert sum(len(of_rank["input_ids"]) for of_rank in stored) == VAL


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_way_to_train(run: Run, tmp_path: Path, ranks: int) -> None:
    kinds = SLOW if ranks == 2 else (*QUICK, *SLOW)
    assert_equals_one_process(run(list(kinds), ranks), kinds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_modules(run: Run, tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="needs fully_shard")
    assert_equals_one_process(run(list(SHARDED), ranks), SHARDED, tmp_path)


@pytest.mark.slow
def test_what_one_rank_does_wrong_all_are_told(run: Run, tmp_path: Path) -> None:
    run(["messages"], 2)
    first, second = (json.loads((tmp_path / f"messages-{rank}.json").read_text()) for rank in range(2))
    for told in (first, second):
        assert "must come before optimizer.step()" in told["no prepare_gradients"]
        assert told["after all that"] == ""
        assert told["sharded order 2"].startswith("NotImplementedError: second order with sharded parameters")
    assert second["sizes"].startswith("ValueError: the engine was called with 1 samples, but attach_train_batch was")
    assert first["sizes"].startswith("RankFailed: another rank's share of this call failed. rank 1: ValueError: the")
    assert second["no backward"].startswith("RuntimeError: prepare_gradients: loss.backward() ran 0 times for 1")
    assert "rank 1: RuntimeError: prepare_gradients" in first["no backward"]
    assert second["not finite"].startswith("FloatingPointError: the training loss of 1 of 2 samples is not finite in")
    assert "in iteration 3: sample 10 of code (nan)" in second["not finite"]
    assert "rank 1: FloatingPointError" in first["not finite"] and "sample 10 of code" in first["not finite"]


@pytest.mark.slow
def test_a_gradient_that_one_rank_alone_has_is_a_share(run: Run) -> None:
    for of_rank in run(["one rank"], 2):
        grads = of_rank["one rank"]
        assert torch.equal(grads["always.weight"], torch.full((1, 2), 3.0, dtype=torch.float64))
        assert torch.equal(grads["sometimes.weight"], torch.full((1, 2), 1.5, dtype=torch.float64))
        assert grads["never.weight"].isnan().all()  # stands for None
