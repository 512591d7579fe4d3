"""Operations without a rule: exact, in chunks of samples that fit a budget, and named by `explain`."""

import pytest
import torch
from oracle import assert_dots, assert_grads, dots, matrix, mean, per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc import _factors

Params = dict[str, Tensor]


def solved(p: Params, batch: Tensor) -> Tensor:
    """x A^-1: `solve` has no rule."""
    h = torch.linalg.solve(p["a"] + 3 * torch.eye(4, dtype=batch.dtype), batch, left=False)  # [B, 3, 4]
    return ((h @ p["w"]) * p["s"]).tanh().sum((1, 2))


def params() -> Params:
    return {name: torch.randn(shape).double() for name, shape in {"a": (4, 4), "w": (4, 2), "s": (2,)}.items()}


@pytest.mark.parametrize("at_a_time", [1, 2, 100])
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_exact_in_chunks(schedule: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_factors, "LATER_BYTES", at_a_time * 16 * 8)
    p, train, val = params(), torch.randn(5, 3, 4).double(), torch.randn(3, 3, 4).double()
    g, v = per_sample_grads(solved, p, train), per_sample_grads(solved, p, val)
    result = gf.value_and_grad_dot(solved, p, train, val, schedule=schedule)
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots")
    assert_grads(result.grads, mean(g), 1e-10, "grads")
    every = gf.ghost_grad_dot(solved, p, train, val, schedule=schedule, out="train val")
    assert_dots(every, matrix(g, v), 1e-10, "matrix")
    assert_dots(gf.ghost_grad_along(solved, p, train, mean(v)), dots(g, mean(v)), 1e-10, "along")
    _, factors = gf.ghost_factors(solved, p, train)
    assert [type(f) for f in factors["a"]] == [gf.Dense]
    torch.testing.assert_close(factors["a"][0].dense((4, 4)), g["a"], rtol=1e-10, atol=1e-12)


def test_no_more_than_the_budget_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made holds as many samples' gradients as the budget allows."""
    monkeypatch.setattr(_factors, "LATER_BYTES", 2 * 16 * 8)
    p, train = params(), torch.randn(20, 3, 4).double()
    plain = torch.stack
    made: list[int] = []

    def counting(tensors, *args):
        made.append(len(tensors)) if tensors[0].shape == (4, 4) else None
        return plain(tensors, *args)

    monkeypatch.setattr(torch, "stack", counting)
    gf.ghost_grad_along(solved, p, train, p)
    assert max(made) == 2
    assert made.count(2) == 10


def test_explain_names_it() -> None:
    p, train = params(), torch.randn(5, 3, 4).double()
    plan = gf.explain(solved, p, train, train)
    assert {name for name, uses in plan.uses.items() if any(use.fallback for use in uses)} == {"a"}
    (use,) = plan.uses["a"]
    assert use.bytes == 10 * 16 * 8
    assert plan.coverage == {"fallback": 16 / 26, "matmul": 8 / 26, "mul": 2 / 26}
    assert "no rule: a backward of `linalg_solve` for each sample, 10 at a time" in str(plan)
    assert "61.5% fallback, 30.8% matmul, 7.7% mul" in str(plan)


def test_coverage_adds_up() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    model_fn, weights = gf.functionalize(model, gf.causal_lm_loss)
    plan = gf.explain(model_fn, {**weights, "unused": torch.zeros(28)}, torch.randint(7, (3, 5)))
    assert plan.coverage == {"embedding + linear": 0.5, "unused": 0.5}
