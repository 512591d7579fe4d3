"""The Python that a call runs beside a plain step: counted, so that no loop over pairs and no second pass slips in."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
overhead = import_module("overhead")
tile_stream = import_module("tile_stream")

METHODS = ["value_and_grad_dot", "ghost_grad_along", "ghost_quantities(Norm)", "ghost_clipped_grad"]
LAYERS: dict[str, Callable[[int], Any]] = {"gpt2": lambda n: overhead.gpt2(n, overhead.WIDTH), "mlp": overhead.mlp}

# Python calls in ghostfunc's files, and operations dispatched beyond a plain step's, of the GPT-2 with 4 layers, for
# each operation or attribute of a tensor that its forward asks for. Measured, and a tenth.
BOUNDS = {
    "value_and_grad_dot": (37, 5.4),
    "ghost_grad_along": (31, 3.6),
    "ghost_quantities(Norm)": (57, 4.6),
    "ghost_clipped_grad": (58, 5.5),
}


def counts(case: Any, method: str) -> tuple[int, int]:
    """Of a warm call: Python calls in ghostfunc's files, and operations dispatched beside the plain step's."""
    steps = overhead.steps(case)
    steps[method]()
    plain = overhead.dispatched(steps[overhead.beside(method)])
    return overhead.python_calls(steps[method], overhead.PACKAGE), overhead.dispatched(steps[method]) - plain


@pytest.mark.parametrize("method", METHODS)
def test_an_operation_of_the_model_costs_so_much_python_and_no_more(method: str) -> None:
    case = LAYERS["gpt2"](4)
    operations = overhead.model_operations(case)
    calls, dispatched = (count / operations for count in counts(case, method))
    most_calls, most_dispatched = BOUNDS[method]
    assert calls <= most_calls
    assert dispatched <= most_dispatched


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", LAYERS)
def test_every_layer_costs_the_same(model: str, method: str) -> None:
    """Exactly: what four more layers add is twice what two more add."""
    of_layers = [counts(LAYERS[model](layers), method) for layers in (2, 4, 8)]
    for two, four, eight in zip(*of_layers, strict=True):
        assert eight - four == 2 * (four - two)


def test_the_page_shows_the_committed_results() -> None:
    results = json.loads(overhead.RESULTS.read_text(encoding="utf-8"))
    page = overhead.PAGE.read_text(encoding="utf-8")
    assert overhead.page(page, results) == page, "run python benchmarks/overhead.py --page"
    assert list(results["cases"]) == list(overhead.CASES)
    for case in results["cases"].values():
        assert [name for name in case["methods"] if not name.startswith("plain")] == METHODS


def test_the_page_has_the_parts_of_the_tile_stream():
    results = json.loads(tile_stream.RESULTS.read_text(encoding="utf-8"))
    text = tile_stream.PAGE.read_text(encoding="utf-8")
    found = tile_stream.page(text, figures=tile_stream.figures(results))
    assert found == text, "run python benchmarks/tile_stream.py --page"
    assert list(results) == list(tile_stream.SIZES)
