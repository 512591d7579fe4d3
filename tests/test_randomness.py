"""`randomness=`: every sample draws its own numbers, all draw the same, or drawing is an error.

The oracle of "same" is a loop over single samples of the plain model, with the seed set anew before each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads, size
from test_dropout import eval_gradients, gpt2, network, plain_backwards, tokens, vectors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ghostfunc as gf

SEED = 7
B, T, D = 4, 3, 8


def each_alone(model_fn: Callable, params: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """`{name: [B, *shape]}`, one sample at a time, each from the same seed."""
    rows = []
    for sample in range(size(batch)):
        torch.manual_seed(SEED)
        one = pytree.tree_map(lambda t, s=sample: t[s : s + 1], batch)
        rows.append(per_sample_grads(model_fn, params, one))
    return {name: torch.cat([row[name] for row in rows]) for name in params}


def from_factors(model_fn: Callable, params: dict[str, Tensor], batch: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    _, factors = gf.ghost_factors(model_fn, params, batch, **options)
    return {
        name: sum((use.dense(p.shape) for use in factors[name]), torch.zeros(size(batch), *p.shape).to(p))
        for name, p in params.items()
    }


# ---------------------------------------------------------------- one operation


class Drawing(NamedTuple):
    """An operation on hidden states `[B, T, D]` that draws random numbers, and the name that messages give it."""

    name: str
    op: str
    body: Callable[[Tensor], Tensor]


def time_first(h: Tensor) -> Tensor:
    return F.dropout(h.transpose(0, 1), 0.5).transpose(0, 1)


def rows_sample_major(h: Tensor) -> Tensor:
    return F.dropout(h.reshape(-1, D), 0.5).view(h.shape)


def rows_time_major(h: Tensor) -> Tensor:
    rows = F.dropout(h.transpose(0, 1).reshape(-1, D), 0.5)
    return rows.view(T, -1, D).transpose(0, 1)


def rows_time_major_alpha(h: Tensor) -> Tensor:
    rows = F.alpha_dropout(h.transpose(0, 1).reshape(-1, D), 0.5, training=True)
    return rows.view(T, -1, D).transpose(0, 1)


def sampled(h: Tensor) -> Tensor:
    chosen = torch.multinomial(h[:, 0].softmax(-1), 2)  # [B, 2]
    return h.gather(2, chosen.unsqueeze(1).expand(-1, T, -1))


def pixels(h: Tensor) -> Tensor:
    return h.reshape(-1, T, 2, 4)


def attention(h: Tensor) -> Tensor:
    heads = h.reshape(-1, T, 2, D // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4, is_causal=True).transpose(1, 2)


def masked_attention(h: Tensor) -> Tensor:
    seen = torch.ones(len(h), 1, T, T, dtype=torch.bool, device=h.device)  # one for each sample, not from the batch
    seen[:, :, :, -1] = False
    heads = h.reshape(-1, T, 2, D // 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen, dropout_p=0.4)
    return out.transpose(1, 2)


DRAWINGS = [
    Drawing("dropout", "dropout", lambda h: F.dropout(h, 0.5)),
    Drawing("dropout twice", "dropout", lambda h: F.dropout(F.dropout(h, 0.3).tanh(), 0.5)),
    Drawing("dropout of everything", "dropout", lambda h: h + F.dropout(h, 1.0)),
    Drawing("torch.dropout", "dropout", lambda h: torch.dropout(h, 0.5, train=True)),
    Drawing("dropout_", "dropout", lambda h: torch.dropout_(h * 2, 0.5, True)),
    Drawing("dropout in place", "dropout", lambda h: F.dropout(h * 2, 0.5, inplace=True)),
    Drawing("dropout time first", "dropout", time_first),
    Drawing("dropout of rows", "dropout", rows_sample_major),
    Drawing("dropout of rows, time major", "dropout", rows_time_major),
    Drawing("dropout of a permuted tensor", "dropout", lambda h: F.dropout(h.transpose(1, 2), 0.5).transpose(1, 2)),
    Drawing("dropout1d", "dropout1d", lambda h: F.dropout1d(h, 0.5)),
    Drawing("dropout2d", "dropout2d", lambda h: F.dropout2d(pixels(h), 0.5)),
    Drawing("dropout3d", "dropout3d", lambda h: F.dropout3d(pixels(h).unsqueeze(-1), 0.5)),
    Drawing("feature_dropout", "feature_dropout", lambda h: torch.feature_dropout(pixels(h), 0.5, True)),
    Drawing("alpha_dropout", "alpha_dropout", lambda h: F.alpha_dropout(h, 0.5, training=True)),
    Drawing("alpha_dropout in place", "alpha_dropout", lambda h: F.alpha_dropout(h * 2, 0.5, True, True)),
    Drawing("alpha_dropout, time major", "alpha_dropout", rows_time_major_alpha),
    Drawing("feature_alpha_dropout", "feature_alpha_dropout", lambda h: F.feature_alpha_dropout(pixels(h), 0.5, True)),
    Drawing("bernoulli", "bernoulli", lambda h: h * torch.bernoulli(h.detach().sigmoid())),
    Drawing("bernoulli with p", "bernoulli", lambda h: h * torch.bernoulli(h.detach(), 0.5)),
    Drawing("bernoulli_", "bernoulli", lambda h: h * h.detach().clone().bernoulli_(0.5)),
    Drawing("uniform_", "uniform", lambda h: h * h.detach().clone().uniform_()),
    Drawing("rand_like", "rand_like", lambda h: h * torch.rand_like(h)),
    Drawing("randn_like", "randn_like", lambda h: h + torch.randn_like(h)),
    Drawing("randint_like", "randint_like", lambda h: h * torch.randint_like(h, 3)),
    Drawing("normal", "normal", lambda h: h * torch.normal(h.detach(), 1.0)),
    Drawing("multinomial", "multinomial", sampled),
    Drawing("gumbel_softmax", "gumbel_softmax", lambda h: F.gumbel_softmax(h)),
    Drawing("attention", "scaled_dot_product_attention", attention),
    Drawing("attention with a mask for each sample", "scaled_dot_product_attention", masked_attention),
    Drawing("one number for all", "rand", lambda h: h * torch.rand((), dtype=h.dtype, device=h.device)),
    Drawing("a number for each feature", "rand", lambda h: h * torch.rand(T, 1, dtype=h.dtype, device=h.device)),
]


def around(body: Callable[[Tensor], Tensor]) -> Callable:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x @ p["w"] + p["b"]
        return body(h).tanh().flatten(1).mul(p["scale"]).square().sum(1)

    return model_fn


def parameters(device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (5, D), "b": (D,), "scale": (1,)}
    return {name: torch.randn(s, generator=generator, dtype=dtype).to(device) for name, s in shapes.items()}


def inputs(device: torch.device, samples: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, T, 5, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)


@pytest.mark.parametrize("case", DRAWINGS, ids=lambda case: case.name)
def test_a_sample_draws_what_it_draws_alone(case, device):
    model_fn, params, x = around(case.body), parameters(device), inputs(device)
    expected = each_alone(model_fn, params, x)
    assert_grads(from_factors(model_fn, params, x, randomness="same"), expected, 1e-10, case.name)


@pytest.mark.parametrize("case", DRAWINGS, ids=lambda case: case.name)
def test_the_generator_ends_where_one_sample_leaves_it(case, device):
    model_fn, params, x = around(case.body), parameters(device), inputs(device)
    torch.manual_seed(SEED)
    model_fn(params, x[:1])
    after_one = torch.get_rng_state()
    torch.manual_seed(SEED)
    gf.ghost_grad_along(model_fn, params, x, params, randomness="same")
    assert torch.equal(torch.get_rng_state(), after_one)


@pytest.mark.parametrize("case", DRAWINGS, ids=lambda case: case.name)
def test_by_default_a_plain_step_draws_the_same(case, device):
    model_fn, params, x = around(case.body), parameters(device), inputs(device)
    g = plain_backwards(model_fn, params, x)
    assert_grads(from_factors(model_fn, params, x), g, 1e-10, "different")
    torch.manual_seed(SEED)
    result = gf.value_and_grad_dot(model_fn, params, x, x[:2], randomness="different")
    assert_grads(result.grads, mean(g), 1e-10, "grads")


@pytest.mark.parametrize("case", DRAWINGS, ids=lambda case: case.name)
@pytest.mark.parametrize("schedule", ["auto", "joint", "two-phase"])
def test_drawing_is_an_error(case, schedule, device):
    model_fn, params, x = around(case.body), parameters(device), inputs(device)
    message = rf"`{case.op}` draws random numbers.*module\.eval\(\).*randomness='different'"
    with pytest.raises(RuntimeError, match=message):
        gf.ghost_grad_dot(model_fn, params, x, x[:2], randomness="error", schedule=schedule)


def test_one_sample_draws_what_a_plain_step_draws(device):
    """For a batch of one sample there is nothing to share, whatever its shapes."""
    params, x = parameters(device), inputs(device, 1)
    model_fn = around(lambda h: h * torch.rand(h.shape[0], 1, 1, dtype=h.dtype, device=h.device))
    g = plain_backwards(model_fn, params, x)
    assert_grads(from_factors(model_fn, params, x, randomness="same"), g, 1e-10, "same")


def test_equal_samples_get_equal_gradients(device):
    params, x = parameters(device), inputs(device)[:1].expand(B, -1, -1).contiguous()
    model_fn = around(lambda h: F.dropout(h, 0.5))
    same, different = (from_factors(model_fn, params, x, randomness=r)["w"] for r in ("same", "different"))
    assert torch.equal(same, same[:1].expand_as(same))
    assert (different[0] - different[1]).norm() > 0.1 * different[0].norm()


# ---------------------------------------------------------------- models


class Recurrent(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, num_layers=2, dropout=0.5, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        return self.head(out.mean(1 if self.rnn.batch_first else 0))


class Attending(nn.Module):
    """`nn.MultiheadAttention` with dropout, by primitive operations or by the fused one."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True)
        self.into, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.head(self.attention(h, h, h, need_weights=self.need_weights)[0].mean(1))


