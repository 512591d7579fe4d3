"""What a Trainer's optimizer step does to the validation loss, collected micro-batch by micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._dots import ValGradient
from ghostfunc._randomness import RandomState


class StepValues(NamedTuple):
    """What one optimizer step owes to this process's samples.

    Attributes:
        sample_ids: `[n]`, of all micro-batches.
        dots: `[n]`, <grad s_i, P V>, s_i the sample's share of the step's loss; they add up, over all ranks, to the dot
            product of the step's gradient (before clipping).
        values: `[n]`, the decrease of the mean validation loss that is owed to each sample.
        val_loss: the mean validation loss before the step.
    """

    sample_ids: Tensor
    dots: Tensor
    values: Tensor
    val_loss: float


@dataclass
class MicroBatch:
    """The samples of one backward.

    Attributes:
        sample_ids: `[n]`.
        dots: `[n]`, with the shares of the micro-batch's loss, before what happens to that loss on its way to backward.
        batch: as `weighted` takes it, kept where the dots need the step's gradient.
        random: the generators' states in front of its forward, likewise.
        scale: what its loss was multiplied with before backward.
    """

    sample_ids: Tensor
    dots: Tensor
    batch: Any = None
    random: RandomState | None = None
    scale: Tensor | None = None

    def keep_scale(self, gradient: Tensor) -> None:
        """Learn the scale, from the gradient of what is differentiated with respect to the micro-batch's loss."""
        self.scale = gradient.detach()

    def dots_of_step(self, processes: int) -> Tensor:
        """Dots with the samples' shares of the step's loss, which is the mean over processes, `[n]`."""
        assert self.scale is not None
        return self.dots * self.scale.to(self.dots.dtype) / processes


@dataclass
class Step:
    """What is collected from one optimizer step to the next."""

    val: ValGradient | None = None
    val_loss: float = 0.0
    needs_gradient: bool = False  # whether the metric is about the step's own gradient
    clip: float = 1.0
    micro_batches: list[MicroBatch] = field(default_factory=list)

    def values(self, rate: float, processes: int) -> StepValues:
        """What the step owes to this process's samples, at a learning rate."""
        dots = [micro_batch.dots_of_step(processes) for micro_batch in self.micro_batches]
        ids = [micro_batch.sample_ids for micro_batch in self.micro_batches]
        all_dots = torch.cat(dots) if dots else torch.zeros(0)
        all_ids = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)
        return StepValues(all_ids, all_dots, rate * self.clip * all_dots, self.val_loss)
