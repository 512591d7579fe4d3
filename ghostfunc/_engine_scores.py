"""What the engine computes at a call: losses, the mean training gradient, dots and curvature, under autocast.

Under float16 losses are scaled inside, so that small gradients do not vanish, and the scale is taken out again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._functionalize import LossFn, functionalize
from ghostfunc._second_order import in_run_values
from ghostfunc._transforms import value_and_grad_dot

_FLOAT16_LOSS_SCALE = 2.0**16


class Scores(NamedTuple):
    """What `Scorer` returns.

    Attributes:
        losses: `[n]`, of the training samples.
        val_losses: `[m]`, of the validation samples.
        grads: of the mean training loss, by name.
        unused: names of parameters that it does not depend on.
        dots: <grad l_i, V> in the axes asked for.
        curved: `[n]`, the second-order part of the values at a learning rate of 1; None for order 1.
    """

    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    unused: tuple[str, ...]
    dots: Any
    curved: Tensor | None

    @property
    def dots_per_sample(self) -> Tensor:
        """One dot per training sample `[n]`, whatever was asked for."""
        if isinstance(self.dots, dict):
            return torch.stack(list(self.dots.values())).sum(0)
        return self.dots.mean(1) if self.dots.dim() == 2 else self.dots


class Scorer:
    """Scores batches of a module.

    Args:
        loss: as in `functionalize`.
        call: as in `functionalize`.
        order: 1, or 2 for the second-order part too.
        options: `value_and_grad_dot`'s; for order 2 `out` and `schedule` have their defaults.
    """

    def __init__(
        self, loss: LossFn, call: Callable[[nn.Module, Any], Any], order: int, options: dict[str, Any]
    ) -> None:
        self._loss = loss
        self._call = call
        self._order = order
        self._options = options
        self._loss_scale = _FLOAT16_LOSS_SCALE

    def scores(self, module: nn.Module, batch: Any, val_batch: Any) -> Scores:
        """Score a training batch against a validation batch.

        Raises:
            NotImplementedError: for order 2 under float16 autocast.
            Exception: what the transforms raise.
        """
        autocast = _Autocast.of(module)
        with torch.autocast(autocast.device_type, enabled=False):  # for the backwards: the forwards enter it themselves
            if autocast.dtype != torch.float16:
                return self._scaled_scores(module, batch, val_batch, autocast, 1.0)
            if self._order == 2:
                raise NotImplementedError(
                    "order=2 under float16 autocast: scaled losses have a curvature that float16 cannot hold. Use "
                    "bfloat16 autocast, float32, or order=1."
                )
            # As GradScaler does, overflow halves the scale; unlike there, the step is tried again, not given up.
            found = self._scaled_scores(module, batch, val_batch, autocast, self._loss_scale)
            while self._loss_scale > 1 and _overflowed(found):
                self._loss_scale /= 2
                found = self._scaled_scores(module, batch, val_batch, autocast, self._loss_scale)
            return found

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        """The losses `[n]` of a batch, without anything else."""
        model_fn, params = self._functionalized(module, _Autocast.of(module), 1.0)
        with torch.no_grad():
            return model_fn(params, batch)

    def _scaled_scores(
        self, module: nn.Module, batch: Any, val_batch: Any, autocast: "_Autocast", scale: float
    ) -> Scores:
        """Run the transform on losses times `scale`, which is out of the results again."""
        model_fn, params = self._functionalized(module, autocast, scale)
        if self._order == 2:
            values = in_run_values(model_fn, params, batch, val_batch, lr=1.0, order=2, **self._options)
            dots = values.first * len(values.losses)
            return Scores(values.losses, values.val_losses, values.grads, values.unused, dots, values.second)
        found = value_and_grad_dot(model_fn, params, batch, val_batch, **self._options)
        if scale == 1:
            return Scores(found.losses, found.val_losses, found.grads, found.unused, found.dots, None)
        return Scores(  # once out of what is linear in the losses, twice out of the dots
            found.losses / scale,
            found.val_losses / scale,
            {name: grad / scale for name, grad in found.grads.items()},
            found.unused,
            pytree.tree_map(lambda dots: dots / scale**2, found.dots),
            None,
        )

    def _functionalized(self, module: nn.Module, autocast: "_Autocast", scale: float) -> tuple[Any, dict[str, Tensor]]:
        def call(module: nn.Module, batch: Any) -> Any:
            with autocast.entered():
                return self._call(module, batch)

        def loss(output: Any, batch: Any) -> Tensor:
            with autocast.entered():
                losses = self._loss(output, batch)
            # In float32 at least: float16 has no room for scaled losses.
            return losses if scale == 1 else losses.to(torch.promote_types(losses.dtype, torch.float32)) * scale

        return functionalize(module, loss, call=call)


class _Autocast(NamedTuple):
    """The autocast that the caller is in."""

    device_type: str
    dtype: torch.dtype | None  # None: none

    @classmethod
    def of(cls, module: nn.Module) -> "_Autocast":
        kind = next(module.parameters()).device.type
        return cls(kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def entered(self) -> AbstractContextManager:
        # Without the cache of cast weights: what one forward caches must not reach the next one's graph.
        return torch.autocast(self.device_type, self.dtype, self.dtype is not None, cache_enabled=False)


def _overflowed(found: Scores) -> bool:
    tensors = [*found.grads.values(), *pytree.tree_leaves(found.dots)]
    return not torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
