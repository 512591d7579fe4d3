"""K-FAC and EK-FAC against explicit constructions in float64: from the oracle's per-sample gradients, and from rows."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Built, Case, Draw
from counting import flops
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_dots, per_sample_grads
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZooCase, in_double
from zoo_language import LANGUAGE
from zoo_others import OTHERS

import ghostfunc as gf
from ghostfunc._fisher import FisherPreconditioner
from ghostfunc._kfac import ekfac, kfac
from ghostfunc._moments import nearest_kronecker

CPU, DOUBLE = torch.device("cpu"), torch.float64
Params = dict[str, Tensor]


def gradients(built: Built, batches: list[Any]) -> Params:
    """`{name: [N, numel]}` of all batches, by the oracle."""
    found = [per_sample_grads(built.model_fn, built.params, batch) for batch in batches]
    return {name: torch.cat([g[name].reshape(len(g[name]), -1) for g in found]) for name in built.params}


def fisher_of(preconditioner: FisherPreconditioner, name: str) -> Tensor:
    """The block that a preconditioner is the damped inverse of, `[numel, numel]`, through its call alone."""
    shape = preconditioner.shapes[name]
    eye = torch.eye(math.prod(shape), dtype=DOUBLE)
    columns = [preconditioner({name: unit.view(shape)})[name].flatten() for unit in eye]
    return torch.linalg.inv(torch.stack(columns, 1)) - preconditioner.blocks[name][0].damping * eye


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def linear_model(dtype: torch.dtype = DOUBLE) -> tuple[Callable, Params, list[tuple[Tensor, Tensor]]]:
    """A linear layer with its bias and a quadratic loss, and three batches of unequal size."""
    draw = Draw(dtype, CPU)
    params = draw.params(w=(3, 4), b=(3,))
    batches = [(draw.normal(n, 4), draw.normal(n, 3)) for n in (6, 3, 11)]
    return lambda p, batch: (F.linear(batch[0], p["w"], p["b"]) - batch[1]).pow(4).sum(1), params, batches


@cache
def explicit(name: str) -> tuple[Built, list[Any], Params, FisherPreconditioner, FisherPreconditioner]:
    """A case, three batches, the oracle's gradients, and both preconditioners."""
    built = BY_NAME[name].make(DOUBLE, CPU)
    batches = [built.batch(n, seed) for seed, n in enumerate((3, 4, 2))]
    made = (make(built.model_fn, built.params, batches) for make in (kfac, ekfac))
    return built, batches, gradients(built, batches), *made


# --- the matrices -----------------------------------------------------------------------------------------------------


def test_a_linear_layer_is_solved_as_the_dense_kronecker_product() -> None:
    model_fn, params, batches = linear_model()
    x = torch.cat([batch[0] for batch in batches])
    g = torch.cat([per_sample_grads(model_fn, params, batch)["b"] for batch in batches])
    kron = torch.kron(g.T @ g / len(g), x.T @ x / len(x))  # of vec(V) row by row
    v = {"w": torch.randn(3, 4, dtype=DOUBLE), "b": torch.randn(3, dtype=DOUBLE)}
    for relative, scale in ((True, kron.trace() / 12), (False, 1.0)):
        solved = kfac(model_fn, params, batches, damping=0.03, relative=relative)(v)
        expected = torch.linalg.solve(kron + 0.03 * scale * torch.eye(12, dtype=DOUBLE), v["w"].flatten())
        assert_close(solved["w"].flatten(), expected)
        full = g.T @ g / len(g)
        scale = full.trace() / 3 if relative else 1.0
        assert_close(solved["b"], torch.linalg.solve(full + 0.03 * scale * torch.eye(3, dtype=DOUBLE), v["b"]))


def test_kfac_is_the_fisher_matrix_where_activations_and_cotangents_are_independent() -> None:
    draw = Draw(DOUBLE, CPU)
    a, c = draw.normal(5, 4), draw.normal(7, 3)
    batch = (a.repeat_interleave(7, 0), c.repeat(5, 1))  # every activation with every cotangent

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (F.linear(batch[0], p["w"]) * batch[1]).sum(1)

    params = draw.params(w=(3, 4))
    g = per_sample_grads(model_fn, params, batch)["w"].flatten(1)
    for make in (kfac, ekfac):
        assert_close(fisher_of(make(model_fn, params, [batch]), "w"), g.T @ g / len(g))


