"""Where the samples of a batch are in a tensor, so that rows are never assigned to samples by guessing.

A tensor that depends on the batch carries where its samples are: one dimension whose index is

    index = (outer_index * samples + sample) * inner + inner_index

which covers `[B, T, d]`, `[T, B, d]`, their flattenings to rows and their splittings into heads. Where rows were
picked, sorted or scattered (tokens that go to experts), the axis lists the owner of each index instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghostfunc._nesting import readable, with_values


class _Followed(threading.local):
    """Which of a tensor's axes are read and written: its samples', or its positions'."""

    attribute = "_ghost_samples"


_followed = _Followed()


@contextmanager
def positions_instead() -> Iterator[None]:
    """`samples_of` and `set_samples` mean the positions within a sample."""
    before, _followed.attribute = _followed.attribute, "_ghost_positions"
    try:
        yield
    finally:
        _followed.attribute = before


def following_positions() -> bool:
    """Whether positions are followed instead of samples."""
    return _followed.attribute == "_ghost_positions"


@dataclass(frozen=True, eq=False)
class SampleAxis:
    """Where the samples of a tensor are: along `dim`, `outer` blocks of `samples` runs of `inner` entries.

    Attributes:
        dim: the dimension.
        samples: how many samples there are.
        outer: blocks.
        inner: the length of a run.
        owners: `[size]`, the sample of each index, -1 where there is no data; in place of blocks and runs.
    """

    dim: int
    samples: int
    outer: int = 1
    inner: int = 1
    owners: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, SampleAxis) or (self.dim, self.samples, self.size) != (
            other.dim,
            other.samples,
            other.size,
        ):
            return False
        if self.owners is None and other.owners is None:
            return (self.outer, self.inner) == (other.outer, other.inner)
        mine, others = self.of_index(), other.of_index()
        return mine is others or torch.equal(mine, others.to(mine.device))

    @property
    def size(self) -> int:
        """Length of the dimension."""
        return self.outer * self.samples * self.inner if self.owners is None else len(self.owners)

    def at(self, dim: int) -> SampleAxis:
        """The same samples along another dimension."""
        return self if dim == self.dim else SampleAxis(dim, self.samples, self.outer, self.inner, self.owners)

    def of_index(self) -> Tensor:
        """The sample of each index of the dimension: `[size]`."""
        if self.owners is not None:
            return self.owners
        return torch.arange(self.samples).repeat_interleave(self.inner).repeat(self.outer)

    @cached_property
    @with_values
    def _places(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """For scattered rows: `(order, sample, place among the sample's rows, longest sample)`; no one's left out."""
        assert self.owners is not None
        order = torch.argsort(self.owners, stable=True)
        order = order[int((self.owners < 0).sum()) :]
        sample = self.owners[order]
        counts = torch.bincount(sample, minlength=self.samples)
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sample]
        return order, sample, place, max(1, int(counts.max()))

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the samples to the front: `[B, *others]`, a view wherever the strides allow it.

        Scattered rows are copied, padded with zeros to the longest sample: `[B, R, *others]`.
        """
        if self.samples == 1:
            return tensor.unsqueeze(0)
        if self.owners is not None:
            order, sample, place, longest = self._places
            rows = tensor.movedim(self.dim, 0)
            padded = rows.new_zeros(self.samples, longest, *rows.shape[1:])
            return padded.index_put((sample, place), rows[order])
        shape = tensor.shape
        parts = [size for size in (self.outer, self.samples, self.inner) if size != 1 or self.size == 1]
        tensor = tensor.reshape(*shape[: self.dim], *parts, *shape[self.dim + 1 :])
        return tensor.movedim(self.dim + (self.outer != 1), 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as `[B, R, d]`: R positions of each sample, d its last dimension."""
        if self.dim == 0 and self.outer == 1 and self.owners is None and tensor.dim() > 1 and tensor.numel():
            return tensor.reshape(self.samples, -1, tensor.shape[-1])
        split = self.split(tensor)
        return split.reshape(self.samples, -1, tensor.shape[-1])

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The sample of each row of a tensor (all dimensions but the last, flattened): `[N]`."""
        ids = self.of_index().to(tensor.device)
        ids = ids.view(-1, *(1,) * (tensor.dim() - self.dim - 1))
        return ids.expand(tensor.shape)[..., 0].reshape(-1)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """The tensor with the entries of other samples at zero."""
        if self.samples == 1:
            return tensor
        if self.owners is not None:
            return tensor * (self.owners.to(tensor.device) == sample).view(-1, *(1,) * (tensor.dim() - self.dim - 1))
        kept = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        self.split(kept)[sample] = self.split(tensor)[sample]
        return kept

    def sum_to(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Each sample's entries, summed to a shape that broadcasts to the tensor's: `[B, *shape]`."""
        if self.samples == 1:
            return tensor.sum_to_size(shape).unsqueeze(0)
        if self.owners is not None:
            place = self.dim - tensor.dim() + len(shape)
            if place >= 0 and shape[place] != 1:
                return torch.stack([self.only(tensor, sample).sum_to_size(shape) for sample in range(self.samples)])
            summed = self.split(tensor).sum(1).unsqueeze(1 + self.dim)  # [B, *tensor's, 1 at the samples' dimension]
            return summed.sum_to_size(self.samples, *(1,) * (tensor.dim() - len(shape)), *shape).view(-1, *shape)
        broadcast = tensor.dim() - len(shape)  # dimensions that the shape does not have
        if self.dim == 0 and self.outer == 1 and broadcast > 0 and shape == tensor.shape[broadcast:]:
            split = tensor if self.inner == 1 else tensor.unflatten(0, (self.samples, self.inner))
            positions = tuple(range(1, broadcast + (self.inner > 1)))
            return split.sum(positions) if positions else split
        behind = tensor.dim() - self.dim - 1
        split = self.split(tensor)  # [B, *ahead, *(outer, inner), *behind]
        kept = shape[len(shape) - min(behind, len(shape)) :]  # the part of the shape behind the samples' dimension
        ahead = shape[: max(0, len(shape) - behind - 1)]
        middle = split.dim() - 1 - self.dim - behind
        if any(size != 1 for size in ahead):
            split = split.sum(tuple(range(1 + self.dim, 1 + self.dim + middle))) if middle else split
            split = split.reshape(self.samples, *tensor.shape[: self.dim], *tensor.shape[self.dim + 1 :])
            narrow = split.sum_to_size(
                self.samples, *(1,) * (self.dim - len(ahead)), *ahead, *(1,) * (behind - len(kept)), *kept
            )
        else:
            narrow = split.sum_to_size(self.samples, *(1,) * (self.dim + middle + behind - len(kept)), *kept)
        return narrow.reshape(self.samples, *shape)


