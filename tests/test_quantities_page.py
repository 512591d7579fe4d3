"""docs/quantities.md runs as it stands, names what there is, and shows what benchmarks/quantities.py measured."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quantities = import_module("quantities")

PAGE = quantities.PAGE.read_text(encoding="utf-8")
RESULTS = json.loads(quantities.RESULTS.read_text(encoding="utf-8"))
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHAPED = re.compile(r"^(?P<code>[^#\n]+?)  # (?P<shape>\[[\d, ]+\])", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def session():
    """The page's blocks, one after the other, and the shapes of what their comments show shapes of."""
    torch.manual_seed(0)
    shapes: dict[str, str] = {}
    names: dict = {"shapes in comments": shapes}
    blocks = list(PYTHON.finditer(PAGE))
    assert len(blocks) >= 10
    for block in blocks:
        line = PAGE[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(quantities.PAGE), "exec"), names)
        for shown in SHAPED.finditer(block[1]):
            name, assigned, _ = shown["code"].partition(" = ")
            value = names[name] if assigned else eval(shown["code"], names)
            shapes[shown[0]] = str(list(value.shape))
    return names


def test_python_blocks_run(session):
    assert session["dots"].shape == (8,)
    assert session["chosen"].unique().shape == (4,)


def test_shapes_in_comments_are_true(session):
    shapes = session["shapes in comments"]
    assert len(shapes) >= 15
    for line, actual in shapes.items():
        assert line.endswith(f"  # {actual}"), f"{line}: it is {actual}"


def test_other_comments_are_true(session):
    of = session["of"]
    names = "transformer.wte transformer.wpe transformer.h.0 transformer.h.1 transformer.ln_f".split()
    assert list(of("layer train")) == names
    assert len(of("layer", layer_of=r"attn|mlp|ln|wte|wpe")) == 5
    shapes = {layer: list(t.shape) for layer, t in of("layer train token val", layers="mlp").items()}
    assert shapes == {"transformer.h.0": [8, 16, 3], "transformer.h.1": [8, 16, 3]}
    heads = session["heads"]
    assert heads["transformer.h.0.attn.c_attn.weight"] == "d (qkv=3 head=2 k)"
    by_head = of("layer head", heads=heads, layers=heads)
    assert {layer: list(t.shape) for layer, t in by_head.items()} == {"transformer.h.0": [2], "transformer.h.1": [2]}
    batch = session["model_fn"], session["params"], session["train"]
    squares = torch.stack(list(gf.ghost_grad_norm(*batch, out="layer sample").values())).square().sum(0)
    torch.testing.assert_close(squares.sqrt(), gf.ghost_grad_norm(*batch))
    assert set(session["ledger"].by_domain().column_names) == {
        "domain", "value", "first_order", "second_order", "visits", "samples",
    }  # fmt: skip
    assert all(0 <= share <= 1 for share in session["share"].values())


def test_every_call_is_on_the_page():
    quantity_calls = {name for name in gf.__all__ if re.match(r"ghost_grad|ghost_clipped|ghost_quantities", name)}
    others = {"in_run_values", "tracin", "greedy_select", "adam", "adafactor", "diagonal", "kfac", "ekfac"}
    assert others <= set(gf.__all__)
    for name in quantity_calls | others | {"value_and_grad_dot", "kronecker_projection", "InRunShapley"}:
        assert re.search(rf"\b{name}\b", PAGE), name


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("https://")]
    headings = re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    assert links
    for link in links:
        assert link in anchors or quantities.PAGE.parent.joinpath(link).is_file(), link
    for path in re.findall(r"`((?:benchmarks|examples)/[\w/.]+)`", PAGE):
        assert quantities.ROOT.joinpath(path).is_file(), path


def test_the_tables_are_those_of_the_results():
    assert quantities.page(PAGE) == PAGE, "run python benchmarks/quantities.py --page"


def test_every_quantity_was_measured():
    for size, result in RESULTS.items():
        expected = [name for name, quantity in quantities.QUANTITIES.items() if "T" in result or not quantity.tokens]
        assert list(result["quantities"]) == expected, size
        for name, row in result["quantities"].items():
            assert len(row["ratios"]) == result["rounds"] >= 7
            assert (row["peak_bytes"] is not None) == (size == quantities.PEAK_SIZE and name in quantities.WITH_PEAK)
    assert list(RESULTS) == list(quantities.SIZES)


@pytest.mark.parametrize("name", ["dots", "matrix", "many", "clipped", "gram", "values", "projection"])
def test_flops_are_still_those_of_the_results(name):
    """Counted again: a change of what a call computes makes the table old."""
    work = quantities.build("mlp", torch.device("cpu"))
    plain, counted = (quantities.flops(quantities.QUANTITIES[key].prepare(work)) for key in ("plain", name))
    assert counted / plain == pytest.approx(RESULTS["mlp"]["quantities"][name]["flops_ratio"], rel=0.02)


def test_influence_has_the_sign_and_size_of_training_without_a_sample():
    """A softmax regression trained to the end, again without each sample: the page's statement where it should hold."""
    n = 40
    model_fn, start = gf.functionalize(torch.nn.Linear(3, 2).double(), gf.classification_loss)
    x, noise = torch.randn(n + 200, 3).double(), torch.randn(n + 200)
    y = (x[:, 0] + 1.5 * noise > 0).long()  # classes overlap, so that there is an optimum
    train, val = (x[:n], y[:n]), (x[n:], y[n:])

    def trained(batch):
        leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.LBFGS(leaves.values(), max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = model_fn(leaves, batch).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return {name: p.detach() for name, p in leaves.items()}

    params = trained(train)
    preconditioner = gf.ekfac(model_fn, params, [train], damping=1e-3)
    estimate = gf.ghost_grad_dot(model_fn, params, train, val, precondition=preconditioner) / n
    kept = [torch.arange(n) != i for i in range(n)]
    without = torch.stack([model_fn(trained((x[:n][keep], y[:n][keep])), val).mean() for keep in kept])
    truth = without - model_fn(params, val).mean()
    assert torch.corrcoef(torch.stack([estimate, truth]))[0, 1] > 0.8
    assert 0.5 < estimate @ truth / (estimate @ estimate) < 2
