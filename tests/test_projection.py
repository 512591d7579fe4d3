"""Projections: against explicitly projected gradients of single samples; matrices, ranks, names and arithmetic."""

import math
from collections.abc import Callable
from typing import Any

import peak_memory
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Draw, Params, functionalized, squared, tensors
from hard import HARD
from oracle import per_sample_grads
from test_flops import flops, gpt2
from test_memory import Allocations
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import ghostfunc as gf
from ghostfunc import _projection
from ghostfunc._projected_layers import INCLUDE
from ghostfunc._sketches import KINDS, ranks

CPU = torch.device("cpu")
TOLERANCE = 1e-10
ALL = {**BY_NAME, **{case.name: case for case in HARD}}


def everything(name: str) -> bool:
    return True


def assert_projected(found: Tensor, expected: Tensor) -> None:
    """Row by row, relative to the row's norm."""
    assert found.shape == expected.shape
    assert not found.requires_grad
    error, scale = (found - expected).norm(dim=1), expected.norm(dim=1)
    assert (error <= TOLERANCE * scale).all(), f"relative error {(error / scale).max():.2e}"


def explicit(projection: Any, grads: Params, as_blocks: Callable[[str, Tensor], Tensor]) -> Tensor:
    """P_in^T G P_out of gradients as blocks `[B, blocks, d_in, d_out]`, in the columns of the projection."""
    columns = torch.zeros(len(next(iter(grads.values()))), projection.dim, dtype=torch.float64)
    for name, where in projection.slices.items():
        p_in, p_out = projection.matrices(name)
        blocks = as_blocks(name, grads[name])
        columns[:, where] = torch.einsum("beio,ik,ol->bekl", blocks, p_in, p_out).flatten(1)
    return columns


# ---------------------------------------------------------------- every way to store and to use a weight


def stored_first_in(grads: Tensor) -> Tensor:
    """A weight `[d_in, d_out]`, a table, or a stack of these."""
    return grads.unsqueeze(1) if grads.dim() == 3 else grads


def stored_first_out(grads: Tensor) -> Tensor:
    """A weight `[d_out, d_in]`, a kernel `[C_out, C_in, *size]`, or a stack of weights."""
    return grads.mT if grads.dim() == 4 else grads.flatten(2).mT.unsqueeze(1)


def vector(grads: Tensor) -> Tensor:
    return grads.reshape(len(grads), 1, -1, 1)


def kernel(grads: Tensor) -> Tensor:
    return grads.flatten(2).mT.unsqueeze(1)


