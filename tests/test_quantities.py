"""Every quantity of every case against the loop over single samples, by tiles and by pairs, together and alone."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case, Draw
from exact import Params
from hard import HARD
from oracle import TOLERANCE, as_double, assert_dots, assert_grads, dots, losses_and_grads, matrix, mean
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from zoo import in_double
from zoo_language import MIXTURES, language

import ghostfunc as gf
from ghostfunc import _accumulate, _quantities, _tiles

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
WAYS = ("chosen", "tiles", "pairs")
CPU = torch.device("cpu")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a weight's share is had: the cheaper way, by tiles of a few rows, or from pairs of positions."""
    if request.param == "tiles":
        monkeypatch.setattr(_accumulate, "MEMORY_BOUND", -(10**9))
        monkeypatch.setattr(_tiles, "tile_bytes", lambda device: 300)
        for name in ("Dots", "_AlongOne", "_Gram", "Norms"):
            monkeypatch.setattr(getattr(_quantities, name), "tile_cost", lambda self, block: 0)
    elif request.param == "pairs":
        monkeypatch.setattr(_accumulate, "MEMORY_BOUND", 10**12)
        for name in ("Dots", "_AlongOne", "_Gram", "Norms"):
            monkeypatch.setattr(getattr(_quantities, name), "pairs_cost", lambda self, block: 0)
    return request.param


def wanted(params: Params, limit: float) -> dict[str, Any]:
    direction = {name: Draw(p.dtype, p.device, 7).normal(*p.shape) for name, p in params.items()}
    return {
        "dots": gf.Dot(),
        "matrix": gf.Dot("val train"),
        "by parameter": gf.Dot("param train", reduction="sum"),
        "along": gf.Along(direction),
        "gram": gf.Gram(),
        "norms": gf.Norm(),
        "norms by parameter": gf.Norm("param sample"),
        "clipped": gf.Clip(limit),
        "second": gf.Stream(lambda tile: tile.grads.square().mean(0), out="entry"),
        "squares": gf.Stream(lambda tile: tile.grads.square().sum()),
    }


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1).double()


def check(
    result: gf.Quantities, want: dict[str, Any], g: dict[str, Tensor], v: dict[str, Tensor], tolerance: float
) -> None:
    """Every quantity of `wanted` against per-sample gradients."""
    norms = flat(g).norm(dim=1)
    assert_grads(result.grads, mean(g), tolerance, "grads")
    assert_dots(result["dots"], dots(g, mean(v)), tolerance, "dots")
    products, scale = matrix(g, v)
    assert_dots(result["matrix"], (products.t(), scale.t()), tolerance, "matrix")
    assert list(result["by parameter"]) == list(g)
    for name, by_parameter in result["by parameter"].items():
        total = {name: v[name].sum(0)}
        assert_dots(by_parameter, dots({name: g[name]}, total), tolerance, f"dots of {name}")
        assert_near(result["norms by parameter"][name], flat({name: g[name]}).norm(dim=1), tolerance, name)
    assert_dots(result["along"], dots(g, dict(want["along"].direction)), tolerance, "along")
    assert_dots(result["gram"], matrix(g, g), tolerance, "gram")
    assert_near(result["norms"], norms, tolerance, "norms")
    weights = (want["clipped"].max_norm / norms).clamp(max=1)
    assert_grads(
        result["clipped"].grads,
        {name: torch.einsum("b,b...->...", weights.to(grads.dtype), grads) for name, grads in g.items()},
        tolerance,
        "clipped",
    )
    assert_near(result["clipped"].norms, norms, tolerance, "norms before clipping")
    assert_grads(result["second"], {name: g[name].square().mean(0) for name in g}, tolerance, "second moments")
    assert_near(result["squares"], norms.square().sum(), tolerance, "the sum of squares")


