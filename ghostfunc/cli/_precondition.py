"""What is done to queries before the search, by its name on the command line."""

from __future__ import annotations

from typing import Any

from ghostfunc.index import Store, inverse_gram

INVERSE_GRAM = "inverse-gram"


def check_precondition(name: str | None) -> None:
    """Refuse a preconditioner that is not there, before anything is loaded."""
    if name not in (None, INVERSE_GRAM):
        raise ValueError(f"--precondition {name} is not there; choose {INVERSE_GRAM}")


def preconditioner(store: Store, name: str | None, damping: float) -> Any:
    """The function of queries of that name; None for none."""
    return inverse_gram(store, damping=damping) if name else None


def in_words(name: str | None, damping: float) -> str:
    """What was done to the queries, for a page."""
    return f"inverse Gram matrix of the index's rows, damping {damping:g} of its mean diagonal" if name else ""
