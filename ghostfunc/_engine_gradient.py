"""How the engine's gradient gets to `.grad`: a loss whose backward hands over what was computed before."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclasses.dataclass
class Pending:
    """How many calls there were since the last `prepare_gradients`, and how many of their backwards have run."""

    calls: int = 0
    backwards: int = 0


def loss_with_gradient(
    losses: Tensor, grads: dict[str, Tensor], unused: tuple[str, ...], module: nn.Module, pending: Pending
) -> Tensor:
    """Return the mean of `losses`, whose `backward()` adds `grads`, times its scale, to `.grad` of the module.

    Args:
        losses: `[n]`.
        grads: by parameter name.
        unused: names of parameters whose `.grad` is left alone.
        module: holds the parameters.
        pending: counts the call, and then its backward.
    """
    parameters = dict(module.named_parameters())
    pending.calls += 1
    used = {name: grad for name, grad in grads.items() if name not in unused}
    handover = _Handover(list(used.values()), pending)
    loss = losses.mean() if len(losses) else losses.sum()  # of a rank that has skipped all its samples
    return _TrainLoss.apply(loss, handover, *(parameters[name] for name in used))  # type: ignore[return-value]


class _Handover:
    """Gradients on their way to `.grad`, each let go as it is handed over."""

    def __init__(self, grads: list[Tensor], pending: Pending) -> None:
        self.grads = grads
        self.pending = pending
        self.is_done = False

    def scaled(self, factor: Tensor) -> list[Tensor]:
        if self.is_done:
            raise RuntimeError(
                "backward ran a second time through the loss of one engine call: its gradient was handed over the "
                "first time. Call the engine again."
            )
        self.is_done = True
        self.pending.backwards += 1
        self.grads.reverse()
        return [self.grads.pop() * factor for _ in range(len(self.grads))]


class _TrainLoss(torch.autograd.Function):
    """The identity on a loss; its backward returns, for each parameter, the gradient computed before."""

    @staticmethod
    def forward(loss: Tensor, handover: _Handover, *parameters: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.handover = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.handover.scaled(grad_output)
