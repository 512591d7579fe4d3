"""Writing an index: by one process or by many, from the start or from where a killed run came to."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ghostfunc.index._encoding import DTYPES, ROWS, SCALES, check_slices, encode
from ghostfunc.index._manifest import (
    Manifest,
    SourceFile,
    StoreError,
    create_source,
    read_sources,
    settle_manifest,
)
from ghostfunc.index._shards import (
    SHARDS,
    Shard,
    ShardFiles,
    full_disk,
    grown_shards,
    numbers_there,
    refuse_damaged,
    shards_of,
    share_of,
)

ROW = "row"


class StoreWriter:
    """Writes an index: a folder with a row of `dim` numbers for every sample of its sources.

    Beginning and resuming are the same call. Many processes may write one folder, each with its `rank` of `world`: what
    a shard holds depends on nothing outside it, and files are there whole or not at all.

    Args:
        folder: where the index lives; made if it is not there.
        dim: numbers in a row.
        dtype: how they are stored: "float32", "bfloat16", "float16" (up to 65504, and nothing below 3e-8), or "int8"
            (a scale for each row and slice: an entry is off by at most 1/254 of the largest of its row and slice).
        slices: the columns of each part of a row, by name, in order and without gaps, as a projection's `slices`; None
            for a row of one part.
        model: what the numbers are of, for the manifest; of one with a "fingerprint", this alone decides the identity.
        projection: likewise.
        settings: whatever else decides the numbers.

    Raises:
        StoreError: if the folder holds an index with another identity; the message names each field that differs.

    Example:
        >>> import tempfile, pyarrow, torch
        >>> from ghostfunc.index import Store, StoreWriter
        >>> folder = tempfile.mkdtemp()
        >>> writer = StoreWriter(folder, dim=3, settings={"seed": 0})
        >>> source = writer.source("poems", fingerprint="0f", rows=4, shard_rows=2)
        >>> for shard in source.missing():
        ...     samples = pyarrow.table({"sample_id": range(shard.start, shard.stop)})
        ...     source.write(shard, torch.full((2, 3), float(shard.number)), samples)
        >>> Store(folder).read(1, 3)
        tensor([[0., 0., 0.],
                [1., 1., 1.]])
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dim: int,
        dtype: str = "float32",
        slices: Mapping[str, slice | tuple[int, int]] | None = None,
        model: Mapping[str, Any] | None = None,
        projection: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise StoreError(f"dtype={dtype!r} is not stored; choose one of {', '.join(DTYPES)}.")
        if dim < 1:
            raise StoreError(f"dim={dim}: a row has at least one number.")
        parts = {n: part if isinstance(part, slice) else slice(*part) for n, part in (slices or {}).items()}
        check_slices(parts, dim)
        self.folder = Path(folder)
        self.slices = parts
        manifest = Manifest.of(
            dim=dim, dtype=dtype, slices=parts, model=model or {}, projection=projection or {}, settings=settings or {}
        )
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = settle_manifest(self.folder, manifest)
            (self.folder / SHARDS).mkdir(exist_ok=True)

    def source(
        self, name: str, *, fingerprint: str, rows: int | None, shard_rows: int = 1024, append: bool = False
    ) -> "Source":
        """Begin a source of data, or resume the one of this fingerprint.

        Args:
            name: what people call it.
            fingerprint: of what decides its samples.
            rows: how many samples it has; None for a source that grows by `Source.append`.
            shard_rows: rows of a shard, which is what a kill may cost and what memory must hold.
            append: whether the index may have other sources; the rows of this one then follow theirs.

        Raises:
            StoreError: if the index holds other data and `append` is not set, or this data under other numbers.
        """
        if shard_rows < 1 or (rows is not None and rows < 0):
            raise StoreError(f"source {name!r}: rows={rows} and shard_rows={shard_rows} make no shards.")
        asked = SourceFile(name, fingerprint, rows, None if rows is None else shard_rows)
        while True:
            sources = read_sources(self.folder)
            number = next((n for n, there in enumerate(sources) if there.fingerprint == fingerprint), len(sources))
            if number < len(sources):
                self._check_same(sources[number], asked)
            else:
                self._check_new(sources, asked, append)
            with explained(self.folder):
                create_source(self.folder, number, asked)
            there = read_sources(self.folder)[number]
            if there.fingerprint == fingerprint:  # else another process took the number for another source
                self._check_same(there, asked)
                return Source(self, number, there)

    def _check_same(self, there: SourceFile, now: SourceFile) -> None:
        for field in ("rows", "shard_rows"):
            if getattr(there, field) != getattr(now, field):
                raise StoreError(
                    f"Source {there.name!r} of {self.folder} was begun with {field}={getattr(there, field)}, and now "
                    f"{field}={getattr(now, field)}: go on with the former, or choose another folder."
                )

    def _check_new(self, sources: list[SourceFile], now: SourceFile, append: bool) -> None:
        names = {source.name: source.fingerprint for source in sources}
        if now.name in names:
            raise StoreError(
                f"{self.folder} has a source {now.name!r} of other data (fingerprint {names[now.name]} there, "
                f"{now.fingerprint} now). Choose another folder, or another name to append it as."
            )
        if names and not append:
            held = ", ".join(f"{name!r} ({fingerprint})" for name, fingerprint in names.items())
            raise StoreError(
                f"{self.folder} holds other data: {held}, not {now.name!r} ({now.fingerprint}). append=True adds it "
                "to them; for an index of its own, choose another folder."
            )

    def __repr__(self) -> str:
        return f"StoreWriter({self.folder.name}: dim {self.manifest.dim}, {self.manifest.dtype})"


