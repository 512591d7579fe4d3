"""Projections of every training sample's gradient while an MLP trains, and three ways to look at them.

    python examples/ghost_gradproj_mlp.py --mode project       # stores them, and draws what they keep of inner products
    python examples/ghost_gradproj_mlp.py --mode non_interf    # is training the same with and without, bit for bit?
    python examples/ghost_gradproj_mlp.py --mode naive_check   # are they the gradients of single samples, projected?

The last two end with a status other than 0 where the answer is no.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.index import Store, StoreError

PROJ_DIR = Path(__file__).resolve().parents[1] / "results" / "ghost_gradproj_mlp"
CLASSES, FEATURES, WIDTH = 4, 32, 64
LEARNING_RATE = 1e-3
# What storing rounds away of a row, relative to its norm, and for float32 what sums in another order differ by.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}
POINTS, DIAGONAL = "#0072B2", "#D55E00"
Batch = tuple[Tensor, Tensor]  # x [B, FEATURES], y [B]


class MLP(nn.Module):
    """Three layers under the name `fc`, and a head. Dropout makes the training depend on torch's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, FEATURES] -> [B, CLASSES]`."""
        for layer in self.fc:
            x = self.dropout(layer(x).relu())
        return self.head(x)


class Trained(NamedTuple):
    """All that a training leaves behind, as bytes: losses, parameters, the optimizer's state, the random numbers."""

    losses: list[float]
    left_behind: dict[str, bytes]


# --- training ---------------------------------------------------------------------------------------------------------


def fresh_model(args: argparse.Namespace) -> MLP:
    """The model that a training starts from."""
    torch.manual_seed(args.seed)
    return MLP()


def batches(args: argparse.Namespace, steps: int) -> Iterator[Batch]:
    """Points around the centres of their classes, from a generator of their own; a tenth has a wrong label."""
    generator = torch.Generator().manual_seed(args.seed)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    for _ in range(steps):
        y = torch.randint(CLASSES, (args.batch_size,), generator=generator)
        x = centres[y] + 2 * torch.randn(args.batch_size, FEATURES, generator=generator)
        wrong = torch.rand(args.batch_size, generator=generator) < 0.1
        yield x, torch.where(wrong, (y + 1) % CLASSES, y)


