"""Dropout in training mode: train rows draw what a plain step draws, val rows run in eval mode."""

import pytest
import torch
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf

N, M, SEED = 4, 3, 7


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(device, torch.float64).train()


def gpt2(device: torch.device, attention: str = "sdpa") -> nn.Module:
    """GPT-2 with its default dropout of 0.1 everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=19, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    module = GPT2LMHeadModel(config)
    module.set_attn_implementation(attention)
    return module.to(device, torch.float64).train()


def vectors(n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=generator).to(device)


def tokens(n: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(19, (n, 6), generator=torch.Generator().manual_seed(seed)).to(device)}


@pytest.fixture(params=["network", "gpt2"])
def case(request, device):
    """`(module, loss, train, val)`."""
    if request.param == "network":
        return network(device), gf.classification_loss, vectors(N, 1, device), vectors(M, 2, device)
    return gpt2(device), gf.causal_lm_loss, tokens(N, 1, device), tokens(M, 2, device)


def plain_backwards(model_fn, params: dict[str, Tensor], train) -> dict[str, Tensor]:
    """Per-sample gradients of one forward of the whole batch under the seed, by N backward passes."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torch.manual_seed(SEED)
    losses = model_fn(leaves, train)
    rows = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(leaves)}


def eval_gradients(module: nn.Module, loss, val) -> dict[str, Tensor]:
    module.eval()
    try:
        return per_sample_grads(*gf.functionalize(module, loss), val)
    finally:
        module.train()


@pytest.mark.parametrize("schedule", ["auto", "two-phase"])
def test_train_rows_draw_what_a_plain_step_draws(case, schedule):
    module, loss, train, val = case
    model_fn, params = gf.functionalize(module, loss)
    g, v = plain_backwards(model_fn, params, train), eval_gradients(module, loss, val)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    assert_grads(result.grads, mean(g), 1e-10, "grads")
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dots")
    torch.manual_seed(SEED)
    assert_dots(gf.ghost_grad_dot(model_fn, params, train, val), dots(g, mean(v)), 1e-10, "dots alone")
    assert all(submodule.training for submodule in module.modules())
    torch.set_rng_state(state)


def test_the_masks_matter(case):
    """Without them the dots are far off, so that the identity above cannot pass by accident."""
    module, loss, train, val = case
    model_fn, params = gf.functionalize(module, loss)
    g, without = plain_backwards(model_fn, params, train), eval_gradients(module, loss, train)
    v = eval_gradients(module, loss, val)
    (want, scale), (other, _) = dots(g, mean(v)), dots(without, mean(v))
    assert ((want - other).abs() / scale).max() > 1e-2


def test_the_generator_ends_where_a_plain_step_leaves_it(case):
    """Training with dots and training without draw the same masks at every step."""
    module, loss, train, val = case
    model_fn, params = gf.functionalize(module, loss)
    torch.manual_seed(SEED)
    with torch.no_grad():
        model_fn(params, train)
    after_plain = torch.get_rng_state()
    torch.manual_seed(SEED)
    gf.value_and_grad_dot(model_fn, params, train, val)
    assert torch.equal(torch.get_rng_state(), after_plain)


def test_val_losses_are_those_of_eval_mode(case):
    module, loss, train, val = case
    model_fn, params = gf.functionalize(module, loss)
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.val_losses, model_fn(params, val), rtol=1e-12, atol=1e-12)


def test_dropout_of_zero_is_joint(device):
    """`nn.Dropout(0)` in training mode draws nothing, so `auto` is free to run both batches at once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.0), nn.Linear(8, 3)).to(device, torch.float64).train()
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    train, val = vectors(N, 1, device), vectors(M, 2, device)
    g, v = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)
    for schedule in ("auto", "joint"):
        assert_dots(
            gf.ghost_grad_dot(model_fn, params, train, val, schedule=schedule), dots(g, mean(v)), 1e-10, schedule
        )


def test_functional_dropout_without_a_module(device):
    """`F.dropout` in a function written by hand: there is no eval mode, the train rows still draw what they should."""

    def model_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        h = torch.nn.functional.dropout(batch[0] @ p["w"], 0.5).tanh()
        return torch.nn.functional.cross_entropy(h @ p["v"], batch[1], reduction="none")

    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for name, shape in {"w": (5, 16), "v": (16, 3)}.items()
    }
    train, val = vectors(N, 1, device), vectors(M, 2, device)
    g = plain_backwards(model_fn, params, train)
    torch.manual_seed(SEED)
    assert_grads(gf.value_and_grad_dot(model_fn, params, train, val).grads, mean(g), 1e-10, "grads")


@pytest.mark.parametrize("schedule", ["auto", "two-phase"])
def test_dropout_on_a_weight(schedule, device):
    """One mask on a weight, for the whole batch: the same mask in the losses, in the gradients and in the dots."""

    def model_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        dropped = torch.nn.functional.dropout(p["w"], 0.5)
        return torch.nn.functional.cross_entropy((batch[0] @ dropped).tanh() @ p["v"], batch[1], reduction="none")

    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for name, shape in {"w": (5, 16), "v": (16, 3)}.items()
    }
    train = vectors(N, 1, device)
    g = plain_backwards(model_fn, params, train)
    torch.manual_seed(SEED)
    assert_dots(gf.ghost_grad_along(model_fn, params, train, params), dots(g, params), 1e-10, "along")
    torch.manual_seed(SEED)
    result = gf.value_and_grad_dot(model_fn, params, train, train, schedule=schedule)
    assert_grads(result.grads, mean(g), 1e-10, "grads")
    without = per_sample_grads(evaluated, params, train)
    assert_dots(result.dots, dots(g, mean(without)), 1e-10, "dots")


def evaluated(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The model above without its dropout."""
    return torch.nn.functional.cross_entropy((batch[0] @ p["w"]).tanh() @ p["v"], batch[1], reduction="none")
