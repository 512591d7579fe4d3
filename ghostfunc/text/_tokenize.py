"""From documents to one uint16 token file per domain and split, resumed where an earlier run stopped.

Documents are read as a stream, tokenized by several processes and written in their order, each followed by the
end-of-text token.
"""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghostfunc.text._documents import Document
from ghostfunc.text._layout import SPLITS, TOKEN
from ghostfunc.text._sources import Batch, Source
from ghostfunc.text._token_writer import TokenWriter, finished_run, only_writer
from ghostfunc.text._tokenizers import PACKAGED_TOKENIZER, encoder, tokenizer_fingerprint

HELD_OUT_FRACTION = 0.05  # for validation, and as much again for test
_LARGEST_VOCABULARY = 1 << 16  # ids are stored as uint16


class Progress(NamedTuple):
    """How far `tokenize` is.

    Attributes:
        source: the name of the source that is being read.
        tokens: written up to now, by earlier runs too.
        fraction_read: of all bytes of the sources; 0 where they have no size.
    """

    source: str
    tokens: int
    fraction_read: float


class EncodedDocument(NamedTuple):
    """A document ready to be written.

    Attributes:
        split: the split it belongs to.
        domain: its domain as the data set gives it.
        ids: its token ids as little-endian uint16, end-of-text last.
    """

    split: str
    domain: str
    ids: bytes


class Encoder:
    """Turns documents into token ids.

    Args:
        tokenizer_file: a `tokenizer.json`.
        eot: the end-of-text id.
        max_length: keep at most this many tokens of a document, not counting end-of-text; None keeps all.
    """

    def __init__(self, tokenizer_file: Path, eot: int, max_length: int | None) -> None:
        self._tokenizer = encoder(tokenizer_file.read_text(encoding="utf-8"))
        self._eot = eot
        self._max_length = max_length

    def __call__(self, documents: list[Document], split: str, to_cut: Sequence[str]) -> list[EncodedDocument]:
        """Encode a batch.

        Args:
            documents: the batch.
            split: the split of the source that it comes from.
            to_cut: splits that are cut out of it by `cut_split`.

        Returns:
            The encoded documents in the same order.
        """
        return [
            EncodedDocument(cut_split(document.text, split, to_cut), document.domain, self._encode(document.text))
            for document in documents
        ]

    def _encode(self, text: str) -> bytes:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: self._max_length]
        return np.array([*ids, self._eot], dtype=TOKEN).tobytes()


def cut_split(text: str, split: str, to_cut: Sequence[str]) -> str:
    """Assign a document to a split by a hash of its text, so that equal documents never stand on both sides.

    Args:
        text: the document.
        split: its split unless the hash chooses another.
        to_cut: the splits that get `HELD_OUT_FRACTION` of the documents each.

    Returns:
        The split; the same in every run, on every machine.

    Example:
        >>> splits = [cut_split(str(i), "train", ["validation", "test"]) for i in range(1000)]
        >>> [splits.count(split) for split in ("train", "validation", "test")]
        [896, 53, 51]
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    slot = int(int.from_bytes(digest, "big") / 2**64 / HELD_OUT_FRACTION)
    return to_cut[slot] if slot < len(to_cut) else split


def require_token_files(tokenizer: Any, name: str) -> None:
    """Check that token files can hold what a tokenizer gives.

    Raises:
        ValueError: if it has more than 65536 ids or no end-of-text token.
    """
    if len(tokenizer) > _LARGEST_VOCABULARY:
        raise ValueError(
            f"the tokenizer {name} has {len(tokenizer)} ids, but token files hold uint16, at most "
            f"{_LARGEST_VOCABULARY}: choose a smaller one, such as the packaged {PACKAGED_TOKENIZER}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end-of-text token (eos_token), which has to end every document")


def tokenize(
    sources: Sequence[Source],
    tokenizer: Any,
    output_dir: Path,
    *,
    tokenizer_name: str = PACKAGED_TOKENIZER,
    num_proc: int = 1,
    batch_size: int = 500,
    max_length: int | None = None,
    max_tokens: int | None = None,
    progress_interval: int = 10_000,
    progress: Callable[[Progress], object] = lambda progress: None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Write the token files of all sources, going on where an interrupted run stopped.

    Where the sources have no validation or no test split, it is cut out of the training documents by `cut_split`.

    Args:
        sources: what to read, in reading order, from `open_sources`.
        tokenizer: from `load_tokenizer`, of at most 65536 ids and with an end-of-text token.
        output_dir: where `train-<domain>.bin`, `val/`, `test/`, `tokenizer/` and `meta.json` go.
        tokenizer_name: what `meta.json` calls the tokenizer.
        num_proc: processes that tokenize.
        batch_size: documents that a process gets at once.
        max_length: keep at most this many tokens of a document, not counting its end-of-text; None keeps all.
        max_tokens: stop with the document that reaches this many tokens; None reads all. Validation and test splits
            of the sources' own get `HELD_OUT_FRACTION` of it each.
        progress_interval: documents between resume points.
        progress: is told how far it is, at the beginning and after every batch.
        say: is told that a run goes on, or that it is finished already.

    Returns:
        What `meta.json` holds: `vocab_size`, `eot`, `tokenizer`, `domains` (`{domain: {split: tokens}}`, domains as in
        file names), and the settings and sources by which the run is known.

    Raises:
        FileExistsError: if the folder holds other data, or if another process is writing there.
        ValueError: if the tokenizer does not fit token files, or if a document is damaged.
    """
    require_token_files(tokenizer, tokenizer_name)
    settings = {
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "max_length": max_length,
        "max_tokens": max_tokens,
    }
    fingerprints = [[source.name, *source.fingerprint] for source in sources]
    if (meta := finished_run(output_dir, settings, fingerprints)) is not None:
        say(f"{output_dir} is finished already")
        return meta
    with only_writer(output_dir):
        writer = TokenWriter(output_dir, settings, fingerprints)
        if writer.resumed:
            say(f"going on after the first {writer.tokens():,} tokens in {output_dir}")
        tokenizer_folder = writer.folder / "tokenizer"
        tokenizer.save_pretrained(tokenizer_folder)
        encoder_settings = (tokenizer_folder / "tokenizer.json", tokenizer.eos_token_id, max_length)
        with _encoding_by(num_proc, encoder_settings) as submit:
            _write_documents(sources, writer, submit, num_proc, batch_size, max_tokens, progress_interval, progress)
        meta = {
            "vocab_size": len(tokenizer),
            "eot": tokenizer.eos_token_id,
            "tokenizer": tokenizer_name,
            "domains": {name: {split: writer.count(split, name) for split in SPLITS} for name in sorted(writer.names)},
        }
        return writer.publish(tokenizer_folder, meta)


