"""Clipped gradients against clipping single samples' gradients one by one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Built, Case, Draw
from oracle import TOLERANCE, as_double, assert_grads, losses_and_grads
from test_flops import flops, gpt2, plain_step, two_layers
from torch import Tensor

import ghostfunc as gf

CPU = torch.device("cpu")
Grads = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")


def norms_of(g: Grads) -> Tensor:
    """`[B]`, the norms of the per-sample gradients of these parameters together."""
    return torch.cat([grads.reshape(len(grads), -1) for grads in g.values()], 1).double().norm(dim=1)


def one_by_one(g: Grads, groups: dict[str, tuple[list[str], float]]) -> tuple[Grads, dict[str, Tensor]]:
    """`(sum of clipped gradients, norms by group)`: each sample's part of a group is scaled, then summed."""
    grads, norms = {}, {}
    for group, (names, limit) in groups.items():
        norms[group] = norms_of({name: g[name] for name in names})
        for name in names:
            rows = [
                row * min(1.0, limit / norm) if norm else row
                for row, norm in zip(g[name], norms[group].tolist(), strict=True)
            ]
            grads[name] = torch.stack(rows).sum(0)
    return {name: grads[name] for name in g}, norms


def between(norms: Tensor) -> float:
    """A threshold that some norms exceed and some do not, where they differ."""
    return 0.5 * (norms.min() + norms.max()).item() or 1.0


def assert_norms(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert not actual.requires_grad
    assert ((actual.double() - expected).abs() <= tolerance * expected).all(), f"{actual} instead of {expected}"


def built(name: str, dtype: torch.dtype = torch.float64) -> Built:
    return BY_NAME[name].make(dtype, CPU)


# ---------------------------------------------------------------- against the loop


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_threshold(case: Case, n: int, device: torch.device) -> None:
    model_fn, params, batch = case.make(torch.float64, device)
    data = batch(n, 1)
    losses, g = losses_and_grads(model_fn, params, data)
    limit = between(norms_of(g)) if n > 1 else 0.5 * between(norms_of(g))
    expected, norms = one_by_one(g, {"": (list(g), limit)})
    assert (norms[""] > limit).any()
    assert n == 1 or (norms[""] < limit).any()
    result = gf.ghost_clipped_grad(model_fn, params, data, limit)
    assert_grads(result.grads, expected, TOLERANCE[torch.float64], "clipped")
    assert_norms(result.norms, norms[""], TOLERANCE[torch.float64])
    torch.testing.assert_close(result.losses, losses)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "unused"], ids=lambda case: case.name)
def test_a_threshold_for_each_group(case: Case, device: torch.device) -> None:
    model_fn, params, batch = case.make(torch.float64, device)
    data = batch(5, 1)
    _, g = losses_and_grads(model_fn, params, data)
    members = [part for part in (list(g)[::2], list(g)[1::2]) if part]
    groups = {",".join(names): (names, between(norms_of({name: g[name] for name in names}))) for names in members}
    expected, norms = one_by_one(g, groups)
    result = gf.ghost_clipped_grad(model_fn, params, data, {group: limit for group, (_, limit) in groups.items()})
    assert_grads(result.grads, expected, TOLERANCE[torch.float64], "clipped")
    assert list(result.norms) == list(groups)
    for group in groups:
        assert_norms(result.norms[group], norms[group], TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case, device: torch.device) -> None:
    """Against the loop in float64, on the same values."""
    model_fn, params, batch = case.make(torch.float32, device)
    data = batch(4, 1)
    _, g = losses_and_grads(case.make(torch.float64, device).model_fn, as_double(params), as_double(data))
    limit = between(norms_of(g))
    expected, norms = one_by_one(g, {"": (list(g), limit)})
    result = gf.ghost_clipped_grad(model_fn, params, data, limit)
    error, scale = torch.zeros(()), norms_of({name: grad.unsqueeze(0) for name, grad in expected.items()})
    for name, grad in result.grads.items():
        assert grad.dtype == torch.float32
        error = torch.hypot(error, (grad.double() - expected[name]).norm())
    assert error <= TOLERANCE[torch.float32] * scale
    assert_norms(result.norms, norms[""], TOLERANCE[torch.float32])


