"""Ready per-sample losses for `functionalize`: `loss(output, batch) -> losses[B]`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._linear_cross_entropy import linear_cross_entropy

IGNORED = -100


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"expected logits: a tensor, an object with .logits or a tuple; got {type(output).__name__}.")


def causal_lm_loss(output: Any, batch: Any) -> Tensor:
    """Mean next-token cross-entropy of each sample, over the sample's own unmasked targets.

    l_b = (1 / N_b) sum_t -log p(y_{b,t+1} | y_{b,<=t}), N_b the number of targets of sample b that are not ignored.

    Args:
        output: logits `[B, T, V]`, or a transformers output with `.logits`.
        batch: a dict with `labels [B, T]` (or, without them, `input_ids [B, T]`), a tuple whose last element are the
            labels, or the ids themselves. Labels stand beside their inputs and are shifted here, once. Targets of
            -100 are ignored; where labels are absent, so are targets whose `attention_mask`, or whose predecessor's,
            is 0. With `segments [B, T]` in the dict (several documents in a row), no document predicts the next, and
            the loss of a row is the sum of its documents' mean losses.

    Returns:
        `[B]`, float32 for lower-precision logits. A sample without unmasked targets has loss 0 and gradient 0.

    Raises:
        ValueError: if the labels' shape is not the logits' first two dimensions.

    Example:
        >>> import torch, ghostfunc as gf
        >>> gf.causal_lm_loss(torch.zeros(2, 5, 8), torch.randint(8, (2, 5))).round(decimals=4)
        tensor([2.0794, 2.0794])
    """
    logits = _logits(output)  # [B, T, V]
    labels = _labels(batch)  # [B, T]
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"causal_lm_loss: labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            "expected [B, T] and [B, T, V] with one label beside each input token."
        )
    # Shifting the labels instead of the logits spares a copy of [B, T, V].
    targets, segments = _targets(labels, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token_losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )  # [B * T]
    return _mean_over_targets(token_losses.view(targets.shape), targets, segments)


class BeforeHead(NamedTuple):
    """What a language model is before its head, and the head: the output that `chunked_causal_lm_loss` takes.

    Attributes:
        hidden: `[B, T, d]`, what the head maps to logits.
        weight: `[V, d]`, the head's.
        bias: `[V]`, the head's, or None.
        scale: what the logits are multiplied with.
        softcap: c, where the (scaled) logits are c * tanh(logits / c).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def chunked_causal_lm_loss(output: Any, batch: Any) -> Tensor:
    """`causal_lm_loss` without the logits of all positions: the same numbers, for large vocabularies.

    `functionalize(model, chunked_causal_lm_loss)` runs a transformers causal language model up to its head, and the
    head and the loss as one operation (`linear_cross_entropy`): no `[B, T, V]` is allocated, in a plain step or in a
    transform. It costs one more product with the head's weight, in which the backward computes the logits again.

    Args:
        output: `(hidden [B, T, d], weight [V, d])` or `(hidden, weight, bias)`, as a `call=` of your own gives it to
            `functionalize`; or what `functionalize` makes of a transformers model by itself.
        batch: as in `causal_lm_loss`.

    Returns:
        `[B]`, as `causal_lm_loss` of the logits `hidden @ weight.T + bias`.

    Raises:
        TypeError: if the output is anything else.
        ValueError: if the labels' shape is not the hidden states' first two dimensions.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Embedding(8, 4), "head": torch.nn.Linear(4, 8, bias=False)})
        >>> def before_head(model, ids):
        ...     return model["body"](ids), model["head"].weight
        >>> model_fn, params = gf.functionalize(model, gf.chunked_causal_lm_loss, call=before_head)
        >>> model_fn(params, torch.randint(8, (2, 5))).shape
        torch.Size([2])
    """
    if not isinstance(output, tuple) or not 2 <= len(output) <= 5 or not isinstance(output[1], Tensor):
        raise TypeError(
            "chunked_causal_lm_loss takes what a model is before its head, (hidden [B, T, d], weight [V, d]) or "
            f"(hidden, weight, bias), and got {type(output).__name__}. For a module of your own, pass call= to "
            "functionalize: call(module, batch) -> (hidden, weight)."
        )
    hidden, weight, bias, scale, softcap = BeforeHead(*output)
    labels = _labels(batch)  # [B, T]
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"chunked_causal_lm_loss: labels of shape {tuple(labels.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}; expected [B, T] and [B, T, d] with one label beside each input token."
        )
    if scale != 1:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    targets, segments = _targets(labels, batch)
    token_losses = linear_cross_entropy(hidden, weight, targets, bias, ignore_index=IGNORED, softcap=softcap)
    return _mean_over_targets(token_losses, targets, segments)


def _targets(labels: Tensor, batch: Any) -> tuple[Tensor, Tensor | None]:
    """The target beside each input token, and the documents that tokens are of, where a row has several: `[B, T]`."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    segments = batch.get("segments") if isinstance(batch, Mapping) else None
    if segments is not None:
        targets = targets.masked_fill(F.pad(segments[:, 1:], (0, 1), value=-1) != segments, IGNORED)
    return targets, segments


def _mean_over_targets(token_losses: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
    """The mean of a sample's losses, or the sum of its documents' means: `[B]`."""
    read = targets != IGNORED
    if segments is not None:
        own = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
        return (token_losses * read / (own & read[:, None, :]).sum(2).clamp(min=1)).sum(1)
    return token_losses.sum(1) / read.sum(1).clamp(min=1)


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        if batch.get("labels") is not None:
            return batch["labels"]
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        if mask is None or mask.shape != ids.shape:
            return ids
        unread = (mask == 0) | (F.pad(mask[:, :-1], (1, 0)) == 0)  # nor is a token that only padding stands before
        return ids.masked_fill(unread, IGNORED)
    return batch[-1]


def classification_loss(output: Any, batch: Any) -> Tensor:
    """Cross-entropy of each sample's class: l_b = -log softmax(output_b)[label_b].

    Args:
        output: logits `[B, C]`, or an object with `.logits`.
        batch: a dict with `labels [B]`, or a tuple whose last element are the labels.

    Returns:
        `[B]`; 0 for a label of -100.

    Raises:
        ValueError: if the shapes are not `[B, C]` and `[B]`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> gf.classification_loss(torch.zeros(2, 4), (None, torch.tensor([1, 3]))).round(decimals=4)
        tensor([1.3863, 1.3863])
    """
    logits = _logits(output)  # [B, C]
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[-1]  # [B]
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"classification_loss: labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}; expected [B] and [B, C]."
        )
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
