"""A corpus by its path: JSON lines, Parquet, text, or token files."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostfunc.text._corpus import Corpus
from ghostfunc.text._documents import JSON_LINES, Document, Fields, read_json_lines, read_parquet, read_text
from ghostfunc.text._layout import SPLITS
from ghostfunc.text._text_corpus import FORMAT, TextCorpus
from ghostfunc.text._token_corpus import TokenCorpus
from ghostfunc.text._tokenizers import load_tokenizer, tokenizer_fingerprint

_KINDS = {"JSON lines": JSON_LINES, "Parquet": (".parquet",), "text": (".txt",)}


def open_corpus(
    path: str | Path,
    *,
    tokenizer: Any = None,
    block_size: int = 1024,
    text_field: str = "text",
    domain_field: str | None = None,
    document: str = "split",
    limit: int | None = None,
    cache: str | Path | None = None,
) -> Corpus:
    """Open what is at a path.

    Args:
        path: a file of JSON lines (`.jsonl`, `.jsonl.zst`, `.jsonl.gz`), `.parquet` or `.txt`; a folder of files of one
            of these kinds, with its sub-folders, in the order of their names; or a folder of token files
            (`train-<domain>.bin`, uint16). A text file's domain is the first sub-folder that it is in.
        tokenizer: from `load_tokenizer`; token files need none, and take that of the folder `tokenizer` beside them if
            there is one.
        block_size: the most tokens of a sample; exactly so many in token files.
        text_field: the records' field of the text.
        domain_field: the records' field of the domain, `outer.inner` for one within another; by default the Pile's
            `meta.pile_set_name`, else `domain`, else every document's domain is `unknown`.
        document: `"split"` a document into as many samples as it takes, or `"truncate"` it to one.
        limit: keep the first so many samples.
        cache: a folder for tokenized text, which is then mapped instead of kept in memory, and tokenized again only
            when the files (names, sizes, times of change), the tokenizer or these options are other ones.

    Returns:
        A `TextCorpus`, or a `TokenCorpus`.

    Raises:
        FileNotFoundError: if nothing is there, or nothing that can be read.
        ValueError: if a record is damaged (file and line are named), a field is missing (those that there are, are
            named), a folder holds files of several kinds, or there is no text.
    """
    path = Path(path).expanduser()
    name = path.resolve().name
    if path.is_dir() and (files := sorted(path.glob("*.bin"))):
        return _token_corpus(path, files, tokenizer, block_size, limit)
    kind, files = _files(path)
    if tokenizer is None:
        raise ValueError(f"{path} holds text: give open_corpus a tokenizer, from load_tokenizer")
    settings = [FORMAT, block_size, text_field, domain_field, document, limit]
    return TextCorpus(
        _documents(path, kind, files, Fields(text_field, domain_field)),
        tokenizer=tokenizer,
        block_size=block_size,
        name=name if path.is_dir() else name.split(".")[0] or name,
        document=document,
        limit=limit,
        cache=None if cache is None else Path(cache) / _key(path, files, tokenizer, settings),
    )


def _files(path: Path) -> tuple[str, list[Path]]:
    """The kind and the files of a path."""
    if path.is_file():
        found = {kind: [path] for kind, endings in _KINDS.items() if path.name.endswith(endings)}
    elif path.is_dir():
        seen = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        of_kind = {kind: [file for file in seen if file.name.endswith(endings)] for kind, endings in _KINDS.items()}
        found = {kind: files for kind, files in of_kind.items() if files}
    else:
        raise FileNotFoundError(f"{path} does not exist")
    endings = ", ".join(ending for kind in _KINDS.values() for ending in kind)
    if not found:
        raise FileNotFoundError(f"{path}: expected a file, or a folder of files, that end in {endings} or .bin")
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} of {kind}" for kind, files in found.items())
        raise ValueError(f"{path} holds {counts} files: name a file, or a folder with one kind")
    return next(iter(found.items()))


def _documents(path: Path, kind: str, files: list[Path], fields: Fields) -> Iterator[Document]:
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if kind == "JSON lines":
            yield from (line.document for line in read_json_lines(file, name, fields))
        elif kind == "Parquet":
            yield from read_parquet(file, name, fields)
        else:
            yield read_text(file, name)


def _key(path: Path, files: list[Path], tokenizer: Any, settings: list[Any]) -> str:
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    content = json.dumps([str(path.resolve()), stats, tokenizer_fingerprint(tokenizer), settings])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _token_corpus(folder: Path, files: list[Path], tokenizer: Any, block_size: int, limit: int | None) -> TokenCorpus:
    prefix = next(
        (
            f"{s}-"
            for s in SPLITS
            if all(len(file.stem) > len(s) + 1 and file.stem.startswith(f"{s}-") for file in files)
        ),
        "",
    )
    roots = [root for root in (folder, folder.resolve().parent) if (root / "meta.json").is_file()]
    vocab_size = _vocab_size(roots[0] / "meta.json") if roots else None
    if roots and (roots[0] / "tokenizer").is_dir():
        tokenizer = load_tokenizer(roots[0] / "tokenizer")
    name = folder.resolve().name if not roots or roots[0] == folder else f"{roots[0].name}-{folder.resolve().name}"
    return TokenCorpus(
        {file.stem.removeprefix(prefix): file for file in files},
        block_size=block_size,
        name=name,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        limit=limit,
    )


def _vocab_size(meta: Path) -> int | None:
    try:
        return int(json.loads(meta.read_text(encoding="utf-8"))["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{meta} does not say the data's vocab_size ({error!r}): tokenize the data again") from error
