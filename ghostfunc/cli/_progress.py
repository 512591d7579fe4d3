"""How far a run is: a bar on a terminal, plain lines now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ghostfunc.cli._console import say, status
from ghostfunc.cli._share import ALONE, Share

Report = Callable[[int, int, int], None]
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, unit: str = "samples", share: Share = ALONE) -> Iterator[Report]:
    """Show how far a run is; of several processes, each its own share, in lines that become fewer the more they are.

    Args:
        what: what is being done.
        unit: what is counted; "" to show the share alone.
        share: which process this is.

    Yields:
        `report(done, total, tokens)`: what is finished, by earlier runs too, of how much (0 if nobody knows), and the
        tokens of this run alone.
    """
    if sys.stderr.isatty() and share.world == 1:
        with _Bar(what, unit) as bar:
            yield bar
    else:
        yield _Lines(f"{share.prefix}{what}", unit, SECONDS_BETWEEN_LINES * share.world)


class _Pace:
    """Tokens per second and time left, counted from the first report on."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._seconds = 0.0
        self._done = self._tokens = 0

    def update(self, done: int, tokens: int) -> None:
        self._began = self._began or (time.monotonic(), done)
        self._seconds = time.monotonic() - self._began[0]
        self._done, self._tokens = done - self._began[1], tokens

    @property
    def rate(self) -> str:
        return f"{self._tokens / self._seconds:,.0f} tokens/s" if self._tokens and self._seconds else ""

    def left(self, remaining: int) -> str:
        if not self._done or not remaining:
            return ""
        minutes, seconds = divmod(round(remaining * self._seconds / self._done), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"


def _counted(done: int, total: int, unit: str) -> str:
    share = f"{done / total:.0%}" if total else ""
    return f"{done:,} of {total:,} {unit} ({share})" if unit and total else f"{done:,} {unit}" if unit else share


class _Bar:
    """A bar that is redrawn in place."""

    def __init__(self, what: str, unit: str) -> None:
        self._unit = unit
        self._pace = _Pace()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counted]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=status(),
        )
        self._task = self._bar.add_task(what, total=None, counted="", rate="")
        self._begun = False

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, tokens: int) -> None:
        self._pace.update(done, tokens)
        if not self._begun:  # what earlier runs finished says nothing about this run's pace
            self._bar.reset(self._task, completed=done)
            self._begun = True
        counted = _counted(done, total, self._unit)
        self._bar.update(self._task, completed=done, total=total or None, counted=counted, rate=self._pace.rate)


class _Lines:
    """A line at the beginning, at the end, and every so many seconds between."""

    def __init__(self, what: str, unit: str, seconds: float) -> None:
        self._what, self._unit, self._seconds = what, unit, seconds
        self._pace = _Pace()
        self._next = 0.0
        self._said = -1

    def __call__(self, done: int, total: int, tokens: int) -> None:
        self._pace.update(done, tokens)
        now = time.monotonic()
        if done == self._said or (now < self._next and done != total):
            return
        self._next, self._said = now + self._seconds, done
        facts = [_counted(done, total, self._unit), self._pace.rate, self._pace.left(total - done) if total else ""]
        say(f"{self._what}: {', '.join(filter(None, facts))}")
