"""Second order against explicit Hessians, Shapley values by their definition, and real steps on the validation loss."""

import gc
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Built, Draw, mlp
from hard import HARD
from oracle import assert_dots, assert_grads, dots, losses_and_grads, mean, per_sample_grads
from test_flops import flops, gpt2, plain_step, two_layers
from test_nothing_stays import large_tensors
from torch import Tensor
from torch.func import grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from zoo import ZooCase, in_double
from zoo_language import language
from zoo_modules import MODULES

import ghostfunc as gf

# torch's own words at its first jvp
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

CPU, DOUBLE = torch.device("cpu"), torch.float64
N, M = 4, 3
Params = dict[str, Tensor]
HARD_BY_NAME = {case.name: case for case in HARD}


def flat(values: Params) -> Tensor:
    return torch.cat([v.reshape(-1) for v in values.values()])


def rows(per_sample: Params) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in per_sample.values()], 1)


def by_hessian(model_fn: Callable[..., Tensor], params: Params, val: Any) -> Tensor:
    """The Hessian of the mean validation loss, `[P, P]`, by torch.func.

    `torch.func.hessian` itself (forward mode over jacrev, torch 2.13) is off by 1% with layer norms, and not symmetric.
    """
    shapes = [p.shape for p in params.values()]
    sizes = [p.numel() for p in params.values()]

    def mean_loss(point: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(point.split(sizes), shapes, strict=True)]
        return model_fn(dict(zip(params, parts, strict=True)), val).mean()

    with sdpa_kernel(SDPBackend.MATH):
        curved = jacrev(grad(mean_loss))(flat(params)).detach()
    torch.testing.assert_close(curved, curved.T, rtol=1e-10, atol=1e-12)
    return curved


def by_rows(model_fn: Callable[..., Tensor], params: Params, val: Any) -> Tensor:
    """The same where a model does not run under vmap: the derivative of each entry of the gradient in turn."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    inputs = list(leaves.values())
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        loss = model_fn(leaves, val).mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, inputs, create_graph=True, **options)])
    derivatives = [torch.autograd.grad(entry, inputs, retain_graph=True, **options) for entry in gradient]
    return torch.stack([torch.cat([d.reshape(-1) for d in of_entry]) for of_entry in derivatives])


# Weights of f(kh) - f(-kh) in the derivative of f at 0, times h: the error is of order h^8.
DIFFERENCES = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}


def by_differences(model_fn: Callable[..., Tensor], params: Params, val: Any, direction: Tensor) -> Tensor:
    """H u by differences of gradients along u, for models with too many parameters for a matrix."""
    size = 0.01 / direction.norm()
    parts = direction.split([p.numel() for p in params.values()])

    def gradient(at: Tensor) -> Tensor:
        moved = {k: p + at * part.view_as(p) for (k, p), part in zip(params.items(), parts, strict=True)}
        return flat(mean(per_sample_grads(model_fn, moved, val)))

    return sum(c * (gradient(k * size) - gradient(-k * size)) for k, c in DIFFERENCES.items()) / size  # type: ignore


def assert_is_hessian_form(case: Built, hess: Callable[..., Tensor]) -> None:
    model_fn, params, batch = case
    train, val = batch(N, 1), batch(M, 2)
    grads, curved = rows(per_sample_grads(model_fn, params, train)), hess(model_fn, params, val)
    direction = curved @ grads.sum(0)
    actual = gf.ghost_grad_hess_grad(model_fn, params, train, val)
    assert direction.norm() > 0
    assert_dots(actual, (grads @ direction, grads.norm(dim=1) * direction.norm()), 1e-9, "g H sum g")


@pytest.mark.parametrize(
    "name",
    ["mlp", "mlp frozen", "batch norm in eval mode", "convolution", "gpt2 tied", "padding_idx", "norms", "derived",
     "tied by hand", "weight twice", "recurrent", "regularised", "unused", "sequence first T=4, the train batch"],
)  # fmt: skip
def test_against_explicit_hessians(name: str) -> None:
    assert_is_hessian_form(BY_NAME[name].make(DOUBLE, CPU), by_hessian)


@pytest.mark.parametrize("name", ["experts", "lstm", "multihead attention", "weight norm", "prompt tuning"])
def test_against_explicit_hessians_of_what_vmap_cannot_run(name: str) -> None:
    assert_is_hessian_form(HARD_BY_NAME[name].make(DOUBLE, CPU), by_rows)


WIDER = [
    language("Llama", num_hidden_layers=1),
    language("Mixtral", num_hidden_layers=1, experts_implementation="eager"),
    next(case for case in MODULES if case.name == "weight norm"),  # whose fused kernel torch differentiates wrongly
]


@pytest.mark.parametrize("case", WIDER, ids=lambda case: case.name)
def test_against_differences_of_gradients(case: ZooCase) -> None:
    model_fn, params, batch = in_double(case, CPU)
    train, val = batch(N, 1), batch(2, 2)
    grads = rows(per_sample_grads(model_fn, params, train))
    direction = by_differences(model_fn, params, val, grads.sum(0))
    actual = gf.ghost_grad_hess_grad(model_fn, params, train, val)
    assert_dots(actual, (grads @ direction, grads.norm(dim=1) * direction.norm()), 1e-9, "g H sum g")


# --- values of a step -------------------------------------------------------------------------------------------------


def regression(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """A loss that is quadratic in the parameters."""
    prediction = batch["x"] @ p["w"] + p["b"]
    return (prediction - batch["y"]).pow(2).mean(1)


def quadratic() -> tuple[Params, dict[str, Tensor], dict[str, Tensor]]:
    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(DOUBLE, CPU, seed)
        return {"x": draw.normal(n, 5), "y": draw.normal(n, 3)}

    return Draw(DOUBLE, CPU).params(w=(5, 3), b=(3,)), batch(N, 1), batch(M, 2)


class Diagonal:
    """P = diag(d), and an optimizer that moves by `rest` without any sample."""

    def __init__(self, params: Params) -> None:
        draw = Draw(DOUBLE, CPU, seed=9)
        self.diagonal = {name: draw.normal(*p.shape).exp() for name, p in params.items()}
        self.rest = {name: torch.zeros_like(p) for name, p in params.items()}

    def __call__(self, direction: Params) -> Params:
        return {name: self.diagonal[name] * d for name, d in direction.items()}


class Momentum(Diagonal):
    """The same with a part of the step that no sample of the batch makes."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        draw = Draw(DOUBLE, CPU, seed=8)
        self.rest = {name: draw.normal(*p.shape) for name, p in params.items()}

    def update(self, gradient: Params) -> Params:
        return {name: self(gradient)[name] + self.rest[name] for name in gradient}


