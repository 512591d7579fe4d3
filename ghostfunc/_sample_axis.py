"""Where the samples of a batch are in a tensor, so that rows are never assigned to samples by guessing.

A tensor that depends on the batch carries where its samples are: one dimension whose index is

    index = (outer_index * samples + sample) * inner + inner_index

which covers `[B, T, d]`, `[T, B, d]`, their flattenings to rows and their splittings into heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_ghost_samples"


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples of a tensor are: along `dim`, `outer` blocks of `samples` runs of `inner` entries."""

    dim: int
    samples: int
    outer: int = 1
    inner: int = 1

    @property
    def size(self) -> int:
        """Length of the dimension."""
        return self.outer * self.samples * self.inner

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the samples to the front: `[B, *others]`, a view wherever the strides allow it."""
        if self.samples == 1:
            return tensor.unsqueeze(0)
        shape = tensor.shape
        parts = [size for size in (self.outer, self.samples, self.inner) if size != 1 or self.size == 1]
        tensor = tensor.reshape(*shape[: self.dim], *parts, *shape[self.dim + 1 :])
        return tensor.movedim(self.dim + (self.outer != 1), 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as `[B, R, d]`: R positions of each sample, d its last dimension."""
        split = self.split(tensor)
        return split.reshape(self.samples, -1, tensor.shape[-1])

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The sample of each row of a tensor (all dimensions but the last, flattened): `[N]`."""
        ids = torch.arange(self.samples, device=tensor.device).repeat_interleave(self.inner).repeat(self.outer)
        ids = ids.view(-1, *(1,) * (tensor.dim() - self.dim - 1))
        return ids.expand(tensor.shape)[..., 0].reshape(-1)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """The tensor with the entries of other samples at zero."""
        if self.samples == 1:
            return tensor
        kept = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        self.split(kept)[sample] = self.split(tensor)[sample]
        return kept

    def sum_to(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Each sample's entries, summed to a shape that broadcasts to the tensor's: `[B, *shape]`."""
        if self.samples == 1:
            return tensor.sum_to_size(shape).unsqueeze(0)
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
        padded = flat.new_zeros(self.samples, int(counts.max().item()), flat.shape[1])
        padded[sample, place] = flat[order]
        return padded

    def sum_to(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Each sample's entries, summed to a shape that broadcasts to the tensor's: `[B, *shape]`."""
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
    return getattr(tensor, _ATTRIBUTE, None)


def set_samples(tensor: Tensor, samples: Samples) -> None:
    """Let a tensor carry its samples; None takes them off."""
    if samples is not None:
        setattr(tensor, _ATTRIBUTE, samples)
    elif hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)
