"""What `ghostfunc explain --fake` predicts for large models on meshes, and how far off it is where it can be measured.

    python benchmarks/planning.py                 # all of it: benchmarks/results/planning.json, then docs/planning.md
    python benchmarks/planning.py --only shard    # "plans", "steps" or "shard"; the others keep their results
    python benchmarks/planning.py --page          # docs/planning.md again, from the results

Memory of a real step: by how many bytes it raises the peak of its process (`VmHWM`) above what the process held before,
the parameters and the batch. malloc is told to give freed blocks of 64 KiB and more back to the system, for the plan
knows nothing of what an allocator keeps. FLOPs: as torch counts those of the real step, attention in plain products.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc._fake import new_mode
from ghostfunc._planning import StepPlan, plan_step
from ghostfunc.cli._explain_fake import ASSUMPTIONS, plan_of
from ghostfunc.cli._fake_models import build

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planning.json"
PAGE = ROOT / "docs" / "planning.md"
TFLOPS, BANDWIDTH = 300.0, 50.0  # of a rank: 1e12 FLOP/s and 1e9 bytes/s, for the modelled time


@dataclass(frozen=True)
class Mesh:
    """A published model and what its ranks are given."""

    model: str
    dtype: str
    samples: int
    val_samples: int
    length: int
    checkpointed: bool
    ranks: Sequence[int]
    sharded: bool


MESHES = [
    Mesh("gpt2-xl", "float32", 4, 1, 1024, False, (1, 8), False),
    Mesh("gpt2-xl", "float32", 4, 1, 1024, False, (8,), True),
    Mesh("llama-3-8b", "bfloat16", 2, 1, 4096, False, (8, 16), True),
    Mesh("llama-3-8b", "bfloat16", 2, 1, 4096, True, (8, 16), True),
    Mesh("llama-3-70b", "bfloat16", 1, 1, 4096, True, (32, 64, 128), True),
]


@dataclass(frozen=True)
class Case:
    """A model and batches that fit here.

    Attributes:
        kind: "gpt2" (tied) or "llama" (grouped queries, untied).
        layers: of it.
        width: of a layer.
        vocabulary: of it.
        n: train samples.
        m: validation samples.
        length: tokens of a sample.
        checkpointed: whether activations are checkpointed.
    """

    kind: str
    layers: int
    width: int
    vocabulary: int
    n: int
    m: int
    length: int
    checkpointed: bool = False

    @property
    def name(self) -> str:
        """For readers."""
        what = {"gpt2": "GPT-2", "llama": "Llama"}[self.kind]
        how = ", checkpointed" if self.checkpointed else ""
        sizes = f"{self.layers} x {self.width}, vocabulary {self.vocabulary}"
        return f"{what} {sizes}; B={self.n}, Bv={self.m}, T={self.length}{how}"

    def tiny(self) -> "Case":
        """The same kind in milliseconds."""
        return Case(self.kind, 2, 64, 100, 2, 1, 8, self.checkpointed)

    def config(self) -> Any:
        """Of transformers, without dropout."""
        from transformers import AutoConfig

        heads = self.width // 64
        if self.kind == "gpt2":
            dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            return AutoConfig.for_model(
                "gpt2", n_layer=self.layers, n_head=heads, n_embd=self.width, vocab_size=self.vocabulary,
                n_positions=self.length, bos_token_id=0, eos_token_id=0, **dropouts,
            )  # fmt: skip
        return AutoConfig.for_model(
            "llama", num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
            hidden_size=self.width, intermediate_size=7 * self.width // 2, vocab_size=self.vocabulary,
            max_position_embeddings=self.length, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip


CASES = [
    Case("gpt2", 4, 256, 8192, 8, 2, 64),
    Case("gpt2", 8, 512, 16384, 4, 1, 256),
    Case("gpt2", 12, 768, 50257, 2, 1, 256),
    Case("gpt2", 4, 256, 8192, 8, 2, 64, checkpointed=True),
    Case("llama", 6, 384, 8192, 8, 2, 128),
    Case("llama", 6, 384, 8192, 8, 2, 128, checkpointed=True),
    Case("llama", 8, 512, 32000, 2, 1, 512),
    Case("llama", 12, 768, 32000, 2, 1, 256),
]
SHARDED = [Case("gpt2", 4, 512, 16384, 2, 1, 64), Case("llama", 4, 768, 16000, 1, 1, 64)]
RANKS = (1, 2, 4)


# --- a real step, in a process of its own -----------------------------------------------------------------------------


def work(case: Case) -> tuple[Any, dict[str, Tensor], Any, Any]:
    torch.manual_seed(0)
    module = build(case.config(), torch.float32, checkpointed=case.checkpointed)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(case.vocabulary, (k, case.length))} for k in (case.n, case.m))
    return model_fn, params, train, val


def step(model_fn: Any, params: dict[str, Tensor], train: Any, val: Any) -> Any:
    """The step that `plan_step` plans; what it returns is alive until the peak is read."""
    first = gf.val_gradient(model_fn, params, val)
    return first, gf.value_and_grad_dot(model_fn, params, train, first)


def raised_peak(real: Sequence[Any]) -> int:
    """By how many bytes a step raises the peak of this process."""
    give_back_memory()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    before = measuring.resident("VmRSS")
    kept = step(*real)
    raised = measuring.resident("VmHWM") - before
    del kept
    return raised


def give_back_memory() -> None:
    """What was freed goes to the system, and the high-water mark is that of now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def sharded(params: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    spread: dict[str, Tensor] = {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in params.items()}
    for parameter in params.values():
        parameter.untyped_storage().resize_(0)  # the module's own
    return spread


def child(case: Case, folder: str = "", rank: int = 0, ranks: int = 0) -> None:
    """Print what a case raises the peak by and, where no ranks share it, its FLOPs."""
    torch.set_num_threads(1)
    if ranks:
        import torch.distributed as dist

        where = f"file://{Path(folder) / 'store'}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
    everything = [work(case.tiny()), work(case)]
    if ranks:
        everything = [(fn, sharded(params, ranks), *batches) for fn, params, *batches in everything]
    tiny, real = everything
    step(*tiny)  # what is imported at a first call is no part of a step
    print(json.dumps({"peak": raised_peak(real), "flops": None if ranks else measuring.flops(lambda: step(*real))}))
    if ranks:
        torch.distributed.destroy_process_group()


def start(case: Case, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), *more]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env={**os.environ, **returned}, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    told, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"a step in a process of its own ended with status {process.returncode}")
    return json.loads(told.splitlines()[-1])


