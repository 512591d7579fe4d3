"""Contractions of factors in every order and for every pair of kinds, against dense per-sample gradients."""

from itertools import product

import pytest
import torch
from cases import Draw
from torch import Tensor

from ghostfunc import _contract
from ghostfunc._contract import along, contract_outer, pair, pair_sum, total
from ghostfunc._directions import FromRows, Given
from ghostfunc._factors import Dense, Gather, Outer
from ghostfunc._planner import Shape, best_order, forced
from ghostfunc._stream import long_products, squares

CPU = torch.device("cpu")
SHAPE = (7, 4)  # of the parameter
ORDERS = [*product(("direction", "tile stream"), ("given", "sum", "each")), ("Gram", "sum"), ("Gram", "each")]


def outer(n: int, positions: int, seed: int, *, transposed: bool = False) -> Outer:
    draw = Draw(torch.float64, CPU, seed)
    p, q = SHAPE
    a, g = (p, q) if transposed else (q, p)
    return Outer(draw.normal(n, positions, a), draw.normal(n, positions, g), transposed)


def gather(n: int, positions: int, seed: int) -> Gather:
    draw = Draw(torch.float64, CPU, seed)
    return Gather(draw.ids(SHAPE[0], n, positions), draw.normal(n, positions, SHAPE[1]))


def dense(n: int, positions: int, seed: int) -> Dense:
    return Dense(Draw(torch.float64, CPU, seed).normal(n, *SHAPE))


KINDS = {"outer": outer, "gather": gather, "dense": dense}


def flat(factor) -> Tensor:
    return factor.dense(SHAPE).flatten(1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("order", "kind"), ORDERS)
@pytest.mark.parametrize("want_grad", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("budget", [None, 1000, 400])
def test_every_order(order, kind, want_grad, transposed, budget):
    """All orders give the same dot products and the same gradient, whatever the memory."""
    train, val = outer(3, 5, 1, transposed=transposed), outer(2, 6, 2, transposed=transposed)
    each = flat(val)
    if kind == "given":
        directions, want = Given(each.view(2, *SHAPE)), flat(train) @ each.T
    else:
        directions = FromRows(val, each=kind == "each")
        want = flat(train) @ (each if kind == "each" else each.sum(0, keepdim=True)).T
    with forced(order):
        dots, grad = contract_outer(train, directions, want_grad=want_grad, budget=budget)
    close(dots, want)
    assert (grad is not None) == want_grad
    if grad is not None:
        close(grad, train.dense(SHAPE).sum(0))


@pytest.mark.parametrize("pair_bytes", [1, 1 << 30])
@pytest.mark.parametrize(("train", "val"), list(product(KINDS, KINDS)))
def test_every_pair_of_kinds(train, val, pair_bytes, monkeypatch):
    """Cross terms between two uses of a parameter, with other numbers of samples and positions."""
    monkeypatch.setattr(_contract, "_PAIR_BYTES", pair_bytes)
    ours, theirs = KINDS[train](3, 5, 1), KINDS[val](2, 6, 2)
    close(pair(ours, theirs), flat(ours) @ flat(theirs).T)
    close(pair_sum(ours, theirs), flat(ours) @ flat(theirs).sum(0, keepdim=True).T)


@pytest.mark.parametrize("kind", KINDS)
def test_along_total_and_parts(kind):
    factor = KINDS[kind](4, 5, 1)
    directions = Draw(torch.float64, CPU, 2).normal(3, *SHAPE)
    close(along(factor, directions), flat(factor) @ directions.flatten(1).T)
    close(total(factor, SHAPE), factor.dense(SHAPE).sum(0))
    close(factor.part(1, 3).dense(SHAPE), factor.dense(SHAPE)[1:3])


def test_a_table_with_ids_that_validation_never_saw():
    """Only the rows that the val samples looked up are formed: other ids, larger and smaller, contribute nothing."""
    train = Gather(torch.tensor([[0, 6, 3], [5, 5, 1]]), Draw(torch.float64, CPU).normal(2, 3, 4))
    val = Gather(torch.tensor([[3, 5], [3, 3]]), Draw(torch.float64, CPU, 1).normal(2, 2, 4))
    close(pair_sum(train, val), flat(train) @ flat(val).sum(0, keepdim=True).T)


@pytest.mark.parametrize(
    ("shape", "given", "want_grad", "name"),
    [
        ({"n": 64, "positions": 1, "p": 1024, "q": 1024, "k": 1, "val_rows": 16}, False, True, "Gram"),
        ({"n": 64, "positions": 1, "p": 1024, "q": 1024, "k": 1, "val_rows": 4096}, True, False, "direction"),
        ({"n": 4, "positions": 256, "p": 768, "q": 3072, "k": 1, "val_rows": 256}, False, True, "tile stream"),
        ({"n": 16, "positions": 1024, "p": 50257, "q": 768, "k": 1, "val_rows": 1024}, False, True, "tile stream"),
    ],
)
def test_the_cheapest_order(shape, given, want_grad, name):
    """Few rows: Gram. An MLP's dots alone: direction. Language models: the tile stream."""
    assert best_order(Shape(**shape, given=given, want_grad=want_grad)).name == name


def test_long_sums_keep_their_digits():
    """Squares of a gradient of four million entries: one float32 product is 2e-5 off."""
    rows = torch.randn(3, 1 << 22)
    exact = rows.double() @ rows.double().t()
    error = (long_products(rows, rows) - exact).abs() / exact.diagonal().max()
    assert error.max() < 1e-6
    error = (squares(rows) - exact.diagonal()).abs() / exact.diagonal()
    assert error.max() < 1e-6


def test_a_budget_that_nothing_fits():
    with pytest.raises(ValueError, match=r"memory=95: too small to contract a weight \[7, 4\] with 2 directions"):
        contract_outer(outer(3, 5, 1), FromRows(outer(2, 6, 2), each=True), want_grad=True, budget=95)