class Source:
    """A source of data of an index that is being written; `StoreWriter.source` makes one.

    Attributes:
        name: what people call it.
        fingerprint: of what decides its samples.
        rows: how many it has; None if it grows by `append`.
        shards: those of a source that does not grow.
    """

    def __init__(self, writer: StoreWriter, number: int, file: SourceFile) -> None:
        self.name = file.name
        self.fingerprint = file.fingerprint
        self.rows = file.rows
        self.shards = shards_of(file)
        self._writer = writer
        self._number = number
        self._next = Shard(0, 0, 0)
        if file.rows is None:
            self._next = self._end()

    @property
    def rows_written(self) -> int:
        """Rows in the shards that are there: where a source that grows goes on."""
        if self.rows is None:
            return self._next.start
        there = numbers_there(self._writer.folder).get(self._number, set())
        return sum(shard.rows for shard in self.shards if shard.number in there)

    def share(self, rank: int = 0, world: int = 1) -> list[Shard]:
        """The shards that process `rank` of `world` is to write, one of each `world`, whether they are there or not.

        Raises:
            StoreError: if there is no such process.
        """
        if not 0 <= rank < world:
            raise StoreError(f"rank={rank} is not one of world={world} processes, which are 0 to {world - 1}.")
        return share_of(self.shards, rank, world)

    def missing(self, rank: int = 0, world: int = 1) -> list[Shard]:
        """The shards of this process's share that it has yet to write.

        The share's other shards have been checked, and leftovers of a kill removed, when this returns.

        Raises:
            StoreError: if one of them is damaged or foreign; the message names each, and says what to do. If there is
                no such process.
        """
        share = [self._files(shard) for shard in self.share(rank, world)]
        for files in share:
            files.remove_leftovers()
        refuse_damaged(self._writer.folder, [files for files in share if files.exists])
        return [files.shard for files in share if not files.exists]

    def write(self, shard: Shard, rows: Tensor, samples: pa.Table) -> None:
        """Write one shard, whole or not at all.

        Args:
            shard: one of `missing`.
            rows: `[stop - start, dim]` floating-point numbers, on any device.
            samples: what is known of each row, in a table of as many rows; a column "sample_id" is used in errors.

        Raises:
            StoreError: if rows are not finite (the samples are named), not as many as they should be, or already there
                with other numbers; or if the disk is full: what was written stays good, and the same command goes on.
        """
        if shard not in self.shards:
            raise StoreError(f"{shard} is no shard of source {self.name!r}, which has {len(self.shards)}.")
        self._write(shard, rows, samples)

    def append(self, rows: Tensor, samples: pa.Table) -> Shard:
        """Write the next rows of a source that grows, as a shard of their own; as `write`, by one process at a time."""
        if self.rows is not None:
            raise StoreError(f"Source {self.name!r} was begun with {self.rows} rows: write its `missing` shards.")
        shard = self._next._replace(stop=self._next.start + len(rows))
        if len(rows):
            self._write(shard, rows, samples)
            self._next = Shard(shard.number + 1, shard.stop, shard.stop)
        return shard

    def _write(self, shard: Shard, rows: Tensor, samples: pa.Table) -> None:
        manifest = self._writer.manifest
        expected = (shard.rows, manifest.dim)
        where = f"Rows {shard.start} to {shard.stop} of source {self.name!r}"
        if not rows.is_floating_point() or tuple(rows.shape) != expected:
            raise StoreError(
                f"{where} should be floating-point numbers of shape {list(expected)}; they are {list(rows.shape)} of "
                f"{rows.dtype}."
            )
        if samples.num_rows != expected[0] or ROW in samples.column_names:
            raise StoreError(
                f"{where} have a table of {samples.num_rows} samples with columns {samples.column_names}; it should "
                f"have {expected[0]}, and no column {ROW!r}, which the store adds."
            )
        tensors = encode(rows, manifest.dtype, self._writer.slices)
        _refuse_infinite(where, rows, tensors, manifest.dtype, samples)
        with explained(self._writer.folder):
            self._files(shard).write(tensors, samples.replace_schema_metadata(None).combine_chunks())

    def _files(self, shard: Shard) -> ShardFiles:
        return ShardFiles(self._writer.folder, self._writer.manifest.identity, self._number, self.fingerprint, shard)

    def _end(self) -> Shard:
        there = grown_shards(self._writer.folder, self._writer.manifest.identity, self._number, self.fingerprint)
        refuse_damaged(self._writer.folder, there)
        last = there[-1].shard if there else Shard(-1, 0, 0)
        end = Shard(last.number + 1, last.stop, last.stop)
        self._files(end).remove_leftovers()
        return end

    def __repr__(self) -> str:
        rows = "growing" if self.rows is None else f"{self.rows:,} rows, {len(self.shards):,} shards"
        return f"Source({self.name!r}, {rows}, {self.rows_written:,} rows written)"


