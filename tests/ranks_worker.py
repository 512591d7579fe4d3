"""What each process of tests/test_ranks.py runs: every call with a group, on this rank's share of the samples."""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import BY_NAME
from safetensors.torch import save_file
from torch import Tensor
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


def data(name: str) -> tuple[Any, Any]:
    batch = BY_NAME[name].make(torch.float64, torch.device("cpu")).batch
    return batch(TRAIN, 0), batch(VAL, 1)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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
        "quantities": message_of(
            lambda: gf.ghost_quantities(model_fn, params, train, val, want={"g": gf.Gram()}, group=group)
        ),
        "after all that": message_of(lambda: gf.ghost_grad_dot(model_fn, params, train, val, group=group)),
    }


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    for number, name in enumerate(CASES):
        train, val = data(name)
        mine = part(train, shares(TRAIN, ranks)[rank]), part(val, shares(VAL, ranks)[rank])
        found = everything(name, *mine, mesh if number % 2 else dist.group.WORLD)
        save_file({k: t.contiguous() for k, t in found.items()}, folder / f"{name}-{ranks}-{rank}.safetensors")
    if ranks == 2:
        (folder / f"messages-{rank}.json").write_text(json.dumps(messages(rank, dist.group.WORLD)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