# --- predictions beside it --------------------------------------------------------------------------------------------


def predicted(case: Case) -> StepPlan:
    mode = new_mode()
    module = build(case.config(), torch.float32, mode=mode, checkpointed=case.checkpointed)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    with mode:
        train, val = ({"input_ids": torch.zeros(k, case.length, dtype=torch.long)} for k in (case.n, case.m))
    return plan_step(model_fn, params, train, val, vocabulary=case.vocabulary)


def raised_by_plan(plan: StepPlan, ranks: int = 1, *, shard: bool = False) -> int:
    memory = plan.memory(ranks, sharded=shard, moments=0)
    return memory.total - memory.parameters


def checked_step(case: Case) -> dict[str, Any]:
    plan, real = predicted(case), answer(start(case))
    return {
        "parameters": plan.parameters,
        "peak": {"predicted": raised_by_plan(plan), "measured": real["peak"]},
        "flops": {"predicted": plan.flops, "measured": real["flops"]},
    }


def checked_ranks(case: Case, ranks: int) -> dict[str, Any]:
    plan = predicted(case)
    with tempfile.TemporaryDirectory() as folder:
        started = [start(case, folder, str(rank), str(ranks)) for rank in range(ranks)]
        measured = [answer(process)["peak"] for process in started]
    return {
        "parameters": plan.parameters,
        "peak": {"predicted": raised_by_plan(plan, ranks, shard=True), "measured": max(measured)},
        "ranks": measured,
    }


plan_once = cache(plan_of)


def planned(mesh: Mesh) -> list[dict[str, Any]]:
    samples = (mesh.samples, mesh.val_samples)
    plan = plan_once(mesh.model, mesh.dtype, samples, mesh.length, "cuda", checkpointed=mesh.checkpointed)
    rows = []
    for ranks in mesh.ranks:
        whole, blocks = (
            plan.memory(ranks, sharded=mesh.sharded, blocks_of_logits=chunked) for chunked in (False, True)
        )
        seconds = plan.seconds(ranks, sharded=mesh.sharded, flops=TFLOPS * 1e12, bandwidth=BANDWIDTH * 1e9)
        rows.append({
            **asdict(mesh), "ranks": ranks, "parameters": plan.parameters,
            "memory": {**whole._asdict(), "total": whole.total}, "memory_in_blocks": blocks.total,
            "flops": {"plain": plan.plain_flops, "dots": plan.flops},
            "sent": plan.traffic(ranks, sharded=mesh.sharded), "seconds": seconds._asdict(),
        })  # fmt: skip
    return rows


# --- the page ---------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
Generated by `python benchmarks/planning.py --page` from `benchmarks/results/planning.json`; do not edit.

`ghostfunc explain --fake` (and `gf.plan_step`) says what a training step with dots would take on every rank, for a
model whose weights fit nowhere: the real code runs once on tensors that have shapes and no values, every storage that
it makes is recorded, and FLOPs are the planner's.

```sh
ghostfunc explain --fake llama-3-70b --model-dtype bfloat16 --ranks 64 --shard --checkpointing \\
    --batch-size 1 --block-size 4096 --tflops 300 --bandwidth 50
```

