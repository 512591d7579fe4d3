"""Parquet files that a kill at any moment leaves whole: written beside their place, synced to disk, and moved there."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

TEMPORARY = ".tmp"

Numbers = Tensor | np.ndarray | Sequence[Any]


def import_pyarrow(what: str) -> Any:
    """Import pyarrow, which is an extra; without it, `what` is said to need it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{what} needs pyarrow, which is an extra: pip install "ghostfunc[log]"') from error
    return pyarrow


def read_rows(path: Path, remedy: str, columns: Sequence[str] | None = None) -> Any:
    """Read one file as a table, all of it or those of these columns that it has.

    Raises:
        ValueError: if it is damaged; the message names it, and ends with `remedy`.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table: it would take a folder named "lr=1" for a column.
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(None if columns is None else list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error


def write_rows(path: Path, table: Any) -> None:
    """Write a table as one file, whole or not at all."""
    import pyarrow.parquet

    write_atomically(
        path, lambda file: pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
    )


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, alone: bool = False, by: str = "") -> None:
    """Let `write` fill a file that is at `path` whole, or not at all; when it fails, nothing is left beside it.

    Args:
        path: where the file will be.
        write: is given the open file.
        alone: raise FileExistsError if another process is at it, or a killed one has left a temporary file.
        by: tells the temporary files of processes apart that write the same file.
    """
    temporary = path.with_name(path.name + by + TEMPORARY)
    file = temporary.open("xb" if alone else "wb")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_list(numbers: Numbers) -> list:
    """Numbers of any kind as Python's; a single one makes a list of one."""
    if isinstance(numbers, Tensor):
        tensor = numbers.detach().reshape(numbers.shape or (1,))
        return (tensor.double() if tensor.is_floating_point() else tensor).tolist()
    return np.atleast_1d(numbers).tolist() if isinstance(numbers, np.ndarray) else list(numbers)
