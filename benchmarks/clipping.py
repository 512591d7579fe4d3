"""Clipped gradients by `ghost_clipped_grad` and by Opacus: FLOPs, time, memory, and how far they are apart.

    python benchmarks/clipping.py                       # benchmarks/results/clipping.json, some minutes
    python benchmarks/clipping.py --size transformer    # one model; the others keep their results

Every method gives the sum of per-sample gradients, each clipped to the median of their norms (a plain step: the mean
gradient, nothing clipped). "opacus hooks" is Opacus's default, which holds every per-sample gradient. "opacus ghost" is
its ghost clipping: norms from a first backward, and the sum from a second one. The models are such that Opacus supports
each of their layers: no tied weights, positions looked up for each sample, `nn.Linear` throughout.

FLOPs are those of `torch.utils.flop_counter`, matrix products and convolutions, with attention as plain products. Times
and memory are taken as in `vs_vmap.py`. A difference is |G - G*| / |G*| over all parameters, G* by a loop over single
samples in float64; Opacus's has a part of 1e-6 over the norm, which it adds to the norm that it divides by.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import opacus
import torch
import torch.nn.functional as F
import vs_vmap
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from vs_vmap import Workload

import ghostfunc as gf

RESULTS = vs_vmap.RESULTS.with_name("clipping.json")
Grads = dict[str, Tensor]
Step = Callable[[], Grads]


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a transformer, with attention to what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width] -> [B, T, width]`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, width / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """GPT-2's architecture with an untied head; positions are looked up for each sample, as Opacus needs it."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T] -> [B, T, vocabulary]`."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def losses_of(module: nn.Module, batch: Any) -> Tensor:
    """`[B]`: of a classifier with a batch `(x, y)`, of a language model with ids `[B, T]`."""
    if isinstance(batch, tuple):
        return gf.classification_loss(module(batch[0]), batch)
    return gf.causal_lm_loss(module(batch), batch)


def workload(module: nn.Module, batch: Any, model: str) -> Workload:
    loss = gf.classification_loss if isinstance(batch, tuple) else gf.causal_lm_loss
    n, *positions = pytree.tree_leaves(batch)[0].shape
    description = {"model": model, "B": n} | ({} if isinstance(batch, tuple) else {"T": positions[0]})
    return Workload(*gf.functionalize(module, loss), batch, None, description, module)


def mlp(device: torch.device) -> Workload:
    module = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    batch = torch.randn(64, 784).to(device), torch.randint(10, (64,)).to(device)
    return workload(module.to(device), batch, "MLP 784-1024-1024-10")


def convnet(device: torch.device) -> Workload:
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.GroupNorm(8, 128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    batch = torch.randn(32, 3, 32, 32).to(device), torch.randint(10, (32,)).to(device)
    return workload(module.to(device), batch, "3 convolutions 3-32-64-128 with GroupNorm, images 32 x 32")


def transformer(device: torch.device) -> Workload:
    layers, width, vocabulary, positions, n = 4, 128, 4096, 128, 8
    module = Transformer(layers, width, 4, vocabulary, positions)
    batch = torch.randint(vocabulary, (n, positions)).to(device)
    return workload(module.to(device), batch, f"transformer {layers} x {width}, vocabulary {vocabulary}, untied")


SIZES = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


# --- methods: each prepares a step ------------------------------------------------------------------------------------


def plain(work: Workload, max_norm: float) -> Step:
    return lambda: vs_vmap.plain_gradient(work, work.train)


def ghostfunc(work: Workload, max_norm: float) -> Step:
    """One forward and one backward."""
    return lambda: gf.ghost_clipped_grad(work.model_fn, work.params, work.train, max_norm).grads


def opacus_hooks(work: Workload, max_norm: float) -> Step:
    """One forward and one backward, whose hooks make the per-sample gradients."""
    module = copy.deepcopy(work.module)
    wrapped = GradSampleModule(module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    size = work.description["B"]
    optimizer = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=max_norm, expected_batch_size=size)

    def step() -> Grads:
        optimizer.zero_grad()
        losses_of(wrapped, work.train).mean().backward()
        optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in module.named_parameters()}  # type: ignore[attr-defined]

    return step


