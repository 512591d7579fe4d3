"""Causal language models of transformers at tiny sizes: dense, mixtures of experts and state-space models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from cases import Built
from torch import Tensor, nn
from zoo import VOCABULARY, ZooCase, built, causal_lm, tokens

import ghostfunc as gf

IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
DECODER = IDS | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
GROUPED = DECODER | {"num_key_value_heads": 2, "head_dim": 8}
GEMMA = GROUPED | {
    "query_pre_attn_scalar": 8,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2": IDS | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "GPTNeoX": DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "OPT": IDS | {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "word_embed_proj_dim": 8,
    },
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 3},
    "Qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "Qwen3": GROUPED,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Phi": DECODER | {"num_key_value_heads": 2, "qk_layernorm": True},
    "Phi3": DECODER | {"num_key_value_heads": 2, "original_max_position_embeddings": 16},
    "Falcon": IDS | {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 24, "bias": True,
    },
    "Bloom": IDS | {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "Mpt": IDS | {"d_model": 16, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 16},
    "Mixtral": EXPERTS | {"num_local_experts": 4},
    "Qwen2Moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": EXPERTS | {"num_local_experts": 4, "moe_intermediate_size": 12},
    "GptOss": EXPERTS | {
        "num_local_experts": 4, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "DeepseekV3": DECODER | {
        "num_key_value_heads": 4, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
    },
    "Qwen3Next": EXPERTS | {
        "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Mamba": IDS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3},
    "Mamba2": IDS | {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2,
        "chunk_size": 4,
    },
    "RecurrentGemma": IDS | {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "lru_width": 16, "attention_window_size": 4,
    },
    "Rwkv": IDS | {
        "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "context_length": 16,
    },
}  # fmt: skip
CONFIG_CLASSES = {"Gemma3": "Gemma3TextConfig"}
ZERO = {"OPT": ("k_proj.bias",)}
MODEL_CLASSES = {"GPT2": "GPT2LMHeadModel"}


def module_of(architecture: str, **changes: Any) -> nn.Module:
    """A random model of an architecture."""
    build = {key: changes.pop(key) for key in ("attn_implementation", "experts_implementation") if key in changes}
    config = getattr(transformers, CONFIG_CLASSES.get(architecture, f"{architecture}Config"))
    model = getattr(transformers, MODEL_CLASSES.get(architecture, f"{architecture}ForCausalLM"))
    torch.manual_seed(0)
    return model._from_config(config(**CONFIGS[architecture] | changes), **build)


def language(
    architecture: str, note: str = "", *, padding: str = "", zero: tuple[str, ...] = (), **changes: Any
) -> ZooCase:
    """The case of an architecture with changes to its configuration."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        positions = architecture == "GPT2" and padding == "left"
        return causal_lm(module_of(architecture, **changes), dtype, device, padding=padding, positions=positions)

    kernel = changes.get("attn_implementation") or changes.get("experts_implementation") or ""
    words = (architecture, kernel, note, f"padded {padding}" if padding else "")
    return ZooCase(" ".join(filter(None, words)), make, architecture, zero or ZERO.get(architecture, ()), padding)


class Expert(nn.Module):
    """A small MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class UnfusedExperts(nn.Module):
    """A language model whose experts are modules: each takes the rows that chose it, and adds them back."""

    def __init__(self, width: int = 16, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.chosen = chosen

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embedding(input_ids).cumsum(1) / 3  # [B, T, d]
        rows = self.norm(h).flatten(0, 1)  # [B * T, d]
        gates, chosen = self.router(rows).softmax(-1).topk(self.chosen, dim=-1)  # [B * T, k]
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            mixed.index_add_(0, row, expert(rows[row]) * gates[row, place, None])
        return self.head(h + mixed.view_as(h))


def unfused(padding: str) -> ZooCase:
    """The case of experts that are modules."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        torch.manual_seed(0)
        return causal_lm(UnfusedExperts(), dtype, device, padding=padding)

    name = "Unfused experts" + (f" padded {padding}" if padding else "")
    return ZooCase(name, make, "Unfused experts", (), padding)


def balanced(dtype: torch.dtype, device: torch.device) -> Built:
    """Mixtral with the load-balancing loss of its batch added to every sample's loss: the samples interact."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    module = module_of("Mixtral", experts_implementation="eager")

    def call(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        return module(**batch, output_router_logits=True)

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        balance = load_balancing_loss_func(output.router_logits, num_experts=4, top_k=2)
        return gf.causal_lm_loss(output, batch) + 0.1 * balance

    return built(module, loss, tokens(dtype, device), dtype, device, call)


SDPA = ("GPT2", "GPTNeoX", "OPT", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Phi", "Phi3", "Falcon")
EAGER_ONLY = ("Gemma2", "Bloom", "Mpt")
MASKED_STATES = ("Mamba", "Mamba2")
UNMASKED_STATES = ("RecurrentGemma", "Rwkv")  # padding on the left would enter their states
MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe")
KERNELS = ("eager", "batched_mm", "grouped_mm")

NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
LANGUAGE: list[ZooCase] = [
    *(language(name, attn_implementation="eager", padding=side) for name in SDPA + EAGER_ONLY for side in ("", "left")),
    *(language(name, attn_implementation="sdpa", padding=side) for name in SDPA for side in ("", "right")),
    language("GPT2", "untied", tie_word_embeddings=False),
    language("GPTNeoX", "tied, sequential", tie_word_embeddings=True, use_parallel_residual=False),
    language("OPT", "norm after", tie_word_embeddings=False, do_layer_norm_before=False, word_embed_proj_dim=16),
    language("Llama", "tied, with biases", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    language("Qwen2", "tied", tie_word_embeddings=True),
    language("Gemma2", "untied", tie_word_embeddings=False),
    language("Falcon", "new decoder", **NEW_FALCON),
    language("Falcon", "new decoder", attn_implementation="sdpa", padding="left", **NEW_FALCON),
    language("Falcon", "alibi, sequential", alibi=True, parallel_attn=False, multi_query=False, padding="right"),
    language("Bloom", "untied", tie_word_embeddings=False),
    language("Mpt", "untied", tie_word_embeddings=False),
    *(language(name, experts_implementation=kernel, padding=side)
      for name in MIXTURES for kernel in KERNELS for side in ("", "left")),
    *(language(name, padding=side) for name in ("GptOss", "DeepseekV3") for side in ("", "left")),
    *(language("Qwen3Next", experts_implementation=kernel, padding="right") for kernel in ("eager", "grouped_mm")),
    *(unfused(side) for side in ("", "right")),
    *(language(name, padding=side) for name in MASKED_STATES for side in ("", "left", "right")),
    *(language(name, padding=side) for name in UNMASKED_STATES for side in ("", "right")),
]  # fmt: skip
INTERACTING = ZooCase("Mixtral with a load-balancing loss", balanced, "Mixtral")
