"""What an operation is called, which tensors it takes, and whether it writes: read off its function and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

LIKE_ANOTHER = frozenset("to type_as expand_as view_as reshape_as".split())  # the second argument gives no data


def op_name(func: Callable) -> str:
    """One name for `torch.add`, `Tensor.add`, `Tensor.add_` and `Tensor.__add__`; `T` for the property `Tensor.T`."""
    name = func.__name__
    if name == "__get__":
        return "get_" + func.__self__.__name__  # type: ignore[attr-defined]
    return name.strip("_")


def is_in_place(func: Callable) -> bool:
    """Whether a function writes to its first argument."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, inside lists and tuples too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of an einsum's operands and of its result, with `...` and an implicit result written out."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    used = set(equation)
    spare = [c for c in map(chr, range(ord("A"), ord("A") + 400)) if c not in used and c.isalpha()]
    widest = max((rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)), default=0)
    dots = spare[: max(widest, 0)]
    written = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        written.append(term.replace("...", "".join(dots[len(dots) - count :])))
    if not arrow:
        joined = left.replace("...", "").replace(",", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return written, right.replace("...", "".join(dots))
