"""Data parallel calls: every rank's results are its rows of what one process finds with all samples."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from ranks_worker import (
    CASES,
    TRAIN,
    VAL,
    batches_of_experts,
    data,
    dealt,
    everything,
    more,
    of_experts,
    of_low_rank,
    results_of,
    shares,
    wide_shares,
)  # fmt: skip
from safetensors.torch import load_file
from torch import Tensor

import ghostfunc as gf

TOLERANCE = 1e-10
WORKER = Path(__file__).with_name("ranks_worker.py")


def started(rank: int, ranks: int, folder: Path, *how: str) -> subprocess.Popen[str]:
    """A process of `ranks_worker.py`."""
    command = [sys.executable, str(WORKER), str(rank), str(ranks), str(folder), *how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A run of all calls on so many ranks, and the folder of its results."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, ranks, folder)
    return ranks, folder


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: everything(name, *data(name), None) | more(name, *data(name), None) for name in CASES}


def relative(found: Tensor, expected: Tensor) -> float:
    """The error over the expected norm; where zeros are expected, over 1."""
    return float((found - expected).norm() / (expected.norm() or 1.0))


@pytest.mark.parametrize("name", CASES)
def test_every_call(ran: tuple[int, Path], alone: Any, name: str) -> None:
    ranks, folder = ran
    found = [load_file(folder / f"{name}-{ranks}-{rank}.safetensors") for rank in range(ranks)]
    assert_as_one_process(found, alone[name])
    for of_rank in found:
        assert set(of_rank) == set(alone[name])
        assert torch.equal(of_rank["same gaussian"], alone[name]["same gaussian"])
    if ranks == 4:  # with sharded parameters, whose ranks are the group
        of_shards = [load_file(folder / f"{name}-sharded-{rank}.safetensors") for rank in range(ranks)]
        assert len(of_shards[0]) > 10
        assert_as_one_process(of_shards, alone[name])


def assert_as_one_process(found: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    for what in found[0]:
        for rank, of_rank in enumerate(found):
            if what.startswith("same"):  # the same bits, which decompositions of sums in another order do not have
                assert torch.equal(of_rank[what], found[0][what]), (what, rank)
                continue
            rows = shares(VAL if what.startswith("val ") else TRAIN, len(found))[rank]
            mine = alone[what] if what.startswith("all") else alone[what][rows]
            assert of_rank[what].shape == mine.shape, (what, rank)
            assert relative(of_rank[what], mine) <= TOLERANCE, (what, rank)


def test_kfac_of_ranks_that_use_other_experts(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    expected = of_experts(batches_of_experts(), None)
    for rank in range(ranks):
        found = load_file(folder / f"experts-{ranks}-{rank}.safetensors")
        assert set(found) == set(expected)
        for what, tensor in found.items():
            assert relative(tensor, expected[what]) <= TOLERANCE, (what, rank)


def test_a_gradient_is_reduced_once_for_a_step(ran: tuple[int, Path], alone: Any) -> None:
    ranks, folder = ran
    for rank, where in enumerate(shares(TRAIN, ranks)):
        found = load_file(folder / f"step-{ranks}-{rank}.safetensors")
        expected = alone["gpt2 tied"]
        assert relative(found.pop("dots"), expected["dots"][where]) <= TOLERANCE
        # one bucket of the gradient; what fails, the number of samples and the names: lengths and contents of two texts
        assert {k: int(v) for k, v in found.items() if k.startswith("count")} == {
            "count/all_reduce": 1,
            "count/all_gather": 4,
        }
        grads = {name: t for name, t in found.items() if name.startswith("grads/")}
        assert len(grads) > 5
        for name, grad in grads.items():
            assert relative(grad, expected[f"all {name}"]) <= TOLERANCE, (name, rank)


def test_ddp_modules_are_trained_as_bare_ones(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    for rank in range(ranks):
        errors = load_file(folder / f"wrapped-{ranks}-{rank}.safetensors")
        assert len(errors) == 9
        assert all(float(error) <= 1e-14 for error in errors.values()), errors


def test_a_direction_of_low_rank_is_the_same_on_all_ranks(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    expected = of_low_rank(0, 1, None)
    error = (expected["dots"] - expected["exact"]).abs()
    assert float(error.max()) > 1e-6  # it is approximated
    for rank, where in enumerate(wide_shares(ranks)):
        found = load_file(folder / f"low-rank-{ranks}-{rank}.safetensors")
        assert relative(found["exact"], expected["exact"][where]) <= TOLERANCE
        assert relative(found["dots"], expected["dots"][where]) <= TOLERANCE
        assert relative(found["bound"], expected["bound"][where]) <= 1e-6  # of a difference, to its rounding
        assert bool(((found["dots"] - found["exact"]).abs() <= found["bound"]).all())


def test_results_are_gathered_in_the_order_of_the_data(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    rows = sorted(index for rank in range(ranks) for index in dealt(rank, ranks))
    padding = [index for index in range(7) if rows.count(index) > 1]
    assert padding
    expected, once = results_of(rows, turned=False), results_of(list(range(7)), turned=False)
    names = [f"doc {9 - index}" for index in range(7)]
    repeated = [f"doc {9 - index}" for index in padding]
    for rank in range(ranks):
        found = json.loads((folder / f"gathered-{ranks}-{rank}.json").read_text())
        assert found["all"] == [rows, expected.dots.tolist(), padding]
        assert found["flags"] == expected.more["flags"].tolist()
        assert found["rows"] == expected.more["rows"].tolist()
        assert found["named"] == [names[::-1], once.dots.tolist()[::-1], repeated[::-1]]
        assert found["placed"] == [names, once.dots.tolist(), repeated]
        assert found["none here"] == [[*rows[:1], dealt(0, ranks)[1]], [0.0, 10.0 * dealt(0, ranks)[1]]]
        last = [list(range(7)), once.dots.tolist(), once.more["flags"].tolist()]
        assert found["once"] == (last if rank == ranks - 1 else None)


def test_gathering_in_one_process() -> None:
    values = {"dots": torch.tensor([3.0, 1.0, 2.0, 9.0]), "none": None}
    found = gf.gather_samples(values, ["c", "a", "b", "c"], drop_repeated=True)
    assert found is not None
    assert found.ids == ["a", "b", "c"]
    assert found.values["dots"].tolist() == [1.0, 2.0, 3.0]
    assert found.repeated == ("c",)
    assert found.values["none"] is None
    kept = gf.gather_samples(values["dots"], torch.tensor([2, 0, 1, 2], dtype=torch.int32))
    assert kept is not None
    assert kept.ids.dtype == torch.int32
    assert kept.values.tolist() == [1.0, 2.0, 3.0, 9.0]
    with pytest.raises(ValueError, match=r"values\['grads'\]\['w'\] has shape \(4,\) for 2 ids"):
        gf.gather_samples({"dots": torch.ones(2), "grads": {"w": torch.ones(4)}}, [0, 1])
    with pytest.raises(TypeError, match="values is a float"):
        gf.gather_samples(0.5, [0])
    with pytest.raises(TypeError, match="ids has int, str; expected integers or str"):
        gf.gather_samples(torch.ones(2), [0, "a"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"ids is a tensor of shape \(2, 1\)"):
        gf.gather_samples(torch.ones(2), torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions: expected an integer for each of 2 ids"):
        gf.gather_samples(torch.ones(2), [0, 1], positions=[4])
    with pytest.raises(ValueError, match="to=1: without a group"):
        gf.gather_samples(torch.ones(2), [0, 1], to=1)


def test_a_mean_gradient_in_one_process() -> None:
    found = gf.mean_gradient({"b": torch.tensor([6.0]), "a": torch.tensor([3.0])}, 3)
    assert (found.samples, list(found.grads), found.grads["b"].item()) == (3, ["b", "a"], 2.0)
    with pytest.raises(ValueError, match="samples=0: there is no sample on any rank"):
        gf.mean_gradient({"a": torch.ones(1)}, 0)
    with pytest.raises(ValueError, match="sums has no gradient"):
        gf.mean_gradient({}, 1)


def test_what_one_rank_raises_all_raise(ran: tuple[int, Path]) -> None:
    ranks, folder = ran
    if ranks != 2:
        pytest.skip("told by two ranks")
    first, second = (json.loads((folder / f"messages-{rank}.json").read_text()) for rank in range(2))
    assert second["empty"].startswith("ValueError: the train batch is empty")
    assert first["empty"].startswith("RankFailed: another rank's share of this call failed. rank 1: ValueError: the")
    assert first["nan"].startswith("ValueError: train batch: the losses of samples")
    assert second["nan"].startswith("RankFailed: another rank's share of this call failed. rank 0: ValueError: train")
    assert second["kfac"].startswith("ValueError: batches[0] batch: the losses of samples")
    assert second["iterator"].startswith("TypeError: batches is an iterator")
    assert second["file"].startswith("FileNotFoundError")
    assert second["rows"].startswith("ValueError: values['dots'] has shape (3,) for 2 ids")
    for what in ("kfac", "iterator", "file", "rows"):
        kind = second[what].split(":")[0]
        assert first[what].startswith(f"RankFailed: another rank's share of this call failed. rank 1: {kind}")
    assert "rank 1: ValueError" in first["nan val"] and second["nan val"].startswith("ValueError")
    for told in (first, second):
        assert "the validation samples of all ranks make one gradient" in told["joint"]
        assert "rank 1: (10,) torch.float64" in told["shapes"] and "Pad them to one length" in told["shapes"]
        assert told["vmap"].startswith("RuntimeError: group= inside a functorch transform")
        assert "batches is empty: the Fisher matrix" in told["no batches"]
        assert "w (3, 3): the batches of some ranks use it in another way" in told["uses"]
        assert "there are 1 on rank 0, and more on the other ranks" in told["tracin"]
        assert "vmap does not see what ranks exchange" in told["tracin vmap"]
        assert "values is rank 0: [n, 3] torch.float32, rank 1: [n, 4] torch.float32" in told["width"]
        assert "the ids of the ranks do not go together: rank 0: integers, rank 1: strings" in told["ids"]
        assert "b is rank 0: (2,) torch.float32, rank 1: (3,) torch.float32" in told["gradients"]
        assert "there is no sample on any rank" in told["no samples"]
        assert told["after all that"] == ""


def test_shares_are_unequal_and_whole() -> None:
    for ranks in (2, 4):
        for samples in (TRAIN, VAL):
            found = [range(samples)[where] for where in shares(samples, ranks)]
            assert sorted(i for r in found for i in r) == list(range(samples))
            assert min(map(len, found)) >= 1 and len(set(map(len, found))) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("end", "within"), [("killed", 60), ("stuck", 30 + 60)])
def test_a_rank_that_is_lost_ends_the_others(end: str, within: float, tmp_path: Path) -> None:
    """One that is killed at once, one that does nothing any more after the group's timeout, of 30 seconds here."""
    timeout = 30 if end == "stuck" else 300
    ranks = [started(rank, 2, tmp_path, end, str(timeout)) for rank in range(2)]
    try:
        said = iter(ranks[1].stdout or ())
        assert next(said).startswith("in the middle of a call")
        start = time.monotonic()
        error = ranks[0].communicate(timeout=within)[1]
        assert time.monotonic() - start < within
        assert ranks[0].returncode not in (0, None)
        assert "RankFailed: rank 0 of 2 lost another rank in this call: its process ended" in error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_a_compiled_function_makes_calls_with_a_group_outside(tmp_path: Path) -> None:
    model_fn, params = gf.functionalize(torch.nn.Linear(3, 3), gf.classification_loss)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = 2 * gf.ghost_grad_norm(model_fn, params, batch)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        group = dist.group.WORLD

        def doubled(params: dict[str, Tensor]) -> Tensor:
            return 2 * gf.ghost_grad_norm(model_fn, params, batch, group=group)

        assert torch.equal(torch.compile(doubled)(params), expected)
        torch.compiler.reset()
        with pytest.raises(Exception, match="ghost_grad_norm with a group= is not supported"):
            torch.compile(doubled, fullgraph=True)(params)
    finally:
        torch.compiler.reset()
        dist.destroy_process_group()
