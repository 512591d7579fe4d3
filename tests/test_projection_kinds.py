"""Every kind of projection: a real module's parameters against the oracle, and inner products' mean and variance."""

import json
import math
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Draw, Params, functionalized
from oracle import per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._projected_layers import INCLUDE
from ghostfunc._sketches import KINDS

CPU = torch.device("cpu")
EVERY_KIND = [*KINDS, "pca"]
EXACT = 1e-10
STANDARD_ERRORS = 4.0

VOCABULARY, WIDTH, POSITIONS, EXPERTS = 13, 12, 5, 3


class Mixture(nn.Module):
    """A small language model: a tied head, convolutions in groups, norms, and experts stored in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 2, groups=WIDTH, padding=1)
        self.grouped = nn.Conv1d(WIDTH, 2 * WIDTH, 3, groups=3, padding=1)
        self.back = nn.ConvTranspose1d(2 * WIDTH, WIDTH, 1, groups=2, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH))  # [out, in], as F.linear takes it
        self.down = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH))  # [in, out]
        self.modules_of_experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.last_norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, T] -> [B, T, VOCABULARY]`."""
        h = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]).expand_as(input_ids))
        lines = self.depthwise(h.mT)[..., :-1].tanh()
        h = h + self.back(self.grouped(lines).tanh()).mT
        flat = self.norm(h).flatten(0, 1)
        scores = self.router(flat).softmax(-1)
        best = scores.argmax(-1)
        out = torch.zeros_like(flat)
        for expert in range(EXPERTS):
            rows = (best == expert).nonzero().squeeze(-1)
            hidden = F.linear(flat[rows], self.up[expert]).tanh() @ self.down[expert]
            hidden = hidden + self.modules_of_experts[expert](flat[rows]).tanh()
            out = out.index_add(0, rows, hidden * scores[rows, expert, None])
        return self.head(self.last_norm(h + out.view_as(h)))


Blocks = Callable[[Tensor], Tensor]


def rows_in(g: Tensor) -> Tensor:
    """`[B, d_in, d_out]`, or a stack of these."""
    return g.unsqueeze(1) if g.dim() == 3 else g


def rows_out(g: Tensor) -> Tensor:
    """`[B, d_out, d_in]`, or a stack of these."""
    return rows_in(g).mT


def vector(g: Tensor) -> Tensor:
    return g.reshape(len(g), 1, -1, 1)


