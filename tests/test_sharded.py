"""Sharded parameters (FSDP2 modules, dicts of `DTensor`s): every rank finds what one process finds with whole ones."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.fsdp
from processes import run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this torch has no torch.distributed.fsdp.fully_shard"
)

TOLERANCE = 1e-10
Run = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a part of the worker on so many ranks: what each rank found."""

    def of(part: str, ranks: int) -> list[dict[str, Any]]:
        run_ranks(Path(__file__).with_name("sharded_worker.py"), ranks, tmp_path, part)
        return [json.loads((tmp_path / f"{part}-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]

    return of


def assert_exact(found: list[dict[str, Any]], leaving: Iterable[str] = ()) -> None:
    """Every error of every rank is rounding."""
    for rank, of_rank in enumerate(found):
        wrong = {w: e for w, e in of_rank.items() if w not in leaving and not e <= TOLERANCE}
        assert not wrong, (rank, wrong)


def test_two_ranks(run: Run) -> None:
    found = run("core", 2)
    assert_exact(found, leaving=["message"])
    first, second = (of_rank["message"] for of_rank in found)
    assert first.startswith("RankFailed: another rank's share of this call failed. rank 1: IndexError")
    assert second.startswith("IndexError: Target")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("part", ["dicts", "modules"])
def test_every_call(run: Run, part: str, ranks: int) -> None:
    found = run(part, ranks)
    assert len(found[0]) > 100
    assert_exact(found)


@pytest.mark.slow
def test_meshes_of_two_dimensions(run: Run) -> None:
    assert_exact(run("meshes", 4))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("part", ["training", "accumulation", "direct"])
def test_training(run: Run, part: str, ranks: int) -> None:
    assert_exact(run(part, ranks))


@pytest.mark.slow
def test_what_models_do_with_parameters(run: Run) -> None:
    found = run("derived", 2)
    coarse = ["float32: dots", "float32: grads"]
    assert_exact(found, leaving=["message of a write", *coarse])
    for of_rank in found:
        assert max(of_rank[what] for what in coarse) <= 1e-6
        assert "w: `mul` writes to a parameter, or a view of one, of shape (40,)" in of_rank["message of a write"]


@pytest.mark.slow
def test_mixed_precision(run: Run) -> None:
    for of_rank in run("precision", 2):
        for policy in ("bfloat16", "inputs as they are", "float32 blocks", "none"):
            assert of_rank[f"{policy}: losses of FSDP2's forward"] == 0
            assert of_rank[f"{policy}: losses without a call"] == 0
            assert of_rank[f"{policy}: dtypes"] == ["torch.float32"]
            coarse = policy != "none"
            assert of_rank[f"{policy}: dots near float32"] <= (3e-2 if coarse else 1e-6)
            assert of_rank[f"{policy}: grads near float32"] <= (3e-2 if coarse else 1e-6)
        assert of_rank["frozen: losses of FSDP2's forward"] == 0
        assert of_rank["frozen: losses without a call"] == 0


@pytest.mark.slow
def test_refusals_and_failures(run: Run) -> None:
    first, second = run("refusals", 2)
    for told in (first, second):
        assert "is tensor parallel (parallelize_module, distribute_module)" in told["tensor parallel"]
        assert "no rank has a sample's factors" in told["tensor parallel"]
        assert "is a FullyShardedDataParallel, which flattens its parameters" in told["first FSDP"]
        assert "DataParallel copies the module to every device" in told["DataParallel"]
        assert "is sharded over ranks [0, 1], and the samples are split over ranks [" in told["group"]
        assert told["dense"].startswith("ValueError: on_unsupported='dense' takes a backward pass for each sample")
        assert told["vmap"].startswith("RuntimeError: sharded parameters inside a functorch transform")
        for call in ("second order", "interaction"):
            assert told[call].startswith("NotImplementedError: second order with sharded parameters")
        assert told["own function"].startswith("UnsupportedUse: a tensor that came from outside of torch's own")
        assert "with sharded parameters no probe can tell the samples apart" in told["own function"]
        for use in ("own function, one sample", "scripted", "scripted, one sample"):
            assert told[use].startswith("UnsupportedUse: w"), told[use]
            assert "a torch.autograd.Function of your own, torch.jit.script" in told[use]
        assert told["experts"].startswith("OutOfStep: rank")
        assert "every rank must use the same sharded parameters in the same order" in told["experts"]
        assert told["experts after that"] == ""
        assert told["after all that"] <= TOLERANCE
    other = "RankFailed: another rank's share of this call failed. rank {}: {}"
    for call in ("one rank", "one rank, clipped"):
        assert first[call].startswith(other.format(1, "IndexError")) and second[call].startswith("IndexError")
    assert second["one rank, val"].startswith(other.format(0, "IndexError"))
    assert first["one rank, val"].startswith("IndexError")
    assert first["empty"].startswith(other.format(1, "ValueError: the train batch is empty"))
    assert second["empty"].startswith("ValueError: the train batch is empty")


@pytest.mark.slow
def test_distributed_data_parallel(run: Run) -> None:
    assert_exact(run("wrapped", 2))


@pytest.mark.slow
def test_what_is_exchanged_and_kept(run: Run) -> None:
    for of_rank in run("communication", 2):
        # Gathers: in the forward each of four parameters; in the backward those of three linear maps, for the
        # gradients of their inputs; and each of four directions. Sums over ranks: each of four gradients.
        gathers = {"validation": 4 + 3, "train": 4 + 3, "directions": 4}
        counts = of_rank["value_and_grad_dot"]
        assert counts["all_gather_into_tensor"] == sum(gathers.values())
        assert counts["reduce_scatter_tensor"] == 2 * 4
        norm = of_rank["ghost_grad_norm"]
        assert norm["all_gather_into_tensor"] == 4 + 3
        assert "reduce_scatter_tensor" not in norm
        assert of_rank["whole at the end of a forward"] == [0, 0, 0]


def test_the_page_has_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number on the page was typed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import sharded_memory  # pyright: ignore[reportMissingImports]

    text = sharded_memory.PAGE.read_text(encoding="utf-8")
    assert sharded_memory.page(text) == text
