"""The head and the loss as one operation: the numbers of logits and cross-entropy in every transform, in less room."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import Draw, Params
from oracle import (
    TOLERANCE,
    assert_dots,
    assert_dots_by_name,
    assert_grads,
    dots,
    expected,
    losses_and_grads,
    matrix,
    mean,
)
from test_memory import Allocations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf
from ghostfunc import _linear_cross_entropy
from ghostfunc._logits import LogitsOuter

CPU = torch.device("cpu")
JIT = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode, in torch
VOCABULARY, WIDTH = 23, 6


class Head(NamedTuple):
    """A small language model, written with the operation and with logits."""

    chunked: Callable[[Params, Any], Tensor]
    with_logits: Callable[[Params, Any], Tensor]
    params: Params
    batch: Callable[..., Any]


def head(
    *,
    tied: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    chunk: int | None = 5,
    dtype: torch.dtype = torch.float64,
) -> Head:
    shapes: dict[str, tuple[int, ...]] = {"table": (VOCABULARY, WIDTH), "mix": (WIDTH, WIDTH), "norm": (WIDTH,)}
    shapes |= {} if tied else {"head": (VOCABULARY, WIDTH)}
    shapes |= {"shift": (VOCABULARY,)} if bias else {}

    def body(p: Params, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = F.embedding(batch["input_ids"], p["table"])
        hidden = F.linear(x, p["mix"]).tanh() * p["norm"]
        return hidden, F.pad(batch["labels"][:, 1:], (0, 1), value=-100)

    def averaged(token_losses: Tensor, targets: Tensor) -> Tensor:
        return token_losses.sum(1) / (targets != -100).sum(1).clamp(min=1)

    def chunked(p: Params, batch: dict[str, Tensor]) -> Tensor:
        hidden, targets = body(p, batch)
        weight = p["table" if tied else "head"]
        return averaged(
            gf.linear_cross_entropy(hidden, weight, targets, p.get("shift"), softcap=softcap, chunk=chunk), targets
        )

    def with_logits(p: Params, batch: dict[str, Tensor]) -> Tensor:
        hidden, targets = body(p, batch)
        logits = F.linear(hidden, p["table" if tied else "head"], p.get("shift"))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return averaged(losses.view(targets.shape), targets)

    def batch(n: int, seed: int, positions: int = 7) -> dict[str, Tensor]:
        draw = Draw(dtype, CPU, seed)
        ids, labels = draw.ids(VOCABULARY, n, positions), draw.ids(VOCABULARY, n, positions)
        labels[0, : positions // 2] = -100
        return {"input_ids": ids, "labels": labels}

    return Head(chunked, with_logits, Draw(dtype, CPU).params(**shapes), batch)


# ---------------------------------------------------------------- the operation in plain autograd


def losses_and_cotangents(operation: Callable[..., Tensor], tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    losses = operation(*leaves)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)]


def operations(
    targets: Tensor, softcap: float | None = None, chunk: int | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`(in blocks, from logits)`."""

    def in_blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return gf.linear_cross_entropy(hidden, weight, targets, bias, softcap=softcap, chunk=chunk)

    def from_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

    return in_blocks, from_logits


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(hidden, weight, bias, targets, weights)`."""
    draw = Draw(dtype, CPU)
    targets = draw.ids(VOCABULARY, 3, 4)
    targets[1, 2] = targets[0, 0] = -100
    return draw.normal(3, 4, WIDTH), draw.normal(VOCABULARY, WIDTH), draw.normal(VOCABULARY), targets, draw.normal(3, 4)


@pytest.mark.parametrize("chunk", [None, 1, 5, 22, 23, 24])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_autograd(chunk, softcap, dtype):
    hidden, weight, bias, targets, weights = drawn(dtype)
    ours, reference = operations(targets, softcap, chunk)
    for tensors in ([hidden, weight], [hidden, weight, bias]):
        found = losses_and_cotangents(ours, tensors, weights)
        wanted = losses_and_cotangents(reference, tensors, weights)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()
    assert found[0][1, 2] == found[0][0, 0] == 0
    assert not found[1][1, 2].any()  # no gradient reaches a position whose target is ignored


@JIT
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_derivatives_of_the_derivative(softcap):
    hidden, weight, bias, targets, _ = drawn()
    ours, reference = operations(targets, softcap, 5)
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)

    def of_sum(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda h: operation(h, weight.detach(), bias.detach()).sum()

    h, direction = hidden.detach(), torch.randn_like(hidden)
    for transform in (
        lambda f: torch.func.grad(f)(h),
        lambda f: torch.func.jvp(torch.func.grad(f), (h,), (direction,))[1],
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=0)(torch.stack([h, direction])),
    ):
        torch.testing.assert_close(transform(of_sum(ours)), transform(of_sum(reference)), rtol=1e-10, atol=1e-12)


def test_lower_precision():
    """bfloat16 tensors, and autocast, keep the losses in float32 and are as near to float32 as with logits."""
    hidden, weight, bias, targets, weights = drawn(torch.float32)
    ours, reference = operations(targets, chunk=5)
    exact = losses_and_cotangents(reference, [hidden, weight, bias], weights)
    low = losses_and_cotangents(ours, [t.bfloat16() for t in (hidden, weight, bias)], weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses_and_cotangents(ours, [hidden, weight, bias], weights)
    for found, dtype in ((low, torch.bfloat16), (cast, torch.float32)):
        assert found[0].dtype == torch.float32
        assert {t.dtype for t in found[1:]} == {dtype}
        for a, b in zip(found, exact, strict=True):
            assert (a - b).norm() <= 2e-2 * b.norm()


def test_only_what_needs_a_gradient():
    hidden, weight, bias, targets, weights = drawn()
    ours, reference = operations(targets, chunk=5)
    for needed in range(3):
        both = []
        for operation in (ours, reference):
            leaves = [t.clone().requires_grad_(k == needed) for k, t in enumerate((hidden, weight, bias))]
            both.append(torch.autograd.grad((operation(*leaves) * weights).sum(), leaves[needed])[0])
        torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_errors():
    hidden, weight, bias, targets, _ = drawn()
    with pytest.raises(ValueError, match=r"hidden \(3, 4, 6\), weight \(23, 6\) and targets \(3, 3\)"):
        gf.linear_cross_entropy(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match=r"bias of shape \(22,\)"):
        gf.linear_cross_entropy(hidden, weight, targets, bias[1:])
    with pytest.raises(ValueError, match="chunk=0"):
        gf.linear_cross_entropy(hidden, weight, targets, chunk=0)
    targets[2, 3] = VOCABULARY
    with pytest.raises(IndexError, match="target 23 is outside of the vocabulary, 0 to 22"):
        gf.linear_cross_entropy(hidden, weight, targets)


# ---------------------------------------------------------------- every transform


HEADS = [
    pytest.param({"tied": False}, id="head"),
    pytest.param({"tied": True}, id="tied"),
    pytest.param({"bias": True, "softcap": 2.0}, id="bias and cap"),
    pytest.param({"tied": True, "bias": True, "chunk": 1}, id="tied, bias, rows one by one"),
    pytest.param({"chunk": None}, id="one block"),
]


def concatenated(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_dots(how, dtype, schedule):
    made, exact = head(**how, dtype=dtype), head(**how)
    train, val = made.batch(4, 1), made.batch(2, 2)
    train["labels"][3] = -100
    losses, g = losses_and_grads(exact.with_logits, exact.params, train)
    _, v = losses_and_grads(exact.with_logits, exact.params, val)
    for out in ("train", "param train", "train val", "param train val"):
        result = gf.value_and_grad_dot(made.chunked, made.params, train, val, out=out, schedule=schedule)
        check = assert_dots_by_name if out.startswith("param") else assert_dots
        check(result.dots, expected(out, g, v), TOLERANCE[dtype], out)
        assert_grads(result.grads, mean(g), TOLERANCE[dtype], "gradient")
        torch.testing.assert_close(result.losses.double(), losses, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert result.losses[3] == 0
    assert not result.dots["mix"][3].any()  # of a sample without targets


@pytest.mark.parametrize("order", ["Gram", "direction", "tile stream"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_order(order, tied):
    from ghostfunc._planner import forced

    made = head(tied=tied)
    train, val = made.batch(3, 1), made.batch(2, 2)
    _, g = losses_and_grads(made.with_logits, made.params, train)
    _, v = losses_and_grads(made.with_logits, made.params, val)
    with forced(order):
        for schedule in ("joint", "two-phase"):
            for out in ("train", "train val"):
                result = gf.value_and_grad_dot(made.chunked, made.params, train, val, out=out, schedule=schedule)
                assert_dots(result.dots, expected(out, g, v), 1e-10, f"{order} {schedule} {out}")
                assert_grads(result.grads, mean(g), 1e-10, "gradient")


@pytest.mark.parametrize("how", HEADS)
def test_other_quantities(how):
    made = head(**how)
    batch, val = made.batch(4, 1), made.batch(3, 2)
    _, g = losses_and_grads(made.with_logits, made.params, batch)
    _, v = losses_and_grads(made.with_logits, made.params, val)
    rows = concatenated(g)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(gf.ghost_grad_norm(made.chunked, made.params, batch), norms, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        gf.ghost_grad_gram(made.chunked, made.params, batch), rows @ rows.T, rtol=1e-9, atol=1e-12
    )
    limit = float(norms.median())
    clipped, _ = gf.ghost_clipped_grad(made.chunked, made.params, batch, limit)
    weights = (limit / norms).clamp(max=1)
    assert_grads(clipped, {k: torch.einsum("b,b...->...", weights, x) for k, x in g.items()}, 1e-10, "clipped")
    along = gf.ghost_grad_along(made.chunked, made.params, batch, mean(v))
    assert_dots(along, dots(g, mean(v)), 1e-10, "along")
    want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "norms": gf.Norm(), "clipped": gf.Clip(limit)}
    want |= {"second": gf.Stream(lambda tile: tile.grads.square().sum(0), "entry")}
    found = gf.ghost_quantities(made.chunked, made.params, batch, val, want=want)
    assert_dots(found["dots"], dots(g, mean(v)), 1e-10, "dots")
    assert_dots(found["matrix"], matrix(g, v), 1e-10, "matrix")
    torch.testing.assert_close(found["norms"], norms, rtol=1e-10, atol=0)
    assert_grads(found["clipped"].grads, clipped, 1e-10, "clipped among others")
    assert_grads(found.grads, mean(g), 1e-10, "gradient")
    assert_grads(found["second"], {name: x.square().sum(0) for name, x in g.items()}, 1e-10, "stream")


@pytest.mark.parametrize("how", HEADS)
def test_tokens_projections_factors_and_the_oracle(how):
    made = head(**how)
    batch = made.batch(3, 1)
    _, g = losses_and_grads(made.with_logits, made.params, batch)
    direction = Draw(torch.float64, CPU, 3).params(**{name: tuple(p.shape) for name, p in made.params.items()})
    tokens = gf.ghost_grad_along(made.chunked, made.params, batch, direction, out="train token")
    assert_dots(tokens.sum(1), dots(g, direction), 1e-10, "tokens")
    of_logits = gf.ghost_grad_along(made.with_logits, made.params, batch, direction, out="train token")
    torch.testing.assert_close(tokens, of_logits, rtol=1e-9, atol=1e-12)
    options = {"rank": 4, "min_rank": 2, "include": ("embedding", "norm", "bias", "head")}
    projection = gf.kronecker_projection(made.with_logits, made.params, batch, **options)
    found = gf.ghost_grad_proj(made.chunked, made.params, batch, projection)
    torch.testing.assert_close(
        found, gf.ghost_grad_proj(made.with_logits, made.params, batch, projection), rtol=1e-9, atol=1e-12
    )
    gf.verify(made.chunked, made.params, batch)
    assert_grads(gf.per_sample_grad(made.chunked, made.params, batch), g, 1e-10, "oracle")
    _, factors = gf.ghost_factors(made.chunked, made.params, batch)
    dense = {name: torch.stack([f.dense(p.shape) for f in factors[name]]).sum(0) for name, p in made.params.items()}
    assert_grads(dense, g, 1e-10, "factors")


def test_the_factor_gives_its_cotangents_when_they_are_read():
    made = head()
    _, factors = gf.ghost_factors(made.chunked, made.params, made.batch(3, 1))
    _, plain = gf.ghost_factors(made.with_logits, made.params, made.batch(3, 1))
    (lazy,), (whole,) = factors["head"], plain["head"]
    assert isinstance(lazy, LogitsOuter)
    torch.testing.assert_close(lazy.g, whole.g, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(lazy.left_rows(4, 9), whole.g[:, :, 4:9], rtol=1e-10, atol=1e-14)
    ids = torch.tensor([3, 22, 3])
    torch.testing.assert_close(lazy.left_at(ids), whole.g[:, :, ids], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("names", [("table", "mix", "norm"), ("head", "shift"), ("shift",), ("head",)])
def test_frozen_parameters(names):
    """What is left out is no argument: it stays where it is, and the rest has its exact gradients."""
    made = head(bias=True)
    frozen = {name: p for name, p in made.params.items() if name not in names}
    params = {name: made.params[name] for name in names}

    def chunked(p: Params, batch: Any) -> Tensor:
        return made.chunked({**frozen, **p}, batch)

    def with_logits(p: Params, batch: Any) -> Tensor:
        return made.with_logits({**frozen, **p}, batch)

    train, val = made.batch(3, 1), made.batch(2, 2)
    _, g = losses_and_grads(with_logits, params, train)
    _, v = losses_and_grads(with_logits, params, val)
    result = gf.value_and_grad_dot(chunked, params, train, val, out="param train")
    assert_dots_by_name(result.dots, expected("param train", g, v), 1e-10, "dots")
    assert_grads(result.grads, mean(g), 1e-10, "gradient")
    _, all_g = losses_and_grads(made.with_logits, made.params, train)
    result = gf.value_and_grad_dot(made.chunked, made.params, train, val, layers=lambda name: name in names)
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots of some layers")
    assert_grads(result.grads, mean(all_g), 1e-10, "gradient")


@pytest.mark.parametrize(("n", "positions"), [(1, 7), (3, 2), (1, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_one_sample_one_target(n, positions, tied):
    made = head(tied=tied)
    train, val = made.batch(n, 1, positions), made.batch(1, 2, 5)
    _, g = losses_and_grads(made.with_logits, made.params, train)
    _, v = losses_and_grads(made.with_logits, made.params, val)
    result = gf.value_and_grad_dot(made.chunked, made.params, train, val)
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots")
    assert_grads(result.grads, mean(g), 1e-10, "gradient")


def test_positions_first_and_rows_flattened():
    """The samples are found in `[T, B, d]`, and in rows that were picked."""
    made = head()

    def transposed(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = F.embedding(batch["input_ids"].t(), p["table"])
        hidden = F.linear(x, p["mix"]).tanh() * p["norm"]  # [T, B, d]
        return gf.linear_cross_entropy(hidden, p["head"], batch["labels"].t(), chunk=5).sum(0)

    def picked(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = F.embedding(batch["input_ids"], p["table"])
        hidden = F.linear(x, p["mix"]).tanh() * p["norm"]
        sample, place = (batch["labels"] != -100).nonzero(as_tuple=True)
        found = gf.linear_cross_entropy(hidden[sample, place], p["head"], batch["labels"][sample, place], chunk=5)
        return found.new_zeros(len(x)).index_add(0, sample, found)

    train, val = made.batch(3, 1), made.batch(2, 2)
    for model_fn in (transposed, picked):
        _, g = losses_and_grads(model_fn, made.params, train)
        _, v = losses_and_grads(model_fn, made.params, val)
        result = gf.value_and_grad_dot(model_fn, made.params, train, val)
        assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots")
        assert_grads(result.grads, mean(g), 1e-10, "gradient")


@JIT
def test_second_order_and_outer_transforms():
    """The Hessian, a gradient of a dot product, an ensemble: as with logits."""
    made = head(tied=True, bias=True)
    train, val = made.batch(3, 1), made.batch(2, 2)

    def both(call: Callable[[Any], Any]) -> None:
        found, wanted = call(made.chunked), call(made.with_logits)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)

    both(lambda f: gf.ghost_grad_hess_grad(f, made.params, train, val))
    both(lambda f: torch.func.grad(lambda p: gf.ghost_grad_dot(f, p, train, val).sum())(made.params))
    ensemble = {name: torch.stack([p, 1.1 * p]) for name, p in made.params.items()}
    both(lambda f: torch.func.vmap(lambda p: gf.ghost_grad_dot(f, p, train, val))(ensemble))


def test_samples_that_a_probe_tells_apart():
    """Where samples are not followed (behind a Function of the user's own), a probe finds them."""

    class Alien(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return grads[0]

    made = head()

    def chunked(p: Params, batch: dict[str, Tensor]) -> Tensor:
        hidden = F.linear(F.embedding(batch["input_ids"], p["table"]), p["mix"]).tanh() * p["norm"]
        hidden = Alien.apply(hidden.flatten(0, 1))
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        assert isinstance(hidden, Tensor)
        losses = gf.linear_cross_entropy(hidden, p["head"], targets.flatten(), chunk=5).view(targets.shape)
        return losses.sum(1) / (targets != -100).sum(1).clamp(min=1)

    train, val = made.batch(3, 1), made.batch(2, 2)
    _, g = losses_and_grads(made.with_logits, made.params, train)
    _, v = losses_and_grads(made.with_logits, made.params, val)
    result = gf.value_and_grad_dot(chunked, made.params, train, val)
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots")
    assert_grads(result.grads, mean(g), 1e-10, "gradient")


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_contractions_leave_the_gradient_alone(bias):
    made = head(bias=bias, dtype=torch.float32)
    train, val = made.batch(3, 1), made.batch(2, 2)
    exact = gf.value_and_grad_dot(made.chunked, made.params, train, val)
    coarse = gf.value_and_grad_dot(made.chunked, made.params, train, val, dtype=torch.bfloat16)
    assert_grads(coarse.grads, exact.grads, 1e-6, "gradient")
    torch.testing.assert_close(coarse.dots.float(), exact.dots, rtol=5e-2, atol=5e-2 * float(exact.dots.abs().max()))


# ---------------------------------------------------------------- memory and arithmetic


def large(tied: bool, vocabulary: int = 4000, width: int = 8) -> tuple[Any, Params, Callable[..., Any]]:
    def model_fn(p: Params, ids: Tensor) -> Tensor:
        hidden = F.linear(F.embedding(ids, p["table"]), p["mix"]).tanh()
        weight = p["table" if tied else "head"]
        return gf.linear_cross_entropy(hidden[:, :-1], weight, ids[:, 1:], chunk=64).mean(1)

    shapes = {"table": (vocabulary, width), "mix": (width, width)} | ({} if tied else {"head": (vocabulary, width)})
    return model_fn, Draw(torch.float32, CPU).params(**shapes), Draw(torch.float32, CPU, 1).ids


@pytest.mark.parametrize("tied", [False, True])
def test_no_logits_are_allocated(tied):
    """Whatever is asked for: the largest allocation is that of a weight, a tile or a block, far below `[B, T, V]`."""
    n, m, positions, vocabulary, width = 8, 2, 65, 4000, 8
    model_fn, params, ids = large(tied)
    train, val = ids(vocabulary, n, positions), ids(vocabulary, m, positions)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    direction = {name: torch.ones_like(p) for name, p in params.items()}
    projection = gf.kronecker_projection(
        model_fn, params, train[:1], rank=16, min_rank=2, include=("head", "embedding")
    )
    want = {"dots": gf.Dot(), "norms": gf.Norm(), "clipped": gf.Clip(1.0)}
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: torch.autograd.grad(model_fn(leaves, train).mean(), list(leaves.values())),
        **{
            f"{schedule}, {out}": lambda schedule=schedule, out=out: gf.value_and_grad_dot(
                model_fn, params, train, val, schedule=schedule, out=out
            )
            for schedule in ("joint", "two-phase")
            for out in ("train", "train val")
        },
        "norms": lambda: gf.ghost_grad_norm(model_fn, params, train),
        "quantities": lambda: gf.ghost_quantities(model_fn, params, train, val, want=want),
        "clipped": lambda: gf.ghost_clipped_grad(model_fn, params, train, 1.0),
        "along": lambda: gf.ghost_grad_along(model_fn, params, train, direction),
        "projections": lambda: gf.ghost_grad_proj(model_fn, params, train, projection),
        "tokens": lambda: gf.ghost_grad_along(model_fn, params, train[:2], direction, out="train token"),
    }
    logits = n * (positions - 1) * vocabulary
    pairs = (n * (positions - 1)) * (m * (positions - 1))  # of positions, where the planner takes them
    allowed = max(n * vocabulary * width, pairs, n * (positions - 1) * 64 * 2)
    assert allowed < logits / 6
    for name, call in calls.items():
        with Allocations() as recorded:
            call()
        assert recorded.largest <= allowed, f"{name}: {recorded.largest} entries, logits have {logits}"


def test_products_are_counted():
    """4 for each train row where logits need 3 (forward, logits again, gradients of h and W), and the direction's."""
    n, m, positions, vocabulary, width = 8, 1, 129, 2048, 32

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return gf.linear_cross_entropy(batch["x"] * p["scale"], p["head"], batch["y"], chunk=256).mean(1)

    params = Draw(torch.float32, CPU).params(scale=(width,), head=(vocabulary, width))

    def batch(count: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(torch.float32, CPU, seed)
        return {"x": draw.normal(count, positions, width), "y": draw.ids(vocabulary, count, positions)}

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    train, val = batch(n, 1), batch(m, 2)
    product = 2 * positions * vocabulary * width  # of one sample
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    plain = flops(lambda: torch.autograd.grad(model_fn(leaves, train).mean(), list(leaves.values())))
    assert plain == 4 * n * product
    joint = flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule="joint"))
    passes = 2 * n * vocabulary * width + 2 * n * positions * width * (m + 1)  # of tiles, and of the scale's dots
    assert 4 * (n + m) * product <= joint <= 4 * (n + m) * product + passes
    direction = {name: torch.ones_like(p) for name, p in params.items()}
    along = flops(lambda: gf.ghost_grad_along(model_fn, params, train, direction))
    assert 4 * n * product <= along <= 4 * n * product + passes


# ---------------------------------------------------------------- causal language models


def small(family: str, **more: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False, **more}
    if family == "GPT2":
        sizes = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "use_cache": False}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= more
    config = getattr(transformers, f"{family}Config")(**sizes)
    name = f"{family}LMHeadModel" if family in ("GPT2", "Bert") else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    ("family", "more", "tolerance"),
    [
        ("GPT2", {}, 1e-10),
        ("GPT2", {"tie_word_embeddings": False}, 1e-10),
        ("Phi", {}, 1e-10),  # a head with a bias
        ("Llama", {}, 1e-6),  # these compute their norms in float32 whatever their dtype
        ("Gemma2", {"final_logit_softcapping": 3.0, "attn_implementation": "eager"}, 1e-6),
        ("Granite", {"logits_scaling": 4.0}, 1e-6),
        ("Cohere", {"logit_scale": 0.25}, 1e-6),
    ],
)
def test_a_transformers_model_in_one_line(family, more, tolerance, monkeypatch):
    monkeypatch.setattr(_linear_cross_entropy, "_ROWS", 7)
    monkeypatch.setattr(_linear_cross_entropy, "_BLOCK_BYTES", {"cpu": 1})
    model = small(family, **more)
    training = [module.training for module in model.modules()]
    with_logits, params = gf.functionalize(model, gf.causal_lm_loss)
    chunked, same = gf.functionalize(model, gf.chunked_causal_lm_loss)
    assert [module.training for module in model.modules()] == training
    assert list(same) == list(params)
    model.requires_grad_(False).eval()
    train, val = ({"input_ids": torch.randint(61, (k, 9))} for k in (3, 2))
    train["attention_mask"], val["attention_mask"] = torch.ones(3, 9).long(), torch.ones(2, 9).long()
    train["attention_mask"][1, 6:] = 0
    moved = {name: 1.01 * p for name, p in params.items()}  # other values than the module's own
    torch.testing.assert_close(chunked(moved, train), with_logits(moved, train), rtol=tolerance, atol=0)
    _, g = losses_and_grads(with_logits, moved, train)
    _, v = losses_and_grads(with_logits, moved, val)
    result = gf.value_and_grad_dot(chunked, moved, train, val, out="param train")
    assert_dots_by_name(result.dots, expected("param train", g, v), tolerance, "dots")
    assert_grads(result.grads, mean(g), tolerance, "gradient")


def test_segments_labels_and_no_targets_as_with_logits():
    hidden, weight = Draw(torch.float64, CPU).normal(3, 6, 4), Draw(torch.float64, CPU, 1).normal(11, 4)
    ids = torch.randint(11, (3, 6))
    labels = ids.clone()
    labels[1] = -100
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2]])
    mask = torch.ones(3, 6).long()
    mask[2, :2] = 0
    for batch in (ids, (ids, labels), {"labels": labels}, {"input_ids": ids, "attention_mask": mask},
                  {"input_ids": ids, "segments": segments}):  # fmt: skip
        ours = gf.chunked_causal_lm_loss((hidden, weight), batch)
        torch.testing.assert_close(ours, gf.causal_lm_loss(hidden @ weight.T, batch), rtol=1e-12, atol=0)


def test_models_that_are_not_known_are_refused():
    """Never silently another loss: what a model does to its logits is known, or the call raises."""
    with pytest.raises(TypeError, match=r"ModuleDict cannot be called up to its head.*Pass call="):
        gf.functionalize(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)}), gf.chunked_causal_lm_loss)
    model = small("Llama")
    forward = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits + 1
            return output

    model.__class__ = Shifted
    with pytest.raises(TypeError, match="its logits are not those of its head"):
        gf.functionalize(model, gf.chunked_causal_lm_loss)
    bert = small("Bert", is_decoder=True)  # between its body and its head is another layer
    with pytest.raises(TypeError, match="BertLMHeadModel cannot be called up to its head"):
        gf.functionalize(bert, gf.chunked_causal_lm_loss)


def test_errors_of_the_loss():
    with pytest.raises(TypeError, match="got Tensor"):
        gf.chunked_causal_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"labels of shape \(2, 3\) do not fit hidden states of shape \(2, 4, 5\)"):
        gf.chunked_causal_lm_loss((torch.zeros(2, 4, 5), torch.zeros(7, 5)), torch.zeros(2, 3).long())