# ---------------------------------------------------------------- thresholds at the ends


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "convolution"])
def test_a_threshold_above_all_norms_gives_the_plain_sum(name: str) -> None:
    model_fn, params, batch = built(name)
    data = batch(4, 1)
    leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
    plain = torch.autograd.grad(model_fn(leaves, data).sum(), list(leaves.values()))
    grads, norms = gf.ghost_clipped_grad(model_fn, params, data, 1e9)
    assert (norms < 1e9).all()
    assert_grads(grads, dict(zip(params, plain, strict=True)), 1e-12, "sum")


@pytest.mark.parametrize("limit", [1e-6, 1e-150])
def test_a_tiny_threshold_gives_the_sum_of_directions(limit: float) -> None:
    model_fn, params, batch = built("gpt2 tied")
    data = batch(4, 1)
    _, g = losses_and_grads(model_fn, params, data)
    directions = {name: (grads.flatten(1) / norms_of(g)[:, None]).view_as(grads).sum(0) for name, grads in g.items()}
    grads, _ = gf.ghost_clipped_grad(model_fn, params, data, limit)
    assert_grads({name: grad / limit for name, grad in grads.items()}, directions, 1e-10, "directions")


def test_a_sample_without_targets_adds_nothing() -> None:
    model_fn, params, batch = built("tied by hand")
    ids, labels = batch(4, 1)
    assert (labels[1] == -100).all()
    grads, norms = gf.ghost_clipped_grad(model_fn, params, (ids, labels), 1e-3)
    assert norms[1] == 0
    assert (norms[[0, 2, 3]] > 1e-3).all()
    others = torch.tensor([0, 2, 3])
    without, _ = gf.ghost_clipped_grad(model_fn, params, (ids[others], labels[others]), 1e-3)
    assert_grads(grads, without, 1e-12, "without it")


def test_only_samples_without_targets() -> None:
    model_fn, params, batch = built("tied by hand")
    ids, labels = batch(3, 1)
    grads, norms = gf.ghost_clipped_grad(model_fn, params, (ids, torch.full_like(labels, -100)), 1.0)
    assert not norms.any()
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("limit", [0.01, {"0": 0.01, "2": 0.02, "4": 0.03}])
@pytest.mark.parametrize("n", [1, 4])
def test_what_one_sample_can_change(limit: Any, n: int) -> None:
    """The promise of differential privacy: a sample more changes the sum by its threshold at most, here exactly."""
    model_fn, params, batch = built("mlp")
    x, y = batch(n + 1, 1)
    whole, norms = gf.ghost_clipped_grad(model_fn, params, (x, y), limit)
    less, _ = gf.ghost_clipped_grad(model_fn, params, (x[:n], y[:n]), limit)
    change = {name: (whole[name] - less[name]).unsqueeze(0) for name in whole}
    for group, threshold in (limit if isinstance(limit, dict) else {"": limit}).items():
        assert (norms[group] if group else norms)[n] > threshold
        of_group = {name: c for name, c in change.items() if not group or name.startswith(f"{group}.")}
        assert norms_of(of_group).item() == pytest.approx(threshold, rel=1e-10)


# ---------------------------------------------------------------- what is clipped


def test_a_tied_weight_is_one_parameter() -> None:
    """Its norm is that of the sum over its uses, with their cross terms."""
    model_fn, params, batch = built("gpt2 tied")
    data = batch(4, 1)
    _, g = losses_and_grads(model_fn, params, data)
    (name,) = [name for name in params if "wte" in name]
    others = [other for other in params if other != name]
    result = gf.ghost_clipped_grad(model_fn, params, data, {name: 0.1, ",".join(others): 0.2})
    assert_norms(result.norms[name], norms_of({name: g[name]}), 1e-10)
    expected, _ = one_by_one(g, {name: ([name], 0.1), "others": (others, 0.2)})
    assert_grads(result.grads, expected, 1e-10, "clipped")


