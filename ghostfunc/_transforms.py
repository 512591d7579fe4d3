"""Placeholder while the interpreter is being written: the same results from the dense oracle."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._functionalize import ModelFn
from ghostfunc._oracle import per_sample_grad


class ValueAndGradDot(NamedTuple):
    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    dots: Any


def value_and_grad_dot(model_fn: ModelFn, params, train, val, *, out="train", reduction="mean", precondition=None,
                       schedule="auto", dtype=None, layers="", has_aux=False, on_unsupported="raise"):
    g, v = per_sample_grad(model_fn, params, train), per_sample_grad(model_fn, params, val)
    grads = {k: t.mean(0) for k, t in g.items()}
    each = {k: torch.einsum("np,p->n", g[k].flatten(1), v[k].mean(0).flatten()) for k in g}
    dots = sum(each.values()) if out == "train" else each
    with torch.no_grad():
        return ValueAndGradDot(model_fn(params, train), model_fn(params, val), grads, dots)
