"""The loss of a Trainer's step as a sum over samples.

    loss of the step = sum_i w_i l_i,   l_i the mean loss of sample i's own targets,   w_i = its targets / all targets

All targets are those of the step's micro-batches and ranks where the model divides by `num_items_in_batch`; those of
the micro-batch where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._functionalize import LossFn, ModelFn, functionalize
from ghostfunc._losses import IGNORED, causal_lm_loss, classification_loss
from ghostfunc._transforms import val_gradient

_CLASSIFIES = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification",
               "ForAudioClassification")  # fmt: skip


def default_loss(model: nn.Module) -> LossFn:
    """The per-sample loss of a transformers model, by the loss that it computes itself.

    Raises:
        ValueError: where there is none for this model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    kind = getattr(base, "loss_type", "of its own")
    if kind in ("ForCausalLM", None):  # transformers takes it where the class's name says nothing, as GPT-2's
        return causal_lm_loss
    if kind in _CLASSIFIES:
        return classification_loss
    raise ValueError(
        f"{type(base).__name__} computes the loss {kind}, for which there is no per-sample loss here (there is one for "
        f"ForCausalLM, {', '.join(_CLASSIFIES)}). Pass loss=, a function loss(output, batch) -> [B] of each "
        "sample's mean over its own targets."
    )


def target_counts(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """How many targets each sample has, `[n]`.

    Args:
        inputs: with labels `[n]` or `[n, T]`.
        shifted: whether the first label of a sample is no target.

    Raises:
        ValueError: without labels.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the batch has no labels (it has {', '.join(inputs)}), so that the model has no loss. For a causal "
            "language model, DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them."
        )
    targets = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    return (targets != IGNORED).reshape(len(labels), -1).sum(1)


def weighted(module: nn.Module, loss: LossFn) -> tuple[ModelFn, dict[str, Tensor]]:
    """`functionalize` of a model whose batches are `{"inputs": keywords, "weights": [n]}`: losses times weights."""

    def call(module: nn.Module, batch: Any) -> Any:
        return module(**{name: value for name, value in batch["inputs"].items() if name != "labels"})

    def weighted_loss(output: Any, batch: Any) -> Tensor:
        return loss(output, batch["inputs"]) * batch["weights"]

    return functionalize(module, weighted_loss, call=call)


def rows_of(batch: Any, rows: Tensor) -> Any:
    """Some samples of a batch of `weighted`, which take over the weight of all."""
    inputs = {name: t[rows] if isinstance(t, Tensor) else t for name, t in batch["inputs"].items()}
    weights = batch["weights"][rows]
    # a mean over n samples becomes one over k
    share = len(rows) / len(batch["weights"]) * batch["weights"].sum() / weights.sum()
    return {"inputs": inputs, "weights": weights * share}


def val_sums(module: nn.Module, loss: LossFn, parts: Iterator[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums of losses and gradients of validation samples, by batches, of which there may be none.

    Raises:
        ValueError: for a batch without labels.
    """
    model_fn, params = weighted(module, loss)
    dtype = torch.promote_types(next(iter(params.values())).dtype, torch.float32)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    summed = torch.zeros((), dtype=dtype, device=next(iter(params.values())).device)
    for part in parts:
        if not isinstance(part.get("labels"), Tensor):
            raise ValueError(f"val_batch has no labels (it has {', '.join(part)}).")
        weights = torch.ones(len(part["labels"]), dtype=dtype, device=summed.device)
        found = val_gradient(model_fn, params, {"inputs": dict(part), "weights": weights}, reduction="sum")
        total = {name: total[name] + gradient for name, gradient in found.direction.items()}
        summed = summed + found.losses.sum()
    return summed, total
