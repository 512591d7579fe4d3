"""What each process of tests/test_nonfinite.py runs on several ranks: an engine that skips, on this rank's samples."""

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ghostfunc as gf
from ghostfunc.engine import GradDotProdEngine


class Model(nn.Module):
    """A sample with a feature of nan has a loss of nan; one that begins with -1 a finite loss and a gradient of nan."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        is_steep = x[:, :1] == -1
        steep = torch.sqrt(torch.where(is_steep, hidden * 0, 1.0))
        return self.second(torch.where(is_steep, steep, torch.tanh(hidden)))


def parts(order: int = 1, *, sharded: bool = False, **options: Any) -> tuple[nn.Module, GradDotProdEngine]:
    torch.manual_seed(0)
    model: nn.Module = Model().double()
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    val = torch.rand(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    return model, GradDotProdEngine(
        model, val, loss=gf.classification_loss, optimizer=optimizer, order=order, **options
    )


def batch(bad: dict[int, float], n: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.rand(n, 3, dtype=torch.float64), torch.arange(n) % 2
    for row, value in bad.items():
        x[row, 0] = value
    return x, y


CASES: dict[str, tuple[dict[int, float], dict[str, Any]]] = {  # bad rows of five, of which rank 0 has three
    "both ranks": ({1: torch.nan, 3: -1.0}, {}),
    "all of rank 1": ({3: torch.nan, 4: torch.nan}, {}),
    "order 2": ({1: torch.nan, 3: -1.0}, {"order": 2}),
    "matrix": ({4: torch.nan}, {"out": "train val"}),
    "sharded": ({1: torch.nan, 3: -1.0}, {"sharded": True}),
    "all of rank 1, sharded": ({3: torch.nan, 4: torch.nan}, {"sharded": True}),
    "everything": (dict.fromkeys(range(5), torch.nan), {}),
    "raise": ({3: torch.nan}, {"on_nonfinite": "raise"}),
    "raise, sharded": ({3: torch.nan}, {"on_nonfinite": "raise", "sharded": True}),
}


def step(rank: int, name: str) -> dict[str, Any]:
    """What the engine has after a call, or what it raises."""
    bad, options = CASES[name]
    model, engine = parts(**{"on_nonfinite": "skip", "group": dist.group.WORLD, **options})
    x, y = (t[:3] if rank == 0 else t[3:] for t in batch(bad))
    engine.attach_train_batch(x, y, 0, range(10, 13) if rank == 0 else range(13, 15), domains=["law"] * len(x))
    try:
        engine(x, y).loss.backward()
        engine.prepare_gradients()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    return {
        "grads": {name: grad.tolist() for name, grad in grads.items() if grad is not None},
        "dots": engine.dots.tolist(),
        "values": engine.values.tolist() if engine.values is not None else None,
        "skipped": engine.skipped.tolist() if engine.skipped is not None else None,
    }


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    found = {name: step(rank, name) for name in CASES}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
