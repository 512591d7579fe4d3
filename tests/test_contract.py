"""Contractions of factors in every order and for every pair of kinds, against dense per-sample gradients."""

from itertools import product

import pytest
import torch
from cases import Draw
from torch import Tensor

from ghostfunc import _contract
from ghostfunc._contract import FromRows, Given, Order, along, best_order, contract_outer, pair, pair_sum, total
from ghostfunc._factors import Dense, Gather, Outer

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


@pytest.fixture(params=[1, 4 * 8 * 4, 1 << 30], ids=["one row", "some rows", "the whole weight"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(_contract, "TILE_BYTES", request.param)


@pytest.mark.parametrize(("order", "kind"), ORDERS)
@pytest.mark.parametrize("want_grad", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_order(order, kind, want_grad, transposed, tile_bytes, monkeypatch):
    """All orders give the same dot products and the same gradient, for every size of a tile."""
    monkeypatch.setattr(_contract, "best_order", lambda *args, **kwargs: Order(order, 0, 0))
    train, val = outer(3, 5, 1, transposed=transposed), outer(2, 6, 2, transposed=transposed)
    each = flat(val)
    if kind == "given":
        directions, want = Given(each.view(2, *SHAPE)), flat(train) @ each.T
    else:
        directions = FromRows(val.left, val.right, each=kind == "each")
        want = flat(train) @ (each if kind == "each" else each.sum(0, keepdim=True)).T
    dots, grad = contract_outer(train, directions, want_grad=want_grad)
    close(dots, want)
    assert (grad is not None) == want_grad
    if grad is not None:
        close(grad, train.dense(SHAPE).sum(0))


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
@pytest.mark.parametrize(("train", "val"), list(product(KINDS, KINDS)))
def test_every_pair_of_kinds(train, val, gram_bytes, monkeypatch):
    """Cross terms between two uses of a parameter, with other numbers of samples and positions."""
    monkeypatch.setattr(_contract, "_GRAM_BYTES", gram_bytes)
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
    assert best_order(**shape, given=given, want_grad=want_grad).name == name


def test_long_sums_keep_their_digits():
    """Squares of a gradient of four million entries: one float32 product is 2e-5 off."""
    rows = torch.randn(3, 1 << 22)
    exact = rows.double() @ rows.double().t()
    error = (_contract.long_products(rows, rows) - exact).abs() / exact.diagonal().max()
    assert error.max() < 1e-6
