"""What each process of tests/test_sharded.py runs: calls with sharded parameters, beside those of one process.

`python sharded_worker.py RANK RANKS FOLDER PART` writes what PART found on this rank, as JSON: relative errors and
messages by name. "One process" is the same call on whole parameters with all ranks' samples and no group.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BY_NAME, Draw
from ranks_worker import TRAIN, VAL, flat, message_of, part, shares
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

import ghostfunc as gf
from ghostfunc import _sharded

Params = dict[str, Tensor]
Found = dict[str, Any]


class World(NamedTuple):
    """What a part knows of its processes."""

    rank: int
    ranks: int
    mesh: DeviceMesh

    @property
    def train(self) -> slice:
        return shares(TRAIN, self.ranks)[self.rank]

    @property
    def val(self) -> slice:
        return shares(VAL, self.ranks)[self.rank]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    """The error over the expected norm; where zeros are expected, over 1."""
    found, expected = whole(found).double(), whole(expected).double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / (expected.norm() or 1.0))


def largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert set(found) == set(expected)
    return max(relative(found[name], expected[name]) for name in expected)


@contextmanager
def nothing_small() -> Iterator[None]:
    """Every parameter is gathered at its uses alone, as large ones are."""
    before, _sharded._SMALL = _sharded._SMALL, 0
    try:
        yield
    finally:
        _sharded._SMALL = before


# ---------------------------------------------------------------- models


def mlp() -> nn.Module:
    """Its last dimension, 3, is less than four ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    return randomized(model)


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, stride=2), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(45, 3))
    )


