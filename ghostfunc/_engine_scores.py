"""What the engine computes at a call: losses, the mean training gradient, dots and curvature, under autocast.

Under float16 losses are scaled inside, so that small gradients do not vanish, and the scale is taken out again.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._dots import ValGradient
from ghostfunc._engine_autocast import FLOAT16_LOSS_SCALE, Autocast, functionalized
from ghostfunc._functionalize import LossFn
from ghostfunc._second_order import in_run_values
from ghostfunc._transforms import val_gradient, value_and_grad_dot


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
        self._loss_scale = FLOAT16_LOSS_SCALE
        self._made: tuple[Hashable, ValGradient] | None = None

    def can_share(self) -> bool:
        """Whether one validation gradient can serve several calls."""
        about = getattr(self._options["precondition"], "about_train_gradient", False)
        each = "val" in self._options.get("out", "").split()
        return self._order == 1 and not about and not each and self._options["schedule"] != "joint"

    def scores(self, module: nn.Module, batch: Any, val_batch: Any, step: Hashable = None) -> Scores:
        """Score a training batch against a validation batch.

        Args:
            module: the model.
            batch: the training batch.
            val_batch: the validation batch.
            step: where its gradient is to serve all calls of an optimizer's step: which step this is.

        Raises:
            NotImplementedError: for order 2 under float16 autocast.
            Exception: what the transforms raise.
        """
        autocast = Autocast.of(module)
        with autocast.left():
            if autocast.dtype != torch.float16:
                return self._scaled_scores(module, batch, val_batch, step, autocast, 1.0)
            if self._order == 2:
                raise NotImplementedError(
                    "order=2 under float16 autocast: scaled losses have a curvature that float16 cannot hold. Use "
                    "bfloat16 autocast, float32, or order=1."
                )
            # As GradScaler does, overflow halves the scale; unlike there, the step is tried again, not given up.
            found = self._scaled_scores(module, batch, val_batch, step, autocast, self._loss_scale)
            while self._loss_scale > 1 and _overflowed(found):
                self._loss_scale /= 2
                found = self._scaled_scores(module, batch, val_batch, step, autocast, self._loss_scale)
            return found

    def forget(self) -> None:
        """Forget the validation gradient that calls share."""
        self._made = None

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        """The losses `[n]` of a batch, without anything else."""
        model_fn, params = functionalized(module, self._loss, self._call, Autocast.of(module), 1.0)
        with torch.no_grad():
            return model_fn(params, batch)

    def _scaled_scores(
        self, module: nn.Module, batch: Any, val_batch: Any, step: Hashable, autocast: Autocast, scale: float
    ) -> Scores:
        """Run the transform on losses times `scale`, which is out of the results again."""
        model_fn, params = functionalized(module, self._loss, self._call, autocast, scale)
        if self._order == 2:
            values = in_run_values(model_fn, params, batch, val_batch, lr=1.0, order=2, **self._options)
            dots = values.first * len(values.losses)
            return Scores(values.losses, values.val_losses, values.grads, values.unused, dots, values.second)
        options: dict[str, Any] = self._options
        if step is not None:
            versions = [(t.data_ptr(), t._version) for t in (*module.parameters(), *module.buffers())]
            key = (step, scale, autocast.dtype, module.training, *versions)
            if self._made is None or self._made[0] != key:
                precondition, dtype = options["precondition"], options["dtype"]
                found = val_gradient(model_fn, params, val_batch, precondition=precondition, dtype=dtype)
                self._made = key, found
            val_batch, options = self._made[1], {**options, "precondition": None}
        else:
            self._made = None
        found = value_and_grad_dot(model_fn, params, batch, val_batch, **options)
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


def _overflowed(found: Scores) -> bool:
    tensors = [*found.grads.values(), *pytree.tree_leaves(found.dots)]
    return not torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
