"""How well projections keep the inner products of a trained language model's per-sample gradients.

    python benchmarks/projection_fidelity.py            # the JSON of results, the figure, and the tables of the page
    python benchmarks/projection_fidelity.py --page     # the figure and the tables again, from the results

The model is the newest that `make demo` trained (a GPT-2 of 4 layers of 128, tied embeddings); where there is none the
demo's is trained first, and the results say which. The samples are held-out blocks of all the demo's domains. The exact
gradient of each is computed by a backward of its own, and projected with matrices of each kind at each rank, with
several seeds; "pca" takes its matrices from other samples, of the training split.

Over all pairs of two samples i and j, d their exact inner product and d' that of their projections:

    error      sqrt(mean of ((d' - d) / (|g_i| |g_j|))^2)
    pearson, spearman     correlations of d' with d

A figure is the median over seeds. "nothing kept" is the error of d' = 0, which is what an error has to be held against.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from demo.run import DEMO, prepare_data, training_options
from GradDotProd_LM.main import main as train
from shared.dataloader import TokenCorpus
from shared.model_setup import quiet_transformers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "projection_fidelity.json"
FIGURE = ROOT / "docs" / "projection_fidelity.png"
PAGE = ROOT / "docs" / "projections.md"

POSITIONS = 64
RANKS = (16, 64, 256, 1024)
MIN_RANK = 4
RANDOM_KINDS = ("gaussian", "rademacher", "orthonormal", "sparse", "mask")
SQUARE = "gaussian, min_rank 16"
SQUARE_MIN_RANK = 16
EVERYTHING = ("embedding", "norm", "bias", "head")
LAYER_SETS = {
    "linear maps": "the 16 linear maps of the blocks, the default",
    "c_attn and c_fc": '`layers="attn.c_attn,mlp.c_fc"`',
    "embeddings": "tokens, tied with the head, and positions",
    "everything": "all 52 parameters",
}
SHOWN_SETS = ("linear maps", "embeddings", "everything")
SHOWN_RANK = 256
NOTHING_KEPT = "nothing kept"


class Look(NamedTuple):
    """How a line is drawn."""

    color: str
    marker: str
    linestyle: str = "-"


LOOKS = {
    "gaussian": Look("#0072B2", "o"),
    SQUARE: Look("#0072B2", "P", "--"),
    "rademacher": Look("#56B4E9", "s"),
    "orthonormal": Look("#009E73", "D"),
    "sparse": Look("#E69F00", "v"),
    "mask": Look("#CC79A7", "^"),
    "pca": Look("#D55E00", "X"),
}


class Variant(NamedTuple):
    """A kind of matrices with a least rank, at several ranks."""

    kind: str
    min_rank: int
    ranks: tuple[int, ...]


VARIANTS = {label: Variant(label, MIN_RANK, RANKS) for label in LOOKS}
VARIANTS[SQUARE] = Variant("gaussian", SQUARE_MIN_RANK, tuple(rank for rank in RANKS if rank >= SQUARE_MIN_RANK**2))


class Work(NamedTuple):
    """What is measured on.

    Attributes:
        model_fn: of `functionalize`, as are the parameters.
        params: by name.
        samples: a batch `[n, POSITIONS]`.
        others: batches for matrices from data.
        about: the model and the data, for the results.
    """

    model_fn: Any
    params: dict[str, Tensor]
    samples: dict[str, Tensor]
    others: list[dict[str, Tensor]]
    about: dict[str, Any]


# --- the model and the data -------------------------------------------------------------------------------------------


def checkpoint() -> tuple[Path, str]:
    """The demo's newest checkpoint, and where it is from."""
    found = sorted((DEMO / "results").glob("*/checkpoint/step-*"), key=lambda folder: folder.stat().st_mtime)
    if found:
        return found[-1], "found: the newest that `make demo` trained"
    data = prepare_data()
    run = train([*training_options(data), "--results_dir", str(DEMO / "results")])
    return max((run / "checkpoint").glob("step-*")), "trained for this benchmark as `make demo` does"


def corpus(split: str) -> TokenCorpus:
    folder, prefix = {"train": (DEMO / "data", "train-"), "validation": (DEMO / "data" / "val", "validation-")}[split]
    files = {path.stem.removeprefix(prefix): path for path in sorted(folder.glob(f"{prefix}*.bin"))}
    return TokenCorpus(files, block_size=POSITIONS)


def build(samples: int) -> Work:
    folder, origin = checkpoint()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    drawn = corpus("validation").sample(samples, seed=0, step=0)
    others = corpus("train").sample(samples, seed=0, step=0).tokens
    with torch.no_grad():
        loss = model_fn(params, {"input_ids": drawn.tokens}).mean().item()
    about = {
        "model": f"GPT-2, {module.config.n_layer} layers of {module.config.n_embd}, tied embeddings of "
        f"{module.config.vocab_size} tokens",
        "checkpoint": origin,
        "steps": int(folder.name.removeprefix("step-")),
        "parameters": sum(p.numel() for p in params.values()),
        "samples": samples,
        "positions": POSITIONS,
        "samples_of_domains": {domain: drawn.domains.count(domain) for domain in sorted(set(drawn.domains))},
        "loss": loss,
    }
    return Work(model_fn, params, {"input_ids": drawn.tokens}, [{"input_ids": ids} for ids in others.split(8)], about)


