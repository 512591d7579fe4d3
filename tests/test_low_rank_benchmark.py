"""docs/low_rank.md says what benchmarks/low_rank.py measured, and what it claims holds in the results."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark = import_module("low_rank")


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_tables_of_the_results(results):
    text = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.page(text, results) == text
    assert benchmark.table(results) in text
    assert benchmark.small_table(results) in text


def test_no_dot_product_is_beyond_its_bound_and_errors_fall(results):
    for of_val in results["val"].values():
        ranks = of_val["ranks"]
        assert all(at["beyond the bound"] == 0 for at in ranks.values())
        assert ranks["8"]["error"] < 0.1 * ranks["1"]["error"]
        assert ranks["8"]["bound"] < 0.1 * ranks["1"]["bound"]
        assert ranks["8"]["approximated"] > 0


def test_a_low_rank_costs_less(results):
    for of_val in results["val"].values():
        assert of_val["costs"]["dots alone"]["8"] < of_val["costs"]["dots alone"]["exact"]
    for cost in results["gpt2 small"].values():
        assert cost["dots alone"]["4"] < cost["dots alone"]["exact"]