def assert_near(actual: Tensor, reference: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == reference.shape and not actual.requires_grad
    assert ((actual.double() - reference).abs() <= tolerance * reference.abs()).all(), f"{what}: {actual}, {reference}"


def reference(case: Case, params: Params, batch: Any) -> dict[str, Tensor]:
    return losses_and_grads(case.make(torch.float64, CPU).model_fn, as_double(params), as_double(batch))[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_together(case, way, device):
    """Float64, every quantity in one call."""
    model_fn, params, batch = case.make(torch.float64, device)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    want = wanted(params, float(flat(g).norm(dim=1).median()))
    check(gf.ghost_quantities(model_fn, params, train, val, want=want), want, g, v, 1e-10)
    del want["clipped"]  # without it, weights are contracted inside the backward
    fused = gf.ghost_quantities(model_fn, params, train, val, want=want)
    check_fused(fused, want, g, v)


def check_fused(result: gf.Quantities, want: dict[str, Any], g: dict[str, Tensor], v: dict[str, Tensor]) -> None:
    """The same where no factor is kept."""
    norms = flat(g).norm(dim=1)
    want = want | {"clipped": gf.Clip(math.inf)}
    result.values["clipped"] = gf.ClippedGrad({name: grads.sum(0) for name, grads in g.items()}, norms)
    check(result, want, g, v, 1e-10)


@pytest.mark.parametrize("name", ["gpt2 tied", "weight twice"])
def test_what_adds_up_over_uses(name, way):
    """Without clipping and streams a tied head is contracted in its backward, its products with look-ups behind it."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, CPU)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    want = {
        name: quantity for name, quantity in wanted(params, 1.0).items() if name not in ("clipped", "second", "squares")
    }
    result = gf.ghost_quantities(model_fn, params, train, val, want=want)
    assert_dots(result["dots"], dots(g, mean(v)), 1e-10, "dots")
    assert_dots(result["along"], dots(g, want["along"].direction), 1e-10, "along")
    assert_near(result["norms"], flat(g).norm(dim=1), 1e-10, "norms")
    assert_near(result["gram"], flat(g) @ flat(g).T, 1e-10, "gram")
    assert_near(result["matrix"], flat(v) @ flat(g).T, 1e-10, "matrix")
    assert_grads(result.grads, mean(g), 1e-10, "grads")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_float32(case, device):
    """The default arithmetic, against gradients in float64."""
    model_fn, params, batch = case.make(torch.float32, device)
    train, val = batch(4, 1), batch(3, 2)
    g, v = reference(case, params, train), reference(case, params, val)
    want = wanted(params, float(flat(g).norm(dim=1).median()))
    check(gf.ghost_quantities(model_fn, params, train, val, want=want), want, g, v, TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls_of_one_quantity(case, device):
    model_fn, params, batch = case.make(torch.float64, device)
    train, other = batch(4, 1), batch(2, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, other))
    norms = flat(g).norm(dim=1)
    assert_near(gf.ghost_grad_norm(model_fn, params, train), norms, 1e-10, "norms")
    assert_dots(gf.ghost_grad_gram(model_fn, params, train), matrix(g, g), 1e-10, "gram")
    assert_dots(gf.ghost_grad_gram(model_fn, params, train, other), matrix(g, v), 1e-10, "gram with others")
    by_layer = gf.ghost_grad_norm(model_fn, params, train, out="layer sample")
    torch.testing.assert_close(sum(norm**2 for norm in by_layer.values()), norms**2, rtol=1e-10, atol=0)
    grads, norms_before = gf.ghost_clipped_grad(model_fn, params, train, 1e9)
    assert_grads(grads, {name: grad.sum(0) for name, grad in g.items()}, 1e-10, "nothing clipped")
    assert_near(norms_before, norms, 1e-10, "norms before clipping")
    thirds = gf.ghost_grad_stream(model_fn, params, train, lambda tile: tile.grads.pow(3).sum(0), out="entry")
    assert_grads(thirds, {name: grad.pow(3).sum(0) for name, grad in g.items()}, 1e-9, "third moments")


# The uses of these are followed by a probe, computed sample by sample, or refused.
SOME_HARD = ("lstm", "multihead attention", "weight norm", "bilinear", "conv1d", "a matrix for each sample",
             "rows of a weight", "hypernetwork", "transposed", "pieces of a weight")  # fmt: skip


@pytest.mark.parametrize("case", [c for c in HARD if c.name in SOME_HARD], ids=lambda case: case.name)
def test_hard_uses(case, way):
    model_fn, params, batch = case.make(torch.float64, CPU)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    want = wanted(params, float(flat(g).norm(dim=1).median()))
    check(gf.ghost_quantities(model_fn, params, train, val, want=want), want, g, v, 1e-10)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts(architecture, experts, way):
    """Each expert is a block of the stacked weight of its own."""
    model_fn, params, batch = in_double(language(architecture, experts_implementation=experts), CPU)
    train, val = batch(3, 1), batch(2, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    names = [name for name in g if "expert" in name or "norm" in name]
    result = gf.ghost_quantities(
        model_fn, params, train, val, layers=names,
        want={"norms": gf.Norm("param sample"), "gram": gf.Gram("param sample other"),
              "dots": gf.Dot("param train val")},
    )  # fmt: skip
    for name in names:
        one, other = {name: g[name]}, {name: v[name]}
        assert_near(result["norms"][name], flat(one).norm(dim=1), 1e-9, name)
        assert_dots(result["gram"][name], matrix(one, one), 1e-9, name)
        assert_dots(result["dots"][name], matrix(one, other), 1e-9, name)
    assert_grads(result.grads, mean(g), 1e-9, "grads")


def test_batches_that_cannot_be_joined(way):
    """Validation rows of another length, in a run of their own."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    train, val = batch(3, 1), {"input_ids": batch(4, 2)["input_ids"][:, :4]}
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    want = wanted(params, 1.0)
    check(gf.ghost_quantities(model_fn, params, train, val, want=want), want, g, v, 1e-10)


def test_many_validation_samples_are_one_direction(way):
    """More validation than train samples, in a run of their own, whose factors are not kept."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    train, val = batch(2, 1), batch(5, 2)
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    want = {"mean": gf.Dot("param train"), "sum": gf.Dot("train", reduction="sum")}
    result = gf.ghost_quantities(model_fn, params, train, val, want=want)
    assert_dots(result["sum"], dots(g, {name: t.sum(0) for name, t in v.items()}), 1e-10, "sum")
    for name in g:
        assert_dots(result["mean"][name], dots({name: g[name]}, {name: v[name].mean(0)}), 1e-10, name)
    assert result.val_losses is not None and result.val_losses.shape == (5,)


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "convolution", "weight twice"])
@pytest.mark.parametrize("clipped", [False, True])
def test_projections_beside_others(name, clipped):
    """Projected inside the backward, or from kept factors."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, CPU)
    train, val = batch(4, 1), batch(3, 2)
    include = ("embedding", "norm", "bias", "head")
    projection = gf.kronecker_projection(model_fn, params, train, rank=12, min_rank=2, include=include)
    want = {"projected": gf.Project(projection), "dots": gf.Dot(), "norms": gf.Norm()}
    want |= {"clipped": gf.Clip(1.0)} if clipped else {}
    result = gf.ghost_quantities(model_fn, params, train, val, want=want)
    expected = gf.ghost_grad_proj(model_fn, params, train, projection)
    torch.testing.assert_close(result["projected"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result["dots"], gf.ghost_grad_dot(model_fn, params, train, val))


def test_one_sample_of_one_token():
    model_fn, params, batch = BY_NAME["gpt2 two positions"].make(torch.float64, CPU)
    train = batch(1, 1)
    (norm,) = flat(losses_and_grads(model_fn, params, train)[1]).norm(dim=1)
    torch.testing.assert_close(gf.ghost_grad_norm(model_fn, params, train), norm[None], rtol=1e-10, atol=0)
    torch.testing.assert_close(gf.ghost_grad_gram(model_fn, params, train), norm[None, None] ** 2, rtol=1e-10, atol=0)


def test_dropout_draws_what_a_plain_step_draws():
    """The gradient is the plain step's, and the norms are of the same masks."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)).double()
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    batch = BY_NAME["mlp"].make(torch.float64, CPU).batch
    train, val = batch(6, 1), batch(2, 2)
    torch.manual_seed(11)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    plain = dict(zip(leaves, torch.autograd.grad(model_fn(leaves, train).mean(), list(leaves.values())), strict=True))
    torch.manual_seed(11)
    result = gf.ghost_quantities(model_fn, params, train, val, want={"dots": gf.Dot(), "gram": gf.Gram()})
    assert_grads(result.grads, plain, 1e-12, "grads")
    whole = torch.cat([grad.flatten() for grad in plain.values()]).square().sum()
    torch.testing.assert_close(result["gram"].mean(), whole)  # |mean g|^2


def test_auxiliary_output():
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, CPU)

    def with_aux(p: Params, b: Any) -> Any:
        return model_fn(p, b), {"inputs": b[0] * 2}

    norms, aux = gf.ghost_grad_norm(with_aux, params, batch(3, 1), has_aux=True)
    torch.testing.assert_close(norms, gf.ghost_grad_norm(model_fn, params, batch(3, 1)))
    assert torch.equal(aux["inputs"], batch(3, 1)[0] * 2)
    both = gf.ghost_quantities(with_aux, params, batch(3, 1), batch(2, 2), want={"dots": gf.Dot()}, has_aux=True)
    assert both.aux["inputs"].shape == (3, 5)


# ---------------------------------------------------------------- streams


def test_noise_scale_from_a_stream():
    """tr(Cov) and |G|^2 as sums over tiles: the simple noise scale of McCandlish et al., from one backward."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    train = batch(5, 1)
    g = flat(losses_and_grads(model_fn, params, train)[1])

    def moments(tile: gf.Tile) -> tuple[Tensor, Tensor]:
        return tile.grads.var(0).sum(), tile.grads.mean(0).square().sum()

    trace, square = gf.ghost_grad_stream(model_fn, params, train, moments)
    torch.testing.assert_close(trace / square, g.var(0).sum() / g.mean(0).square().sum(), rtol=1e-10, atol=0)


def test_a_tile_knows_its_place(monkeypatch):
    """`tile.of` gives the same entries of another tensor: an elementwise metric is one line."""
    monkeypatch.setattr(_tiles, "tile_bytes", lambda device: 200)
    model_fn, params, batch = BY_NAME["convolution"].make(torch.float64, CPU)
    train = batch(3, 1)
    g = losses_and_grads(model_fn, params, train)[1]
    metric = {name: Draw(p.dtype, p.device, 5).normal(*p.shape).abs() for name, p in params.items()}
    found = gf.ghost_grad_stream(
        model_fn, params, train, lambda t: (t.grads.square() * t.of(metric[t.name])).sum((1, 2)), out="param"
    )
    for name in params:
        torch.testing.assert_close(found[name], (g[name].square() * metric[name]).flatten(1).sum(1))


def test_a_stream_of_wrong_shape_is_refused():
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, CPU)
    with pytest.raises(ValueError, match=r"(?s)0\.weight|4\.weight|2\.weight|bias"):
        gf.ghost_grad_stream(model_fn, params, batch(3, 1), lambda tile: tile.grads.sum(), out="entry")
    with pytest.raises(ValueError, match="'param' or 'entry'"):
        gf.ghost_grad_stream(model_fn, params, batch(3, 1), lambda tile: tile.grads.sum(), out="layer")


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "convolution", "derived", "weight twice"])
def test_inside_transforms(name):
    """An ensemble by vmap; the derivative of a norm with respect to the parameters."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, CPU)
    train = batch(3, 1)
    ensemble = {key: torch.stack([p, 1.1 * p]) for key, p in params.items()}
    members = [{key: p[k] for key, p in ensemble.items()} for k in range(2)]
    for call in (gf.ghost_grad_norm, gf.ghost_grad_gram):
        alone = torch.stack([call(model_fn, p, train) for p in members])
        torch.testing.assert_close(torch.func.vmap(lambda p, call=call: call(model_fn, p, train))(ensemble), alone)
    clipped = torch.func.vmap(lambda p: gf.ghost_clipped_grad(model_fn, p, train, 0.1).grads)(ensemble)
    for k, p in enumerate(members):
        expected = gf.ghost_clipped_grad(model_fn, p, train, 0.1).grads
        torch.testing.assert_close({key: g[k] for key, g in clipped.items()}, expected)

    def by_autograd(p: Params) -> Tensor:
        rows = []
        for sample in range(3):
            alone = pytree.tree_map(lambda t, s=sample: t[s : s + 1], train)
            grads = torch.func.grad(lambda q, alone=alone: model_fn(q, alone)[0])(p)
            rows.append(torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt())
        return torch.stack(rows).sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.grad(by_autograd)(params)
    found = torch.func.grad(lambda p: gf.ghost_grad_norm(model_fn, p, train).sum())(params)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- arithmetic


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def two_layers(n: int, m: int, positions: int, width: int, hidden: int) -> tuple[Any, Params, Tensor, Tensor]:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        h = F.linear(F.linear(x, p["up"], p["up_b"]).relu(), p["down"])
        return h.pow(2).mean((1, 2))

    params = Draw(torch.float32, CPU).params(up=(hidden, width), up_b=(hidden,), down=(width, hidden))
    train, val = (Draw(torch.float32, CPU, seed).normal(k, positions, width) for k, seed in ((n, 1), (m, 2)))
    return model_fn, params, train, val


@pytest.mark.parametrize(("n", "m", "positions"), [(4, 2, 256), (8, 2, 512)])
def test_many_cost_little_more_than_the_dearest(n, m, positions):
    """The concatenated batch's five products, and a pass over each sample's tile for each quantity."""
    width, hidden = 128, 192
    model_fn, params, train, val = two_layers(n, m, positions, width, hidden)
    products = 5 * 2 * (n + m) * positions * width * hidden
    want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "gram": gf.Gram(), "norms": gf.Norm(), "second":
            gf.Stream(lambda tile: tile.grads.square().mean(0), "entry")}  # fmt: skip
    passes = 2 * n * (2 * width * hidden + hidden) * (1 + m + n + 1)
    counted = flops(lambda: gf.ghost_quantities(model_fn, params, train, val, want=want))
    assert products <= counted <= products + passes
    dearest = flops(lambda: gf.ghost_quantities(model_fn, params, train, val, want={"matrix": want["matrix"]}))
    assert counted <= 1.2 * dearest


def test_clipping_is_one_backward():
    """A plain step, and the norms from pairs of positions of each sample."""
    n, positions, width, hidden = 16, 16, 64, 96
    model_fn, params, train, _ = two_layers(n, 1, positions, width, hidden)
    plain = 5 * 2 * n * positions * width * hidden
    norms = 2 * 2 * n * positions**2 * (width + hidden)
    counted = flops(lambda: gf.ghost_clipped_grad(model_fn, params, train, 0.1))
    assert counted == plain + norms


def test_a_tied_head_is_multiplied_once():
    """Norms of GPT-2 with tied embeddings cost passes beside a plain step: the head's gradient is not made twice."""
    from test_flops import gpt2, plain_step

    model_fn, params = gpt2(tied=True, layers=1, width=64, heads=2, vocabulary=2000, positions=128)
    batch = {"input_ids": torch.randint(2000, (4, 128))}
    plain = flops(lambda: plain_step(model_fn, params, batch))
    head = 2 * 4 * 128 * 64 * 2000
    assert head > plain / 8
    assert (
        plain <= flops(lambda: gf.ghost_quantities(model_fn, params, batch, want={"norms": gf.Norm()})) <= 1.06 * plain
    )


