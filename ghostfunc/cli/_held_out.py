"""Passages of the data that an index does not have, as queries to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow

from ghostfunc.cli._library import open_data
from ghostfunc.cli._open_index import Index
from ghostfunc.text import Corpus


class Selection(Corpus):
    """Some samples of a corpus, as a corpus.

    Args:
        corpus: the corpus.
        chosen: the numbers of its samples, in the order in which they are wanted.
        name: of the selection.
    """

    def __init__(self, corpus: Corpus, chosen: Sequence[int], name: str) -> None:
        self._corpus, self._chosen = corpus, [int(i) for i in chosen]
        self.name = name
        self.fingerprint = f"{corpus.fingerprint} {self._chosen}"
        self.block_size = corpus.block_size
        self.lengths = corpus.lengths[self._chosen]

    def tokens(self, i: int) -> np.ndarray:
        """The token ids of sample i."""
        return self._corpus.tokens(self._chosen[i])

    def text(self, i: int) -> str:
        """The text of sample i."""
        return self._corpus.text(self._chosen[i])

    def token_texts(self, i: int) -> list[str]:
        """The text of each token of sample i."""
        return self._corpus.token_texts(self._chosen[i])

    def samples(self, start: int, stop: int) -> Any:
        """What is known about the samples from `start` to before `stop`, as a `pyarrow.Table`."""
        tables = [self._corpus.samples(i, i + 1) for i in self._chosen[start:stop]]
        return pyarrow.concat_tables(tables or [self._corpus.samples(0, 0)])

    def largest_id(self) -> tuple[int, int]:
        """The largest token id, and the first sample that has it."""
        largest = [int(self.tokens(i).max(initial=0)) for i in range(len(self))]
        return max(largest), int(np.argmax(largest))


def held_out_samples(index: Index, count: int) -> Corpus:
    """Samples of the first data of an index that come after its limit, spread evenly over their documents.

    A document that the index has a part of gives none.

    Raises:
        ValueError: if there are not so many.
    """
    config = index.configs[0]
    corpus = open_data(config.data, config, index.opened)
    table = corpus.samples(0, len(corpus))
    documents = table["document"].to_pylist()
    rows = len(documents) if config.limit is None else min(config.limit, len(documents))
    indexed = set(documents[:rows])
    left = [i for i in range(rows, len(documents)) if documents[i] not in indexed and corpus.lengths[i] > 1]
    if len(left) < count:
        raise ValueError(
            f"--held-out {count}: {config.data} has {len(left)} samples of documents that are not in the index. Build "
            "it with --limit, or name queries with --file"
        )
    return Selection(corpus, [left[number * len(left) // count] for number in range(count)], "held out")