def groups(count: int) -> Blocks:
    """`[B, C_out, C_in / groups, *size]`."""
    return lambda g: g.reshape(len(g), count, g.shape[1] // count, -1).mT


BLOCKS: dict[str, Blocks] = {
    "tokens.weight": rows_in,  # tied: as at its first use, a table
    "positions.weight": rows_in,
    "depthwise.weight": groups(WIDTH),
    "depthwise.bias": vector,
    "grouped.weight": groups(3),
    "grouped.bias": vector,
    "back.weight": lambda g: g.reshape(len(g), 2, WIDTH, -1),
    "norm.weight": vector,
    "norm.bias": vector,
    "router.weight": rows_out,
    "up": rows_out,
    "down": rows_in,
    "last_norm.weight": vector,
    **{f"modules_of_experts.{e}.weight": rows_out for e in range(EXPERTS)},
    **{f"modules_of_experts.{e}.bias": vector for e in range(EXPERTS)},
}


def mixture() -> tuple[Any, Params, dict[str, Tensor]]:
    torch.manual_seed(0)
    model_fn, params = functionalized(Mixture(), gf.causal_lm_loss, torch.float64, CPU)
    return model_fn, params, {"input_ids": Draw(torch.float64, CPU, 1).ids(VOCABULARY, 6, POSITIONS)}


def by_hand(projection: gf.KroneckerProjection, grads: Params) -> dict[str, Tensor]:
    """P_in^T G P_out of every block of every parameter, from gradients `[B, *shape]`."""
    found = {}
    for name in projection.slices:
        p_in, p_out = projection.matrices(name)
        found[name] = torch.einsum("beio,ik,ol->bekl", BLOCKS[name](grads[name]), p_in, p_out).flatten(1)
    return found


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("rank, min_rank", [(30, 3), pytest.param(100, 8, marks=pytest.mark.slow)])
def test_every_parameter_of_a_module_is_projected_as_by_hand(kind, rank, min_rank):
    """Tied, embedding, norm, convolution and expert parameters, each relative to its own norm."""
    model_fn, params, batch = mixture()
    projection = gf.kronecker_projection(
        model_fn, params, batch, include=INCLUDE, rank=rank, min_rank=min_rank, kind=kind, seed=5
    )
    assert set(projection.slices) == set(params) == set(BLOCKS)
    found = gf.ghost_grad_proj(model_fn, params, batch, projection)
    grads = per_sample_grads(model_fn, params, batch)
    for name, expected in by_hand(projection, grads).items():
        error = (found[:, projection.slices[name]] - expected).norm(dim=1)
        assert expected.norm() > 0, f"{name} has no gradient here"
        assert (error <= EXACT * expected.norm(dim=1)).all(), name


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_gradient_at_hand_and_a_direction_from_a_row(kind):
    """`project` gives the row of a gradient, and the direction of `adjoint` has the row's inner product with it."""
    model_fn, params, batch = mixture()
    projection = gf.kronecker_projection(model_fn, params, batch, include=INCLUDE, rank=30, min_rank=3, kind=kind)
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    grads = per_sample_grads(model_fn, params, batch)
    for b in range(len(rows)):
        row = projection.project({name: g[b] for name, g in grads.items()})
        assert (row - rows[b]).norm() <= EXACT * rows[b].norm()
    query = Draw(torch.float64, CPU, 2).normal(projection.dim)
    direction = projection.adjoint(query)
    dots = sum((g.flatten(1) @ direction[name].flatten()) for name, g in grads.items())
    scale = rows.norm(dim=1) * query.norm()
    assert ((dots - rows @ query).abs() <= EXACT * scale).all()


def test_principal_directions_keep_the_most():
    """The columns of "pca" are orthonormal, and hold as much of the gradients as any k directions of a side can."""
    model_fn, params, batch = mixture()
    halves = [{"input_ids": batch["input_ids"][:3]}, {"input_ids": batch["input_ids"][3:]}]
    projection = gf.kronecker_projection(
        model_fn, params, halves[0], include=INCLUDE, rank=30, min_rank=3, kind="pca", batches=halves
    )
    grads = per_sample_grads(model_fn, params, batch)
    for name in params:
        blocks = BLOCKS[name](grads[name])  # [B, blocks, d_in, d_out]
        for p, moments in zip(
            projection.matrices(name),
            (torch.einsum("beio,bejo->ij", blocks, blocks), torch.einsum("beio,beip->op", blocks, blocks)),
            strict=True,
        ):
            k = p.shape[1]
            torch.testing.assert_close(p.T @ p, torch.eye(k, dtype=p.dtype), rtol=0, atol=1e-10)
            most = torch.linalg.eigvalsh(moments)[-k:].sum()
            assert abs((p.T @ moments @ p).trace() / most - 1) < 1e-9, name


# ---------------------------------------------------------------- inner products: their mean, and their variance


def drawn(kind: str, seed: int, *sizes: tuple[int, int]) -> list[Tensor]:
    """Matrices `[d, k]` of a kind, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.ones(1, 1).double() if d == 1 else KINDS[kind](d, k, generator) for d, k in sizes]


@pytest.mark.parametrize("kind", list(KINDS))
def test_inner_products_of_real_gradients_in_expectation(kind):
    """Over draws the mean of all pairs' inner products is the gradients', within four standard errors of the mean.

    Every pair of samples is held to it, and for none of them are four standard errors more than 10% of the norms.
    """
    model_fn, params, batch = mixture()
    grads = per_sample_grads(model_fn, params, batch)
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    exact, norms = rows @ rows.T, rows.norm(dim=1)
    projection = gf.kronecker_projection(model_fn, params, batch, include=INCLUDE, rank=36, min_rank=3)
    blocks = {name: BLOCKS[name](grads[name]) for name in projection.slices}
    shapes = {name: [tuple(p.shape) for p in projection.matrices(name)] for name in projection.slices}
    draws = []
    for seed in range(120):
        matrices = iter(drawn(kind, seed, *(shape for pair in shapes.values() for shape in pair)))
        y = torch.cat([(next(matrices).mT @ g @ next(matrices)).flatten(1) for g in blocks.values()], 1)
        draws.append(y @ y.T)
    products = torch.stack(draws)  # [draws, B, B]
    standard_errors = products.std(0) / math.sqrt(len(products))
    assert ((products.mean(0) - exact).abs() <= STANDARD_ERRORS * standard_errors).all()
    assert (STANDARD_ERRORS * standard_errors <= 0.1 * norms[:, None] * norms).all()


def second_moment(kind: str, x: Tensor, y: Tensor, k: int) -> Tensor:
    """E (x^T P P^T y)^2 of one random matrix `[d, k]`."""
    d, dot, norms = len(x), x @ y, (x @ x) * (y @ y)
    if kind == "gaussian":
        return dot**2 + (dot**2 + norms) / k
    if kind in ("rademacher", "sparse"):  # the squares of an entry are no longer random
        return dot**2 + (dot**2 + norms - 2 * (x * x * y * y).sum()) / k
    if kind == "mask":  # the total of k of d numbers, drawn without replacement
        return dot**2 + d**2 * (1 - k / d) * (x * y).var() / k
    assert kind == "orthonormal"  # d / k times the projector onto a random space of dimension k
    both = k * (d - k) / (d * (d - 1) * (d + 2))
    return (d / k) ** 2 * ((k / d - both * (d + 1)) * dot**2 + both * (dot**2 + norms))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_variance_of_inner_products_is_the_one_of_theory(kind):
    """Of gradients of rank one, a b^T, it is known in closed form; it falls as the rank grows."""
    draw = Draw(torch.float64, CPU, 5)
    left, right = draw.normal(2, 24), draw.normal(2, 18)
    left[1] += left[0]
    right[1] += right[0]
    exact = (left[0] @ left[1]) * (right[0] @ right[1])
    variances = []
    for k_in, k_out in ((2, 2), (7, 5), (14, 10)):
        pairs = [drawn(kind, seed, (24, k_in), (18, k_out)) for seed in range(1000)]
        p_in, p_out = (torch.stack(side) for side in zip(*pairs, strict=True))  # [draws, d, k]
        products = (left @ p_in).prod(1).sum(1) * (right @ p_out).prod(1).sum(1)
        expected = second_moment(kind, *left, k_in) * second_moment(kind, *right, k_out) - exact**2
        squares = (products - exact) ** 2
        standard_error = squares.std() / math.sqrt(len(squares))
        assert (squares.mean() - expected).abs() <= STANDARD_ERRORS * standard_error, (k_in, k_out)
        mean_error = (products.mean() - exact).abs()
        assert mean_error <= STANDARD_ERRORS * (expected / len(products)).sqrt(), (k_in, k_out)
        variances.append(float(squares.mean()))
    assert variances[0] > 3 * variances[1] > 6 * variances[2]


@pytest.mark.parametrize("kind", ["orthonormal", "mask"])
def test_a_full_rank_loses_nothing(kind):
    """With as many columns as rows these two kinds keep every inner product; the others only its expectation."""
    model_fn, params, batch = mixture()
    grads = per_sample_grads(model_fn, params, batch)
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    largest = max(p.numel() for p in params.values())
    projection = gf.kronecker_projection(
        model_fn, params, batch, include=INCLUDE, rank=largest, min_rank=36, kind=kind, seed=1
    )
    y = gf.ghost_grad_proj(model_fn, params, batch, projection)
    assert projection.dim == sum(p.numel() for p in params.values())
    torch.testing.assert_close(y @ y.T, rows @ rows.T, rtol=1e-10, atol=0)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    return import_module("projection_fidelity")


def test_the_page_shows_what_was_measured(benchmark):
    text = benchmark.PAGE.read_text(encoding="utf-8")
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.page(text, results) == text
    assert text.count("| rank 16 |") == 1


def test_the_page_s_example_runs(benchmark):
    (example,) = re.findall(
        r"^```python\n(.*?)^```", benchmark.PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    names: dict[str, Any] = {}
    exec(example, names)
    assert list(names["rows"].shape) == [8, 256]
    assert list(names["dots"].shape) == [8, 8]


def test_the_benchmark_projects_as_the_projections_do(benchmark):
    """Its one wide product gives what `project` of each projection gives."""
    model_fn, params, batch = mixture()
    projections = [
        gf.kronecker_projection(model_fn, params, batch, include=INCLUDE, rank=rank, min_rank=2, kind=kind, seed=seed)
        for kind, rank, seed in (("gaussian", 9, 0), ("gaussian", 30, 1), ("mask", 20, 0), ("pca", 30, 0))
    ]
    gradient = {name: g[0] for name, g in per_sample_grads(model_fn, params, batch).items()}
    for projection, found in zip(projections, benchmark.Projector(projections)(gradient), strict=True):
        torch.testing.assert_close(found, projection.project(gradient), rtol=0, atol=1e-10)


def test_the_benchmark_s_agreement(benchmark):
    """Of inner products that are the same, and of ones that are in the same order and half as large."""
    rows = Draw(torch.float64, CPU, 3).normal(12, 30)
    exact = rows @ rows.T
    same = benchmark.agreement(exact, exact)
    assert same["error"] == 0
    assert same["pearson"] == pytest.approx(1)
    cosines = exact / exact.diagonal().sqrt() / exact.diagonal().sqrt()[:, None]
    pairs = torch.triu_indices(12, 12, offset=1)
    half = benchmark.agreement(exact, exact / 2)
    assert half["error"] == pytest.approx((cosines[pairs[0], pairs[1]] / 2).square().mean().sqrt().item())
    assert half["pearson"] == half["spearman"] == pytest.approx(1)
    assert benchmark.agreement(exact, -(exact**3))["spearman"] == pytest.approx(-1)
