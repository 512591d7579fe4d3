"""Where the planner changes its order: what `explain` says of a linear map, by its width and a sample's length."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf

LENGTHS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = ((4, 1), (16, 1), (4, 16))


def model_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """`[B, T, width] -> [B]`."""
    return F.linear(x, params["weight"]).square().mean((1, 2))


def order(n: int, m: int, length: int, width: int) -> str:
    """The contraction of the weight `[width, width]`; with m = 0, along a direction that exists, without gradients."""
    params = {"weight": torch.zeros(width, width)}
    train, val = torch.zeros(n, length, width), torch.zeros(m, length, width)
    (use,) = gf.explain(model_fn, params, train, val if m else None).uses["weight"]
    return use.contraction


def measure(*, tiny: bool = False) -> dict[str, Any]:
    """`plans`: for each batch a line of orders for each width, one for each length."""
    lengths, widths = (LENGTHS[:2], WIDTHS[:1]) if tiny else (LENGTHS, WIDTHS)
    labels = {f"dots with gradients, B={n}, Bv={m}": (n, m) for n, m in BATCHES} | {"along a direction, B=4": (4, 0)}
    plans = {
        label: [[order(n, m, length, width) for length in lengths] for width in widths]
        for label, (n, m) in labels.items()
    }
    return {"lengths": lengths, "widths": widths, "plans": plans}
