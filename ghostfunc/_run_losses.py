"""What losses must be: one finite number for each sample, which depends on no other sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghostfunc._errors import InteractingSamples, interaction
from ghostfunc._nesting import readable
from ghostfunc._sample_axis import Lost, SampleAxis, samples_of
from ghostfunc._sites import Site


def check_losses(losses: Any, samples: int, batches: tuple[tuple[str, int], ...]) -> None:
    """Raise unless the losses are one finite number for each sample."""
    if not isinstance(losses, Tensor):
        hint = " Pass has_aux=True if model_fn returns (losses, aux)." if isinstance(losses, tuple) else ""
        raise TypeError(f"model_fn must return losses[B], a tensor; it returned {type(losses).__name__}.{hint}")
    if losses.dim() == 0:
        raise ValueError(
            "model_fn returned a scalar loss. Per-sample gradients need one loss for each sample: return losses of "
            f"shape [{samples}] (reduction='none', then a mean over all dimensions but the first)."
        )
    if losses.shape != (samples,):
        raise ValueError(
            f"model_fn returned losses of shape {tuple(losses.shape)} for {_sizes(samples, batches)}; "
            f"expected [{samples}]."
        )
    if not losses.is_floating_point():
        raise TypeError(f"model_fn returned losses of dtype {losses.dtype}; expected a floating-point dtype.")
    if readable(losses) and not bool(torch.isfinite(losses).all()):
        raise ValueError(not_finite(losses.detach(), batches or (("given", samples),)))


def _sizes(samples: int, batches: tuple[tuple[str, int], ...]) -> str:
    joined = " + ".join(f"{size} {what}" for what, size in batches)
    return f"a batch of {samples} samples" + (f" ({joined}, joined)" if len(batches) > 1 else "")


def not_finite(losses: Tensor, batches: tuple[tuple[str, int], ...]) -> str:
    """What is wrong with losses of which some are not finite, by the batches that they come from."""
    found = []
    for (what, _), part in zip(batches, losses.split([size for _, size in batches]), strict=True):
        bad = (~torch.isfinite(part)).nonzero().flatten().tolist()
        if bad:
            found.append(f"{what} batch: the losses of samples {bad} are not finite: {part[bad].tolist()}")
    return (
        f"{'; '.join(found)}. Look at these samples, at the learning rate and at the dtype; their gradients would "
        "spoil every sum that they enter."
    )


def why_doubted(losses: Tensor, sites: list[Site], samples: int) -> str:
    """Why a probe is needed to tell samples apart; empty where they were followed all the way."""
    if samples == 1:
        for site in sites:
            site.axis = SampleAxis(0, 1)
        carried = samples_of(losses)
        if isinstance(carried, Lost) and carried.mixed:
            raise InteractingSamples(interaction(carried.reason))
        return ""
    carried = samples_of(losses)
    if isinstance(carried, Lost) and carried.mixed:
        raise InteractingSamples(interaction(carried.reason))
    if not isinstance(carried, SampleAxis):
        return carried.reason if carried is not None else "the losses do not come from the batch by torch operations"
    if carried != SampleAxis(0, samples):
        raise InteractingSamples(f"the losses are not in the samples' order: {carried}.")
    return next((s.axis.reason for s in sites if isinstance(s.axis, Lost) and not s.axis.mixed), "")
