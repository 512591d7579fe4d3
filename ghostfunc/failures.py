"""Ranks that end together: what ends one of them reaches the others, with its reason and in bounded time.

A rank that leaves breaks the collective in which the others wait for it, or lets it time out (the `timeout` of
`init_process_group`); torchrun then ends the rest. What they say is "connection closed by peer". Here they say whose
fault it was: the one that leaves has written its reason into the process group's store.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ghostfunc._ranks import RankFailed, world_size

_KEY = "ghostfunc/ended/"
_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|process ?group", re.IGNORECASE)


@contextmanager
def fail_together(patience: float = 10.0) -> Iterator[None]:
    """Tell the other ranks what ends this one, and raise what ended another where a collective breaks because of it.

    Put it around the body of `main`, after `init_process_group`. Under torchrun the error is also in its report.
    Without a process group it changes nothing.

    Args:
        patience: seconds in which the other ranks may say why they ended, once a collective has failed.

    Raises:
        RankFailed: where a collective failed because another rank did; the message has its rank and its error, or says
            that it ended without a word, as a killed process does, or hangs.

    Example:
        >>> from ghostfunc.failures import fail_together
        >>> with fail_together():
        ...     loss = 2.5
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        ending = _as_of_others(error, patience) if world_size() > 1 else error
        if isinstance(ending, Exception) and os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(ending)
        if ending is error:
            raise
        raise ending from error


def _as_of_others(error: BaseException, patience: float) -> BaseException:
    """Write down what ended this rank; if that was the end of another one, return what is to be raised instead."""
    is_broken = _is_broken_collective(error) or _is_broken_collective(error.__cause__)
    follows = is_broken or isinstance(error, RankFailed)
    rank, text = dist.get_rank(), f"{type(error).__name__}: {error}"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_KEY}{rank}", json.dumps({"follows": follows, "text": text}))
        if not is_broken:  # the reason is its own, or in its message already
            return error
        said = _reasons(store, patience)
    except RuntimeError as unreachable:
        if not is_broken:
            return error
        return RankFailed(
            f"a collective failed, and the store of the process group, which rank 0 or its launcher holds, does not "
            f"answer ({unreachable}): that process is probably gone. What rank {rank} saw: {text}"
        )
    causes = [f"rank {other}: {found['text']}" for other, found in said.items() if not found["follows"]]
    silent = [str(other) for other in range(dist.get_world_size()) if other not in said and other != rank]
    if silent and not causes:
        causes = [f"rank {', '.join(silent)} ended without a word (killed?), or hangs"]
    if not causes:
        return error
    return RankFailed(f"another rank failed, and this one cannot go on. {'; '.join(causes)}. Rank {rank} saw: {text}")


def _reasons(store: Any, patience: float) -> dict[int, dict[str, Any]]:
    """What other ranks have written, as soon as one of them is the first cause, or all have, or at the deadline."""
    others = [other for other in range(dist.get_world_size()) if other != dist.get_rank()]
    deadline = time.monotonic() + patience
    while True:
        there = [other for other in others if store.check([f"{_KEY}{other}"])]
        said = {other: json.loads(store.get(f"{_KEY}{other}")) for other in there}
        if len(said) == len(others) or any(not found["follows"] for found in said.values()):
            return said
        if time.monotonic() > deadline:
            return said
        time.sleep(0.1)


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether an error is of ranks that did not meet, rather than of what they do."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
