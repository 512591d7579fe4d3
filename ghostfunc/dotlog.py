"""The log of dot products: append-only Parquet that a kill at any moment leaves readable.

A log is a folder: `config.json` and `val_batch.safetensors`, written once, and one
`dots-<iteration>-<micro step>.parquet` per save, named after its first row, so that names sort as rows do. Every file
is written beside its place, synced to disk and moved there: it is there whole, or not at all. In a run of several ranks
each writes its own files: rank 0 under these names, the others with `-rank<rank>` in them.
"""

import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ghostfunc._parquet import (
    TEMPORARY,
    Numbers,
    import_pyarrow,
    read_rows,
    sync_folder,
    to_list,
    write_atomically,
    write_rows,
)
from ghostfunc._ranks import own_rank

if TYPE_CHECKING:
    import pyarrow

_CONFIG = "config.json"
_ROWS = re.compile(r"dots-(\d+)-(\d+)(?:-rank(\d+))?\.parquet")
_RANK = re.compile(r"-rank(\d+)\.")


class _First(NamedTuple):
    """What the name of a file says: its first row, and whose it is."""

    iteration: int
    micro_step: int
    rank: int


class DotLog:
    """The dot products of a run, one row per sample and micro-step, in an append-only folder of Parquet files.

    Rows come in the order of the run: `(iteration, micro_step)` grows with every `append`, across restarts too, so
    that no row can be written twice. A run that starts again from a checkpoint calls `resume` with the first iteration
    that it will repeat.

    Args:
        folder: where the log lives; made if it is not there. Every rank of a run may have the same folder, and one
            process of each rank may write to it at a time. Temporary files that a killed run left are removed.
        config: what produced the numbers; anything that JSON holds, `Path`, `torch.dtype` and `torch.device` as text.
        val_batch: the tensors of the validation batch that the dots refer to, by name; in a run of several ranks, this
            rank's share of them.
        rank: this process's rank; by default torch.distributed's, 0 without it.

    Raises:
        ImportError: without pyarrow; `pip install "ghostfunc[log]"` brings it.
        FileExistsError: if the folder holds the log of another configuration or another validation batch.
        TypeError: if a value of `config` has no place in JSON.

    Example:
        >>> import tempfile, torch, ghostfunc.dotlog as dotlog
        >>> folder = tempfile.mkdtemp()
        >>> log = dotlog.DotLog(folder, config={"seed": 1}, val_batch={"input_ids": torch.arange(6).view(2, 3)})
        >>> log.append(iteration=0, sample_ids=[7, 9], domains=["law", "code"], losses=torch.tensor([1.5, 2.0]),
        ...            learning_rate=1e-3, dots=torch.tensor([0.25, -0.5]))
        >>> log.save().name
        'dots-000000000000-000000.parquet'
        >>> dotlog.read_dot_log(folder)["dot"].to_pylist()
        [0.25, -0.5]
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        config: Mapping,
        val_batch: Mapping[str, Tensor] | None = None,
        rank: int | None = None,
    ) -> None:
        _import_pyarrow()
        self.folder = Path(folder)
        self.rank = own_rank() if rank is None else rank
        self._suffix = f"-rank{self.rank:04d}" if self.rank else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*" + TEMPORARY):
            if _rank_in(leftover.name) == self.rank:
                leftover.unlink()
        self._write_config(config)
        if val_batch is not None:
            self._write_val_batch(val_batch)
        self._buffer: list[pyarrow.RecordBatch] = []
        self._newest: tuple[int, int] | None = None  # (iteration, micro_step) of the newest row; None: not looked up

    def append(
        self,
        *,
        iteration: int,
        sample_ids: Numbers,
        domains: Sequence[str],
        losses: Numbers,
        learning_rate: float,
        dots: Numbers,
        micro_step: int = 0,
        second_order: Numbers | None = None,
        skipped: Numbers | None = None,
    ) -> None:
        """Buffer the rows of one micro-batch of n samples; `save` writes them.

        Args:
            iteration: the optimizer step, 0 or more.
            sample_ids: `[n]` integers; for text, the offset of the sample's first token in its domain's file.
            domains: `[n]` domain names; empty strings where there are none.
            losses: `[n]` per-sample training losses.
            learning_rate: the step's learning rate; nan where it is not known.
            dots: `[n]`, <grad l_i, mean_j grad l_j> with i a train and j a val sample. Stored as given, non-finite ones
                too.
            micro_step: the micro-batch's place within the iteration, under gradient accumulation.
            second_order: `[n]`, the second-order part of the values, learning rate included; None where unknown.
            skipped: `[n]`, which samples the step went on without (`engine.skipped`): their rows have no dot. By
                default none.

        Raises:
            ValueError: if the columns differ in length, or the log already has rows of this micro-step or a later one.
            TypeError: if a sample id is not an integer.
        """
        pa = _import_pyarrow()
        newest = self._newest_row()
        if not newest < (iteration, micro_step) or iteration < 0 or micro_step < 0:
            raise ValueError(
                f"append(iteration={iteration}, micro_step={micro_step}): the log {self.folder} already goes up to "
                f"iteration {newest[0]}, micro_step {newest[1]}. To write iterations again, call "
                f"resume({max(iteration, 0)}) first; for another run, choose another folder."
            )
        columns = {
            "sample_id": [operator.index(sample_id) for sample_id in to_list(sample_ids)],
            "domain": list(domains),
            "loss": to_list(losses),
            "dot": to_list(dots),
        }
        if second_order is not None:
            columns["second_order"] = to_list(second_order)
        left_out = {} if skipped is None else {"skipped": to_list(skipped)}
        n = len(columns["sample_id"])
        if any(len(column) != n for column in (columns | left_out).values()):
            lengths = ", ".join(f"{name} {len(column)}" for name, column in (columns | left_out).items())
            raise ValueError(f"append: one entry per sample is needed in each column, but their lengths are {lengths}.")
        if n == 0:
            return
        for mask in left_out.values():
            for name in columns.keys() & {"dot", "second_order"}:
                columns[name] = [None if out else x for x, out in zip(columns[name], mask, strict=True)]
        columns |= {"iteration": [iteration] * n, "micro_step": [micro_step] * n, "learning_rate": [learning_rate] * n}
        schema = _schema(second_order=second_order is not None)
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        self._buffer.append(pa.record_batch(arrays, schema=schema))
        self._newest = (iteration, micro_step)

    def save(self) -> Path | None:
        """Write what is buffered as one new file.

        Returns:
            The file, or None when nothing is buffered. The buffer is kept when writing fails.
        """
        pa = _import_pyarrow()
        table = _concatenated([pa.Table.from_batches([rows]) for rows in self._buffer])
        if table.num_rows == 0:
            return None
        iteration, micro_step = table["iteration"][0].as_py(), table["micro_step"][0].as_py()
        path = self.folder / f"dots-{iteration:012d}-{micro_step:06d}{self._suffix}.parquet"
        write_rows(path, table)
        self._buffer = []
        return path

    def resume(self, iteration: int) -> None:
        """Drop the rows of `iteration` and later, those of all ranks, because a resumed run will write them again.

        Later files are removed, newest first, and the one that the cut goes through is replaced by its earlier part in
        one move: a kill in between leaves a log without gaps, and calling `resume` again finishes the work. In a run of
        several ranks one process calls it, before the others open the folder.

        Args:
            iteration: the first iteration that will be written again; 0 empties the log.

        Raises:
            ValueError: if the file at the cut is damaged; the message names it.
        """
        pa = _import_pyarrow()
        self._buffer = [rows for rows in self._buffer if rows["iteration"][0].as_py() < iteration]
        for leftover in self.folder.glob("*" + TEMPORARY):
            leftover.unlink()
        is_done: set[int] = set()  # ranks: the files before one that lies before the cut do so too
        for path in reversed(_row_files(self.folder)):
            first = _first_row(path)
            if first.rank in is_done:
                continue
            if first.iteration >= iteration:
                path.unlink()
                continue
            table = _read_rows(path)
            earlier = table.filter(pa.compute.less(table["iteration"], iteration))
            if earlier.num_rows < table.num_rows:
                write_rows(path, earlier)
            is_done.add(first.rank)
        sync_folder(self.folder)
        self._newest = None

    def _newest_row(self) -> tuple[int, int]:
        if self._newest is None:
            if self._buffer:
                newest = self._buffer[-1]
            else:
                files = [path for path in _row_files(self.folder) if _first_row(path).rank == self.rank]
                newest = _read_rows(files[-1]) if files else None
            self._newest = (newest["iteration"][-1].as_py(), newest["micro_step"][-1].as_py()) if newest else (-1, -1)
        return self._newest

    def _write_config(self, config: Mapping) -> None:
        path = self.folder / _CONFIG
        text = _to_json(config)
        if not path.exists():
            write_atomically(path, lambda file: file.write(text.encode()), by=self._suffix)
            return
        stored = path.read_text()
        if stored != text:
            try:
                old, new = json.loads(stored), json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is damaged ({error}). Choose another folder, or remove the file.") from error
            changes = [
                f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
                for key in sorted(old.keys() | new.keys())
                if json.dumps(old.get(key, "absent")) != json.dumps(new.get(key, "absent"))
            ]
            raise FileExistsError(
                f"{path} belongs to a run with another configuration ({'; '.join(changes)}). Choose another folder for "
                "this run, or remove that one."
            )

    def _write_val_batch(self, val_batch: Mapping[str, Tensor]) -> None:
        path = self.folder / f"val_batch{self._suffix}.safetensors"
        # Copies, because safetensors refuses tensors that share memory, as inputs and labels often do.
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in val_batch.items()}
        if not path.exists():
            write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors)))
            return
        try:
            stored = safetensors.torch.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Choose another folder, or remove the file.") from error
        same = stored.keys() == tensors.keys() and all(
            stored[name].dtype == t.dtype and torch.equal(stored[name], t) for name, t in tensors.items()
        )
        if not same:
            raise FileExistsError(
                f"{path} holds another validation batch than this run's, and the dots of one log refer to one "
                "validation batch. Choose another folder for this run, or remove that one."
            )


def read_dot_log(folder: str | os.PathLike | Sequence[str | os.PathLike]) -> "pyarrow.Table":
    """Read a log as one table, the rows of all ranks together.

    Args:
        folder: the log's folder, or a run's folder with `dot_log/` in it. The run may still be writing. Several
            folders for the parts of one log, which ranks without a common disk have written.

    Returns:
        Columns iteration (int64), micro_step (int32), sample_id (int64), domain (string), loss (float32),
        learning_rate (float64), dot (float64); a row per sample and micro-step, sorted by iteration, micro_step, rank
        and position in the batch. `dot` is <grad l_i, mean_j grad l_j>: positive where a plain gradient step on sample
        i lowers the validation loss. Where the log has it (`order=2`), a last column second_order (float64): the value
        of the sample in the step is then learning_rate / n * dot + second_order, n being the samples of all ranks.
        Where a step went on without a sample, its dot (and second_order) is null.

    Raises:
        ImportError: without pyarrow; `pip install "ghostfunc[log]"` brings it.
        FileNotFoundError: if there is no log in a folder.
        ValueError: if a file is damaged, or two folders have rows of the same rank and micro-step; the message names
            it.

    Example:
        >>> import tempfile, ghostfunc.dotlog as dotlog
        >>> log = dotlog.DotLog(tempfile.mkdtemp(), config={})
        >>> dotlog.read_dot_log(log.folder).num_rows
        0
    """
    pa = _import_pyarrow()
    folders = [folder] if isinstance(folder, (str, os.PathLike)) else list(folder)
    read = [(path, _read_rows(path)) for part in folders for path in _files_of_log(Path(part))]
    _require_one_log(read)
    if len(folders) == 1 and {_first_row(path).rank for path, _ in read} <= {0}:
        return _concatenated([table for _, table in read])  # in the order of the run already
    ranks = [pa.array([_first_row(path).rank] * len(table), pa.int32()) for path, table in read]
    rows = _concatenated([table.append_column("rank", rank) for (_, table), rank in zip(read, ranks, strict=True)])
    rows = rows.sort_by([(name, "ascending") for name in ("iteration", "micro_step", "rank")])
    return rows.select([name for name in rows.column_names if name != "rank"])


def _files_of_log(folder: Path) -> list[Path]:
    if (folder / "dot_log").is_dir():
        folder = folder / "dot_log"
    files = _row_files(folder)
    if not files and not (folder / _CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} is not a dot log: it has no {_CONFIG} and no dots-*.parquet. Expected a log's folder, or a "
            "run's folder with dot_log/ in it."
        )
    return files


def _require_one_log(read: Sequence[tuple[Path, Any]]) -> None:
    """Raise if two folders have rows of the same rank and micro-step: these are no parts of one log."""
    if len({path.parent for path, _ in read}) < 2:
        return
    found_in: dict[tuple[int, int, int], Path] = {}
    for path, table in read:
        rank = _first_row(path).rank
        steps = (table[name].to_pylist() for name in ("iteration", "micro_step"))
        for iteration, micro_step in set(zip(*steps, strict=True)):
            other = found_in.setdefault((iteration, micro_step, rank), path)
            if other.parent != path.parent:
                raise ValueError(
                    f"{path} and {other} both have iteration {iteration}, micro_step {micro_step} of rank {rank}: "
                    "several folders are read as the parts of one run, in which each rank has written to one of them."
                )


def _import_pyarrow() -> Any:
    return import_pyarrow("the dot log")


def _schema(*, second_order: bool = False) -> Any:
    pa = _import_pyarrow()
    columns = [
        ("iteration", pa.int64()),
        ("micro_step", pa.int32()),
        ("sample_id", pa.int64()),
        ("domain", pa.string()),
        ("loss", pa.float32()),
        ("learning_rate", pa.float64()),
        ("dot", pa.float64()),
    ]
    return pa.schema([*columns, ("second_order", pa.float64())] if second_order else columns)


def _concatenated(tables: Sequence[Any]) -> Any:
    """Rows after rows; a column that some of them lack is null there."""
    return _import_pyarrow().concat_tables([_schema().empty_table(), *tables], promote_options="default")


def _row_files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("dots-*.parquet") if _ROWS.fullmatch(path.name)), key=_first_row)


def _first_row(path: Path) -> _First:
    match = _ROWS.fullmatch(path.name)
    assert match, path
    return _First(int(match[1]), int(match[2]), int(match[3] or 0))


def _rank_in(name: str) -> int:
    found = _RANK.search(name)
    return int(found[1]) if found else 0


def _read_rows(path: Path) -> Any:
    remedy = (
        "Restore it, or move it away: its rows are then missing, unless the run resumes from iteration "
        f"{_first_row(path)[0]}."
    )
    table = read_rows(path, remedy)
    if not any(table.schema.equals(_schema(second_order=known)) for known in (False, True)):
        raise ValueError(f"{path} is not a file of a dot log: its columns are {', '.join(table.schema.names)}.")
    return table


def _to_json(config: Mapping) -> str:
    def as_text(value: Any) -> str:
        if isinstance(value, (Path, torch.dtype, torch.device)):
            return str(value)
        raise TypeError(f"config.json cannot hold a {type(value).__name__}: {value!r}; give its name or number.")

    return json.dumps(dict(config), indent=2, sort_keys=True, default=as_text) + "\n"
