"""A shard of an index: `<source>-<number>.safetensors` (rows), `.parquet` (their samples) and `.json`, in that order.

The last one names the rows, the index that they belong to, and the checksums of the other two: a shard exists if and
only if its JSON does. So a kill at any moment leaves whole shards, and files that are no shard and are written anew.
"""

import errno
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import safetensors
import safetensors.torch
from torch import Tensor

from ghostfunc._parquet import TEMPORARY, read_rows, write_atomically
from ghostfunc.index._encoding import ROWS, SCALES, decode
from ghostfunc.index._manifest import SourceFile, StoreError, read_json, to_json

SHARDS = "shards"
_RECORD = re.compile(r"(\d{4})-(\d{6,})\.json")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this user is used up",
    errno.EFBIG: "the file is larger than may be written there (ulimit -f, or the file system's own limit)",
}


class Shard(NamedTuple):
    """Rows of a source that are written together.

    Attributes:
        number: its place in the source.
        start: its first row in the source.
        stop: one after its last row.
    """

    number: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard.

    Attributes:
        folder: the index.
        identity: of the index.
        source: number of the source.
        fingerprint: of the source.
        shard: the rows.
    """

    folder: Path
    identity: str
    source: int
    fingerprint: str
    shard: Shard

    def path(self, suffix: str) -> Path:
        """Where the shard's file of this suffix is."""
        return self.folder / SHARDS / f"{self.source:04d}-{self.shard.number:06d}{suffix}"

    @property
    def record(self) -> Path:
        """The file that is written last."""
        return self.path(".json")

    @property
    def exists(self) -> bool:
        """Whether the shard was written to the end; whether it is whole, `damage` tells."""
        return self.record.exists()

    def write(self, tensors: Mapping[str, Tensor], samples: pa.Table) -> None:
        """Write the shard, whole or not at all; a shard that is there stays, and must be the same.

        Raises:
            StoreError: if another content is there, or another process is writing this shard.
            OSError: if writing fails; nothing of the shard is left then.
        """
        table = io.BytesIO()
        pyarrow.parquet.write_table(samples, table, compression="zstd", write_page_checksum=True)
        contents = {".safetensors": safetensors.torch.save(dict(tensors)), ".parquet": table.getvalue()}
        record = to_json(self._fields() | {"files": {s: _checksum(content) for s, content in contents.items()}})
        if self.exists:
            if self.record.read_bytes() != record:
                raise StoreError(
                    f"{self.record} is there, and its shard holds other rows or samples than those that were to be "
                    "written. Nothing was overwritten. Either two different runs write to this index, or what computes "
                    "the rows gives other numbers each time."
                )
            return
        try:
            for suffix, content in [*contents.items(), (".json", record)]:
                self._write_file(suffix, content)
        except StoreError:  # what another process is writing is its own
            raise
        except BaseException:
            if not self.exists:
                self._remove(contents)
            raise

    def _write_file(self, suffix: str, content: bytes) -> None:
        try:
            write_atomically(self.path(suffix), lambda file: file.write(content), alone=True)
        except (FileExistsError, FileNotFoundError) as error:
            raise StoreError(
                f"Another process writes {self.path(suffix)} too ({error}). Give each process of a run its own rank, "
                "and start the same run once; then run this command again."
            ) from error

    def _remove(self, suffixes: Mapping[str, bytes]) -> None:
        for suffix in suffixes:
            self.path(suffix).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files of this shard, which a kill left behind."""
        for suffix in (".safetensors", ".parquet", ".json"):
            self.path(suffix + TEMPORARY).unlink(missing_ok=True)

    def _fields(self) -> dict[str, Any]:
        return {"index": self.identity, "source": self.fingerprint, **self.shard._asdict()}

    def damage(self, *, checksums: bool = True) -> str | None:
        """What is wrong with a shard that exists: a file and a reason; None if nothing is."""
        try:
            record = read_json(self.record)
        except StoreError as error:
            return str(error).removesuffix(" Restore it, or build the index again.")
        for name, expected in self._fields().items():
            if record.get(name) != expected:
                what = {"index": "another index", "source": "other data"}.get(name, "other rows")
                return f"{self.record} is foreign: it is of {what} ({name} {record.get(name)!r}, not {expected!r})"
        files = record.get("files")
        for suffix in (".safetensors", ".parquet"):
            expected = files.get(suffix) if isinstance(files, dict) else None
            if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
                return f"{self.record} is damaged: it has no checksum of its {suffix}"
            path = self.path(suffix)
            if not path.exists():
                return f"{path} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if checksums and _file_checksum(path) != expected["sha256"]:
                return f"{path} does not have its checksum"
        return None

    def read(self, start: int, stop: int, columns: slice, slices: Mapping[str, slice]) -> Tensor:
        """Rows start to stop of the shard, and these columns of them, as new float32 numbers."""
        path = self.path(".safetensors")
        try:
            # Memory-mapped: only the pages of what is asked for are read, and they are the system's to drop.
            with safetensors.safe_open(path, framework="pt") as file:
                rows = file.get_slice(ROWS)[start:stop, columns]
                scales = file.get_slice(SCALES)[start:stop] if SCALES in file.keys() else None  # noqa: SIM118
                return decode(rows, scales, columns, slices)
        except (safetensors.SafetensorError, OSError) as error:
            raise StoreError(damaged(self.folder, [f"{path} cannot be read ({error})"])) from error

    def read_samples(self, columns: Sequence[str] | None) -> pa.Table:
        """The samples of the rows, or of these columns those that are there."""
        try:
            return read_rows(self.path(".parquet"), REMEDY, columns)
        except ValueError as error:
            raise StoreError(str(error)) from error


REMEDY = (
    "Delete the files of this number (.safetensors, .parquet and .json), or move them away, and run the same command "
    "again: it writes them anew, and leaves all others as they are."
)


def refuse_damaged(folder: Path, shards: list[ShardFiles]) -> None:
    """Raise StoreError if one of these shards, which exist, is damaged or foreign."""
    reasons = [reason for files in shards if (reason := files.damage())]
    if reasons:
        raise StoreError(damaged(folder, reasons))


def damaged(folder: Path, reasons: list[str]) -> str:
    """The message about shards that cannot be used."""
    count = "A shard" if len(reasons) == 1 else f"{len(reasons)} shards"
    return f"{count} of the index {folder} cannot be used:" + "".join(f"\n  {r}" for r in reasons) + f"\n{REMEDY}"


def shards_of(source: SourceFile) -> list[Shard]:
    """The shards of a source, which are known from the start unless it grows."""
    if source.rows is None or source.shard_rows is None:
        return []
    starts = range(0, source.rows, source.shard_rows)
    return [Shard(n, start, min(start + source.shard_rows, source.rows)) for n, start in enumerate(starts)]


def share_of(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """The shards of a source that process `rank` of `world` writes.

    They are dealt in rounds, each of which begins with the next process: what a dead process of four has left is then
    spread over all of two, or of eight, and not left to one of them.

    Example:
        >>> shards = [Shard(number, number, number + 1) for number in range(6)]
        >>> [[shard.number for shard in share_of(shards, rank, 2)] for rank in range(2)]
        [[0, 3, 4], [1, 2, 5]]
    """
    return [shard for shard in shards if (shard.number + shard.number // world) % world == rank]


def numbers_there(folder: Path) -> dict[int, set[int]]:
    """The shards that exist, as the numbers of each source's."""
    found: dict[int, set[int]] = {}
    if (folder / SHARDS).is_dir():
        for path in (folder / SHARDS).iterdir():
            if match := _RECORD.fullmatch(path.name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found


def grown_shards(folder: Path, identity: str, source: int, fingerprint: str) -> list[ShardFiles]:
    """The shards of a source that grows, which follow each other; what they say of themselves is yet to be checked.

    Raises:
        StoreError: if one between others is missing.
    """
    shards: list[ShardFiles] = []
    start = 0
    numbers = numbers_there(folder).get(source, set())
    for number in range(len(numbers)):
        files = ShardFiles(folder, identity, source, fingerprint, Shard(number, start, start))
        if number not in numbers:
            raise StoreError(
                f"{files.record} is missing, and later shards of this source are there. Restore it; or delete the "
                "later ones too, and run the same command again: it goes on from here."
            )
        stop = read_json(files.record).get("stop")
        shards.append(replace(files, shard=Shard(number, start, stop if isinstance(stop, int) else start)))
        start = shards[-1].shard.stop
    return shards


def full_disk(error: OSError) -> str | None:
    """What is full, if that is what an error is about."""
    return _FULL.get(error.errno) if error.errno is not None else None


def _checksum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
