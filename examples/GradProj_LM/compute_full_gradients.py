"""The exact full gradients of a run's first samples, by plain backwards, and its stored rows against them.

    python compute_full_gradients.py RUN_FOLDER --num_samples 4

Each sample's gradient becomes `full_gradients/sample-<row>.safetensors` in the run's folder: every parameter's, in the
model's dtype. Ends with an error where a row of a run in float32 is not the projection of the gradient.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared` and this package

import torch
from safetensors.torch import save_file
from torch import Tensor

from ghostfunc.index import Store
from GradProj_LM.gradproj_loop import Run, autocast_of
from GradProj_LM.main import reopen
from shared.options import positive
from shared.training_utils import lm_losses

GRADIENTS = "full_gradients"
# Of a row's norm: what rounding to the stored dtype takes, and the two ways of computing in float32.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 4e-3}


def main(argv: Sequence[str] | None = None) -> float:
    """Compute, save and compare.

    Args:
        argv: the options; None takes those of the command line.

    Returns:
        The worst relative error of a row, |stored - projected| / |projected|.

    Raises:
        SystemExit: if the run cannot be read, its model or data have changed, or a row is wrong.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run of main.py")
    parser.add_argument("--num_samples", type=positive, default=4, help="from the first on; each as large as the model")
    options = parser.parse_args(argv)
    try:
        projector = reopen(options.run)
        store = Store(options.run)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    run, projection = projector.run, projector.engine.projection
    assert projection is not None
    count = min(options.num_samples, store.rows)
    if count == 0:
        parser.exit(2, f"{parser.prog}: error: {options.run} has no rows yet: run main.py first\n")
    rows = store.read(0, count).to(run.device)
    names = store.samples(["sample_id", "domain"]).slice(0, count).to_pylist()
    folder = options.run / GRADIENTS
    folder.mkdir(exist_ok=True)
    errors = []
    for row, (name, gradient) in enumerate(zip(names, full_gradients(run, count), strict=True)):
        save_file(gradient, folder / f"sample-{row:06d}.safetensors", metadata={k: str(v) for k, v in name.items()})
        projected = projection.project(gradient)
        errors.append((rows[row] - projected).norm() / projected.norm())
        print(f"{name['domain']} {name['sample_id']}: the stored row is off by {errors[-1]:.1e} of its norm")
    worst, allowed = torch.stack(errors).max().item(), TOLERANCES[run.options.proj_dtype]
    if run.options.train_dtype != "float32":
        print(f"Not judged: in {run.options.train_dtype}, a batch of one rounds otherwise than one of more.")
    elif not worst <= allowed:  # not >: NaN is no agreement
        parser.exit(1, f"{parser.prog}: error: {worst:.1e} is more than {allowed:.0e}, which rounding explains\n")
    print(f"gradients of {count} samples: {folder}")
    return worst


def full_gradients(run: Run, count: int) -> Iterator[dict[str, Tensor]]:
    """The gradient of each of the first samples' own loss, in evaluation mode, one plain backward each."""
    model = run.model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for block in range(count):
        tokens = run.corpus.in_order(block, block + 1).tokens.to(run.device)  # [1, T]
        with autocast_of(run):
            (loss,) = lm_losses(model, tokens)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        yield {name: g.contiguous() for name, g in zip(parameters, gradients, strict=True)}


if __name__ == "__main__":
    main()