def gpt2(*, tied: bool = True) -> nn.Module:
    """A vocabulary that no number of ranks divides."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=2003, n_positions=8, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomized(GPT2LMHeadModel(config))


def randomized(model: nn.Module) -> nn.Module:
    draw = Draw(torch.float64, torch.device("cpu"), seed=1)
    with torch.no_grad():
        for p in model.double().parameters():
            p.add_(draw.normal(*p.shape, std=0.1))
    return model


def classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = Draw(torch.float64, torch.device("cpu"), seed)
    return draw.normal(n, 5), draw.ids(3, n)


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = Draw(torch.float64, torch.device("cpu"), seed)
    return draw.normal(n, 2, 5, 5), draw.ids(3, n)


def tokens(n: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": Draw(torch.float64, torch.device("cpu"), seed).ids(2003, n, 6)}


def fully_sharded(model: nn.Module, mesh: DeviceMesh, **how: Any) -> nn.Module:
    """A copy whose blocks and root are sharded by FSDP2."""
    model = copy.deepcopy(model)
    body: Any = getattr(model, "transformer", None)
    inside: Any = model if body is None else body.h
    blocks = [block for block in inside if [*block.parameters()]]
    for block in blocks:
        fully_shard(block, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return model


def distributed(params: Params, mesh: DeviceMesh, how: str) -> Params:
    """A plain dict of sharded parameters."""

    def placements(place: int, tensor: Tensor) -> list[Placement] | None:
        rows: Placement = Shard(0) if tensor.dim() else Replicate()
        columns: Placement = Shard(tensor.dim() - 1) if tensor.dim() else Replicate()
        kinds = {
            "rows": [rows],
            "columns": [columns],
            "mixed": (None, [rows], [Replicate()])[place % 3],
            "replicas of shards": [Replicate(), rows],
            "shards of shards": [rows, columns],
        }
        return kinds[how]

    found = {}
    for place, (name, tensor) in enumerate(params.items()):
        placed = placements(place, tensor)
        found[name] = tensor if placed is None else distribute_tensor(tensor, mesh, placed)
    return found


# ---------------------------------------------------------------- every call


def every_call(model_fn: Any, params: Params, train: Any, val: Any, projection: Any) -> dict[str, Tensor]:
    """Every call's results: those that start with "all" are the same on every rank, the others per sample."""
    found: dict[str, Tensor] = {}

    def keep(what: str, value: Any) -> None:
        found.update(flat(what, value))

    result = gf.value_and_grad_dot(model_fn, params, train, val)
    keep("losses", result.losses)
    keep("val losses", result.val_losses)
    keep("all grads", result.grads)
    keep("dots", result.dots)
    keep("all unused", torch.tensor([n in result.unused for n in params]).double())
    keep("sums", gf.ghost_grad_dot(model_fn, params, train, val, reduction="sum"))
    keep("by param", gf.ghost_grad_dot(model_fn, params, train, val, out="param train"))
    keep("one layer", gf.ghost_grad_dot(model_fn, params, train, val, layers=next(iter(params))))
    keep("matrix", gf.ghost_grad_dot(model_fn, params, train, val, out="train val"))
    doubled = gf.ghost_grad_dot(model_fn, params, train, val, precondition=lambda v: {n: 2 * d for n, d in v.items()})
    keep("preconditioned", doubled)
    once = gf.val_gradient(model_fn, params, val)
    keep("all val gradient", once.direction)
    keep("dots with it", gf.ghost_grad_dot(model_fn, params, train, once))
    keep("along", gf.ghost_grad_along(model_fn, params, train, params))
    keep("along by layer", gf.ghost_grad_along(model_fn, params, train, params, out="layer sample"))
    keep("gram", gf.ghost_grad_gram(model_fn, params, train))
    keep("norm", gf.ghost_grad_norm(model_fn, params, train))
    clipped = gf.ghost_clipped_grad(model_fn, params, train, 0.5)
    keep("all clipped", clipped.grads)
    keep("clipped norms", clipped.norms)
    keep("projection", gf.ghost_grad_proj(model_fn, params, train, projection))
    losses, factors = gf.ghost_factors(model_fn, params, train)
    keep("losses of factors", losses)
    for name, of in factors.items():
        if of:
            keep(f"factors/{name}", torch.stack([f.dense(params[name].shape) for f in of]).sum(0))
    values = gf.in_run_values(model_fn, params, train, val, lr=0.1, order=1)
    keep("values", values.values)
    keep("all value grads", values.grads)
    want = {"dot": gf.Dot(), "along": gf.Along(params), "clip": gf.Clip(0.5), "norm": gf.Norm()}
    many = gf.ghost_quantities(model_fn, params, train, val, want=want)
    keep("dots beside", many["dot"])
    keep("along beside", many["along"])
    keep("norms beside", many["norm"])
    keep("all clipped beside", many["clip"].grads)
    keep("all grads beside", many.grads)
    want = {"dot": gf.Dot(), "along": gf.Along(params, out="param sample")}
    many = gf.ghost_quantities(model_fn, params, train, val, want=want, grads=False)
    keep("dots together", many["dot"])
    keep("along together", many["along"])
    return found


def calls_agree(world: World, sharded: Any, bare: Any, batch: Callable[[int, int], Any]) -> Found:
    """Errors of every call; `sharded` and `bare` are `(model_fn, params)`."""
    train, val = batch(TRAIN, 0), batch(VAL, 1)
    mine = part(train, world.train), part(val, world.val)
    (model_fn, params), (bare_fn, bare_params) = sharded, bare
    projection = gf.kronecker_projection(bare_fn, bare_params, train, rank=4)
    found = every_call(model_fn, params, *mine, projection)
    expected = every_call(bare_fn, bare_params, train, val, projection)
    assert set(found) == set(expected)
    errors = {}
    for what, value in expected.items():
        wanted = value if what.startswith("all") else value[world.val if what == "val losses" else world.train]
        errors[what] = relative(found[what], wanted)
        name = what.partition("/")[2]
        if what.startswith("all") and name:
            like, given = params[name], found[what]
            assert getattr(given, "placements", None) == getattr(like, "placements", None), what
    bounded = gf.ghost_grad_dot(model_fn, params, part(train, world.train), part(val, world.val), rank=2)
    excess = (bounded.dots - expected["dots"][world.train]).abs() - bounded.bound
    errors["beyond the bound of low rank"] = float(excess.clamp(min=0).max())
    return errors


