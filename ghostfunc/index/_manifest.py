"""What an index is of, written once and compared ever after.

    identity = sha256 of (format, dim, dtype, slices, model, projection, settings)

Of the model and of the projection only the fingerprint counts, where they have one: a folder may be moved, and a model
renamed. What the data are is not part of the identity, because an index may be given more of it: each source of data is
a file of its own under `sources/`, numbered in the order in which their rows follow each other.
"""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ghostfunc._parquet import TEMPORARY, sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
_SOURCES = "sources"
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class StoreError(ValueError):
    """A store that cannot be used as asked: the message names the file or the field, and says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What decides the numbers of an index.

    Attributes:
        dim: numbers in a row.
        dtype: how they are stored.
        slices: the columns `[start, stop]` of each part of a row, by name.
        model: whose gradients these are.
        projection: of the gradients.
        settings: whatever else decides the numbers.
        format: of the files.
        ghostfunc: the version that began the index; no part of its identity.
    """

    dim: int
    dtype: str
    slices: dict[str, list[int]]
    model: dict[str, Any]
    projection: dict[str, Any]
    settings: dict[str, Any]
    format: int
    ghostfunc: str

    @classmethod
    def of(
        cls,
        *,
        dim: int,
        dtype: str,
        slices: Mapping[str, slice],
        model: Mapping[str, Any],
        projection: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> "Manifest":
        """The manifest of a new index, by this version of the code."""
        described = {}
        for field, value in {"model": model, "projection": projection, "settings": settings}.items():
            try:
                described[field] = json.loads(json.dumps(dict(value)))
            except TypeError as error:
                raise StoreError(f"{field} goes into {MANIFEST}, and {error}: give its name or number.") from error
        columns = {name: [part.start, part.stop] for name, part in slices.items()}
        return cls(dim=dim, dtype=dtype, slices=columns, **described, format=FORMAT, ghostfunc=version("ghostfunc"))

    @property
    def identity(self) -> str:
        """Hexadecimal sha256 of what decides the numbers."""
        return hashlib.sha256(json.dumps(self._deciding(), sort_keys=True).encode()).hexdigest()

    def _deciding(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["ghostfunc"]
        for name in ("model", "projection"):
            if "fingerprint" in fields[name]:
                fields[name] = {"fingerprint": fields[name]["fingerprint"]}
        return fields

    def differences(self, now: "Manifest") -> list[str]:
        """Where another manifest says something else, field by field; empty if they are of the same index."""
        here, there = self._deciding(), now._deciding()
        differing = [field for field in here if here[field] != there[field]]
        return [line for field in differing for line in _differences(field, getattr(self, field), getattr(now, field))]


def _differences(name: str, there: Any, now: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(key for key in now if key not in there)]
        return [
            line
            for key in keys
            for line in _differences(f"{name}.{key}", there.get(key, "absent"), now.get(key, "absent"))
        ]
    return [] if there == now else [f"{name} is {there!r} there and {now!r} now"]


def read_manifest(folder: Path) -> Manifest:
    """Read what an index is of.

    Raises:
        StoreError: if there is none, it is damaged, or another version's.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise StoreError(f"{folder} is no index: it has no {MANIFEST}.")
    fields = read_json(path)
    if fields.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {fields.get('format')!r}, and this version of ghostfunc reads format {FORMAT}. "
            f"It was written by ghostfunc {fields.get('ghostfunc')!r}: use that one, or build the index again."
        )
    try:
        return Manifest(**fields)
    except TypeError as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it, or build the index in another folder.") from error


def settle_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Begin an index, or join the one that is there.

    Returns:
        The manifest that is in the folder.

    Raises:
        StoreError: if the folder holds another index.
    """
    if any((folder / _SOURCES).glob("*.json")) and not (folder / MANIFEST).exists():
        raise StoreError(f"{folder} holds the sources of an index whose {MANIFEST} is lost. Restore it, or start anew.")
    create(folder / MANIFEST, to_json(asdict(manifest)))
    stored = read_manifest(folder)
    differences = stored.differences(manifest)
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise StoreError(
            f"{folder} holds another index:{shown}{more}\nChoose another folder for this one, or go on with those."
        )
    return stored


@dataclass(frozen=True)
class SourceFile:
    """One source of data of an index.

    Attributes:
        name: what people call it.
        fingerprint: of what decides its samples.
        rows: how many it has; None while it grows.
        shard_rows: rows of each shard but the last; None while it grows.
    """

    name: str
    fingerprint: str
    rows: int | None
    shard_rows: int | None


def read_sources(folder: Path) -> list[SourceFile]:
    """The sources of an index, in the order of their rows.

    Raises:
        StoreError: if one is missing or damaged.
    """
    paths = sorted((folder / _SOURCES).glob("[0-9]*.json"))
    for number, path in enumerate(paths):
        if path != source_path(folder, number):
            raise StoreError(f"{source_path(folder, number)} is missing, and {path} is there. Restore it.")
    return [_source_of(path) for path in paths]


def _source_of(path: Path) -> SourceFile:
    try:
        return SourceFile(**read_json(path))
    except TypeError as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it, or build the index again.") from error


def source_path(folder: Path, number: int) -> Path:
    """Where the source of a number is described."""
    return folder / _SOURCES / f"{number:04d}.json"


def create_source(folder: Path, number: int, source: SourceFile) -> None:
    """Write a source down, unless its number is given away."""
    path = source_path(folder, number)
    path.parent.mkdir(exist_ok=True)
    create(path, to_json(asdict(source)))


def to_json(fields: Mapping[str, Any]) -> bytes:
    """Fields as a file that people can read, too."""
    return (json.dumps(fields, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Fields of a file.

    Raises:
        StoreError: if they cannot be read.
    """
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it, or build the index again.") from error
    if not isinstance(fields, dict):
        raise StoreError(f"{path} is damaged (it is no JSON object). Restore it, or build the index again.")
    return fields


def create(path: Path, content: bytes) -> None:
    """Write a file if it is not there, whole, when several processes may be about to: one of them wins."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    for leftover in path.parent.glob(f"{path.name}.*{TEMPORARY}"):  # of a kill, or of a process that came second
        leftover.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except FileNotFoundError:  # the one that came first has removed our temporary file
        if not path.exists():
            raise
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        os.replace(temporary, path)  # two that race on such a file system are told apart by their shards
