"""Samples whose loss or gradient is not finite: named, or skipped with the numbers of a batch without them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nonfinite_worker import CASES, batch, parts
from processes import run_ranks

import ghostfunc as gf

BAD = {"loss": {1: torch.nan, 3: torch.nan}, "gradient": {1: -1.0, 3: -1.0}, "both": {1: torch.nan, 3: -1.0}}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("what", BAD)
def test_a_step_goes_on_without_them(what: str, order: int, tmp_path: Path) -> None:
    model, engine = parts(
        order, on_nonfinite="skip", log=gf.DotLog(tmp_path / "log", config={}),
    )  # fmt: skip
    x, y = batch(BAD[what])
    ledger = gf.InRunShapley(tmp_path / "values")
    engine.attach_train_batch(x, y, 0, range(10, 15), domains=["law"] * 5)
    with pytest.warns(UserWarning, match=r"without 2 of 5 samples.*sample 11 of law \(loss .*sample 13 of law \(loss"):
        out = engine(x, y)
    out.loss.backward()
    ledger.add(range(10, 15), engine.values, domains=["law"] * 5, iteration=0, second_order=engine.second_order,
               skipped=engine.skipped)  # fmt: skip
    engine.save_metrics(0)
    ledger.save()

    other, plain = parts(order)
    kept = [0, 2, 4]
    expected = plain(x[kept], y[kept])
    expected.loss.backward()
    assert engine.skipped is not None and engine.skipped.tolist() == [False, True, False, True, False]
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, dict(other.named_parameters())[name].grad), name
    assert torch.equal(out.loss, expected.loss)
    for found, wanted in [(out.dots, expected.dots), (out.values, expected.values), (out.losses, expected.losses)]:
        assert torch.equal(found[kept], wanted)
    assert out.dots[[1, 3]].isnan().all() and out.values[[1, 3]].isnan().all()

    log = gf.read_dot_log(tmp_path / "log")
    assert log["sample_id"].to_pylist() == list(range(10, 15))
    assert [dot is None for dot in log["dot"].to_pylist()] == engine.skipped.tolist()
    for source in (gf.InRunShapley(tmp_path / "values"), gf.InRunShapley.from_dot_log(tmp_path / "log")):
        assert source.by_sample()["sample_id"].to_pylist() == [10, 12, 14]
        assert source.by_domain()["visits"].to_pylist() == [3]
        torch.testing.assert_close(
            torch.tensor(source.by_sample()["value"].to_numpy()), expected.values, rtol=1e-6, atol=0
        )
        assert source.skipped().select(["iteration", "rank", "sample_id", "domain"]).to_pylist() == [
            {"iteration": 0, "rank": 0, "sample_id": sample, "domain": "law"} for sample in (11, 13)
        ]
    assert gf.InRunShapley.merge([ledger, ledger]).skipped().num_rows == 2


@pytest.mark.parametrize(("what", "named"), [("loss", "training loss"), ("gradient", "dot")])
def test_by_default_they_are_named_and_nothing_is_deposited(what: str, named: str) -> None:
    model, engine = parts()
    x, y = batch(BAD[what])
    engine.attach_train_batch(x, y, 7, range(10, 15), domains=["law"] * 5)
    with pytest.raises(
        FloatingPointError, match=rf"the {named} of 2 of 5 samples is not finite in iteration 7: sample 11 of law "
    ):
        engine(x, y)
    assert all(param.grad is None for param in model.parameters()) and engine.skipped is None


def test_finite_batches_are_as_without_the_choice() -> None:
    (model, engine), (other, plain) = parts(on_nonfinite="skip"), parts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = engine(*batch({})), plain(*batch({}))
    found.loss.backward()
    expected.loss.backward()
    assert engine.skipped is None and torch.equal(found.dots, expected.dots)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_where_nothing_is_left_it_raises() -> None:
    _, engine = parts(on_nonfinite="skip")
    x, y = batch(dict.fromkeys(range(5), torch.nan))
    with pytest.raises(
        FloatingPointError, match=r"none of 5 samples has a finite loss and gradient \(position 0 \(loss nan"
    ):
        engine(x, y)


def test_a_validation_loss_and_other_errors_are_no_reason_to_skip() -> None:
    _, engine = parts(on_nonfinite="skip")
    engine.update_validation_batch(*batch({0: torch.nan}, n=2))
    with pytest.raises(ValueError, match=r"val batch: the losses of samples \[0\] are not finite"):
        engine(*batch({}))
    with pytest.raises(ValueError, match="unknown on_nonfinite 'ignore'; expected one of 'raise', 'skip'"):
        parts(on_nonfinite="ignore")


def test_a_gradient_that_no_dot_sees_is_named_by_its_parameter() -> None:
    _, engine = parts(layers="second")  # the dots are of this layer, and finite
    with pytest.raises(
        FloatingPointError, match=r"gradients of 2 parameters are not finite.*: first.weight, first.bias\."
    ):
        engine(*batch({1: -1.0}))


@pytest.mark.parametrize("out", ["param train", "train val"])
def test_every_axis_pattern_has_the_skipped_rows(out: str) -> None:
    _, engine = parts(on_nonfinite="skip", out=out)
    with pytest.warns(UserWarning, match=r"position 1 \(loss nan\)"):
        found = engine(*batch({1: torch.nan})).dots
    for dots in found.values() if isinstance(found, dict) else [found]:
        assert len(dots) == 5 and dots[1].isnan().all() and dots[[0, 2, 3, 4]].isfinite().all()


def test_under_float16_the_scale_survives() -> None:
    model, engine = parts(on_nonfinite="skip")
    model.float()
    engine.update_validation_batch(torch.rand(2, 3), torch.tensor([0, 1]))
    x, y = batch({2: torch.nan})
    before = engine._scorer._loss_scale
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="position 2"):
        engine(x.float(), y)
    assert engine._scorer._loss_scale == before


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found in all cases."""
    folder = tmp_path_factory.mktemp("nonfinite")
    run_ranks(Path(__file__).with_name("nonfinite_worker.py"), 2, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def rows(of_ranks: list[dict[str, Any]], name: str, what: str) -> torch.Tensor:
    return torch.cat([torch.tensor(found[name][what], dtype=torch.float64) for found in of_ranks])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both ranks", "all of rank 1", "order 2", "matrix", "sharded"])
def test_ranks_go_on_together_with_the_mean_over_the_other_samples(of_ranks: list[dict[str, Any]], name: str) -> None:
    bad, options = CASES[name]
    assert "error" not in of_ranks[0][name] and "error" not in of_ranks[1][name], of_ranks
    kept = [row for row in range(5) if row not in bad]
    model, plain = parts(**{key: value for key, value in options.items() if key != "sharded"})
    x, y = batch(bad)
    expected = plain(x[kept], y[kept])
    expected.loss.backward()
    for parameter, wanted in model.named_parameters():
        for found in of_ranks:
            grad = torch.tensor(found[name]["grads"][parameter], dtype=torch.float64)
            torch.testing.assert_close(grad, wanted.grad, rtol=1e-10, atol=1e-14)
    for what, wanted in [("dots", expected.dots), ("values", expected.values)]:
        found = rows(of_ranks, name, what)
        # Every rank has the whole validation batch for its share: a matrix has its three columns once per rank.
        mine = found[kept][:, :3] if found.dim() == 2 else found[kept]
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-14)
        assert found[list(bad)].isnan().all()
    skipped = [found[name]["skipped"] or [False] * n for found, n in zip(of_ranks, (3, 2), strict=True)]
    assert [flag for part in skipped for flag in part] == [row in bad for row in range(5)]


@pytest.mark.slow
def test_what_cannot_be_skipped_ends_both_ranks_by_name(of_ranks: list[dict[str, Any]]) -> None:
    def errors(name: str) -> tuple[str, str]:
        return of_ranks[0][name]["error"], of_ranks[1][name]["error"]

    for error in errors("everything"):
        assert error.startswith("FloatingPointError: none of")
    for name in ("raise", "raise, sharded"):
        first, second = errors(name)
        assert "RankFailed" in first and "rank 1: FloatingPointError: the training loss of 1 of 2 samples" in first
        assert "sample 13 of law (nan)" in first and "sample 13 of law (nan)" in second
    first, second = errors("all of rank 1, sharded")
    assert "RankFailed" in first and "FloatingPointError: none of 2 samples has a finite loss" in second