def test_positions_are_samples_of_a_kronecker_product_and_those_without_gradient_are_none() -> None:
    draw = Draw(DOUBLE, CPU)
    x, y = draw.normal(6, 5, 4), draw.normal(6, 5, 3)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 5, 1, 4])[:, None]  # [6, 5]

    def model_fn(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, mask = batch
        return ((x @ p["w"] - y).pow(2).sum(2) * mask).sum(1) / mask.sum(1)

    params = draw.params(w=(4, 3))
    g = 2 * (x @ params["w"] - y) / mask.sum(1)[:, None, None]
    a, g = x[mask], g[mask]  # [20, 4], [20, 3]
    expected = torch.kron(a.T @ a, g.T @ g) / (6 * 20)
    assert_close(fisher_of(kfac(model_fn, params, [(x, y, mask)]), "w"), expected)
    longer = [F.pad(t, (0, 0, 0, 3), value=7.0) for t in (x, y)]
    padded = (*longer, F.pad(mask, (0, 3)))
    assert_close(fisher_of(kfac(model_fn, params, [padded]), "w"), expected)


def test_a_convolution_is_a_linear_map_of_its_windows() -> None:
    draw = Draw(DOUBLE, CPU)
    x, y = draw.normal(5, 2, 6, 6), draw.normal(5, 3, 3, 3)

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (F.conv2d(batch[0], p["w"], stride=2, padding=1) - batch[1]).pow(4).sum((1, 2, 3))

    params = draw.params(w=(3, 2, 3, 3))
    out = F.conv2d(x, params["w"], stride=2, padding=1).requires_grad_()
    g = torch.autograd.grad((out - y).pow(4).sum(), out)[0].flatten(2).mT.reshape(-1, 3)  # [5 * 9, 3]
    a = F.unfold(x, 3, stride=2, padding=1).mT.reshape(-1, 18)
    expected = torch.kron(g.T @ g, a.T @ a) / (5 * 45)
    assert_close(fisher_of(kfac(model_fn, params, [(x, y)]), "w"), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ekfac_has_the_second_moments_of_per_sample_gradients_in_kfacs_basis(case: Case) -> None:
    *_, grads, k, e = explicit(case.name)
    assert_exact(grads, e)
    for name, g in grads.items():
        mean = g.square().mean()
        for block, of_kfac in zip(e.blocks[name], k.blocks[name], strict=True):
            assert abs(block.damping - 0.1 * mean) <= 1e-10 * mean, name
            for side in (block.left, block.right):
                assert side is None or torch.allclose(side.T @ side, torch.eye(len(side), dtype=DOUBLE), atol=1e-12)
            for side, other in ((block.left, of_kfac.left), (block.right, of_kfac.right)):
                assert side is other is None or torch.equal(side, other), name


def assert_exact(grads: Params, e: FisherPreconditioner) -> None:
    """The eigenvalues are the second moments of the oracle's gradients along the eigenvectors; blocks cover all."""
    rounding = 1e-14 * max(g.abs().max() for g in grads.values())  # what is left of a gradient that is zero
    for name, g in grads.items():
        covered = torch.zeros(g.shape[1])
        for block in e.blocks[name]:
            p, q = block.values.shape
            entries = torch.arange(p * q) if block.entries is None else block.entries
            covered[entries] += 1
            left = torch.eye(p, dtype=DOUBLE) if block.left is None else block.left
            right = torch.eye(q, dtype=DOUBLE) if block.right is None else block.right
            expected = (left.T @ g[:, entries].view(-1, p, q) @ right).square().mean(0)
            assert (block.values - expected).norm() <= 1e-10 * expected.norm() + rounding**2, name
        assert (covered == 1).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LANGUAGE, *OTHERS], ids=lambda case: case.name)
