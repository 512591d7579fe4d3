"""Causal language models without weights: from the published sizes of some, or from a folder's config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ghostfunc as gf
from ghostfunc._fake import new_mode

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
_GPT_2: dict[str, Any] = {"vocab_size": 50257, "n_positions": 1024}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**_GPT_2, "n_layer": 12, "n_head": 12, "n_embd": 768}),
    "gpt2-medium": ("gpt2", {**_GPT_2, "n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "gpt2-large": ("gpt2", {**_GPT_2, "n_layer": 36, "n_head": 20, "n_embd": 1280}),
    "gpt2-xl": ("gpt2", {**_GPT_2, "n_layer": 48, "n_head": 25, "n_embd": 1600}),
    "llama-3-8b": ("llama", {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    }),
    "llama-3-70b": ("llama", {
        **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }),
}  # fmt: skip
_ATTENTION = "ghostfunc_causal"


def config_of(name: str) -> Any:
    """The config of a published model, without dropout, or of a folder.

    Raises:
        ValueError: if it is neither.
    """
    from transformers import AutoConfig

    if name in PUBLISHED:
        kind, sizes = PUBLISHED[name]
        without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
        return AutoConfig.for_model(kind, **sizes, **without)
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"--fake {name}: neither a folder with config.json nor one of {', '.join(PUBLISHED)}")
    return AutoConfig.from_pretrained(name)


def build(config: Any, dtype: torch.dtype, *, mode: FakeTensorMode | None = None, checkpointed: bool = False) -> Any:
    """A model of a config in training mode: with random weights, or, in a fake mode, with none.

    Attention is causal and fused: what transformers does with a batch without padding, and cannot see to be allowed
    where tensors have no values.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION, _causal_attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    config.use_cache = False
    with mode or torch.device("cpu"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    module.train()
    if checkpointed:
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return module


def _causal_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **how)


def fake_step(
    name: str, dtype: torch.dtype, samples: tuple[int, int], length: int, *, checkpointed: bool = False
) -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    """`(model_fn, params, train, val, vocabulary)` of a language model and its batches, all fake."""
    config = config_of(name)
    mode = new_mode()
    module = build(config, dtype, mode=mode, checkpointed=checkpointed)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    with mode:
        train, val = ({"input_ids": torch.zeros(size, length, dtype=torch.long)} for size in samples)
    return model_fn, params, train, val, int(module.get_input_embeddings().weight.shape[0])
