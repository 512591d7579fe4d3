"""The projection engine at several ranks: one store, the same as one process's, and errors that reach every rank."""

import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import run_ranks
from proj_ranks_worker import OF_A_STEP, SAMPLES, STEPS, loop, module, over
from test_proj_engine import content

import ghostfunc as gf
from ghostfunc.index import Store


class Ran(NamedTuple):
    """What so many ranks have left behind."""

    ranks: int
    folder: Path

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"told-{rank}.json").read_text()) for rank in range(self.ranks)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks(Path(__file__).with_name("proj_ranks_worker.py"), ranks, folder)
    return Ran(ranks, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same loop and the same pass by one process."""
    folder = tmp_path_factory.mktemp("alone")
    loop(module(), folder / "loop", None)
    assert over(folder / "pass", None) == list(range(SAMPLES))
    return folder


def test_a_loop_fills_the_store_of_one_process_that_has_all_batches(ran: Ran, alone: Path) -> None:
    found, expected = Store(ran.folder / "loop"), Store(alone / "loop")
    assert found.rows == expected.rows == STEPS * OF_A_STEP
    rows, whole = (store.read(0, store.rows) for store in (found, expected))
    assert (rows - whole).norm() <= 1e-6 * whole.norm()
    samples, of_one = (store.samples().to_pydict() for store in (found, expected))
    assert samples.pop("loss") == pytest.approx(of_one.pop("loss"), rel=1e-6)
    assert samples == of_one and samples["sample_id"] == list(range(found.rows))
    assert content(ran.folder / "loop").keys() == content(alone / "loop").keys(), "the same shards"
    metadata = [(folder / "loop" / "metadata.json").read_bytes() for folder in (ran.folder, alone)]
    assert metadata[0] == metadata[1]
    returned = [torch.load(ran.folder / f"rows-{rank}.pt", weights_only=True) for rank in range(ran.ranks)]
    assert torch.equal(torch.cat([of_rank[step] for step in range(STEPS) for of_rank in returned]), rows)


def test_a_loop_with_sharded_parameters(ran: Ran, alone: Path) -> None:
    if ran.ranks == 2:
        pytest.skip("done by three ranks")
    found, expected = (Store(folder).read(0, STEPS * OF_A_STEP) for folder in (ran.folder / "sharded", alone / "loop"))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_a_pass_leaves_the_same_bytes_for_any_number_of_ranks(ran: Ran, alone: Path) -> None:
    assert content(ran.folder / "pass") == content(alone / "pass")
    store = Store(ran.folder / "pass")
    assert store.complete
    assert store.samples()["sample_id"].to_pylist() == [10 * row for row in range(SAMPLES)]
    mine = [told["mine"] for told in ran.told]
    assert sorted(chain(*mine)) == list(range(SAMPLES)) and all(mine)
    assert mine[1][:4] == [4, 5, 6, 7], "whole shards, in turns"


def test_what_one_rank_finds_wrong_every_rank_is_told(ran: Ran, alone: Path) -> None:
    if ran.ranks != 2:
        pytest.skip("told by two ranks")
    first, second = ran.told
    for told in (first, second):
        assert told["seed"].startswith(
            "ValueError: the ranks would fill one store with different rows: proj_seed is 1 on"
        )
        assert "the shape of 0.weight is [15, 5] on rank 1 and [16, 5] on rank 0" in told["model"]
        assert "config['data'] is 1 on rank 1 and 0 on rank 0" in told["config"]
        assert "rows: the projection's fingerprint is '" in told["matrices"] and "' on rank 1 and '" in told["matrices"]
        assert told["no group"].startswith("ValueError") and "group=torch.distributed.group.WORLD" in told["no group"]
        assert "holds another index:\n  projection." in told["other store"]
        assert "is proj_dir on a disk that all ranks share?" in told["two disks"]
    failed = "RankFailed: another rank's share of this call failed. rank 1: "
    assert second["ids"].startswith("ValueError: collect_batch: the batch has 22 samples, but there are 21 ids")
    assert first["ids"] == failed + second["ids"]
    assert second["nan in a loop"].startswith(
        "FloatingPointError: the loss of 1 of 22 samples is not finite: sample 28"
    )
    assert ": sample 28." in second["nan in a loop"] and ": sample 60 of text." in second["nan in a pass"]
    assert first["nan in a loop"] == failed + second["nan in a loop"]
    assert second["nan in a pass"].startswith(
        "FloatingPointError: the loss of 1 of 2 samples is not finite: sample 60 of"
    )
    assert first["nan in a pass"] == failed + second["nan in a pass"]
    assert second["left"] == "RuntimeError: rank 1 has left engine.batches() before its end, and the others need it."
    assert first["left"] == failed + second["left"]
    assert not (ran.folder / "seed").exists()
    assert content(ran.folder / "nan pass") == content(alone / "pass"), "the pass that failed was gone on with"


def test_a_pass_asks_for_each_batch_once_and_for_what_it_needs(tmp_path: Path) -> None:
    X, Y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)

    def begun(**options: Any) -> gf.GradProjEngine:
        engine = gf.GradProjEngine(module(), loss=gf.classification_loss, proj_rank_total=16, proj_dir=tmp_path)
        engine.attach((X, Y), **{"samples": 6, "batch_size": 4, **options})
        return engine

    with pytest.raises(RuntimeError, match="attach"):
        gf.GradProjEngine(module()).batches()
    with pytest.raises(ValueError, match="make the engine with proj_dir"):
        gf.GradProjEngine(module()).attach((X, Y), samples=6, batch_size=2)
    for options in ({"batch_size": None}, {"batch_size": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match="a pass takes both"):
            begun(**options)
    engine = begun()
    with pytest.raises(RuntimeError, match="has begun already"):
        engine.attach((X, Y), samples=6, batch_size=4)
    with pytest.raises(RuntimeError, match="samples that engine"):
        engine.collect_batch((X, Y))
    with pytest.raises(RuntimeError, match="samples 0 to 4 were given"), engine.batches() as batches:
        for _ in batches:
            pass
    with pytest.raises(ValueError, match="the batch has 6 samples; samples 0 to 4 are expected"), engine.batches() as b:
        for _ in b:
            engine.collect_batch((X, Y))
    assert engine.rows_written == 0 and not Store(tmp_path).complete
    with engine.batches() as batches:
        for rows in batches:
            engine.collect_batch((X[list(rows)], Y[list(rows)]))
    assert engine.rows_written == 6
    assert Store(tmp_path).samples()["sample_id"].to_pylist() == list(range(6))
    with begun().batches() as batches:
        assert list(batches) == []