def test_frozen_parameters_do_not_count() -> None:
    model_fn, params, batch = built("mlp frozen")
    assert set(params) == {"1.weight", "2.bias", "4.weight"}
    grads, norms = gf.ghost_clipped_grad(model_fn, params, batch(4, 1), 0.1)
    assert list(grads) == list(params)
    assert_norms(norms, norms_of(losses_and_grads(model_fn, params, batch(4, 1))[1]), 1e-10)


def test_layers_restrict_the_norm_and_the_result() -> None:
    model_fn, params, batch = built("gpt2 untied")
    data = batch(4, 1)
    _, g = losses_and_grads(model_fn, params, data)
    g = {name: grads for name, grads in g.items() if ".h.1." in name}
    expected, norms = one_by_one(g, {"": (list(g), 0.05)})
    grads, found = gf.ghost_clipped_grad(model_fn, params, data, 0.05, layers="h.1")
    assert_grads(grads, expected, 1e-10, "clipped")
    assert_norms(found, norms[""], 1e-10)


def test_auxiliary_output_comes_back() -> None:
    model_fn, params, batch = built("mlp")
    data = batch(3, 1)
    result, aux = gf.ghost_clipped_grad(lambda p, b: (model_fn(p, b), {"x": b[0] + 1}), params, data, 0.1, has_aux=True)
    torch.testing.assert_close(aux["x"], data[0] + 1)
    assert_grads(result.grads, gf.ghost_clipped_grad(model_fn, params, data, 0.1).grads, 1e-12, "grads")


def test_what_has_no_factors_is_clipped_too() -> None:
    """A use that only `on_unsupported="dense"` computes."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return gradients[0] * w, (gradients[0] * x).sum(0)

    def model_fn(p: Grads, x: Tensor) -> Tensor:
        return Scale.apply(F.linear(x, p["w"]), p["s"]).tanh().pow(2).sum(1)

    params = Draw(torch.float64, CPU).params(w=(3, 4), s=(3,))
    x = Draw(torch.float64, CPU, 1).normal(5, 4)
    with pytest.raises(gf.UnsupportedUse, match="s"):
        gf.ghost_clipped_grad(model_fn, params, x, 1.0)
    _, g = losses_and_grads(model_fn, params, x)
    limit = between(norms_of(g))
    expected, _ = one_by_one(g, {"": (list(g), limit)})
    result = gf.ghost_clipped_grad(model_fn, params, x, limit, on_unsupported="dense")
    assert_grads(result.grads, expected, 1e-10, "clipped")


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "convolution"])
def test_an_ensemble_by_vmap(name: str) -> None:
    model_fn, params, batch = built(name)
    data = batch(3, 1)
    members = [{key: scale * p for key, p in params.items()} for scale in (1.0, 0.5, 1.5)]
    limits = {key: 0.1 * (1 + k) for k, key in enumerate(params)}
    ensemble = {key: torch.stack([member[key] for member in members]) for key in params}

    def clipped(p: Grads) -> tuple[Grads, dict[str, Tensor]]:
        result = gf.ghost_clipped_grad(model_fn, p, data, limits)
        return result.grads, result.norms

    grads, norms = torch.func.vmap(clipped)(ensemble)
    for k, member in enumerate(members):
        alone, norms_alone = clipped(member)
        assert_grads({key: g[k] for key, g in grads.items()}, alone, 1e-12, "of a member")
        for key, norm in norms_alone.items():
            assert_norms(norms[key][k], norm, 1e-12)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("positions", "way"), [(16, "pairs"), (256, "tiles")])
def test_flops_by_hand(positions: int, way: str) -> None:
    """A plain step, and the norms: by pairs of positions, or by per-sample gradients made and squared in tiles."""
    n, width, hidden = 8, 64, 96
    model_fn, params, data, _ = two_layers(n, 1, positions, width, hidden)
    pairs = 2 * 2 * n * positions**2 * (width + hidden)
    tiles = 2 * (2 * n * positions * width * hidden)
    squares = 2 * 2 * n * width * hidden
    plain = flops(lambda: plain_step(model_fn, params, data))
    norms = flops(lambda: gf.ghost_clipped_grad(model_fn, params, data, 0.1)) - plain
    if way == "pairs":
        assert norms == pairs < tiles
    else:
        assert tiles <= norms <= tiles + squares + 2 * n * hidden
        assert tiles + squares < pairs


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_gpt2(tied: bool) -> None:
    """One forward and one backward, and of each matrix the norms' own products: all of them, and no more."""
    n, positions, width, vocabulary, layers = 4, 32, 64, 500, 2
    model_fn, params = gpt2(tied=tied, layers=layers, width=width, heads=2, vocabulary=vocabulary, positions=positions)
    data = {"input_ids": torch.randint(vocabulary, (n, positions))}
    plain = flops(lambda: plain_step(model_fn, params, data))
    counted = flops(lambda: gf.ghost_clipped_grad(model_fn, params, data, 0.1))
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers
    shapes += [(width, vocabulary)]
    pairs, tiles = [2 * n * positions**2 * (a + b) for a, b in shapes], [2 * n * positions * a * b for a, b in shapes]
    least = sum(map(min, pairs, tiles))
    most = least - min(pairs[-1], tiles[-1]) + tiles[-1] if tied else least  # the way of a tied weight is its uses' one
    # A squared entry of every per-sample gradient that is made, and of look-ups the products of their rows.
    rest = 2 * n * sum(p.numel() for p in params.values()) + 3 * 2 * n * positions**2 * width
    assert plain + least <= counted <= plain + most + rest
    assert counted < 1.5 * plain  # a second backward alone would be 1.67


