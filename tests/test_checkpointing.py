"""Activation checkpointing: the backward runs parts of the forward again, with the parameters of the call."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ghostfunc as gf

Params = dict[str, Tensor]


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=13, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=13, max_position_embeddings=8))


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=13, dropout_rate=0, decoder_start_token_id=0))


def seq2seq_loss(output: object, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = output.logits  # type: ignore[attr-defined]
    return F.cross_entropy(logits.mT, batch["decoder_input_ids"], reduction="none").mean(1)


def enable_checkpointing(module: nn.Module, *, use_reentrant: bool) -> None:
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def moved(params: Params) -> Params:
    """Parameters that are not the module's own: a recomputation with the module's is off by as much."""
    generator = torch.Generator().manual_seed(5)
    return {k: p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_transformers_with_params_of_their_own(make, schedule):
    module = make().double().train()
    lm = make is not t5
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss if lm else seq2seq_loss)
    params = moved(params)

    def batch(n: int) -> dict[str, Tensor]:
        ids = {"input_ids": torch.randint(13, (n, 6))}
        return ids if lm else {**ids, "decoder_input_ids": torch.randint(13, (n, 5))}

    train, val = batch(4), batch(3)
    reference, of_val = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)

    plain = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    enable_checkpointing(module, use_reentrant=True)
    before = {name: vars(m).copy() for name, m in module.named_modules()}
    result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    tolerance = 1e-10 if make is gpt2 else 1e-6  # the others compute their norms in float32
    assert_dots(result.dots, dots(reference, mean(of_val)), tolerance, "dots")
    assert_grads(result.grads, mean(reference), tolerance, "grads")
    torch.testing.assert_close(result.dots, plain.dots, rtol=1e-12, atol=0)
    for name, m in module.named_modules():
        assert vars(m)["_parameters"] == before[name]["_parameters"]
        assert vars(m).get("gradient_checkpointing") == before[name].get("gradient_checkpointing")
        assert vars(m).get("_gradient_checkpointing_func") is before[name].get("_gradient_checkpointing_func")


def test_layers_are_recomputed():
    """Each layer runs twice: once forward, once in the backward; so activations were not kept."""
    module = llama().double().train()
    enable_checkpointing(module, use_reentrant=False)
    calls = []
    for layer in module.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    batch = {"input_ids": torch.randint(13, (3, 6))}
    gf.ghost_grad_along(model_fn, params, batch, params)
    assert len(calls) == 2 * len(module.model.layers)
    model_fn(params, batch)  # outside of a call nothing would swap the parameters in again: nothing is checkpointed
    assert len(calls) == 3 * len(module.model.layers)
    assert module.model.layers[0].gradient_checkpointing


def by_closure(p: Params, batch: dict[str, Tensor]) -> Tensor:
    h = checkpoint(lambda x: F.linear(x, p["w"], p["b"]).tanh(), batch["x"], use_reentrant=False)
    h = checkpoint(lambda x: F.layer_norm(F.linear(x, p["w"] * 2), (4,), p["s"]), h, use_reentrant=False)
    return (h * p["s"]).pow(2).mean((1, 2))


def by_arguments(p: Params, batch: dict[str, Tensor]) -> Tensor:
    def layer(x: Tensor, w: Tensor, wt: Tensor, mask: Tensor) -> Tensor:
        return (F.linear(x, w) @ wt * mask).tanh() + x.new_ones(4) * p["b"]

    h = checkpoint(layer, batch["x"], p["w"], p["w"].t(), batch["mask"], use_reentrant=False)
    return checkpoint(lambda h: h.exp() * p["s"], h, use_reentrant=False).mean((1, 2))


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("model_fn", [by_closure, by_arguments])
def test_written_by_hand(model_fn, schedule):
    torch.manual_seed(0)
    params = {
        "w": torch.randn(4, 4, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64),
        "s": torch.randn(4, dtype=torch.float64),
    }  # fmt: skip
    # Four positions in all: rows and weights have one shape, which torch's own check of the recomputation can't tell.
    batches = [{"x": torch.randn(n, 1, 4).double(), "mask": (torch.rand(n, 1, 1) > 0.3).double()} for n in (2, 2)]
    train, val = batches
    result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    reference = per_sample_grads(model_fn, params, train)
    assert_dots(result.dots, dots(reference, mean(per_sample_grads(model_fn, params, val))), 1e-10, "dots")
    assert_grads(result.grads, mean(reference), 1e-10, "grads")


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.head, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=self.reentrant))


def classes(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def test_a_module_that_checkpoints_by_itself():
    model_fn, params = gf.functionalize(Checkpointed(reentrant=False).double(), gf.classification_loss)
    plain_fn, _ = gf.functionalize(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), gf.classification_loss
    )
    params, train, val = moved(params), classes(4), classes(3)
    as_plain = dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), params.values(), strict=True))
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    reference = per_sample_grads(plain_fn, as_plain, train)
    assert_dots(result.dots, dots(reference, mean(per_sample_grads(plain_fn, as_plain, val))), 1e-10, "dots")


def test_other_weights_are_refused():
    """`functional_call` by hand puts the module's own weights back before the backward."""
    module = Checkpointed(reentrant=False).double()

    def model_fn(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = torch.func.functional_call(module, params, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    params = moved({name: p.detach() for name, p in module.named_parameters()})
    with pytest.raises(gf.UnsupportedUse, match=r"checkpointing .* again with a module's own parameters"):
        gf.ghost_grad_dot(model_fn, params, classes(4), classes(4))


def test_reentrant_is_refused():
    model_fn, params = gf.functionalize(Checkpointed(reentrant=True).double(), gf.classification_loss)
    train = (classes(4)[0].requires_grad_(), classes(4)[1])
    with pytest.raises(gf.UnsupportedUse, match=r"use_reentrant=False"):
        gf.ghost_grad_along(model_fn, params, train, params)
