"""Where documents come from: Pile-format JSON lines in files, or a data set streamed from the hub.

Both kinds of source hand out batches with the position after them, from which reading goes on after an interruption.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

UNKNOWN_DOMAIN = "unknown"
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
PILE = "monology/pile-uncopyrighted"

# The hub library finds only the training files of this layout by itself.
_PILE_FILES = {"train": "train/*.jsonl.zst", "validation": "val.jsonl.zst", "test": "test.jsonl.zst"}
_SPLIT_OF_NAME = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_READING_ORDER = ("validation", "test", "train")  # the small splits first, so that --max_tokens leaves them some
_CHUNK = 1 << 17  # compressed bytes read at once


class Document(NamedTuple):
    """A text and the domain it is counted under.

    Attributes:
        text: the document; characters that UTF-8 cannot hold (lone surrogates) are replaced by `?`.
        domain: `meta.pile_set_name`, or `unknown` where the record names none.
    """

    text: str
    domain: str


class Batch(NamedTuple):
    """Documents in the source's order.

    Attributes:
        documents: at most `batch_size` of them.
        position: JSON data from which `batches` goes on after this batch.
        bytes_read: how much of the file is read; 0 where the source has no size.
    """

    documents: list[Document]
    position: Any
    bytes_read: int


@dataclass(frozen=True)
class JsonLines:
    r"""A file of Pile-format JSON lines, plain or compressed with zstandard or gzip.

    Args:
        path: the file.
        name: its path within the input, by which a resumed run knows it.
        split: the split that its documents belong to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = path.write_text('{"text": "one", "meta": {"pile_set_name": "Github"}}\n{"text": "two"}\n')
        >>> [batch.documents for batch in JsonLines(path, "a.jsonl", "train").batches(None, 1)]
        [[Document(text='one', domain='Github')], [Document(text='two', domain='unknown')]]
    """

    path: Path
    name: str
    split: str

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.path.stat().st_size

    @property
    def fingerprint(self) -> list[int]:
        """What changes when the file does."""
        return [self.size, self.path.stat().st_mtime_ns]

    def batches(self, position: int | None, batch_size: int) -> Iterator[Batch]:
        """Read on from a position.

        Args:
            position: the number of lines already read; None for the beginning.
            batch_size: documents in a batch.

        Yields:
            Batches; the last may be smaller.

        Raises:
            ValueError: if a line is no Pile-format record, or if the file's compression is damaged; the message names
                the file and the line.
        """
        documents: list[Document] = []
        line_number, already_read = 0, position or 0
        with self.path.open("rb") as file:
            lines = self._lines(file)
            while True:
                try:
                    line = next(lines, None)
                except (OSError, EOFError, zlib.error, ValueError) as error:
                    raise ValueError(
                        f"{self.path}: the compressed file is damaged after line {line_number} ({error}): fetch or "
                        "write it again"
                    ) from error
                if line is None:
                    break
                line_number += 1
                if line_number <= already_read or not line.strip():
                    continue
                documents.append(self._document(line, line_number))
                if len(documents) == batch_size:
                    yield Batch(documents, line_number, file.tell())
                    documents = []
            if documents:
                yield Batch(documents, line_number, file.tell())

    def _document(self, line: bytes, line_number: int) -> Document:
        where = f"{self.path}, line {line_number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: damaged, not JSON ({error}): mend or delete that line") from error
        return _document(record, where)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        if self.path.suffix == ".gz":
            return iter(gzip.GzipFile(fileobj=file))
        if self.path.suffix == ".zst":
            return _split_lines(_decompressed(file))
        return iter(file)


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set that the hub library streams.

    Args:
        dataset: a `datasets.IterableDataset` of Pile-format records.
        name: the data set's name and split, by which a resumed run knows it.
        split: the split that its documents belong to.
    """

    dataset: Any
    name: str
    split: str

    @property
    def size(self) -> int:
        """0: a stream has no size that could be compared with what is read."""
        return 0

    @property
    def fingerprint(self) -> list[int]:
        """What changes when the data set's layout does."""
        return [self.dataset.num_shards]

    def batches(self, position: dict | None, batch_size: int) -> Iterator[Batch]:
        """Read on from a position.

        Args:
            position: the stream's `state_dict`; None for the beginning.
            batch_size: documents in a batch.

        Yields:
            Batches; the last may be smaller.

        Raises:
            ValueError: if a record is not of the Pile's format.
        """
        if position is not None:
            self.dataset.load_state_dict(position)
        documents: list[Document] = []
        for index, record in enumerate(self.dataset):
            documents.append(_document(record, f"{self.name}, record {index} of this run"))
            if len(documents) == batch_size:
                yield Batch(documents, self.dataset.state_dict(), 0)
                documents = []
        if documents:
            yield Batch(documents, self.dataset.state_dict(), 0)


