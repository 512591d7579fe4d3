"""A process that a benchmark starts and asks, line by line, so that every method runs in a process of its own."""

import json
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import last_line


class Worker:
    """A process that answers a line of JSON on standard input with one on standard output.

    Attributes:
        name: what it is called.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def ask(self, message: Any, limit: float | None = None) -> dict[str, Any]:
        """What it answers.

        Raises:
            RuntimeError: if it ends instead, with its last words, or is silent for more than `limit` seconds.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer(limit)

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        """The next line that it says; raises as `ask` does."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self._process.kill()
            self.stop()
            raise RuntimeError(f"stopped after {limit:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._log.seek(0)
            words = last_line(self._log.read())
            self._log.close()
            raise RuntimeError(f"ended with status {self._process.returncode}: {words}")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()