def train(model: MLP, args: argparse.Namespace, steps: int, watch: Callable[[int, Batch], object]) -> Trained:
    """An ordinary training loop, which tells `watch` of each step and its batch before it is made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step, (x, y) in enumerate(batches(args, steps)):
        watch(step, (x, y))
        loss = gf.classification_loss(model(x), (x, y)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    left_behind: dict[str, Tensor] = dict(model.named_parameters())
    for name, p in model.named_parameters():
        left_behind |= {f"the optimizer's {key} of {name}": value for key, value in optimizer.state[p].items()}
    left_behind["the random numbers that come next"] = torch.get_rng_state()
    return Trained(losses, {what: t.detach().numpy().tobytes() for what, t in left_behind.items()})


def engine_of(model: MLP, args: argparse.Namespace, proj_dir: Path) -> gf.GradProjEngine:
    """The engine with the options of the command line."""
    return gf.GradProjEngine(
        model,
        loss=gf.classification_loss,
        proj_layers=args.proj_layers,
        proj_rank_total=args.proj_rank_total,
        proj_rank_min=args.proj_rank_min,
        proj_seed=args.proj_seed,
        proj_dtype=args.proj_dtype,
        proj_dir=proj_dir,
        proj_save_interval=args.proj_save_interval,
        config={"seed": args.seed, "batch_size": args.batch_size},
    )


# --- project ----------------------------------------------------------------------------------------------------------


def project(args: argparse.Namespace) -> None:
    """Store the projections of every batch, then draw those of the last `test_steps` batches against the exact."""
    model, exact = fresh_model(args), []
    engine = engine_of(model, args, args.proj_dir)
    engine.attach(next(batches(args, 1)))
    print(engine.projection)
    if engine.rows_written:
        print(f"\n{args.proj_dir} has {engine.rows_written} rows of this training, which are kept.")

    def watch(step: int, batch: Batch) -> None:
        if step * args.batch_size >= engine.rows_written:
            engine.collect_batch(batch)
        if step >= args.num_steps - args.test_steps:
            exact.append(exact_rows(engine, batch))

    losses = train(model, args, args.num_steps, watch).losses
    engine.detach()
    print(f"\nTrained {args.num_steps} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    store = Store(args.proj_dir)
    print(f"{args.proj_dir}: {store.rows} rows of {store.dim} numbers, {store.dtype}")
    stop = args.num_steps * args.batch_size
    rows = torch.cat(exact)
    found = store.read(stop - len(rows), stop)
    path = args.proj_dir / "inner_products.png"
    pearson = draw(
        rows, found, path, f"rank {args.proj_rank_total} per layer: {rows.shape[1]:,} numbers to {store.dim}"
    )
    print(f"Inner products of {len(rows)} samples, projected against exact: correlation {pearson:.3f}; {path}")


def exact_rows(engine: gf.GradProjEngine, batch: Batch) -> Tensor:
    """The gradients of single samples in the layers that are projected, `[B, numbers]`, nothing projected."""
    with evaluating(engine.module):
        model_fn, params = gf.functionalize(engine.module, gf.classification_loss)
        grads = gf.per_sample_grad(model_fn, params, batch)
    assert engine.projection is not None
    return torch.cat([grads[name].flatten(1) for name in engine.projection.slices], 1)


def draw(exact: Tensor, projected: Tensor, path: Path, title: str) -> float:
    """Draw inner products of all pairs, and give their correlation.

    Args:
        exact: `[n, numbers]`.
        projected: `[n, k]`.
        path: the PNG.
        title: over the picture.
    """
    pairs = torch.triu_indices(len(exact), len(exact), offset=1)
    of_pairs = [(rows @ rows.T)[pairs[0], pairs[1]] for rows in (exact, projected)]
    norms = [rows.square().sum(1) for rows in (exact, projected)]
    pearson = torch.corrcoef(torch.stack(of_pairs))[0, 1].item()
    figure = Figure(figsize=(5.6, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*of_pairs, s=6, alpha=0.35, linewidths=0, color=POINTS, label="two samples")
    axes.scatter(*norms, s=14, marker="x", linewidths=0.8, color=DIAGONAL, label="a sample with itself")
    low, high = (getattr(torch.cat([*of_pairs, *norms]), end)().item() for end in ("min", "max"))
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, label="equal")
    smallest = math.floor(math.log10(norms[0].median().item()))  # below this power of ten the axes are linear
    powers = [10.0**power for power in range(smallest, math.ceil(math.log10(high)) + 1)]
    ticks = [*(-power for power in reversed(powers)), 0, *powers]
    axes.set_xscale("symlog", linthresh=powers[0])
    axes.set_yscale("symlog", linthresh=powers[0])
    axes.set(xticks=ticks, yticks=ticks)
    axes.set(xlabel="exact inner product of gradients", ylabel="inner product of projections")
    axes.set_title(f"{title}\ncorrelation over pairs {pearson:.3f}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)
    return pearson


# --- non_interf -------------------------------------------------------------------------------------------------------


def non_interf(args: argparse.Namespace) -> None:
    """Train `test_steps` steps with and without projections, and compare all that the trainings leave behind.

    Raises:
        SystemExit: if any bit of it differs.
    """
    without = train(fresh_model(args), args, args.test_steps, lambda step, batch: None)
    with tempfile.TemporaryDirectory() as folder:
        model = fresh_model(args)
        engine = engine_of(model, args, Path(folder))
        beside = train(model, args, args.test_steps, lambda step, batch: engine.collect_batch(batch))
        engine.detach()
        rows = Store(folder).rows
    differ = [what for what, value in without.left_behind.items() if value != beside.left_behind[what]]
    if without.losses != beside.losses:
        differ.append("the losses")
    if differ:
        sys.exit(
            f"FAILED: projections change the training. Different after {args.test_steps} steps: {', '.join(differ)}"
        )
    print(
        f"passed: after {args.test_steps} steps and {rows} stored rows, losses, parameters, the optimizer's state and "
        "random numbers are bit for bit the same with projections and without"
    )


# --- naive_check ------------------------------------------------------------------------------------------------------


def naive_check(args: argparse.Namespace) -> None:
    """Compare stored rows with P_in^T G P_out of every sample's gradient G, from a backward of that sample alone.

    Raises:
        SystemExit: if a row differs by more than rounding.
    """
    model, expected = fresh_model(args), []
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(model, args, Path(folder))

        def watch(step: int, batch: Batch) -> None:
            engine.collect_batch(batch)
            expected.append(naive_rows(engine, batch))

        train(model, args, args.test_steps, watch)
        engine.detach()
        found = Store(folder).read(0, args.test_steps * args.batch_size)
    rows = torch.cat(expected)
    errors = (found - rows).norm(dim=1) / rows.norm(dim=1)
    worst, tolerance = int(errors.argmax()), TOLERANCE[args.proj_dtype]
    what = f"relative error {errors[worst]:.1e} (sample {worst}); {tolerance:.1e} is allowed for {args.proj_dtype}"
    if not bool((errors <= tolerance).all()):
        sys.exit(f"FAILED: projections are not those of single samples' gradients: {what}")
    print(f"passed: {len(rows)} stored rows are the projected gradients of single samples: {what}")


def naive_rows(engine: gf.GradProjEngine, batch: Batch) -> Tensor:
    """P_in^T G P_out of each sample, side by side, `[B, k]`; the weight of a linear map has the shape of G^T."""
    x, y = batch
    assert engine.projection is not None
    weights = {name: p for name, p in engine.module.named_parameters() if name in engine.projection.slices}
    vectors = [name for name, p in weights.items() if p.dim() != 2]
    if vectors:
        sys.exit(f"naive_check is about the weights of linear maps, and --proj_layers chose {', '.join(vectors)}.")
    rows = []
    with evaluating(engine.module):
        for b in range(len(x)):
            one = x[b : b + 1], y[b : b + 1]
            loss = gf.classification_loss(engine.module(one[0]), one)  # [1]
            grads = torch.autograd.grad(loss[0], list(weights.values()))
            of_layers = []
            for name, grad in zip(weights, grads, strict=True):
                p_in, p_out = engine.projection.matrices(name)
                of_layers.append((p_in.T @ grad.T @ p_out).flatten())  # [k_in * k_out]
            rows.append(torch.cat(of_layers))
    return torch.stack(rows)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, as projections are."""
    model.eval()
    try:
        yield
    finally:
        model.train()


