"""Causal language models to train: GPT-2 in four sizes, or any model that transformers knows."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging


class GPT2Size(NamedTuple):
    """What tells one GPT-2 from another."""

    n_layer: int
    n_embd: int
    n_head: int


ARCHITECTURES = {
    "GPT2-Small": GPT2Size(n_layer=12, n_embd=768, n_head=12),
    "GPT2-Medium": GPT2Size(n_layer=24, n_embd=1024, n_head=16),
    "GPT2-Large": GPT2Size(n_layer=36, n_embd=1280, n_head=20),
    "GPT2-Nano": GPT2Size(n_layer=4, n_embd=128, n_head=4),
}
POSITIONS = 1024


class DataVocabulary(NamedTuple):
    """What the tokenizer script wrote about its tokens."""

    size: int
    end_of_text: int


GPT2_VOCABULARY = DataVocabulary(size=50257, end_of_text=50256)


def data_vocabulary(data_dir: str | Path) -> DataVocabulary | None:
    """Read the vocabulary of tokenized data from its `meta.json`; None without one.

    Raises:
        ValueError: if `meta.json` does not hold `vocab_size`.
    """
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        size = int(meta["vocab_size"])
        return DataVocabulary(size, int(meta.get("eot", size - 1)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say the data's vocab_size ({error!r}): write it again with "
            f"python examples/shared/data_processing/tokenize_pile_by_domain.py --output_dir {path.parent}"
        ) from error


def quiet_transformers() -> None:
    """Keep transformers to errors, and its progress bars away."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def model_config(
    architecture: str, model: str | None, vocabulary: DataVocabulary | None, block_size: int
) -> PreTrainedConfig:
    """The configuration of the model to train, checked against the data.

    Args:
        architecture: a key of `ARCHITECTURES`, read where `model` is None. Its vocabulary is the data's and its dropout
            is 0: a sample of a pretraining run is seen about once, and GPT-2's default of 0.1 would add noise to dots.
        model: a folder or a hub name; its own configuration is kept, dropout included.
        vocabulary: the data's; None where it is not known, and then GPT-2's is taken.
        block_size: tokens in a sample.

    Raises:
        ValueError: if nothing readable is there, if the model's vocabulary is smaller than the data's, or if it has
            fewer positions than a sample has tokens.
    """
    if model is None:
        size, end_of_text = vocabulary or GPT2_VOCABULARY
        config = GPT2Config(
            **ARCHITECTURES[architecture]._asdict(),
            n_positions=POSITIONS,
            vocab_size=size,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        name = architecture
    else:
        config, name = _config_from(model), model
    require_fit(config, name, vocabulary, block_size)
    config.use_cache = False  # a cache of keys and values serves generation only
    return config


def require_fit(config: PreTrainedConfig, name: str, vocabulary: DataVocabulary | None, block_size: int) -> None:
    """Refuse data that a model cannot read.

    Args:
        config: of the model.
        name: of the model, for the message.
        vocabulary: of the data; None where it is not known.
        block_size: tokens of a sample.

    Raises:
        ValueError: if the model's vocabulary is smaller than the data's, or if it has fewer positions than a sample has
            tokens.
    """
    if vocabulary is not None and config.vocab_size < vocabulary.size:
        raise ValueError(
            f"the data's vocabulary (vocab_size {vocabulary.size} in its meta.json) is larger than that of {name} "
            f"({config.vocab_size}): tokenize again with the model's tokenizer: python "
            f"examples/shared/data_processing/tokenize_pile_by_domain.py --tokenizer {name} --output_dir NEW_FOLDER, "
            "and name that folder with --data_dir"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ValueError(
            f"--block_size {block_size} is more than the {positions} positions of {name}: use --block_size {positions} "
            "or less"
        )


def _config_from(model: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model}: neither a folder with a config.json nor a causal model's name on the hub that can be "
            f"reached from here ({_first_line(error)})"
        ) from error


def build_model(config: PreTrainedConfig, pretrained: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model, on the CPU and in training mode.

    Args:
        config: as from `model_config`.
        pretrained: the folder or hub name of the weights; None draws fresh ones with torch's random numbers, in
            float32 and cast then, so that every dtype starts from the same draw.
        dtype: of the parameters.

    Raises:
        ValueError: if there are no weights, or if transformers has no causal model of this kind.
    """
    try:
        if pretrained is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(pretrained, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        hint = "" if pretrained is None else " For fresh weights of this configuration add --model_init fresh."
        raise ValueError(f"cannot build {config.model_type} for causal LM: {_first_line(error)}{hint}") from error
    return model.train()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
