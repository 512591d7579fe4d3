"""Calls inside torch.func's transforms: an ensemble by vmap, derivatives by grad and jvp, in params and inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Built
from hard import HARD
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import ghostfunc as gf

# Both are torch's own words: at its first jvp, and where vmap has no rule of its own for an operation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]

Params = dict[str, Tensor]
ALL = {**BY_NAME, **{case.name: case for case in HARD}}
NAMES = [
    "mlp", "gpt2 tied", "gpt2 untied", "convolution", "broadcasts", "norms", "derived", "tied by hand", "embeddings",
    "padding_idx", "weight twice", "recurrent", "heads", "unused", "sequence first T=4, the train batch", "last token",
    "a matrix for each sample", "hypernetwork", "rows of a weight", "lstm", "multihead attention", "weight norm",
    "bilinear", "conv1d", "transposed",
]  # fmt: skip


def built(name: str) -> tuple[Built, Any, Any]:
    case = ALL[name].make(torch.float64, torch.device("cpu"))
    return case, case.batch(4, 1), case.batch(2, 2)


def by_autograd(model_fn: Callable[..., Tensor], params: Params, train: Any, val: Any) -> Tensor:
    """The dots by differentiating single losses, for torch.func to differentiate again."""
    direction = grad(lambda p: model_fn(p, val).mean())(params)
    rows = []
    for sample in range(4):
        alone = pytree.tree_map(lambda t, s=sample: t[s : s + 1], train)
        row = grad(lambda p, alone=alone: model_fn(p, alone)[0])(params)
        rows.append(torch.stack([(row[name] * direction[name]).sum() for name in params]).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "weight norm"])  # which torch has no jvp of
def test_derivatives_in_params(name: str, schedule: str) -> None:
    """jvp against jvp of plain differentiation; grad against jvp, which sees every direction that a tangent has."""
    (model_fn, params, _), train, val = built(name)

    def dots(p: Params) -> Tensor:
        return gf.ghost_grad_dot(model_fn, p, train, val, schedule=schedule)

    tangent = {key: torch.randn_like(p) for key, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the reference, too, needs a second derivative
        value, expected = jvp(lambda p: by_autograd(model_fn, p, train, val), (params,), (tangent,))
    mine, pushed = jvp(dots, (params,), (tangent,))
    torch.testing.assert_close(mine, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pushed, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(value)
    pulled = grad(lambda p: (dots(p) * weights).sum())(params)
    total = torch.stack([(pulled[key] * tangent[key]).sum() for key in params]).sum()
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", [grad, jvp])
def test_derivatives_through_weight_norm(transform: Any) -> None:
    """By differences: torch's own second derivative of the fused operation is wrong."""
    (model_fn, params, _), train, val = built("weight norm")
    tangent = {key: torch.randn_like(p) for key, p in params.items()}

    def dots(p: Params) -> Tensor:
        return gf.ghost_grad_dot(model_fn, p, train, val).sum()

    def moved(step: float) -> Tensor:
        return dots({key: p + step * tangent[key] for key, p in params.items()})

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    if transform is grad:
        slope = grad(dots)(params)
        found = torch.stack([(slope[key] * tangent[key]).sum() for key in params]).sum()
    else:
        _, found = jvp(dots, (params,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble(name: str, schedule: str) -> None:
    (model_fn, params, _), train, val = built(name)
    members = [{key: factor * p for key, p in params.items()} for factor in (1.0, 0.9, 1.2)]
    stacked = {key: torch.stack([member[key] for member in members]) for key in params}

    def everything(p: Params) -> Any:
        values = gf.value_and_grad_dot(model_fn, p, train, val, schedule=schedule)
        return values.losses, values.grads, values.dots, gf.ghost_grad_dot(model_fn, p, train, val, out="train val")

    together = vmap(everything)(stacked)
    for index, member in enumerate(members):
        one = pytree.tree_map(lambda t, k=index: t[k], together)
        torch.testing.assert_close(one, everything(member), rtol=1e-10, atol=1e-12)


def smooth(p: Params, batch: dict[str, Tensor]) -> Tensor:
    h = F.layer_norm(F.linear(batch["x"], p["w"], p["b"]).tanh(), (5,), p["s"])
    return (h @ p["v"]).pow(2).mean((1, 2))


def smooth_params() -> Params:
    shapes = {"w": (5, 4), "b": (5,), "s": (5,), "v": (5, 2)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_derivatives_in_inputs(schedule: str) -> None:
    params = smooth_params()
    x, y = torch.randn(3, 2, 4).double(), torch.randn(2, 2, 4).double()

    def dots(x: Tensor, y: Tensor) -> Tensor:
        return gf.ghost_grad_dot(smooth, params, {"x": x}, {"x": y}, schedule=schedule).sum()

    for place in (0, 1):
        found = grad(dots, argnums=place)(x, y)
        direction = torch.randn_like((x, y)[place])
        ends = []
        for step in (1e-6, -1e-6):
            moved = [x, y]
            moved[place] = moved[place] + step * direction
            ends.append(dots(*moved))
        torch.testing.assert_close((found * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_derivatives_of_what_else_is_returned() -> None:
    """Losses, gradients, dots along a direction, a preconditioned direction, factors: all are functions of params."""
    params = smooth_params()
    train, val = {"x": torch.randn(3, 2, 4).double()}, {"x": torch.randn(2, 2, 4).double()}
    tangent = {key: torch.randn_like(p) for key, p in params.items()}

    def everything(p: Params) -> Any:
        values = gf.value_and_grad_dot(smooth, p, train, val, out="param train val")
        halved = gf.ghost_grad_dot(smooth, p, train, val, precondition=lambda g: {k: t / 2 for k, t in g.items()})
        along = gf.ghost_grad_along(smooth, p, train, p, out="param train")
        _, factors = gf.ghost_factors(smooth, p, train)
        dense = {key: torch.stack([f.dense(p[key].shape) for f in factors[key]]).sum(0) for key in p}
        return values.losses, values.val_losses, values.grads, values.dots, halved, along, dense

    _, pushed = jvp(everything, (params,), (tangent,))
    ends = [everything({k: p + step * tangent[k] for k, p in params.items()}) for step in (1e-6, -1e-6)]
    slopes = pytree.tree_map(lambda a, b: (a - b) / 2e-6, *ends)
    torch.testing.assert_close(pushed, slopes, rtol=1e-5, atol=1e-7)


def test_an_ensemble_over_batches() -> None:
    params = smooth_params()
    x, val = torch.randn(5, 3, 2, 4).double(), {"x": torch.randn(2, 2, 4).double()}
    together = vmap(lambda x: gf.ghost_grad_dot(smooth, params, {"x": x}, val))(x)
    one_by_one = torch.stack([gf.ghost_grad_dot(smooth, params, {"x": part}, val) for part in x])
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-12)


def test_what_only_a_probe_tells_apart_is_refused() -> None:
    params = smooth_params()

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return smooth(p, {"x": torch.stack(batch["x"].unbind())})

    batch = {"x": torch.randn(3, 2, 4).double()}
    assert gf.ghost_grad_along(model_fn, params, batch, params).shape == (3,)
    with pytest.raises(gf.UnsupportedUse, match=r"unbind.*inside a functorch transform"):
        grad(lambda p: gf.ghost_grad_along(model_fn, p, batch, params).sum())(params)
