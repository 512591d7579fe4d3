"""What each process of tests/test_engine_ranks.py runs: the engine's loop, on this rank's share of the samples."""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ghostfunc as gf

STEPS, MICRO_STEPS = 3, 2
TRAIN, EVEN, VAL, LENGTH, VOCABULARY = 5, 6, 3, 6, 11  # samples of all ranks
QUICK = ("bare", "manager", "order 2")
SLOW = ("wrapped", "plain", "plain wrapped", "adam", "matrix", "by parameter", "whole val")
SHARDED = ("sharded", "sharded by mesh")


class Tied(nn.Module):
    """A language model of an embedding that is also its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        hidden = torch.tanh(self.body(hidden.cumsum(1)))
        return hidden @ self.embedding.weight.t()


def tokens(samples: int, *, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def share(batch: Tensor, rank: int, ranks: int) -> Tensor:
    """Shares as equal as the number of samples lets them be."""
    return batch.tensor_split(ranks)[rank]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def flat(prefix: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {k: t for name, v in value.items() for k, t in flat(f"{prefix}/{name}", v).items()}
    return {prefix: value}


def build(kind: str, rank: int, ranks: int, folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(1)
    model: nn.Module = Tied().double()
    if kind in SHARDED and ranks > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.body)
        fully_shard(model)
    if "wrapped" in kind and ranks > 1:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    val = tokens(VAL, seed=0)
    val = val if kind == "whole val" else share(val, rank, ranks)
    if kind == "manager" or kind.startswith("plain"):
        method = "Regular" if kind.startswith("plain") else "GradDotProd"
        config = {"method": method, "result_dir": folder / f"{kind}-{ranks}", "dot_prod_save_interval": 2}
        ddp_info = {"master_process": rank == 0}
        return model, optimizer, gf.GhostEngineManager(config, model, optimizer, ddp_info, val_data=(val, val))
    by_itself = kind == "wrapped" or (kind in SHARDED and "mesh" not in kind)  # the module says which ranks
    engine = gf.GradDotProdEngine(
        model,
        (val, val),
        optimizer=optimizer,
        order=2 if kind == "order 2" else 1,
        out={"matrix": "train val", "by parameter": "param train"}.get(kind, "train"),
        precondition=gf.adam(optimizer, model, exact=True) if kind == "adam" else None,
        group=None if by_itself or ranks == 1 else dist.group.WORLD,
    )
    return model, optimizer, engine


def train(kind: str, rank: int, ranks: int, folder: Path) -> dict[str, Tensor]:
    """A training run's results: those that start with "all" are the same on every rank, the others per sample."""
    model, optimizer, engine = build(kind, rank, ranks, folder)
    micro_steps = 1 if kind == "order 2" else MICRO_STEPS
    samples = EVEN if kind.startswith("plain") else TRAIN  # plain means are of equal shares
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        for micro_step in range(micro_steps):
            number = step * micro_steps + micro_step
            X = share(tokens(samples, seed=1 + number), rank, ranks)
            ids = share(torch.arange(samples) + samples * number, rank, ranks)
            engine.attach_train_batch(X, X, step, ids)
            output = engine(X, X)
            (output.loss / micro_steps).backward()
            found[f"losses {number}"] = output.losses
            if output.dots is not None:
                found |= flat(f"dots {number}", output.dots)
                found[f"values {number}"] = output.values
        engine.prepare_gradients()
        names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
        gradients = [p.grad for p in model.parameters()]
        found |= {f"all gradients {step}/{n}": whole(g) for n, g in zip(names, gradients, strict=True) if g is not None}
        optimizer.step()
        engine.aggregate_and_log()
        optimizer.zero_grad()
        if engine.should_save_metrics(step):
            engine.save_metrics(step)
    engine.cleanup()
    state = {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}
    return {k: t.detach().clone() for k, t in (found | {f"all weights {n}": t for n, t in state.items()}).items()}


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def messages(rank: int) -> dict[str, str]:
    """What each rank is told where one of them does something wrong, and whether they go on together after it."""
    X = share(tokens(TRAIN, seed=5), rank, 2)
    model, optimizer, engine = build("bare", rank, 2, Path())
    said = {}
    engine(X, X).loss.backward()
    optimizer.step()
    said["no prepare_gradients"] = message_of(lambda: engine(X, X))
    optimizer.zero_grad()
    engine.clear_gradients()

    model, optimizer, engine = build("bare", rank, 2, Path())
    engine.attach_train_batch(X, X, 0, range(7, 7 + len(X)))
    said["sizes"] = message_of(lambda: engine(X[rank:], X[rank:]))  # rank 1 has attached another batch
    engine.attach_train_batch(X, X, 0, range(7, 7 + len(X)))
    loss = engine(X, X).loss
    if rank == 0:
        loss.backward()
    said["no backward"] = message_of(engine.prepare_gradients)
    optimizer.zero_grad()
    engine.clear_gradients()

    def nan_in_one_rank(output: Tensor, batch: Any) -> Tensor:
        losses = gf.causal_lm_loss(output, batch)
        return losses * torch.where(batch["input_ids"][:, 0] == 99, torch.nan, 1.0)

    bad = gf.GradDotProdEngine(
        model, {"input_ids": X, "labels": X}, loss=nan_in_one_rank, call=lambda m, b: m(b["input_ids"] % VOCABULARY),
        group=dist.group.WORLD,
    )  # fmt: skip
    marked = X.clone()
    marked[1:, 0] = 99 if rank == 1 else 0
    bad.attach_train_batch({"input_ids": marked, "labels": X}, None, 3, [("code", 10 * i) for i in range(len(X))])
    said["not finite"] = message_of(lambda: bad({"input_ids": marked, "labels": X}))
    said["after all that"] = message_of(lambda: engine(X, X).loss.backward())

    sharded, optimizer, engine = build("sharded", rank, 2, Path())
    engine = gf.GradDotProdEngine(sharded, (X, X), optimizer=optimizer, order=2)
    said["sharded order 2"] = message_of(lambda: engine(X, X))
    return said


def gradient_of_one_rank() -> dict[str, Tensor]:
    """A parameter that one rank's samples alone use: the other has no gradient for it before the mean."""
    model = nn.ModuleDict({"always": nn.Linear(2, 1), "sometimes": nn.Linear(2, 1), "never": nn.Linear(2, 1)}).double()
    rank = dist.get_rank()
    parts = ("always", "sometimes") if rank == 1 else ("always",)

    def call(module: Any, batch: Tensor) -> Tensor:
        return sum(module[part](batch) for part in parts)  # type: ignore[return-value]

    manager = gf.GhostEngineManager(
        {"method": "Regular"}, model, None, loss=lambda output, batch: output.sum(1), call=call
    )
    manager(torch.full((2, 2), 3.0, dtype=torch.float64)).loss.backward()
    manager.prepare_gradients()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: torch.full((1,), torch.nan) if grad is None else grad for name, grad in grads.items()}


def main(rank: int, ranks: int, folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    for kind in kinds:
        if kind == "messages":
            (folder / f"messages-{rank}.json").write_text(json.dumps(messages(rank)))
            continue
        found = gradient_of_one_rank() if kind == "one rank" else train(kind, rank, ranks, folder)
        save_file({k: t.contiguous() for k, t in found.items()}, folder / f"{kind}-{ranks}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(","))
