"""Products of two tensors as einsums: `tensordot`, `inner`, `bmm` and the others are one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters
from typing import Any

from torch import Tensor


def _matmul(a: Tensor, b: Tensor) -> str:
    left, right = ("i" if t.dim() == 1 else letters for t, letters in ((a, "...ni"), (b, "...ij")))
    dots = "..." if max(a.dim(), b.dim()) > 1 else ""
    return f"{left},{right}->{dots}{'n' * (a.dim() > 1)}{'j' * (b.dim() > 1)}"


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> str:
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        of_a: Sequence[int] = range(a.dim() - dims, a.dim())
        of_b: Sequence[int] = range(dims)
    else:
        of_a, of_b = ([d] if isinstance(d, int) else d for d in dims)
    left = list(ascii_letters[: a.dim()])
    right = list(ascii_letters[a.dim() : a.dim() + b.dim()])
    for p, q in zip(of_a, of_b, strict=True):
        right[q] = left[p]
    output = [c for c in left if c not in right] + [c for c in right if c not in left]
    return f"{''.join(left)},{''.join(right)}->{''.join(output)}"


_EQUATIONS: dict[str, Callable[..., str]] = {
    **dict.fromkeys(("matmul", "mm"), _matmul),
    "bmm": lambda a, b: "eni,eij->enj",
    "mv": lambda a, b: "ni,i->n",
    "inner": lambda a, b: _tensordot(a, b, ([-1], [-1])),
    **dict.fromkeys(("outer", "ger"), lambda a, b: "i,j->ij"),
    "tensordot": _tensordot,
}
NAMES = frozenset(_EQUATIONS)


def as_einsum(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """One of the products `NAMES` as the arguments of an einsum.

    Args:
        name: the product.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The equation and the two operands.
    """
    a, b, *options = (*args, *(value for key, value in kwargs.items() if key != "out"))
    return _EQUATIONS[name](a, b, *options), a, b
