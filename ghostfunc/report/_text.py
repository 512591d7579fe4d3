"""Text and numbers for a page: nothing invisible in what came from data, and numbers that read alike."""

from __future__ import annotations

import math
import unicodedata

from markupsafe import Markup, escape

MAX_CHARACTERS = 50_000
MINUS = "\N{MINUS SIGN}"
_KEPT = "\n\t"
_HIDDEN_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_HIDDEN_OTHERS = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f")  # fillers and joiners that draw nothing
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def visible(text: str, *, newline: str = "\n") -> Markup:
    r"""Text as HTML, escaped, with every character shown that would hide, reorder or break the rest.

    Control characters but line ends and tabs, format characters (zero-width, soft hyphen, direction of writing), lone
    surrogates and blank fillers become their code points in a `span`.

    Args:
        text: any.
        newline: what stands for a line end, as text.

    Returns:
        HTML.

    Example:
        >>> visible("<b>\u202e")
        Markup('&lt;b&gt;<span class="code-point" title="RIGHT-TO-LEFT OVERRIDE">U+202E</span>')
    """
    text = text.replace("\r\n", "\n")
    parts, plain = [], []
    for character in text:
        if not _hides(character):
            plain.append(newline if character == "\n" else character)
            continue
        parts.append(escape("".join(plain)))
        plain.clear()
        name = unicodedata.name(character, "control character")
        parts.append(Markup('<span class="code-point" title="{}">U+{:04X}</span>').format(name, ord(character)))
    return Markup("").join([*parts, escape("".join(plain))])


def _hides(character: str) -> bool:
    if character in _KEPT:
        return False
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or character in _HIDDEN_OTHERS


def plain(text: str) -> str:
    """The same as text, for a place that can hold no tags: a hidden character becomes its code point."""
    return "".join(f"U+{ord(character):04X}" if _hides(character) else character for character in text)


def shortened(text: str) -> str:
    """The text, or its first MAX_CHARACTERS characters and how many were left out."""
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]}… [{left:,} more characters]"


def first_words(text: str, characters: int = 90) -> str:
    """The beginning of a text on one line, cut with an ellipsis."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters and len(text) <= 4 * characters else line[: characters - 1].rstrip() + "…"


def number(value: float, *, signed: bool = True, digits: int = 3) -> str:
    """A number with so many significant digits and a true minus sign, in powers of ten where it is small or large.

    Example:
        >>> number(0.012345), number(3.21e-7), number(2.5, signed=False), number(0.0)
        ('+0.0123', '+3.21·10⁻⁷', '2.50', '0')
    """
    sign = MINUS if value < 0 else "+" if signed else ""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{sign}∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 <= power <= 4:
        return f"{sign}{float(f'{mantissa}e{power}'):.{max(0, digits - 1 - power)}f}"
    return f"{sign}{mantissa}·10{str(power).translate(_SUPERSCRIPT)}"


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage, which is neither "0%" nor "100%" unless it is that exactly."""
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{share:.0%}"
