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
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf

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


def mlp(device: torch.device) -> Workload:
    n, m, sizes = 64, 16, (784, 1024, 1024, 1024)
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


def seconds(method: Method, work: Workload, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = method(work)
    synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def flops(run: Callable[[], Any]) -> int:
    """Matrix products and convolutions, those of attention in plain products: a CPU's fused kernel is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def times(
    work: Workload, methods: Mapping[str, Method], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Of methods that take turns, one of which is "plain"."""
    for method in methods.values():
        seconds(method, work, device)
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for r in range(rounds):
        names = list(methods)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name].append(seconds(methods[name], work, device))
    ratios = {name: [t / p for t, p in zip(ts, taken["plain"], strict=True)] for name, ts in taken.items()}
    return {
        name: {
            "median_seconds": statistics.median(taken[name]),
            "median_ratio": statistics.median(ratios[name]),
            "ratios": ratios[name],
        }
        for name in methods
    }


def resident(field: str) -> int:
    """`VmHWM` (the high-water mark) or `VmRSS` of this process, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")
    return 1024 * int(match[1])


def print_peak(work: Workload, method: Method, device: torch.device) -> None:
    """Run one step and print its peak; what `peak` calls in a process of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    method(work)
    print((torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) - before)


def peak(script: str, size: str, method: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, script, "--size", size, "--peak-of", method, "--device", arguments.device]
    command += ["--threads", str(arguments.threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


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


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    import transformers

    device = torch.device(arguments.device)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "load_average_before": round(os.getloadavg()[0], 2),
    }


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


def save(path: Path, results: dict[str, Any]) -> None:
    """Add to what the file holds already, in one step."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**known, **results}, indent=1) + "\n")
    partial.replace(path)


def arguments_of(
    description: str | None, sizes: Mapping[str, Any], default: list[str], methods: Mapping[str, Any], results: Path
) -> argparse.ArgumentParser:
    """The arguments of a benchmark whose methods take turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(sizes), default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=results, help="the JSON file that gains these sizes")
    parser.add_argument("--peak-of", choices=list(methods), help=argparse.SUPPRESS)
    return parser


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
