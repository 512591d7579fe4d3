"""What each process of tests/test_ranks.py runs: every call with a group, on this rank's share of the samples."""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from cases import BY_NAME
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import ghostfunc as gf

CASES = ("mlp", "gpt2 tied", "convolution", "unused")
TRAIN, VAL = 7, 5  # samples of all ranks


def shares(samples: int, ranks: int) -> list[slice]:
    """Unequal shares: the first rank has what the others leave, and these one more each."""
    sizes = [rank + 1 for rank in range(1, ranks)]
    while samples - sum(sizes) < 1:
        sizes[sizes.index(max(sizes))] -= 1
    bounds = [0, samples - sum(sizes)]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [slice(a, b) for a, b in pairwise(bounds)]


def part(batch: Any, where: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[where], batch)


def flat(prefix: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {k: t for name, v in value.items() for k, t in flat(f"{prefix}/{name}", v).items()}
    return {prefix: value}


def everything(name: str, train: Any, val: Any, group: Any) -> dict[str, Tensor]:
    """Every call's results: those that start with "all" are the same on every rank, the others per sample."""
    case = BY_NAME[name].make(torch.float64, torch.device("cpu"))
    model_fn, params = case.model_fn, case.params
    found: dict[str, Tensor] = {}

    def keep(what: str, value: Any) -> None:
        found.update(flat(what, value))

    result = gf.value_and_grad_dot(model_fn, params, train, val, group=group)
    keep("losses", result.losses)
    keep("val losses", result.val_losses)
    keep("all grads", result.grads)
    keep("dots", result.dots)
    keep("all unused", torch.tensor([n in result.unused for n in params]).double())
    keep("sums", gf.ghost_grad_dot(model_fn, params, train, val, reduction="sum", group=group))
    keep("by param", gf.ghost_grad_dot(model_fn, params, train, val, out="param train", group=group))
    keep("matrix", gf.ghost_grad_dot(model_fn, params, train, val, out="train val", group=group))
    keep("gram", gf.ghost_grad_gram(model_fn, params, train, group=group))
    clipped = gf.ghost_clipped_grad(model_fn, params, train, 0.5, group=group)
    keep("all clipped", clipped.grads)
    keep("norms", clipped.norms)
    doubled = gf.ghost_grad_dot(
        model_fn, params, train, val, precondition=lambda v: {n: 2 * d for n, d in v.items()}, group=group
    )
    keep("preconditioned", doubled)
    many = gf.ghost_quantities(model_fn, params, train, val, want={"dot": gf.Dot(), "norm": gf.Norm()}, group=group)
    keep("many dots", many["dot"])
    keep("many norms", many["norm"])
    keep("all many grads", many.grads)
    for order in (1, 2):
        values = gf.in_run_values(model_fn, params, train, val, lr=0.1, order=order, group=group)
        keep(f"values {order}", values.values)
        keep(f"all value grads {order}", values.grads)
    keep("interaction", gf.ghost_grad_hess_grad(model_fn, params, train, val, group=group))
    return found


def more(name: str, train: Any, val: Any, group: Any, *, sharded: bool = False) -> dict[str, Tensor]:
    """The results of what is fitted on data, and of what is made of several calls; K-FAC is not for sharded ones."""
    case = BY_NAME[name].make(torch.float64, torch.device("cpu"))
    model_fn, params = case.model_fn, case.params
    if sharded:
        params = {n: distribute_tensor(p, group, [Shard(0)]) for n, p in params.items()}
        group = None
    found: dict[str, Tensor] = {}

    def keep(what: str, value: Any) -> None:
        found.update(flat(what, value))

    want = {"each": gf.Dot("param train val"), "sum": gf.Dot(), "gram": gf.Gram(), "layers": gf.Gram("layer sample")}
    many = gf.ghost_quantities(model_fn, params, train, val, want=want, group=group)
    keep("val losses of many", many.val_losses)
    for which in want:
        keep(f"many {which}", many[which])
    squares = gf.ghost_grad_stream(
        model_fn, params, train, lambda tile: tile.grads.square().sum((1, 2)), out="param", group=group
    )
    keep("squares", squares)
    points = [params, {n: 0.9 * p for n, p in params.items()}]
    keep("tracin", gf.tracin(model_fn, points, train, val, params=params, group=group).dots)
    batches = [part(train, slice(k, k + 2)) for k in range(0, len(pytree.tree_leaves(train)[0]), 2)]
    for fit in () if sharded else (gf.kfac, gf.ekfac):
        keep(f"all {fit.__name__}", fit(model_fn, params, batches, group=group)(params))
    # An unused parameter has no leading directions, and the largest entries of one of a convolution's have both signs.
    for kind in ("gaussian", "pca") if name in ("mlp", "gpt2 tied") else ("gaussian",):
        options = {"kind": kind, "rank": 2, "min_rank": 1, "include": ("embedding", "bias", "norm", "head")}
        projection = gf.kronecker_projection(model_fn, params, train, **options, group=group)
        keep(f"all {kind}", projection.project(params))
        keep(f"val projected {kind}", gf.ghost_grad_proj(model_fn, params, val, projection, group=group))
        keep(f"same {kind}", torch.tensor(list(bytes.fromhex(projection.fingerprint))))
    return found


def data(name: str) -> tuple[Any, Any]:
    batch = BY_NAME[name].make(torch.float64, torch.device("cpu")).batch
    return batch(TRAIN, 0), batch(VAL, 1)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_two_ways(rank: int) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """A loss whose weight is a linear map's on one rank, and scales numbers on the other."""
    return (lambda p, x: (x @ p["w"]).sum(1), lambda p, x: (x.unsqueeze(2) * p["w"]).square().sum((1, 2)))[rank]


def of_a_step(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """Gradient accumulation, this rank's samples in micro-batches, and how many exchanges its gradient takes."""
    case = BY_NAME["gpt2 tied"].make(torch.float64, torch.device("cpu"))
    model_fn, params = case.model_fn, case.params
    train, val = (part(b, shares(n, ranks)[rank]) for b, n in zip(data("gpt2 tied"), (TRAIN, VAL), strict=True))
    direction = gf.val_gradient(model_fn, params, val, group=group)
    sums, samples, dots = {name: torch.zeros_like(p) for name, p in params.items()}, 0, []
    with counted() as exchanges:
        while samples < len(train["input_ids"]):
            result = gf.value_and_grad_dot(model_fn, params, part(train, slice(samples, samples + 2)), direction)
            n = len(result.losses)
            for name in sorted(sums, reverse=bool(rank)):
                sums[name] += n * result.grads[name]
            samples, dots = samples + n, [*dots, result.dots]
        in_calls = sum(exchanges.values())
        shuffled = {name: sums[name] for name in sorted(sums, reverse=bool(rank))}
        mean = gf.mean_gradient(shuffled, samples, group=group)
    assert (in_calls, mean.samples, list(mean.grads)) == (0, TRAIN, list(shuffled))
    count = {name: torch.tensor(number) for name, number in exchanges.items()}
    return {"dots": torch.cat(dots), **flat("count", count), **flat("grads", mean.grads)}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the exchanges between ranks."""
    found: Counter[str] = Counter()
    of_torch = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "gather", "broadcast")}

    def counting(name: str) -> Callable[..., Any]:
        def exchange(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return of_torch[name](*args, **kwargs)

        return exchange

    try:
        for name in of_torch:
            setattr(dist, name, counting(name))
        yield found
    finally:
        for name, exchange in of_torch.items():
            setattr(dist, name, exchange)


class Pair(NamedTuple):
    """Results of samples."""

    dots: Tensor
    more: dict[str, Tensor]


def dealt(rank: int, ranks: int) -> list[int]:
    """The samples of a rank as `DistributedSampler` deals them out of 7, the last one padded."""
    return [index % 7 for index in range(rank, -(-7 // ranks) * ranks, ranks)]


def results_of(ids: list[int], *, turned: bool) -> Pair:
    mine = torch.tensor(ids, dtype=torch.float64)
    more = {"flags": mine > 3, "rows": torch.stack([mine, mine * mine], 1)}
    return Pair(10 * mine, dict(reversed(more.items())) if turned else more)


def gathered(rank: int, ranks: int, group: Any) -> dict[str, Any]:
    """What `gather_samples` gives, as JSON holds it."""
    ids = dealt(rank, ranks)
    mine = results_of(ids, turned=bool(rank))
    all_of = gf.gather_samples(mine, ids, group)
    once = gf.gather_samples(mine, torch.tensor(ids), group, drop_repeated=True, to=ranks - 1)
    named = gf.gather_samples(mine.dots, [f"doc {9 - i}" for i in ids], group, drop_repeated=True)
    placed = gf.gather_samples(mine.dots, [f"doc {9 - i}" for i in ids], group, positions=ids, drop_repeated=True)
    none_here = gf.gather_samples(mine.dots[: (rank == 0) * 2], ids[: (rank == 0) * 2], group)
    assert (once is None) == (rank != ranks - 1)
    assert all_of and named and placed and none_here and isinstance(all_of.values, Pair)
    return {
        "all": [all_of.ids, all_of.values.dots.tolist(), all_of.repeated],
        "flags": all_of.values.more["flags"].tolist(),
        "rows": all_of.values.more["rows"].tolist(),
        "once": once and [once.ids.tolist(), once.values.dots.tolist(), once.values.more["flags"].tolist()],
        "named": [named.ids, named.values.tolist(), named.repeated],
        "placed": [placed.ids, placed.values.tolist(), placed.repeated],
        "none here": [none_here.ids, none_here.values.tolist()],
    }


def wrapped(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """A training loop on a DDP module beside the same on a bare one, equal shares: `{what: error}`."""
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        module.double()
        for p in module.parameters():
            torch.nn.init.normal_(p, generator=generator.manual_seed(p.numel()))
    bare, ddp = modules[0], DistributedDataParallel(modules[1], process_group=group)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (bare, ddp)]
    x, y = torch.randn(3, 2, 2 * ranks, 5, generator=generator, dtype=torch.float64), torch.arange(2 * ranks) % 3
    here = slice(2 * rank, 2 * rank + 2)
    error: dict[str, Tensor] = {}
    for train_x, val_x in x:
        train, val = (train_x[here], y[here]), (val_x[here], y[here])
        results = []
        for module in (bare, ddp):
            model_fn, params = gf.functionalize(module, gf.classification_loss)
            results.append(gf.value_and_grad_dot(model_fn, params, train, val, group=group))
        ours, theirs = results
        ddp.zero_grad()
        torch.nn.functional.cross_entropy(ddp(train[0]), train[1]).backward()  # DDP's own step, its mean over ranks
        for (name, p), q in zip(bare.named_parameters(), ddp.parameters(), strict=True):
            error[f"grads of ddp, {name}"] = (q.grad - theirs.grads[f"module.{name}"]).abs().max()
            p.grad = ours.grads[name]
        error["dots"] = (ours.dots - theirs.dots).abs().max()
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), q in zip(bare.named_parameters(), ddp.parameters(), strict=True):
        error[f"trained {name}"] = (p - q).detach().abs().max()
    return error


def of_experts(batches: list[Any], group: Any) -> dict[str, Tensor]:
    """K-FAC of a weight whose parts ranks use, and of a table that is looked up on one and multiplied on another."""

    def model_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        expert = int(batch["expert"][0])
        hidden = batch["x"] @ params["experts"][expert]
        table = params["table"]
        return ((hidden @ table.t()) if expert else torch.nn.functional.embedding(batch["ids"], table)).square().sum(1)

    generator = torch.Generator().manual_seed(0)
    shapes = {"experts": (3, 4, 5), "table": (6, 5)}
    params = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    params["unused"] = torch.ones(2, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for fit in (gf.kfac, gf.ekfac):
        found |= flat(fit.__name__, fit(model_fn, params, batches, damping=0.5, group=group)(params))
    return found


def batches_of_experts() -> list[dict[str, Tensor]]:
    """Three batches, of which each goes to one expert; none to the last one of three."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(samples, 4, generator=generator, dtype=torch.float64),
            "ids": torch.randint(6, (samples,), generator=generator),
            "expert": torch.full((samples,), expert),
        }
        for samples, expert in ((3, 0), (4, 1), (2, 0))
    ]