Source = JsonLines | HubSplit


def open_sources(name: str) -> list[Source]:
    """Find what an `--input` names.

    Args:
        name: a file, a folder (searched with its sub-folders for `.jsonl`, `.jsonl.zst` and `.jsonl.gz`) or a data
            set on the hub.

    Returns:
        The sources in reading order: validation, test, then train, each by name. A file belongs to the split that its
        name or one of its folders names (`val.jsonl.zst`, `train/00.jsonl.zst`), else to train.

    Raises:
        FileNotFoundError: if a folder has no such file, or if a path-like name does not exist.
        ValueError: if a file has another ending.
        ConnectionError: if the hub cannot be reached or has no such data set.
    """
    path = Path(name)
    if path.is_dir():
        return _sources_in(path)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"--input {name}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [JsonLines(path, path.name, "train")]
    if path.is_absolute() or name.startswith(".") or name.endswith(SUFFIXES) or name.count("/") > 1:
        raise FileNotFoundError(f"--input {name}: no such file or folder")
    _announce(name)
    return hub_sources(name)


def _sources_in(folder: Path) -> list[Source]:
    paths = sorted(path for path in folder.rglob("*.jsonl*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not paths:
        raise FileNotFoundError(f"--input {folder}: the folder has no file that ends in {', '.join(SUFFIXES)}")
    names = [path.relative_to(folder) for path in paths]
    sources = [JsonLines(path, name.as_posix(), _split_of(name)) for path, name in zip(paths, names, strict=True)]
    return sorted(sources, key=lambda source: (_READING_ORDER.index(source.split), source.name))


def _split_of(name: Path) -> str:
    words = [*name.parts[:-1], name.name.split(".")[0]]
    return next((_SPLIT_OF_NAME[word] for word in words if word in _SPLIT_OF_NAME), "train")


def _announce(name: str) -> None:
    """Say how much a hub data set is; out of the hub's reach this fails at once, not after minutes of retries."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().dataset_info(name, files_metadata=True).siblings or []
    except Exception as error:
        raise _unreachable(name, error) from error
    gigabytes = sum(file.size or 0 for file in files) / 1e9
    print(
        f"{name}: {len(files)} files, {gigabytes:,.1f} GB as stored on the hub. They are streamed, not kept. The token "
        "files take 2 bytes a token, for compressed English text about as much again as the download; --max_tokens "
        "stops earlier."
    )


def hub_sources(name: str) -> list[Source]:
    """Open a data set for streaming.

    Args:
        name: its name on the hub, or a local folder in the hub's layout.

    Returns:
        Its train, validation and test splits, as far as it has them, in reading order.

    Raises:
        ConnectionError: if it cannot be opened.
        ValueError: if it has no train split.
    """
    import datasets

    try:
        splits: Any = datasets.load_dataset(name, data_files=_PILE_FILES if name == PILE else None, streaming=True)
    except Exception as error:
        raise _unreachable(name, error) from error
    found = {_SPLIT_OF_NAME[split]: dataset for split, dataset in splits.items() if split in _SPLIT_OF_NAME}
    if "train" not in found:
        raise ValueError(f"--input {name}: no train split; it has {', '.join(splits)}")
    return [HubSplit(found[split], f"{name}:{split}", split) for split in _READING_ORDER if split in found]


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the data set {name!r} cannot be opened on the hub ({type(error).__name__}: {error}). Check the name and the "
        "network, or name local Pile-format text with --input FILE_OR_FOLDER (.jsonl, .jsonl.zst, .jsonl.gz)."
    )


def _document(record: Any, where: str) -> Document:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected {{"text": "...", "meta": {{"pile_set_name": "..."}}}}; "text" is missing')
    meta = record.get("meta")
    domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
    if not isinstance(domain, str | None):
        raise ValueError(f"{where}: meta.pile_set_name must be a string, not {domain!r}")
    return Document(text.encode("utf-8", "replace").decode("utf-8"), domain or UNKNOWN_DOMAIN)


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """Decompress zstandard frames; unlike the library's stream reader this notices a file that ends within one."""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "zstandard is needed to read .zst files: python -m pip install 'ghostfunc[examples]'"
        ) from error

    frame, within_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), False
    while data := file.read(_CHUNK):
        while data:
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            data, within_frame = (frame.unused_data, False) if frame.eof else (b"", True)
            if frame.eof:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    if within_frame:
        raise EOFError("it ends within a frame")