def core(world: World) -> Found:
    """The fast part: FSDP2 and a dict, large and small parameters, and a rank that fails."""
    bare = mlp()
    reference = gf.functionalize(bare, gf.classification_loss)
    model_fn, params = gf.functionalize(fully_sharded(bare, world.mesh), gf.classification_loss)
    train, val = classes(TRAIN, 0), classes(VAL, 1)
    mine = part(train, world.train), part(val, world.val)
    expected = gf.value_and_grad_dot(*reference, train, val)
    found: Found = {}
    kinds = {"fsdp": (model_fn, params), "dict": (reference[0], distributed(reference[1], world.mesh, "columns"))}
    with nothing_small():
        for name, sharded in kinds.items():
            result = gf.value_and_grad_dot(*sharded, *mine)
            found[f"{name} losses"] = relative(result.losses, expected.losses[world.train])
            found[f"{name} dots"] = relative(result.dots, expected.dots[world.train])
            found[f"{name} grads"] = largest(result.grads, expected.grads)
    kept = gf.ghost_grad_dot(model_fn, params, *mine)  # small parameters that stay gathered during the call
    found["small"] = relative(kept, expected.dots[world.train])
    wrong = (mine[0][0], mine[0][1] + (9 if world.rank == 1 else 0))
    found["message"] = message_of(lambda: gf.ghost_grad_dot(model_fn, params, wrong, mine[1]))
    found["after it"] = relative(gf.ghost_grad_dot(model_fn, params, *mine), expected.dots[world.train])
    return found


def dicts(world: World) -> Found:
    """Plain dicts of `DTensor`s, for model functions with and without a module."""
    ways = ("rows", "columns", "mixed")
    names = ("mlp", "gpt2 tied", "convolution", "unused", "tied by hand", "derived", "recurrent", "products")
    found: Found = {}
    with nothing_small():
        for number, name in enumerate(names):
            case = BY_NAME[name].make(torch.float64, torch.device("cpu"))
            sharded = distributed(case.params, world.mesh, ways[number % 3])
            errors = calls_agree(world, (case.model_fn, sharded), (case.model_fn, case.params), case.batch)
            found |= {f"{name}: {what}": error for what, error in errors.items()}
    return found


def modules(world: World) -> Found:
    """Modules that FSDP2 has sharded."""
    kinds: dict[str, Any] = {
        "mlp": (mlp, gf.classification_loss, classes),
        "convolution": (convolution, gf.classification_loss, images),
        "gpt2 tied": (gpt2, gf.causal_lm_loss, tokens),
        "gpt2 untied": (partial(gpt2, tied=False), gf.causal_lm_loss, tokens),
        "gpt2 chunked": (gpt2, gf.chunked_causal_lm_loss, tokens),
    }
    found: Found = {}
    with nothing_small():
        for name, (make, loss, batch) in kinds.items():
            bare, sharded = make(), fully_sharded(make(), world.mesh)
            both = gf.functionalize(sharded, loss), gf.functionalize(bare, loss)
            found |= {f"{name}: {what}": error for what, error in calls_agree(world, *both, batch).items()}
    return found


