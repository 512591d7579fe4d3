"""The settings in a result's folder: `run.yaml`, and `run-2.yaml`, ... for data that was added to an index."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ghostfunc._parquet import TEMPORARY
from ghostfunc.cli._config import RunConfig, as_flag
from ghostfunc.index._manifest import create

# Data that is added may be read in its own way; what is made of it is what the index is of.
_OF_ADDED_DATA = frozenset({"append", "limit", "text_field", "domain_field", "shard_rows"})


def run_files(folder: Path) -> list[Path]:
    """The settings in a folder, in the order in which their data was added."""
    files: list[Path] = []
    while (file := run_file(folder, len(files) + 1)).exists():
        files.append(file)
    return files


def run_file(folder: Path, number: int = 1) -> Path:
    """Where the settings of the first data are, or of data that was added later."""
    return folder / ("run.yaml" if number == 1 else f"run-{number}.yaml")


def file_of(config: RunConfig) -> Path:
    """The file that a run's settings belong in.

    Args:
        config: the settings.

    Returns:
        A path in `config.out`; a file that is there has the same settings, but for what may have moved.

    Raises:
        ValueError: if the folder was begun with other settings; the message names the first that differs.
    """
    folder = Path(config.out)
    there = run_files(folder)
    if not there:
        return run_file(folder)
    begun = [type(config).of({}, file) for file in there]
    for file, other in zip(there, begun, strict=True):
        if os.path.abspath(config.data) == other.data and config.difference(other, free={"append"}) is None:
            return file
    adds = asdict(config).get("append", False)
    different = config.difference(begun[0], free=_OF_ADDED_DATA if adds else {"append"})
    if different is not None:
        name, ours, theirs = different
        goes_on = (
            f"added data takes what the index has: leave {as_flag(name)} away"
            if adds
            else f"ghostfunc {config.command} --config {there[0]} goes on with those; for other settings choose "
            "another --out"
        )
        raise ValueError(f"{as_flag(name)} is {ours!r}, and {folder} was begun with {theirs!r}: {goes_on}")
    return run_file(folder, len(there) + 1) if adds else there[0]


def save(config: RunConfig, file: Path, process: int) -> None:
    """Write settings whole or not at all; several processes may do so at once, each with its number."""
    content = config.as_yaml().encode()
    create(file, content)  # which removes what killed processes left, whatever their numbers
    if file.read_bytes() == content:
        return
    temporary = file.with_name(f"{file.name}.{process}{TEMPORARY}")
    with temporary.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    with suppress(FileNotFoundError):  # another process of this run has removed it, and saves the same settings
        os.replace(temporary, file)