def scattered(dim: int, samples: int, owners: Tensor) -> SampleAxis:
    """The axis of a dimension whose indices belong to these samples; as blocks and runs where they are in order."""
    size = len(owners)
    if size and size % samples == 0 and readable(owners):
        run = int((owners != owners[0]).int().argmax()) or size
        for inner in {run, size // samples}:
            if size % (samples * inner) == 0:
                axis = SampleAxis(dim, samples, size // (samples * inner), inner)
                if torch.equal(axis.of_index().to(owners.device), owners):
                    return axis
    return SampleAxis(dim, samples, owners=owners)


@dataclass(frozen=True, eq=False)
class RowMap:
    """The sample of every row (all dimensions but the last, flattened), as a probe found it.

    Attributes:
        of_row: `[N]`, the sample of each row.
        samples: the number of samples.
    """

    of_row: Tensor
    samples: int

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as `[B, R, d]`, padded with zeros to the longest sample."""
        flat = tensor.reshape(-1, tensor.shape[-1])  # [N, d]
        counts = torch.bincount(self.of_row, minlength=self.samples)
        order = torch.argsort(self.of_row, stable=True)
        sample = self.of_row[order]
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sample]
        padded = flat.new_zeros(self.samples, max(1, int(counts.max())), flat.shape[1])
        padded[sample, place] = flat[order]
        return padded

    def sum_to(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Each sample's entries, summed to a shape that broadcasts to the tensor's: `[B, *shape]`."""
        if shape == tensor.shape[-1:]:
            return tensor.new_zeros(self.samples, *shape).index_add(0, self.of_row, tensor.reshape(-1, *shape))
        return torch.stack([self.only(tensor, sample).sum_to_size(shape) for sample in range(self.samples)])

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """The tensor with the entries of other samples at zero."""
        mask = (self.of_row == sample).view(*tensor.shape[:-1], 1)
        return tensor * mask


Partition = SampleAxis | RowMap


@dataclass(frozen=True)
class Lost:
    """The samples of a tensor could not be followed (`mixed=False`), or have met in it (`mixed=True`)."""

    reason: str
    mixed: bool


Samples = SampleAxis | Lost | None


def samples_of(tensor: Any) -> Samples:
    """What a tensor carries: its sample axis, `Lost`, or None for a tensor that does not depend on the batch."""
    return getattr(tensor, _followed.attribute, None)


def set_samples(tensor: Tensor, samples: Samples) -> None:
    """Let a tensor carry its samples; None takes them off."""
    if samples is not None:
        setattr(tensor, _followed.attribute, samples)
    elif hasattr(tensor, _followed.attribute):
        delattr(tensor, _followed.attribute)