def sequences(n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, T, 5, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=generator).to(device)


def module(name: str, device: torch.device) -> nn.Module:
    if name == "network":
        return network(device)
    if name.startswith("gpt2"):
        return gpt2(device, name.removeprefix("gpt2 "))
    torch.manual_seed(0)
    made = Recurrent(name == "lstm, batch first") if name.startswith("lstm") else Attending(name == "attention, eager")
    return made.to(device, torch.float64).train()


MODELS = [
    "network",
    "gpt2 eager",
    "gpt2 sdpa",
    "lstm, batch first",
    "lstm, time first",
    "attention, eager",
    "attention, sdpa",
]


@pytest.mark.parametrize("name", MODELS)
def test_models_in_training_mode(name, device):
    """Gradients, dots and factors against each sample alone; the validation samples in eval mode."""
    made = module(name, device)
    loss = gf.causal_lm_loss if name.startswith("gpt2") else gf.classification_loss
    data = tokens if name.startswith("gpt2") else vectors if name == "network" else sequences
    train, val = data(B, 1, device), data(2, 2, device)
    model_fn, params = gf.functionalize(made, loss)
    g, v = each_alone(model_fn, params, train), eval_gradients(made, loss, val)
    for schedule in ("auto", "two-phase"):
        torch.manual_seed(SEED)
        result = gf.value_and_grad_dot(model_fn, params, train, val, randomness="same", schedule=schedule)
        assert_grads(result.grads, mean(g), 1e-10, schedule)
        assert_dots(result.dots, dots(g, mean(v)), 1e-10, schedule)
    torch.manual_seed(SEED)
    assert_dots(
        gf.ghost_grad_along(model_fn, params, train, mean(v), randomness="same"), dots(g, mean(v)), 1e-10, "along"
    )
    assert_grads(from_factors(model_fn, params, train, randomness="same"), g, 1e-10, "factors")

    with pytest.raises(RuntimeError, match="draws random numbers"):
        gf.ghost_grad_along(model_fn, params, train, params, randomness="error")
    made.eval()
    quiet = gf.ghost_grad_along(model_fn, params, train, params, randomness="error")
    assert_dots(quiet, dots(per_sample_grads(model_fn, params, train), params), 1e-10, "eval mode")


