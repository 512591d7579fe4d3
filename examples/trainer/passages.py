"""What both fine-tuning scripts share: passages of text that come with Python, a tokenizer, and a model.

Three kinds of passages are trained on: Python's manual, its library's code, and lists of the names of characters.
Validation is on other passages of the manual.
"""

import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

CHARACTERS = 360  # of a passage
TOKENS = 128  # of a passage, at most
EACH = 160  # passages of a kind
VALIDATION = 24
VOCABULARY = 2048
END = "<|endoftext|>"


def load_data() -> tuple[Dataset, Dataset]:
    """The passages to train on and those to validate on, with the columns `text` and `kind`."""
    pages = list(_cut(text for _, text in sorted(topics.items())))
    drawn = random.Random(0)
    drawn.shuffle(pages)
    manual, validation = pages[:EACH], pages[EACH : EACH + VALIDATION]
    library = Path(sysconfig.get_path("stdlib"))
    code = list(_cut(path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-h]*.py"))))
    names = (unicodedata.name(chr(point), "") for point in range(0x20, 0x2000))
    kinds = {
        "manual": manual,
        "code": drawn.sample(code, EACH),
        "names": list(_cut(["\n".join(filter(None, names))]))[:EACH],
    }
    train = [{"text": text, "kind": kind} for kind, texts in kinds.items() for text in texts]
    return Dataset.from_list(train), Dataset.from_list([{"text": text, "kind": "manual"} for text in validation])


def load_model(name: str, texts: list[str]) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: a folder or a name on the hub; empty for a small GPT-2 that knows nothing, with a byte-pair encoding of
            its own.
        texts: what the encoding is made from.
    """
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name), tokenizer
    encoding = ByteLevelBPETokenizer()
    encoding.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoding._tokenizer,
        pad_token=END,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=TOKENS,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=0,  # END
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), tokenizer


def tokenized(data: Dataset, tokenizer: Any) -> Dataset:
    """The data with the columns that a model takes beside its own."""
    return data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=TOKENS), batched=True)


def _cut(texts: Any) -> Iterator[str]:
    """Passages of about one length, from line to line."""
    for text in texts:
        passage = ""
        for line in text.splitlines(keepends=True):
            passage += line
            if len(passage) >= CHARACTERS:
                yield passage.strip()
                passage = ""
