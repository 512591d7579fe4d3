"""A transformers causal language model up to its head, for a loss that does not want the logits.

What a model does to its head's results (a scale, a soft cap) is known by name from its config, and every time it is
held against the model itself: on four tokens, with the head's weight scaled so that a cap is felt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ghostfunc._losses import BeforeHead

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # multiplied with, or divided by
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_LOUD = 50.0  # logits at which every cap in use is felt
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of logits, relative to the largest; else:
_COARSE = 3e-2


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module for a batch: a dict without labels and segments, a tuple without its last, a tensor."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in ("labels", "segments")}
    return (tuple(batch[:-1]) if isinstance(batch, (tuple, list)) else (batch,)), {}


def before_head(model: nn.Module) -> Callable[[nn.Module, Any], BeforeHead]:
    """How a causal language model is called up to its head.

    Args:
        model: as transformers builds them: `base_model`, `get_output_embeddings()`, `config`.

    Returns:
        `call(module, batch)`, for `functionalize`.

    Raises:
        TypeError: if the model is none, or if its logits are not its head's of its body's last hidden state, but for a
            scale and a soft cap.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", model)
    if not isinstance(head, nn.Linear) or body is model:
        raise TypeError(_refusal(model, "it has no body and linear head as transformers' causal language models have"))
    scale, softcap = _after_head(model, head)

    def call(module: Any, batch: Any) -> BeforeHead:
        head = module.get_output_embeddings()
        return BeforeHead(_hidden(module, *inputs_of(batch)), head.weight, head.bias, scale, softcap)

    return call


def _hidden(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output = model.base_model(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"chunked_causal_lm_loss: {type(model).__name__} cannot be called up to its head: {why}. Pass call= to "
        "functionalize, call(module, batch) -> (hidden [B, T, d], weight [V, d]) or (hidden, weight, bias), or take "
        "causal_lm_loss."
    )


@torch.no_grad()
def _after_head(model: Any, head: nn.Linear) -> tuple[float, float | None]:
    """`(scale, softcap)` of a model's logits."""
    ids = torch.arange(min(4, head.out_features), device=head.weight.device).unsqueeze(0)
    place = next(name for name, module in model.named_modules() if module is head)
    with _evaluating(model):
        try:
            hidden = _hidden(model, (), {"input_ids": ids})
            plain = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).double()
            loud = _LOUD / float(plain.abs().max().clamp(min=1e-6))
            tensors = {f"{place}.{name}": p * loud for name, p in head.named_parameters()}
            found = functional_call(model, tensors, kwargs={"input_ids": ids}, tie_weights=False).logits.double()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(_refusal(model, f"on four tokens it raises {type(error).__name__}: {error}")) from error
    config = getattr(model.config, "text_config", model.config)
    scales, caps = [1.0, *_numbers(_SCALES, config, model)], [None, *_numbers(_CAPS, config)]
    allowed = _TOLERANCE.get(head.weight.dtype, _COARSE)
    for softcap in caps:
        for scale in (s for given in scales for s in dict.fromkeys((given, 1 / given))):
            logits = plain * loud * scale
            logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
            if logits.shape == found.shape and (logits - found).abs().max() <= allowed * found.abs().max():
                return scale, softcap
    raise TypeError(
        _refusal(model, "its logits are not those of its head from its body's last hidden state, scaled or soft-capped")
    )


def _numbers(names: Iterable[str], *owners: Any) -> list[float]:
    """The attributes of these names that are numbers, and not 0."""
    values = [getattr(owner, name, None) for name in names for owner in owners]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v != 0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is left in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
