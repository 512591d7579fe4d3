"""Drawings of a page in plain HTML and SVG: tokens in their colours, the shapes of distributions."""

from __future__ import annotations

from itertools import groupby

from markupsafe import Markup

from ghostfunc.report._data import Distribution, Highlights, Spread
from ghostfunc.report._text import number, visible

LEVELS = 6
WIDTH, HEIGHT = 240.0, 26.0


def sign_of(value: float) -> str:
    """The class of a signed number: "p", "n", or "z" for zero and what is not a number."""
    return "p" if value > 0 else "n" if value < 0 else "z"


def level_of(value: float, largest: float) -> int:
    """The strength of a colour, from 0 (none) to LEVELS, proportional to |value| / largest."""
    if not largest > 0 or value != value:
        return 0
    return round(LEVELS * min(1.0, abs(value) / largest))


def tokens(highlights: Highlights) -> Markup:
    """A passage's text with each token in the colour of its score, and the score as its title.

    Tokens too weak for a colour are plain text.
    """
    marked = _characters(highlights)
    largest = max((abs(score) for _, score in marked), default=0.0)
    parts = []
    for level, group in groupby(marked, key=lambda token: level_of(token[1], largest)):
        if level == 0:
            parts.append(visible("".join(piece for piece, _ in group)))
            continue
        for piece, score in group:
            # A line end has no width to be coloured.
            shown = visible(piece, newline="↵\n") if piece else Markup("…")
            parts.append(
                Markup('<mark class="{}{}" title="{}">{}</mark>').format(sign_of(score), level, number(score), shown)
            )
    return Markup("").join(parts)


def _characters(highlights: Highlights) -> list[tuple[str, float]]:
    """Pieces with their scores; a token without characters of its own adds to the one before, whose last it shares."""
    found: list[tuple[str, float]] = []
    for piece, score in zip(highlights.pieces, highlights.scores, strict=True):
        if found and not piece:
            found[-1] = found[-1][0], found[-1][1] + score
        else:
            found.append((piece, score))
    return found


def strongest(highlights: Highlights, count: int = 8) -> list[tuple[str, float]]:
    """The tokens of the largest scores in size, with their scores, the largest first."""
    return sorted(_characters(highlights), key=lambda token: -abs(token[1]))[:count]


def shape(distribution: Distribution) -> str:
    """The path of a histogram, as high as its tallest bin, in a box of WIDTH x HEIGHT."""
    counts = distribution.histogram
    tallest = max(counts, default=0) or 1
    step = WIDTH / max(1, len(counts))
    points = [f"M0 {HEIGHT:g}"]
    for place, count in enumerate(counts):
        y = HEIGHT - (HEIGHT - 2) * count / tallest
        points.append(f"L{place * step:.1f} {y:.1f}L{(place + 1) * step:.1f} {y:.1f}")
    return "".join(points) + f"L{WIDTH:g} {HEIGHT:g}Z"


def place(value: float, spread: Spread) -> float:
    """Where a score is between the ends of a spread, from 0 to WIDTH."""
    width = spread.high - spread.low
    return WIDTH * min(1.0, max(0.0, (value - spread.low) / width)) if width > 0 else WIDTH / 2
