"""Random matrices of projections, `[d, k]` with E[P P^T] the identity, drawn from a seed and a name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor


def _gaussian(d: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randn(d, k, generator=generator, dtype=torch.float64) / sqrt(k)


def _rademacher(d: int, k: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, (d, k), generator=generator).double() - 1) / sqrt(k)


def _orthonormal(d: int, k: int, generator: torch.Generator) -> Tensor:
    """The columns are orthogonal; each has norm sqrt(d / k), without which inner products would shrink by k / d."""
    q, r = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign() * sqrt(d / k)


def _sparse(d: int, k: int, generator: torch.Generator) -> Tensor:
    """One sign in each row, in a column at random (a count sketch, the sparsest SJLT)."""
    column = torch.randint(k, (d, 1), generator=generator)
    sign = 2 * torch.randint(2, (d, 1), generator=generator).double() - 1
    return torch.zeros(d, k, dtype=torch.float64).scatter_(1, column, sign)


def _mask(d: int, k: int, generator: torch.Generator) -> Tensor:
    """Of d coordinates k are kept, which are drawn without replacement."""
    kept = torch.randperm(d, generator=generator)[:k].sort().values
    return torch.zeros(d, k, dtype=torch.float64).index_put_(
        (kept, torch.arange(k)), torch.tensor(sqrt(d / k)).double()
    )


KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "orthonormal": _orthonormal,
    "sparse": _sparse,
    "mask": _mask,
}


def random_matrix(kind: str, seed: int, name: str, side: str, d: int, k: int) -> Tensor:
    """One matrix `[d, k]`, drawn on the CPU in float64 from the seed, the parameter's name and the side alone."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return KINDS[kind](d, k, generator_of(seed, name, side))


def generator_of(seed: int, name: str, side: str) -> torch.Generator:
    """Random numbers that a seed, a parameter's name and a side of it decide, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{side}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def ranks(d_in: int, d_out: int, rank: int, min_rank: int) -> tuple[int, int]:
    """The ranks of a layer: k_in / k_out near sqrt(d_out / d_in), k_in * k_out near `rank`, neither below `min_rank`.

    A side that is smaller than its rank is kept whole in number, and the other side has what it leaves.
    """
    ratio = sqrt(d_out / d_in)
    k_in = min(d_in, max(min_rank, round(sqrt(rank * ratio))))
    k_out = min(d_out, max(min_rank, round(rank / k_in)))
    return min(d_in, max(min_rank, round(rank / k_out))), k_out
