"""The rows of a ledger of values: their columns, their files, the parts that they belong to, and sums of them."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostfunc._parquet import import_pyarrow, read_rows

if TYPE_CHECKING:
    import pyarrow

_FILES = re.compile(r"values-(\d+)-rank(\d+)\.parquet")
PART = ("run", "iteration", "micro_step", "rank")

Part = tuple[str, int, int, int]


def require_pyarrow() -> Any:
    """Import pyarrow, or say what needs it."""
    return import_pyarrow("the ledger of values")


def schema() -> Any:
    """The columns of a file."""
    pa = require_pyarrow()
    return pa.schema(
        [
            ("run", pa.string()),
            ("iteration", pa.int64()),
            ("micro_step", pa.int32()),
            ("rank", pa.int32()),
            ("sample_id", pa.int64()),
            ("domain", pa.string()),
            ("value", pa.float64()),
            ("second_order", pa.float64()),
        ]
    )


def files_of(folder: Path | None) -> list[Path]:
    """The files of a ledger's folder, none where there is no folder."""
    return [] if folder is None else sorted(path for path in folder.glob("values-*") if _FILES.fullmatch(path.name))


def number_and_rank(path: Path) -> tuple[int, int]:
    """What the name of a file says: its number among those of the rank that wrote it."""
    match = _FILES.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2])


def read(path: Path) -> "pyarrow.Table":
    """The rows of one file; ValueError, which names it, if it is damaged or another program's."""
    table = read_rows(path, "Restore it, or move it away: the values of its steps are then missing.")
    if not table.schema.equals(schema()):
        raise ValueError(f"{path} is not a file of a ledger: its columns are {', '.join(table.schema.names)}.")
    return table


def concatenated(tables: Sequence["pyarrow.Table"]) -> "pyarrow.Table":
    """Rows after rows; a table without rows of no tables."""
    return require_pyarrow().concat_tables([schema().empty_table(), *tables])


def slices_of(rows: "pyarrow.Table") -> dict[Part, slice]:
    """Where each part is, in rows that have parts one after the other."""
    columns = [rows[name].to_numpy() for name in PART]
    is_border = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    for column in columns:
        is_border |= column[1:] != column[:-1]
    borders = [0, *(np.flatnonzero(is_border) + 1).tolist(), len(rows)] if len(rows) else [0]
    return {
        (str(run), int(iteration), int(micro_step), int(rank)): slice(start, stop)
        for start, stop in itertools.pairwise(borders)
        for run, iteration, micro_step, rank in [[column[start] for column in columns]]
    }


def summed(rows: "pyarrow.Table", keys: list[str]) -> "pyarrow.Table":
    """Sums by key; on one thread, row after row, which fixes the order of the additions."""
    pa = require_pyarrow()
    sums = rows.group_by(keys, use_threads=False).aggregate(
        [("value", "sum"), ("second_order", "sum"), ([], "count_all")]
    )
    values, second = sums["value_sum"], sums["second_order_sum"]
    columns = {
        "value": values,
        "first_order": pa.compute.subtract(values, second),
        "second_order": second,
        "visits": sums["count_all"],
    }
    return pa.table({key: sums[key] for key in keys} | columns)
