"""Where documents come from: Pile-format JSON lines in files, or a data set streamed from the hub.

Both kinds of source hand out batches with the position after them, from which reading goes on after an interruption.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ghostfunc.text._documents import JSON_LINES, Document, Fields, read_json_lines

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
_READING_ORDER = ("validation", "test", "train")  # the small splits first, so that `max_tokens` leaves them some


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
        >>> for batch in JsonLines(path, "a.jsonl", "train").batches(None, 1):
        ...     print(batch.documents)
        [Document(text='one', domain='Github', name='a.jsonl:1')]
        [Document(text='two', domain='unknown', name='a.jsonl:2')]
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
        number = bytes_read = 0
        for number, bytes_read, document in read_json_lines(self.path, self.name, Fields(), position or 0):
            documents.append(document)
            if len(documents) == batch_size:
                yield Batch(documents, number, bytes_read)
                documents = []
        if documents:
            yield Batch(documents, number, bytes_read)


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
            where = f"{self.name}, record {index} of this run"
            documents.append(Fields().document(record, where, f"{self.name}:{index}"))
            if len(documents) == batch_size:
                yield Batch(documents, self.dataset.state_dict(), 0)
                documents = []
        if documents:
            yield Batch(documents, self.dataset.state_dict(), 0)


Source = JsonLines | HubSplit


def open_sources(name: str, say: Callable[[str], object] = print) -> list[Source]:
    """Find what a name stands for.

    Args:
        name: a file, a folder (searched with its sub-folders for `.jsonl`, `.jsonl.zst` and `.jsonl.gz`) or a data
            set on the hub.
        say: is told how large a data set on the hub is.

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
        if not path.name.endswith(JSON_LINES):
            raise ValueError(f"{name}: expected a file that ends in {', '.join(JSON_LINES)}")
        return [JsonLines(path, path.name, "train")]
    if path.is_absolute() or name.startswith(".") or name.endswith(JSON_LINES) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file or folder")
    _announce(name, say)
    return hub_sources(name)


def _sources_in(folder: Path) -> list[Source]:
    paths = sorted(path for path in folder.rglob("*.jsonl*") if path.is_file() and path.name.endswith(JSON_LINES))
    if not paths:
        raise FileNotFoundError(f"{folder}: the folder has no file that ends in {', '.join(JSON_LINES)}")
    names = [path.relative_to(folder) for path in paths]
    sources = [JsonLines(path, name.as_posix(), _split_of(name)) for path, name in zip(paths, names, strict=True)]
    return sorted(sources, key=lambda source: (_READING_ORDER.index(source.split), source.name))


def _split_of(name: Path) -> str:
    words = [*name.parts[:-1], name.name.split(".")[0]]
    return next((_SPLIT_OF_NAME[word] for word in words if word in _SPLIT_OF_NAME), "train")


def _announce(name: str, say: Callable[[str], object]) -> None:
    """Say how much a hub data set is; out of the hub's reach this fails at once, not after minutes of retries."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().dataset_info(name, files_metadata=True).siblings or []
    except Exception as error:
        raise _unreachable(name, error) from error
    gigabytes = sum(file.size or 0 for file in files) / 1e9
    say(
        f"{name}: {len(files)} files, {gigabytes:,.1f} GB as stored on the hub. They are streamed, not kept. The token "
        "files take 2 bytes a token, for compressed English text about as much again as the download; a limit on "
        "tokens stops earlier."
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
        raise ValueError(f"{name}: no train split; it has {', '.join(splits)}")
    return [HubSplit(found[split], f"{name}:{split}", split) for split in _READING_ORDER if split in found]


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the data set {name!r} cannot be opened on the hub ({type(error).__name__}: {error}). Check the name and the "
        f"network, or name local Pile-format text: a file that ends in {', '.join(JSON_LINES)}, or a folder of them."
    )