def val_loss_after(model_fn: Callable[..., Tensor], params: Params, val: Any, update: Params, lr: float) -> Tensor:
    return model_fn({name: p - lr * update[name] for name, p in params.items()}, val).mean()


def shapley(game: Callable[[frozenset[int]], float], players: int) -> Tensor:
    """Shapley values by their definition: the mean, over all orders of arrival, of what a player adds."""
    values = torch.zeros(players, dtype=DOUBLE)
    orders = list(permutations(range(players)))
    worth: dict[frozenset[int], float] = {}
    for order in orders:
        for place, player in enumerate(order):
            before, after = frozenset(order[:place]), frozenset(order[: place + 1])
            for coalition in (before, after):
                if coalition not in worth:
                    worth[coalition] = game(coalition)
            values[player] += worth[after] - worth[before]
    return values / len(orders)


@pytest.mark.parametrize("kind", [None, Diagonal, Momentum])
def test_values_are_shapley_values_of_the_step(kind: type[Diagonal] | None) -> None:
    """The game of In-Run Data Shapley, played on the loss itself, which is quadratic: nothing is left out."""
    params, train, val = quadratic()
    precondition = None if kind is None else kind(params)
    as_it_is = Diagonal(params)
    as_it_is.diagonal = {name: torch.ones_like(p) for name, p in params.items()}
    moves = precondition or as_it_is
    grads, lr = per_sample_grads(regression, params, train), 0.3

    def game(coalition: frozenset[int]) -> float:
        chosen = torch.zeros(N, dtype=DOUBLE)
        chosen[list(coalition)] = 1 / N
        part = {name: torch.tensordot(chosen, g, 1) for name, g in grads.items()}
        update = {name: moved + moves.rest[name] for name, moved in moves(part).items()}
        return -float(val_loss_after(regression, params, val, update, lr))

    result = gf.in_run_values(regression, params, train, val, lr=lr, precondition=precondition)
    expected = shapley(game, N)
    torch.testing.assert_close(result.values, expected, rtol=1e-11, atol=0)
    assert (result.second.abs() > 0.05 * result.first.abs()).all()  # so that the first order alone would fail
    whole = game(frozenset(range(N))) - game(frozenset())
    torch.testing.assert_close(result.values.sum(), torch.tensor(whole, dtype=DOUBLE), rtol=1e-11, atol=0)

    h = gf.ghost_grad_hess_grad(regression, params, train, val, precondition=precondition)
    torch.testing.assert_close(result.second, -0.5 * (lr / N) ** 2 * h, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("order", "shrinks"), [(1, 4), (2, 8)])
