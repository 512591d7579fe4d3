"""The tests' counter of work: every product that torch can make by its known count, and work hidden from FLOPs."""

import importlib
import pkgutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Draw
from counting import Counted, body_of, counted, custom_operators, distinct, flops, plain_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf
import ghostfunc._tile_op  # registers its operator

CPU = torch.device("cpu")
COUNT, ROWS, INNER, COLS = 2, 3, 5, 7
draw = Draw(torch.float32, CPU)
a, b, row, column = draw.normal(ROWS, INNER), draw.normal(INNER, COLS), draw.normal(INNER), draw.normal(COLS)
stack_a, stack_b, total, totals = (
    draw.normal(COUNT, ROWS, INNER),
    draw.normal(COUNT, INNER, COLS),
    draw.normal(ROWS, COLS),
    draw.normal(COUNT, ROWS, COLS),
)
product = 2 * ROWS * INNER * COLS


def test_products_of_matrices():
    assert flops(lambda: a @ b) == flops(lambda: F.linear(a, b.t())) == product
    assert flops(lambda: torch.addmm(total, a, b)) == flops(lambda: total.clone().addmm_(a, b)) == product
    assert flops(lambda: torch.mm(a, b, out=torch.empty(ROWS, COLS))) == product
    assert flops(lambda: stack_a @ stack_b) == flops(lambda: torch.baddbmm(totals, stack_a, stack_b)) == COUNT * product
    assert flops(lambda: totals.clone().baddbmm_(stack_a, stack_b)) == COUNT * product
    assert flops(lambda: total.clone().addbmm_(stack_a, stack_b)) == COUNT * product
    assert flops(lambda: torch.einsum("bij,bjk->ik", stack_a, stack_b)) == COUNT * product


def test_products_of_vectors():
    """Those that torch's own counter does not see."""
    assert flops(lambda: a @ row) == flops(lambda: torch.addmv(draw.normal(ROWS), a, row)) == 2 * ROWS * INNER
    assert flops(lambda: torch.zeros(ROWS).addmv_(a, row)) == 2 * ROWS * INNER
    assert (
        flops(lambda: row @ row)
        == flops(lambda: torch.vdot(row, row))
        == flops(lambda: torch.dot(row, row))
        == 2 * INNER
    )
    assert flops(lambda: torch.addr(b, row, column)) == flops(lambda: b.clone().addr_(row, column)) == 2 * INNER * COLS
    with FlopCounterMode(display=False) as torchs:
        for product_of in (lambda: row @ row, lambda: a @ row, lambda: total.clone().addmm_(a, b)):
            product_of()
    assert torchs.get_total_flops() == 0


def test_products_under_inference_mode():
    """Where composite operators arrive whole."""
    with torch.inference_mode():
        assert flops(lambda: F.linear(a, b.t())) == product
        assert flops(lambda: torch.matmul(stack_a, b)) == COUNT * product


@pytest.mark.parametrize("grouped", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_by_hand(grouped, transposed):
    """A convolution is made three times in a step, whatever its groups."""
    x, size = draw.normal(2, 8, 6, 6).requires_grad_(), (8, 12 // grouped) if transposed else (12, 8 // grouped)
    w = draw.normal(*size, 3, 3).requires_grad_()
    run = F.conv_transpose2d if transposed else F.conv2d
    positions = 6 * 6 if transposed else 4 * 4
    once = 2 * len(x) * positions * w.numel()
    assert flops(lambda: run(x, w, groups=grouped)) == once
    assert flops(lambda: torch.autograd.grad(run(x, w, groups=grouped).sum(), [x, w])) == 3 * once
    assert flops(lambda: torch.autograd.grad(run(x, w, groups=grouped).sum(), [w])) == 2 * once


def test_attention_as_its_products():
    """The fused kernel: two products forward; backward four, and the scores once more."""
    q, k, v = (draw.normal(2, 3, 8, 4).requires_grad_() for _ in range(3))
    once = 2 * 2 * 3 * 8 * 8 * 4

    def step() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), [q, k, v])

    assert flops(step) == (2 + 5) * once
    with sdpa_kernel(SDPBackend.MATH):
        assert flops(step) == (2 + 4) * once


def test_agrees_with_torchs_counter_on_a_plain_step():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    batch = (draw.normal(6, 5), draw.ids(3, 6))
    with FlopCounterMode(display=False) as torchs:
        plain_step(model_fn, params, batch)
    assert flops(lambda: plain_step(model_fn, params, batch)) == torchs.get_total_flops() == 6 * 2 * (2 * 40 + 3 * 24)


