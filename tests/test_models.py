"""Architectures of transformers, tiny and random, as they come: exact, with no rule written for any of them."""

import pytest
import torch
import transformers
from cases import Built, Draw
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf

SMALL = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
ATTENTION = {**SMALL, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
GROUPED = {**ATTENTION, "num_key_value_heads": 1, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
NO_DROPOUT_PROB = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CAUSAL = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "query_pre_attn_scalar": 8}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**ATTENTION, **NO_DROPOUT}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {**SMALL, "n_layer": 2, "n_head": 2, **NO_DROPOUT}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**ATTENTION, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {**SMALL, "state_size": 4, "time_step_rank": 2}),
}
CLASSIFIERS = {
    "Bert": ("BertForSequenceClassification", "BertConfig", {**ATTENTION, **NO_DROPOUT_PROB}),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {**ATTENTION, **NO_DROPOUT_PROB, "image_size": 8, "patch_size": 4},
    ),
}


def build(name: str, device: torch.device) -> Built:
    kind, config, options = (CAUSAL | CLASSIFIERS)[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    loss = gf.causal_lm_loss if name in CAUSAL else gf.classification_loss

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(torch.float32, device, seed)
        if name == "ViT":
            return {"pixel_values": draw.normal(n, 3, 8, 8), "labels": draw.ids(2, n)}
        ids = draw.ids(19, n, 6, low=3)
        mask = torch.ones_like(ids)
        mask[-1, 4:] = 0
        return {"input_ids": ids, "attention_mask": mask} | ({"labels": draw.ids(2, n)} if name == "Bert" else {})

    return Built(*gf.functionalize(module.to(device).train(), loss), batch)


@pytest.mark.parametrize("name", [*CAUSAL, *CLASSIFIERS])
def test_exact(name, device):
    """Dots and gradients to 1e-5 of the loop, both schedules, in training mode."""
    model_fn, params, batch = build(name, device)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (per_sample_grads(model_fn, params, b) for b in (train, val))
    for schedule in ("joint", "two-phase"):
        result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
        assert_dots(result.dots, dots(g, mean(v)), 1e-5, f"{name} {schedule}")
        whole = {"all": torch.cat([t.flatten() for t in result.grads.values()])}
        assert_grads(whole, {"all": torch.cat([t.flatten() for t in mean(g).values()])}, 1e-5, f"{name} {schedule}")