def test_ekfac_is_exact_for_every_model(case: ZooCase) -> None:
    built = in_double(case, CPU)
    batches = [built.batch(3, 0), built.batch(2, 1)]
    grads = gradients(built, batches)
    assert_exact(grads, ekfac(built.model_fn, built.params, batches))


def test_uses_without_a_rule_have_the_full_matrix() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return 2 * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    def model_fn(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, Double.apply(p["w"])).pow(2).sum(1)

    draw = Draw(DOUBLE, CPU)
    params, x = draw.params(w=(2, 3)), draw.normal(5, 3)
    with pytest.raises(gf.UnsupportedUse, match="w"):
        ekfac(model_fn, params, [x])
    e = ekfac(model_fn, params, [x], on_unsupported="dense")
    assert e.how["w"] == "full Fisher 6 x 6"
    assert_exact(gradients(Built(model_fn, params, lambda n, seed: None), [x]), e)


@pytest.mark.parametrize("name", ["mlp", "convolution", "gpt2 tied", "derived", "heads", "weight twice", "recurrent"])
def test_ekfac_is_nearer_to_the_fisher_matrix_than_kfac(name: str) -> None:
    _, _, grads, k, e = explicit(name)
    nearer = 0
    for parameter, g in grads.items():
        true = g.T @ g / len(g)
        far, near = ((fisher_of(made, parameter) - true).norm() / true.norm() for made in (k, e))
        assert near <= far + 1e-12, parameter
        nearer += bool(near < 0.99 * far)
        assert torch.allclose(fisher_of(e, parameter).trace(), true.trace())
        if "full" in e.how[parameter]:
            assert far < 1e-10, parameter
    assert nearer


