"""torch functions that arrive as one call and are Python inside: their own bodies run under the interpreter.

Such a function asks first whether a mode wants it, and hands itself over. Without that question its body is ordinary
code, each step of which has a rule: the same numbers, masks, errors and random draws as torch's, for all arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COMPOSED = frozenset({F.multi_head_attention_forward})


def body(func: Callable) -> Callable | None:
    """The body of a composite function, to be run under the mode; None for any other function.

    Args:
        func: what a call arrived as.

    Returns:
        A function of the same arguments.
    """
    return _without_question(func) if func in COMPOSED else None  # type: ignore[arg-type]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


# By name, what torch 2.13 differentiates wrongly where a backward is differentiated: the second derivative of fused
# weight normalisation (off by up to 15%), and the third of layer normalisation under torch.func.
IN_STEPS: dict[str, Callable] = {"weight_norm": _weight_norm, "layer_norm": _layer_norm}


def _nobody_asks(tensors: Any) -> bool:
    return False


@functools.cache
def _without_question(function: FunctionType) -> Callable:
    names = {**function.__globals__, "has_torch_function": _nobody_asks}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
