"""The engine on several ranks: each leaves a share of the gradient in `.grad`, whose mean over the ranks is the whole.

    share of a rank = ranks / n * sum of its own samples' gradients,   n the samples of all ranks

For equal shares that is the mean gradient of the rank's samples, as under `DistributedDataParallel`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostfunc._ranks import Group, Ranks
from ghostfunc._sharded import group_of, is_sharded


def ranks_of(module: nn.Module, group: Group | None) -> Ranks | None:
    """The ranks of a group; without one, those that `DistributedDataParallel` or `fully_shard` has put a module on."""
    if group is None and isinstance(module, DistributedDataParallel):
        group = module.process_group
    parameters = dict(module.named_parameters())
    return Ranks.of(group_of(parameters, group), next(iter(parameters.values())).device)


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """Around what one rank does alone: what it raises, all raise."""
    return nullcontext() if ranks is None else ranks.together()


def total(ranks: Ranks | None, count: int) -> int:
    """A count over all ranks."""
    return count if ranks is None else ranks.total(count)


def average_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Make every `.grad` its mean over the ranks, one that a rank lacks being zero there.

    Gradients of sharded parameters are sums over ranks already, and stay.
    """
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and not is_sharded(p)}
    here = torch.tensor([p.grad is not None for p in parameters.values()], dtype=torch.int32, device=ranks.device)
    somewhere = ranks.sums({"": here})[""].tolist()
    shares: dict[str, Tensor] = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for (name, p), count in zip(parameters.items(), somewhere, strict=True)
        if count
    }
    for name, summed in ranks.sums(shares).items():
        parameters[name].grad = summed.div_(ranks.size)
