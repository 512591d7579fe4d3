"""The arithmetic of each quantity, counted by hand: what the concatenated batch costs, and what each pass adds."""

import pytest
import torch
import torch.nn.functional as F
from cases import Draw
from counting import counted, flops, plain_step
from torch import Tensor

import ghostfunc as gf

CPU = torch.device("cpu")


def two_layers(n: int, m: int, positions: int, width: int, hidden: int):
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(F.linear(x, p["up"], p["up_b"]).relu(), p["down"])
        return h.pow(2).mean((1, 2))

    params = Draw(torch.float32, CPU).params(up=(hidden, width), up_b=(hidden,), down=(width, hidden))
    train, val = (Draw(torch.float32, CPU, seed).normal(k, positions, width) for k, seed in ((n, 1), (m, 2)))
    return model_fn, params, train, val


def test_plain_step_by_hand():
    """The counter agrees with the count by hand: forward, weight gradients, and the second layer's input gradient."""
    model_fn, params, train, _ = two_layers(4, 1, 16, 32, 64)
    product = 2 * 4 * 16 * 32 * 64
    assert flops(lambda: plain_step(model_fn, params, train)) == 5 * product


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize(("n", "m", "positions"), [(4, 1, 128), (4, 4, 128), (2, 8, 64)])
def test_dots_cost_the_concatenated_batch(n, m, positions, schedule):
    """Five products per row of the train and val batches, and for each sample one pass over each weight's size.

    The pass is the contraction of a sample's gradient tile with the direction. The bias has a pass of its own.
    """
    width, hidden = 64, 96
    model_fn, params, train, val = two_layers(n, m, positions, width, hidden)
    products = 5 * 2 * (n + m) * positions * width * hidden
    passes = 2 * n * (2 * width * hidden + hidden)
    assert flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)) == products + passes


@pytest.mark.parametrize("m", [1, 3])
def test_the_matrix_costs_a_pass_for_each_val_sample(m):
    n, positions, width, hidden = 4, 128, 64, 96
    model_fn, params, train, val = two_layers(n, m, positions, width, hidden)
    products = 5 * 2 * (n + m) * positions * width * hidden
    passes = 2 * n * m * (2 * width * hidden + hidden)
    assert flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val, out="train val")) == products + passes


@pytest.mark.parametrize(("n", "m"), [(4, 1), (4, 4)])
def test_one_direction_for_many_micro_batches(n, m):
    """Along a direction that exists already, a gradient is not computed a second time."""
    positions, width, hidden = 128, 64, 96
    model_fn, params, train, _ = two_layers(n, m, positions, width, hidden)
    product = 2 * n * positions * width * hidden
    found = flops(lambda: gf.ghost_grad_along(model_fn, params, train, params))
    assert 5 * product <= found <= 5.2 * product  # XV, then row dots: as much as the weight gradients it replaces


def test_norms_cost_a_plain_step():
    """Each sample's gradient is made once, in tiles; squaring their entries is no product, and a pass over each."""
    n, positions, width, hidden = 4, 128, 64, 96
    model_fn, params, train, _ = two_layers(n, 1, positions, width, hidden)
    found = counted(lambda: gf.ghost_grad_norm(model_fn, params, train))
    assert found.total_flops == 5 * 2 * n * positions * width * hidden
    plain = counted(lambda: plain_step(model_fn, params, train))
    assert found.entries - plain.entries <= 2 * n * 2 * width * hidden


def test_everything_at_once():
    """Tiles that are made once serve the gradient, dots, the matrix, the Gram matrix and norms: a pass for each."""
    n, m, positions, width, hidden = 4, 2, 128, 64, 96
    model_fn, params, train, val = two_layers(n, m, positions, width, hidden)
    want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "gram": gf.Gram(), "norms": gf.Norm()}
    products = 5 * 2 * (n + m) * positions * width * hidden
    passes = 2 * n * (1 + m + n) * (2 * width * hidden + hidden)
    found = flops(lambda: gf.ghost_quantities(model_fn, params, train, val, want=want))
    assert products <= found <= products + passes


def gpt2(*, tied: bool, layers: int, width: int, heads: int, vocabulary: int, positions: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, n_positions=positions,
        tie_word_embeddings=tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return gf.functionalize(GPT2LMHeadModel(config), gf.causal_lm_loss)


def ratio(*, tied: bool, n: int, m: int, positions: int, **size: int) -> float:
    """FLOPs of `value_and_grad_dot` over those of a plain training step on the train batch."""
    model_fn, params = gpt2(tied=tied, positions=positions, **size)
    train, val = ({"input_ids": torch.randint(size["vocabulary"], (k, positions))} for k in (n, m))
    plain = flops(lambda: plain_step(model_fn, params, train))
    return flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val)) / plain


@pytest.mark.parametrize(("tied", "bound"), [(False, 1.26), (True, 1.28)])
def test_a_narrow_gpt2(tied, bound):
    """At least the concatenated batch, (B + Bv) / B, and little beside it. A narrow model pays more for the passes."""
    measured = ratio(tied=tied, n=4, m=1, positions=128, layers=2, width=96, heads=2, vocabulary=1000)
    print(f"FLOPs of value_and_grad_dot over a plain step, {'tied' if tied else 'untied'}: {measured:.4f}")
    assert 1.25 <= measured <= bound


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gpt2_small(tied):
    """12 layers of 768, vocabulary 50257, B = 4, Bv = 1, T = 256."""
    measured = ratio(tied=tied, n=4, m=1, positions=256, layers=12, width=768, heads=12, vocabulary=50257)
    print(f"FLOPs of value_and_grad_dot over a plain step, {'tied' if tied else 'untied'}: {measured:.4f}")
    assert 1.25 <= measured <= 1.256
