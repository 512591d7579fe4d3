"""Batches: pytrees of tensors that share their first dimension, checked, compared and joined."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def plain(batch: Any) -> Any:
    """The batch with mappings that pytrees do not know (a tokenizer's `BatchEncoding`) as dicts."""
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return batch


def batch_size(batch: Any, what: str) -> int:
    """The number of samples of a batch.

    Args:
        batch: a pytree of tensors `[B, ...]`.
        what: the argument's name, for messages.

    Returns:
        B.

    Raises:
        ValueError: if there is no tensor, a tensor without a first dimension, unequal first dimensions, or no sample.
    """
    leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(batch)[0]]
    tensors = {path or "tensor": leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    if not tensors:
        raise ValueError(
            f"the {what} batch holds no tensor; expected a pytree of tensors [B, ...], got {type(batch).__name__}."
        )
    shapes = ", ".join(f"{path}: {tuple(t.shape)}" for path, t in tensors.items())
    if any(t.dim() == 0 for t in tensors.values()):
        raise ValueError(
            f"the {what} batch holds a tensor without a first dimension ({shapes}); every tensor needs [B, ...]."
        )
    sizes = {len(t) for t in tensors.values()}
    if len(sizes) != 1:
        raise ValueError(f"the tensors of the {what} batch disagree on the number of samples ({shapes}).")
    (size,) = sizes
    if size == 0:
        raise ValueError(f"the {what} batch is empty ({shapes}); it needs at least one sample.")
    return size


def cannot_join(train: Any, val: Any) -> str:
    """Why two batches cannot go through one forward; empty where they can."""
    train_leaves, train_spec = pytree.tree_flatten(train)
    val_leaves, val_spec = pytree.tree_flatten(val)
    if train_spec != val_spec:
        return f"the train and val batches are built differently: {train_spec} and {val_spec}"
    for a, b in zip(train_leaves, val_leaves, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return "a leaf is a tensor in one batch and none in the other"
        if not isinstance(a, Tensor):
            if a is not b and a != b:
                return f"a leaf that is no tensor differs: {a!r} and {b!r}"
        elif a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or a.device != b.device:
            return (
                f"train {tuple(a.shape)} {a.dtype} {a.device} and val {tuple(b.shape)} {b.dtype} {b.device} differ "
                "beyond their first dimension"
            )
    return ""


def join(train: Any, val: Any) -> Any:
    """One batch: the train samples, then the validation samples."""
    return pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, train, val)
