"""What each process of tests/test_proj_engine_ranks.py runs: a loop, a pass, and what can go wrong in them."""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ghostfunc as gf
from ghostfunc import _proj_store

SAMPLES, BATCH, INTERVAL = 22, 2, 2  # of a pass: six shards, the last of two samples
STEPS, OF_A_STEP = 5, 4


def module() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(SAMPLES, 5, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def engine_of(model: nn.Module, folder: Path | None, group: Any, **options: Any) -> gf.GradProjEngine:
    fixed = {"loss": gf.classification_loss, "proj_rank_total": 16, "proj_dtype": "float32"}
    return gf.GradProjEngine(
        model, proj_dir=folder, group=group, **{**fixed, "proj_save_interval": INTERVAL, **options}
    )


def loop(model: nn.Module, folder: Path, group: Any, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """Collect this rank's share of each step while parameters change; the first rank has all but one of the others."""
    X, Y = data()
    engine, found = engine_of(model, folder, group), []
    for step in range(STEPS):
        bounds = [0, *range(OF_A_STEP - ranks + 1, OF_A_STEP + 1)]
        share = range(OF_A_STEP * step + bounds[rank], OF_A_STEP * step + bounds[rank + 1])
        found.append(engine.collect_batch((X[list(share)], Y[list(share)]), domains=[f"step {step}"] * len(share)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    engine.detach()
    assert engine.rows_written == STEPS * OF_A_STEP
    return found


def over(folder: Path, group: Any, *, X: Tensor | None = None, stop: int = SAMPLES, **options: Any) -> list[int]:
    """A pass that leaves at sample `stop`; which samples were this process's."""
    whole, Y = data()
    X, mine = whole if X is None else X, []
    engine = engine_of(module(), folder, group, **options)
    engine.attach((whole[:1], Y[:1]), samples=SAMPLES, batch_size=BATCH)
    with engine.batches() as batches:
        for rows in batches:
            if rows.start >= stop:
                break
            mine += rows
            engine.collect_batch((X[list(rows)], Y[list(rows)]), [("text", 10 * row) for row in rows])
    engine.detach()
    return mine


def attach_with_other_matrices(group: Any, rank: int) -> None:
    """As where a rank's random numbers are not those of the others."""
    engine = engine_of(module(), None, group)
    make = engine._projected.projection
    engine._projected.projection = lambda batch, **options: make(batch, **{**options, "seed": rank})
    engine.attach(data())


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def messages(folder: Path, group: Any, rank: int) -> dict[str, str]:
    """What this rank is told where something is wrong on one of them."""
    X, Y = data()
    nan = X.clone()
    nan[6] = torch.nan  # in the second shard, which is the second rank's
    wrong = torch.nn.Sequential(nn.Linear(5, 15), nn.Tanh(), nn.Linear(15, 3))
    attached = engine_of(module(), folder / "nan loop", group)
    attached.attach((X, Y))
    found = {
        "seed": message_of(lambda: engine_of(module(), folder / "seed", group, proj_seed=rank).attach((X, Y))),
        "model": message_of(lambda: engine_of((module(), wrong)[rank], None, group).attach((X, Y))),
        "config": message_of(lambda: engine_of(module(), None, group, config={"data": rank}).attach((X, Y))),
        "matrices": message_of(lambda: attach_with_other_matrices(group, rank)),
        "ids": message_of(lambda: engine_of(module(), None, group).collect_batch((X, Y), range(SAMPLES - rank))),
        "nan in a loop": message_of(lambda: attached.collect_batch(((X, nan)[rank], Y))),
        "nan in a pass": message_of(lambda: over(folder / "nan pass", group, X=nan)),
        "left": message_of(lambda: over(folder / "left", group, stop=(SAMPLES, 0)[rank])),
        "no group": message_of(lambda: engine_of(module(), folder / "none", None)),
        "other store": message_of(lambda: over(folder / "left", group, proj_seed=3)),
    }
    _proj_store.SECONDS_TO_SEE_A_FILE = 0.3
    found["two disks"] = message_of(lambda: over(folder / f"disk {rank}", group))
    over(folder / "nan pass", group)
    found["after all that"] = ""
    return found


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"ranks-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    group = dist.group.WORLD
    # Two ranks are a quick test, and what wrapping modules imports takes most of such a one.
    model = module() if ranks == 2 else DistributedDataParallel(module())
    rows = loop(model, folder / "loop", group, rank, ranks)
    told: dict[str, Any] = {"mine": over(folder / "pass", group)}
    if ranks == 2:
        told |= messages(folder, group, rank)
    else:
        from torch.distributed.fsdp import fully_shard

        sharded = fully_shard(module(), mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
        loop(sharded, folder / "sharded", group, rank, ranks)
    torch.save(rows, folder / f"rows-{rank}.pt")
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