The step is `val_gradient` of the rank's validation samples, then `value_and_grad_dot` of its train samples along it:
the two-phase schedule, which ranks take. Names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-3-8b, llama-3-70b (their
published sizes; GPT-2 without dropout), or a folder with `config.json`."""

PLANNED = f"""\
**Predicted, not measured.** Memory of a rank in GB (1e9 bytes) at the moment when it holds most, AdamW's two moments
included; *in blocks* is the total with `chunked_causal_lm_loss`. FLOPs: the step with dots over a plain step on the
train samples. Seconds: a model, at {TFLOPS:.0f} TFLOP/s and {BANDWIDTH:.0f} GB/s for each rank, products and
communication one after the other. Where activations are checkpointed, what a backward has run again is in *working*."""

CHECKED = """\
Real steps in float32, one thread, each in a process of its own: by how much the step raises the peak of the process,
and the FLOPs that torch counts."""

CHECKED_RANKS = """\
The same with parameters sharded over gloo processes (plain `DTensor`s, `Shard(0)`); the largest of the ranks. The plan
adds the largest weight whole to the peak, whatever is gathered at that moment, and knows nothing of gloo's buffers."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)])


def error(pair: dict[str, int]) -> str:
    return f"{pair['predicted'] / pair['measured'] - 1:+.1%}"


def plan_rows(plans: Sequence[dict[str, Any]]) -> list[list[str]]:
    parts = ("parameters", "optimizer", "direction", "gradients", "activations", "logits", "working", "gathered")
    rows = []
    for p in plans:
        spread = f"{p['ranks']}, {'sharded' if p['sharded'] else 'replicated'}" if p["ranks"] > 1 else "1"
        batch = f"{p['samples']} + {p['val_samples']} x {p['length']}{', checkpointed' if p['checkpointed'] else ''}"
        memory = [f"{p['memory'][part] / 1e9:.1f}" for part in parts]
        ratio = p["flops"]["dots"] / p["flops"]["plain"]
        seconds = sum(p["seconds"].values())
        rows.append([
            p["model"], p["dtype"], spread, batch, *memory, f"**{p['memory']['total'] / 1e9:.1f}**",
            f"{p['memory_in_blocks'] / 1e9:.1f}", f"{p['flops']['plain'] / 1e12:.0f}", f"{ratio:.2f}",
            f"{p['sent'] / 1e9:.0f}", f"{seconds:.1f} ({p['seconds']['communication']:.1f})",
        ])  # fmt: skip
    return rows


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def page(results: dict[str, Any]) -> str:
    heads = [
        "model", "dtype", "ranks", "samples x tokens of a rank", "parameters", "AdamW", "direction", "gradients",
        "activations", "logits", "working", "gathered", "total", "in blocks", "plain TFLOP", "FLOPs / plain", "GB sent",
        "s (communication)",
    ]  # fmt: skip
    steps = [
        [name, f"{s['parameters'] / 1e6:.0f} M", mebibytes(s["peak"]["measured"]), mebibytes(s["peak"]["predicted"]),
         error(s["peak"]), f"{s['flops']['measured'] / 1e9:.1f}", error(s["flops"])]
        for name, s in results["steps"].items()
    ]  # fmt: skip
    ranks = [
        [name, str(count), mebibytes(s["peak"]["measured"]), mebibytes(s["peak"]["predicted"]), error(s["peak"])]
        for name, by_count in results["shard"].items()
        for count, s in by_count.items()
    ]
    blocks = [
        "# Planning a step", INTRODUCTION,
        "## Three models on meshes", PLANNED, table(heads, plan_rows(results["plans"])),
        "What it assumes:\n\n" + "\n".join(f"- {line}." for line in ASSUMPTIONS),
        "## How far off it was", CHECKED,
        table(["case", "parameters", "MiB measured", "MiB predicted", "off by", "GFLOP counted", "off by"], steps),
        CHECKED_RANKS, table(["case", "ranks", "MiB measured", "MiB predicted", "off by"], ranks),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["plans", "steps", "shard"], default=["plans", "steps", "shard"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        described, *more = arguments.child
        folder, rank, ranks = more or ("", "0", "0")
        child(Case(**json.loads(described)), folder, int(rank), int(ranks))
        return
    if not arguments.page:
        if "plans" in arguments.only:
            measuring.save(arguments.results, {"plans": [row for mesh in MESHES for row in planned(mesh)]})
        if "steps" in arguments.only:
            measuring.save(arguments.results, {"steps": {case.name: checked_step(case) for case in CASES}})
        if "shard" in arguments.only:
            found = {case.name: {str(count): checked_ranks(case, count) for count in RANKS} for case in SHARDED}
            measuring.save(arguments.results, {"shard": found})
    measuring.write(PAGE, page(json.loads(arguments.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
