"""Time, memory and error of `value_and_grad_dot` against vmap per-sample gradients and a loop over single samples.

    python benchmarks/vs_vmap.py                        # an MLP and a nano GPT-2: a minute or two
    python benchmarks/vs_vmap.py --size gpt2-small      # 12 x 768, B = 4, Bv = 1, T = 256: 8 GB for vmap, ten minutes

Each method computes the same results: the mean training gradient, and the dot product of each training sample's
gradient with the gradient of the mean validation loss (a plain step: the first alone).

Time: the methods take turns in one process, and a method's figure is the median over the rounds of its ratio to the
plain step of the same round. Memory: one step in a process of its own, the high-water mark of resident memory above
what the process held before the step, on a GPU the allocator's. Error: against vmap in float32, |d - d*| / (|g_i| |V|)
of a dot and |G - G*| / |G*| of the gradient, over all parameters.
"""

import argparse
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import arguments_of, environment, flops, peak, print_peak, resident, save, times
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ghostfunc as gf

__all__ = ["arguments_of", "environment", "flops", "peak", "print_peak", "resident", "save", "times"]  # for others

RESULTS = Path(__file__).parent / "results" / "vs_vmap.json"
Grads = dict[str, Tensor]
Method = Callable[["Workload"], Any]


class Workload(NamedTuple):
    """A model and its two batches."""

    model_fn: Callable[[Grads, Any], Tensor]
    params: Grads
    train: Any
    val: Any
    description: dict[str, Any]
    module: nn.Module


class Result(NamedTuple):
    """What a method computes; a plain step has no dots."""

    grads: Grads
    dots: Tensor | None


# --- workloads --------------------------------------------------------------------------------------------------------


def mlp(device: torch.device, *, samples: tuple[int, int] = (64, 16), width: int = 1024) -> Workload:
    (n, m), sizes = samples, (784, width, width, width)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    module = nn.Sequential(*layers, nn.Linear(sizes[-1], 10)).to(device)
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    train, val = ((torch.randn(k, sizes[0]).to(device), torch.randint(10, (k,)).to(device)) for k in (n, m))
    description = {"model": f"MLP {'-'.join(map(str, sizes))}-10", "B": n, "Bv": m}
    return Workload(model_fn, params, train, val, description, module)


def gpt2(
    device: torch.device, *, layers: int, heads: int, width: int, vocabulary: int, positions: int, tied: bool,
    samples: tuple[int, int] = (4, 1),
) -> Workload:  # fmt: skip
    from transformers import GPT2Config, GPT2LMHeadModel

    n, m = samples
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, n_positions=positions,
        tie_word_embeddings=tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = nn.Module.to(GPT2LMHeadModel(config), device)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(vocabulary, (k, positions)).to(device)} for k in (n, m))
    model = f"GPT-2 {layers} x {width}, vocabulary {vocabulary}, {'tied' if tied else 'untied'}"
    return Workload(model_fn, params, train, val, {"model": model, "B": n, "Bv": m, "T": positions}, module)


WORKLOADS: dict[str, Callable[[torch.device], Workload]] = {
    "mlp": mlp,
    # Logits above 32 MB for every method: below, the allocator keeps them, and a batch just below would look cheap.
    "nano": lambda device: gpt2(device, layers=4, heads=4, width=128, vocabulary=16384, positions=256, tied=True),
    "gpt2-small": lambda device: gpt2(
        device, layers=12, heads=12, width=768, vocabulary=50257, positions=256, tied=True
    ),
    "gpt2-small-untied": lambda device: gpt2(
        device, layers=12, heads=12, width=768, vocabulary=50257, positions=256, tied=False
    ),
}


