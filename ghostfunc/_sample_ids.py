"""How users name samples: integers, with or without a domain beside each, or (domain, offset) pairs."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

SampleIds = Tensor | np.ndarray | Sequence[Any]


def split_ids(argument: str, sample_ids: SampleIds, domains: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Return the integer ids and the domains, which are empty strings where there are none.

    Args:
        argument: the name of the argument that held the ids, for messages.
        sample_ids: integers or (domain, offset) pairs.
        domains: one per sample beside integers.

    Raises:
        TypeError: if an id is not an integer.
        ValueError: if domains are given beside pairs, or an id does not fit into 64 bits.
    """
    entries = sample_ids.tolist() if isinstance(sample_ids, (Tensor, np.ndarray)) else list(sample_ids)
    if any(isinstance(entry, (tuple, list)) for entry in entries):
        if domains is not None:
            raise ValueError(f"give domains in {argument}, as (domain, offset), or as domains=, not in both places.")
        return [_integer(argument, offset) for _, offset in entries], [str(domain) for domain, _ in entries]
    return [_integer(argument, entry) for entry in entries], [""] * len(entries) if domains is None else list(domains)


def names_of(sample_ids: Sequence[int], domains: Sequence[str]) -> list[str]:
    """Samples as error messages name them."""
    pairs = zip(sample_ids, domains, strict=True)
    return [f"sample {sample_id} of {domain}" if domain else f"sample {sample_id}" for sample_id, domain in pairs]


def _integer(argument: str, entry: Any) -> int:
    try:
        number = operator.index(entry)
    except TypeError as error:
        raise TypeError(f"{argument}: expected integers or (domain, offset) pairs, not {entry!r}.") from error
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{argument}: {number} does not fit into 64 bits.")
    return number
