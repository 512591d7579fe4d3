"""What a call of the engine returns."""

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class EngineOutput:
    """What `engine(X, Y)` returns.

    Attributes:
        loss: the mean training loss, a scalar whose `backward()` adds the mean training gradient to `.grad`.
        losses: `[n]`, the loss of each training sample.
        val_losses: `[m]`, the loss of each validation sample; None under `method="Regular"`.
        dots: `[n]`, <grad l_i, mean_j grad l_j>, i a training and j a validation sample (or what `out` asks for); None
            under `method="Regular"`. Free of the loss's scaling and of any division by micro-steps.
        values: `[n]`, In-Run Data Shapley values, as at `GradDotProdEngine.values`.
        second_order: `[n]`, as at `GradDotProdEngine.second_order`.
    """

    loss: Tensor
    losses: Tensor
    val_losses: Tensor | None
    dots: Any
    values: Tensor | None = None
    second_order: Tensor | None = None
