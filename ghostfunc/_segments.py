"""Segments: samples that are sets of positions, several in one row of the batch (packed documents).

    segments[b, t] = k     position t of row b belongs to sample k; -1 to none

The positions are followed through the operations as samples are, by the same rules, with one difference: where
positions meet (attention), the result stands at the position of the operand that asks, the first one. A row of an
activation then belongs to the segment of its row of the batch and its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._follow import follow
from ghostfunc._sample_axis import Lost, RowMap, SampleAxis, Samples, positions_instead, samples_of, set_samples


@dataclass(frozen=True, eq=False)
class Segments:
    """Which segment each position of a batch belongs to.

    Attributes:
        of_position: `[B, T]`, 0 to count - 1; positions of no segment are `count`, as one more.
        count: how many segments there are, K.
    """

    of_position: Tensor
    count: int

    @staticmethod
    def of(segments: Tensor, batch: Any, samples: int) -> Segments:
        """Checked.

        Raises:
            ValueError: if the segments are not integers `[B, T]` of a batch that has positions.
        """
        leaves = pytree.tree_leaves(batch)
        shapes = ", ".join(str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor))
        if not isinstance(segments, Tensor) or segments.dim() != 2 or segments.is_floating_point():
            got = (
                (segments.dtype, tuple(segments.shape)) if isinstance(segments, Tensor) else (type(segments).__name__,)
            )
            raise ValueError(
                f"segments: expected integers [B, T], the sample of each position; got {' '.join(map(str, got))}."
            )
        if len(segments) != samples or not any(isinstance(t, Tensor) and t.shape[:2] == segments.shape for t in leaves):
            raise ValueError(
                f"segments of shape {tuple(segments.shape)} fit no tensor of the batch ({shapes}): they give the "
                "sample of each of its positions, [B, T]."
            )
        count = int(segments.max()) + 1
        if count < 1 or int(segments.min()) < -1:
            raise ValueError(
                f"segments run from {int(segments.min())} to {int(segments.max())}; samples are numbered from 0, and "
                "-1 stands for positions of none."
            )
        return Segments(torch.where(segments < 0, count, segments), count)

    @property
    def positions(self) -> int:
        """Positions of a row of the batch, T."""
        return self.of_position.shape[1]

    def seed(self, tensor: Tensor) -> None:
        """Let a tensor of the batch carry its positions."""
        if tensor.shape[:2] == self.of_position.shape:
            with positions_instead():
                set_samples(tensor, SampleAxis(1, self.positions))

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Let the results of an operation carry the positions that its operands carry."""
        with positions_instead():
            follow(func, args, kwargs, out, self.positions, [])

    def carried_by(self, tensor: Tensor) -> Samples:
        """Where the positions of a tensor are."""
        with positions_instead():
            return samples_of(tensor)

    def rows(self, shape: torch.Size, samples: SampleAxis, positions: Samples) -> RowMap | Lost:
        """The segment of each row of a result, whose samples and positions are here."""
        rank = len(shape) - 1

        def index(axis: SampleAxis) -> Tensor:
            if axis.samples == 1:  # one sample's tensors need no axis
                return torch.zeros((1,) * rank, dtype=torch.long)
            return axis.of_index().view(-1, *(1,) * (rank - 1 - axis.dim))

        if not isinstance(positions, SampleAxis):
            return positions if positions is not None else Lost("a value of a whole row", mixed=True)
        if any(axis.samples > 1 and axis.dim >= rank for axis in (samples, positions)):
            return Lost("the last dimension runs over samples or positions", mixed=True)
        device = self.of_position.device
        of_row = self.of_position[index(samples).to(device), index(positions).to(device)]
        return RowMap(of_row.expand(shape[:-1]).reshape(-1), self.count + 1)
