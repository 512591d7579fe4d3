"""What the tests of `ghostfunc.trainer` and its worker share: tiny models, samples of unequal lengths, and runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

VOCABULARY, LENGTH = 24, 9


class Texts(Dataset):
    """Rows of one length, of which the labels are masked to unequal numbers of targets; `sample_id` is 100 - 3 i."""

    def __init__(self, samples: int, seed: int, classes: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for i in range(samples):
            ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
            tokens = 3 + (5 * i + seed) % (LENGTH - 2)  # unequal lengths
            mask = (torch.arange(LENGTH) < tokens).long()
            labels = torch.tensor(i % classes) if classes else ids.masked_fill(mask == 0, -100)
            item = {"input_ids": ids, "attention_mask": mask, "labels": labels, "sample_id": 100 - 3 * i, "text": "t"}
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def gpt2(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, **drops))


def llama() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3, **sizes, **options)
    return BertForSequenceClassification(config)


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    set_by_default = {"per_device_train_batch_size": 3, "learning_rate": 0.05, "num_train_epochs": 1, "seed": 3}
    return TrainingArguments(str(folder), **{**quiet, "optim": "sgd", **set_by_default, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two dicts' tensors, over the tensor's largest entry, or 0.01 where that is smaller."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-2)) for n, t in expected.items())