def gradients(work: Work) -> Iterator[dict[str, Tensor]]:
    """The exact gradient of each sample, one at a time."""
    for ids in work.samples["input_ids"].split(1):
        leaves = {name: p.detach().requires_grad_() for name, p in work.params.items()}
        loss = work.model_fn(leaves, {"input_ids": ids})[0]
        yield dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


# --- measuring --------------------------------------------------------------------------------------------------------


def projection_of(
    work: Work, kind: str, rank: int, seed: int = 0, min_rank: int = MIN_RANK, **choice: Any
) -> gf.KroneckerProjection:
    one = {"input_ids": work.samples["input_ids"][:1]}
    data = work.others if kind == "pca" else None
    return gf.kronecker_projection(
        work.model_fn, work.params, one, rank=rank, min_rank=min_rank, kind=kind, seed=seed, batches=data, **choice
    )


def names_of_sets(work: Work) -> dict[str, list[str]]:
    choices = {
        "linear maps": {},
        "c_attn and c_fc": {"layers": "attn.c_attn,mlp.c_fc"},
        "embeddings": {"layers": "wte,wpe"},
        "everything": {"include": EVERYTHING},
    }
    return {name: list(projection_of(work, "mask", 16, **choice).slices) for name, choice in choices.items()}


class Projector:
    """Projects a gradient by many projections of the same parameters: one wide product with all their matrices P_in.

    It gives what `projection.project` of each gives, which takes as many passes over the gradient as there are.
    """

    def __init__(self, projections: list[gf.KroneckerProjection]) -> None:
        self.projections = projections
        self.wide = {
            name: torch.cat([projection.matrices(name)[0] for projection in projections], 1).t().contiguous()
            for name in projections[0].slices
        }

    def __call__(self, gradient: dict[str, Tensor]) -> list[Tensor]:
        """`[k]` of each projection."""
        columns: list[list[Tensor]] = [[] for _ in self.projections]
        for name, wide in self.wide.items():
            blocks = self.projections[0].parts[name].blocks.of(gradient[name].unsqueeze(0))[0]  # [count, d_in, d_out]
            sides = [projection.matrices(name) for projection in self.projections]
            pieces = (wide @ blocks).split([p_in.shape[1] for p_in, _ in sides], dim=1)  # [count, k_in, d_out]
            for of_one, piece, (_, p_out) in zip(columns, pieces, sides, strict=True):
                of_one.append((piece @ p_out).flatten())
        return [torch.cat(of_one) for of_one in columns]


def agreement(exact: Tensor, projected: Tensor) -> dict[str, float]:
    """How projected inner products agree with exact ones, `[n, n]` each, over pairs of two samples."""
    pairs = tuple(torch.triu_indices(len(exact), len(exact), offset=1))
    norms = exact.diagonal().sqrt()
    error = (projected - exact) / norms / norms[:, None]
    of_pairs = exact[pairs], projected[pairs]
    ranked = [values.argsort().argsort().double() for values in of_pairs]
    return {
        "error": error[pairs].square().mean().sqrt().item(),
        "pearson": torch.corrcoef(torch.stack(of_pairs))[0, 1].item(),
        "spearman": torch.corrcoef(torch.stack(ranked))[0, 1].item(),
    }


def measure(work: Work, seeds: int) -> dict[str, Any]:
    projections = {
        (label, rank, seed): projection_of(work, variant.kind, rank, seed, variant.min_rank, include=EVERYTHING)
        for label, variant in VARIANTS.items()
        for rank in variant.ranks
        for seed in range(seeds if variant.kind in RANDOM_KINDS else 1)
    }
    projector = Projector(list(projections.values()))
    print(f"{len(projections)} projections", flush=True)
    rows: dict[str, list[Tensor]] = {name: [] for name in work.params}
    vectors: list[list[Tensor]] = []
    for gradient in gradients(work):
        for name, g in gradient.items():
            rows[name].append(g.flatten())
        vectors.append(projector(gradient))
        print(".", end="", flush=True)
    exact = {}
    for name in list(rows):
        of_name = torch.stack(rows.pop(name))
        exact[name] = (of_name @ of_name.T).double()
    projected = {
        key: torch.stack(rows).double() for key, rows in zip(projections, zip(*vectors, strict=True), strict=True)
    }

    found = {}
    for layers, names in names_of_sets(work).items():
        of_set = torch.stack([exact[name] for name in names]).sum(0)
        variants: dict[str, dict[str, Any]] = {label: {} for label in VARIANTS}
        for (label, rank, seed), y in projected.items():
            slices = projections[label, rank, seed].slices
            part = torch.cat([y[:, slices[name]] for name in names], 1)
            entry = variants[label].setdefault(str(rank), {"dim": part.shape[1], "seeds": []})
            entry["seeds"].append(agreement(of_set, part @ part.T))
        found[layers] = {
            "parameters": len(names),
            "numbers": sum(work.params[name].numel() for name in names),
            NOTHING_KEPT: agreement(of_set, torch.zeros_like(of_set))["error"],
            "kinds": variants,
        }
    return found


