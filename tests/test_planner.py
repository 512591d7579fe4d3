"""The plan against what is counted: FLOPs of every order, the cheapest of all, and the memory that they may take."""

import re
from typing import NamedTuple

import pytest
import torch
from cases import Draw
from counting import Allocated, Counted, counted
from torch import Tensor

from ghostfunc._contract import contract_outer
from ghostfunc._directions import Directions, FromRows, Given
from ghostfunc._factors import Outer
from ghostfunc._planner import MEMORY_BOUND, Shape, best_order, forced, orders

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Sizes(NamedTuple):
    """Train and validation samples, their positions, and the weight."""

    n: int
    m: int
    positions: int
    p: int
    q: int


GRID = [
    Sizes(64, 16, 1, 96, 64),  # an MLP
    Sizes(8, 64, 1, 64, 128),
    Sizes(4, 1, 128, 48, 96),  # language models
    Sizes(4, 4, 64, 96, 48),
    Sizes(2, 1, 256, 32, 160),
    Sizes(1, 1, 128, 64, 32),
    Sizes(16, 1, 16, 64, 64),
    Sizes(3, 5, 9, 40, 24),
    Sizes(32, 2, 4, 20, 300),
]
KINDS = ["given", "sum", "each"]
CASES = [(sizes, kind, want_grad) for sizes in GRID for kind in KINDS for want_grad in (False, True)]


def factors(sizes: Sizes, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Outer, Directions, Tensor]:
    """The train rows, the directions, and the directions `[k, p, q]` in float64."""
    n, m, positions, p, q = sizes
    train, val = (
        Outer(Draw(dtype, CPU, seed).normal(k, positions, q), Draw(dtype, CPU, seed + 2).normal(k, positions, p))
        for k, seed in ((n, 1), (m, 2))
    )
    if kind == "given":
        directions = Draw(dtype, CPU, 5).normal(min(m, 3), p, q)
        return train, Given(directions), directions.double()
    each = val.left.double().transpose(1, 2) @ val.right.double()
    return train, FromRows(val, each=kind == "each"), each if kind == "each" else each.sum(0, keepdim=True)


def shape_of(sizes: Sizes, kind: str, directions: Directions, want_grad: bool, dtype: torch.dtype) -> Shape:
    n, m, positions, p, q = sizes
    given = kind == "given"
    rows = 0 if given else m * positions
    return Shape(n, positions, p, q, directions.count, rows, given, want_grad, dtype.itemsize)


def assert_exact(train: Outer, to: Tensor, dots: Tensor, grad: Tensor | None, want_grad: bool) -> None:
    each = train.left.double().transpose(1, 2) @ train.right.double()  # [n, p, q]
    tolerance = TOLERANCE[dots.dtype]
    scale = each.flatten(1).norm(dim=1)[:, None] * to.flatten(1).norm(dim=1)
    assert ((dots.double() - each.flatten(1) @ to.flatten(1).T).abs() <= tolerance * scale).all()
    assert (grad is not None) == want_grad
    if grad is not None:
        assert (grad.double() - each.sum(0)).norm() <= tolerance * each.sum(0).norm()


def passes_of(found: Counted, order: str, sizes: Sizes, want_grad: bool) -> int:
    """Entries that products wrote, each a pass over memory, beside the weight gradient of orders that make it apart."""
    apart = want_grad and order != "tile stream"
    return sum(product.written for product in found.products) - apart * sizes.p * sizes.q


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("sizes", "kind", "want_grad"), CASES)
def test_every_order(sizes, kind, want_grad, dtype):
    """Exact in each order, at the FLOPs of its formula, nothing hidden; the chosen one is the cheapest as counted."""
    train, directions, to = factors(sizes, kind, dtype)
    shape = shape_of(sizes, kind, directions, want_grad, dtype)
    n, costs = sizes.n, {}
    for order in orders(shape):
        with forced(order.name), Counted() as found:
            dots, grad = contract_outer(train, directions, want_grad=want_grad)
        assert_exact(train, to, dots, grad, want_grad)
        assert order.flops * 0.99 <= found.total_flops <= order.flops * 1.01, order.name
        passes = passes_of(found, order.name, sizes, want_grad)
        assert order.passes <= passes, f"{order.name}: more was passed over than its products wrote"
        assert not found.by_op(grew=True), f"{order.name}: an outer product is hidden in {found.largest(grew=True)}"
        assert found.entries <= 2 * passes + 4 * n * max(directions.count, sizes.m), f"{order.name}: {found.by_op()}"
        costs[order.name] = found.total_flops + MEMORY_BOUND * passes
    assert set(costs) == {"tile stream", "direction"} | (set() if kind == "given" else {"Gram"})
    chosen = counted(lambda: contract_outer(train, directions, want_grad=want_grad))
    passes = passes_of(chosen, best_order(shape).name, sizes, want_grad)
    assert chosen.total_flops + MEMORY_BOUND * passes <= 1.001 * min(costs.values())


def test_the_grid_has_every_choice():
    """No order is the cheapest everywhere."""
    chosen = set()
    for sizes, kind, want_grad in CASES:
        directions = factors(sizes, kind)[1]
        chosen.add(best_order(shape_of(sizes, kind, directions, want_grad, torch.float32)).name)
    assert chosen == {"tile stream", "direction", "Gram"}


@pytest.mark.parametrize(("sizes", "kind", "want_grad"), CASES)
def test_a_budget(sizes, kind, want_grad):
    """Within a quarter of the working memory: the same results, by smaller pieces or by another order.

    No tensor but a result is larger than the budget; for Gram the dot products `[n, m]` are results.
    """
    train, directions, to = factors(sizes, kind)
    shape = shape_of(sizes, kind, directions, want_grad, torch.float32)
    n, m, _, p, q = sizes
    largest_result = 4 * max(n * m, want_grad * p * q)
    free = best_order(shape)
    with Allocated() as without:
        contract_outer(train, directions, want_grad=want_grad)
    budget = free.bytes // 4
    with Allocated() as within:
        dots, grad = contract_outer(train, directions, want_grad=want_grad, budget=budget)
    assert_exact(train, to, dots, grad, want_grad)
    assert within.largest <= max(budget, largest_result)
    results = 4 * (2 * n * m + want_grad * p * q)
    assert within.peak - results <= budget
    assert without.peak - results <= free.bytes
    assert within.peak < without.peak


def test_a_budget_changes_the_order():
    """A direction of 9 KB is not formed within 2 KB: pairs of a few positions are."""
    sizes = Sizes(3, 5, 9, 40, 24)
    train, directions, to = factors(sizes, "sum")
    shape = shape_of(sizes, "sum", directions, False, torch.float32)
    assert best_order(shape).name == "direction"
    assert best_order(shape, 2256).name == "Gram"
    within = counted(lambda: contract_outer(train, directions, want_grad=False, budget=2256))
    gram = next(order for order in orders(shape) if order.name == "Gram")
    assert within.total_flops == gram.flops
    assert_exact(train, to, *contract_outer(train, directions, want_grad=False, budget=2256), False)


def test_a_budget_that_is_too_small_for_anything():
    """The error says what the least is, and with that it works."""
    sizes = Sizes(4, 1, 128, 48, 96)
    train, directions, _ = factors(sizes, "given")
    with pytest.raises(ValueError, match=r"memory=100: too small .* \[48, 96\] .*\((\d+) bytes\)") as error:
        contract_outer(train, directions, want_grad=False, budget=100)
    least = int(re.search(r"\((\d+) bytes\)", str(error.value)).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    contract_outer(train, directions, want_grad=False, budget=least)
