"""What benchmarks/projection.py compares, on a tiny model without peers; and what the committed results say."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
benchmark = import_module("projection")
methods = import_module("projection_methods")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "projection.json"
    benchmark.main(["--quick", "--rounds", "2", "--results", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_own_way_is_run_and_every_peer_says_why_not(quick):
    assert list(quick["ways"]) == list(methods.WAYS)
    for name, row in quick["ways"].items():
        if name in methods.PEERS:
            assert row == {"missing": "not asked for"}
        else:
            assert len(row["ratios"]) == 2
            assert row["flops_of_one_sample"] > 0


@pytest.mark.slow
def test_rows_of_both_own_ways_are_explicit_projections_of_explicit_gradients(quick):
    ghostfunc, hooks = quick["ways"]["ghostfunc"], quick["ways"]["hooks"]
    assert ghostfunc["covers"] == hooks["covers"] == 4 * quick["layers"]
    assert ghostfunc["difference"] < 1e-5
    assert hooks["difference"] < 1e-5


@pytest.mark.slow
def test_products_are_those_of_the_floor_and_of_the_projections(quick):
    """A plain step has weight gradients, a full backward has both."""
    counted = {name: row["flops_of_one_sample"] for name, row in quick["ways"].items() if "missing" not in row}
    work = methods.build("tiny")
    _, _, projection = methods.own_projection(work)
    positions, products = quick["positions"], 0
    for name in projection.slices:
        (d_in, k_in), (d_out, k_out) = (p.shape for p in projection.matrices(name))
        products += 2 * positions * (d_in * k_in + d_out * k_out + k_in * k_out)
    assert counted["floor"] + products <= counted["ghostfunc"] <= 1.02 * (counted["floor"] + products)
    assert counted["hooks"] == counted["plain"] + products


def test_a_difference_is_seen():
    """A row that is a little off, rows of another scale, and rows that have nothing to do with the gradients."""
    explicit = benchmark.Explicit("tiny")
    names = [name for name in explicit.grams if name.endswith("weight")]
    assert explicit.difference(explicit.rows) == 0
    off = explicit.rows.clone()
    off[0, 0] += 0.01 * off.abs().max()
    assert explicit.difference(off) == pytest.approx(0.01, rel=1e-3)
    once, twice = (explicit.fidelity(scale * explicit.rows, names) for scale in (1, 2))
    assert twice["scale"] == pytest.approx(4 * once["scale"])
    assert twice["error"] == pytest.approx(once["error"], abs=1e-5) and once["error"] < 0.3
    assert explicit.fidelity(torch.ones(4, 4), names)["error"] > 2 * once["error"]


@pytest.mark.slow
def test_a_peer_that_fails_has_its_reason_in_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "installed", lambda python, peer: f"does not install: no {peer} here")
    runs = benchmark.Runs(Path(sys.executable), "tiny", 1, tmp_path)
    runs.take_turns(["trak"], 1)
    assert runs.missing == {"trak": "does not install: no trak here"}
    monkeypatch.setattr(benchmark, "installed", lambda python, peer: None)
    runs.take_turns(["trak"], 1)
    assert runs.missing == {"trak": "ended with status 1: ModuleNotFoundError: No module named 'trak'"}
    assert not runs.told


@pytest.fixture
def results() -> dict:
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_committed_results(results):
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.page(page, results) == page, "run python benchmarks/projection.py --page"


def test_the_committed_results(results):
    """GPT-2 small: exact rows, products within two percent of the least, and fewer than any peer that ran."""
    ways = results["ways"]
    assert (results["size"], list(ways)) == ("gpt2-small", list(methods.WAYS))
    ran = {name: row for name, row in ways.items() if "missing" not in row}
    assert set(methods.OWN) <= set(ran)
    assert all(len(row["ratios"]) >= (1 if name in benchmark.APART else results["rounds"]) for name, row in ran.items())
    assert ran["ghostfunc"]["difference"] < 1e-5 and ran["hooks"]["difference"] < 1e-5
    products = ran["hooks"]["flops_of_one_sample"] - ran["plain"]["flops_of_one_sample"]
    least = ran["floor"]["flops_of_one_sample"] + products
    assert least <= ran["ghostfunc"]["flops_of_one_sample"] <= 1.02 * least
    for name in set(ran) & set(methods.PEERS):
        assert ran["ghostfunc"]["flops_of_one_sample"] < ran[name]["flops_of_one_sample"], name
