"""Samples without a finite loss or gradient: named, or left out of the step, on all ranks together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._engine_batch import size_of
from ghostfunc._engine_ranks import together, total
from ghostfunc._engine_scores import Scores
from ghostfunc._ranks import Ranks
from ghostfunc._sharded import is_sharded


class Kept(NamedTuple):
    """What a step goes on with.

    Attributes:
        scores: of the samples that are kept.
        losses: `[n]`, of all samples.
        skipped: `[n]`, which are not kept; None where all are.
    """

    scores: Scores
    losses: Tensor
    skipped: Tensor | None

    def of_all(self, values: Tensor) -> Tensor:
        """Values of the kept samples, `[kept, ...]`, as those of all, `[n, ...]`: nan for the skipped ones."""
        if self.skipped is None:
            return values
        spread = values.new_full((len(self.skipped), *values.shape[1:]), torch.nan)
        spread[~self.skipped] = values
        return spread


def kept_scores(
    score: Callable[[Any], Scores],
    losses_of: Callable[[Any], Tensor],
    batch: Any,
    ranks: Ranks | None,
    *,
    may_be_empty: bool,
    names: list[str],
) -> Kept:
    """Score the samples of a batch whose losses and gradients are finite.

    Args:
        score: scores a batch; what it raises on one rank, it raises on all.
        losses_of: the losses of a batch.
        batch: of n samples.
        ranks: that have shares of the batch.
        may_be_empty: whether `score` takes a rank's batch of no samples.
        names: `[n]`, of the samples, for messages.

    Raises:
        FloatingPointError: if nothing is left, or nothing of this rank's samples and `may_be_empty` is False.
        Exception: what `score` raises where the losses are finite.
    """
    n = size_of(batch)
    device = next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)).device
    kept = torch.ones(n, dtype=torch.bool, device=device)
    losses: Tensor | None = None
    while True:
        left = int(kept.sum())
        rows = batch if left == n else pytree.tree_map_only(Tensor, lambda t: t[kept], batch)
        scores, error = None, None
        try:
            scores = score(rows)
        except Exception as raised:
            error = raised
        with together(ranks):
            found = scores.losses if scores is not None else _or_raise(losses_of, rows, left, error)
            losses = found.new_full((n,), torch.nan) if losses is None else losses
            losses[kept] = found
            bad = ~(found.isfinite() if scores is None else _finite(scores)).to(device)
        if total(ranks, int(bad.sum())) == 0:
            if scores is None:
                assert error is not None
                raise error
            skipped = ~kept
            if skipped.any():
                _warn(losses, skipped, names)
            return Kept(scores, losses, skipped if skipped.any() else None)
        kept[kept.clone()] = ~bad
        anywhere = total(ranks, int(kept.any()))
        with together(ranks):
            if anywhere == 0 or not (may_be_empty or kept.any()):
                raise FloatingPointError(
                    f"none of {n} samples has a finite loss and gradient ({_shown(losses, ~kept, names)}), so that the "
                    "step cannot go on without those that have not. Lower the learning rate, or go back to a "
                    "checkpoint."
                )


def require_finite_gradients(scores: Scores) -> None:
    """Raise FloatingPointError, which names the parameters, if their gradients are not finite."""
    grads = {name: grad.to_local() if is_sharded(grad) else grad for name, grad in scores.grads.items()}  # type: ignore[attr-defined]
    if not grads or torch.stack([grad.sum() for grad in grads.values()]).isfinite().all():
        return
    bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
    if bad:
        shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise FloatingPointError(
            f"the gradients of {len(bad)} parameters are not finite, though every loss and every dot is: {shown}. "
            "Nothing was logged or deposited. Look at the operations on them: a square root at 0 has such a gradient."
        )


def _finite(scores: Scores) -> Tensor:
    """Which samples `[n]` have a finite loss and dot; one that has not spoils every sample's second-order part."""
    return scores.losses.isfinite() & scores.dots_per_sample.isfinite()


def _or_raise(losses_of: Callable[[Any], Tensor], rows: Any, left: int, error: Exception | None) -> Tensor:
    """The losses, or what was raised before where they cannot be had either."""
    if left == 0:
        return torch.zeros(0)
    try:
        return losses_of(rows).detach()
    except Exception:
        assert error is not None
        raise error from None


def _shown(losses: Tensor, skipped: Tensor, names: list[str]) -> str:
    found = [f"{names[i]} (loss {losses[i].item():g})" for i in skipped.nonzero().flatten().tolist()]
    return "; ".join(found[:8]) + (f"; {len(found) - 8} more" if len(found) > 8 else "")


def _warn(losses: Tensor, skipped: Tensor, names: list[str]) -> None:
    warnings.warn(
        f"the step goes on without {int(skipped.sum())} of {len(names)} samples, whose loss or gradient is not finite: "
        f"{_shown(losses, skipped, names)}",
        stacklevel=4,
    )