def test_what_is_left_out_is_of_the_next_order(order: int, shrinks: float) -> None:
    """Half the learning rate, and the rest of the Taylor series is a fourth, or an eighth."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)

    def left_out(lr: float) -> float:
        result = gf.in_run_values(model_fn, params, train, val, lr=lr, order=order)
        after = val_loss_after(model_fn, params, val, result.grads, lr)
        return float(result.val_losses.mean() - after - result.values.sum())

    assert left_out(2e-4) / left_out(1e-4) == pytest.approx(shrinks, rel=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_every_part_of_the_result(order: int) -> None:
    model_fn, params, batch = mlp(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    before = {name: p.clone() for name, p in params.items()}
    losses, grads = losses_and_grads(model_fn, params, train)
    val_losses, of_val = losses_and_grads(model_fn, params, val)
    result = gf.in_run_values(model_fn, params, train, val, lr=0.5, order=order)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.val_losses, val_losses, rtol=1e-12, atol=0)
    assert_grads(result.grads, mean(grads), 1e-10, "grads")
    value, scale = dots(grads, mean(of_val))
    assert_dots(result.first, (0.5 / N * value, scale), 1e-10, "first")
    assert torch.equal(result.values, result.first + result.second)
    assert not any(t.requires_grad for t in (*result[:2], *result.grads.values(), *result[3:]))
    assert (result.second == 0).all() if order == 1 else (result.second != 0).all()
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in params.items())

    as_tensor = gf.in_run_values(model_fn, params, train, val, lr=torch.tensor(0.5), order=order)
    torch.testing.assert_close(as_tensor.values, result.values, rtol=1e-12, atol=0)
    one = gf.in_run_values(model_fn, params, batch(1, 1), batch(1, 2), lr=0.5, order=order)
    assert one.values.shape == (1,)


def test_a_precondition_about_the_train_gradient() -> None:
    """It is called with each direction and the mean train gradient, and orders agree on the first."""
    model_fn, params, batch = mlp(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    gradient = mean(per_sample_grads(model_fn, params, train))

    class About:
        about_train_gradient = True

        def __call__(self, direction: Params, of_train: Params) -> Params:
            assert_grads(of_train, gradient, 1e-10, "the mean train gradient")
            return {name: d / (1 + of_train[name] ** 2) for name, d in direction.items()}

    first, second = (
        gf.in_run_values(model_fn, params, train, val, lr=0.1, order=k, precondition=About()) for k in (1, 2)
    )
    torch.testing.assert_close(first.first, second.first, rtol=1e-11, atol=0)
    grads, curved = per_sample_grads(model_fn, params, train), by_hessian(model_fn, params, val)
    moved = {name: g / (1 + gradient[name] ** 2) for name, g in grads.items()}
    expected = -0.5 * (0.1 / N) ** 2 * rows(moved) @ curved @ rows(moved).sum(0)
    torch.testing.assert_close(second.second, expected, rtol=1e-9, atol=1e-18)


def test_layers_are_parts_of_the_whole() -> None:
    """A part is what goes through its parameters in the step of all of them."""
    model_fn, params, batch = BY_NAME["convolution"].make(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    whole = gf.in_run_values(model_fn, params, train, val, lr=0.1)
    convolutions = [name for name in params if name.startswith(("0.", "3."))]
    part = gf.in_run_values(model_fn, params, train, val, lr=0.1, layers="0,3")
    rest = gf.in_run_values(model_fn, params, train, val, lr=0.1, layers=lambda name: name not in convolutions)
    for of_part, of_rest, of_whole in zip(part[3:], rest[3:], whole[3:], strict=True):
        torch.testing.assert_close(of_part + of_rest, of_whole, rtol=1e-11, atol=1e-18)
    assert list(part.grads) == list(params)
    grads = per_sample_grads(model_fn, params, train)
    direction = by_hessian(model_fn, params, val) @ rows(grads).sum(0)
    among = torch.cat([torch.full((p.numel(),), name in convolutions) for name, p in params.items()])
    expected = -0.5 * (0.1 / N) ** 2 * (rows(grads)[:, among] @ direction[among])
    torch.testing.assert_close(part.second, expected, rtol=1e-9, atol=1e-18)


def test_aux_comes_back() -> None:
    model_fn, params, batch = mlp(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)

    def with_aux(p: Params, batch: Any) -> tuple[Tensor, Tensor]:
        losses = model_fn(p, batch)
        return losses, 2 * losses

    plain = gf.in_run_values(model_fn, params, train, val, lr=0.1)
    for order in (1, 2):
        result, aux = gf.in_run_values(with_aux, params, train, val, lr=0.1, order=order, has_aux=True)
        torch.testing.assert_close(result.first, plain.first, rtol=1e-12, atol=0)
        torch.testing.assert_close(aux, 2 * plain.losses, rtol=1e-12, atol=0)
    h, aux = gf.ghost_grad_hess_grad(with_aux, params, train, val, has_aux=True)
    torch.testing.assert_close(h, gf.ghost_grad_hess_grad(model_fn, params, train, val))
    torch.testing.assert_close(aux, 2 * plain.losses)


# --- what else a model may do -----------------------------------------------------------------------------------------


def transformers_gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 19, "n_positions": 8, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **changes)).double()


def ids(n: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": Draw(DOUBLE, CPU, seed).ids(19, n, 6)}


def test_dropout_is_of_the_train_rows_alone() -> None:
    """These draw what a plain step draws, and nothing else is drawn."""
    module = transformers_gpt2().train()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torch.manual_seed(5)
    losses = model_fn(leaves, ids(N, 1))
    after = torch.get_rng_state()
    samples = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses]
    grads = torch.stack([torch.cat([g.reshape(-1) for g in sample]) for sample in samples])

    torch.manual_seed(5)
    actual = gf.ghost_grad_hess_grad(model_fn, params, ids(N, 1), ids(M, 2))
    assert torch.equal(torch.get_rng_state(), after)
    direction = by_hessian(gf.functionalize(module.eval(), gf.causal_lm_loss)[0], params, ids(M, 2)) @ grads.sum(0)
    assert_dots(actual, (grads @ direction, grads.norm(dim=1) * direction.norm()), 1e-9, "g H sum g")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_attention_kernels(attention: str, dtype: torch.dtype) -> None:
    """The default kernel has no second derivative: the validation rows take another by themselves."""
    module = transformers_gpt2().eval()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    expected = gf.ghost_grad_hess_grad(model_fn, params, ids(N, 1), ids(M, 2))
    module.set_attn_implementation(attention)
    actual = gf.ghost_grad_hess_grad(*gf.functionalize(module.to(dtype), gf.causal_lm_loss), ids(N, 1), ids(M, 2))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-9 if dtype == DOUBLE else 1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_transformers(use_reentrant: bool) -> None:
    module = transformers_gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).train()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    params = {name: 1.1 * p for name, p in params.items()}  # a recomputation with the module's own would be off
    plain = gf.ghost_grad_hess_grad(model_fn, params, ids(N, 1), ids(M, 2))
    module.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(
        gf.ghost_grad_hess_grad(model_fn, params, ids(N, 1), ids(M, 2)), plain, rtol=1e-11, atol=0
    )
    assert module.transformer.gradient_checkpointing


def test_own_checkpointing_is_refused() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return checkpoint(lambda x: F.linear(x, p["w"]).tanh(), x, use_reentrant=False).pow(2).sum(1)

    with pytest.raises(
        RuntimeError, match=r"second order: model_fn keeps activations by saved-tensor hooks.*checkpoint"
    ):
        gf.ghost_grad_hess_grad(model_fn, {"w": torch.randn(3, 4)}, torch.randn(4, 4), torch.randn(2, 4))


class Cube(torch.autograd.Function):
    """A user's function with everything that torch.func asks for."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class Opaque(torch.autograd.Function):
    """A user's function whose backward leaves torch: its own derivative would silently be zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2) * grad


def cubes(function: type[torch.autograd.Function]) -> Callable[[Params, Tensor], Tensor]:
    return lambda p, x: function.apply(F.linear(x, p["w"]).tanh()).sum(1)  # type: ignore[operator]


def test_a_function_of_the_user() -> None:
    """By forward mode where it has one; else refused."""
    draw = Draw(DOUBLE, CPU)
    params, train, val = draw.params(w=(3, 4)), draw.normal(N, 4), draw.normal(M, 4)
    expected = gf.ghost_grad_hess_grad(lambda p, x: F.linear(x, p["w"]).tanh().pow(3).sum(1), params, train, val)
    torch.testing.assert_close(
        gf.ghost_grad_hess_grad(cubes(Cube), params, train, val), expected, rtol=1e-11, atol=1e-14
    )
    with pytest.raises(RuntimeError, match=r"By double backward: Opaque is an autograd.Function.*By forward mode"):
        gf.ghost_grad_hess_grad(cubes(Opaque), params, train, val)


def test_inside_vmap() -> None:
    """Over an ensemble of parameters: the values of each."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    members = [params, {name: 1.5 * p for name, p in params.items()}]
    stacked = {name: torch.stack([member[name] for member in members]) for name in params}
    actual = torch.func.vmap(lambda p: gf.ghost_grad_hess_grad(model_fn, p, train, val))(stacked)
    expected = torch.stack([gf.ghost_grad_hess_grad(model_fn, member, train, val) for member in members])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2 tied", "norms"])
