"""Ranks of a worker script, as processes of this machine: started together, and waited for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

_SHOWN = 3000  # characters of the end of what a rank wrote


def run_ranks(worker: Path, ranks: int, *arguments: object) -> None:
    """Run `python worker RANK RANKS ARGUMENTS...` once for each rank, one thread each, until all have ended well.

    Raises:
        AssertionError: if a rank failed, with how each ended and what it wrote last; after ten minutes none is left.
    """
    started = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(ranks), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    ended = [process.returncode for process in started]
    of_each = [f"rank {rank} {_how(code)}:\n{errors[rank][-_SHOWN:]}" for rank, code in enumerate(ended)]
    assert ended == [0] * ranks, "\n".join(sorted(of_each, key=lambda text: "SIG" not in text))


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