def test_a_tied_weight_has_the_kronecker_product_nearest_to_the_sum_of_its_uses() -> None:
    built, batches, _, k, _ = explicit("tied by hand")
    params = built.params
    left, right = [torch.zeros(11, 11, dtype=DOUBLE) for _ in range(2)], [torch.zeros(4, 4, dtype=DOUBLE)] * 2
    counts = [0, 0]
    for batch in batches:
        ids, labels = batch
        table, head = (params["emb"].clone().requires_grad_() for _ in range(2))
        embedded = F.embedding(ids, table)
        h = embedded + params["pos"][: ids.shape[1]]
        h = h + (h @ params["mix"]).tanh().cumsum(1)
        logits = h @ head.t()
        g_embedded, g_logits = torch.autograd.grad(gf.causal_lm_loss(logits, (ids, labels)).sum(), (embedded, logits))
        live = g_embedded.abs().sum(2) > 0
        one_hot = F.one_hot(ids, 11).double()[live]
        left[0] = left[0] + one_hot.T @ one_hot
        right[0] = right[0] + g_embedded[live].T @ g_embedded[live]
        counts[0] += int(live.sum())
        live = g_logits.abs().sum(2) > 0
        left[1] = left[1] + g_logits[live].T @ g_logits[live]
        right[1] = right[1] + h[live].T @ h[live]
        counts[1] += int(live.sum())
    terms = [torch.outer(a.flatten(), b.flatten()) / (9 * n) for a, b, n in zip(left, right, counts, strict=True)]
    u, s, vt = torch.linalg.svd(terms[0] + terms[1])  # the rearrangement of the sum, [121, 16]
    expected = torch.kron(u[:, 0].view(11, 11), vt[0].view(4, 4)) * s[0]
    assert "nearest to the sum over look-up, linear map" in k.how["emb"]
    assert_close(fisher_of(k, "emb"), expected, 1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_the_nearest_kronecker_product_is_the_first_term_of_the_svd(
    terms: int, p: int, q: int, seed: int, diagonal: bool
) -> None:
    draw = Draw(DOUBLE, CPU, seed)
    roots = [(draw.normal(p, p), draw.normal(q, q)) for _ in range(terms)]
    lefts = [a @ a.T * 10 ** float(draw.normal(1)) for a, _ in roots]
    rights = [b @ b.T for _, b in roots]
    if diagonal:
        lefts[0] = lefts[0].diagonal()
    left, right = nearest_kronecker(lefts, rights)
    full = [torch.diag(side) if side.dim() == 1 else side for side in (*lefts, left)]
    z = sum(torch.outer(a.flatten(), b.flatten()) for a, b in zip(full, rights, strict=False))
    assert isinstance(z, Tensor)
    error = (z - torch.outer(full[-1].flatten(), right.flatten())).norm()
    least = torch.linalg.svdvals(z)[1:].norm()
    assert error <= least + 1e-9 * z.norm()
    for side in (full[-1], right):
        assert torch.linalg.eigvalsh(side).min() >= -1e-12 * side.norm()


def test_the_nearest_kronecker_product_of_small_numbers() -> None:
    draw = Draw(torch.float32, CPU)
    lefts, rights = ([a @ a.T for a in (draw.normal(3, 3), draw.normal(3, 3))] for _ in range(2))
    expected = torch.kron(*nearest_kronecker(lefts, rights))
    for size in (1e-20, 1e15):
        small = nearest_kronecker(lefts, [size * right for right in rights])
        assert_close(torch.kron(*small) / size, expected, 1e-5)
    none = nearest_kronecker([0 * left for left in lefts], rights)
    assert not torch.kron(*none).any()
    one = nearest_kronecker([lefts[0], 0 * lefts[1]], rights)
    assert_close(torch.kron(*one), torch.kron(lefts[0], rights[0]), 1e-5)


# --- the preconditioner -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["mlp", "mlp frozen", "gpt2 tied", "derived", "unused", "padding_idx", "heads"]),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(-3, 3),
)
def test_linear_symmetric_and_positive(name: str, corrected: bool, seed: int, scale: float) -> None:
    built, *_, k, e = explicit(name)
    apply = e if corrected else k
    draw = Draw(DOUBLE, CPU, seed)
    u, v = ({n: draw.normal(*p.shape) for n, p in built.params.items()} for _ in range(2))
    pu, pv = apply(u), apply(v)
    mixed = apply({n: u[n] + scale * v[n] for n in u})
    for n in built.params:
        size = pu[n].norm() + abs(scale) * pv[n].norm()
        assert (mixed[n] - pu[n] - scale * pv[n]).norm() <= 1e-12 * size
        assert abs((pu[n] * v[n]).sum() - (u[n] * pv[n]).sum()) <= 1e-12 * (pu[n].norm() * v[n].norm() + 1e-300)
        assert (pv[n] * v[n]).sum() >= 0


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_dots_are_those_of_the_oracles_gradients(make: Callable) -> None:
    built, batches, *_ = explicit("gpt2 tied")
    apply = make(built.model_fn, built.params, batches)
    train, val = built.batch(4, 7), built.batch(3, 8)
    of_train = per_sample_grads(built.model_fn, built.params, train)
    mean = {n: g.mean(0) for n, g in per_sample_grads(built.model_fn, built.params, val).items()}
    direction = apply(mean)
    value = sum((of_train[n] * direction[n]).flatten(1).sum(1) for n in mean)
    scale = torch.stack([of_train[n].flatten(1).norm(dim=1) * direction[n].norm() for n in mean]).sum(0)
    assert isinstance(value, Tensor)
    dots = gf.ghost_grad_dot(built.model_fn, built.params, train, val, precondition=apply)
    assert_dots(dots, (value, scale), 1e-9, "preconditioned dots")


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_batches_of_any_sizes_give_what_one_batch_gives(make: Callable) -> None:
    model_fn, params, batches = linear_model()
    whole = tuple(torch.cat([batch[k] for batch in batches]) for k in range(2))
    loader = DataLoader(TensorDataset(*whole), batch_size=7, shuffle=True)
    one = make(model_fn, params, [whole])
    for other in (make(model_fn, params, batches), make(model_fn, params, loader)):
        assert other.samples == one.samples == 20
        for name, solved in one(params).items():
            assert_close(other(params)[name], solved, 1e-10)


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_much_damping_is_a_multiple_of_the_identity(make: Callable) -> None:
    built, batches, grads, *made = explicit("gpt2 tied")
    absolute = make(built.model_fn, built.params, batches, damping=1e12, relative=False)(built.params)
    relative = make(built.model_fn, built.params, batches, damping=1e12)
    for name, solved in relative(built.params).items():
        assert_close(1e12 * absolute[name], built.params[name], 1e-9)
        assert_close(solved * relative.blocks[name][0].damping, built.params[name], 1e-9)
        trace = fisher_of(made[make is ekfac], name).trace() / len(grads[name][0])
        assert relative.blocks[name][0].damping == pytest.approx(1e12 * float(trace), rel=1e-6)


