"""Samples that keep their ids on the way through a Trainer's sampler, collator and ranks.

A Trainer shuffles its dataset, removes the columns that the model does not take, and hands batches to ranks. Items
therefore travel as pairs of id and item, and a batch has the ids beside its tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

SAMPLE_IDS = "ghostfunc_sample_ids"  # their key in a batch


class Numbered(Dataset):
    """A dataset whose items are pairs `(id, item)`.

    Args:
        dataset: with a length.
        column: where items have their integer ids; None for their places in the dataset.

    Raises:
        TypeError: for a dataset without a length.
    """

    def __init__(self, dataset: Any, column: str | None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"train_dataset is a {type(dataset).__name__}, a stream without a length: its samples have no places "
                "that name them. Pass a dataset with __len__ and __getitem__ (for `datasets`, streaming=False)."
            )
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        item = self.dataset[index]
        return self._id(item, index), item

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        together = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[index] for index in indices] if together is None else together(indices)
        return [(self._id(item, index), item) for index, item in zip(indices, items, strict=True)]

    def _id(self, item: Any, index: int) -> int:
        if self.column is None:
            return index
        if not isinstance(item, Mapping) or self.column not in item:
            found = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(f"sample_ids={self.column!r}: item {index} of the train dataset has {found}.")
        try:
            return operator.index(item[self.column])
        except TypeError as error:
            raise TypeError(
                f"sample_ids={self.column!r}: item {index} has the id {item[self.column]!r}; expected an integer."
            ) from error


class WithIds:
    """A collator of pairs `(id, item)`: what another makes of the items, and the ids beside it, `[n]`.

    Args:
        collate: makes a batch of items.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> Any:
        batch = self.collate([item for _, item in pairs])
        batch[SAMPLE_IDS] = torch.tensor([sample_id for sample_id, _ in pairs])
        return batch


def own_parts(
    val: Any, collate: Callable[[list[Any]], Any], size: int, rank: int, ranks: int
) -> Iterator[dict[str, Any]]:
    """This rank's share of the validation samples, in batches.

    Args:
        val: a batch, a mapping of tensors `[m, ...]`; or a dataset, which `collate` makes batches of.
        collate: makes a batch of items.
        size: samples of a batch.
        rank: which share.
        ranks: how many there are.
    """
    for start in range(rank * size, sample_count(val), ranks * size):
        rows = range(start, min(start + size, sample_count(val)))
        if isinstance(val, Mapping):
            yield {name: t[rows.start : rows.stop] if isinstance(t, Tensor) else t for name, t in val.items()}
        else:
            yield dict(collate([val[row] for row in rows]))


def sample_count(val: Any) -> int:
    """The number of validation samples, m.

    Raises:
        TypeError: for anything but a batch of tensors or a dataset with a length.
        ValueError: if there is none.
    """
    if isinstance(val, Mapping):
        count = next((len(t) for t in val.values() if isinstance(t, Tensor)), 0)
    elif hasattr(val, "__len__") and hasattr(val, "__getitem__"):
        count = len(val)
    else:
        raise TypeError(
            f"val_batch is a {type(val).__name__}: expected a batch (a mapping of tensors [m, ...]), or a dataset of "
            "items as the train dataset has them."
        )
    if count == 0:
        raise ValueError("val_batch has no samples.")
    return count
