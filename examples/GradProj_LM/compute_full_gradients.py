"""The exact full gradients of a run's first samples, by plain backwards, and its stored rows against them.

    python compute_full_gradients.py RUN_FOLDER --num_samples 4

Each sample's gradient becomes `full_gradients/sample-<row>.safetensors` in the run's folder: every parameter's, in the
model's dtype. Ends with an error where a row of a run in float32 is not the projection of the gradient. Under torchrun
processes take the samples in turns.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared` and this package

import torch
from safetensors.torch import save_file
from torch import Tensor

from ghostfunc import RankFailed
from ghostfunc.index import Store
from GradProj_LM.gradproj_loop import Projector, Run, autocast_of
from GradProj_LM.main import prepare, recorded
from shared.distributed import launched
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
    asked = parser.parse_args(argv)
    try:
        options = recorded(asked.run)
        with launched(options.device, options.timeout) as launch:
            errors = compare(prepare(options, launch), asked.num_samples)
            worst, allowed = torch.tensor(errors).max().item(), TOLERANCES[options.proj_dtype]
            if options.train_dtype != "float32":
                print(f"Not judged: in {options.train_dtype}, a batch of one rounds otherwise than one of more.")
            elif not worst <= allowed:  # not >: NaN is no agreement
                parser.exit(
                    1, f"{parser.prog}: error: {worst:.1e} is more than {allowed:.0e}, which rounding explains\n"
                )
            print(f"gradients of {len(errors)} samples: {asked.run / GRADIENTS}")
    except (ImportError, OSError, ValueError, RankFailed) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return worst


def compare(projector: Projector, samples: int) -> list[float]:
    """Save the gradients of the first samples, one for each process at a time, and print how far rows are off.

    Args:
        projector: of the run.
        samples: how many, at most those of the run.

    Returns:
        The relative errors of their rows.

    Raises:
        StoreError: if a row is yet to be written; a ValueError where another process raised.
    """
    run, projection = projector.run, projector.engine.projection
    assert projection is not None
    count, launch = min(samples, run.samples), run.launch
    with launch.together():
        store = Store(run.folder)
        rows = store.read(0, count).to(launch.device)
        names = store.sample_rows(range(count), ["sample_id", "domain"]).select(["sample_id", "domain"]).to_pylist()
        (run.folder / GRADIENTS).mkdir(exist_ok=True)
    errors: list[float] = []
    for first in range(0, count, launch.size):
        found = None
        with launch.together():
            if (row := first + launch.rank) < count:
                gradient = full_gradient(run, row)
                described = {name: str(value) for name, value in names[row].items()}
                save_file(gradient, run.folder / GRADIENTS / f"sample-{row:06d}.safetensors", metadata=described)
                projected = projection.project(gradient)
                found = ((rows[row] - projected).norm() / projected.norm()).item()
        for error in launch.gathered(found)[: count - first]:
            name = names[len(errors)]
            print(f"{name['domain']} {name['sample_id']}: the stored row is off by {error:.1e} of its norm")
            errors.append(error)
    return errors


def full_gradient(run: Run, block: int) -> dict[str, Tensor]:
    """The gradient of a sample's own loss, in evaluation mode, by one plain backward."""
    model = run.model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = run.corpus.in_order(block, block + 1).tokens.to(run.launch.device)  # [1, T]
    with autocast_of(run):
        (loss,) = lm_losses(model, tokens)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: g.contiguous() for name, g in zip(parameters, gradients, strict=True)}


if __name__ == "__main__":
    main()
