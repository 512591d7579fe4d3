"""Types of command-line options: numbers within their bounds."""

import argparse
import re


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _at_least(text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


def _at_least(text: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, not {text!r}")
    return int(text)