def meshes(world: World) -> Found:
    """Meshes of two dimensions: replicas of shards, as FSDP2 makes them and in a dict, and shards of shards."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("replicate", "shard"))
    bare = gf.functionalize(gpt2(), gf.causal_lm_loss)
    hybrid = gf.functionalize(fully_sharded(gpt2(), mesh), gf.causal_lm_loss)
    found: Found = {}
    with nothing_small():
        found |= {f"hybrid: {what}": error for what, error in calls_agree(world, hybrid, bare, tokens).items()}
        for how in ("replicas of shards", "shards of shards"):
            case = BY_NAME["mlp"].make(torch.float64, torch.device("cpu"))
            sharded = (case.model_fn, distributed(case.params, mesh, how))
            errors = calls_agree(world, sharded, (case.model_fn, case.params), case.batch)
            found |= {f"{how}: {what}": error for what, error in errors.items()}
    return found


# ---------------------------------------------------------------- training


def training(world: World) -> Found:
    """FSDP2's own steps and ours in turns, by optimizers that hold the same; a model function made once."""
    bare = gpt2()
    model = fully_sharded(bare, world.mesh)
    held, theirs = dict(model.named_parameters()), dict(bare.named_parameters())
    mine_step, their_step = (torch.optim.AdamW(ps.values(), lr=1e-2) for ps in (held, theirs))
    model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
    bare_fn, bare_params = gf.functionalize(bare, gf.causal_lm_loss)
    everyone = shares(TRAIN, world.ranks)
    train, val = tokens(TRAIN, 0), tokens(VAL, 1)
    mine = part(train, world.train), part(val, world.val)
    found: Found = {}

    def loss_of(module: nn.Module, batch: Any) -> Tensor:
        return gf.causal_lm_loss(module(**batch), batch).mean()

    def steps() -> None:
        for optimizer in (mine_step, their_step):
            optimizer.step()
            optimizer.zero_grad()

    def plain(what: str) -> None:
        loss_of(model, mine[0]).backward()  # FSDP2 averages the means of the ranks
        torch.stack([loss_of(bare, part(train, where)) for where in everyone]).mean().backward()
        found[f"{what}: grads"] = max(relative(p.grad, theirs[n].grad) for n, p in held.items())  # type: ignore[arg-type]
        steps()
        found[f"{what}: params"] = largest(held, theirs)

    def ours(what: str, **how: Any) -> None:
        metrics = [gf.adam(o, m, **how) for o, m in ((mine_step, model), (their_step, bare))]
        result = gf.value_and_grad_dot(model_fn, params, *mine, precondition=metrics[0])
        expected = gf.value_and_grad_dot(bare_fn, bare_params, train, val, precondition=metrics[1])
        found[f"{what}: dots"] = relative(result.dots, expected.dots[world.train])
        for name in theirs:
            held[name].grad, theirs[name].grad = result.grads[name], expected.grads[name]
        found[f"{what}: update"] = largest(metrics[0].update(result.grads), metrics[1].update(expected.grads))
        steps()
        found[f"{what}: params"] = largest(held, theirs)

    ours("first")
    plain("plain step")
    ours("after a plain step")
    with torch.no_grad():
        model(**mine[0])  # leaves the root's parameters gathered
    ours("after a forward alone", exact=True)
    plain("plain step at last")

    loss = loss_of(model, mine[0])
    between = gf.ghost_grad_dot(model_fn, params, *mine)
    loss.backward()
    expected = gf.ghost_grad_dot(bare_fn, bare_params, train, val)
    torch.stack([loss_of(bare, part(train, where)) for where in everyone]).mean().backward()
    found["between forward and backward: dots"] = relative(between, expected[world.train])
    found["between forward and backward: grads"] = max(relative(p.grad, theirs[n].grad) for n, p in held.items())  # type: ignore[arg-type]

    other = {name: 0.9 * p for name, p in params.items()}
    expected = gf.ghost_grad_dot(bare_fn, {name: 0.9 * p for name, p in bare_params.items()}, train, val)
    found["other parameters"] = relative(gf.ghost_grad_dot(model_fn, other, *mine), expected[world.train])

    adafactor = [torch.optim.Adafactor(ps.values(), lr=1e-2) for ps in (held, theirs)]
    metrics = [gf.adafactor(o, m) for o, m in zip(adafactor, (model, bare), strict=True)]
    dots = gf.ghost_grad_dot(model_fn, params, *mine, precondition=metrics[0])
    expected = gf.ghost_grad_dot(bare_fn, bare_params, train, val, precondition=metrics[1])
    found["adafactor"] = relative(dots, expected[world.train])
    halves = gf.diagonal(lambda name: 0.5 if "h.0" in name else 1.0)
    dots = gf.ghost_grad_dot(model_fn, params, *mine, precondition=halves)
    expected = gf.ghost_grad_dot(bare_fn, bare_params, train, val, precondition=halves)
    found["diagonal"] = relative(dots, expected[world.train])
    return found


