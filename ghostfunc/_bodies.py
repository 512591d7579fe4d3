"""torch functions that arrive as one call and are Python inside: their own bodies run under the interpreter.

Such a function asks first whether a mode wants it, and hands itself over. Without that question its body is ordinary
code, each step of which has a rule: the same numbers, masks, errors and random draws as torch's, for all arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F

_COMPOSITES = frozenset({F.multi_head_attention_forward})


def body(func: Callable) -> Callable | None:
    """The body of a composite function, to be run under the mode; None for any other function.

    Args:
        func: what a call arrived as.

    Returns:
        A function of the same arguments.
    """
    return _without_question(func) if func in _COMPOSITES else None  # type: ignore[arg-type]


def _nobody_asks(tensors: Any) -> bool:
    return False


@functools.cache
def _without_question(function: FunctionType) -> Callable:
    names = {**function.__globals__, "has_torch_function": _nobody_asks}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
