"""What a command prints: results on stdout, everything about the run on stderr."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH_IN_FILES = 120


def results() -> Console:
    """The console of results."""
    return _console(sys.stdout)


def status() -> Console:
    """The console of what happens meanwhile."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else _WIDTH_IN_FILES)


def say(line: str) -> None:
    """One line on stderr, as it is."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, on lines that people can read; numbers that JSON does not have are refused."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def stdout_is_for_results() -> Iterator[None]:
    """What libraries print goes to stderr, so that JSON is alone on stdout."""
    with redirect_stdout(sys.stderr):
        yield


def table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose last column takes the room that is left and is cut to one line.

    Args:
        title: above it.
        columns: `(heading, "left" or "right")`.
        rows: their cells; the text is shown as it is, without markup.

    Returns:
        The table, to be printed on a console.
    """
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    for number, (heading, justify) in enumerate(columns, 1):
        last = number == len(columns)
        made.add_column(
            heading,
            justify="right" if justify == "right" else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if last else None,
            header_style="dim",
        )
    for cells in rows:
        made.add_row(*map(Text, cells))
    return made


def one_line(text: str, characters: int = 400) -> str:
    r"""The beginning of a text on one line, without characters that a terminal would obey.

    Example:
        >>> one_line("two\n  lines \x1b[31mred")
        'two lines ·[31mred'
    """
    line = " ".join(text[: 4 * characters].split())
    shown = "".join("·" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co"} else c for c in line)
    return shown if len(shown) <= characters else shown[: characters - 1] + "…"


def number(value: float) -> str:
    """A score with four significant digits and its sign.

    Example:
        >>> number(0.18), number(-1234567.0)
        ('+0.1800', '-1.235e+06')
    """
    return f"{value:+#.4g}"