def test_the_masks_of_gpt2_matter(device):
    """The same masks for all samples are not the masks of a plain step."""
    model_fn, params = gf.functionalize(gpt2(device), gf.causal_lm_loss)
    train = tokens(B, 1, device)
    same, different = each_alone(model_fn, params, train), plain_backwards(model_fn, params, train)
    (a, scale), (b, _) = dots(same, params), dots(different, params)
    assert ((a - b).abs() / scale).max() > 1e-3


# ---------------------------------------------------------------- parameters that are dropped


@pytest.mark.parametrize("samples", [B, 5])
def test_one_mask_on_a_weight_is_the_same_for_all(samples, device):
    """The weight's first dimension is as long as a batch of five: a parameter has no samples, whatever its shape."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ F.dropout(p["w"], 0.5) + p["b"]).tanh().flatten(1).mul(p["scale"]).square().sum(1)

    params, x = parameters(device), inputs(device, samples)
    expected = each_alone(model_fn, params, x)
    assert_grads(from_factors(model_fn, params, x, randomness="same"), expected, 1e-10, "DropConnect")


def test_dropout_in_place_on_a_derived_weight(device):
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        dropped = F.dropout(p["w"] * 2, 0.5, inplace=True)
        return (x @ dropped + p["b"]).tanh().flatten(1).mul(p["scale"]).square().sum(1)

    params, x = parameters(device), inputs(device)
    assert_grads(from_factors(model_fn, params, x), plain_backwards(model_fn, params, x), 1e-10, "in place")


def biased_attention(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Attention with a learned bias, of samples whose place an unusual operation hides: it takes the fallback."""
    h = torch.special.i0e(x @ p["w"]).unsqueeze(1)  # [B, 1, T, D]
    bias = p["b"][: T * T].view(T, T)
    out = F.scaled_dot_product_attention(h, h, h, attn_mask=bias, dropout_p=0.4)
    return out.tanh().flatten(1).mul(p["scale"]).square().sum(1)


