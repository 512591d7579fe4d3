"""`ghostfunc explain --fake`: what a step of a model takes on every rank, without its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rich.table import Table

from ghostfunc._planning import Memory, StepPlan, plan_step
from ghostfunc.cli._console import results, table
from ghostfunc.cli._fake_models import fake_step

ASSUMPTIONS = (
    "memory is what torch's operations hold, without the allocator's waste, the libraries' workspaces and buffers of "
    "communication; attention is causal and fused",
    "parameters, gradients, the direction and AdamW's two moments are all of the parameters' dtype (no float32 master "
    "copy), and AdamW steps in place",
    "a rank sends what ring algorithms send; gathers wait, so that no communication is hidden behind products",
    "time is all products at one rate, those of contractions, which are float32, included; then bytes at another: a "
    "model, no measurement",
)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Mesh(NamedTuple):
    """Ranks and what one of them can do.

    Attributes:
        ranks: how many.
        sharded: whether parameters are spread over them.
        tflops: what a rank computes in a second, its peak times its utilisation, in 1e12; None where no time is wanted.
        bandwidth: what it sends in a second, in 1e9 bytes.
        chunked: whether the loss is `chunked_causal_lm_loss`.
    """

    ranks: int
    sharded: bool
    tflops: float | None
    bandwidth: float
    chunked: bool


def plan_of(
    model: str, dtype: str, samples: tuple[int, int], length: int, device: str, *, checkpointed: bool
) -> StepPlan:
    """The plan of a language model's step; its loss has logits.

    Raises:
        ValueError: if the dtype or the model is unknown.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--model-dtype {dtype} is none of {', '.join(_DTYPES)}")
    model_fn, params, train, val, vocabulary = fake_step(
        model, _DTYPES[dtype], samples, length, checkpointed=checkpointed
    )
    return plan_step(model_fn, params, train, val, vocabulary=vocabulary, device=device)


def as_json(plan: StepPlan, mesh: Mesh) -> dict[str, Any]:
    """A plan on a mesh: bytes, FLOPs and seconds of one rank, and what they assume."""
    memory = _memory(plan, mesh)
    seconds = _seconds(plan, mesh)
    return {
        "parameters": plan.parameters,
        "samples": plan.samples,
        "val_samples": plan.val_samples,
        "ranks": mesh.ranks,
        "sharded": mesh.sharded,
        "memory": {**memory._asdict(), "total": memory.total},
        "flops": {"plain": plan.plain_flops, "dots": plan.flops},
        "bytes_sent": plan.traffic(mesh.ranks, sharded=mesh.sharded),
        "seconds": None if seconds is None else {**seconds._asdict(), "total": seconds.total},
        "assumptions": list(ASSUMPTIONS),
    }


def print_plan(model: str, plan: StepPlan, mesh: Mesh) -> None:
    """A plan on a mesh, for people."""
    spread = "sharded over" if mesh.sharded else "replicated on"
    ranks = "1 rank" if mesh.ranks == 1 else f"{mesh.ranks} ranks"
    print(f"{model}: {plan.parameters:,} parameters, {spread} {ranks}")
    print(f"a rank's step: {plan.samples} train and {plan.val_samples} val samples, two-phase")
    results().print(_memory_table(_memory(plan, mesh)))
    ratio = plan.flops / max(1, plan.plain_flops)
    print(f"TFLOP: plain step {plan.plain_flops / 1e12:.4g}, with dots {plan.flops / 1e12:.4g} ({ratio:.3f})")
    print(f"GB sent by a rank: {plan.traffic(mesh.ranks, sharded=mesh.sharded) / 1e9:.4g}")
    if (seconds := _seconds(plan, mesh)) is not None:
        parts = f"{seconds.compute:.3g} products, {seconds.communication:.3g} communication"
        print(f"seconds, modelled: {seconds.total:.3g} ({parts})")
    print("assumed: " + ";\n  ".join(ASSUMPTIONS))


def _memory_table(memory: Memory) -> Table:
    rows = [(f"{size / 1e9:.3f}", part) for part, size in memory._asdict().items() if size]
    rows.append((f"{memory.total / 1e9:.3f}", "total"))
    return table("memory of a rank at its peak", [("GB", "right"), ("", "left")], rows)


def _memory(plan: StepPlan, mesh: Mesh) -> Memory:
    return plan.memory(mesh.ranks, sharded=mesh.sharded, blocks_of_logits=mesh.chunked)


def _seconds(plan: StepPlan, mesh: Mesh) -> Any:
    if mesh.tflops is None:
        return None
    how = {"flops": mesh.tflops * 1e12, "bandwidth": mesh.bandwidth * 1e9}
    return plan.seconds(mesh.ranks, sharded=mesh.sharded, **how)
