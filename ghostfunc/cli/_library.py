"""The library's calls as the commands make them: a model, a corpus, a projection, from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc import KroneckerProjection
from ghostfunc.cli._config import IndexConfig, RunConfig
from ghostfunc.cli._console import say
from ghostfunc.cli._share import ALONE, Share
from ghostfunc.index import Model, load_model
from ghostfunc.index._build import PROJECTION_FILE
from ghostfunc.text import Corpus, load_tokenizer, open_corpus

_MODEL_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CACHE = "text"
_PCA_SAMPLES = 64  # whose gradients' principal directions "pca" takes


class Opened(NamedTuple):
    """A model, ready for the transforms.

    Attributes:
        model: with its name, tokenizer and fingerprint.
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: by name.
    """

    model: Model
    model_fn: Any
    params: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.params.values())).device


def open_model(name: str, *, dtype: str, device: str, share: Share = ALONE) -> Opened:
    """Load a causal language model; weights that are not trained are told, by one of several processes.

    Raises:
        ValueError: if the dtype or the device is unknown, or it is no causal language model.
        OSError: if there is no such model.
    """
    model = load_model(name, dtype=_dtype(dtype), device=_device(device, share.local_rank))
    if not model.trained and share.rank == 0:
        say(f"{name} has no trained weights: they are random numbers, and scores say nothing about a trained model")
    return Opened(model, *gf.functionalize(model.module, gf.causal_lm_loss))


def tokenizer_of(opened: Opened, name: str | None) -> Any:
    """The tokenizer of that name, or the model's own; None if it has none."""
    return opened.model.tokenizer if name is None else load_tokenizer(name)


def open_own_data(config: RunConfig, opened: Opened) -> Corpus:
    """The corpus of a run; its tokens are kept in the folder of the result, where the next command finds them."""
    return open_data(config.data, config, opened, limit=config.limit, cache=Path(config.out) / _CACHE)


def open_data(
    path: str, config: RunConfig, opened: Opened, *, limit: int | None = None, cache: Path | None = None
) -> Corpus:
    """A corpus, read as a run reads its own, with ids that the model has.

    Raises:
        ValueError: if it is text and there is no tokenizer, or if an id is none of the model's; as `open_corpus`.
        FileNotFoundError: as `open_corpus`.
    """
    tokenizer = tokenizer_of(opened, config.tokenizer)
    if tokenizer is None and not any(Path(path).glob("*.bin")):
        raise ValueError(f"{opened.model.name} comes without a tokenizer: name one with --tokenizer")
    corpus = open_corpus(
        path,
        tokenizer=tokenizer,
        block_size=config.block_size,
        text_field=config.text_field,
        domain_field=config.domain_field,
        limit=limit,
        cache=cache,
    )
    corpus.require_vocabulary(opened.model.vocab_size, opened.model.name)
    return corpus


def projection_of(config: IndexConfig, opened: Opened, corpus: Corpus, *, begun: bool) -> KroneckerProjection:
    """A projection by settings.

    Args:
        config: the settings.
        opened: the model.
        corpus: whose gradients it is for.
        begun: whether `config.out` is an index of these settings, which has it.
    """
    saved = Path(config.out) / PROJECTION_FILE
    if begun and saved.exists():
        return gf.KroneckerProjection.load(saved, opened.device)
    samples = range(0, len(corpus), max(1, len(corpus) // _PCA_SAMPLES))[:_PCA_SAMPLES]
    batches = [to_device(corpus.batch([i]), opened.device) for i in samples] if config.kind == "pca" else None
    return gf.kronecker_projection(
        opened.model_fn,
        opened.params,
        to_device(corpus.batch([0]), opened.device),
        layers=config.layers,
        rank=config.rank,
        min_rank=config.min_rank,
        kind=config.kind,
        seed=config.seed,
        include=tuple(kind.strip() for kind in config.include.split(",") if kind.strip()),
        batches=batches,
    )


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _dtype(name: str) -> torch.dtype:
    if name not in _MODEL_DTYPES:
        raise ValueError(f"--model-dtype {name} is none of {', '.join(_MODEL_DTYPES)}")
    return getattr(torch, name)


def _device(name: str, local_rank: int) -> str:
    """The device to run on; each process of a machine gets a GPU of its own, unless one is named by its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name
