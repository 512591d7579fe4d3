"""K-FAC and EK-FAC over ranks: moments are sums over all ranks' samples, and the eigenvectors of a matrix one rank's.

    sum over all samples = sum over ranks of a rank's own sum

Ranks may have met other matrices of a parameter (experts that none of their samples went to) or other kinds of use;
what a rank has not met is zero there. Eigenvectors are only unique up to signs and rotations of equal eigenvalues: each
matrix is diagonalised on one rank, and the others are told, which divides that work among them too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc._errors import UnsupportedUse
from ghostfunc._fisher import Block
from ghostfunc._moments import Matrix, Sums
from ghostfunc._parameter_fisher import ParameterFisher, are_apart
from ghostfunc._ranks import Ranks

Key = tuple[int, int, str]  # a matrix's shape, and a digest of its entries


def sum_moments(ranks: Ranks, parameters: Sequence[ParameterFisher], dtype: torch.dtype, device: torch.device) -> None:
    """Put the sums over all ranks' samples in the place of this rank's.

    Args:
        ranks: the ranks.
        parameters: with the moments of this rank's samples, the same parameters on each rank.
        dtype: of the moments.
        device: of the moments.

    Raises:
        UnsupportedUse: on every rank, if ranks use a parameter in ways whose moments do not add up.
    """
    _meet(ranks, parameters, dtype, device)
    matrices = [matrix for parameter in parameters for matrix in parameter.matrices]
    tensors = {
        f"{number}.{kind}.{part}": getattr(sums, part)
        for number, matrix in enumerate(matrices)
        for kind, sums in matrix.sums.items()
        for part in ("left", "right", "positions")
    }
    found = ranks.sums(tensors)
    for number, matrix in enumerate(matrices):
        matrix.sums = {
            kind: Sums(*(found[f"{number}.{kind}.{part}"] for part in ("left", "right", "positions")))
            for kind in matrix.sums
        }


def diagonalise(ranks: Ranks, matrices: Sequence[Matrix], samples: int) -> None:
    """Make every matrix's block, on one rank, and have it on all.

    Args:
        ranks: the ranks.
        matrices: with the moments of all ranks, the same ones on each.
        samples: of all ranks.
    """
    with ranks.together():
        for number, matrix in enumerate(matrices):
            if number % ranks.size == ranks.rank:
                matrix.diagonalise(samples)
    tensors = {}
    for number, matrix in enumerate(matrices):
        block = matrix.block or matrix.zero_block()
        parts = {"values": block.values, "left": block.left, "right": block.right}
        tensors |= {f"{number}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    found = ranks.sums(tensors)  # one rank's, for it is zero on the others
    for number, matrix in enumerate(matrices):
        values, left, right = (found.get(f"{number}.{part}") for part in ("values", "left", "right"))
        assert values is not None
        matrix.block = Block(values, 0.0, left, right, matrix.entries)


def sum_squares(ranks: Ranks, matrices: Sequence[Matrix]) -> None:
    """Put the sums of squares over all ranks' samples in the place of this rank's."""
    squares = {}
    for number, matrix in enumerate(matrices):
        assert matrix.block is not None
        squares[str(number)] = torch.zeros_like(matrix.block.values) if matrix.squares is None else matrix.squares
    found = ranks.sums(squares)
    for number, matrix in enumerate(matrices):
        matrix.squares = found[str(number)]


def _meet(ranks: Ranks, parameters: Sequence[ParameterFisher], dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter the matrices and kinds of use that any rank has met, in the order of the ranks."""
    mine = [{_key(m): m for m in parameter.matrices} for parameter in parameters]
    described = [
        {"dense": parameter.dense, "matrices": [[*key, list(matrix.sums)] for key, matrix in own.items()]}
        for parameter, own in zip(parameters, mine, strict=True)
    ]
    of_ranks: list[Any] = [json.loads(text) for text in ranks.texts(json.dumps(described))]
    told: dict[str, Tensor] = {}
    for number, (parameter, own) in enumerate(zip(parameters, mine, strict=True)):
        met = [of_rank[number] for of_rank in of_ranks if of_rank[number]["matrices"]]
        if len({of_rank["dense"] for of_rank in met}) > 1:
            raise _do_not_add_up(parameter)
        parameter.dense = any(of_rank["dense"] for of_rank in met)
        kinds: dict[Key, dict[str, None]] = {}
        for of_rank in met:
            for p, q, digest, names in of_rank["matrices"]:
                kinds.setdefault((p, q, digest), {}).update(dict.fromkeys(names))
        parameter.matrices = []
        for place, key in enumerate(kinds):
            p, q, digest = key
            holders = [r for r, of_rank in enumerate(of_ranks) if _has(of_rank[number]["matrices"], key)]
            nothing = torch.zeros(p * q, dtype=torch.int64, device=device) if digest else None
            matrix = own.get(key) or Matrix((p, q), nothing, parameter.max_side)
            matrix.sums = {kind: matrix.sums.get(kind) or matrix.zero_sums(kind, dtype, device) for kind in kinds[key]}
            parameter.matrices.append(matrix)
            if digest and len(holders) < ranks.size:
                assert matrix.entries is not None
                theirs = matrix.entries if ranks.rank == holders[0] else torch.zeros_like(matrix.entries)
                told[f"{number}.{place}"] = theirs
    for which, entries in ranks.sums(told).items():  # one rank's, for the others give zeros
        number, place = map(int, which.split("."))
        parameters[number].matrices[place].entries = entries
    for parameter in parameters:
        if not are_apart(parameter.matrices, parameter.numel):
            raise _do_not_add_up(parameter)


def _has(matrices: list[list[Any]], key: Key) -> bool:
    return any(tuple(matrix[:3]) == key for matrix in matrices)


def _key(matrix: Matrix) -> Key:
    entries = matrix.entries
    digest = "" if entries is None else hashlib.sha256(entries.cpu().numpy().tobytes()).hexdigest()
    return (*matrix.shape, digest)


def _do_not_add_up(parameter: ParameterFisher) -> UnsupportedUse:
    return UnsupportedUse(
        f"{parameter.name} {parameter.shape}: the batches of some ranks use it in another way than those of others, so "
        "that their moments do not add up. Leave the parameter out with layers=.",
        (parameter.name,),
    )