def with_bias(device: torch.device) -> dict[str, Tensor]:
    return parameters(device) | {"b": torch.linspace(-1, 1, T * T, dtype=torch.float64, device=device)}


def test_the_fallback_draws_in_its_backward_what_it_drew(device):
    params, x = with_bias(device), inputs(device)
    g = plain_backwards(biased_attention, params, x)
    state = torch.get_rng_state()
    assert_grads(from_factors(biased_attention, params, x), g, 1e-10, "fallback")
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- what cannot be shared


def frozen_recurrent() -> Callable[[Tensor], Tensor]:
    layers = nn.LSTM(D, 6, num_layers=2, dropout=0.5, batch_first=True).double().requires_grad_(False)
    return lambda h: layers(h)[0]


def in_no_order(h: Tensor) -> Tensor:
    rows = h.reshape(-1, D)
    chosen = (rows.detach()[:, 0] > 0).nonzero(as_tuple=True)[0]
    return torch.zeros_like(rows).index_add(0, chosen, F.dropout(rows[chosen], 0.5)).view(h.shape)


UNSHARED = {
    "a factory": ("rand", lambda h: h * torch.rand(h.shape, dtype=h.dtype)),
    "stochastic depth": ("bernoulli", lambda h: h * h.new_empty(h.shape[0], 1, 1).bernoulli_(0.5)),
    "a permutation": ("randperm", lambda h: h * torch.randperm(2 * B)[:T, None]),
    "own generator": ("bernoulli", lambda h: h * torch.bernoulli(h.detach().sigmoid(), generator=torch.Generator())),
    "as many numbers as there are negative entries": ("rrelu", lambda h: F.rrelu(h, training=True)),
    "as many numbers as the rates ask for": ("poisson", lambda h: h * torch.poisson(h.detach().exp())),
    "frozen recurrent layers": ("lstm", frozen_recurrent()),
    "rows in no order": ("dropout", in_no_order),
    "an operation that is not known to draw": (
        "fractional_max_pool2d",
        lambda h: F.fractional_max_pool2d(pixels(h), 2, output_size=(1, 2)),
    ),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_what_cannot_be_shared_is_refused_by_name(name):
    op, body = UNSHARED[name]
    params, x = parameters(torch.device("cpu")), inputs(torch.device("cpu"))
    with pytest.raises(gf.UnsupportedUse, match=rf"`{op}\w*` draws random numbers that the samples cannot share"):
        gf.ghost_grad_along(around(body), params, x, params, randomness="same")
    with pytest.raises(RuntimeError, match=rf"`{op}\w*` draws random numbers, and randomness='error'"):
        gf.ghost_grad_along(around(body), params, x, params, randomness="error")


def test_a_drawing_operation_without_a_rule_cannot_be_shared(device):
    params, x = with_bias(device), inputs(device)
    with pytest.raises(gf.UnsupportedUse, match=r"`scaled_dot_product_attention`.*cannot share.*b together with data"):
        gf.ghost_grad_along(biased_attention, params, x, params, randomness="same")


# ---------------------------------------------------------------- validation samples, arguments


@pytest.mark.parametrize(
    "body",
    [
        lambda h, on: torch.dropout(h, 0.5, train=on),
        lambda h, on: F.alpha_dropout(h, 0.5, on),
        lambda h, on: F.feature_alpha_dropout(h, training=on),
        lambda h, on: F.dropout1d(h, training=on),
        lambda h, on: F.rrelu(h, training=on),
        lambda h, on: F.rrelu(h, 0.1, 0.3, on),
    ],
)
def test_validation_samples_run_in_eval_mode(body, device):
    params, x = parameters(device), inputs(device)
    drawing, quiet = (around(lambda h, on=on: body(h, on)) for on in (True, False))
    result = gf.value_and_grad_dot(drawing, params, x, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(result.val_losses, quiet(params, x[:2]), rtol=1e-12, atol=1e-12)
    gf.ghost_grad_along(quiet, params, x, params, randomness="error")  # draws nothing


def unseen(h: Tensor) -> Tensor:
    """Noise that is drawn where no mode sees it."""
    with torch._C.DisableTorchFunction():
        noise = torch.rand(h.shape, dtype=h.dtype, device=h.device)
    return h * noise


def test_numbers_drawn_unseen_are_those_of_a_plain_step(device):
    """`auto` tries both batches at once, sees that the generator has moved, and starts over."""
    params, x = parameters(device), inputs(device)
    g = plain_backwards(around(unseen), params, x)
    torch.manual_seed(SEED)
    assert_grads(gf.value_and_grad_dot(around(unseen), params, x, x[:2]).grads, mean(g), 1e-10, "auto")
    with pytest.raises(RuntimeError, match="randomness='error'"):
        gf.ghost_grad_along(around(unseen), params, x, params, randomness="error")
    with pytest.raises(gf.UnsupportedUse, match="not seen"):
        gf.ghost_grad_along(around(unseen), params, x, params, randomness="same")


@pytest.mark.parametrize("call", [gf.ghost_grad_along, gf.ghost_factors, gf.ghost_grad_dot, gf.value_and_grad_dot])
def test_unknown_randomness_lists_the_known_ones(call):
    params, x = parameters(torch.device("cpu")), inputs(torch.device("cpu"))
    more = {gf.ghost_grad_along: (params,), gf.ghost_factors: ()}.get(call, (x,))
    with pytest.raises(ValueError, match="randomness='some': expected 'different', 'same', 'error'"):
        call(around(torch.tanh), params, x, *more, randomness="some")


def test_verify_says_that_the_model_draws(device):
    params, x = parameters(device), inputs(device)
    with pytest.raises(RuntimeError, match=r"`dropout` draws random numbers.*module\.eval\(\)"):
        gf.verify(around(lambda h: F.dropout(h, 0.5)), params, x)


def test_explain_plans_what_a_call_would_do(device):
    """With dropout active, the batches do not go together; and a plan draws nothing."""
    params, x = parameters(device), inputs(device)
    before = torch.get_rng_state()
    assert gf.explain(around(lambda h: F.dropout(h, 0.5)), params, x, x[:2]).schedule == "two-phase"
    assert gf.explain(around(torch.tanh), params, x, x[:2]).schedule == "joint"
    assert torch.equal(torch.get_rng_state(), before)
