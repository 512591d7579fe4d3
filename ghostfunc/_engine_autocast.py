"""An engine's model function: the module under the autocast of the loop that calls it, and with scaled losses.

Backwards run outside of autocast, as they do in a plain loop; the forward enters it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghostfunc._functionalize import LossFn, ModelFn, functionalize

FLOAT16_LOSS_SCALE = 2.0**16


class Autocast(NamedTuple):
    """The autocast that the caller is in.

    Attributes:
        device_type: of the module's parameters.
        dtype: None where there is no autocast.
    """

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def of(cls, module: nn.Module) -> Autocast:
        """What is on now."""
        kind = next(module.parameters()).device.type
        return cls(kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def entered(self) -> AbstractContextManager:
        """The same again, wherever this is called."""
        # Without the cache of cast weights: what one forward caches must not reach the next one's graph.
        return torch.autocast(self.device_type, self.dtype, self.dtype is not None, cache_enabled=False)

    def left(self) -> AbstractContextManager:
        """No autocast, for backwards."""
        return torch.autocast(self.device_type, enabled=False)


def functionalized(
    module: nn.Module, loss: LossFn, call: Callable[[nn.Module, Any], Any], autocast: Autocast, scale: float
) -> tuple[ModelFn, dict[str, Tensor]]:
    """`functionalize` of a module whose forward and loss run under `autocast`, its losses times `scale`."""

    def call_under_autocast(module: nn.Module, batch: Any) -> Any:
        with autocast.entered():
            return call(module, batch)

    def scaled_loss(output: Any, batch: Any) -> Tensor:
        with autocast.entered():
            losses = loss(output, batch)
        # In float32 at least: float16 has no room for scaled losses.
        return losses if scale == 1 else losses.to(torch.promote_types(losses.dtype, torch.float32)) * scale

    return functionalize(module, scaled_loss, call=call_under_autocast)
