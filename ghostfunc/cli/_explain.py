"""`ghostfunc explain`: the plan for a model, with its weights or without, or what an index is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

import ghostfunc as gf
from ghostfunc._explain import Plan
from ghostfunc.cli import _explain_fake as fakes
from ghostfunc.cli import _options as options
from ghostfunc.cli._console import print_json, stdout_is_for_results
from ghostfunc.cli._describe import describe, print_description
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._library import Opened, open_model, to_device, tokenizer_of
from ghostfunc.index import Store
from ghostfunc.text import open_corpus

_MESH = "Without weights"


class _Settings(NamedTuple):
    model: str
    data: str | None
    batch_size: int
    block_size: int
    layers: str
    tokenizer: str | None
    model_dtype: str
    device: str


@ends_well(resumable=False)
def explain(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|FOLDER", show_default=False, help="A model, or the folder of an index.")
    ],
    batch_size: Annotated[
        int, options.option(options.DATA, "Samples of the batch.", default=4, min=1, metavar="N")
    ] = 4,
    block_size: Annotated[
        int, options.option(options.DATA, "Tokens of a sample at most.", default=128, min=1, metavar="TOKENS")
    ] = 128,
    data: Annotated[
        str | None,
        options.option(options.DATA, "Take the batch from this corpus, not random tokens.", "--data", metavar="DATA"),
    ] = None,
    layers: Annotated[
        str, options.option(options.MODEL, "Parts of parameter names, between commas; all if not given.", metavar="A,B")
    ] = "",
    tokenizer: options.Tokenizer = None,
    model_dtype: options.ModelDtype = None,
    device: options.Device = None,
    fake: Annotated[
        bool,
        options.option(
            _MESH,
            "Plan a training step with dots of gpt2-xl, llama-3-8b, llama-3-70b, ..., or of a "
            "folder's config.json: memory, FLOPs and traffic of a rank.",
            "--fake",
        ),
    ] = False,
    val_batch_size: Annotated[
        int, options.option(_MESH, "Validation samples of a rank.", default=1, min=1, metavar="N")
    ] = 1,
    ranks: Annotated[int, options.option(_MESH, "Ranks; batches are one rank's.", default=1, min=1, metavar="N")] = 1,
    shard: Annotated[bool, options.option(_MESH, "Parameters are sharded over the ranks.", "--shard")] = False,
    checkpointing: Annotated[bool, options.option(_MESH, "Activations are checkpointed.", "--checkpointing")] = False,
    chunked_loss: Annotated[
        bool, options.option(_MESH, "The loss is chunked_causal_lm_loss: logits in blocks.", "--chunked-loss")
    ] = False,
    tflops: Annotated[
        float | None,
        options.option(
            _MESH, "TFLOP/s of a rank (peak times utilisation), for a modelled time.", min=1e-6, metavar="TFLOPS"
        ),
    ] = None,
    bandwidth: Annotated[
        float, options.option(_MESH, "GB/s that a rank sends.", default=50.0, min=1e-6, metavar="GBS")
    ] = 50.0,
    json: options.Json = False,
) -> None:
    """Show what ghostfunc does with a model, what a step of it would take, or what an index holds.

    For a model: each use of each parameter, its rule, its contraction, its FLOPs and memory, for a batch of that size.
    With --fake: the memory, FLOPs and traffic of a step on every rank, for a model of any size, without its weights.
    For the folder of an index: its model, projection, data, and whether it is complete.

    Examples:
        ghostfunc explain gpt2 --batch-size 8 --block-size 1024
        ghostfunc explain --fake llama-3-70b --model-dtype bfloat16 --ranks 64 --shard --checkpointing --block-size 4096
        ghostfunc explain checkpoints/run-3 --data corpus.jsonl --layers mlp
        ghostfunc explain my-index --json
    """
    if fake:
        if data is not None or layers:
            raise ValueError("--fake plans a whole model on random tokens: leave --data and --layers out")
        mesh = fakes.Mesh(ranks, shard, tflops, bandwidth, chunked_loss)
        sizes = (batch_size, val_batch_size), block_size
        with stdout_is_for_results():
            of_step = fakes.plan_of(
                target, model_dtype or "float32", *sizes, device or "cuda", checkpointed=checkpointing
            )
        return print_json(fakes.as_json(of_step, mesh)) if json else fakes.print_plan(target, of_step, mesh)
    if (Path(target) / "manifest.json").exists():
        described = describe(Store(target))
        return print_json(described) if json else print_description(described)
    with stdout_is_for_results():
        settings = _Settings(
            target, data, batch_size, block_size, layers, tokenizer, model_dtype or "float32", device or "auto"
        )
        plan = _plan(settings)
    if json:
        print_json(as_json(plan))
    else:
        print(plan)


def _plan(settings: _Settings) -> Plan:
    opened = open_model(settings.model, dtype=settings.model_dtype, device=settings.device)
    batch = _random_batch(opened, settings) if settings.data is None else _first_batch(opened, settings)
    return gf.explain(opened.model_fn, opened.params, to_device(batch, opened.device), layers=settings.layers)


def _random_batch(opened: Opened, settings: _Settings) -> dict[str, Tensor]:
    positions = getattr(opened.model.module.config, "max_position_embeddings", None)
    longest = min(settings.block_size, positions or settings.block_size)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(opened.model.vocab_size, (settings.batch_size, longest), generator=seeded)
    return {"input_ids": ids}


def _first_batch(opened: Opened, settings: _Settings) -> dict[str, Tensor]:
    corpus = open_corpus(
        str(settings.data),
        tokenizer=tokenizer_of(opened, settings.tokenizer),
        block_size=settings.block_size,
        limit=settings.batch_size,
    )
    return corpus.batch(range(len(corpus)))


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: its fields, and the sums that its text ends with."""
    return {**asdict(plan), "flops": plan.flops, "coverage": plan.coverage}