def accumulation(world: World) -> Found:
    """A step of two micro-batches that share one validation gradient."""
    bare = gpt2()
    model_fn, params = gf.functionalize(fully_sharded(bare, world.mesh), gf.causal_lm_loss)
    bare_fn, bare_params = gf.functionalize(bare, gf.causal_lm_loss)
    train, val = tokens(2 * TRAIN, 0), tokens(VAL, 1)
    found: Found = {}
    once = gf.val_gradient(model_fn, params, part(val, world.val))
    expected = gf.value_and_grad_dot(bare_fn, bare_params, train, val)
    grads: Params = {}
    for half in range(2):
        micro = part(part(train, slice(half * TRAIN, (half + 1) * TRAIN)), world.train)
        result = gf.value_and_grad_dot(model_fn, params, micro, once)
        grads = {n: g / 2 + grads.get(n, 0) for n, g in result.grads.items()}
        whole_half = expected.dots[half * TRAIN : (half + 1) * TRAIN]
        found[f"dots of half {half}"] = relative(result.dots, whole_half[world.train])
    found["grads"] = largest(grads, expected.grads)
    return found


# ---------------------------------------------------------------- what models do


class Adapted(nn.Module):
    """A frozen linear map with a trainable change of low rank, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    layers = [Adapted(nn.Linear(5, 8)), nn.Tanh(), Adapted(nn.Linear(8, 8)), nn.Tanh(), Adapted(nn.Linear(8, 3))]
    return randomized(nn.Sequential(*layers))


def functional(p: Params, batch: Any) -> Tensor:
    """Views and casts of weights, and a sum of two."""
    x, y = batch
    h = (x @ p["w"].t()).tanh()  # [B, 8]
    h = F.linear(h, p["v"][1:7, :]).tanh()  # [B, 6]
    h = h @ p["u"].double().softmax(0) + h @ (p["u"] + p["v"][:6, :6])
    h = h + p["v"].view(-1)[:6] * p["s"]
    return F.cross_entropy(h @ p["w"][:3].reshape(5, 3)[:, :].repeat(2, 1)[:6], y, reduction="none")


def rounded(p: Params, batch: Any) -> Tensor:
    """A cast to float32, whose gradient has its digits alone."""
    return functional({**p, "u": p["u"].float().double()}, batch)


def writes(p: Params, batch: Any) -> Tensor:
    view = p["w"].view(-1)
    view.mul_(2)
    return functional(p, batch)


def derived(world: World) -> Found:
    """Tensors derived from sharded parameters, adapters on a frozen base, and parts of the forward that run again."""
    found: Found = {}
    params = Draw(torch.float64, torch.device("cpu")).params(w=(8, 5), v=(8, 8), u=(6, 6), s=())
    sharded = distributed(params, world.mesh, "rows")
    with nothing_small():
        errors = calls_agree(world, (functional, sharded), (functional, params), classes)
        found |= {f"functional: {what}": error for what, error in errors.items()}
        mine = part(classes(TRAIN, 0), world.train), part(classes(VAL, 1), world.val)
        expected = gf.value_and_grad_dot(rounded, params, classes(TRAIN, 0), classes(VAL, 1))
        result = gf.value_and_grad_dot(rounded, sharded, *mine)
        found["float32: dots"] = relative(result.dots, expected.dots[world.train])
        found["float32: grads"] = largest(result.grads, expected.grads)
        found["message of a write"] = message_of(lambda: gf.ghost_grad_dot(writes, sharded, *mine))

        both = [gf.functionalize(m, gf.classification_loss) for m in (fully_sharded(adapted(), world.mesh), adapted())]
        assert {name.split(".")[1] for name in both[0][1]} == {"down", "up"}
        found |= {f"adapters: {what}": error for what, error in calls_agree(world, both[0], both[1], classes).items()}
        direct = both[0][0](both[0][1], mine[0])
        found["adapters without a call"] = relative(direct, both[1][0](both[1][1], classes(TRAIN, 0))[world.train])

        bare = gpt2().train()
        again: Any = fully_sharded(bare, world.mesh)
        again.gradient_checkpointing_enable({"use_reentrant": False})
        both = [gf.functionalize(m, gf.causal_lm_loss) for m in (again, bare)]
        train, val = tokens(TRAIN, 0), tokens(VAL, 1)
        result = gf.value_and_grad_dot(*both[0], part(train, world.train), part(val, world.val))
        expected = gf.value_and_grad_dot(*both[1], train, val)
        found["checkpointing: dots"] = relative(result.dots, expected.dots[world.train])
        found["checkpointing: grads"] = largest(result.grads, expected.grads)
    return found


def direct(world: World) -> Found:
    """A model function that is called as such: sharded parameters are gathered, and gradients are sums over ranks."""
    bare = gpt2()
    model_fn, params = gf.functionalize(fully_sharded(bare, world.mesh), gf.causal_lm_loss)
    bare_fn, bare_params = gf.functionalize(bare, gf.causal_lm_loss)
    train = tokens(TRAIN, 0)
    mine = part(train, world.train)
    losses = bare_fn(bare_params, train)
    found = {"losses": relative(model_fn(params, mine), losses[world.train])}
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    grads = torch.autograd.grad(model_fn(leaves, mine).sum(), list(leaves.values()))
    bare_leaves = {name: p.detach().requires_grad_() for name, p in bare_params.items()}
    expected = torch.autograd.grad(bare_fn(bare_leaves, train).sum(), list(bare_leaves.values()))
    found["grads"] = max(relative(g, e) for g, e in zip(grads, expected, strict=True))
    case = BY_NAME["products"].make(torch.float64, torch.device("cpu"))
    batch = case.batch(3, 0)
    bare_losses = case.model_fn(case.params, batch)
    with _sharded.GatheredAtUse():
        plain = case.model_fn(distributed(case.params, world.mesh, "rows"), batch)
    found["a function without a module"] = relative(plain, bare_losses)
    return found


# ---------------------------------------------------------------- mixed precision


class Reader(nn.Module):
    """`[B, T]` ids to logits, in linear maps and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def precision(world: World) -> Found:
    """FSDP2's mixed precision policy: parameters and inputs in bfloat16, sums over ranks and results in float32."""
    torch.manual_seed(0)
    bare = Reader()
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    policies = {  # of the blocks, and of the root
        "bfloat16": (bfloat16, replace(bfloat16, output_dtype=torch.float32)),
        "inputs as they are": (replace(bfloat16, cast_forward_inputs=False),) * 2,
        "float32 blocks": (MixedPrecisionPolicy(torch.float32, output_dtype=torch.bfloat16), bfloat16),
        "none": (MixedPrecisionPolicy(),) * 2,
    }
    draw = Draw(torch.float32, torch.device("cpu"), 0)
    batches = [{"input_ids": draw.ids(50, n, 6)} for n in (TRAIN, VAL)]
    mine = part(batches[0], world.train), part(batches[1], world.val)
    expected = gf.value_and_grad_dot(*gf.functionalize(bare, gf.causal_lm_loss), *batches)
    found: Found = {}
    for name, (of_blocks, of_root) in policies.items():
        model = copy.deepcopy(bare)
        for block in model.blocks:
            fully_shard(block, mesh=world.mesh, mp_policy=of_blocks)
        fully_shard(model, mesh=world.mesh, mp_policy=of_root)
        model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
        result = gf.value_and_grad_dot(model_fn, params, *mine)
        with torch.no_grad():
            own = gf.causal_lm_loss(model(**mine[0]), mine[0])
        found[f"{name}: losses of FSDP2's forward"] = relative(result.losses, own)
        found[f"{name}: losses without a call"] = relative(model_fn(params, mine[0]), own)
        found[f"{name}: dots near float32"] = relative(result.dots, expected.dots[world.train])
        found[f"{name}: grads near float32"] = largest(result.grads, expected.grads)
        found[f"{name}: dtypes"] = sorted({str(g.dtype) for g in result.grads.values()} | {str(result.dots.dtype)})
    frozen = copy.deepcopy(bare)
    frozen.blocks.requires_grad_(False)
    for block in frozen.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=bfloat16)
    fully_shard(frozen, mesh=world.mesh, mp_policy=bfloat16)
    model_fn, params = gf.functionalize(frozen, gf.causal_lm_loss)
    result = gf.value_and_grad_dot(model_fn, params, *mine)
    with torch.no_grad():
        own = gf.causal_lm_loss(frozen(**mine[0]), mine[0])
    found["frozen: losses of FSDP2's forward"] = relative(result.losses, own)
    found["frozen: losses without a call"] = relative(model_fn(params, mine[0]), own)
    return found