def groups_of(count: int, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
    def blocks(grads: Tensor) -> Tensor:
        split = grads.reshape(len(grads), count, grads.shape[1] // count, -1)
        return split if transposed else split.mT

    return blocks


AsBlocks = Callable[[Tensor], Tensor]


def weights(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """Weights in every orientation, tied ones, and tables."""
    ids, x = batch["ids"], batch["x"]  # [B, 3], [B, 3, 4]
    h = F.embedding(ids, p["tied"]) + p["positions"][: ids.shape[1]] + x
    h = F.linear(h, p["linear"], p["bias"]).tanh()  # [B, 3, 5]
    h = torch.addmm(p["shift"], h.reshape(-1, 5), p["conv1d"]).view(*ids.shape, 6).tanh()
    h = h @ p["at"]
    h = F.linear(h, p["head_first"]).tanh() + F.embedding(ids, p["head_first"]).sum(-1, keepdim=True)  # [B, 3, 7]
    h = torch.einsum("bti,hoi->btho", h, p["heads"]).flatten(2).tanh()  # [B, 3, 4]
    h = F.layer_norm(h, (4,), p["scale"], p["offset"]) * p["number"]
    return (h @ p["tied"].T).logsumexp(-1).mean(1)


WEIGHTS: dict[str, tuple[tuple[int, ...], AsBlocks]] = {
    "tied": ((7, 4), stored_first_in),  # at its first use a table: the ids meet its rows
    "positions": ((6, 4), stored_first_in),
    "linear": ((5, 4), stored_first_out),
    "bias": ((5,), vector),
    "conv1d": ((5, 6), stored_first_in),
    "shift": ((6,), vector),
    "at": ((6, 6), stored_first_in),
    "head_first": ((7, 6), stored_first_out),  # at its first use a linear map
    "heads": ((2, 2, 7), lambda g: g.flatten(1, 2).mT.unsqueeze(1)),
    "scale": ((4,), vector),
    "offset": ((4,), vector),
    "number": ((), vector),
}


def images(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """Convolutions: plain, in groups, depthwise, transposed, transposed in groups, of lines."""
    h = F.conv2d(batch["x"], p["plain"], p["bias"], padding=1).tanh()  # [B, 4, 5, 5]
    h = F.conv2d(h, p["grouped"], groups=2).tanh()  # [B, 6, 4, 4]
    h = F.conv2d(h, p["depthwise"], groups=6).tanh()
    h = F.conv_transpose2d(h, p["turned"]).tanh()  # [B, 4, 4, 4]
    h = F.conv_transpose2d(h, p["turned in groups"], groups=2).tanh()
    h = F.conv1d(h.flatten(2), p["line"], stride=2)
    return h.pow(2).flatten(1).mean(1)


IMAGES: dict[str, tuple[tuple[int, ...], AsBlocks]] = {
    "plain": ((4, 2, 3, 3), kernel),
    "bias": ((4,), vector),
    "grouped": ((6, 2, 2, 2), groups_of(2)),
    "depthwise": ((6, 1, 2, 2), groups_of(6)),
    "turned": ((6, 4, 2, 2), lambda g: g.flatten(2).unsqueeze(1)),
    "turned in groups": ((4, 3, 2, 2), groups_of(2, transposed=True)),
    "line": ((3, 6, 3), kernel),
}


def experts(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """Each position goes to one of three experts, whose weights are stacked in two ways; all meet a third stack."""
    x = batch["x"]  # [B, 3, 4]
    tokens = x.flatten(0, 1)
    best = F.linear(tokens, p["router"]).argmax(-1)
    out = torch.zeros_like(tokens)
    for expert in range(3):
        rows = (best == expert).nonzero().squeeze(-1)
        hidden = F.linear(tokens[rows], p["up"][expert]).tanh()
        out = out.index_add(0, rows, hidden @ p["down"][expert])
    every = torch.einsum("btd,edo->bteo", out.view_as(x), p["all"])
    return squared(torch.einsum("bteo,eod->bted", every.tanh(), p["own"]).sum(2), batch["y"])


EXPERTS: dict[str, tuple[tuple[int, ...], AsBlocks]] = {
    "up": ((3, 5, 4), stored_first_out),
    "down": ((3, 5, 4), stored_first_in),
    "all": ((2, 4, 3), lambda g: g.movedim(2, 1).flatten(2).unsqueeze(1)),  # one map, [4, 2 * 3]
    "own": ((2, 3, 4), stored_first_in),
}

MODELS = {
    "weights": (weights, WEIGHTS, lambda n, seed: tensors(torch.float64, CPU, x=(3, 4))(n, seed) | ids(n, seed)),
    "images": (images, IMAGES, tensors(torch.float64, CPU, x=(2, 5, 5))),
    "experts": (
        experts,
        EXPERTS | {"router": ((3, 4), stored_first_out)},
        tensors(torch.float64, CPU, x=(3, 4), y=(3, 4)),
    ),
}


def ids(n: int, seed: int) -> dict[str, Tensor]:
    return {"ids": Draw(torch.float64, CPU, seed).ids(7, n, 3)}


def built(model: str, seed: int = 0) -> tuple[Any, Params, Any]:
    model_fn, table, batch = MODELS[model]
    draw = Draw(torch.float64, CPU, seed)
    return model_fn, {name: draw.normal(*shape, std=0.5) for name, (shape, _) in table.items()}, batch


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("model", list(MODELS))
def test_blocks_by_hand(model, kind):
    """Each parameter's block is `P_in^T A^T G P_out`, whatever way it is stored, by a table written by hand."""
    model_fn, params, batch = built(model)
    table = MODELS[model][1]
    projection = gf.kronecker_projection(
        model_fn, params, batch(4, 1), layers=everything, rank=6, min_rank=2, kind=kind, seed=3
    )
    assert list(projection.slices) == list(params)
    found = gf.ghost_grad_proj(model_fn, params, batch(5, 2), projection)
    grads = per_sample_grads(model_fn, params, batch(5, 2))
    assert_projected(found, explicit(projection, grads, lambda name, g: table[name][1](g)))


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in HARD)], ids=lambda case: case.name
)
def test_every_case(case):
    """The blocks are the entries of the gradients in an order: their projections, for every model of the tables."""
    model_fn, params, batch = case.make(torch.float64, CPU)
    options: dict[str, Any] = {"on_unsupported": "dense"}
    train = batch(4, 1)
    projection = gf.kronecker_projection(model_fn, params, train, layers=everything, rank=6, min_rank=2, **options)
    for name, part in projection.parts.items():
        numbers = torch.arange(params[name].numel()).view(1, *params[name].shape)
        blocks = part.blocks.of(numbers)
        assert blocks.shape[2:] == (len(projection.matrices(name)[0]), len(projection.matrices(name)[1]))
        assert blocks.flatten().sort().values.equal(numbers.flatten()), name
    found = gf.ghost_grad_proj(model_fn, params, train, projection, **options)
    grads = per_sample_grads(model_fn, params, train)
    assert_projected(found, explicit(projection, grads, lambda name, g: projection.parts[name].blocks.of(g)))


@pytest.mark.parametrize("samples", [1, 5])
def test_another_batch_than_the_projection_was_made_with(samples):
    """Experts that its batch did not choose are projected in their own blocks."""
    model_fn, params, batch = built("experts")
    first = {name: t[:1, :1] for name, t in batch(1, 0).items()}  # one token, one expert
    projection = gf.kronecker_projection(model_fn, params, first, layers=everything, rank=6, min_rank=2)
    found = gf.ghost_grad_proj(model_fn, params, batch(samples, 2), projection)
    grads = per_sample_grads(model_fn, params, batch(samples, 2))
    assert_projected(found, explicit(projection, grads, lambda name, g: EXPERTS_AND_ROUTER[name][1](g)))


EXPERTS_AND_ROUTER = MODELS["experts"][1]


def test_large_groups_have_the_same_blocks(monkeypatch):
    """A convolution whose groups are contracted one by one, as large images are, has the blocks of small ones."""
    from ghostfunc import _rules_conv

    model_fn, params, batch = built("images")
    small = gf.kronecker_projection(model_fn, params, batch(4, 1), layers=everything, rank=6, min_rank=2)
    expected = gf.ghost_grad_proj(model_fn, params, batch(4, 1), small)
    monkeypatch.setattr(_rules_conv, "_better_apart", lambda *_: True)
    large = gf.kronecker_projection(model_fn, params, batch(4, 1), layers=everything, rank=6, min_rank=2)
    assert str(large) == str(small)
    assert_projected(gf.ghost_grad_proj(model_fn, params, batch(4, 1), large), expected)
    assert_projected(gf.ghost_grad_proj(model_fn, params, batch(4, 1), small), expected)


def test_a_language_model_makes_no_per_sample_gradient(monkeypatch):
    """Of a tied GPT-2 nothing goes through gradients `[B, *shape]`, nor do positions that a constant looks up."""

    def refuse(factor: Any, shape: Any) -> None:
        pytest.fail(f"{type(factor).__name__} of a weight {tuple(shape)} became dense")

    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    projection = gf.kronecker_projection(model_fn, params, batch(4, 1), include=INCLUDE, rank=6, min_rank=2)
    assert list(projection.slices) == list(params)
    monkeypatch.setattr(_projection, "_chunks", refuse)
    gf.ghost_grad_proj(model_fn, params, batch(4, 1), projection)


# ---------------------------------------------------------------- calls


def test_checkpointed():
    def model_fn(p: Params, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: F.linear(x, p["up"], p["up_b"]).tanh(), x, use_reentrant=False)
        return F.linear(h, p["down"]).pow(2).flatten(1).mean(1)

    params = Draw(torch.float64, CPU).params(up=(6, 4), up_b=(6,), down=(3, 6))
    x = Draw(torch.float64, CPU, 1).normal(4, 2, 4)
    projection = gf.kronecker_projection(model_fn, params, x, layers=everything, rank=6, min_rank=2)
    grads = per_sample_grads(model_fn, params, x)
    expected = explicit(projection, grads, lambda name, g: projection.parts[name].blocks.of(g))
    assert_projected(gf.ghost_grad_proj(model_fn, params, x, projection), expected)


def test_segments():
    """A row for each document of a packed batch: the projections that the documents have alone."""
    model_fn, params, batch = built("experts")
    packed = batch(2, 3)

    def summed(p: Params, batch: dict[str, Tensor]) -> Tensor:  # a loss that keeps positions apart
        return (
            model_fn(p, {key: t.flatten(0, 1).unsqueeze(1) for key, t in batch.items()})
            .view(len(batch["x"]), -1)
            .sum(1)
        )

    segments = torch.tensor([[0, 0, 1], [2, -1, 2]])
    projection = gf.kronecker_projection(summed, params, packed, layers=everything, rank=6, min_rank=2)
    found = gf.ghost_grad_proj(summed, params, packed, projection, segments=segments)
    alone = {key: t.flatten(0, 1).unsqueeze(1) for key, t in packed.items()}
    of_position = per_sample_grads(summed, params, alone)
    grads = {}
    for name, g in of_position.items():
        grads[name] = torch.stack([g[segments.flatten() == k].sum(0) for k in range(3)])
    assert_projected(found, explicit(projection, grads, lambda name, g: EXPERTS_AND_ROUTER[name][1](g)))


def test_samples_that_have_to_be_probed():
    """Where samples are not followed, a second backward finds them, and factors are projected after it."""
    model_fn, params, batch = ALL["reshaped across samples and back"].make(torch.float64, CPU)
    train = batch(4, 1)
    assert gf.explain(model_fn, params, train).probe
    projection = gf.kronecker_projection(model_fn, params, train, layers=everything, rank=6, min_rank=2)
    grads = per_sample_grads(model_fn, params, train)
    expected = explicit(projection, grads, lambda name, g: projection.parts[name].blocks.of(g))
    assert_projected(gf.ghost_grad_proj(model_fn, params, train, projection), expected)


def test_inside_transforms():
    """An ensemble by vmap, and a derivative through a parameter that is not projected."""
    model_fn, params, batch = built("weights")
    train = batch(3, 1)
    projection = gf.kronecker_projection(model_fn, params, train, layers="linear,conv1d", rank=6, min_rank=2)
    others = {name: 1.1 * p for name, p in params.items()}
    stacked = {name: torch.stack([params[name], others[name]]) for name in params}
    found = vmap(lambda p: gf.ghost_grad_proj(model_fn, p, train, projection))(stacked)
    for k, p in enumerate((params, others)):
        assert_projected(found[k], gf.ghost_grad_proj(model_fn, p, train, projection))

    def first(at: Tensor) -> Tensor:
        return gf.ghost_grad_proj(model_fn, {**params, "at": at}, train, projection)[0, 0]

    step = 1e-6 * torch.ones_like(params["at"])
    numeric = (first(params["at"] + step) - first(params["at"] - step)) / 2
    torch.testing.assert_close((grad(first)(params["at"]) * step).sum(), numeric, rtol=1e-6, atol=0)


def test_auxiliary_output_and_inputs_untouched():
    model_fn, params, batch = built("weights")
    train = batch(3, 1)
    before = {name: p.clone() for name, p in params.items()}

    def with_aux(p: Params, batch: Any) -> tuple[Tensor, Tensor]:
        return model_fn(p, batch), batch["x"].sum((1, 2))

    projection = gf.kronecker_projection(with_aux, params, train, rank=6, min_rank=2, has_aux=True)
    found, aux = gf.ghost_grad_proj(with_aux, params, train, projection, has_aux=True)
    assert aux.equal(train["x"].sum((1, 2)))
    assert_projected(found, gf.ghost_grad_proj(model_fn, params, train, projection))
    for name, p in params.items():
        assert p.equal(before[name])
        assert not p.requires_grad and p.grad is None


def test_making_a_projection_draws_nothing():
    """Dropout is off for it, and the generator is where it was; the projections draw what a plain step draws."""
    module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    model_fn, params = functionalized(module, gf.classification_loss, torch.float64, CPU)
    train = Draw(torch.float64, CPU, 1).normal(4, 5), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    projection = gf.kronecker_projection(model_fn, params, train, layers="0", rank=6, min_rank=2)
    found = gf.ghost_grad_proj(model_fn, params, train, projection)
    torch.manual_seed(1)
    leaf = params["0.weight"].clone().requires_grad_()
    (total,) = torch.autograd.grad(model_fn({**params, "0.weight": leaf}, train).sum(), [leaf])
    p_in, p_out = projection.matrices("0.weight")
    assert_projected(found.sum(0, keepdim=True), (p_in.T @ total.T @ p_out).reshape(1, -1))


def test_half_precision_weights():
    """Products are in float32 whatever the model's dtype; the matrices are float32 too."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.bfloat16, CPU)
    exact_fn, exact, _ = BY_NAME["mlp"].make(torch.float64, CPU)
    projection = gf.kronecker_projection(model_fn, params, batch(4, 1), rank=6, min_rank=2)
    found = gf.ghost_grad_proj(model_fn, params, batch(4, 1), projection)
    assert found.dtype == projection.matrices("0.weight")[0].dtype == torch.float32
    train = (batch(4, 1)[0].double(), batch(4, 1)[1])
    reference = gf.ghost_grad_proj(exact_fn, exact, train, projection)
    assert (found - reference).norm() < 0.05 * reference.norm()


# ---------------------------------------------------------------- matrices


def two_layers(width: int = 40) -> tuple[Any, Params, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    batch = torch.randn(6, width, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    return *gf.functionalize(module.double(), gf.classification_loss), batch


@pytest.mark.parametrize("kind", list(KINDS))
def test_entries_of_each_kind(kind):
    projection = gf.kronecker_projection(*two_layers(), kind=kind, rank=64, min_rank=2)
    for name in projection.slices:
        for p in projection.matrices(name):
            d, k = p.shape
            gram = p.T @ p
            if kind == "rademacher":
                torch.testing.assert_close(p.abs(), torch.full_like(p, k**-0.5))
            if kind in ("orthonormal", "mask"):
                torch.testing.assert_close(gram, d / k * torch.eye(k, dtype=p.dtype))
            if kind == "mask":
                assert ((p != 0).sum(0) == 1).all()
            if kind == "sparse":
                assert ((p != 0).sum(1) == 1).all()
                assert set(p[p != 0].tolist()) <= {-1.0, 1.0}
            if kind == "gaussian":
                assert abs(float(p.std()) * k**0.5 - 1) < 4 / math.sqrt(2 * p.numel())


@pytest.mark.parametrize("kind", list(KINDS))
def test_inner_products_in_expectation(kind):
    """Over many names and seeds the mean inner product of two projections is the gradients', within its own error.

    The spread is near what the Gaussian kind has for a rank-1 gradient with itself: (1 + 2 / k_in) (1 + 2 / k_out) - 1.
    """
    draw = Draw(torch.float64, CPU, 5)
    left, right = draw.normal(2, 24), draw.normal(2, 18)
    left[1] += left[0]
    right[1] += right[0]
    x = left[:, :, None] * right[:, None]  # [2, 24, 18]

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([(F.linear(batch[0], w) * batch[1]).sum(1) for w in p.values()]).sum(0)

    params = {f"w{k}": torch.zeros(18, 24, dtype=torch.float64) for k in range(60)}  # all have the same gradient
    found = []
    for seed in range(2):
        projection = gf.kronecker_projection(
            model_fn, params, (left, right), layers=everything, rank=36, min_rank=6, kind=kind, seed=seed
        )
        y = gf.ghost_grad_proj(model_fn, params, (left, right), projection).view(2, 60, 36)
        found.append((y[0] * y[1]).sum(1))
    products = torch.cat(found)  # [120]
    standard_error = products.std() / math.sqrt(len(products))
    assert (products.mean() - (x[0] * x[1]).sum()).abs() < 4 * standard_error
    spread = math.sqrt((1 + 2 / 6) ** 2 - 1)
    assert 0.3 * spread < products.std() / (x[0].norm() * x[1].norm()) < 1.3 * spread


def test_a_larger_rank_keeps_inner_products_better():
    """Of real gradients: the error falls with the rank, about as one over the square root of it."""
    model_fn, params, batch = two_layers()
    grads = per_sample_grads(model_fn, params, batch)
    rows = torch.cat([grads[name].flatten(1) for name in ("0.weight", "2.weight")], 1)
    true, norms = rows @ rows.T, rows.norm(dim=1)
    errors = {}
    for rank in (16, 64, 256):
        squares = []
        for seed in range(10):
            projection = gf.kronecker_projection(model_fn, params, batch, rank=rank, min_rank=2, seed=seed)
            y = gf.ghost_grad_proj(model_fn, params, batch, projection)
            squares.append((((y @ y.T - true) / norms / norms[:, None]) ** 2).mean())
        errors[rank] = float(torch.stack(squares).mean().sqrt())
    assert errors[256] < errors[64] < errors[16] < 0.8
    assert 1.6 < errors[16] / errors[256] < 6  # 4 for one matrix of this many columns, 2 for the narrower of two


def test_a_name_and_a_seed_decide_the_matrices():
    """Other layers, other order, other values, other batch: the same. Another seed or name: others."""
    model_fn, params, batch = two_layers()
    all_of_it = gf.kronecker_projection(model_fn, params, batch, include=INCLUDE)
    one = gf.kronecker_projection(model_fn, params, batch, layers="2")
    for p, q in zip(one.matrices("2.weight"), all_of_it.matrices("2.weight"), strict=True):
        assert p.equal(q)
    swapped = {name: 2 * params[name] for name in reversed(params)}
    again = gf.kronecker_projection(model_fn, swapped, tuple(t[:2] for t in batch), include=INCLUDE)
    for name in params:
        for p, q in zip(again.matrices(name), all_of_it.matrices(name), strict=True):
            assert p.equal(q), name
    other = gf.kronecker_projection(model_fn, params, batch, seed=1)
    assert not other.matrices("2.weight")[0].equal(one.matrices("2.weight")[0])
    square = {"a": torch.zeros(9, 9), "b": torch.zeros(9, 9)}
    two = gf.kronecker_projection(
        lambda p, x: (x @ p["a"] @ p["b"]).sum(1), square, torch.ones(2, 9), layers="a,b", rank=16
    )
    matrices = [*two.matrices("a"), *two.matrices("b")]
    assert not any(p.equal(q) for i, p in enumerate(matrices) for q in matrices[:i])


def test_the_same_numbers_everywhere():
    """The stream of a name and a seed, written down: another machine, process or version of this code has the same."""
    model_fn, params, batch = two_layers()
    p_in, p_out = gf.kronecker_projection(model_fn, params, batch, kind="rademacher", rank=64, seed=7).matrices(
        "0.weight"
    )
    signs = "".join("+" if value > 0 else "-" for value in (*p_in[0], *p_out[0]))
    assert signs == SIGNS


SIGNS = "+++-++--+-+++++-"


def test_on_a_device(device):
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, device)
    here = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    there = gf.kronecker_projection(model_fn, params, batch(3, 1), include=INCLUDE, rank=6, min_rank=2)
    reference = gf.kronecker_projection(
        here.model_fn, here.params, here.batch(3, 1), include=INCLUDE, rank=6, min_rank=2
    )
    for name in there.slices:
        for p, q in zip(there.matrices(name), reference.matrices(name), strict=True):
            assert p.device.type == device.type
            assert p.cpu().equal(q)
    found = gf.ghost_grad_proj(model_fn, params, batch(3, 1), there)
    assert_projected(found.cpu(), gf.ghost_grad_proj(here.model_fn, here.params, here.batch(3, 1), reference))


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("d_in", [64, 300, 768, 3072])
@pytest.mark.parametrize("d_out", [64, 768, 2304])
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_ranks(d_in, d_out, rank):
    """k_in / k_out near sqrt(d_out / d_in), k_in * k_out near the rank."""
    k_in, k_out = ranks(d_in, d_out, rank, 1)
    assert abs(k_in * k_out / rank - 1) <= 0.15
    ratio = k_in / k_out / math.sqrt(d_out / d_in)
    assert 1 / (1 + 1 / min(k_in, k_out)) ** 2 <= ratio <= (1 + 1 / min(k_in, k_out)) ** 2


def test_ranks_of_small_layers():
    assert ranks(768, 768, 256, 8) == (16, 16)
    assert ranks(768, 3072, 256, 8) == (23, 11)
    assert ranks(50257, 768, 256, 8) == (8, 32)  # the least rank on one side, and what it leaves on the other
    assert ranks(4, 3, 256, 8) == (4, 3)
    assert ranks(2, 1000, 256, 8) == (2, 128)
    assert ranks(768, 1, 256, 8) == (256, 1)
    assert ranks(768, 768, 16, 8) == (8, 8)


def test_small_layers_are_named():
    model_fn, params, batch = two_layers()
    projection = gf.kronecker_projection(model_fn, params, batch, include=INCLUDE)
    assert projection.clipped == ("0.bias", "2.bias", "4.weight", "4.bias")
    assert [p.shape for p in projection.matrices("4.weight")] == [(20, 20), (3, 3)]
    text = str(projection)
    assert "4 clipped to small layers" in text
    assert text.count("clipped: as many numbers as a block has") == 4
    assert projection.dim == sum(s.stop - s.start for s in projection.slices.values())
    assert [s.start for s in projection.slices.values()][1:] == [s.stop for s in projection.slices.values()][:-1]


# ---------------------------------------------------------------- names


def gpt2_layers(layers: Any = "", **options: Any) -> list[str]:
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    projection = gf.kronecker_projection(model_fn, params, batch(2, 1), layers=layers, rank=4, min_rank=2, **options)
    return [name.removeprefix("transformer.") for name in projection.slices]


def test_layers():
    maps = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    first, second = [f"h.0.{name}" for name in maps], [f"h.1.{name}" for name in maps]
    assert gpt2_layers() == first + second
    assert gpt2_layers("transformer.h.1") == second
    assert gpt2_layers("mlp, attn.c_attn") == [n for n in first + second if "mlp" in n or "c_attn" in n]
    assert gpt2_layers("wte") == ["wte.weight"]
    assert gpt2_layers("ln_f") == ["ln_f.weight", "ln_f.bias"]
    assert gpt2_layers("transformer") == gpt2_layers(" ,") == first + second
    assert gpt2_layers(["transformer.ln_f.bias"]) == ["ln_f.bias"]
    assert gpt2_layers(lambda name: name.endswith("c_fc.bias")) == ["h.0.mlp.c_fc.bias", "h.1.mlp.c_fc.bias"]
    with pytest.raises(ValueError, match=r"no parameter matches 'c_at'.*transformer\.h\.0\.attn\.c_attn\.weight"):
        gpt2_layers("c_at")


def test_layers_of_a_head():
    """A part that matches the head and its bias means the head's weight."""
    model_fn, params, batch = two_layers()
    assert list(gf.kronecker_projection(model_fn, params, batch, layers="4").slices) == ["4.weight"]
    assert list(gf.kronecker_projection(model_fn, params, batch, layers="2,4.bias").slices) == ["2.weight", "4.bias"]
    assert list(gf.kronecker_projection(model_fn, params, batch).slices) == ["0.weight", "2.weight"]


def test_include():
    assert gpt2_layers("c_fc", include=("embedding",)) == [
        "wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight", "h.1.mlp.c_fc.weight"
    ]  # fmt: skip
    assert gpt2_layers("h.0.mlp.c_fc", include=("head",)) == ["wte.weight", "h.0.mlp.c_fc.weight"]
    norms = [f"h.{k}.ln_{j}.{what}" for k in (0, 1) for j in (1, 2) for what in ("weight", "bias")]
    found = gpt2_layers("c_fc", include=("norm",))
    assert [n for n in found if "c_fc" not in n] == [*norms, "ln_f.weight", "ln_f.bias"]
    found = gpt2_layers("c_fc", include=("bias",))
    assert found and all(name.endswith(("c_fc.weight", ".bias")) and "ln" not in name for name in found)
    assert len(found) == 2 + 8
    assert len(gpt2_layers(include=INCLUDE)) == len(BY_NAME["gpt2 tied"].make(torch.float64, CPU).params)


def test_a_parameter_that_nothing_depends_on():
    """It has columns, which are zero."""
    model_fn, params, batch = BY_NAME["unused"].make(torch.float64, CPU)
    projection = gf.kronecker_projection(model_fn, params, batch(3, 1), rank=4, min_rank=2)
    found = gf.ghost_grad_proj(model_fn, params, batch(3, 1), projection)
    assert (found[:, projection.slices["never"]] == 0).all()


def test_nothing_below_the_lowest_layer():
    """The backward ends there, also where a weight below derives from the one that is projected."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise AssertionError("propagated below the lowest layer")

    def model_fn(p: Params, x: Tensor) -> Tensor:
        h = Refuses.apply(F.linear(x, p["low"]).tanh())
        return F.linear(h, p["high"]).pow(2).sum(1)

    def derived(p: Params, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p["low"] * p["high"].sum()).tanh(), p["high"]).pow(2).sum(1)

    params = Draw(torch.float64, CPU).params(low=(4, 4), high=(3, 4))
    x = Draw(torch.float64, CPU, 1).normal(1, 4)  # of one sample: a function of one's own is not followed
    projection = gf.kronecker_projection(derived, params, x, layers="high", rank=4, min_rank=2)
    gf.ghost_grad_proj(model_fn, params, x, projection)
    whole = gf.kronecker_projection(derived, params, x, layers="low,high", rank=4, min_rank=2)
    with pytest.raises(AssertionError, match="below the lowest layer"):
        gf.ghost_grad_proj(model_fn, params, x, whole)
    expected = explicit(projection, per_sample_grads(derived, params, x), lambda name, g: g.mT.unsqueeze(1))
    assert_projected(gf.ghost_grad_proj(derived, params, x, projection), expected)


# ---------------------------------------------------------------- errors


def test_errors():
    model_fn, params, batch = two_layers()
    with pytest.raises(ValueError, match="kind='cauchy': expected 'gaussian', 'rademacher'"):
        gf.kronecker_projection(model_fn, params, batch, kind="cauchy")
    with pytest.raises(ValueError, match="rank=0"):
        gf.kronecker_projection(model_fn, params, batch, rank=0)
    with pytest.raises(ValueError, match="expected any of 'embedding', 'norm', 'bias', 'head'"):
        gf.kronecker_projection(model_fn, params, batch, include=("biases",))
    head = nn.Linear(4, 3).double()
    alone = gf.functionalize(head, gf.classification_loss)
    one = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"choose no parameter \(weight: head; bias: bias\)"):
        gf.kronecker_projection(*alone, one)
    projection = gf.kronecker_projection(model_fn, params, batch)
    with pytest.raises(KeyError, match=r"'0\.bias' is not in this projection; it is of 0\.weight, 2\.weight"):
        projection.matrices("0.bias")
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight, which are not among the parameters weight, bias"):
        gf.ghost_grad_proj(*alone, one, projection)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(30, 41\); the projection was made for \(30, 40\)"):
        gf.ghost_grad_proj(*two_layers(41), projection)


# ---------------------------------------------------------------- memory and arithmetic


def test_nothing_outlives_its_layer():
    """Of a tied head no `[B, T, V]` is left when the backward of the body begins; nothing is as large as B weights."""
    samples, positions, vocabulary, width = 4, 32, 1500, 8
    model_fn, params = gpt2(tied=True, layers=1, width=width, heads=2, vocabulary=vocabulary, positions=positions)
    batch = {"input_ids": torch.randint(vocabulary, (samples, positions))}
    projection = gf.kronecker_projection(model_fn, params, batch, include=INCLUDE, rank=64)
    with Allocations(large=samples * positions * vocabulary) as recorded:
        gf.ghost_grad_proj(model_fn, params, batch, projection)
    assert recorded.large_storages  # the logits were seen
    assert max(max(counts) for counts in recorded.large_alive_at.values()) > 0
    assert set(recorded.large_alive_at["native_layer_norm_backward"]) == {0}


def test_no_gradient_of_a_weight_is_allocated():
    """No operation makes a tensor as large as a weight, where rows and projections are smaller."""
    params = {"up": torch.randn(1024, 512) / 512, "down": torch.randn(512, 1024) / 1024}
    x = torch.randn(4, 8, 512)
    projection = gf.kronecker_projection(peak_memory.model_fn, params, x, include=("head",), rank=64)
    made = Made()
    with made:
        gf.ghost_grad_proj(peak_memory.model_fn, params, x, projection)
    assert 4 * 8 * 1024 <= made.largest < 512 * 1024
    with made:
        gf.value_and_grad_dot(peak_memory.model_fn, params, x, x)
    assert made.largest >= 512 * 1024  # the mean gradient


class Made(TorchDispatchMode):
    """Records the largest tensor that an operation makes, views of its arguments aside."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def kept(step: Callable[[], Any]) -> int:
    """Bytes that the graph of a forward keeps for its backward, each memory once."""
    storages: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("layers", ["attn,mlp", "mlp.c_proj", "attn.c_proj"])
def test_of_activations_only_projections_are_kept(layers, monkeypatch):
    """Beside what the gradients of activations alone need: k_in numbers a position, where d_in would be kept."""
    samples, positions = 4, 64
    model_fn, params = gpt2(tied=True, layers=2, width=96, heads=2, vocabulary=100, positions=positions)
    batch = {"input_ids": torch.randint(100, (samples, positions))}
    projection = gf.kronecker_projection(model_fn, params, batch, layers=layers, rank=64)
    lowest = next(iter(projection.slices)).replace(".weight", ".bias")

    def input_gradients() -> None:
        leaf = params[lowest].detach().requires_grad_()
        torch.autograd.grad(model_fn({**params, lowest: leaf}, batch).sum(), [leaf])

    sides = [tuple(projection.matrices(name)[0].shape) for name in projection.slices]
    narrow = sum(4 * samples * positions * k_in for _, k_in in sides)
    wide = sum(4 * samples * positions * d_in for d_in, _ in sides)
    least = kept(input_gradients)
    more = kept(lambda: gf.ghost_grad_proj(model_fn, params, batch, projection)) - least
    assert 0.9 * narrow <= more <= narrow + 0.1 * wide
    if layers != "attn.c_proj":  # whose activations attention keeps for its own backward
        monkeypatch.setattr(_projection.Projected, "narrow", lambda self, site, side: None)
        assert kept(lambda: gf.ghost_grad_proj(model_fn, params, batch, projection)) - least >= 0.75 * wide


def only_input_gradients(model_fn: Any, params: Params, batch: Any, lowest: str) -> int:
    """FLOPs of a forward and of the gradients of activations down to a bias, whose own gradient is a sum."""

    def step() -> None:
        leaf = params[lowest].detach().requires_grad_()
        torch.autograd.grad(model_fn({**params, lowest: leaf}, batch).sum(), [leaf])

    return flops(step)


def flops_ratio(pattern: str, samples: int, **size: int) -> float:
    """FLOPs of `ghost_grad_proj` over a forward, input gradients down to the lowest layer, and the products with P."""
    model_fn, params = gpt2(tied=True, **size)
    positions = size["positions"]
    batch = {"input_ids": torch.randint(size["vocabulary"], (samples, positions))}
    projection = gf.kronecker_projection(model_fn, params, batch, layers=pattern, rank=64)
    lowest = next(iter(projection.slices)).replace(".weight", ".bias")
    least = only_input_gradients(model_fn, params, batch, lowest)
    for name in projection.slices:
        (d_in, k_in), (d_out, k_out) = (p.shape for p in projection.matrices(name))
        least += 2 * samples * positions * (d_in * k_in + d_out * k_out + k_in * k_out)
    return flops(lambda: gf.ghost_grad_proj(model_fn, params, batch, projection)) / least


@pytest.mark.parametrize("layers", ["", "h.1", "mlp.c_proj"])
def test_flops_of_a_narrow_gpt2(layers):
    """No more than that; less would mean products that the counter does not see."""
    ratio = flops_ratio(layers, 4, layers=2, width=96, heads=2, vocabulary=1000, positions=128)
    assert 1 <= ratio <= 1.02


@pytest.mark.slow
def test_flops_of_gpt2_small():
    """12 layers of 768, vocabulary 50257."""
    ratio = flops_ratio("", 2, layers=12, width=768, heads=12, vocabulary=50257, positions=128)
    print(f"FLOPs of ghost_grad_proj over its parts, GPT-2 small: {ratio:.4f}")
    assert 1 <= ratio <= 1.02
