"""A tiny world for the command: a model folder with a tokenizer, and texts of three domains."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
DOCUMENTS = 24


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """A fresh GPT-2 with weights, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = vocabulary[END]
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=len(vocabulary), n_positions=64, bos_token_id=end, eos_token_id=end
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


def text_of(number: int) -> tuple[str, str]:
    """The domain and the text of a document."""
    domain = ("code", "poem", "math")[number % 3]
    text = {
        "code": f"def f{number}(x):\n    return x + {number}\n",
        "poem": f"The {number} roses are red,\nthe {number} violets blue.",
        "math": f"{number} + {number} = {2 * number}; {number} * {number} = {number**2}.",
    }[domain]
    return domain, text


def make_texts(file: Path, numbers: range = range(DOCUMENTS)) -> Path:
    """Documents in the Pile's format."""
    lines = []
    for number in numbers:
        domain, text = text_of(number)
        lines.append(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
