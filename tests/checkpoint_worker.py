"""What each process of tests/test_checkpoint.py runs on several ranks: save and load under another number of them."""

import json
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ghostfunc import _checkpoint_files
from ghostfunc.checkpoint import TrainingCheckpoints


class Tied(nn.Module):
    """Uneven shards: three rows, five rows, a scale of one; a tied weight; a buffer without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(ids)) * self.scale)


def built(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Tied()
    if kind == "sharded":
        model = fully_shard(model)
    if kind == "wrapped":
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after two steps that are the same on every rank."""
    model, optimizer = built(kind, 0)
    for step in range(2):
        model(torch.arange(5) if step else torch.tensor([0, 3])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, buffer in model.named_buffers():
        if name.endswith("seen"):
            buffer.fill_(7)
    return model, optimizer


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Everything that has been trained, whole."""

    def whole(tensor: Any) -> list[float]:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).double().flatten().tolist()

    found = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param.detach())
        found |= {f"{name} {key}": whole(value) for key, value in optimizer.state[param].items()}
    found |= {name.removeprefix("module."): whole(buffer) for name, buffer in model.named_buffers()}
    return found


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, ranks: int, folder: Path, what: str, kind: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1 or kind != "plain":
        store = dist.FileStore(str(folder / f"store-{what}-{kind}-{ranks}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    said: dict[str, Any] = {}
    if what == "save":
        model, optimizer = trained(kind)
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        TrainingCheckpoints(folder / kind, model, optimizer).save(2, extra={"order": torch.arange(4), "best": (1, 0.5)})
        said = {"numbers": numbers(model, optimizer)}
    else:
        model, optimizer = built(kind, 9)
        checkpoints = TrainingCheckpoints(folder / what, model, optimizer)
        resumed = checkpoints.load()
        said = {
            "step": resumed.step,
            "order": resumed.extra["order"].tolist(),
            "best": resumed.extra["best"],
            "numbers": numbers(model, optimizer),
        }
    said["draws"] = [torch.rand(()).item(), random.random()]
    if what == "save" and ranks == 2:
        _checkpoint_files.PATIENCE = 0.2
        apart = TrainingCheckpoints(folder / f"disk-of-{rank}", model, optimizer)
        said["apart"] = message_of(apart.load)
        said["unstorable"] = message_of(
            lambda: TrainingCheckpoints(folder / "bad", model, optimizer).save(1, extra=(object() if rank else 1))
        )
    (folder / f"said-{what}-{kind}-{ranks}-{rank}.json").write_text(json.dumps(said))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
