"""From a report's data to one HTML page. Whatever comes from data is escaped, and there is no script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ghostfunc.report import _marks, _text
from ghostfunc.report._data import ReportData


def render(data: ReportData) -> str:
    """Render a report as one HTML page that needs nothing beside itself.

    Args:
        data: what it shows.

    Returns:
        The page's source; the same data gives the same source.
    """
    source = _template().render(data=data, levels=_marks.LEVELS, width=_marks.WIDTH, height=_marks.HEIGHT)
    return source.lstrip()


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "alpha": _alpha,
        "first_words": _text.first_words,
        "largest": _largest,
        "number": _text.number,
        "percent": _text.percent,
        "place": _marks.place,
        "plain": _text.plain,
        "shape": _marks.shape,
        "shortened": _text.shortened,
        "sign": _marks.sign_of,
        "strongest": _marks.strongest,
        "tokens": _marks.tokens,
        "unsigned": lambda value, digits=3: _text.number(value, signed=False, digits=digits),
        "visible": _text.visible,
        "visible_inline": lambda text: _text.visible(text, newline="↵"),
    }
    return environment.get_template("page.html.jinja")


def _largest(table: Sequence[Sequence[float]]) -> float:
    """The largest size of a number in a table, those that are not numbers left out."""
    return max((abs(value) for row in table for value in row if value == value), default=0.0)


def _alpha(value: float, largest: float) -> str:
    """How much of its colour a cell has, from 0 to 0.6."""
    return f"{0.6 * abs(value) / largest:.2f}" if largest > 0 and value == value else "0"
