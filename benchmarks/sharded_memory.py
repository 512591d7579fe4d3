"""Peak memory of a process with sharded parameters on 1, 2 and 4 processes, beside FSDP2's own step and whole ones.

    python benchmarks/sharded_memory.py           # some minutes
    python benchmarks/sharded_memory.py --page    # write docs/sharded.md from the JSON, and run nothing

Every process has the same number of samples, whatever their number, and takes one step; nothing else is in it. Its
peak is the high-water mark of resident memory (on a GPU the allocator's) above what the process held before the model
was built, so that parameters count; the largest over the processes is told. The model is built on the meta device and
sharded before it has values. On a CPU, glibc is told to give every block above 64 KiB back when it is freed
(MALLOC_MMAP_THRESHOLD_): what it would keep for later is no process's need.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import ghostfunc as gf

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "sharded_memory.json"
PAGE = ROOT.parent / "docs" / "sharded.md"
PROCESSES = (1, 2, 4)


class Size(NamedTuple):
    """A transformer and what each process runs through it."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    n: int
    m: int


SIZE = Size(8, 512, 8, 8192, 32, 2, 1)
TINY = Size(1, 32, 2, 64, 8, 2, 1)


class Block(nn.Module):
    """Causal attention and two linear maps, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`[B, T, d]` to the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm_2(h))))


class Transformer(nn.Module):
    """GPT-2's shape, its head untied."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.position = (nn.Embedding(k, size.width) for k in (size.vocabulary, size.positions))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` ids to logits `[B, T, V]`."""
        h = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


# --- what a process runs ----------------------------------------------------------------------------------------------


def build(size: Size, device: torch.device, *, sharded: bool) -> nn.Module:
    with torch.device("meta"):
        model = Transformer(size)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            local: Tensor = p.to_local() if sharded else p  # type: ignore[operator]
            local.normal_(0 if p.dim() > 1 else 1, 0.02)
    return model


def batches(size: Size, device: torch.device) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(dist.get_rank())
    ids = (torch.randint(size.vocabulary, (k, size.positions), generator=draw) for k in (size.n, size.m))
    train, val = ({"input_ids": t.to(device)} for t in ids)
    return train, val


def plain(model: nn.Module, train: Any, val: Any) -> Any:
    """A training step's forward and backward, its gradients summed over the processes."""
    gf.causal_lm_loss(model(**train), train).mean().backward()
    return [p.grad for p in model.parameters()]


def plain_replicated(model: nn.Module, train: Any, val: Any) -> Any:
    return plain(DistributedDataParallel(model, gradient_as_bucket_view=True), train, val)


def dots(model: nn.Module, train: Any, val: Any) -> Any:
    model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
    return gf.value_and_grad_dot(model_fn, params, train, val, group=dist.group.WORLD)


STEPS: dict[str, tuple[str, bool, Callable[[nn.Module, Any, Any], Any]]] = {
    "plain": ("training step, FSDP2", True, plain),
    "dots": ("`value_and_grad_dot`, sharded", True, dots),
    "plain replicated": ("training step, DistributedDataParallel", False, plain_replicated),
    "dots replicated": ("`value_and_grad_dot`, parameters whole on each process", False, dots),
}


def give_back_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is that of now


def observed(name: str, size: Size, device: torch.device) -> dict[str, int]:
    """A step's peak, and the parameters in it."""
    _, sharded, step = STEPS[name]
    cuda = device.type == "cuda"
    give_back_memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else measuring.resident("VmRSS")
    model = build(size, device, sharded=sharded)
    result = step(model, *batches(size, device))
    peak = torch.cuda.max_memory_allocated() if cuda else measuring.resident("VmHWM")
    del result
    held = sum((p.to_local() if sharded else p).nbytes for p in model.parameters())  # type: ignore[operator]
    return {"peak_bytes": peak - before, "parameter_bytes": held}


def serve(name: str, rank: int, processes: int, store: str, device: str) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    of_file = dist.FileStore(store, processes)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=of_file, rank=rank, world_size=processes, timeout=timedelta(seconds=600))
    observed(name, TINY, torch.device(device))  # what is imported and opened at a first call is no part of a step
    print(json.dumps(observed(name, SIZE, torch.device(device))))
    dist.destroy_process_group()


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, processes: int, device: str) -> dict[str, Any]:
    """The peaks of so many processes."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--device", device, "--processes", str(processes), "--step", name]
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--store", f"{folder}/store"],
                env=environment, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip
        told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{name} on {processes} processes: a process failed.")
    found = [json.loads(text.splitlines()[-1]) for text in told]
    return {key: [of[key] for of in found] for key in found[0]}


def table(results: dict[str, Any]) -> str:
    lines = ["| MiB in a process | " + " | ".join(f"{k} process{'es' * (k > 1)}" for k in PROCESSES) + " |"]
    lines.append("|---" * (len(PROCESSES) + 1) + "|")
    sharded = results["steps"]["dots"]
    held = [max(sharded[str(k)]["parameter_bytes"]) for k in PROCESSES]
    lines.append("| *the parameters, sharded* | " + " | ".join(f"{b / 2**20:.0f}" for b in held) + " |")
    for name, (label, *_) in STEPS.items():
        peaks = [max(results["steps"][name][str(k)]["peak_bytes"]) for k in PROCESSES]
        lines.append(f"| {label} | " + " | ".join(f"{b / 2**20:.0f}" for b in peaks) + " |")
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    size, environment = Size(**results["size"]), results["environment"]
    return (
        f"A transformer of {size.layers} layers of width {size.width} with an untied head, vocabulary "
        f"{size.vocabulary}; each process has {size.n} train samples and {size.m} validation sample of "
        f"{size.positions} tokens. Peak of one step, parameters, gradients and the exchange between processes "
        f"included, of the process with the highest. torch {environment['torch']}, {environment['dtype']}, "
        f"{environment['device']}. Raw numbers: "
        "[benchmarks/results/sharded_memory.json](../benchmarks/results/sharded_memory.json)."
    )


def page(text: str) -> str:
    """The page with the table of the results between its marks."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return measuring.with_figures(text, "sharded_memory.py", f"{table(results)}\n\n{caption(results)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the JSON, and run nothing")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    for name, kind in (("--step", str), ("--rank", int), ("--processes", int), ("--store", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        serve(arguments.step, arguments.rank, arguments.processes, arguments.store, arguments.device)
        return
    if not arguments.page:
        steps: dict[str, dict[str, Any]] = {}
        for name in STEPS:
            for processes in PROCESSES:
                found = measure(name, processes, arguments.device)
                steps.setdefault(name, {})[str(processes)] = found
                print(f"{name:20}{processes:3} {max(found['peak_bytes']) / 2**20:8.0f} MiB", flush=True)
        about = {"size": SIZE._asdict(), "environment": measuring.environment(arguments)}
        measuring.save(arguments.results, {**about, "steps": steps})
    if arguments.results == RESULTS:
        measuring.write(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