def test_derivatives_of_it(name: str) -> None:
    """Third derivatives of the validation loss, by grad and by jvp of the call, against differences of its results."""
    model_fn, params, batch = BY_NAME[name].make(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    tangent = {key: torch.randn_like(p) for key, p in params.items()}

    def form(p: Params) -> Tensor:
        return gf.ghost_grad_hess_grad(model_fn, p, train, val)

    size = 0.01 / flat(tangent).norm()
    at = {k: form({key: p + k * size * tangent[key] for key, p in params.items()}) for k in range(-4, 5)}
    expected = torch.stack([c * (at[k] - at[-k]) for k, c in DIFFERENCES.items()]).sum(0) / size
    actual = torch.func.jvp(form, (params,), (tangent,))[1]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    gradient = torch.func.grad(lambda p: form(p).sum())(params)
    torch.testing.assert_close((flat(gradient) * flat(tangent)).sum(), actual.sum(), rtol=1e-10, atol=1e-10)


def test_a_use_without_a_rule() -> None:
    """A function of torch.func inside the model: one backward for each train sample, and the same H u."""
    model_fn, params, batch = HARD_BY_NAME["vmap inside"].make(DOUBLE, CPU)
    train, val = batch(N, 1), batch(M, 2)
    grads = rows(per_sample_grads(model_fn, params, train))
    direction = by_rows(model_fn, params, val) @ grads.sum(0)
    actual = gf.ghost_grad_hess_grad(model_fn, params, train, val, on_unsupported="dense")
    assert_dots(actual, (grads @ direction, grads.norm(dim=1) * direction.norm()), 1e-9, "g H sum g")


@pytest.mark.parametrize("name", ["gpt2 tied", "convolution"])
def test_no_activation_waits_for_the_collector(name: str) -> None:
    model_fn, params, batch = BY_NAME[name].make(DOUBLE, CPU)
    train, val = batch(200, 1), batch(300, 2)
    gf.in_run_values(model_fn, params, train, val, lr=0.1)  # what torch and transformers keep from a first call
    gc.collect()
    gc.disable()
    try:
        before = large_tensors(600)  # a number and a half for each sample of both
        gf.in_run_values(model_fn, params, train, val, lr=0.1)
        assert large_tensors(600) == before
    finally:
        gc.enable()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    params, train, val = quadratic()
    with pytest.raises(ValueError, match=r"order=3: expected 1"):
        gf.in_run_values(regression, params, train, val, lr=0.1, order=3)
    with pytest.raises(ValueError, match="lr=inf: the learning rate must be finite"):
        gf.in_run_values(regression, params, train, val, lr=float("inf"))
    with pytest.raises(TypeError, match=r"lr is a tensor of shape \(2,\)"):
        gf.in_run_values(regression, params, train, val, lr=torch.ones(2))
    bad = {"x": val["x"].clone(), "y": val["y"].clone()}
    bad["y"][1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"val batch: the losses of samples \[1\] are not finite"):
        gf.ghost_grad_hess_grad(regression, params, train, bad)
    with pytest.raises(ValueError, match=r"train batch: the losses of samples \[1\] are not finite"):
        gf.ghost_grad_hess_grad(regression, params, bad, val)
    with pytest.raises(ValueError, match=r"val batch disagree on the number of samples"):
        gf.ghost_grad_hess_grad(regression, params, train, {"x": val["x"], "y": val["y"][:1]})
    with pytest.raises(ValueError, match="direction: no entry for b"):
        gf.ghost_grad_hess_grad(regression, params, train, val, precondition=lambda d: {"w": d["w"]})
    with pytest.raises(ValueError, match="layers: no parameter matches 'head'"):
        gf.ghost_grad_hess_grad(regression, params, train, val, layers="head")

    def only_val_is_odd(p: Params, batch: dict[str, Tensor]) -> Tensor:
        losses = regression(p, batch)
        return losses[:, None] if len(losses) == M else losses

    with pytest.raises(ValueError, match=r"losses of shape \(3, 1\) for a batch of 3 samples; expected \[3\]"):
        gf.ghost_grad_hess_grad(only_val_is_odd, params, train, val)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 128])
