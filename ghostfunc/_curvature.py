"""The Hessian of a mean loss, times a direction: H u, beside the losses and the gradient, without the interpreter.

    H u = d/d params <grad mean_j l_j, u>              the gradient's own backward (double backward)
        = d/dt grad mean_j l_j (params + t u)          forward mode over the backward

Both cost about three forward and backward passes. The first is taken wherever torch has the derivative of each
backward in the graph; the second inside functorch transforms, and where a backward has no derivative, or is a user's
own, whose derivative torch would take from whatever it happens to record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ghostfunc._bodies import IN_STEPS, body
from ghostfunc._functionalize import ModelFn
from ghostfunc._nesting import functorch_level, uncompiled
from ghostfunc._operations import op_name
from ghostfunc._randomness import MAY_DRAW, RandomState, draws, in_eval_mode, refusal
from ghostfunc._run_losses import check_losses

_CHECKPOINTED = (
    "second order: model_fn keeps activations by saved-tensor hooks (torch.utils.checkpoint, offloading), under which "
    "the validation loss cannot be differentiated twice with the parameters of the call. Switch checkpointing off for "
    "this call; transformers' own gradient_checkpointing is switched off for the validation rows by itself."
)


class Curvature(NamedTuple):
    """What `curvature` returns.

    Attributes:
        losses: `[m]`.
        gradient: of the mean loss, by name.
        product: H u, by name.
    """

    losses: Tensor
    gradient: dict[str, Tensor]
    product: dict[str, Tensor]


class _TwiceDifferentiable(TorchFunctionMode):
    """Operations that have an eval mode run in it, and normalisations in steps where torch differentiates them wrongly.

    In torch 2.13 this is the second derivative of fused weight normalisation (off by up to 15%), which has no jvp
    either, and the third of layer normalisation under torch.func, for transforms of the whole call.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (steps := body(func)) is not None:  # each step comes back here
            with self:
                return steps(*args, **kwargs)
        name = op_name(func)
        if name in MAY_DRAW and draws(name, args, kwargs):
            args, kwargs = in_eval_mode(name, args, kwargs) or (args, kwargs)
        if name == "weight_norm" or functorch_level() is not None:
            func = IN_STEPS.get(name, func)
        return func(*args, **kwargs)


def curvature(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batch: Any,
    samples: int,
    direction: Mapping[str, Tensor],
    *,
    has_aux: bool,
    randomness: str,
) -> Curvature:
    """The losses of a validation batch, the gradient of their mean, and its Hessian times a direction.

    Dropout is off, attention runs in its math kernel (the only one with a derivative of its backward), and the random
    number generators are left as they were.

    Args:
        model_fn: `model_fn(params, batch) -> losses[m]`.
        params: parameters by name.
        batch: a pytree of tensors `[m, ...]`.
        samples: m.
        direction: u, an entry for each parameter.
        has_aux: whether `model_fn` returns `(losses, aux)`.
        randomness: "error" refuses a model that draws random numbers even so.

    Returns:
        `(losses[m], gradient, product)`.

    Raises:
        RuntimeError: where the loss cannot be differentiated twice; the message has torch's reasons.
        ValueError: if the losses are not one finite number for each sample.
    """
    device = next(iter(params.values())).device
    before = RandomState.of(device)

    def losses_of(leaves: dict[str, Tensor]) -> Tensor:
        with _TwiceDifferentiable(), sdpa_kernel(SDPBackend.MATH), disable_saved_tensors_hooks(_CHECKPOINTED):
            out = model_fn(leaves, batch)
        losses = out[0] if has_aux and isinstance(out, tuple) else out
        check_losses(losses, samples, (("val", samples),))
        return losses

    direction = {name: direction[name].to(p.dtype) for name, p in params.items()}
    with uncompiled(), torch.enable_grad():
        if functorch_level() is not None:
            return _forward_over_reverse(losses_of, params, direction)
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = losses_of(leaves)
        if before.has_moved():
            if randomness == "error":
                raise refusal("an operation of the model")
            before.restore()
        with torch.autocast(device.type, enabled=False):
            found = _double_backward(losses, leaves, direction)
        if isinstance(found, Curvature):
            return found
        try:
            return _forward_over_reverse(losses_of, {k: p.detach() for k, p in params.items()}, direction)
        except RuntimeError as error:
            raise RuntimeError(
                "second order: the validation loss cannot be differentiated twice. By double backward: "
                f"{found}. By forward mode over the backward: {_first_line(error)}. Write that operation in torch "
                "functions that have these derivatives, give a Function of your own setup_context and jvp (for "
                'transformers: attn_implementation="eager" or "sdpa", experts_implementation="eager"), or take order=1.'
            ) from error


def _double_backward(losses: Tensor, leaves: dict[str, Tensor], direction: Mapping[str, Tensor]) -> Curvature | str:
    """The result, or why this way is closed."""
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if not losses.requires_grad:
        return Curvature(losses, zeros, zeros)
    if (own := _own_function(losses)) is not None:
        return f"{own} is an autograd.Function outside of torch, whose backward may not be differentiable"
    inputs = list(leaves.values())
    weights = torch.full_like(losses, 1 / len(losses))
    try:
        first = torch.autograd.grad(losses, inputs, weights, create_graph=True, allow_unused=True)
        curved = [(g, direction[name]) for name, g in zip(leaves, first, strict=True) if g is not None]
        curved = [(g, u) for g, u in curved if g.requires_grad]
        second: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if curved:
            outputs, cotangents = zip(*curved, strict=True)
            second = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    except RuntimeError as error:
        return _first_line(error)
    gradient = {name: zeros[name] if g is None else g.detach() for name, g in zip(leaves, first, strict=True)}
    product = {name: zeros[name] if g is None else g for name, g in zip(leaves, second, strict=True)}
    return Curvature(losses.detach(), gradient, product)


def _forward_over_reverse(
    losses_of: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], direction: dict[str, Tensor]
) -> Curvature:
    def mean_loss(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = losses_of(leaves)
        return losses.mean(), losses

    gradient_of = torch.func.grad(mean_loss, has_aux=True)
    found: Any = torch.func.jvp(gradient_of, (dict(params),), (direction,), has_aux=True)
    gradient, product, losses = found
    return Curvature(losses, gradient, product)


def _own_function(losses: Tensor) -> str | None:
    """The name of an `autograd.Function` in a graph; None if it is torch's own all through."""
    waiting, seen = [losses.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return node.name().removesuffix("Backward")
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