def test_entries_of_what_is_no_product():
    """The entries written, read by a reduction, or put somewhere; nothing for a view."""
    wide = draw.normal(4, 6)
    assert counted(lambda: wide.t().reshape(6, 4)[1:].unsqueeze(0).expand(3, -1, -1)).entries == 0
    assert counted(lambda: wide * 2).entries == counted(lambda: wide.sum(1)).entries == 24
    assert counted(lambda: wide.add_(1.0)).by_op() == {"add_": 24}
    assert counted(lambda: torch.zeros(100, 6).index_add_(0, torch.tensor([1, 1, 5, 7]), wide)).by_op() == {
        "zeros": 600, "index_add_": 24
    }  # fmt: skip
    assert counted(lambda: F.embedding(torch.tensor([1, 3]), wide)).entries == 12


def test_an_outer_product_hidden_in_a_broadcast():
    """Products that have more entries than their operands, however these were expanded, are told apart."""
    left, right = draw.normal(4, 9, 1), draw.normal(4, 1, 8)
    hidden = counted(lambda: (left * right).sum(2))
    assert hidden.by_op(grew=True) == {"mul": 4 * 9 * 8}
    assert hidden.largest(grew=True) == ("mul", 4 * 9 * 8, True)
    expanded = left.expand(4, 9, 8), right.expand(4, 9, 8)
    assert distinct(expanded[0]) == 36
    assert counted(lambda: expanded[0] * expanded[1]).by_op(grew=True) == {"mul": 4 * 9 * 8}
    scaled = counted(lambda: draw.normal(4, 9, 8) * left)
    assert not scaled.by_op(grew=True)
    assert scaled.total_flops == hidden.total_flops == 0


def test_what_it_does_not_know_stops_it():
    """An operator that multiplies inside: nobody is told that it is free."""
    with pytest.raises(NotImplementedError, match="_trilinear"), Counted():
        F.bilinear(a, a, draw.normal(2, INNER, INNER))


# --- custom operators -------------------------------------------------------------------------------------------------


def rows(n: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Left and right sides of a weight `[6, 10]`."""
    made = Draw(torch.float32, CPU, seed)
    return made.normal(n, positions, 6), made.normal(n, positions, 10)


EXAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "ghostfunc::tile_stream": [
        (*rows(3, 4, 1), given, *val, each, want_grad)
        for given, val, each in (
            (draw.normal(2, 6, 10), (None, None), False),
            (None, rows(2, 5, 2), False),
            (None, rows(2, 5, 2), True),
        )
        for want_grad in (False, True)
    ],
    "ghostfunc::tiles": [
        ([*uses], [*val], along, [6, 10], kinds, want_grad)
        for uses in (
            rows(3, 4, 1),
            (*rows(3, 4, 1), *rows(3, 2, 3)),
            (*rows(3, 4, 1), draw.ids(6, 3, 5), draw.normal(3, 5, 10)),
            (*rows(3, 4, 1), draw.normal(3, 6, 10), torch.empty(0)),
        )
        for val, along, kinds in (
            ((), [], ["norm"]),
            ((), [draw.normal(6, 10)], ["along", "gram"]),
            (rows(2, 5, 2), [], ["dot"]),
            (rows(2, 5, 2), [draw.normal(6, 10)], ["norm", "along", "dot each", "dot", "gram"]),
        )
        for want_grad in (False, True)
    ],
    "ghostfunc::finite": [(row, column, ["p"], [5])],
    "ghostfunc::refuse": [],  # raises
}


def test_every_custom_operator_has_examples():
    for module in pkgutil.iter_modules(gf.__path__):  # some are registered when they are first needed
        importlib.import_module(f"ghostfunc.{module.name}")
    assert set(custom_operators()) == set(EXAMPLES)


@pytest.mark.parametrize(("name", "given"), [(name, given) for name in EXAMPLES for given in EXAMPLES[name]])
def test_a_custom_operators_formula_counts_its_body(name, given):
    namespace, _, short = name.partition("::")
    operator = getattr(getattr(torch.ops, namespace), short)
    by_formula = counted(lambda: operator(*given))
    by_body = counted(lambda: operator(*given), bodies=True)
    assert by_formula.total_flops == by_body.total_flops == flops(lambda: body_of(name)(*given))
    assert (by_formula.total_flops > 0) == (short in ("tile_stream", "tiles"))
    assert by_body.entries > 0
