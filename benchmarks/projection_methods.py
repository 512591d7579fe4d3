"""The ways of projecting per-sample gradients that `projection.py` compares; and a worker, which runs one of them.

A way is a function that prepares a workload and gives a step; each call of the step forms the projections of the batch
anew. What a way covers, it says itself: the parameters whose gradients are in its rows.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import vs_vmap
from torch import Tensor, nn

import ghostfunc as gf

RANK = 256
SIDE = 16  # of peers that take the same rank on both sides
LAYERS = "attn,mlp"
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SIZES: dict[str, dict[str, int]] = {
    "gpt2-small": {
        "layers": 12, "heads": 12, "width": 768, "vocabulary": 50257, "samples": 4, "positions": 256, "trak": 8
    },
    "tiny": {"layers": 2, "heads": 2, "width": 32, "vocabulary": 211, "samples": 4, "positions": 16, "trak": 64},
}  # fmt: skip


class Work(NamedTuple):
    """A language model and a batch.

    Attributes:
        module: in eval mode, without dropout.
        ids: `[B, T]`.
        size: a row of `SIZES`.
    """

    module: Any
    ids: Tensor
    size: dict[str, int]

    @property
    def layers(self) -> list[str]:
        """The modules whose weights are projected."""
        return [f"transformer.h.{i}.{kind}" for i in range(self.size["layers"]) for kind in KINDS]


class Way(NamedTuple):
    """A prepared way.

    Attributes:
        step: forms the rows `[B, k]`, or None for a step that projects nothing.
        covers: the parameters whose gradients are in the rows.
        notes: what a reader has to know.
    """

    step: Callable[[], Tensor | None]
    covers: list[str]
    notes: dict[str, Any]


def build(size: str) -> Work:
    """Weights and token ids at random, always the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    of = SIZES[size]
    config = GPT2Config(
        n_layer=of["layers"], n_head=of["heads"], n_embd=of["width"], vocab_size=of["vocabulary"],
        n_positions=of["positions"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    return Work(module, torch.randint(of["vocabulary"], (of["samples"], of["positions"])), of)


def losses_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Each sample's mean loss over its positions, `[B]`."""
    return gf.causal_lm_loss(module(input_ids=ids), {"input_ids": ids})


def weights_of(work: Work) -> list[str]:
    return [f"{layer}.weight" for layer in work.layers]


# --- own ways ---------------------------------------------------------------------------------------------------------


def plain(work: Work) -> Way:
    """A training step: forward, and backward to every parameter."""

    def step() -> None:
        torch.autograd.grad(losses_of(work.module, work.ids).mean(), list(work.module.parameters()))

    return Way(step, [], {})


def floor(work: Work) -> Way:
    """Forward, and the gradients of activations down to the lowest layer: what no projection can do without."""
    work.module.requires_grad_(False)
    lowest: list[Tensor] = []
    work.module.get_submodule(work.layers[0]).register_forward_hook(
        lambda module, inputs, output: lowest.append(output.requires_grad_())
    )

    def step() -> None:
        lowest.clear()
        torch.autograd.grad(losses_of(work.module, work.ids).sum(), lowest)

    return Way(step, [], {})


def own_projection(work: Work) -> tuple[Any, dict[str, Tensor], gf.KroneckerProjection]:
    """The model as a function, its parameters, and a projection of them; a few tokens show how they are used."""
    model_fn, params = gf.functionalize(work.module, gf.causal_lm_loss)
    few = {"input_ids": work.ids[:1, :8]}
    return model_fn, params, gf.kronecker_projection(model_fn, params, few, layers=LAYERS, rank=RANK)


def ghostfunc(work: Work) -> Way:
    """`ghost_grad_proj`."""
    model_fn, params, projection = own_projection(work)
    batch = {"input_ids": work.ids}
    return Way(lambda: gf.ghost_grad_proj(model_fn, params, batch, projection), list(projection.slices), {})


def hooks(work: Work) -> Way:
    """A training step whose layers keep their inputs, and project them and their grad-outputs in the backward."""
    _, _, projection = own_projection(work)
    names = weights_of(work)
    rows: dict[str, Tensor] = {}

    def forward_hook(name: str, a: Tensor, output: Tensor) -> None:
        p_in, p_out = projection.matrices(name)

        def backward_hook(g: Tensor) -> None:
            rows[name] = ((a @ p_in).mT @ (g @ p_out)).flatten(1)

        output.register_hook(backward_hook)

    for name in names:
        module = work.module.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(
            lambda _, inputs, output, name=name: forward_hook(name, inputs[0].detach(), output)
        )

    def step() -> Tensor:
        torch.autograd.grad(losses_of(work.module, work.ids).sum(), list(work.module.parameters()))
        return torch.cat([rows[name] for name in projection.slices], 1)

    return Way(step, names, {})


# --- peers ------------------------------------------------------------------------------------------------------------


def bergson(work: Work) -> Way:
    """Bergson's collector in memory, on the model as Bergson prepares it."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector  # pyright: ignore[reportMissingImports]
    from datasets import Dataset

    work.module.requires_grad_(False)
    work.module.get_input_embeddings().requires_grad_(True)
    config = IndexConfig(run_path=str(Path(tempfile.mkdtemp()) / "run"), projection_dim=SIDE, loss_reduction="mean")
    config.partial_run_path.mkdir()
    data = Dataset.from_dict({"input_ids": work.ids.tolist()})
    collector = InMemoryCollector(
        model=work.module.base_model, data=data, cfg=config, processor=GradientProcessor(projection_dim=SIDE)
    )
    every = [list(range(len(work.ids)))]
    computer = CollectorComputer(model=work.module, data=data, collector=collector, batches=every, cfg=config)

    def step() -> Tensor:
        computer.run_with_collector_hooks()
        return torch.cat(list(collector.gradients.values()), 1).clone()

    covers = [f"transformer.{name}.weight" for name in collector.target_info]
    return Way(step, covers, {})


def as_linear(module: Any, layers: list[str]) -> None:
    """Replace each `Conv1D` by an `nn.Linear` of the same weights."""
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        old = module.get_submodule(layer)
        new = nn.Linear(*old.weight.shape)
        new.weight, new.bias = nn.Parameter(old.weight.detach().t().contiguous()), old.bias
        setattr(module.get_submodule(parent), name, new)


def dattri(work: Work) -> Way:
    """LoGra of dattri, whose layers have to be `nn.Linear`."""
    from dattri.algorithm.logra import LoGraAttributor  # pyright: ignore[reportMissingImports]
    from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    found = [name for name, module in work.module.named_modules() if isinstance(module, nn.Linear)]
    as_linear(work.module, work.layers)

    def loss(module: nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
        return losses_of(module, batch["input_ids"].to(device)).sum()

    task = AttributionTask(loss_func=loss, model=work.module, checkpoints=work.module.state_dict())
    attributor = LoGraAttributor(
        task, layer_names=work.layers, hessian="Identity", proj_dim=RANK, offload="none", cache_dir=tempfile.mkdtemp()
    )
    samples: Any = [{"input_ids": row} for row in work.ids]
    loader = DataLoader(samples, batch_size=len(work.ids))

    def step() -> Tensor:
        attributor.cache(loader)
        return torch.cat(attributor.offload_manager.retrieve_gradients(0), 1)

    covers = [f"{layer}.{kind}" for layer in work.layers for kind in ("weight", "bias")]
    return Way(step, covers, {"layers found without the change": found})


def trak(work: Work) -> Way:
    """TRAK's featurizer, with the projector that it has for a CPU."""
    from trak import TRAKer  # pyright: ignore[reportMissingImports]
    from trak.modelout_functions import AbstractModelOutput  # pyright: ignore[reportMissingImports]
    from trak.projectors import BasicProjector, ProjectionType  # pyright: ignore[reportMissingImports]

    class Loss(AbstractModelOutput):
        def __init__(self) -> None: ...

        @staticmethod
        def get_output(model: nn.Module, weights: dict, buffers: dict, ids: Tensor) -> Tensor:
            output = torch.func.functional_call(model, (weights, buffers), kwargs={"input_ids": ids[None]})
            return gf.causal_lm_loss(output, {"input_ids": ids[None]}).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: dict, buffers: dict, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    names, dim = weights_of(work), work.size["trak"]
    entries = sum(work.module.get_parameter(name).numel() for name in names)
    projector = BasicProjector(entries, dim, 0, ProjectionType.normal, torch.device("cpu"), block_size=dim // 2)
    traker = TRAKer(
        work.module, Loss(), train_set_size=len(work.ids), save_dir=tempfile.mkdtemp(), device="cpu",
        projector=projector, proj_dim=dim, use_half_precision=False, grad_wrt=names, load_from_save_dir=False,
    )  # fmt: skip
    traker.load_checkpoint(work.module.state_dict(), model_id=0)

    def step() -> Tensor:
        traker.saver.current_store["is_featurized"][:] = 0  # it would skip samples that it has
        traker.featurize((work.ids,), inds=np.arange(len(work.ids)))
        return torch.from_numpy(np.array(traker.saver.current_store["grads"]))

    return Way(step, names, {})


OWN = {"plain": plain, "floor": floor, "ghostfunc": ghostfunc, "hooks": hooks}
PEERS = {"bergson": bergson, "dattri": dattri, "trak": trak}
WAYS: dict[str, Callable[[Work], Way]] = {**OWN, **PEERS}


# --- the worker -------------------------------------------------------------------------------------------------------


def first_call(name: str, size: str) -> tuple[Way, Tensor | None, dict[str, int]]:
    """A way, its rows, and memory: what the process holds before the call, and by how much this raises the peak."""
    WAYS[name](build("tiny")).step()  # what is imported at a first call is no part of a step
    way = WAYS[name](build(size))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is that of now
    before = vs_vmap.resident("VmRSS")
    rows = way.step()
    return way, rows, {"held_bytes": before, "peak_bytes": vs_vmap.resident("VmHWM") - before}


def flops(name: str, size: str) -> int:
    """Of one sample."""
    work = build(size)
    step = WAYS[name](work._replace(ids=work.ids[:1])).step
    step()
    return vs_vmap.flops(step)


def serve(name: str, size: str, folder: Path, channel: Any) -> None:
    """Tell what the first call gave, then run and time a step for each line of standard input."""
    way, rows, memory = first_call(name, size)
    if rows is not None:
        np.save(folder / f"{name}.npy", rows.detach().numpy(), allow_pickle=False)
    shape = None if rows is None else list(rows.shape)
    count = flops(name, size)
    gc.collect()  # models, which have cycles
    told = {**memory, "flops_of_one_sample": count, "covers": way.covers, "shape": shape, "notes": way.notes}
    del rows
    print(json.dumps(told), file=channel, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        way.step()
        print(json.dumps({"seconds": time.perf_counter() - start}), file=channel, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WAYS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with os.fdopen(os.dup(1), "w") as channel:  # what a peer prints goes to standard error
        os.dup2(2, 1)
        serve(arguments.name, arguments.size, arguments.folder, channel)


if __name__ == "__main__":
    main()
