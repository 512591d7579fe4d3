"""The batches of an ordinary loop, `(X, Y)` or keywords, as `functionalize` takes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class AttachedBatch:
    """Which samples the next call will see."""

    iteration: int
    sample_ids: list[int]
    domains: list[str]


def as_batch(X: Any, Y: Any, *, is_text: bool) -> Any:
    """The batch that `functionalize` hands to the module and to the loss.

    Args:
        X: the inputs, a tensor or a dict.
        Y: the labels, None where there are none or X holds them.
        is_text: whether a tensor X holds token ids.

    Raises:
        ValueError: if token ids and labels differ in shape, or tensors in their first dimension.
    """
    is_text = is_text and isinstance(X, Tensor)
    if is_text and isinstance(Y, Tensor) and X.shape != Y.shape:
        raise ValueError(
            f"labels of shape {tuple(Y.shape)} do not fit token ids of shape {tuple(X.shape)}: expected one label "
            "beside each token, [B, T] and [B, T], not shifted (causal_lm_loss shifts once)."
        )
    if is_text:
        batch = {"input_ids": X} if Y is None else {"input_ids": X, "labels": Y}
    elif isinstance(X, Mapping):
        batch = dict(X) if Y is None else {**X, "labels": Y}
    else:
        batch = X if Y is None else (X, Y)
    size_of(batch)
    return batch


def size_of(batch: Any) -> int:
    """The number of samples.

    Raises:
        ValueError: if there is no tensor, or tensors differ in their first dimension.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"the batch's tensors have shapes {shapes}; expected at least one tensor, and in all the same first "
            "dimension, the number of samples."
        )
    return sizes.pop()[0]


def positions(n: int) -> list[str]:
    """Samples without ids, as error messages name them."""
    return [f"position {i}" for i in range(n)]


def require_finite(what: str, values: Tensor, names: list[str], iteration: int | None) -> None:
    """Raise FloatingPointError, which names the samples, if values `[n]` are not finite."""
    if values.isfinite().all():
        return
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    shown = "; ".join(f"{names[i]} ({values[i].item():g})" for i in bad[:8])
    when = "" if iteration is None else f" in iteration {iteration}"
    raise FloatingPointError(
        f"the {what} of {len(bad)} of {len(values)} samples is not finite{when}: {shown}. Nothing was logged or "
        "deposited. Look at these samples, lower the learning rate, or clip gradients."
    )


def tensors_by_name(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch under names, for the log."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return dict(zip(("inputs", "labels"), batch if isinstance(batch, tuple) else (batch,), strict=False))


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError, which names the argument, if `value` is not known."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, known))}.")
