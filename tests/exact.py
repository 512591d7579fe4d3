"""A rule against the loop over single samples: exact, without the fallback, and without a probe."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import Draw, Params, squared
from oracle import (
    assert_dots,
    assert_dots_by_name,
    assert_grads,
    expected,
    losses_and_grads,
    mean,
)
from torch import Tensor

import ghostfunc as gf
from ghostfunc import _rules

TOLERANCE = 1e-10
Body = Callable[[Params, Tensor], Tensor]  # body(params, x [B, ...]) -> [B, ...]


class Spelling(NamedTuple):
    """One way to write an operation, between a parameter before it and a loss behind it.

    Attributes:
        name: what is tested.
        body: `body(params, x) -> [B, ...]`.
        x: the shape of one sample's data.
        params: shapes by name.
    """

    name: str
    body: Body
    x: tuple[int, ...]
    params: dict[str, tuple[int, ...]]


def built(spelling: Spelling, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Any, Params, Any]:
    """`(model_fn, params, batch)`, with a parameter ahead of the operation, so that gradients pass through it."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        out = spelling.body(p, batch["x"] * (1 + p["before"].tanh()))
        out = out.reshape(len(out), -1)
        return squared(out.tanh(), batch["y"].unsqueeze(1))

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(dtype, device, seed)
        return {"x": draw.normal(n, *spelling.x), "y": draw.normal(n)}

    return model_fn, Draw(dtype, device).params(before=spelling.x, **spelling.params), batch


def assert_exact(model_fn: Any, params: Params, train: Any, val: Any) -> None:
    """Dot products in both schedules, the gradient and the factors, as the loop has them."""
    losses, g = losses_and_grads(model_fn, params, train)
    _, v = losses_and_grads(model_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule="joint")
    assert_dots_by_name(result.dots, expected("param train", g, v), TOLERANCE, "joint dots")
    assert_grads(result.grads, mean(g), TOLERANCE, "gradient")
    matrix = gf.ghost_grad_dot(model_fn, params, train, val, out="train val", schedule="two-phase")
    assert_dots(matrix, expected("train val", g, v), TOLERANCE, "two-phase dots")
    found, factors = gf.ghost_factors(model_fn, params, train)
    torch.testing.assert_close(found, losses, rtol=TOLERANCE, atol=TOLERANCE)
    dense = {name: torch.zeros_like(grads) for name, grads in g.items()}
    for name, p in params.items():
        for factor in factors[name]:
            dense[name] += factor.dense(p.shape)
    assert_grads(dense, g, TOLERANCE, "factors")


def assert_has_rule(monkeypatch: pytest.MonkeyPatch, model_fn: Any, params: Params, batch: Any) -> list[str]:
    """Raise where an operation takes the fallback or samples must be probed; the operations of the uses otherwise."""

    def refuse(mode: Any, name: str, *_: Any) -> None:
        pytest.fail(f"`{name}` takes the fallback")

    monkeypatch.setattr(_rules, "_opaque", refuse)
    plan = gf.explain(model_fn, params, batch)
    assert not plan.probe
    return [use.op for uses in plan.uses.values() for use in uses]
