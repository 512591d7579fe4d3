"""A process's share of a run: its number of how many, and which of them has the last word.

Processes of one run meet in the result's folder and nowhere else: no process group is made, so that they may be on
machines that do not know each other, begin at different times, and die without the others' noticing.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostfunc.cli._console import say
from ghostfunc.index import Store

RANKS = ["RANK", "SLURM_PROCID"]
# Of a step alone: SLURM_NTASKS is also set in a batch script, where one process runs.
WORLDS = ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
_LOCAL_RANKS = ["LOCAL_RANK", "SLURM_LOCALID"]
UNFINISHED = "unfinished"
PATIENCE = 600.0  # seconds, as the next one
_SILENT = 10.0


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is.

    Attributes:
        rank: its number, from 0.
        world: how many they are.
        local_rank: its number on this machine, where that is known; else `rank`.
        together: whether torchrun or srun started all of them at once.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    together: bool = False

    @classmethod
    def of(cls, rank: int, world: int) -> Share:
        """A share by its number, with what the launcher says of it if that is where the number comes from.

        Raises:
            ValueError: if it is none of so many.
        """
        if rank >= world:
            raise ValueError(f"--rank-of {rank} is none of {world} processes (--world-size), which count from 0")
        for names in zip(RANKS, WORLDS, _LOCAL_RANKS, strict=True):
            of_rank, of_world, of_local = (os.environ.get(name, "") for name in names)
            if (of_rank, of_world) == (str(rank), str(world)) and of_local.isdecimal():
                return cls(rank, world, int(of_local), together=world > 1)
        return cls(rank, world, rank)

    @property
    def prefix(self) -> str:
        """What a line begins with that one of several processes says."""
        return f"rank {self.rank} of {self.world}: " if self.world > 1 else ""


ALONE = Share()


def prefix_of(flags: Mapping[str, Any]) -> str:
    """The prefix of the share that a command was given; none for a share that is to be refused."""
    rank, world = flags.get("process", 0), flags.get("processes", 1)
    return Share(rank, world).prefix if rank < world else ""


def refuse_several(command: str) -> None:
    """Refuse to be one of several processes, which would do the same work and write the same files.

    Raises:
        ValueError: if the launcher started several.
    """
    for rank, world in zip(RANKS, WORLDS, strict=True):
        if os.environ.get(world, "1") not in ("", "1") and os.environ.get(rank):
            raise ValueError(
                f"{rank} and {world} say that this is process {os.environ[rank]} of {os.environ[world]}, and ghostfunc "
                f"{command} is for one: run it without torchrun or srun, or without these variables"
            )


def wait_for_rank_0(share: Share, file: Path, patience: float | None = None) -> None:
    """Wait until the first of processes that were started together has begun the result.

    A disk that the machines do not share is found out by this: each would write an index with holes.

    Args:
        share: this process.
        file: what rank 0 writes when it begins.
        patience: seconds; None for `PATIENCE`.

    Raises:
        TimeoutError: if it does not appear.
    """
    if share.rank == 0 or not share.together:
        return
    seconds = PATIENCE if patience is None else patience
    began, told = time.monotonic(), False
    while not file.exists():
        waited = time.monotonic() - began
        if waited > _SILENT and not told:
            say(f"{share.prefix}waiting for rank 0 to begin {file.parent}")
            told = True
        if waited > seconds:
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"on {socket.gethostname()}, {file} has not appeared within {seconds:g} s of waiting for rank 0, which "
                f"writes it. Either rank 0 has failed (see what it said), or {file.parent} is not on a disk that all "
                "machines share: choose a folder that they share",
            )
        time.sleep(0.1)


class LastWord:
    """Which of several processes tells about the whole: the one that finds it complete, and no other.

    A file in the folder says that it is unfinished. Whoever finds the folder complete removes that file, and of
    several who do so at the same moment one succeeds. It is written before a share that has something to do, so not
    after the folder is complete.

    Args:
        folder: the result.
        share: this process.
    """

    def __init__(self, folder: str, share: Share) -> None:
        self._folder, self._share = Path(folder), share
        self._mark = self._folder / UNFINISHED
        self._was_complete = False

    def begin(self, *, work: bool) -> None:
        """Call it when the folder is known to be this run's.

        Args:
            work: whether this process has something to write.
        """
        self._was_complete = not self._mark.exists() and Store(self._folder).complete
        if work and self._share.world > 1:
            self._mark.touch()

    def is_ours(self, store: Store) -> bool:
        """Whether this process, whose share is done, is the one to tell about the whole."""
        try:
            if store.complete:
                self._mark.unlink()
                return True
        except FileNotFoundError:
            pass
        return self._share.world == 1 or (self._was_complete and self._share.rank == 0)


def share_done(share: Share, store: Store, tokens: int, seconds: float) -> str:
    """What a process says that does not have the last word."""
    left = sum(shard.rows for _, shard in store.missing_shards)
    others = f"{left:,} rows of other ranks are yet to be written" if left else "nothing is left to be written"
    return f"{share.prefix}done ({tokens:,} tokens in {seconds:,.1f} s); {others}"