# --- showing ----------------------------------------------------------------------------------------------------------


def median(results: dict[str, Any], layers: str, label: str, rank: int, what: str) -> float:
    seeds = results["layers"][layers]["kinds"][label][str(rank)]["seeds"]
    return statistics.median(values[what] for values in seeds)


def draw(results: dict[str, Any], path: Path) -> None:
    """Error and rank correlation against rank, a column for each set of layers."""
    figure = Figure(figsize=(10, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(SHOWN_SETS), sharex=True, sharey="row")
    for column, layers in enumerate(SHOWN_SETS):
        of_set = results["layers"][layers]
        for row, what in enumerate(("error", "spearman")):
            panel = axes[row, column]
            for label, variant in VARIANTS.items():
                values = [median(results, layers, label, rank, what) for rank in variant.ranks]
                panel.plot(variant.ranks, values, label=label, markersize=5, **LOOKS[label]._asdict())
            panel.set_xscale("log", base=2)
            panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
            panel.grid(alpha=0.25)
        axes[0, column].axhline(of_set[NOTHING_KEPT], color="grey", linestyle=":", label=NOTHING_KEPT)
        axes[0, column].set_yscale("log")
        title = f"{layers}: {of_set['parameters']} parameters,\n{of_set['numbers']:,} numbers"
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel("rank: about how many numbers\na parameter's gradient becomes")
    axes[0, 0].set_ylabel("error of inner products,\nof the gradients' norms")
    axes[1, 0].set_ylabel("Spearman's correlation\nwith exact inner products")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def table(results: dict[str, Any]) -> str:
    """Error, Pearson's and Spearman's correlation of each kind at each rank, for each set of layers."""
    lines = [
        f"| layers | kind | {' | '.join(f'rank {rank}' for rank in RANKS)} |",
        "|---" * (2 + len(RANKS)) + "|",
    ]
    for layers, of_set in results["layers"].items():
        first = f"{layers} (nothing kept: {of_set[NOTHING_KEPT]:.3f})"
        for label, variant in VARIANTS.items():
            of_rank = {
                rank: [median(results, layers, label, rank, what) for what in ("error", "pearson", "spearman")]
                for rank in variant.ranks
            }
            cells = ["{:.3f} / {:.2f} / {:.2f}".format(*of_rank[rank]) if rank in of_rank else "" for rank in RANKS]
            lines.append(f"| {first} | {label} | {' | '.join(cells)} |")
            first = ""
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    """What was measured, on what."""
    about, environment = results["about"], results["environment"]
    sets = "; ".join(f"{name}: {what}" for name, what in LAYER_SETS.items())
    numbers = {
        name: f"{of_set['numbers']:,} numbers to {of_set['kinds']['gaussian'][str(SHOWN_RANK)]['dim']:,}"
        for name, of_set in results["layers"].items()
    }
    kept = "; ".join(f"{name}, {what}" for name, what in numbers.items())
    return (
        f"{about['model']}, {about['steps']} steps, a loss of {about['loss']:.2f} nats on {about['samples']} held-out "
        f"samples of {about['positions']} tokens. min_rank is {results['min_rank']} unless said; medians of "
        f"{results['seeds']} seeds (pca: one, from {about['samples']} samples of the training split). {sets}. At rank "
        f"{SHOWN_RANK} these become: {kept}. torch {environment['torch']}, float32, CPU. Raw numbers: "
        "[benchmarks/results/projection_fidelity.json](../benchmarks/results/projection_fidelity.json)."
    )


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    before, begin, rest = text.partition("<!-- fidelity: benchmarks/projection_fidelity.py --page -->\n")
    _, end, after = rest.partition("\n<!-- end of fidelity -->")
    return f"{before}{begin}{caption(results)}\n\n{table(results)}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="of every kind but pca")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="draw and write from the results, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    if not arguments.page:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": "cpu",
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "dtype": "float32",
        }
        work = build(arguments.samples)
        results = {
            "environment": environment,
            "about": work.about,
            "min_rank": MIN_RANK,
            "seeds": arguments.seeds,
            "layers": measure(work, arguments.seeds),
        }
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\n{table(results)}")
    if arguments.results == RESULTS:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        draw(results, FIGURE)
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
