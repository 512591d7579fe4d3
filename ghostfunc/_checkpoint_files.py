"""The files of a checkpoint: their checksums, and how folders go and come when a kill or a slow disk is near."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from pathlib import Path

REMOVED = ".removed-"
PATIENCE = 20.0  # seconds until a file that one machine wrote to a shared disk is seen by another


def appears(path: Path) -> bool:
    """Whether a file is there, or is within the time that a network's disk takes to show it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        # A listing: a shared disk may remember for a while that a single file is not there.
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def checksum(path: Path) -> dict[str, int]:
    """The size and the CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def sync(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a folder such that a kill leaves no part of it under its name."""
    doomed = path.with_name(f"{REMOVED}{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