def test_little_damping_is_the_inverse() -> None:
    model_fn, params, batches = linear_model()
    g = torch.cat([per_sample_grads(model_fn, params, batch)["b"] for batch in batches])
    solved = kfac(model_fn, params, batches, damping=1e-13)(params)["b"]
    assert_close(solved, torch.linalg.solve(g.T @ g / len(g), params["b"]), 1e-8)


def experts(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Two reused layers of four experts, each row by the expert that it chose."""
    x, y, chosen = batch  # [B, T, 4], [B, T, 4], [B, T]
    for _ in range(2):
        h = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            sample, position = (chosen == number).nonzero(as_tuple=True)
            h = h.index_put((sample, position), F.linear(x[sample, position], p["experts"][number]).tanh())
        x = x + h * p["gate"]
    return (x - y).pow(2).mean((1, 2))


def test_experts_have_a_block_each_also_those_of_later_batches_and_of_none() -> None:
    draw = Draw(DOUBLE, CPU)
    params = draw.params(experts=(4, 4, 4), gate=(4,))
    batches = []
    for n, among in ((3, [0, 1]), (4, [1, 3])):
        chosen = torch.tensor(among)[draw.ids(2, n, 5)]
        batches.append((draw.normal(n, 5, 4), draw.normal(n, 5, 4), chosen))
    e = ekfac(experts, params, batches)
    g = gradients(Built(experts, params, lambda n, seed: None), batches)["experts"].view(7, 4, 16)
    parts, rest = e.blocks["experts"][:-1], e.blocks["experts"][-1]
    assert [int(block.entries[0]) // 16 for block in parts if block.entries is not None] == [0, 1, 3]
    assert rest.entries is not None and rest.entries.tolist() == list(range(32, 48)) and not rest.values.any()
    assert "3 parts, each Kronecker 4 x 4; 16 entries unused" in e.how["experts"]
    for number, block in zip((0, 1, 3), parts, strict=True):
        assert block.left is not None and block.right is not None
        expected = (block.left.T @ g[:, number].view(7, 4, 4) @ block.right).square().mean(0)
        assert_close(block.values, expected)
    v = draw.normal(4, 4, 4)
    solved = e({"experts": v})["experts"]
    assert_close(solved[2], v[2] / rest.damping)
    assert_close(solved[1], parts[1].solve(v.flatten()).view(4, 4))


def test_entries_that_several_matrices_share_have_the_full_matrix() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        overlapping = F.linear(x, p["slices"][:2]) * F.linear(x, p["slices"][1:])
        return (overlapping + F.linear(x, p["rows"][[0, 0]])).pow(2).sum(1)

    draw = Draw(DOUBLE, CPU)
    params, x = draw.params(slices=(3, 4), rows=(2, 4)), draw.normal(5, 4)
    e = ekfac(model_fn, params, [x])
    assert e.how == {"slices": "full Fisher 12 x 12", "rows": "full Fisher 8 x 8"}
    grads = gradients(Built(model_fn, params, lambda n, seed: None), [x])
    assert_exact(grads, e)
    for name, g in grads.items():
        assert_close(fisher_of(e, name), g.T @ g / 5)


def test_frozen_unused_and_left_out_parameters_are_said() -> None:
    built, batches, *_, e = explicit("mlp frozen")
    assert list(e.how) == list(built.params) == ["1.weight", "2.bias", "4.weight"]
    built, batches, *_, e = explicit("unused")
    assert e.how["never"] == e.how["detached"] == "unused, its Fisher matrix is zero"
    assert not e(built.params)["never"].any()
    absolute = kfac(built.model_fn, built.params, batches, damping=0.5, relative=False)
    assert torch.equal(absolute(built.params)["never"], built.params["never"] / 0.5)
    some = kfac(built.model_fn, built.params, batches, layers="w")
    assert list(some(built.params)) == ["w"] and some.left_out == ("never", "detached", "half")
    assert "left out by layers, not in the result: never, detached, half" in repr(some)
    train, val = built.batch(3, 4), built.batch(2, 5)
    with pytest.raises(ValueError, match="no entry for detached, half, never"):
        gf.ghost_grad_dot(built.model_fn, built.params, train, val, precondition=some)
    assert gf.ghost_grad_dot(built.model_fn, built.params, train, val, precondition=some, layers="w").shape == (3,)


def test_every_parameter_is_in_the_repr() -> None:
    for name in ("gpt2 tied", "derived", "embeddings"):
        built, *_, e = explicit(name)
        for parameter, how in e.how.items():
            (line,) = [line for line in repr(e).splitlines() if parameter in line.partition(": ")[2].split(", ")]
            assert line.strip().startswith(how)
        assert set(e.how) == set(built.params)


def test_long_sides_are_diagonal() -> None:
    built, batches, grads, *_ = explicit("gpt2 tied")
    e = ekfac(built.model_fn, built.params, batches, max_side=10)
    assert e.how["transformer.wte.weight"].startswith("Kronecker 19 x 8; diagonal on the side of 19; nearest")
    assert e.how["transformer.wpe.weight"] == "diagonal Fisher of 64 entries"
    assert e.how["transformer.h.0.ln_1.bias"] == "full Fisher 8 x 8"
    for name, g in grads.items():
        (block,) = e.blocks[name]
        p, q = block.values.shape
        assert (block.left is None, block.right is None) == (p > 10, q > 10 or (q == 1 and block.right is None)), name
        left = torch.eye(p, dtype=DOUBLE) if block.left is None else block.left
        right = torch.eye(q, dtype=DOUBLE) if block.right is None else block.right
        assert_close(block.values, (left.T @ g.view(-1, p, q) @ right).square().mean(0))
    diagonal = kfac(built.model_fn, built.params, batches, max_side=10).blocks["transformer.wpe.weight"][0]
    assert_close(diagonal.values.flatten(), grads["transformer.wpe.weight"].square().mean(0))


def test_labels_sampled_in_the_loss_give_the_true_fisher_matrix() -> None:
    draw = Draw(DOUBLE, CPU)
    x, params = draw.normal(4, 3), draw.params(w=(3, 3))

    def sampled(p: Params, x: Tensor) -> Tensor:
        logits = F.linear(x, p["w"])
        labels = (logits.detach() - torch.empty_like(logits).exponential_().log()).argmax(-1)
        return F.cross_entropy(logits, labels, reduction="none")

    e = ekfac(sampled, params, [x.repeat(250, 1)] * 8)
    p = F.linear(x, params["w"]).softmax(1)
    true = sum(torch.kron(torch.diag(p[i]) - torch.outer(p[i], p[i]), torch.outer(x[i], x[i])) for i in range(4)) / 4
    left, right = e.blocks["w"][0].left, e.blocks["w"][0].right
    assert left is not None and right is not None and isinstance(true, Tensor)
    basis = torch.kron(left, right)
    expected = (basis.T @ true @ basis).diagonal().view(3, 3)
    assert (e.blocks["w"][0].values - expected).norm() < 0.1 * expected.norm()  # 8000 draws
    labels_of_no_use = kfac(
        lambda p, x: F.cross_entropy(F.linear(x, p["w"]), x.argmax(1), reduction="none"), params, [x]
    )
    assert (fisher_of(labels_of_no_use, "w") - true).norm() > 0.3 * true.norm()


def test_other_dtypes_and_devices(device: torch.device) -> None:
    model_fn, params, batches = linear_model(torch.float32)
    on_device = {name: p.to(device) for name, p in params.items()}
    made = ekfac(model_fn, on_device, batches)  # the loader's batches come from the CPU
    assert made.blocks["w"][0].values.device.type == device.type
    exact = ekfac(model_fn, params, batches, dtype=DOUBLE)(params)["w"].to(DOUBLE)
    for direction, dtype in ((on_device["w"], torch.float32), (params["w"].double(), DOUBLE)):
        solved = made({"w": direction})["w"]
        assert solved.dtype == dtype and solved.device == direction.device
        assert_close(solved.double().cpu(), exact, 1e-4)
    half = made({"w": on_device["w"].bfloat16()})["w"]
    assert half.dtype == torch.float32
    assert_close(half.double().cpu(), exact, 3e-2)


def test_dropout_is_off() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    batches = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (5, 3)]
    solved = []
    for mode in (True, False):
        model_fn, params = gf.functionalize(module.train(mode), gf.classification_loss)
        solved.append(ekfac(model_fn, params, batches)(params))
        assert module[1].training == mode
    for name in params:
        assert torch.equal(solved[0][name], solved[1][name])


def test_autocast_and_gradients_around_the_call_are_left_out() -> None:
    model_fn, params, batches = linear_model(torch.float32)
    expected = kfac(model_fn, params, batches)(params)["w"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = kfac(lambda p, b: model_fn(p, b).float(), params, batches)
        assert all(block.values.dtype == torch.float32 for blocks in made.blocks.values() for block in blocks)
        assert_close(made(params)["w"], expected, 0.05)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    made = kfac(model_fn, leaves, batches)
    assert not made.blocks["w"][0].values.requires_grad
    assert torch.equal(made(params)["w"], expected)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2 tied", "derived", "heads", "unused"])
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    built, *_, e = explicit(name)
    e.save(tmp_path / "here")
    again = FisherPreconditioner.load(tmp_path / "here")
    assert repr(again) == repr(e) and again.how == e.how and again.samples == 9
    for parameter, solved in e(built.params).items():
        assert_close(again(built.params)[parameter] + 1, solved + 1, 1e-14)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "preconditioner.json",
        "preconditioner.safetensors",
    ]


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("file", ["preconditioner.json", "preconditioner.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80\x04N."])
def test_a_damaged_file_is_named(file: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    explicit("mlp")[-1].save(tmp_path)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{file} is damaged .*save it"):
        FisherPreconditioner.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        FisherPreconditioner.load(tmp_path)


def test_one_bit_and_another_format_are_noticed(tmp_path: Path) -> None:
    explicit("mlp")[-1].save(tmp_path)
    data = tmp_path / "preconditioner.safetensors"
    whole = data.read_bytes()
    data.write_bytes(flipped(whole))
    with pytest.raises(ValueError, match=r"preconditioner\.safetensors is damaged"):
        FisherPreconditioner.load(tmp_path)
    data.write_bytes(whole)
    plan = tmp_path / "preconditioner.json"
    stored = json.loads(plan.read_text())
    for change, match in (
        ({"format": 9}, "has format 9"),
        ({"plan": stored["plan"] | {"parameters": stored["plan"]["parameters"][::-1]}}, "was changed after"),
        ({"plan": stored["plan"] | {"damping": 1.0}}, "was changed after"),
    ):
        plan.write_text(json.dumps(stored | change))
        with pytest.raises(ValueError, match=rf"preconditioner\.json .*{match}"):
            FisherPreconditioner.load(tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_arguments_that_cannot_be(make: Callable) -> None:
    model_fn, params, batches = linear_model()
    for damping in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a positive finite number"):
            make(model_fn, params, batches, damping=damping)
    with pytest.raises(ValueError, match="max_side=0"):
        make(model_fn, params, batches, max_side=0)
    with pytest.raises(ValueError, match="batches is empty"):
        make(model_fn, params, [])
    with pytest.raises(TypeError, match="batches is one batch, a dict"):
        make(model_fn, params, {"x": batches[0][0]})
    for layers in ("head", lambda name: name == "head"):
        with pytest.raises(ValueError, match="no parameter matches"):
            make(model_fn, params, batches, layers=layers)
    with pytest.raises(ValueError, match=r"direction\['w'\] has shape \(4, 3\)"):
        make(model_fn, params, batches)({"w": params["w"].T})
    with pytest.raises(ValueError, match="v are not parameters of this preconditioner"):
        make(model_fn, params, batches)({"v": params["w"]})


def test_an_iterator_serves_one_pass() -> None:
    model_fn, params, batches = linear_model()
    assert kfac(model_fn, params, iter(batches)).samples == 20
    with pytest.raises(TypeError, match="ekfac needs two"):
        ekfac(model_fn, params, iter(batches))

    class Once(list):
        def __iter__(self) -> Any:
            found = self[:]
            self.clear()
            return iter(found)

    with pytest.raises(ValueError, match="the second pass gave no batch"):
        ekfac(model_fn, params, Once(batches))


def test_what_is_not_finite_is_named() -> None:
    model_fn, params, batches = linear_model()
    batches[1][0][2] = torch.nan
    with pytest.raises(ValueError, match=r"batches\[1\] batch: the losses of samples \[2\] are not finite"):
        kfac(model_fn, params, batches)
    params = {"w": torch.zeros(3, 4, dtype=DOUBLE), "fine": torch.ones(3, dtype=DOUBLE)}

    def root(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).pow(2).sum(1).sqrt() + (p["fine"] * x[:, :3]).sum(1)

    with pytest.raises(ValueError, match=r"^w \(3, 4\): the second moments .* are not finite, though the losses are"):
        kfac(root, params, [batches[0][0]])
    assert torch.is_grad_enabled()


def test_uses_that_change_their_kind_are_refused() -> None:
    def model_fn(p: Params, batch: Tensor) -> Tensor:
        w = p["w"] if batch.shape[1] == 3 else p["w"].exp()
        return F.linear(batch, w).pow(2).flatten(1).sum(1)

    draw = Draw(DOUBLE, CPU)
    params = draw.params(w=(2, 4))
    two, three = draw.normal(3, 2, 4), draw.normal(3, 3, 4)
    with pytest.raises(gf.UnsupportedUse, match=r"w \(2, 4\): this batch uses it \(linear\) in another way"):
        kfac(model_fn, params, [three, two])
    g = gradients(Built(model_fn, params, lambda n, seed: None), [two, three])["w"]
    assert_close(fisher_of(kfac(model_fn, params, [two, three]), "w"), g.T @ g / 6)  # gradients as they are add up


# --- cost -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size in bytes of the largest result of an operation."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_per_sample_gradients_are_never_there_at_once(tied: bool) -> None:
    n, positions, width = 48, 2, 512

    def model_fn(p: Params, ids: Tensor) -> Tensor:
        h = F.embedding(ids, p["w"] if tied else p["w"].detach())
        return F.linear(h, p["w"]).pow(2).mean((1, 2))

    params = {"w": torch.randn(width, width) / width}
    with Largest() as largest:
        ekfac(model_fn, params, [torch.randint(width, (n, positions))])
    assert 8 << 20 < largest.bytes <= 16 << 20 < n * width * width * 4


def test_flops_beside_a_training_step() -> None:
    n, positions, d_in, d_out = 8, 16, 48, 32
    layers = [nn.Linear(d_in, d_out, bias=False), nn.Tanh(), nn.Linear(d_out, d_in, bias=False)]
    model_fn, params = gf.functionalize(nn.Sequential(*layers), lambda y, b: (y - b[1]).pow(2).flatten(1).mean(1))
    batch = (torch.randn(n, positions, d_in), torch.randn(n, positions, d_in))
    product = 2 * n * positions * d_in * d_out  # of one layer
    moments = 2 * n * positions * (d_in**2 + d_out**2)
    first = flops(lambda: kfac(model_fn, params, [batch]), apart=("_linalg_eigh",))
    assert first == 2 * product + product + 2 * moments  # two forwards, one gradient of an input
    both = flops(lambda: ekfac(model_fn, params, [batch]), apart=("_linalg_eigh",))
    assert both == 2 * first + 2 * product  # rotations cost what moments do; then the gradients of the samples
    made = ekfac(model_fn, params, [batch])
    assert flops(lambda: made(params)) == 2 * 2 * 2 * (d_in * d_out) * (d_in + d_out)
