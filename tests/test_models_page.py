"""docs/models.md is what benchmarks/models.py writes from its committed results, and these cover the whole zoo."""

import json
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
models = import_module("models")

RESULTS = json.loads(models.RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_results():
    assert models.PAGE.read_text(encoding="utf-8") == models.page(RESULTS), "run python benchmarks/models.py --page"


def test_every_case_of_the_zoo_has_a_result():
    expected = {heading: [case.name for case in cases] for heading, cases in models.sections().items()}
    assert {heading: list(rows) for heading, rows in RESULTS["sections"].items()} == expected


def test_every_case_was_exact():
    for rows in RESULTS["sections"].values():
        for name, row in rows.items():
            assert row.get("error", 1) < models.EXACT, name


def test_every_line_of_the_composition_was_run():
    found = [(row["what"], row["model"]) for row in RESULTS["composition"]]
    assert found == [(line.what, model) for line in models.composition.LINES for model in line.models]
    for row in RESULTS["composition"]:
        assert "raised" in row or row["error"] < row["tolerance"], row
