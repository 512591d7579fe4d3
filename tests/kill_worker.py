"""What each process of tests/test_kill_training.py runs: a training by several ranks that dies where it is told to.

The arguments say where: `--die RANK STEP PLACE` kills that rank with SIGKILL (`raise` as PLACE raises an error instead)
when it comes to the place for the first time in that step or a later one.
"""

import argparse
import os
import random
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ghostfunc as gf
from ghostfunc import checkpoint as checkpoint_module
from ghostfunc.checkpoint import TrainingCheckpoints
from ghostfunc.failures import fail_together

STEPS, INTERVAL, SAMPLES = 20, 3, 7
HOOKS = {  # where a checkpoint is written, place by place
    "tensors": (checkpoint_module.HuggingFaceStorageWriter, "write_data"),
    "checksum": (checkpoint_module, "checksum"),
    "state": (checkpoint_module, "write_atomically"),
    "rename": (checkpoint_module.os, "rename"),
    "removal": (checkpoint_module, "remove"),
    "load": (checkpoint_module, "dcp_load"),
}
PLACES = ("gradient", "update", "records", *HOOKS)


class Death:
    """Ends this process at a place."""

    def __init__(self, rank: int, orders: tuple[str, str, str] | None) -> None:
        self.step = 0
        self.order: tuple[int, str] | None = None
        if orders is not None and int(orders[0]) == rank:
            self.order = (int(orders[1]), orders[2])
            if orders[2] in HOOKS:
                self._patch(*HOOKS[orders[2]])

    def at(self, place: str) -> None:
        if self.order is None or self.step < self.order[0]:
            return
        if self.order[1] == "raise" and place == "gradient":
            raise ArithmeticError("the data of this rank are upside down")
        if self.order[1] == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def _patch(self, owner: Any, name: str) -> None:
        assert self.order is not None
        place, original = self.order[1], getattr(owner, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if place == "tensors" and self.step >= self.order[0]:  # type: ignore[index]
                original(*args, **kwargs)
                for path in Path(args[0].path).glob("*.safetensors"):
                    os.truncate(path, path.stat().st_size // 2)
            self.at(place)
            return original(*args, **kwargs)

        setattr(owner, name, dying)


def build(sharded: bool) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4)).double()
    if sharded:
        fully_shard(model)
    return model


def batch_of(step: int, samples: int = SAMPLES) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(50, (samples,), generator=generator)
    rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return rows[ids], ids % 4, ids.tolist()


def share(rank: int, ranks: int) -> slice:
    """Unequal shares of a batch: the first rank has the rest."""
    first = SAMPLES - 3 * (ranks - 1)
    return slice(0, first) if rank == 0 else slice(first + 3 * (rank - 1), first + 3 * rank)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(folder: Path, rank: int, ranks: int, sharded: bool, death: Death) -> None:
    model = build(sharded)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(10 + rank)  # each rank its own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 11], gamma=0.5)
    val = batch_of(-1, samples=4)[:2]
    group = dist.group.WORLD if dist.is_initialized() else None
    ledger = gf.InRunShapley(folder / "values")
    log = gf.DotLog(folder / "dot_log", config={"seed": 3}, val_batch={"x": val[0]})
    checkpoints = TrainingCheckpoints(
        folder / "checkpoints", model, optimizer, also={"scheduler": scheduler}, records=[log, ledger], keep=2
    )
    death.step = -1 if death.order is None or death.order[1] != "load" else death.order[0]
    done = checkpoints.load().step
    model_fn, _ = gf.functionalize(model, gf.classification_loss)
    for step in range(done, STEPS):
        death.step = step
        x, y, ids = batch_of(step)
        where = share(rank, ranks)
        death.at("gradient")
        params = dict(model.named_parameters())
        found = gf.value_and_grad_dot(model_fn, params, (x[where], y[where]), val, group=group)
        lr = optimizer.param_groups[0]["lr"]
        domains = ["d"] * len(ids[where])
        ledger.add(ids[where], lr / SAMPLES * found.dots, domains=domains, iteration=step)
        log.append(
            iteration=step, sample_ids=ids[where], domains=domains, losses=found.losses, learning_rate=lr,
            dots=found.dots,
        )  # fmt: skip
        for name, param in params.items():
            param.grad = found.grads[name]
        death.at("update")
        optimizer.step()
        scheduler.step()
        if step % 2:  # ahead of the checkpoints
            log.save()
            death.at("records")
            ledger.save()
        if (step + 1) % INTERVAL == 0:
            checkpoints.save(step + 1)
        if rank == 0:
            (folder / "progress").write_text(str(step + 1))
    checkpoints.save(STEPS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--store", type=Path)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--die", nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ranks > 1:
        store = None if options.store is None else dist.FileStore(str(options.store), options.ranks)
        where: dict[str, Any] = {} if store is None else {"rank": options.rank, "world_size": options.ranks}
        dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=120), **where)
    (options.folder / f"pid-{options.rank}").write_text(str(os.getpid()))
    death = Death(options.rank, options.die)
    with fail_together():
        train(options.folder, options.rank, options.ranks, options.sharded, death)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
