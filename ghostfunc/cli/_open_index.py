"""An index with all that a question to it needs: its model, its projection, and the text of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ghostfunc as gf
from ghostfunc import KroneckerProjection
from ghostfunc.cli._config import IndexConfig
from ghostfunc.cli._library import Opened, open_data, open_model, open_own_data, tokenizer_of
from ghostfunc.cli._run_files import run_files
from ghostfunc.index import Store
from ghostfunc.index._build import PROJECTION_FILE
from ghostfunc.text import Corpus, TextCorpus


class Index(NamedTuple):
    """An index that can be asked.

    Attributes:
        store: its rows.
        configs: the settings of its data, in the order in which they were added.
        opened: the model that it was made with.
        projection: of its gradients.
    """

    store: Store
    configs: list[IndexConfig]
    opened: Opened
    projection: KroneckerProjection


def open_index(folder: str, *, model: str | None, device: str) -> Index:
    """Open an index and the model that it was made with.

    Args:
        folder: the index.
        model: where its model is, if it is not where it was.
        device: where the model shall run.

    Returns:
        The index.

    Raises:
        ValueError: if the folder holds no complete index of `ghostfunc index`, or if the model is another one.
    """
    store = Store(folder)
    files = run_files(store.folder)
    if files and not store.complete:
        raise ValueError(f"{folder} is not complete: ghostfunc index --config {files[-1]} goes on with it")
    if not files or not (store.folder / PROJECTION_FILE).exists():
        missing = "run.yaml" if not files else PROJECTION_FILE
        raise ValueError(f"{folder} has no {missing}: it was not written by ghostfunc index, which alone can be asked")
    configs = [IndexConfig.of({}, file) for file in files]
    first = configs[0]
    name = model or first.model
    try:
        opened = open_model(name, dtype=first.model_dtype, device=device)
    except OSError as error:
        raise ValueError(f"{error}. If the model of {folder} has moved, say where it is with --model") from error
    made_with = store.manifest["model"].get("fingerprint")
    if opened.model.fingerprint != made_with:
        raise ValueError(
            f"{name} is not the model of {folder}: its fingerprint is {opened.model.fingerprint}, the index was made "
            f"with {made_with}. Say where that one is with --model"
        )
    return Index(store, configs, opened, gf.KroneckerProjection.load(store.folder / PROJECTION_FILE, opened.device))


def open_queries(index: Index, prompts: Sequence[str], file: str | None) -> Corpus:
    """Prompts or a file as queries, tokenized and cut as the index's data were.

    Raises:
        ValueError: if there are neither or both.
    """
    if bool(prompts) == (file is not None):
        raise ValueError("name the queries: prompts, or a file of them with --file")
    config = index.configs[0]
    if file is not None:
        return open_data(file, config, index.opened)
    tokenizer = tokenizer_of(index.opened, config.tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"{index.opened.model.name} comes without a tokenizer: name queries of token files with --file"
        )
    corpus = TextCorpus.of(prompts, tokenizer=tokenizer, block_size=config.block_size)
    short = next((i for i, length in enumerate(corpus.lengths) if length < 2), None)
    if short is not None:
        raise ValueError(f"the prompt {corpus.text(short)!r} has one token, after which nothing is predicted: say more")
    return corpus


def open_corpora(index: Index, elsewhere: Sequence[str]) -> tuple[dict[str, Corpus], list[str]]:
    """The data of an index, to show its text.

    Args:
        index: the index.
        elsewhere: where data may be that has moved.

    Returns:
        The corpora by the name of their source, and a sentence for each that is not to be had.
    """
    sources = {fingerprint: name for name, fingerprint in index.store.fingerprints.items()}
    found: dict[str, Corpus] = {}
    reasons: list[str] = []
    for config in index.configs:
        for path in (config.data, *elsewhere):
            try:
                corpus = _data_at(path, config, index.opened)
            except (OSError, ValueError) as error:  # a search without text is worth more than none
                reasons.append(str(error))
                continue
            name = sources.get(corpus.fingerprint)
            if name is not None:
                found[name] = corpus
                break
            reasons.append(f"{path} holds other data now")
    missing = [name for name in sources.values() if name not in found]
    why = "; ".join(dict.fromkeys(reasons))
    return found, [f"the text of {name} is not shown ({why}). Say where it is with --data" for name in missing]


def _data_at(path: str, config: IndexConfig, opened: Opened) -> Corpus:
    if path == config.data:
        return open_own_data(config, opened)
    return open_data(path, config, opened, limit=config.limit)
