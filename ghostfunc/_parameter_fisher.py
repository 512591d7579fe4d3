"""The Fisher blocks of one parameter: which matrices its entries are used as, and the factors of each.

    linear maps, convolutions, look-ups    a matrix [p, q], its gradients sums of outer products: a Kronecker product
    anything else (biases, scales, ...)    gradients as they are, [numel, 1]: the full Fisher matrix, or its diagonal

A parameter whose parts are used as matrices of their own (experts, heads) has a block for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._errors import UnsupportedUse
from ghostfunc._factors import Gather, Later, Outer
from ghostfunc._fisher import Block
from ghostfunc._moments import Matrix, Rows
from ghostfunc._run_result import Run, base_factor


@dataclass(eq=False)
class ParameterFisher:
    """A parameter, and the matrices that its entries are used as.

    Attributes:
        name: its name.
        shape: its shape.
        max_side: as of `Matrix`.
        matrices: those met so far; no entry is in two of them.
        dense: whether the gradients are taken as they are, by one matrix [numel, 1].
    """

    name: str
    shape: tuple[int, ...]
    max_side: int
    matrices: list[Matrix] = field(default_factory=list)
    dense: bool = False

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def uses(self, result: Run, *, grow: bool) -> Iterator[tuple[Matrix, list[Rows]]]:
        """A run's gradients: each matrix with the factors of its uses; where they are dense, a few samples at a time.

        Args:
            result: the run.
            grow: whether there may be matrices that were not met before.

        Raises:
            UnsupportedUse: if moments of matrices were summed already, and this run's uses are none of them.
        """
        sites = result.sites(self.name)
        if not sites:
            return
        found = None if self.dense else self._as_matrices(result, grow)
        if found is not None:
            yield from found
            return
        if not self.dense and (self.matrices or not grow):
            raise UnsupportedUse(
                f"{self.name} {self.shape}: this batch uses it ({', '.join(site.op for site in sites)}) in another way "
                "than the batches before, so that their moments do not add up. Leave the parameter out with layers=.",
                (self.name,),
            )
        if not self.dense:
            self.dense = True
            self.matrices = [Matrix((self.numel, 1), None, self.max_side)]
        samples = len(result.losses)
        step = Later.at_a_time(self.numel, 8)
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            parts = [base_factor(result, s, result.factors[s].part(start, stop), self.name) for s in sites]
            grads = torch.stack([part.dense(self.shape).reshape(stop - start, -1) for part in parts]).sum(0)
            grads = grads.to(sites[0].dtype).unsqueeze(1)  # [s, 1, numel]
            yield self.matrices[0], [Outer(torch.ones_like(grads[..., :1]), grads)]

    def _as_matrices(self, result: Run, grow: bool) -> list[tuple[Matrix, list[Rows]]] | None:
        """Factors by matrix; None where a use is of no matrix, or of entries that another matrix has too."""
        order: Tensor | None = None
        matrices = list(self.matrices)
        factors: dict[Matrix, list[Rows]] = {}
        for site in result.sites(self.name):
            factor, tracked = result.factors[site], site.tracked
            if not isinstance(factor, (Outer, Gather)) or tracked.root is None:
                return None
            q = (factor.g if isinstance(factor, Gather) else factor.right).shape[-1]
            shape = (tracked.real.numel() // max(1, q), q)
            entries = None
            if tracked.derivation is not None:
                order = torch.arange(self.numel, device=tracked.real.device) if order is None else order
                entries = tracked.replay({self.name: order.view(self.shape)}).reshape(-1)
                entries = None if torch.equal(entries, order) else entries
            matrix = next((m for m in matrices if m.is_of(shape, entries)), None)
            if matrix is None:
                matrix = Matrix(shape, entries, self.max_side)
                if not grow or not _apart(matrix, matrices, self.numel):
                    return None
                matrices.append(matrix)
            factors.setdefault(matrix, []).append(factor)
        self.matrices = matrices
        return list(factors.items())

    def blocks(self, dtype: torch.dtype, device: torch.device) -> list[Block]:
        """The parameter's blocks, not damped yet; entries that no matrix has have a block of zeros."""
        blocks = [matrix.block for matrix in self.matrices if matrix.block is not None]
        if any(block.entries is None for block in blocks):
            return blocks
        rest = torch.ones(self.numel, dtype=torch.bool, device=device)
        for block in blocks:
            rest[block.entries] = False
        entries = rest.nonzero().flatten()
        if not blocks or len(entries):
            zeros = torch.zeros(len(entries), 1, dtype=dtype, device=device)
            blocks.append(Block(zeros, 0.0, entries=entries if blocks else None))
        return blocks

    def how(self) -> str:
        """What its Fisher blocks are made of."""
        if not self.matrices:
            return "unused, its Fisher matrix is zero"
        p, q = self.matrices[0].shape
        if self.dense:
            return f"full Fisher {p} x {p}" if p <= self.max_side else f"diagonal Fisher of {p} entries"
        words = [f"Kronecker {p} x {q}"]
        if len(self.matrices) > 1:
            words = [f"{len(self.matrices)} parts, each Kronecker {p} x {q}"]
            if len({matrix.shape for matrix in self.matrices}) > 1:
                words = ["parts, Kronecker " + ", ".join(f"{p} x {q}" for p, q in (m.shape for m in self.matrices))]
        longer = sorted({side for matrix in self.matrices for side in matrix.shape if side > self.max_side})
        words += [f"diagonal on the side of {side}" for side in longer]
        kinds = max((tuple(matrix.sums) for matrix in self.matrices), key=len)
        if len(kinds) > 1:
            words.append(f"nearest to the sum over {', '.join(kinds)}")
        unused = self.numel - sum(math.prod(matrix.shape) for matrix in self.matrices)
        if unused:
            words.append(f"{unused} entries unused, their Fisher matrix is zero")
        return "; ".join(words)


def _apart(matrix: Matrix, others: list[Matrix], numel: int) -> bool:
    """Whether a matrix has each of its entries once, and none that another one has."""
    if matrix.entries is None:
        return not others
    if any(other.entries is None for other in others):
        return False
    times = torch.bincount(matrix.entries, minlength=numel)
    return bool((times <= 1).all()) and not any(bool(times[o.entries].any()) for o in others)


def are_apart(matrices: list[Matrix], numel: int) -> bool:
    """Whether no entry of a parameter is in two of its matrices."""
    return all(_apart(matrix, matrices[:place], numel) for place, matrix in enumerate(matrices))
