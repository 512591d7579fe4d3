"""Batches of samples of like length, and their results in the data's order."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ghostfunc.text import Corpus

Batch = dict[str, Tensor]
Compute = Callable[[Batch], tuple[Tensor, ...]]


def token_batches(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Cut samples, the longest first, into batches of at most so many tokens, padding included.

    Args:
        lengths: `[n]`, each sample's tokens.
        token_budget: the most that B times the longest length of a batch may be; a sample that is longer by itself is
            a batch of its own.

    Yields:
        The numbers of a batch's samples, `[B]`.

    Raises:
        ValueError: if the budget is not positive.

    Example:
        >>> [batch.tolist() for batch in token_batches(np.array([3, 8, 2, 4]), token_budget=8)]
        [[1], [3, 0], [2]]
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


class NotFinite(ValueError):
    """Raised by a `compute` whose batch has losses that are not finite; `in_order` says of which samples they are."""

    def __init__(self, losses: Tensor) -> None:
        super().__init__("losses are not finite")
        self.losses = losses


def not_finite(corpus: Corpus, samples: np.ndarray, losses: Tensor, finite: Tensor) -> ValueError:
    """The error that names samples whose losses or gradients are not finite.

    Args:
        corpus: where they are.
        samples: the numbers of some samples, `[n]`.
        losses: theirs, `[n]`.
        finite: `[n]`, False for one at least.
    """
    bad = (~finite).nonzero()[:, 0].tolist()
    named = []
    for i in bad[:5]:
        number = int(samples[i])
        document = corpus.samples(number, number + 1)["document"][0].as_py()
        named.append(f"{number} ({document}, loss {losses[i].item():g})")
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return ValueError(
        f"{corpus.name}: the loss or gradient of sample {', '.join(named)}{more} is not finite. Look at the text and "
        "at the dtype of the model (float16 overflows above 65504; float32 and bfloat16 do not), or leave it out"
    )


def in_order(
    corpus: Corpus,
    start: int,
    stop: int,
    compute: Compute,
    *,
    token_budget: int,
    device: torch.device,
    done: Callable[[int, int], object] = lambda rows, tokens: None,
) -> tuple[Tensor, ...]:
    """Compute something of the samples from `start` to before `stop`, in batches of like length.

    Args:
        corpus: where they are.
        start: the first.
        stop: behind the last; there is one at least.
        compute: what a batch on the device gives: tensors of B rows each.
        token_budget: as for `token_batches`.
        device: where batches go.
        done: is told after each batch how many samples and tokens it had.

    Returns:
        The tensors that `compute` gives, on the CPU, of `stop - start` rows in the corpus's order.

    Raises:
        ValueError: if `compute` raises `NotFinite`; the message names the samples.
    """
    found: list[tuple[Tensor, ...]] = []
    order: list[np.ndarray] = []
    lengths = corpus.lengths[start:stop]
    for indices in token_batches(lengths, token_budget):
        batch = {name: value.to(device) for name, value in corpus.batch(indices + start).items()}
        try:
            values = compute(batch)
        except NotFinite as error:
            finite = torch.isfinite(error.losses)
            raise not_finite(corpus, indices + start, error.losses, finite) from error.__cause__
        found.append(tuple(value.detach().cpu() for value in values))
        order.append(indices)
        done(len(indices), int(lengths[indices].sum()))
    back = torch.from_numpy(np.argsort(np.concatenate(order)))
    return tuple(torch.cat(values)[back] for values in zip(*found, strict=True))