# ---------------------------------------------------------------- what is refused, and what fails


class Doubled(torch.autograd.Function):
    """An operation that no interpreter sees."""

    @staticmethod
    def forward(ctx, weight):
        return 2 * weight

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad


def twice(weight: Tensor) -> Tensor:
    """Scripted, an operation of which not even the steps are seen."""
    return 2 * weight


def experts(p: Params, batch: Any) -> Tensor:
    """A mixture of experts: rows go through those that the data picks."""
    x, y = batch
    which = int((x.detach().sum() > 0).item())
    return F.cross_entropy(F.linear(x, p[f"expert {which}"]), y, reduction="none")


def refusals(world: World) -> Found:
    """Messages by what is wrong; each rank has its own."""
    bare = mlp()
    model_fn, params = gf.functionalize(fully_sharded(bare, world.mesh), gf.classification_loss)
    train, val = classes(TRAIN, 0), classes(VAL, 1)
    mine = part(train, world.train), part(val, world.val)
    expected = gf.ghost_grad_dot(*gf.functionalize(bare, gf.classification_loss), train, val)[world.train]
    found: Found = {}

    def functionalized(model: nn.Module) -> str:
        return message_of(lambda: gf.functionalize(model, gf.classification_loss))

    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    found["tensor parallel"] = functionalized(parallelize_module(mlp(), world.mesh, plan))  # type: ignore[arg-type]
    found["first FSDP"] = functionalized(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))
    found["DataParallel"] = functionalized(DataParallel(mlp()))

    def dots(f: Any = model_fn, p: Any = params, batches: Any = mine, **how: Any) -> str:
        return message_of(lambda: gf.ghost_grad_dot(f, p, *batches, **how))

    alone = [dist.new_group([rank]) for rank in range(world.ranks)][world.rank]
    found["group"] = dots(group=alone)
    found["dense"] = dots(on_unsupported="dense")
    found["vmap"] = message_of(
        lambda: torch.func.vmap(lambda s: s * gf.ghost_grad_dot(model_fn, params, *mine))(torch.ones(2))
    )
    found["second order"] = message_of(lambda: gf.in_run_values(model_fn, params, *mine, lr=0.1, order=2))
    found["interaction"] = message_of(lambda: gf.ghost_grad_hess_grad(model_fn, params, *mine))

    draw = Draw(torch.float64, torch.device("cpu"))
    weights = distributed(draw.params(w=(3, 5)), world.mesh, "rows")
    for name, function in (("own function", Doubled.apply), ("scripted", torch.jit.script(twice))):

        def with_own(p: Params, batch: Any, function: Any = function) -> Tensor:
            return F.cross_entropy(F.linear(batch[0], function(p["w"])), batch[1], reduction="none")

        found[name] = dots(with_own, weights)
        one = part(mine[0], slice(0, 1)), part(mine[1], slice(0, 1))
        found[f"{name}, one sample"] = dots(with_own, weights, one)

    of_experts = distributed(draw.params(**{"expert 0": (3, 5), "expert 1": (3, 5)}), world.mesh, "rows")
    sign = 1 if world.rank == 0 else -1
    picked = [(sign * x.abs(), y) for x, y in mine]
    found["experts"] = dots(experts, of_experts, picked)
    same = [(x.abs(), y) for x, y in mine]
    found["experts after that"] = dots(experts, of_experts, same, layers="expert 1")

    bad = (mine[0][0], mine[0][1] + (9 if world.rank == 1 else 0))
    found["one rank"] = dots(batches=(bad, mine[1]))
    found["one rank, val"] = dots(batches=(mine[0], (mine[1][0], mine[1][1] + (9 if world.rank == 0 else 0))))
    found["one rank, clipped"] = message_of(lambda: gf.ghost_clipped_grad(model_fn, params, bad, 1.0))
    empty = part(mine[0], slice(0, 0)) if world.rank == 1 else mine[0]
    found["empty"] = dots(batches=(empty, mine[1]))
    found["after all that"] = relative(gf.ghost_grad_dot(model_fn, params, *mine), expected)
    return found