# --- command line -----------------------------------------------------------------------------------------------------

MODES = {"project": project, "non_interf": non_interf, "naive_check": naive_check}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mode", choices=MODES, default="project")
    options.add_argument("--proj_layers", default="fc", help="comma-separated parts of names, matched at dots")
    options.add_argument("--proj_rank_total", type=int, default=64, help="about how many numbers a layer becomes")
    options.add_argument("--proj_rank_min", type=int, default=4, help="the least rank of either side")
    options.add_argument("--proj_seed", type=int, default=42, help="of the projection's matrices")
    options.add_argument("--proj_dtype", choices=TOLERANCE, default="float32", help="of the stored rows")
    options.add_argument("--proj_dir", type=Path, default=PROJ_DIR, help="the store of --mode project")
    options.add_argument("--proj_save_interval", type=int, default=1, help="write after so many batches")
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--num_steps", type=int, default=100, help="of --mode project")
    options.add_argument("--test_steps", type=int, default=10, help="steps that are compared")
    options.add_argument("--seed", type=int, default=1234, help="of the data and the training")
    return options


def main() -> None:
    """Run the mode that is asked for."""
    args = parser().parse_args()
    for name in ("batch_size", "num_steps", "test_steps"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name} {getattr(args, name)}: expected 1 or more.")
    args.test_steps = min(args.test_steps, args.num_steps) if args.mode == "project" else args.test_steps
    try:
        MODES[args.mode](args)
    except (ValueError, StoreError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
