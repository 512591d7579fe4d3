"""Operators of compiled graphs: the tile stream, which is a loop, and checks of values, which tracing does not have.

A check returns its first argument, so that what depends on it runs after it.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ghostfunc._contract import tile_loop
from ghostfunc._directions import FromRows, Given
from ghostfunc._errors import InteractingSamples, UnsupportedUse
from ghostfunc._factors import Outer
from ghostfunc._run_losses import not_finite

# For operators that wait for values: CUDA graphs leave them out.
WAITS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}

_KINDS = {error.__name__: error for error in (UnsupportedUse, InteractingSamples, ValueError, TypeError, IndexError)}


def _tile_stream(
    left: Tensor,
    right: Tensor,
    given: Tensor | None,
    val_left: Tensor | None,
    val_right: Tensor | None,
    each: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    if given is not None:
        directions = Given(given)
    else:
        assert val_left is not None and val_right is not None
        directions = FromRows(Outer(val_right, val_left), each)
    dots, grad = tile_loop(left, right, directions, want_grad)
    return dots, left.new_empty(0) if grad is None else grad


_tile_stream_op = custom_op(
    "ghostfunc::tile_stream",
    _tile_stream,
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor? given, Tensor? val_left, Tensor? val_right, bool each, bool want_grad) "
    "-> (Tensor, Tensor)",
)


@_tile_stream_op.register_fake
def _(left, right, given, val_left, val_right, each, want_grad):
    k = len(given) if given is not None else len(val_left) if each else 1
    return left.new_empty(len(left), k), left.new_empty((left.shape[2], right.shape[2]) if want_grad else 0)


@register_flop_formula(torch.ops.ghostfunc.tile_stream)
def _tile_stream_flops(left, right, given, val_left, val_right, each, want_grad, **_: Any) -> int:
    (n, positions, p), q = left, right[2]
    k = given[0] if given is not None else val_left[0] if each else 1
    make = 0 if given is not None else 2 * val_left[0] * val_left[1] * p * q
    return 2 * n * positions * p * q + 2 * n * k * p * q + make


def _finite(values: Tensor, losses: Tensor, names: list[str], sizes: list[int]) -> Tensor:
    """Without names of batches, these are norms of gradients."""
    if not bool(torch.isfinite(losses).all()):
        named = tuple(zip(names, sizes, strict=True))
        raise ValueError(not_finite(losses, named) if named else norms_not_finite(losses))
    return values.clone()


def norms_not_finite(norms: Tensor) -> str:
    """What is wrong with norms of gradients of which some are not finite."""
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    return (
        f"the gradients of samples {bad} are not finite (norms {norms[bad].tolist()}), though their losses are; they "
        "would spoil the sum. Look at these samples, at the model's dtype and at operations with an infinite slope."
    )


_finite_op = custom_op(
    "ghostfunc::finite",
    _finite,
    mutates_args=(),
    schema="(Tensor values, Tensor losses, str[] names, SymInt[] sizes) -> Tensor",
    **WAITS,
)
_finite_op.register_fake(lambda values, losses, names, sizes: torch.empty_like(values))


def _refuse(values: Tensor, kind: str, message: str, parameters: list[str]) -> Tensor:
    raise UnsupportedUse(message, parameters) if kind == "UnsupportedUse" else _KINDS[kind](message)


_refuse_op = custom_op(
    "ghostfunc::refuse",
    _refuse,
    mutates_args=(),
    schema="(Tensor values, str kind, str message, str[] parameters) -> Tensor",
    **WAITS,
)
_refuse_op.register_fake(lambda values, kind, message, parameters: torch.empty_like(values))


def refused(values: Tensor, error: Exception) -> Tensor:
    """A tensor that raises an error when a compiled graph makes it.

    Args:
        values: what it looks like.
        error: one of ghostfunc's or of Python's own; any other is told in an `UnsupportedUse`.

    Returns:
        The tensor.
    """
    kind, message = type(error).__name__, str(error)
    if _KINDS.get(kind) is not type(error):
        torchs = str(Path(torch.__file__).parent)
        stack = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(torchs)]
        frames = "".join(traceback.format_list(stack[-3:]))
        message = (
            "the call cannot be compiled: while torch.compile recorded it, with tensors that have no values yet, came "
            f"{kind}: {message}\nin\n{frames}Call it outside of torch.compile, or write model_fn without decisions by "
            "values (.item(), if on a tensor, nonzero)."
        )
        kind = "UnsupportedUse"
    return torch.ops.ghostfunc.refuse(values, kind, message, list(getattr(error, "parameters", ())))
