"""Data parallel calls: every rank's results are its rows of what one process finds with all samples."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks_worker import CASES, TRAIN, VAL, data, everything, shares
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-10
PER_VAL = ("val losses",)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A run of all calls on so many ranks, and the folder of its results."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("ranks_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(ranks), str(folder)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(errors)
    return ranks, folder


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: everything(name, *data(name), None) for name in CASES}


def relative(found: Tensor, expected: Tensor) -> float:
    """The error over the expected norm; where zeros are expected, over 1."""
    return float((found - expected).norm() / (expected.norm() or 1.0))


@pytest.mark.parametrize("name", CASES)
def test_every_call(ran: tuple[int, Path], alone: Any, name: str) -> None:
    ranks, folder = ran
    found = [load_file(folder / f"{name}-{ranks}-{rank}.safetensors") for rank in range(ranks)]
    for what, expected in alone[name].items():
        for rank, of_rank in enumerate(found):
            rows = shares(VAL if what in PER_VAL else TRAIN, ranks)[rank]
            mine = expected if what.startswith("all") else expected[rows]
            assert of_rank[what].shape == mine.shape, (what, rank)
            assert relative(of_rank[what], mine) <= TOLERANCE, (what, rank)
        assert set(found[0]) == set(alone[name])


def test_what_one_rank_raises_all_raise(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    if ranks != 2:
        pytest.skip("told by two ranks")
    first, second = (json.loads((folder / f"messages-{rank}.json").read_text()) for rank in range(2))
    assert second["empty"].startswith("ValueError: the train batch is empty")
    assert first["empty"].startswith("RankFailed: another rank's share of this call failed. rank 1: ValueError: the")
    assert first["nan"].startswith("ValueError: train batch: the losses of samples")
    assert second["nan"].startswith("RankFailed: another rank's share of this call failed. rank 0: ValueError: train")
    assert "rank 1: ValueError" in first["nan val"] and second["nan val"].startswith("ValueError")
    for told in (first, second):
        assert "the validation samples of all ranks make one gradient" in told["joint"]
        assert "rank 1: (10,) torch.float64" in told["shapes"] and "Pad them to one length" in told["shapes"]
        assert told["vmap"].startswith("RuntimeError: group= inside a functorch transform")
        assert "ghost_grad_gram has the matrix" in told["quantities"]
        assert told["after all that"] == ""


def test_shares_are_unequal_and_whole() -> None:
    for ranks in (2, 4):
        for samples in (TRAIN, VAL):
            found = [range(samples)[where] for where in shares(samples, ranks)]
            assert sorted(i for r in found for i in r) == list(range(samples))
            assert min(map(len, found)) >= 1 and len(set(map(len, found))) > 1
