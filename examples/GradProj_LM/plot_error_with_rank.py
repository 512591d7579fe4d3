"""How far inner products of projected gradients are from those of the gradients, against the rank.

    python compute_full_gradients.py RUN_FOLDER --num_samples 8
    python plot_error_with_rank.py RUN_FOLDER

Writes `error_with_rank.png`, `.csv` and `.json` into the run's folder. The gradients are those that
compute_full_gradients.py has left there, of the layers that the run projects; no run is made for any rank.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared` and this package

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor

import ghostfunc as gf
from GradProj_LM.compute_full_gradients import GRADIENTS
from GradProj_LM.gradproj_loop import Run
from GradProj_LM.main import prepare, recorded
from shared.distributed import launched
from shared.options import natural, positive
from shared.utils import write_whole

COLOURS = {"gaussian": "tab:blue", "orthonormal": "tab:orange"}
COLUMNS = ("kind", "rank", "dim", "seed", "rms_error", "p95_error")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write and draw.

    Args:
        argv: the options; None takes those of the command line.

    Returns:
        A row for each kind, rank and seed, with `COLUMNS`.

    Raises:
        SystemExit: if the run cannot be read, or has no full gradients of two samples at least.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run of main.py")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2, 3, 4], help="of the projections")
    options = parser.parse_args(argv)
    try:
        recorded_options = recorded(options.run)
        with launched(recorded_options.device, recorded_options.timeout) as launch:
            if launch.size > 1:
                raise ValueError("this runs in one process: start it with python")
            projector = prepare(recorded_options, launch)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    files = sorted((options.run / GRADIENTS).glob("*.safetensors"))
    if len(files) < 2:
        parser.exit(
            2,
            f"{parser.prog}: error: {options.run / GRADIENTS} has gradients of {len(files)} samples, and inner "
            f"products take two at least: python compute_full_gradients.py {options.run} --num_samples 8\n",
        )
    names = list(projector.engine.metadata["layers"])
    gradients = [_read(file, names, projector.run.launch.device) for file in files]
    rows = measure(projector.run, gradients, options.ranks, options.seeds)
    _write(options.run / "error_with_rank", rows, len(gradients), names)
    print(f"Error of inner products of {len(gradients)} samples, mean over {len(options.seeds)} seeds")
    for (kind, rank, dim), errors in _by_rank(rows).items():
        print(f"{kind:<11}  rank {rank:>5}  {dim:>7,} numbers  {sum(errors) / len(errors):.1%}")
    print(f"results: {options.run / 'error_with_rank.png'}")
    return rows


def measure(
    run: Run, gradients: list[dict[str, Tensor]], ranks: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Errors |<proj g_i, proj g_j> - <g_i, g_j>| / (|g_i| |g_j|) of all pairs of samples, i = j left out."""
    model_fn, params = gf.functionalize(run.model.eval(), gf.causal_lm_loss)
    tokens = run.corpus.in_order(0, 1).tokens[:, :8].to(run.launch.device)  # enough to see how weights are used
    exact = _gram([torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients])
    norms = exact.diagonal().sqrt()
    pairs = torch.ones_like(exact, dtype=torch.bool).triu(1)
    rows = []
    for kind in COLOURS:
        for rank in ranks:
            for seed in seeds:
                projection = gf.kronecker_projection(
                    model_fn,
                    params,
                    {"input_ids": tokens},
                    layers=list(gradients[0]),
                    rank=rank,
                    min_rank=1,
                    kind=kind,
                    seed=seed,
                )
                projected = _gram([projection.project(gradient) for gradient in gradients])
                errors = ((projected - exact).abs() / torch.outer(norms, norms))[pairs]
                numbers = (errors.square().mean().sqrt().item(), errors.quantile(0.95).item())
                rows.append(dict(zip(COLUMNS, (kind, rank, projection.dim, seed, *numbers), strict=True)))
    return rows


def draw(rows: list[dict[str, Any]], samples: int, layers: int) -> bytes:
    """The figure as a PNG: the root mean square over pairs, mean and range over seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        errors = {dim: errors for (of_kind, _, dim), errors in _by_rank(rows).items() if of_kind == kind}
        dims = sorted(errors)
        axes.plot(
            dims, [sum(errors[dim]) / len(errors[dim]) for dim in dims], "o-", color=colour, label=f"{kind} matrices"
        )
        low, high = ([pick(errors[dim]) for dim in dims] for pick in (min, max))
        axes.fill_between(dims, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=f"numbers kept of a sample, in {layers} layers")
    axes.set_ylabel("error of an inner product,\nof the product of the two norms")
    axes.set_title(
        f"Inner products of the projected gradients of {samples} samples\n"
        "lines: root mean square over pairs, mean over seeds; bands: lowest to highest seed",
        loc="left",
        fontsize=9,
    )
    for dim, rank in {row["dim"]: row["rank"] for row in rows}.items():
        axes.annotate(f"rank {rank}", (dim, 1), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _read(path: Path, names: list[str], device: torch.device) -> dict[str, Tensor]:
    with safe_open(path, "pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in names}


def _by_rank(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[float]]:
    """The errors of each (kind, rank, dim), one for each seed."""
    errors: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        errors.setdefault((row["kind"], row["rank"], row["dim"]), []).append(row["rms_error"])
    return errors


def _gram(vectors: list[Tensor]) -> Tensor:
    stacked = torch.stack(vectors)
    return (stacked @ stacked.T).double()


def _write(stem: Path, rows: list[dict[str, Any]], samples: int, layers: list[str]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row[column] for column in COLUMNS] for row in rows)
    write_whole(stem.with_suffix(".csv"), table.getvalue())
    described = {"samples": samples, "layers": layers, "errors": rows}
    write_whole(stem.with_suffix(".json"), json.dumps(described, indent=1) + "\n")
    stem.with_suffix(".png").write_bytes(draw(rows, samples, len(layers)))


if __name__ == "__main__":
    main()