def _refuse_infinite(where: str, rows: Tensor, tensors: Mapping[str, Tensor], dtype: str, samples: pa.Table) -> None:
    finite = torch.isfinite(rows.detach()).all(dim=1).cpu()
    stored = torch.isfinite(tensors[SCALES if SCALES in tensors else ROWS]).all(dim=1)
    bad = (~(finite & stored)).nonzero()[:, 0].tolist()
    if not bad:
        return
    label = "sample_id" if "sample_id" in samples.column_names else None
    names = [str(samples[label][i].as_py()) if label else str(i) for i in bad[:10]]
    listed = ", ".join(names) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
    reason = (
        "are not finite: look at their losses, and at the model's dtype"
        if not finite.all()
        else f"do not fit into {dtype}: choose bfloat16 or float32"
    )
    raise StoreError(f"{where}: those of {label or 'row'} {listed} {reason}. Nothing of this shard was written.")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A full disk as a StoreError that says what stays good and how to go on."""
    try:
        yield
    except OSError as error:
        reason = full_disk(error)
        if reason is None:
            raise
        place = next(path for path in (folder, *folder.parents) if path.exists())
        good = sum(len(numbers) for numbers in numbers_there(folder).values())
        raise StoreError(
            f"{error.filename or folder} cannot be written: {reason} ({error.strerror}; "
            f"{shutil.disk_usage(place).free:,} bytes are free). The {good} shards that are there stay good. "
            "Make room and run the same command again: it goes on from them."
        ) from error
