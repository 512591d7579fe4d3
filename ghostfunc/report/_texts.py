"""The texts of a store's rows, and which of their tokens carry a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ghostfunc._call import Params
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc.index import Store, token_batches
from ghostfunc.report._data import Highlights
from ghostfunc.report._tokens import token_scores
from ghostfunc.text import Corpus


class Place(NamedTuple):
    """Where the text of a row is: a sample of a corpus."""

    corpus: Corpus
    sample: int


class Texts:
    """The corpora of a store's sources.

    Args:
        store: the store.
        corpora: those that are at hand, found by their fingerprints.

    Raises:
        ValueError: for a corpus that the store has no rows of.

    Attributes:
        missing: the names of the sources without a corpus.
    """

    def __init__(self, store: Store, corpora: Sequence[Corpus]) -> None:
        given = {corpus.fingerprint: corpus for corpus in corpora}
        sources = store.fingerprints
        for fingerprint, corpus in given.items():
            if fingerprint not in sources.values():
                known = ", ".join(f"{name!r} ({of[:12]})" for name, of in sources.items())
                raise ValueError(
                    f"corpora: {corpus.name!r} ({fingerprint[:12]}) is none of the sources of {store.folder.name}: "
                    f"{known}. Open it as it was when it was indexed: the same files, tokenizer and block size."
                )
        self._of_rows = [(store.sources[name], given[of]) for name, of in sources.items() if of in given]
        self.missing = tuple(name for name, of in sources.items() if of not in given and len(store.sources[name]))

    def places(self, rows: Sequence[int]) -> dict[int, Place]:
        """Where the texts of rows are; rows without one are left out."""
        return {row: Place(corpus, row - of.start) for row in rows for of, corpus in self._of_rows if row in of}


class Highlighter:
    """Divides scores over tokens.

    Args:
        model_fn: of the index.
        params: of the index.
        projection: of the index.
        token_budget: of a batch, padding included.

    Attributes:
        untokened: the parameters that could not be divided so far.
    """

    def __init__(self, model_fn: ModelFn, params: Params, projection: KroneckerProjection, token_budget: int) -> None:
        self._model_fn, self._params, self._projection = model_fn, params, projection
        self._token_budget = token_budget
        self._device = next(iter(params.values())).device
        self.untokened: dict[str, None] = {}

    def highlights(
        self, places: Mapping[int, Place], dots: Mapping[int, float], query: Tensor
    ) -> dict[int, Highlights]:
        """The highlights of rows for a query.

        Args:
            places: of each row's text.
            dots: the inner product of each row, as it is stored, with the query.
            query: `[dim]`.
        """
        found = {}
        for corpus, rows in self._batches(places):
            batch = {
                name: tensor.to(self._device) for name, tensor in corpus.batch([places[r].sample for r in rows]).items()
            }
            scores = token_scores(self._model_fn, self._params, batch, self._projection, query)
            self.untokened |= dict.fromkeys(scores.untokened)
            shares = zip(rows, scores.tokens.cpu().double(), scores.elsewhere.tolist(), strict=True)
            for row, tokens, elsewhere in shares:
                pieces = tuple(corpus.token_texts(places[row].sample))
                own = tuple(tokens[: len(pieces)].tolist())
                found[row] = Highlights(pieces, own, elsewhere, dots[row] - sum(own) - elsewhere)
        return found

    def _batches(self, places: Mapping[int, Place]) -> Iterator[tuple[Corpus, list[int]]]:
        """Rows of one corpus whose samples fit the token budget together."""
        for corpus in dict.fromkeys(place.corpus for place in places.values()):
            own = [row for row, place in places.items() if place.corpus is corpus]
            lengths = corpus.lengths[[places[row].sample for row in own]]
            for batch in token_batches(lengths, self._token_budget):
                yield corpus, [own[number] for number in batch]
