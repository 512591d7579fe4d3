"""How a command ends when it fails: one line on stderr and an exit status, no traceback.

| status | what happened |
|---|---|
| 1 | the machine or the model: a full disk, no permission, a missing package, a model that ghostfunc cannot serve |
| 2 | the input: a flag, a setting, a file or folder that is not what it should be |
| 130 | Ctrl-C |
| 141 | the reader of our output went away (`| head`); nothing is said |
"""

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
import typer

from ghostfunc._errors import UnsupportedUse
from ghostfunc.cli._share import prefix_of, refuse_several

TRACEBACK = "GHOSTFUNC_TRACEBACK"
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def ends_well(*, resumable: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: errors that have a reason to tell become one line and an exit status.

    Args:
        resumable: whether the same command goes on after an interruption, which Ctrl-C then says.

    Returns:
        The decorator. A command without a parameter `processes` is refused to several of them. With
        `GHOSTFUNC_TRACEBACK` set in the environment, errors are raised as they are.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        alone = "processes" not in signature(command).parameters

        @wraps(command)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                if alone:
                    refuse_several(command.__name__)
                command(*args, **kwargs)
                sys.stdout.flush()
            except KeyboardInterrupt:
                goes_on = ": the same command goes on from what is written" if resumable else ""
                _say(f"{prefix_of(kwargs)}interrupted{goes_on}")
                raise typer.Exit(130) from None
            except BrokenPipeError:
                # The interpreter flushes stdout once more as it ends, and would complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(141) from None
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                status = _status(error)
                if status is None or os.environ.get(TRACEBACK):
                    raise
                _say(f"{prefix_of(kwargs)}error: {_reason(error)}")
                raise typer.Exit(status) from None

        return guarded

    return decorate


def _status(error: Exception) -> int | None:
    """The exit status of an error; None for one that is a fault of the program and wants a traceback."""
    system = error if isinstance(error, OSError) else error.__cause__
    if isinstance(system, OSError) and system.errno is not None:
        return 2 if system.errno in _WRONG_PATH else 1
    if isinstance(error, (ValueError, OSError)):
        return 2
    if isinstance(error, (ImportError, UnsupportedUse)) or _out_of_memory(error):
        return 1
    return None


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    if _out_of_memory(error):
        return "out of memory: a smaller --token-budget takes less; what is written stays good"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip() or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr)