def of_low_rank(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """Dots with a direction of low rank of a layer that is wide enough for it to pay, and their bounds."""
    model_fn, params, train, val = wide()
    if group is not None:
        train, val = part(train, wide_shares(ranks)[rank]), part(val, shares(VAL, ranks)[rank])
    options = {"schedule": "two-phase", "group": group}
    found = gf.ghost_grad_dot(model_fn, params, train, val, rank=3, **options)
    exact = gf.ghost_grad_dot(model_fn, params, train, val, **options)
    return {"dots": found.dots, "bound": found.bound, "exact": exact}


def wide_shares(ranks: int) -> list[slice]:
    """Unequal shares of 28 samples, none so small that exact dots would cost less."""
    return [slice(*bounds) for bounds in pairwise({2: [0, 16, 28], 4: [0, 10, 17, 23, 28]}[ranks])]


def wide() -> tuple[Any, dict[str, Tensor], Any, Any]:
    generator = torch.Generator().manual_seed(0)

    def batch(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(samples, 16, 6, generator=generator, dtype=torch.float64)
        basis = torch.randn(6, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        noise = 0.01 * torch.randn(samples, 16, 96, generator=generator, dtype=torch.float64)
        return x @ basis + noise, torch.randn(samples, 16, 80, generator=generator, dtype=torch.float64)

    def model_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ params["w"].t() - batch[1]).square().mean((1, 2))

    params = {"w": 0.1 * torch.randn(80, 96, generator=generator, dtype=torch.float64)}
    return model_fn, params, batch(28), batch(VAL)


def messages(rank: int, group: Any) -> dict[str, str]:
    """What each rank is told where one rank's share is wrong."""
    case = BY_NAME["mlp"].make(torch.float64, torch.device("cpu"))
    train, val = data("mlp")
    model_fn, params = case.model_fn, case.params
    empty, nan = part(train, slice(0, 0)), tuple(t * torch.nan if t.is_floating_point() else t for t in train)
    longer = tuple(torch.cat([t, t], 1) if t.is_floating_point() else t for t in val)
    joint = {"schedule": "joint", "group": group}
    return {
        "empty": message_of(lambda: gf.ghost_grad_dot(model_fn, params, (train, empty)[rank], val, group=group)),
        "nan": message_of(lambda: gf.ghost_grad_dot(model_fn, params, (nan, train)[rank], val, group=group)),
        "nan val": message_of(lambda: gf.ghost_clipped_grad(model_fn, params, (train, nan)[rank], 1.0, group=group)),
        "joint": message_of(lambda: gf.ghost_grad_dot(model_fn, params, train, val, **joint)),
        "shapes": message_of(
            lambda: gf.ghost_grad_dot(model_fn, params, train, (val, longer)[rank], out="train val", group=group)
        ),
        "vmap": message_of(
            lambda: torch.func.vmap(lambda p: gf.ghost_grad_dot(model_fn, p, train, val, group=group))(
                {n: torch.stack([p, p]) for n, p in params.items()}
            )
        ),
        "kfac": message_of(lambda: gf.kfac(model_fn, params, ([train], [nan])[rank], group=group)),
        "iterator": message_of(lambda: gf.ekfac(model_fn, params, ([train], iter([train]))[rank], group=group)),
        "no batches": message_of(lambda: gf.kfac(model_fn, params, [], group=group)),
        "uses": message_of(
            lambda: gf.kfac(in_two_ways(rank), {"w": torch.ones(3, 3)}, [torch.ones(2, 3)], group=group)
        ),
        "tracin": message_of(lambda: gf.tracin(model_fn, [params] * (1 + rank), train, val, group=group)),
        "tracin vmap": message_of(lambda: gf.tracin(model_fn, [params], train, val, group=group, method="vmap")),
        "file": message_of(
            lambda: gf.tracin(model_fn, ([params], ["none.safetensors"])[rank], train, val, group=group)
        ),
        "width": message_of(lambda: gf.gather_samples(torch.ones(2, 3 + rank), [rank, 2], group)),
        "rows": message_of(lambda: gf.gather_samples({"dots": torch.ones(2 + rank)}, [0, 1], group)),
        "ids": message_of(lambda: gf.gather_samples(torch.ones(1), ([0], ["a"])[rank], group)),
        "gradients": message_of(
            lambda: gf.mean_gradient({"a": torch.ones(2), "b": torch.ones(2 + rank)}, 1, group=group)
        ),
        "no samples": message_of(lambda: gf.mean_gradient({"a": torch.ones(2)}, 0, group=group)),
        "after all that": message_of(lambda: gf.ghost_grad_dot(model_fn, params, train, val, group=group)),
    }


def losing_one(rank: int, end: str) -> None:
    """A training loop of which the last rank ends, or stops, in the middle of a call."""
    case = BY_NAME["mlp"].make(torch.float64, torch.device("cpu"))
    train, val = data("mlp")
    forwards = 0

    def model_fn(params: dict[str, Tensor], batch: Any) -> Tensor:
        nonlocal forwards
        forwards += 1
        if rank == 1 and forwards == 4:  # of the train samples, in the second call
            print("in the middle of a call", flush=True)
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return case.model_fn(params, batch)

    for _ in range(3):
        gf.value_and_grad_dot(model_fn, case.params, train, val, group=dist.group.WORLD)


def main(rank: int, ranks: int, folder: Path, end: str, timeout: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    if end:
        losing_one(rank, end)
        return
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    for number, name in enumerate(CASES):
        train, val = data(name)
        mine = part(train, shares(TRAIN, ranks)[rank]), part(val, shares(VAL, ranks)[rank])
        group = mesh if number % 2 else dist.group.WORLD
        found = everything(name, *mine, group) | more(name, *mine, group)
        save_file({k: t.contiguous() for k, t in found.items()}, folder / f"{name}-{ranks}-{rank}.safetensors")
        if ranks == 4:
            of_shards = more(name, *mine, mesh, sharded=True)
            save_file({k: t.contiguous() for k, t in of_shards.items()}, folder / f"{name}-sharded-{rank}.safetensors")
    group = dist.group.WORLD
    save_file(of_a_step(rank, ranks, group), folder / f"step-{ranks}-{rank}.safetensors")
    save_file(of_experts(batches_of_experts()[rank::ranks], group), folder / f"experts-{ranks}-{rank}.safetensors")
    save_file(wrapped(rank, ranks, group), folder / f"wrapped-{ranks}-{rank}.safetensors")
    save_file(of_low_rank(rank, ranks, group), folder / f"low-rank-{ranks}-{rank}.safetensors")
    (folder / f"gathered-{ranks}-{rank}.json").write_text(json.dumps(gathered(rank, ranks, mesh)))
    if ranks == 2:
        (folder / f"messages-{rank}.json").write_text(json.dumps(messages(rank, dist.group.WORLD)))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, ranks, folder, *more_of_it = sys.argv[1:]
    end, timeout = more_of_it or ("", 120)
    main(int(rank), int(ranks), Path(folder), end, int(timeout))
