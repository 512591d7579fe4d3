"""What `run.py` measures: each method prepares a step, which computes its results anew at every call.

A step returns what can be compared between methods: the dot products `[n]` of each train sample's gradient with that of
the mean validation loss, or nothing. Beside the dots, each method that says so computes the mean training gradient too.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import vs_vmap
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from vs_vmap import Workload, plain_gradient
from workloads import both, in_double

import ghostfunc as gf

Numbers = dict[str, Tensor]
Step = Callable[[], Numbers]
RANK = 256
LEARNING_RATE = 1e-3


class Method(NamedTuple):
    """A method and what it gives.

    Attributes:
        label: for readers.
        prepare: what is done once; it gives the step.
        peer: the package that it needs, a key of `peers.REQUIREMENTS`; empty for own methods.
    """

    label: str
    prepare: Callable[[Workload], Step]
    peer: str = ""


# --- own methods ------------------------------------------------------------------------------------------------------


def plain(work: Workload) -> Step:
    return lambda: without_dots(plain_gradient(work, work.train))


def plain_both(work: Workload) -> Step:
    batch = both(work)
    return lambda: without_dots(plain_gradient(work, batch))


def plain_val(work: Workload) -> Step:
    return lambda: without_dots(plain_gradient(work, work.val))


def without_dots(gradient: Any) -> Numbers:
    return {}


def dots(work: Workload) -> Step:
    return lambda: {"dots": vs_vmap.ghostfunc(work).dots}  # pyright: ignore[reportReturnType]


def matrix(work: Workload) -> Step:
    def step() -> Numbers:
        result = gf.value_and_grad_dot(work.model_fn, work.params, work.train, work.val, out="train val")
        return {"dots": result.dots.mean(1)}

    return step


def along(work: Workload) -> Step:
    """One micro-batch: its gradient and its dots with a direction that exists."""
    want = {"dots": gf.Along(plain_gradient(work, work.val))}

    def step() -> Numbers:
        result = gf.ghost_quantities(work.model_fn, work.params, work.train, want=want)
        return {"dots": result["dots"]}

    return step


def norms(work: Workload) -> Step:
    return lambda: without_dots(gf.ghost_quantities(work.model_fn, work.params, work.train, want={"norms": gf.Norm()}))


def clipped(work: Workload) -> Step:
    """Clipped to the median norm."""
    bound = gf.ghost_grad_norm(work.model_fn, work.params, work.train).median().item()
    return lambda: without_dots(gf.ghost_clipped_grad(work.model_fn, work.params, work.train, bound))


def projection(work: Workload) -> Step:
    few = pytree.tree_map(lambda t: t[:1, :8], work.train)
    projected = gf.kronecker_projection(work.model_fn, work.params, few, layers="attn,mlp", rank=RANK)
    return lambda: without_dots(gf.ghost_grad_proj(work.model_fn, work.params, work.train, projected))


def second_order(work: Workload) -> Step:
    def step() -> Numbers:
        result = gf.in_run_values(work.model_fn, work.params, work.train, work.val, lr=LEARNING_RATE, order=2)
        return {"dots": result.first * (work.description["B"] / LEARNING_RATE)}

    return step


def by_vmap(work: Workload) -> Step:
    return lambda: {"dots": vs_vmap.by_vmap(work).dots}  # pyright: ignore[reportReturnType]


def direct(work: Workload) -> Step:
    return lambda: {"dots": vs_vmap.loop(work).dots}  # pyright: ignore[reportReturnType]


def reference(work: Workload) -> Step:
    """The dots in float64, sample by sample, and what their errors are relative to: |g_i| |V|."""
    work = in_double(work)

    def step() -> Numbers:
        direction = plain_gradient(work, work.val)
        found, scales = [], []
        for i in range(work.description["B"]):
            own = plain_gradient(work, pytree.tree_map(lambda t, i=i: t[i : i + 1], work.train))
            found.append(sum(torch.sum(g * direction[name]) for name, g in own.items()))
            scales.append(length(own) * length(direction))
        return {"dots": torch.stack(found), "scales": torch.stack(scales)}

    return step


def length(gradient: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradient.values()]).norm()


# --- peers ------------------------------------------------------------------------------------------------------------


def losses_of(module: nn.Module, batch: Any) -> Tensor:
    """`[B]`: of a language model with a batch of ids, of a classifier with a batch `(x, y)`."""
    if isinstance(batch, dict):
        return gf.causal_lm_loss(module(**batch), batch)
    return gf.classification_loss(module(batch[0]), batch)


def explicit(per_sample: dict[str, Tensor], direction: dict[str, Tensor]) -> Numbers:
    """The dots of explicit per-sample gradients, beside their mean."""
    mean = {name: g.mean(0) for name, g in per_sample.items()}
    found = {"dots": sum(g.flatten(1) @ direction[name].flatten() for name, g in per_sample.items())}
    del mean  # a training step needs it
    return found  # pyright: ignore[reportReturnType]


def opacus(work: Workload) -> Step:
    """Per-sample gradients by its hooks."""
    from opacus.grad_sample import GradSampleModule

    module = copy.deepcopy(work.module)
    wrapped = GradSampleModule(module)

    def step() -> Numbers:
        direction = plain_gradient(work, work.val)
        losses_of(wrapped, work.train).mean().backward()
        found = explicit({name: p.grad_sample for name, p in module.named_parameters()}, direction)  # type: ignore[attr-defined]
        wrapped.zero_grad()
        return found

    return step


def backpack(work: Workload) -> Step:
    """Per-sample gradients by its extension, of the mean loss: divided by the number of samples."""
    import backpack as package  # pyright: ignore[reportMissingImports]
    from backpack.extensions import BatchGrad  # pyright: ignore[reportMissingImports]

    module = package.extend(copy.deepcopy(work.module))
    n = work.description["B"]

    def step() -> Numbers:
        direction = plain_gradient(work, work.val)
        with package.backpack(BatchGrad()):
            losses_of(module, work.train).mean().backward()
        if skipped := [name for name, p in module.named_parameters() if not hasattr(p, "grad_batch")]:
            raise RuntimeError(f"no per-sample gradients of {len(skipped)} parameters, {skipped[0]} among them")
        found = explicit({name: p.grad_batch * n for name, p in module.named_parameters()}, direction)
        for p in module.parameters():
            p.grad = None
            del p.grad_batch
        return found

    return step


def dattri(work: Workload) -> Step:
    """TracIn with one checkpoint and without its projection: the matrix of dots, and no training gradient."""
    from dattri.algorithm.tracin import TracInAttributor  # pyright: ignore[reportMissingImports]
    from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader, TensorDataset

    module = copy.deepcopy(work.module)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        first, *rest = (t[None] for t in batch)
        one = (first, *rest) if rest else {"input_ids": first}
        args, kwargs = ((), one) if isinstance(one, dict) else ((one[0],), {})
        output = torch.func.functional_call(module, params, args, kwargs)
        return (gf.causal_lm_loss if isinstance(one, dict) else gf.classification_loss)(output, one).sum()

    task = AttributionTask(loss_func=loss, model=module, checkpoints=module.state_dict())
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None
    loaders = [
        DataLoader(TensorDataset(*pytree.tree_leaves(batch)), batch_size=len(pytree.tree_leaves(batch)[0]))
        for batch in (work.train, work.val)
    ]
    return lambda: {"dots": attributor.attribute(*loaders).mean(1)}


METHODS = {
    "plain": Method("a plain step", plain),
    "both": Method("a plain step on the concatenated batch", plain_both),
    "val": Method("a plain step on the val batch", plain_val),
    "dots": Method("**ghostfunc**", dots),
    "matrix": Method('`value_and_grad_dot`, `out="train val"`', matrix),
    "along": Method("gradients and dots along a direction that exists", along),
    "norms": Method("gradients and norms", norms),
    "clipped": Method("`ghost_clipped_grad`", clipped),
    "projection": Method("`ghost_grad_proj`", projection),
    "second": Method("second order", second_order),
    "vmap": Method("vmap", by_vmap),
    "direct": Method("a loop over samples", direct),
    "reference": Method("the reference", reference),
    "opacus": Method("Opacus", opacus, "opacus"),
    "backpack": Method("BackPACK", backpack, "backpack"),
    "dattri": Method("dattri (dots alone)", dattri, "dattri"),
}
