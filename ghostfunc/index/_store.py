"""Reading an index: rows, samples, and streams over more rows than memory holds."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc.index._manifest import StoreError, read_manifest, read_sources
from ghostfunc.index._shards import (
    Shard,
    ShardFiles,
    damaged,
    grown_shards,
    numbers_there,
    refuse_damaged,
    shards_of,
)
from ghostfunc.index._writer import ROW

_PIECE = 64 * 2**20  # bytes of float32 rows that a stream holds at a time


class _Stored(NamedTuple):
    start: int  # the shard's first row in the store
    files: ShardFiles

    @property
    def stop(self) -> int:
        return self.start + self.files.shard.rows


class Store:
    """An index that is read: the rows of all sources one after the other, and what is known of each.

    What is there when the store is opened is what it holds; the index may still be written. The checksums of a shard
    are compared before its first use, and a damaged one is refused.

    Args:
        folder: the index.

    Raises:
        StoreError: if the folder holds no index, or its description is damaged.

    Attributes:
        folder: the index.
        dim: numbers in a row.
        dtype: how they are stored; what is read is always float32.
        slices: the columns of each part of a row, by name; empty for rows of one part.
        manifest: what the index is of: model, projection, settings, and more.
        sources: the rows of each source of data, by name.
        fingerprints: what decides each source's samples, by name.
        missing_shards: those that are yet to be written, with the names of their sources.

    Example:
        >>> import tempfile, pyarrow, torch
        >>> from ghostfunc.index import Store, StoreWriter
        >>> folder = tempfile.mkdtemp(prefix="poems")
        >>> writer = StoreWriter(folder, dim=2, dtype="bfloat16", slices={"mlp": slice(0, 1), "attn": slice(1, 2)})
        >>> source = writer.source("poems", fingerprint="0f", rows=None)
        >>> _ = source.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), pyarrow.table({"domain": ["haiku", "ode"]}))
        >>> store = Store(folder)
        >>> store.rows, store.dim, store.dtype, store.complete
        (2, 2, 'bfloat16', True)
        >>> for start, rows in store.stream(columns=store.slices["attn"]):
        ...     print(start, rows)
        0 tensor([[2.],
                  [4.]])
        >>> store.sample_rows([1]).to_pylist()
        [{'row': 1, 'domain': 'ode'}]
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.manifest: dict[str, Any] = dict(vars(manifest)) | {"identity": manifest.identity}
        self.dim = manifest.dim
        self.dtype = manifest.dtype
        parts = sorted(manifest.slices.items(), key=lambda part: part[1])
        self.slices = {name: slice(start, stop) for name, (start, stop) in parts}
        self.sources: dict[str, range] = {}
        self.fingerprints: dict[str, str] = {}
        self.missing_shards: list[tuple[str, Shard]] = []
        self._shards: list[_Stored] = []
        self._checked: set[int] = set()  # starts of shards whose checksums are right
        there = numbers_there(self.folder)
        start = 0
        for number, source in enumerate(read_sources(self.folder)):
            present = there.pop(number, set())
            where = (self.folder, manifest.identity, number, source.fingerprint)
            if source.rows is None:
                grown = grown_shards(*where)
                stored, stop = grown, start + (grown[-1].shard.stop if grown else 0)
            else:
                shards = shards_of(source)
                foreign = present - {shard.number for shard in shards}
                if foreign:
                    there[number] = foreign
                stored = [ShardFiles(*where, shard) for shard in shards if shard.number in present]
                self.missing_shards += [(source.name, shard) for shard in shards if shard.number not in present]
                stop = start + source.rows
            self._shards += [_Stored(start + files.shard.start, files) for files in stored]
            self.sources[source.name] = range(start, stop)
            self.fingerprints[source.name] = source.fingerprint
            start = stop
        self.rows = start
        self._refuse_foreign(there)
        self._starts = [stored.start for stored in self._shards]

    def _refuse_foreign(self, there: dict[int, set[int]]) -> None:
        foreign = [
            f"{ShardFiles(self.folder, '', source, '', Shard(number, 0, 0)).record} is foreign: it is of no source here"
            for source, numbers in there.items()
            for number in sorted(numbers)
        ]
        if foreign:
            raise StoreError(damaged(self.folder, foreign))

    @property
    def complete(self) -> bool:
        """Whether every row of every source is there; a source that grows is complete as it stands."""
        return bool(self.sources) and not self.missing_shards

    def read(self, start: int, stop: int, columns: slice | None = None) -> Float[Tensor, "n c"]:
        """Rows start to stop of the store, and these columns of them.

        Returns:
            New float32 numbers; int8 ones times their scales.

        Raises:
            StoreError: if a row is not there, or a shard damaged.
        """
        if not 0 <= start <= stop <= self.rows:
            raise StoreError(f"Rows {start} to {stop} are asked for, and {self.folder} has rows 0 to {self.rows}.")
        wanted = self._columns(columns)
        rows = torch.empty(stop - start, wanted.stop - wanted.start)
        for shard, first, last in self._spans(start, stop):
            self._check(shard, checksums=True)
            read = shard.files.read(first - shard.start, last - shard.start, wanted, self.slices)
            rows[first - start : last - start] = read
        return rows

    def stream(
        self, *, columns: slice | None = None, rows_at_a_time: int | None = None, check: bool = True
    ) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """All rows in their order, piece by piece; one piece and no more is held.

        Args:
            columns: these alone. Without checksums, only what they take on the disk is read.
            rows_at_a_time: rows of a piece at most; by default what makes 64 MiB. No piece goes over a shard's end.
            check: whether to compare each shard's checksums before its first use.

        Yields:
            The piece's first row in the store, and the piece as new float32 numbers.

        Raises:
            StoreError: if the index is not complete, or a shard is damaged.
        """
        wanted = self._columns(columns)
        fitting = max(1, _PIECE // (4 * (wanted.stop - wanted.start)))
        at_a_time = fitting if rows_at_a_time is None else rows_at_a_time
        if at_a_time < 1:
            raise StoreError(f"rows_at_a_time={at_a_time}: a piece has at least one row.")
        self._refuse_incomplete()
        return self._pieces(wanted, at_a_time, check)

    def _pieces(self, columns: slice, at_a_time: int, checksums: bool) -> Iterator[tuple[int, Tensor]]:
        for shard in self._checked_ahead(checksums):
            for begin in range(0, shard.files.shard.rows, at_a_time):
                end = min(begin + at_a_time, shard.files.shard.rows)
                yield shard.start + begin, shard.files.read(begin, end, columns, self.slices)

    def _checked_ahead(self, checksums: bool) -> Iterator[_Stored]:
        """All shards; while one is in use, a thread reads and checks the next."""
        with ThreadPoolExecutor(max_workers=1) as ahead:
            checks = [ahead.submit(self._check, shard, checksums=checksums) for shard in self._shards[:1]]
            for shard, following in zip(self._shards, [*self._shards[1:], None], strict=False):
                checks.pop().result()
                if following is not None:
                    checks.append(ahead.submit(self._check, following, checksums=checksums))
                yield shard

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """What is known of every row.

        Args:
            columns: these alone, in this order.

        Returns:
            A table with a column "row" (int64) before the samples' own; a column that a source does not have is null.

        Raises:
            StoreError: if the index is not complete, a shard is damaged, or a column is not there.
        """
        self._refuse_incomplete()
        tables = [self._samples(stored, columns) for stored, _, _ in self._spans(0, self.rows)]
        return _selected(_joined(tables), columns)

    def sample_rows(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """What is known of these rows, in the order in which they are given; as `samples`."""
        wanted = [int(row) for row in rows]
        outside = [row for row in wanted if not 0 <= row < self.rows]
        if outside:
            raise StoreError(f"Row {outside[0]} is asked for, and {self.folder} has rows 0 to {self.rows}.")
        ascending = sorted(set(wanted))
        spans = [span for row in ascending for span in self._spans(row, row + 1)]
        by_shard = groupby(spans, key=lambda span: span[0])
        taken = [self._samples(shard, columns).take([row - shard.start for _, row, _ in s]) for shard, s in by_shard]
        place = {row: number for number, row in enumerate(ascending)}
        order = pa.array([place[row] for row in wanted], pa.int64())
        return _selected(_joined(taken), columns).take(order)

    def _samples(self, stored: _Stored, columns: Sequence[str] | None) -> pa.Table:
        self._check(stored, checksums=True)
        table = stored.files.read_samples(columns)
        rows = range(stored.start, stored.stop)
        return table.add_column(0, pa.field(ROW, pa.int64()), [pa.array(rows, pa.int64())])

    def verify(self) -> None:
        """Compare every checksum, again.

        Raises:
            StoreError: naming every damaged or foreign shard.
        """
        refuse_damaged(self.folder, [stored.files for stored in self._shards])

    def _check(self, stored: _Stored, *, checksums: bool) -> None:
        if stored.start in self._checked:
            return
        reason = stored.files.damage(checksums=checksums)
        if reason:
            raise StoreError(damaged(self.folder, [reason]))
        if checksums:
            self._checked.add(stored.start)

    def _refuse_incomplete(self) -> None:
        if self.missing_shards:
            name, shard = self.missing_shards[0]
            raise StoreError(
                f"{self.folder} is not complete: {len(self.missing_shards)} shards are yet to be written, the first of "
                f"them rows {shard.start} to {shard.stop} of source {name!r}. Run the command that writes the index "
                "again: it goes on from what is there."
            )

    def _columns(self, columns: slice | None) -> slice:
        start, stop, step = (columns or slice(None)).indices(self.dim)
        if step != 1 or start >= stop:
            raise StoreError(
                f"columns={columns} has none of the {self.dim} columns, or skips some: give start and stop."
            )
        return slice(start, stop)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[_Stored, int, int]]:
        """The shards that rows start to stop are in, with the first of these rows and one after the last, in each."""
        at = start
        while at < stop:
            number = bisect_right(self._starts, at) - 1
            stored = self._shards[number] if number >= 0 else None
            if stored is None or at >= stored.stop:
                raise StoreError(
                    f"Row {at} of {self.folder} is yet to be written. Run the command that writes the index again: it "
                    "goes on from what is there."
                )
            yield stored, at, min(stored.stop, stop)
            at = stored.stop

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{len(self.missing_shards):,} shards to be written"
        sources = ", ".join(f"{name} ({len(rows):,})" for name, rows in self.sources.items())
        head = f"Store({self.folder.name}: {self.rows:,} rows x {self.dim:,}, {self.dtype}, {state})"
        return f"{head}\n  sources: {sources}" if sources else head


def _joined(tables: list[pa.Table]) -> pa.Table:
    empty = pa.table({ROW: pa.array([], pa.int64())})
    return pa.concat_tables([empty, *tables], promote_options="default").combine_chunks()


def _selected(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    if columns is None:
        return table
    absent = [name for name in columns if name not in table.column_names]
    if absent and table.num_rows:
        raise StoreError(f"No source has a column {absent[0]!r}; store.samples() has every column that there is.")
    return table.select([ROW, *(name for name in columns if name in table.column_names and name != ROW)])
