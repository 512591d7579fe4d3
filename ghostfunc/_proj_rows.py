"""Projected gradients of a module's samples, while nothing of the loop that trains it is disturbed.

The module runs once more, on the parameters as they are: in evaluation mode, so that a row depends on nothing but its
sample and the parameters, and under the autocast that the loop is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._engine_autocast import FLOAT16_LOSS_SCALE, Autocast, functionalized
from ghostfunc._functionalize import LossFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._make_projection import kronecker_projection
from ghostfunc._projection import ghost_grad_proj
from ghostfunc._randomness import RandomState
from ghostfunc._sharded import is_sharded


class Projected:
    """The projected gradients of a module.

    Args:
        module: the model.
        loss: `loss(output, batch) -> losses[B]`.
        call: `call(module, batch) -> output`.
    """

    def __init__(self, module: nn.Module, loss: LossFn, call: Callable[[nn.Module, Any], Any]) -> None:
        self._module = module
        self._loss = loss
        self._call = call

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self._module.parameters()).device

    def projection(self, batch: Any, **options: Any) -> KroneckerProjection:
        """The projection that `kronecker_projection` makes for the module with these options."""
        with self._undisturbed() as autocast:
            model_fn, params = functionalized(self._module, self._loss, self._call, autocast, 1.0)
            return kronecker_projection(model_fn, params, self._on_device(batch), **options)

    def rows(self, batch: Any, projection: KroneckerProjection, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The rows `[B, k]` and the losses `[B]` of a batch, whose samples messages call by these names.

        Raises:
            FloatingPointError: if a loss or a row is not finite.
        """
        with self._undisturbed() as autocast:
            batch = self._on_device(batch)
            try:
                rows, losses = self._within_range(batch, projection, autocast)
            except ValueError:
                if any(is_sharded(p) for p in self._module.parameters()):
                    raise  # all ranks would have to run the forward below
                # The transform knows rows of the batch; whoever collects it wants to read which samples they are.
                model_fn, params = functionalized(self._module, self._loss, self._call, autocast, 1.0)
                with torch.no_grad():
                    losses = model_fn(params, batch)
                require_all("loss of {} is not finite", losses.isfinite(), names, "Look at these samples.")
                raise
        remedy = "Look at these samples, or at the dtype."
        require_all("projection of {} is not finite", rows.isfinite().all(1), names, remedy)
        return rows, losses

    def _within_range(self, batch: Any, projection: KroneckerProjection, autocast: Autocast) -> tuple[Tensor, Tensor]:
        if torch.float16 not in (autocast.dtype, *(p.dtype for p in self._module.parameters())):
            return self._scaled(batch, projection, autocast, 1.0)
        # Without a scale small gradients vanish in float16; one that makes them overflow is halved. Every batch begins
        # with the same, so that rows do not depend on what was collected before.
        scale = FLOAT16_LOSS_SCALE
        found = self._scaled(batch, projection, autocast, scale)
        while scale > 1 and not found[0].isfinite().all():
            scale /= 2
            found = self._scaled(batch, projection, autocast, scale)
        return found

    def _scaled(
        self, batch: Any, projection: KroneckerProjection, autocast: Autocast, scale: float
    ) -> tuple[Tensor, Tensor]:
        model_fn, params = functionalized(self._module, self._loss, self._call, autocast, scale)

        def losses_twice(params: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
            losses = model_fn(params, batch)
            return losses, losses.detach()

        rows, losses = ghost_grad_proj(losses_twice, params, batch, projection, has_aux=True)
        return rows / scale, losses / scale

    def _on_device(self, batch: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device), batch)

    @contextmanager
    def _undisturbed(self) -> Iterator[Autocast]:
        """Evaluation mode, and no autocast but the forward's own; modes and random numbers are restored."""
        autocast = Autocast.of(self._module)
        random = RandomState.of(self.device)
        in_training = [m for m in self._module.modules() if m.training]
        try:
            for m in in_training:
                m.training = False  # not .eval(), which some modules take for more, such as merging adapters
            with torch.enable_grad(), autocast.left():
                yield autocast
        finally:
            for m in in_training:
                m.training = True
            random.restore()


def require_all(what: str, good: Tensor, names: Sequence[str], remedy: str) -> None:
    """Raise FloatingPointError where a sample is not good `[B]`; `what` has a place for how many there are."""
    bad = [name for name, is_good in zip(names, good.tolist(), strict=True) if not is_good]
    if bad:
        which = what.format(f"{len(bad)} of {len(names)} samples")
        raise FloatingPointError(f"the {which}: {'; '.join(bad[:8])}. Nothing of this batch was kept. {remedy}")