def build(size: str, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return WORKLOADS[size](device)


# --- methods ----------------------------------------------------------------------------------------------------------


def plain_gradient(work: Workload, batch: Any) -> Grads:
    leaves = {name: p.detach().requires_grad_() for name, p in work.params.items()}
    grads = torch.autograd.grad(work.model_fn(leaves, batch).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def plain(work: Workload) -> Result:
    """Forward and backward of the mean training loss."""
    return Result(plain_gradient(work, work.train), None)


def ghostfunc(work: Workload) -> Result:
    """One forward and backward of both batches."""
    result = gf.value_and_grad_dot(work.model_fn, work.params, work.train, work.val)
    return Result(result.grads, result.dots)


def by_vmap(work: Workload) -> Result:
    """Per-sample gradients of the training batch by `vmap(grad)`, and the plain gradient of the validation batch."""
    direction = plain_gradient(work, work.val)
    per_sample = gf.per_sample_grad(work.model_fn, work.params, work.train)
    dots = sum(g.flatten(1) @ direction[name].flatten() for name, g in per_sample.items())
    assert isinstance(dots, Tensor)
    return Result({name: g.mean(0) for name, g in per_sample.items()}, dots)


def loop(work: Workload) -> Result:
    """A backward pass for each training sample, and the plain gradient of the validation batch."""
    direction = plain_gradient(work, work.val)
    n, dots, grads = work.description["B"], [], {}
    for i in range(n):
        sample = pytree.tree_map(lambda t, i=i: t[i : i + 1], work.train)
        for name, g in (own := plain_gradient(work, sample)).items():
            grads[name] = grads[name].add_(g, alpha=1 / n) if i else g / n
        dots.append(sum(torch.dot(g.flatten(), direction[name].flatten()) for name, g in own.items()))
    return Result(grads, torch.stack(dots))


METHODS: dict[str, Callable[[Workload], Result]] = {
    "plain": plain, "ghostfunc": ghostfunc, "vmap": by_vmap, "loop": loop
}  # fmt: skip


# --- measurements -----------------------------------------------------------------------------------------------------


def errors(work: Workload) -> dict[str, dict[str, float]]:
    reference = by_vmap(work)
    assert reference.dots is not None
    per_sample = gf.per_sample_grad(work.model_fn, work.params, work.train)
    norms = sum(g.flatten(1).square().sum(1) for g in per_sample.values())
    assert isinstance(norms, Tensor)
    del per_sample
    direction = sum(g.square().sum() for g in plain_gradient(work, work.val).values())
    scale = norms.sqrt() * torch.as_tensor(direction).sqrt()
    total = torch.stack([g.square().sum() for g in reference.grads.values()]).sum().sqrt()
    found = {}
    for name in ("ghostfunc", "loop"):
        result = METHODS[name](work)
        assert result.dots is not None
        gap = torch.stack([(g - reference.grads[key]).square().sum() for key, g in result.grads.items()]).sum().sqrt()
        found[name] = {
            "dots": ((result.dots - reference.dots).abs() / scale).max().item(),
            "grads": (gap / total).item(),
        }
    return found


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    started = environment(arguments)
    peaks = {name: peak(__file__, size, name, arguments) for name in METHODS}
    work = build(size, torch.device(arguments.device))
    found = errors(work)
    taken = times(work, METHODS, arguments.rounds, torch.device(arguments.device))
    methods = {name: {**taken[name], "peak_bytes": peaks[name], "error": found.get(name)} for name in METHODS}
    return {**work.description, "environment": started, "rounds": arguments.rounds, "methods": methods}


def print_table(size: str, result: dict[str, Any]) -> None:
    print(
        f"\n{size}: {result['model']}, B={result['B']}, Bv={result['Bv']}, {result['environment']['threads']} threads"
    )
    print(f"{'method':12}{'seconds':>10}{'x plain':>10}{'peak MB':>10}{'dot error':>12}{'grad error':>12}")
    for name, row in result["methods"].items():
        error = row["error"] and f"{row['error']['dots']:12.1e}{row['error']['grads']:12.1e}"
        times = f"{row['median_seconds']:10.3f}{row['median_ratio']:10.2f}"
        print(f"{name:12}{times}{row['peak_bytes'] / 1e6:10.0f}{error or ''}")


def main() -> None:
    parser = arguments_of(__doc__, WORKLOADS, ["mlp", "nano"], METHODS, RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap over fused attention: exact, slower
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        device = torch.device(arguments.device)
        print_peak(build(arguments.size[0], device), METHODS[arguments.peak_of], device)
        return
    for size in arguments.size:
        result = measure(size, arguments)
        print_table(size, result)
        save(arguments.results, {size: result})


if __name__ == "__main__":
    main()