def test_products_of_an_mlp(positions: int) -> None:
    """Counted by hand, in products of a row with a weight.

    Train rows: five for the step, and each weight's gradient a sample at a time again, or two products with the
    directions. Val rows: five for their gradient, eight for the derivative of its product with u.
    """
    n, m, width, hidden = 16, 1, 64, 96
    model_fn, params, train, val = two_layers(n, m, positions, width, hidden)
    product = 2 * positions * width * hidden
    again = 2 if positions > 1 else 4
    least = (5 + again) * n * product + 13 * m * product
    passes = 2 * 2 * n * (hidden + (2 * width * hidden if positions > 1 else 0))  # two directions, and the bias
    counted = flops(lambda: gf.in_run_values(model_fn, params, train, val, lr=0.1))
    assert least <= counted <= least + passes
    assert counted <= 2.2 * flops(lambda: plain_step(model_fn, params, train))


@pytest.mark.parametrize(("positions", "tied"), [(16, True), (64, True), (64, False)])
def test_cost_of_a_narrow_gpt2(positions: int, tied: bool) -> None:
    """For 16 train samples and one of validation: a step, its weights' products again, and the val rows thrice."""
    size = {"layers": 2, "width": 96, "heads": 2, "vocabulary": 1000, "positions": positions}
    model_fn, params = gpt2(tied=tied, **size)
    train, val = ({"input_ids": torch.randint(1000, (k, positions))} for k in (16, 1))
    plain = flops(lambda: plain_step(model_fn, params, train))
    again = 2 * 16 * positions * (2 * 12 * 96**2 + 1000 * 96) / plain
    measured = flops(lambda: gf.in_run_values(model_fn, params, train, val, lr=0.1)) / plain
    assert 1 + again + 3 / 16 <= measured <= 1.85


@pytest.mark.slow
def test_cost_of_gpt2_small() -> None:
    """12 layers of 768, vocabulary 50257, B = 16, Bv = 1, T = 64."""
    model_fn, params = gpt2(tied=True, layers=12, width=768, heads=12, vocabulary=50257, positions=64)
    train, val = ({"input_ids": torch.randint(50257, (k, 64))} for k in (16, 1))
    plain = flops(lambda: plain_step(model_fn, params, train))
    measured = flops(lambda: gf.in_run_values(model_fn, params, train, val, lr=0.1)) / plain
    print(f"FLOPs of in_run_values to second order over a plain step: {measured:.4f}")
    again = 2 * 16 * 64 * (12 * 12 * 768**2 + 50257 * 768) / plain
    assert 1 + again + 3 / 16 <= measured <= 1.6