def test_one_forward() -> None:
    model_fn, params, batch = built("gpt2 tied")
    calls = []

    def counting(p: Grads, b: Any) -> Tensor:
        calls.append(1)
        return model_fn(p, b)

    gf.ghost_clipped_grad(counting, params, batch(3, 1), 0.1)
    assert len(calls) == 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "max_norm=0.0: expected a number above 0"),
        (-1.0, "expected a number above 0"),
        (math.nan, "expected a number above 0"),
        (math.inf, "expected a number above 0"),
        ({"0": 1.0}, "2.weight is in 0 groups"),
        ({"0": 1.0, "2": 1.0, "4,0": 1.0}, r"0.weight is in 2 groups \('0', '4,0'\)"),
        ({"0": 1.0, "2": 0.0, "4": 1.0}, "max_norm=0.0 for '2'"),
        ({"0": 1.0, "2": 1.0, "4": 1.0, "5": 1.0}, "no parameter matches '5'; the parameters are 0.weight"),
    ],
)
def test_bad_thresholds(limit: Any, message: str) -> None:
    model_fn, params, batch = built("mlp")
    with pytest.raises(ValueError, match=message):
        gf.ghost_clipped_grad(model_fn, params, batch(3, 1), limit)


def test_an_empty_batch() -> None:
    model_fn, params, batch = built("mlp")
    x, y = batch(3, 1)
    with pytest.raises(ValueError, match="batch is empty"):
        gf.ghost_clipped_grad(model_fn, params, (x[:0], y[:0]), 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    """A clipping weight cannot mend it: 0 times infinity is not a number, and the whole sum would be none."""
    model_fn, params, batch = built("mlp")
    factor = torch.tensor([1, bad, 1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"samples \[1\] are not finite"):
        gf.ghost_clipped_grad(lambda p, b: model_fn(p, b[0]) * b[1], params, (batch(3, 1), factor), 1.0)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    """Under a finite loss: the sample is named, rather than left out or let into the sum."""
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    params = {"w": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"samples \[0\] are not finite"):
        gf.ghost_clipped_grad(lambda p, x: (x @ p["w"]).sqrt(), params, x, 1.0)


def test_samples_that_interact() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    draw = Draw(torch.float64, CPU)
    with pytest.raises(gf.InteractingSamples):
        gf.ghost_clipped_grad(model_fn, params, (draw.normal(4, 5), draw.ids(3, 4)), 1.0)