Submit = Callable[[list[Document], str, Sequence[str]], "Future[list[EncodedDocument]]"]


def _write_documents(
    sources: Sequence[Source],
    writer: TokenWriter,
    submit: Submit,
    num_proc: int,
    batch_size: int,
    max_tokens: int | None,
    progress_interval: int,
    progress: Callable[[Progress], object],
) -> None:
    own_splits = {source.split for source in sources}
    to_cut = [split for split in ("validation", "test") if split not in own_splits]
    unsaved = 0  # documents since the last resume point
    bytes_before, all_bytes = 0, sum(source.size for source in sources)
    for index, source in enumerate(sources):
        if index >= writer.sources_done:
            progress(Progress(source.name, writer.tokens(), bytes_before / all_bytes if all_bytes else 0.0))
            batches = source.batches(writer.position, batch_size)
            for encoded, batch in _in_order(batches, submit, source.split, to_cut, 2 * num_proc):
                for document in encoded:
                    if _has_enough(writer, source.split, max_tokens):
                        break
                    writer.add(*document)
                writer.position = batch.position
                unsaved += len(encoded)
                if unsaved >= progress_interval:
                    writer.save_resume_point()
                    unsaved = 0
                else:
                    writer.flush()
                read = (bytes_before + batch.bytes_read) / all_bytes if all_bytes else 0.0
                progress(Progress(source.name, writer.tokens(), read))
                if _has_enough(writer, source.split, max_tokens):
                    break
            writer.sources_done, writer.position = index + 1, None
        bytes_before += source.size


def _has_enough(writer: TokenWriter, split: str, max_tokens: int | None) -> bool:
    if max_tokens is None:
        return False
    if split == "train":
        return writer.tokens() >= max_tokens
    return writer.tokens(split) >= HELD_OUT_FRACTION * max_tokens


def _in_order(
    batches: Iterator[Batch], submit: Submit, split: str, to_cut: Sequence[str], ahead: int
) -> Iterator[tuple[list[EncodedDocument], Batch]]:
    """Encoded batches in the order of the input, with at most `ahead` of them in memory."""
    waiting: deque[tuple[Future[list[EncodedDocument]], Batch]] = deque()
    for batch in batches:
        waiting.append((submit(batch.documents, split, to_cut), batch))
        if len(waiting) == ahead:
            future, first = waiting.popleft()
            yield future.result(), first
    for future, batch in waiting:
        yield future.result(), batch


@contextmanager
def _encoding_by(num_proc: int, encoder_settings: tuple) -> Iterator[Submit]:
    if num_proc == 1:
        yield _encoding_here(Encoder(*encoder_settings))
        return
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, encoder_settings)
    try:
        yield lambda *work: pool.submit(_encode_in_worker, *work)
    finally:
        pool.shutdown(cancel_futures=True)


def _encoding_here(encoder: Encoder) -> Submit:
    def submit(documents: list[Document], split: str, to_cut: Sequence[str]) -> "Future[list[EncodedDocument]]":
        future: Future[list[EncodedDocument]] = Future()
        future.set_result(encoder(documents, split, to_cut))
        return future

    return submit


_encoder_of_this_worker: Encoder


def _start_worker(*encoder_settings: Any) -> None:
    global _encoder_of_this_worker
    _encoder_of_this_worker = Encoder(*encoder_settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()  # a killed parent cannot end its workers
        os._exit(1)


def _encode_in_worker(documents: list[Document], split: str, to_cut: Sequence[str]) -> list[EncodedDocument]:
    return _encoder_of_this_worker(documents, split, to_cut)


def token_table(meta: dict[str, Any]) -> str:
    """The token counts of a finished run as a table.

    Args:
        meta: what `tokenize` returns.

    Returns:
        One line for each domain and one for their sum.
    """
    rows = {**meta["domains"]}
    rows["total"] = {split: sum(counts[split] for counts in meta["domains"].values()) for split in SPLITS}
    width = max(map(len, [*rows, "domain"]))
    lines = [f"{'domain':{width}}" + "".join(f"{split:>17}" for split in SPLITS)]
    for name, counts in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{counts[split]:>17,}" for split in SPLITS))
    return "\n".join(lines)
