"""Small things that a training script needs: device, seed, quiet libraries, whole files, and a stop between steps."""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `auto` (the machine's accelerator if it has one, else the CPU), or a name that torch knows.

    Raises:
        ValueError: if torch does not know the name, or if this machine has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: this machine has no such device ({reason}). Use --device auto.") from error
    return device


def seed_everything(seed: int, device: torch.device) -> None:
    """Make two runs with one seed equal: seed torch, and on a GPU choose operations that give the same sums each time.

    Operations that have no such form are named in a warning.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that the clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def write_whole(path: Path, text: str) -> None:
    """Write a text file such that a kill leaves either the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def run_name(parts: Iterable[str], configuration: Mapping[str, Any]) -> str:
    """The name of a run's folder: parts to read, and a hash that tells configurations apart where they do not.

    Example:
        >>> run_name(["GradProj", "my model"], {"seed": 0})
        'GradProj-my_model-de7d7744'
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]
    return "-".join(re.sub(r"[^\w.-]+", "_", part)[:40] for part in [*parts, digest])


def peak_memory(device: torch.device) -> int | None:
    """The most memory that this process has held, in bytes: on a GPU its tensors', else all of it.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Not the resource module's: that one counts the parent's peak in.
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


class Stopped(Exception):
    """Somebody asked the run to stop; `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """SIGTERM or Ctrl-C, remembered until the run is at a point from which it can be resumed.

    Args:
        agree: makes one signal of those that several processes have had, 0 being none; all of them then call `check`
            equally often.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signum: int | None = None
        self._agree = agree or (lambda signum: signum)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if signum := self._agree(self.signum or 0):
            raise Stopped(signum)


@contextmanager
def stop_request(agree: Callable[[int], int] | None = None) -> Iterator[StopRequest]:
    """Catch the first SIGTERM or Ctrl-C for `StopRequest.check`; a second one acts at once, as without this.

    Outside the main thread, where Python allows no signal handlers, nothing is caught.

    Args:
        agree: as in `StopRequest`, for several processes. Later signals are then caught too: a launcher sends its own
            after the terminal's, and kills what takes too long.

    Example:
        >>> with stop_request() as stop:
        ...     for step in range(3):
        ...         stop.check()
    """
    request = StopRequest(agree)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def remember(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        if agree is None:
            restore()

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, remember)
    try:
        yield request
    finally:
        restore()
