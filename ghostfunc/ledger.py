"""A ledger of In-Run Data Shapley values: what each training sample did to the validation loss, summed over a run.

A row is one sample's value in one step, v_i = lr/n <grad l_i, V> less the second-order term where there is one
(arXiv 2406.11011, section 4). Rows belong to *parts*, one for each (run, iteration, micro-step, rank), and a part is
counted once, however often a run is interrupted or ledgers are merged. Sums are taken over rows in the order of their
parts, so that they do not depend on who added what first, to the last bit.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostfunc._ledger_rows import (
    PART,
    Part,
    concatenated,
    files_of,
    number_and_rank,
    read,
    require_pyarrow,
    schema,
    slices_of,
    summed,
)
from ghostfunc._parquet import Numbers, sync_folder, to_list, write_rows
from ghostfunc._ranks import own_rank
from ghostfunc._sample_ids import SampleIds, names_of, split_ids
from ghostfunc.dotlog import read_dot_log

if TYPE_CHECKING:
    import pyarrow


class InRunShapley:
    """In-Run Data Shapley values by sample id, accumulated over a run, its interruptions, its ranks, and other runs.

    A value is the decrease of the mean validation loss that a step owes to a sample, in the loss's unit: positive
    values helped, negative ones harmed. To first order it is `lr / n * dot` in a step of n samples.

    A sample is known by its integer id together with its domain (an empty string where there is none).

    Args:
        folder: where the ledger lives, made by the first `save`; what is there is read. Every rank of a run may have
            the same folder, and one process of each rank may write to it at a time. None keeps everything in memory.
        run: tells runs apart whose ledgers are merged, or which share a folder.
        rank: this process's rank; by default torch.distributed's, 0 without it.

    Raises:
        ImportError: without pyarrow; `pip install "ghostfunc[log]"` brings it.
        NotADirectoryError: if the folder is a file.
        ValueError: if a file in the folder is damaged, or no file of a ledger; the message names it.

    A kill at any moment loses at most what was added since the last `save`. A run that goes on from a checkpoint opens
    the same folder; what it adds for the second time is then left as it was, or, after `resume`, replaced.

    Example:
        >>> import tempfile, torch, ghostfunc as gf
        >>> ledger = gf.InRunShapley(tempfile.mkdtemp())
        >>> for step, (ids, dots) in enumerate([([7, 9], [0.4, -0.2]), ([9, 8], [-0.6, 0.2])]):
        ...     lr, n = 0.1, len(ids)
        ...     counted = ledger.add(ids, lr / n * torch.tensor(dots), domains=["law"] * n, iteration=step)
        >>> path = ledger.save()
        >>> gf.InRunShapley(ledger.folder).top(1).to_pylist()
        [{'domain': 'law', 'sample_id': 7, 'value': 0.02, 'first_order': 0.02, 'second_order': 0.0, 'visits': 1}]
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, run: str = "", rank: int | None = None) -> None:
        require_pyarrow()
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; a ledger is a folder of files.")
        self.run = run
        self.rank = own_rank() if rank is None else rank
        self._unsaved: list[pyarrow.Table] = []
        self._added: set[Part] = set()
        self._found = self._fingerprints()

    def add(
        self,
        sample_ids: SampleIds,
        values: Numbers,
        *,
        domains: Sequence[str] | None = None,
        iteration: int,
        micro_step: int = 0,
        second_order: Numbers | None = None,
        skipped: Numbers | None = None,
    ) -> bool:
        """Count the values of one micro-batch of n samples; `save` writes them.

        Args:
            sample_ids: `[n]` integers or (domain, offset) pairs; a sample drawn twice is there twice.
            values: `[n]`, the decrease of the validation loss owed to each sample, learning rate included.
            domains: `[n]` domain names beside integers.
            iteration: the optimizer step, 0 or more.
            micro_step: the micro-batch's place within the iteration, under gradient accumulation.
            second_order: `[n]`, how much of `values` is the second-order term; by default nothing.
            skipped: `[n]`, which samples the step went on without (`engine.skipped`): they are recorded, for
                `skipped`, and count for no sum and no visit. Their values are not read. By default none.

        Returns:
            Whether they were counted: False where the ledger already had this part when it was opened, as after an
            interrupt. What it had stays.

        Raises:
            FloatingPointError: if a value is not finite; the message names the samples.
            ValueError: if the arguments do not all have n entries, if the part was added before by this ledger, or if
                it was there with other samples when the ledger was opened.
            TypeError: if a sample id is not an integer.

        A call that raises changes nothing.
        """
        ids, names = split_ids("sample_ids", sample_ids, domains)
        n = len(ids)
        columns = {
            "sample_id": ids,
            "domain": names,
            "value": np.array(to_list(values), dtype=np.float64),
            "second_order": np.array([0.0] * n if second_order is None else to_list(second_order), dtype=np.float64),
        }
        left_out = np.zeros(n, dtype=bool) if skipped is None else np.array(to_list(skipped), dtype=bool)
        shapes = {name: np.shape(column) for name, column in (columns | {"skipped": left_out}).items()}
        if any(shape != (n,) for shape in shapes.values()):
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ValueError(f"add: one entry per sample is needed in each column, but their shapes are {listed}.")
        if iteration < 0 or micro_step < 0:
            raise ValueError(f"add(iteration={iteration}, micro_step={micro_step}): expected 0 or more.")
        _require_finite(columns, left_out, iteration)
        part = (self.run, iteration, micro_step, self.rank)
        where = f"iteration {iteration}, micro_step {micro_step}, rank {self.rank}"
        if part in self._added:
            raise ValueError(
                f"add: {where} has been added before. Under gradient accumulation give micro_step=; to count an "
                f"iteration anew call resume({iteration}) first."
            )
        if part in self._found:
            if self._found[part] != _fingerprint(ids, names):
                raise ValueError(
                    f"add: {self.folder or 'the ledger'} already has {where}, of other samples. For another run choose "
                    f"another folder or run= name; for the same run in other batches call resume({iteration}) first."
                )
            return False
        pa = require_pyarrow()
        columns |= {name: pa.array(columns[name], mask=left_out) for name in ("value", "second_order")}
        table = pa.table(columns | {name: [value] * n for name, value in zip(PART, part, strict=True)}, schema=schema())
        self._unsaved.append(table)
        self._added.add(part)
        return True

    def save(self) -> Path | None:
        """Write what was added since the last time as one new file.

        Returns:
            The file, or None when there is nothing to write. Nothing is lost when writing fails.

        Raises:
            ValueError: if the ledger has no folder.
        """
        if self.folder is None:
            raise ValueError(
                "save: this ledger is in memory; InRunShapley.merge([ledger], folder=...).save() writes it."
            )
        table = concatenated(self._unsaved)
        if table.num_rows == 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        own = [number for number, rank in map(number_and_rank, files_of(self.folder)) if rank == self.rank]
        path = self.folder / f"values-{max(own, default=-1) + 1:08d}-rank{self.rank:04d}.parquet"
        write_rows(path, table)
        self._unsaved = []
        return path

    def resume(self, iteration: int) -> None:
        """Drop what the run (its ranks together) has from `iteration` on, because it will be added again.

        In a run of several ranks one process calls it, before the others open the folder. A kill in between leaves some
        of these rows; calling it again finishes the work.

        Args:
            iteration: the first iteration that will be added again.

        Raises:
            ValueError: if a file is damaged; the message names it.
        """
        self._unsaved = [self._before(table, iteration) for table in self._unsaved]
        for path in files_of(self.folder):
            table = read(path)
            kept = self._before(table, iteration)
            if kept.num_rows == 0:
                path.unlink()
            elif kept.num_rows < table.num_rows:
                write_rows(path, kept)
        if self.folder is not None and self.folder.is_dir():
            sync_folder(self.folder)
        self._added = {part for part in self._added if part[1] < iteration}
        self._found = {part: was for part, was in self._found.items() if part[1] < iteration}

    def by_sample(self) -> "pyarrow.Table":
        """Sum up each sample's values.

        Returns:
            A row per sample, sorted by domain and id, with columns domain (string), sample_id (int64), value,
            first_order and second_order (float64, value = first_order + second_order to rounding), and visits (int64):
            how often the sample was trained on.
        """
        return summed(self._counted(), ["domain", "sample_id"]).sort_by(
            [("domain", "ascending"), ("sample_id", "ascending")]
        )

    def skipped(self) -> "pyarrow.Table":
        """List what steps went on without, because its loss or gradient was not finite.

        Returns:
            A row for each time, in the order of the run, with columns run (string), iteration (int64), micro_step and
            rank (int32), sample_id (int64) and domain (string).
        """
        rows = self._rows()
        return rows.filter(rows["value"].is_null()).select([*PART, "sample_id", "domain"])

    def by_domain(self) -> "pyarrow.Table":
        """Sum up each domain's values.

        Returns:
            A row per domain, sorted by name, with columns domain, value, first_order, second_order and visits, as in
            `by_sample`, and samples (int64): how many different ones were trained on.
        """
        samples = self.by_sample().group_by("domain", use_threads=False).aggregate([([], "count_all")])
        return (
            summed(self._counted(), ["domain"])
            .sort_by("domain")
            .append_column("samples", samples.sort_by("domain")["count_all"])
        )

    def top(self, k: int, *, harmful: bool = False) -> "pyarrow.Table":
        """Return the k samples of the highest values, highest first; with `harmful`, of the lowest, lowest first.

        Args:
            k: how many; all, if there are fewer.
            harmful: whether to begin at the other end.

        Returns:
            As `by_sample`. Ties are in the order of domain and id.

        Raises:
            ValueError: if k is below 1.
        """
        if k < 1:
            raise ValueError(f"top: k={k}, but expected 1 or more.")
        order = [
            ("value", "ascending" if harmful else "descending"),
            ("domain", "ascending"),
            ("sample_id", "ascending"),
        ]
        return self.by_sample().sort_by(order).slice(0, k)

    @classmethod
    def merge(cls, ledgers: Sequence["InRunShapley"], *, folder: str | os.PathLike | None = None) -> "InRunShapley":
        """Put ledgers together: of ranks, of stretches of a run, or of runs with different `run` names.

        A part that several ledgers have, with the same samples and values, is counted once.

        Args:
            ledgers: what to merge; they stay as they are, unsaved values included.
            folder: where the merged ledger lives after its `save`; what is there is merged too. None: in memory.

        Returns:
            The merged ledger.

        Raises:
            ValueError: if two ledgers have the same part with other samples or values: these are different runs, which
                need different `run` names, or different ranks, which need `rank`.

        Example:
            >>> import ghostfunc as gf
            >>> ranks = [gf.InRunShapley(rank=0), gf.InRunShapley(rank=1)]
            >>> [ledger.add([5], [0.25], iteration=0) for ledger in ranks]
            [True, True]
            >>> gf.InRunShapley.merge([*ranks, ranks[0]]).by_sample()["value"].to_pylist()
            [0.5]
        """
        merged = cls(folder)
        rows = merged._rows()
        slices = slices_of(rows)
        known = {part: rows[where] for part, where in slices.items()}
        for ledger in ledgers:
            theirs = ledger._rows()
            for part, where in slices_of(theirs).items():
                part_rows = theirs[where]
                if part not in known:
                    known[part] = part_rows
                    merged._unsaved.append(part_rows)
                elif not part_rows.equals(known[part]):
                    described = ", ".join(f"{name} {value!r}" for name, value in zip(PART, part, strict=True))
                    raise ValueError(
                        f"merge: two ledgers have {described}, with different samples or values. Ledgers of different "
                        "runs need different run= names, those of different ranks different rank= numbers."
                    )
        merged._found = merged._fingerprints()
        return merged

    def __add__(self, other: "InRunShapley") -> "InRunShapley":
        """`merge([self, other])`, in memory."""
        return type(self).merge([self, other])

    @classmethod
    def from_dot_log(cls, folder: str | os.PathLike, *, run: str = "") -> "InRunShapley":
        """Values of a dot log, `learning_rate / n * dot + second_order`, n being the samples of the row's iteration.

        Rows without a dot are of samples that the step skipped, and these do not count for n.

        These are the values of steps along the mean gradient of all samples of an iteration. A log without the column
        second_order gives first-order values.

        Args:
            folder: the log's, as for `read_dot_log`.
            run: as in `InRunShapley`.

        Returns:
            A ledger in memory.

        Raises:
            FileNotFoundError: if there is no log.
            ValueError: if the log has no learning rate (its engine had no optimizer), or a file is damaged.
            FloatingPointError: if a dot is not finite; the message names the samples.
        """
        log = read_dot_log(folder)
        iterations, micro_steps, rates, dots = (
            log[name].to_numpy() for name in ("iteration", "micro_step", "learning_rate", "dot")
        )
        unknown = np.flatnonzero(np.isnan(rates))
        if len(unknown):
            raise ValueError(
                f"{folder}: the learning rate of iteration {iterations[unknown[0]]} is not in the log, and a value is "
                "learning_rate / n * dot. Give the engine its optimizer=, or add(...) values yourself."
            )
        skipped = log["dot"].is_null().to_numpy()
        _, step_of = np.unique(iterations, return_inverse=True)
        sizes = np.maximum(np.bincount(step_of, weights=~skipped), 1)
        has_second = "second_order" in log.column_names
        second = log["second_order"].fill_null(0.0).to_numpy() if has_second else np.zeros(len(log))
        values = rates / sizes[step_of] * dots + second
        ids, domains = log["sample_id"].to_numpy(), log["domain"].to_pylist()
        ledger = cls(run=run, rank=0)
        borders = np.flatnonzero(np.diff(iterations) | np.diff(micro_steps)) + 1
        for start, stop in zip([0, *borders], [*borders, len(log)], strict=True):
            if start < stop:
                ledger.add(
                    ids[start:stop],
                    values[start:stop],
                    domains=domains[start:stop],
                    iteration=int(iterations[start]),
                    micro_step=int(micro_steps[start]),
                    second_order=second[start:stop],
                    skipped=skipped[start:stop],
                )
        return ledger

    def _counted(self) -> "pyarrow.Table":
        rows = self._rows()
        return rows.filter(rows["value"].is_valid())

    def _before(self, table: "pyarrow.Table", iteration: int) -> "pyarrow.Table":
        pc = require_pyarrow().compute
        return table.filter(pc.or_(pc.not_equal(table["run"], self.run), pc.less(table["iteration"], iteration)))

    def _fingerprints(self) -> dict[Part, int]:
        """What this run and rank has so far, to tell the same part from another run's."""
        rows = self._rows()
        return {
            part: _fingerprint(rows["sample_id"][where].to_pylist(), rows["domain"][where].to_pylist())
            for part, where in slices_of(rows).items()
            if part[0] == self.run and part[3] == self.rank
        }

    def _rows(self) -> "pyarrow.Table":
        """All rows in the order of their parts, and in a part as they were added.

        Raises:
            ValueError: if two files have the same part.
        """
        tables = list(self._unsaved)
        found_in: dict[Part, Path] = {}
        for path in files_of(self.folder):
            tables.append(read(path))
            for part in slices_of(tables[-1]):
                if part in found_in:
                    raise ValueError(
                        f"{path} and {found_in[part].name} both have iteration {part[1]}, micro_step {part[2]}, rank "
                        f"{part[3]} of run {part[0]!r}. Remove one of them; InRunShapley.merge puts ledgers together."
                    )
                found_in[part] = path
        return concatenated(tables).sort_by([(name, "ascending") for name in PART])


def _fingerprint(sample_ids: Sequence[int], domains: Sequence[str]) -> int:
    return zlib.crc32("\0".join(domains).encode(), zlib.crc32(np.array(sample_ids, dtype="<i8").tobytes()))


def _require_finite(columns: dict[str, Any], skipped: np.ndarray, iteration: int) -> None:
    bad = np.flatnonzero(~(np.isfinite(columns["value"]) & np.isfinite(columns["second_order"])) & ~skipped)
    if len(bad):
        names = names_of(columns["sample_id"], columns["domain"])
        shown = "; ".join(f"{names[i]} ({columns['value'][i]:g})" for i in bad[:8])
        raise FloatingPointError(
            f"add: the values of {len(bad)} of {len(names)} samples are not finite in iteration {iteration}: {shown}. "
            "Nothing was added."
        )
