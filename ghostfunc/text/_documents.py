"""Documents: what is read out of a record, and the files that records come in."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ghostfunc._parquet import import_pyarrow

UNKNOWN_DOMAIN = "unknown"
JSON_LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
_CHUNK = 1 << 17  # compressed bytes read at once
_ROWS = 256  # of a Parquet file, read at once


class Document(NamedTuple):
    """A text, the domain it is counted under, and what it is called.

    Attributes:
        text: the document; characters that UTF-8 cannot hold (lone surrogates) are replaced by `?`.
        domain: `unknown` where the record names none.
        name: the record's `id`, else where it was read: `file:line` (lines count from 1), `file:row` (rows from 0), or
            the file.
    """

    text: str
    domain: str
    name: str


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what.

    Attributes:
        text: the field of the text.
        domain: the field of the domain, `outer.inner` for one within another; None takes the Pile's
            `meta.pile_set_name`, else `domain`, else `unknown`.
    """

    text: str = "text"
    domain: str | None = None

    def document(self, record: Any, where: str, name: str) -> Document:
        """What a record holds.

        Args:
            record: the record, from anywhere.
            where: where it was read, for errors.
            name: the document's name unless the record has an `id`.

        Raises:
            ValueError: if a field is missing or is no string; the message names those that there are.
        """
        fields = record if isinstance(record, dict) else {}
        text = fields.get(self.text)
        if not isinstance(text, str):
            there = f"its fields are {', '.join(map(repr, fields))}" if fields else "it has no fields"
            raise ValueError(
                f'{where}: expected {{"{self.text}": "...", "meta": {{"pile_set_name": "..."}}}}; "{self.text}" is '
                f"missing or no string; {there}"
            )
        own = fields.get("id")
        called = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else name
        return Document(writable(text), writable(self._domain(fields, where)), writable(called))

    def _domain(self, fields: dict[str, Any], where: str) -> str:
        if self.domain is not None:
            domain: Any = fields
            for key in [self.domain] if self.domain in fields else self.domain.split("."):
                if not isinstance(domain, dict) or key not in domain:
                    raise ValueError(
                        f"{where}: no field {self.domain!r} for the domain; the fields are {', '.join(_paths(fields))}"
                    )
                domain = domain[key]
        else:
            meta = fields.get("meta")
            domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
            domain = fields.get("domain") if domain is None else domain
        if not isinstance(domain, str | None):
            raise ValueError(f"{where}: {self.domain or 'meta.pile_set_name'} must be a string, not {domain!r}")
        return domain or UNKNOWN_DOMAIN


def _paths(fields: dict[str, Any], outer: str = "") -> Iterator[str]:
    for key, value in fields.items():
        yield from _paths(value, f"{outer}{key}.") if isinstance(value, dict) and value else [repr(f"{outer}{key}")]


def writable(text: str) -> str:
    """A text with `?` in place of lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Line(NamedTuple):
    """A document of a file of JSON lines: its line's number, from 1, and how many bytes of the file are read."""

    number: int
    bytes_read: int
    document: Document


def read_json_lines(path: Path, name: str, fields: Fields, already_read: int = 0) -> Iterator[Line]:
    """The documents of a file of JSON lines, plain or compressed with zstandard or gzip; empty lines are none.

    Args:
        path: the file.
        name: what documents without an `id` are named after.
        fields: of the records.
        already_read: lines to pass over.

    Raises:
        ValueError: if a line is no such record, or if the file's compression is damaged; the message names the file
            and the line.
    """
    number = 0
    with path.open("rb") as file:
        lines = _lines(path, file)
        while True:
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error, ValueError) as error:
                raise ValueError(
                    f"{path}: the compressed file is damaged after line {number} ({error}): fetch or write it again"
                ) from error
            if line is None:
                return
            number += 1
            if number <= already_read or not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: damaged, not JSON ({error}): mend or delete that line") from error
            yield Line(number, file.tell(), fields.document(record, where, f"{name}:{number}"))


def read_parquet(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    """The documents of a Parquet file, a row each, some rows at a time.

    Raises:
        ValueError: if the file is damaged or has no such columns; the message names it and them.
    """
    pyarrow = import_pyarrow("a corpus in Parquet")
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            domain = fields.domain if fields.domain is None or fields.domain in there else fields.domain.split(".")[0]
            for field in (fields.text, domain):
                if field is not None and field not in there:
                    raise ValueError(f"{path}: no column {field!r}; the columns are {', '.join(map(repr, there))}")
            wanted = {fields.text, "id", "meta", "domain"} if domain is None else {fields.text, "id", domain}
            for some in file.iter_batches(batch_size=_ROWS, columns=[c for c in there if c in wanted]):
                for record in some.to_pylist():
                    yield fields.document(record, f"{path}, row {row}", f"{name}:{row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged, or no Parquet file ({error}): fetch or write it again") from error


def read_text(path: Path, name: str) -> Document:
    """A text file as one document; its domain is the first folder of its name.

    Raises:
        ValueError: if it is not UTF-8.
    """
    folder, _, rest = name.partition("/")
    try:
        return Document(path.read_bytes().decode("utf-8"), folder if rest else UNKNOWN_DOMAIN, name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}): convert it or take it away") from error


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".gz":
        return iter(gzip.GzipFile(fileobj=file))
    if path.suffix == ".zst":
        return _split_lines(_decompressed(file))
    return iter(file)


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
            "zstandard is needed to read .zst files: python -m pip install 'ghostfunc[index]'"
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