def test_norms_of_long_samples_go_by_tiles():
    """Where pairs of positions outnumber the entries of a weight, the per-sample gradient is made in tiles."""
    n, positions, width, hidden = 2, 512, 64, 96
    model_fn, params, train, _ = two_layers(n, 1, positions, width, hidden)
    plain = 5 * 2 * n * positions * width * hidden
    counted = flops(lambda: gf.ghost_grad_norm(model_fn, params, train))
    assert plain <= counted <= plain + 2 * 2 * n * width * hidden


# ---------------------------------------------------------------- what is refused


def test_bad_requests():
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, CPU)
    train = batch(3, 1)
    with pytest.raises(ValueError, match="needs a validation batch"):
        gf.ghost_quantities(model_fn, params, train, want={"dots": gf.Dot()})
    with pytest.raises(ValueError, match="must be among the axes"):
        gf.ghost_quantities(model_fn, params, train, want={"norms": gf.Norm("param")})
    with pytest.raises(ValueError, match="a sample or a token"):
        gf.ghost_grad_norm(model_fn, params, train, out="layer")
    with pytest.raises(ValueError, match=r"direction\['0.weight'\]"):
        gf.ghost_quantities(model_fn, params, train, want={"along": gf.Along({})})
    with pytest.raises(ValueError, match="no axis here"):
        gf.ghost_grad_gram(model_fn, params, train, out="sample val")
    with pytest.raises(ValueError, match=r"max_norm=\{\}"):
        gf.ghost_clipped_grad(model_fn, params, train, {})