def wrapped(world: World) -> Found:
    """A module in `DistributedDataParallel`: replicated parameters, under the names of the wrapped module."""
    bare = mlp()
    model = DistributedDataParallel(copy.deepcopy(bare))
    train, val = classes(TRAIN, 0), classes(VAL, 1)
    mine = part(train, world.train), part(val, world.val)
    everyone = shares(TRAIN, world.ranks)
    found: Found = {}

    def plain(what: str) -> None:
        gf.classification_loss(model(mine[0][0]), mine[0]).mean().backward()
        of_ranks = [part(train, where) for where in everyone]
        torch.stack([gf.classification_loss(bare(b[0]), b).mean() for b in of_ranks]).mean().backward()
        found[what] = max(
            relative(p.grad, q.grad)  # type: ignore[arg-type]
            for p, q in zip(model.parameters(), bare.parameters(), strict=True)
        )
        for p in (*model.parameters(), *bare.parameters()):
            with torch.no_grad():
                p -= 0.1 * p.grad  # type: ignore[operator]
                p.grad = None

    plain("a step before")
    model_fn, params = gf.functionalize(model, gf.classification_loss)
    assert all(name.startswith("module.") for name in params)
    result = gf.value_and_grad_dot(model_fn, params, *mine, group=dist.group.WORLD)
    bare_fn, bare_params = gf.functionalize(bare, gf.classification_loss)
    expected = gf.value_and_grad_dot(bare_fn, bare_params, train, val)
    found["dots"] = relative(result.dots, expected.dots[world.train])
    found["grads"] = largest(result.grads, {f"module.{name}": g for name, g in expected.grads.items()})
    found["bitwise as the bare function"] = relative(model_fn(params, mine[0]), bare_fn(bare_params, mine[0]))
    plain("a step after")
    return found


