"""The evidence on Adam: the committed summaries follow from the committed samples; a small run has the same form."""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
benchmark = import_module("adam_leave_one_out")

RESULTS = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
TINY = benchmark.Setting(
    layers=1,
    width=8,
    heads=2,
    tokens=12,
    train=4,
    val=3,
    lr=1e-5,
    stretches=(0, 60),
    steps=2,
    betas=(0.9, 0.999),
    first_steps=2,
)


@pytest.fixture(scope="module", autouse=True)
def _little_text():
    """Two files in place of the standard library, which takes seconds to read."""
    read = {benchmark.code: Path(__file__), benchmark.documentation: Path(benchmark.__file__)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            benchmark,
            "_bytes",
            lambda which: torch.frombuffer(bytearray(read[which].read_bytes()), dtype=torch.uint8).long(),
        )
        yield


@pytest.fixture(scope="module")
def tiny():
    return json.loads(json.dumps([*benchmark.measure(TINY), benchmark.first_steps(TINY)]))


def test_the_summaries_follow_from_the_samples():
    assert RESULTS["setting"] == json.loads(json.dumps(asdict(benchmark.Setting())))
    found = [stretch["what"] for stretch in RESULTS["stretches"]]
    assert found == ["steps 0 to 19", "steps 20 to 39", "steps 300 to 319", "step 0 of 12 models"]
    for stretch in RESULTS["stretches"]:
        assert len(stretch["steps"]) == (12 if "models" in stretch["what"] else 20)
        assert benchmark.summary(stretch["steps"]) == {key: stretch[key] for key in ("pooled", "by_step")}


def test_a_small_run_has_the_form_of_what_is_committed(tiny):
    assert [[step["step"] for step in stretch["steps"]] for stretch in tiny] == [[0, 1], [60, 61], [0, 1]]
    for stretch in tiny:
        assert all(len(step["truth"]) == 4 for step in stretch["steps"])
        assert benchmark.table(stretch).count("\n| ") == 1 + len(benchmark.METHODS)
        assert _form(stretch) == _form(RESULTS["stretches"][0])


def _form(tree):
    """A JSON tree's keys and types; a list's by its first entry."""
    if isinstance(tree, dict):
        return {key: _form(value) for key, value in tree.items()}
    return [_form(tree[0])] if isinstance(tree, list) else type(tree)


def test_small_steps_are_predicted_by_the_derivative(tiny):
    """One of four samples is far from an infinitesimal part of a step, which is what is left of the error."""
    (step, _) = tiny[1]["steps"]
    truth = torch.tensor(step["truth"], dtype=torch.float64)
    errors = {
        method: float((torch.tensor(predicted, dtype=torch.float64) - truth).norm() / truth.norm())
        for method, predicted in step["predictions"].items()
    }
    assert errors["derivative, leave-one-out"] < 0.1
    assert errors["derivative, first"] < 0.1
    assert errors["plain, first"] > 2 * errors["derivative, first"]


def test_the_truth_is_a_real_step_without_the_sample(tiny):
    text = benchmark.Text(TINY)
    model, optimizer = benchmark.build(TINY)
    model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
    val = text.val(TINY.val)
    for _ in range(2):
        train = text.train(TINY.train)
        losses = []
        for without in (None, 2):
            weights = torch.full((4,), 0.25, dtype=torch.float64)
            if without is not None:
                weights[without] = 0
            stepped, its_optimizer = benchmark.copy.deepcopy((model, optimizer))
            (model_fn(dict(stepped.named_parameters()), train) * weights).sum().backward()
            its_optimizer.step()
            losses.append(model_fn({k: p.detach() for k, p in stepped.named_parameters()}, val).mean())
        step = benchmark.one_step(model, optimizer, model_fn, params, train, val)
        assert step["truth"][2] == pytest.approx(float(losses[1] - losses[0]), rel=1e-5)