def opacus_ghost(work: Workload, max_norm: float) -> Step:
    """One forward, a backward for the norms, and a backward of the weighted losses."""
    module = copy.deepcopy(work.module)
    wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=max_norm)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    size = work.description["B"]
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=0.0, max_grad_norm=max_norm, expected_batch_size=size
    )

    def step() -> Grads:
        optimizer.zero_grad()
        DPTensorFastGradientClipping(wrapped, optimizer, losses_of(wrapped, work.train)).backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return step


METHODS: dict[str, Callable[[Workload, float], Step]] = {
    "plain": plain, "ghostfunc": ghostfunc, "opacus hooks": opacus_hooks, "opacus ghost": opacus_ghost
}  # fmt: skip


# --- measurements -----------------------------------------------------------------------------------------------------


def build(size: str, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return SIZES[size](device)


def by_loop(work: Workload, max_norm: float) -> Grads:
    """Clipped one sample after the other, in float64."""
    batch = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, work.train)
    module = copy.deepcopy(work.module).double()
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for i in range(work.description["B"]):
        loss = losses_of(module, pytree.tree_map(lambda t, i=i: t[i : i + 1], batch))[0]
        grads = torch.autograd.grad(loss, list(module.parameters()))
        weight = min(1.0, max_norm / torch.cat([g.flatten() for g in grads]).norm().item())
        for of_all, g in zip(total.values(), grads, strict=True):
            of_all.add_(g, alpha=weight)
    return total


def difference(grads: Grads, reference: Grads) -> float:
    gaps = torch.stack([(grads[name].double() - g).norm() for name, g in reference.items()])
    return (gaps.norm() / torch.stack([g.norm() for g in reference.values()]).norm()).item()


def measure(size: str, arguments: Any) -> dict[str, Any]:
    device = torch.device(arguments.device)
    environment = {**vs_vmap.environment(arguments), "opacus": opacus.__version__}
    peaks = {name: vs_vmap.peak(__file__, size, name, arguments) for name in METHODS}
    work = build(size, device)
    max_norm = gf.ghost_grad_norm(work.model_fn, work.params, work.train).median().item()
    steps = {name: prepare(work, max_norm) for name, prepare in METHODS.items()}
    counted = {name: vs_vmap.flops(step) for name, step in steps.items()}
    reference = by_loop(work, max_norm)
    differences = {name: difference(step(), reference) for name, step in steps.items() if name != "plain"}
    taken = vs_vmap.times(work, {name: lambda _, s=s: s() for name, s in steps.items()}, arguments.rounds, device)
    rows = {
        name: {
            "flops": counted[name],
            "flops_ratio": counted[name] / counted["plain"],
            **taken[name],
            "peak_bytes": peaks[name],
            "difference": differences.get(name),
        }
        for name in METHODS
    }
    return {
        **work.description, "max_norm": max_norm, "environment": environment, "rounds": arguments.rounds,
        "methods": rows,
    }  # fmt: skip


def print_table(size: str, result: dict[str, Any]) -> None:
    print(f"\n{size}: {result['model']}, B={result['B']}")
    print(f"{'method':14}{'x FLOPs':>9}{'x time':>9}{'peak MB':>9}{'difference':>12}")
    for name, row in result["methods"].items():
        apart = "" if row["difference"] is None else f"{row['difference']:12.1e}"
        print(f"{name:14}{row['flops_ratio']:9.2f}{row['median_ratio']:9.2f}{row['peak_bytes'] / 1e6:9.0f}{apart}")


def main() -> None:
    parser = vs_vmap.arguments_of(__doc__, SIZES, list(SIZES), METHODS, RESULTS)
    parser.set_defaults(threads=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # The first layer's input needs no gradient, and torch says so at each of Opacus's hooks.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if arguments.peak_of:
        device = torch.device(arguments.device)
        work = build(arguments.size[0], device)
        step = METHODS[arguments.peak_of](work, 1.0)
        vs_vmap.print_peak(work, lambda _: step(), device)
        return
    for size in arguments.size:
        result = measure(size, arguments)
        print_table(size, result)
        vs_vmap.save(arguments.results, {size: result})


if __name__ == "__main__":
    main()