# ---------------------------------------------------------------- what is exchanged and kept


def still_whole(shards: Any) -> int:
    """How many gathered parameters are held. gloo's own thread lets go of what it gathered some time after its end."""
    deadline = time.monotonic() + 10
    while (held := sum(not weak.expired() for weak, *_ in shards._lent.values())) and time.monotonic() < deadline:
        time.sleep(0.001)
    return held


def communication(world: World) -> Found:
    """Gathers and reduce-scatters of one call, and what of the parameters is whole when the forward is over."""
    draw = Draw(torch.float64, torch.device("cpu"))
    params = draw.params(table=(11, 6), first=(7, 6), second=(5, 7), head=(4, 5))
    sharded = distributed(params, world.mesh, "rows")
    alive: list[int] = []

    def model_fn(p: Params, batch: Any) -> Tensor:
        h = F.embedding(batch["ids"], p["table"])  # [B, T, 6]
        h = F.linear(F.linear(h, p["first"]).tanh(), p["second"]).tanh()
        losses = F.linear(h, p["head"]).pow(2).mean((1, 2))
        mode = torch.overrides._get_current_function_mode()
        if mode is not None:
            alive.append(still_whole(mode.shards))  # type: ignore[attr-defined]
        return losses

    def batch(n: int) -> Any:
        return {"ids": draw.ids(11, n, 3)}

    found: Found = {}
    with nothing_small():
        for name, call in {
            "value_and_grad_dot": lambda: gf.value_and_grad_dot(model_fn, sharded, batch(3), batch(2)),
            "ghost_grad_norm": lambda: gf.ghost_grad_norm(model_fn, sharded, batch(3)),
        }.items():
            with CommDebugMode() as counted:
                call()
            counts = {op.__name__: count for op, count in counted.get_comm_counts().items()}
            found[name] = counts
    found["whole at the end of a forward"] = alive
    return found


PARTS: dict[str, Callable[[World], Found]] = {
    of.__name__: of
    for of in (
        core, dicts, modules, meshes, training, accumulation, derived, direct, precision, refusals, wrapped,
        communication,
    )
}  # fmt: skip


def main(rank: int, ranks: int, folder: Path, part_name: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{part_name}-{ranks}"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    found = PARTS[part_name](World(rank, ranks, init_device_mesh("cpu", (ranks,))))
    (folder / f"{part_name}-{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
